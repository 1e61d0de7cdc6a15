"""Layer-by-layer calibration: every pair is fitted to what the pruned ones before it pass on.

All batches are under way at once, each in a thread. At a pair they wait for each other, its directions are made from
the moments of all of them, and each goes on with what these directions leave of its activations. So one pass is
enough, however many layers there are, and no weight is changed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..base_model.activations import TokenReader, add_blocks, evaluating, hooks
from ..base_model.weight import base_of
from ..linalg.moments import Moments
from .directions import Directions, Found, Method, decompose_pair
from .pairs import beside_name, probes


@dataclass
class _Batch(threading.local):
    """What belongs to the batch of a thread: its masks, and activations that wait for their partners."""

    masks: dict[str, Tensor] = field(default_factory=dict)
    waiting: dict[str, Tensor] = field(default_factory=dict)


class _Done(Exception):
    """All pairs are fitted; the rest of the model need not run."""


def refit(
    model: nn.Module,
    found: Found,
    ranks: Mapping[str, Tensor],
    method: Method,
    batches: Sequence[Mapping[str, Any]],
) -> Found:
    """Directions of the same pairs, each made from activations behind those that are pruned already.

    Args:
        model: the model, not changed.
        found: from `decompose`.
        ranks: name -> (H,), directions that every head keeps.
        method: "clover" or "vanilla".
        batches: keyword arguments of the model. The activations of one layer are held for all of them.

    Returns:
        Name -> the pair and its new directions.

    Raises:
        ValueError: if a pair is not reached by every batch, in the same order, or something is not finite.
    """
    fitting = _Fitting(model, found, ranks, method, len(batches))
    errors: list[BaseException] = []

    def go(batch: Mapping[str, Any]) -> None:
        try:
            with torch.no_grad():
                values, fitting.batch.masks = fitting.reader.start(batch)
                model(**values)
            raise fitting.not_reached()  # or this batch would be waited for
        except (_Done, threading.BrokenBarrierError):
            pass
        except BaseException as error:
            errors.append(error)
            fitting.together.abort()

    threads = [threading.Thread(target=go, args=(batch,), daemon=True) for batch in batches]
    with evaluating(model), hooks() as hooked:
        hooked.extend(fitting.hooks())
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except KeyboardInterrupt:
            fitting.together.abort()
            for thread in threads:
                thread.join()
            raise
    if errors:
        raise errors[0]
    return {name: (pair, fitting.made[name][0]) for name, (pair, _) in found.items()}


class _Fitting:
    """The hooks of one pass, and what they make: name -> directions, and `E C` of every query head."""

    def __init__(
        self, model: nn.Module, found: Found, ranks: Mapping[str, Tensor], method: Method, batches: int
    ) -> None:
        self.model, self.found, self.ranks, self.method = model, found, ranks, method
        self.reader, self.batch = TokenReader(model), _Batch()
        self.together, self.lock = threading.Barrier(batches), threading.Lock()
        self.moments: dict[str, Moments] = {}
        self.at: set[str] = set()  # the pairs that batches wait at
        self.made: dict[str, tuple[Directions, Tensor, Tensor | None]] = {}

    def not_reached(self) -> ValueError:
        """The error of a batch that does not come to a pair that others do."""
        name = next(name for name in self.found if name not in self.made)
        return ValueError(
            f"{name}: expected every batch to reach it in turn, as sequential calibration needs, found one that does "
            "not; pass batches of one kind, or leave sequential out"
        )

    def hooks(self) -> list[Any]:
        """Registers them: in front of output projections, behind keys and queries."""
        handles = []
        for name, (pair, _) in self.found.items():
            partner = base_of(self.model.get_submodule(pair.partner.path))
            if pair.kind == "vo":
                handles.append(partner.register_forward_pre_hook(self._before_output(name)))
                continue
            own = base_of(self.model.get_submodule(pair.path))
            handles.append(own.register_forward_hook(self._behind(name, own is partner, "k")))
            if own is not partner:
                handles.append(partner.register_forward_hook(self._behind(name, False, "q")))
        return handles

    def _before_output(self, name: str) -> Any:
        pair = self.found[name][0]

        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            _, p, constant = self._fit(name, {beside_name(pair): inputs[0]})
            return (_changed(pair.partner.heads, inputs[0], p.mT, constant), *inputs[1:])

        return hook

    def _behind(self, name: str, fused: bool, side: str) -> Any:
        pair = self.found[name][0]

        def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor | None:
            waiting = self.batch.waiting
            waiting[f"{name} {side}"] = output
            if not fused and len({f"{name} q", f"{name} k"} & set(waiting)) < 2:
                return None  # its partner comes next
            own = waiting.pop(f"{name} k")
            beside = own if fused else waiting.pop(f"{name} q")
            _, p, _ = self._fit(name, {pair.name: own, beside_name(pair): beside})
            if side == "q" or fused:
                return _changed(pair.partner.heads, output, p, None)
            return _changed(pair.heads, output, p[:: len(p) // pair.heads.count].mT, None)

        return hook

    def _fit(self, name: str, seen: Mapping[str, Tensor]) -> tuple[Directions, Tensor, Tensor | None]:
        """Waits for all batches; then the pair's directions, `E C` (G, d, d) and the constant that is cut (G, d)."""
        pair = self.found[name][0]
        if name not in self.made:
            wanted = probes(self.model, [pair])
            with self.lock:
                self.at.add(name)
                for key, x in seen.items():
                    add_blocks(self.moments, key, self.reader.blocks(wanted[key], x, self.batch.masks))
            if self.together.wait() == 0:
                if len(self.at) > 1:
                    raise self.not_reached()
                self.at.clear()
                for key in seen:
                    self.moments[key].check_finite(key)
                directions = decompose_pair(self.model, pair, self.method, self.moments)
                groups = pair.partner.heads.count // pair.heads.count
                down, back = directions.factors(self.ranks[name], groups)
                p = directions.product(down, back)
                self.made[name] = (directions, p, directions.constant(down, back))
                for key in seen:
                    del self.moments[key]
            self.together.wait()
        if len(self.made) == len(self.found):
            raise _Done
        return self.made[name]


def _changed(heads: Any, x: Tensor, p: Tensor, constant: Tensor | None) -> Tensor:
    """Activations (..., features) with every head's z in place of `z P + constant`, in at least float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    blocks = torch.einsum("...gd,gde->...ge", heads.blocks(x, p.shape[-1]).to(dtype), p.to(x.device, dtype))
    if constant is not None:
        blocks = blocks + constant.to(x.device, dtype)
    result = x.clone()
    place = heads.heads(result)
    place.copy_(blocks.reshape(place.shape))
    return result
