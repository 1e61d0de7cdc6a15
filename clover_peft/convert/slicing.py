"""`slice_hidden_size`: make the residual stream of a model narrower (SliceGPT, arXiv 2401.15024)."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..base_model.activations import TokenReader, evaluating, read_batches, warn_if_few
from ..base_model.rewritten import forget_base
from ..linalg.moments import Moments, check_finite
from ..runtime.interrupts import uninterrupted
from .sliced_models import add_shortcuts, write_record
from .slicing_checks import check_sliceable, choose_width
from .slicing_report import SlicingReport
from .stream import Block, Stream, head_of, norms, present, put, trunk_of

Rotation = Literal["per_block", "shared"]
# "per_block" adds the mean moment of all blocks to a block's own, this many times. Chosen on validation text with
# SmolLM2-135M (`benchmarks/slicing.py --pull`).
PULL = 16.0


@torch.inference_mode(False)
@torch.no_grad()
def slice_hidden_size(
    model: nn.Module,
    ratio: float,
    calibration: Iterable[Mapping[str, Any]],
    *,
    rotation: Rotation = "per_block",
    multiple: int = 8,
) -> SlicingReport:
    """Remove the directions of the residual stream that hold the least, in place (SliceGPT, arXiv 2401.15024).

    Every block reads the stream x (D,) through a norm and adds to it. With the norm's gains folded into the block, an
    orthonormal Q passes the norm: `norm(Q^T x) = Q^T norm(x)`. The stream becomes `x' = c P^T x`, with P (D, d) the
    leading eigenvectors of the second moments of `norm(x)`, and `c = sqrt(d / D)`, which leaves mean squares, and with
    them the norm's epsilon, as they were (ours). Where norms are LayerNorms, P is orthogonal to the vector of ones in
    both spaces, so that their mean is zero before and after (ours).

    "shared": one P for the whole model. The result is of the stock class with another `hidden_size`, and loads without
    `clover_peft`; OPT's class derives the size of heads from it, so that OPT needs `import clover_peft`.
    "per_block": a P for every block, measured on the outputs of the sliced blocks before it, and drawn to the P of
    "shared" (ours): bases that differ lose other directions at every block, and all that they lose adds up. What
    passes a block is multiplied by `P_next^T P`, (d, d), which costs 2 d^2 parameters a layer. Load it after
    `import clover_peft`.

    The head is no longer tied to the embedding, since the last gains are folded into it alone. New layers are made
    beside the old ones and put in their place at the end: an error or an interrupt before that leaves the model as it
    was. Costs a second copy of the weights, eigenvectors of D x D matrices, a D x D moment in float64 for each block,
    and one pass over the data; "per_block" two, and the stream of all tokens, D numbers each.

    Args:
        model: a causal language model of a known family, without adapters and not quantised.
        ratio: share of the hidden size to remove, from 0 to below 1; 0 removes none and changes no output.
        calibration: batches, each of the model's keyword arguments. Pass about ten tokens for each dimension.
        rotation: "per_block" or "shared".
        multiple: round the new size to the nearest multiple of this. The config of Llama and of DeepSeek-V2 demands a
            multiple of the number of heads too; "shared" then takes the least common one.

    Returns:
        `SlicingReport`.

    Raises:
        ValueError, TypeError: if the model, the data or an argument does not fit. The model is then unchanged.
    """
    started = time.perf_counter()
    if rotation not in ("per_block", "shared"):
        raise ValueError(f"rotation: expected 'per_block' or 'shared', found {rotation!r}")
    stream = check_sliceable(model)
    stock = rotation == "shared" and stream.sized
    width = choose_width(model, ratio, multiple, stock)
    before = sum(parameter.numel() for parameter in model.parameters())
    slicer = Slicer(model, stream, width, read_batches(calibration))
    with evaluating(model):
        slicer.per_block() if rotation == "per_block" else slicer.shared()
    warn_if_few("calibration", slicer.tokens, slicer.size, f"{slicer.size} dimensions")
    with uninterrupted():
        hidden_size = slicer.install(stock)
        if not stock:
            write_record(model, width, rotation)
    return SlicingReport(
        rotation=rotation,
        stock=stock,
        width=(hidden_size, width),
        energy=slicer.energy,
        parameters=(before, sum(parameter.numel() for parameter in model.parameters())),
        tokens=slicer.tokens,
        seconds=time.perf_counter() - started,
    )


@dataclass
class Slicer:
    """Makes the parts of a sliced model, and puts them in place.

    Attributes:
        model: the model, which `install` alone changes.
        stream: its family's.
        width: the new hidden size, d.
        data: calibration data.
        layers: new layers.
        embeddings: name -> new embedding.
        norm: the new last norm.
        head: the new head.
        energy: path of a norm -> share of the second moment in front of it that its basis keeps.
        tokens: of the calibration data.
    """

    model: Any
    stream: Stream
    width: int
    data: Sequence[Mapping[str, Any]]
    layers: list[Any] = field(default_factory=list)
    embeddings: dict[str, nn.Module] = field(default_factory=dict)
    norm: Any = None
    head: Any = None
    energy: dict[str, float] = field(default_factory=dict)
    tokens: int = 0

    def __post_init__(self) -> None:
        self.trunk = trunk_of(self.model)
        self.old_head: Any = head_of(self.model)
        self.old_norm = getattr(self.trunk, self.stream.norm)
        self.size = getattr(self.trunk, self.stream.embeddings[0]).weight.shape[-1]
        self.scale = math.sqrt(self.width / self.size)
        self.drawn_to: Tensor | float = 0.0
        names = {module: name for name, module in self.model.named_modules()}
        self.names = [names[norm] for norm in norms(self.trunk, self.stream)]

    # ------------------------------------------------------------------ the two ways

    def shared(self) -> None:
        """One basis from the moments of all norms' inputs, in one pass of the model as it is."""
        moments = self.moments()
        basis = self.basis(_mean(moments))
        for name, each in zip(self.names, moments, strict=True):
            self.energy[name] = _share(each.second[0], basis)
        self._slice_embeddings(basis)
        for old in tqdm(self.trunk.layers, desc="CLOVER slicing", unit=" layers", delay=3, leave=False):
            self.layers.append(self._layer(old, [basis] * 3))
        self._slice_head(basis)

    def per_block(self) -> None:
        """A basis for every block, from the moments of the stream that the sliced blocks before it leave."""
        self.drawn_to = PULL * _mean(self.moments())
        flow = _Flow(self)
        basis = self._next_basis(flow)
        self._slice_embeddings(basis)
        for i, old in enumerate(tqdm(self.trunk.layers, desc="CLOVER slicing", unit=" layers", delay=3, leave=False)):
            bases = [basis]
            for block in self.stream.blocks:
                flow.run(old, i, block, bases[-1])
                bases.append(self._next_basis(flow))
            new, basis = self._layer(old, bases), bases[-1]
            like = new.get_submodule(self.stream.attention.norm).weight
            first, second = ((after.mT @ before).to(like) for before, after in pairwise(bases))
            add_shortcuts(new, self.stream, (first, second))
            self.layers.append(new)
        self._slice_head(basis)

    # ------------------------------------------------------------------ bases

    def moments(self) -> list[Moments]:
        """Second moments of the normalised stream in front of every norm of the model as it is, in one pass."""
        reader = TokenReader(self.model)
        masks: dict[str, Tensor] = {}
        found = [self._zero() for _ in self.names]

        def add(moments: Moments) -> Callable[..., None]:
            return lambda module, inputs: self._add(moments, inputs[0], masks.get("attention_mask"))

        with ExitStack() as hooked:
            for norm, moments in zip(norms(self.trunk, self.stream), found, strict=True):
                hooked.enter_context(norm.register_forward_pre_hook(add(moments)))
            for batch in tqdm(self.data, desc="CLOVER moments", unit=" batches", delay=3, leave=False):
                values, masks = reader.start_without_logits(batch)
                self.model(**values)
        for name, moments in zip(self.names, found, strict=True):
            self._check(name, moments)
        return found

    def _next_basis(self, flow: _Flow) -> Tensor:
        """The basis of the next norm's input."""
        name, moments = self.names[len(self.energy)], self._zero()
        for state, mask in zip(flow.states, flow.masks, strict=True):
            self._add(moments, state.to(flow.device), mask)
        self._check(name, moments)
        basis = self.basis(moments.second[0] + self.drawn_to)
        self.energy[name] = _share(moments.second[0], basis)
        return basis

    def _zero(self) -> Moments:
        weight = self.old_norm.weight
        at = torch.device("cpu") if weight.device.type == "mps" else weight.device
        return Moments.empty(torch.Size((1, self.size)), at)

    def _add(self, moments: Moments, x: Tensor, mask: Tensor | None) -> None:
        """Add what a norm without gains makes of the tokens that the mask keeps, of (batch, tokens, D)."""
        rows = x[mask] if mask is not None and mask.shape == x.shape[:2] else x.flatten(0, -2)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        if self.stream.centred:
            rows = rows - rows.mean(-1, keepdim=True)
        moments.add((rows / rows.square().mean(-1, keepdim=True).sqrt().clamp(min=1e-12)).unsqueeze(1))

    def _check(self, name: str, moments: Moments) -> None:
        if not moments.tokens:
            raise ValueError("calibration: expected tokens, found only padding; check their attention_mask")
        check_finite(moments.sums, name)
        self.tokens = moments.tokens

    def basis(self, moment: Tensor) -> Tensor:
        """(D, d) float64 with orthonormal columns: the leading eigenvectors of (D, D). In a centred stream d - 1 of
        them, and nothing along the vector of ones of either space."""
        if not self.stream.centred:
            return torch.linalg.eigh(moment).eigenvectors.flip(-1)[:, : self.width]
        inside = _without_ones(self.size).to(moment)
        leading = torch.linalg.eigh(inside.mT @ moment @ inside).eigenvectors.flip(-1)[:, : self.width - 1]
        return inside @ leading @ _without_ones(self.width).to(moment).mT

    # ------------------------------------------------------------------ parts

    def _copy(self, module: nn.Module) -> Any:
        """A copy that shares the config."""
        config = self.model.config
        return copy.deepcopy(module, {id(config): config})

    def _put(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        put(module, name, tensor.to(getattr(module, name)), self.width)

    def _slice_embeddings(self, basis: Tensor) -> None:
        for name in self.stream.embeddings:
            new: Any = self._copy(getattr(self.trunk, name))
            self._put(new, "weight", _right(new.weight, self.scale * basis))
            self.embeddings[name] = new

    def _slice_head(self, basis: Tensor) -> None:
        self.norm, self.head = self._copy(self.old_norm), self._copy(self.old_head)
        gain = self.norm.weight.to(basis)
        weight = _right(self.head.weight, gain.unsqueeze(-1) * basis / self.scale)
        self._reset(self.norm)
        if self.stream.centred:
            # The head has no bias. The centred stream has nothing along the ones, which carry it instead.
            constant = self.head.weight.to(basis) @ self.old_norm.bias.to(basis)
            weight += constant.unsqueeze(-1) / self.width
            self.norm.bias.fill_(1)
        self._put(self.head, "weight", weight)

    def _layer(self, old: nn.Module, bases: Sequence[Tensor]) -> Any:
        """A copy of a layer that reads and writes the new stream; (D, d) before, between and behind its blocks."""
        new = self._copy(old)
        for block, (before, after) in zip(self.stream.blocks, pairwise(bases), strict=True):
            self._read(new, block, before)
            self._write(new, block, after)
            self._reset(new.get_submodule(block.norm))
        return new

    def _read(self, layer: nn.Module, block: Block, basis: Tensor) -> None:
        """Let a block read the new stream, its norm's gains included."""
        norm: Any = layer.get_submodule(block.norm)
        gain, constant = norm.weight.to(basis), getattr(norm, "bias", None)
        for module, name in present(layer, block.reads):
            weight = getattr(module, name)
            if constant is not None:
                module.bias.copy_((module.bias.to(basis) + weight.to(basis) @ constant.to(basis)).to(module.bias))
            self._put(module, name, _right(weight, gain.unsqueeze(-1) * basis / self.scale))

    def _write(self, layer: nn.Module, block: Block, basis: Tensor) -> None:
        """Let a block write the new stream."""
        written = (self.scale * basis).mT
        for module, name in present(layer, block.writes):
            weight = getattr(module, name)
            self._put(module, name, (written.to(weight.device) @ weight.to(written.dtype)))
            if getattr(module, "bias", None) is not None:
                self._put(module, "bias", written @ module.bias.to(written))

    def _reset(self, norm: nn.Module) -> None:
        """A norm of the new width without gains."""
        for name, parameter in list(norm.named_parameters()):
            value = 1.0 if name == "weight" else 0.0
            self._put(norm, name, torch.full((self.width,), value, device=parameter.device))

    # ------------------------------------------------------------------ the model

    def install(self, stock: bool) -> int:
        """Put the new parts in place of the old ones; returns the hidden size before."""
        config, trunk = self.model.config, self.trunk
        modes = {path: module.training for path, module in self.model.named_modules(remove_duplicate=False)}
        trunk.layers = nn.ModuleList(self.layers)
        for name, new in self.embeddings.items():
            setattr(trunk, name, new)
        setattr(trunk, self.stream.norm, self.norm)
        self.model.lm_head = self.head
        for path, module in self.model.named_modules(remove_duplicate=False):
            module.training = modes.get(path, module.training)
        config.tie_word_embeddings = False
        if stock:
            attention: Any = self.layers[0].self_attn
            if hasattr(attention, "head_dim") and getattr(config, "head_dim", None) is None:
                config.head_dim = attention.head_dim  # no longer hidden_size / num_attention_heads
            config.hidden_size = self.width
        forget_base(self.model, "sliced")
        return int(self.size)


class _Flow:
    """The residual stream of all calibration data, block after block.

    Attributes:
        states: (batch, tokens, D) for every batch, on the CPU, in the model's dtype.
        masks: (batch, tokens) bool for every batch, or None.
        calls: the keywords of every layer, for every batch.
        device: where the model is.
    """

    def __init__(self, slicer: Slicer) -> None:
        self.states: list[Tensor] = []
        self.masks: list[Tensor | None] = []
        self.calls: list[list[dict[str, Any]]] = []
        reader = TokenReader(slicer.model)
        self.device = reader.device
        layers = slicer.trunk.layers
        recorders = [_Recorder(layer, last=i == len(layers) - 1) for i, layer in enumerate(layers)]
        try:
            slicer.trunk.layers = nn.ModuleList(recorders)
            for batch in slicer.data:
                values, masks = reader.start_without_logits(batch)
                try:
                    slicer.model(**values)
                except _Stopped as stopped:
                    self.states.append(stopped.args[0].cpu())
                self.masks.append(masks.get("attention_mask"))
                self.calls.append([recorder.seen for recorder in recorders])
        finally:
            slicer.trunk.layers = layers

    def run(self, layer: Any, index: int, block: Block, basis: Tensor) -> None:
        """Let a block add to the part of the stream that its basis (D, d) has; the rest of the stream is lost.

        The layer is the original: it computes what the sliced one will, because c leaves mean squares as they were.
        """
        norm = layer.get_submodule(block.norm)
        for i, state in enumerate(self.states):
            at = basis.to(self.device, state.dtype)
            state = state.to(self.device) @ at @ at.mT
            self.states[i] = (state + block.run(layer, norm(state), **self.calls[i][index])).cpu()


class _Stopped(Exception):
    """All layers' keywords are known; holds the stream in front of the first layer."""


class _Recorder(nn.Module):
    """Stands in for a layer: notes its keywords, and computes nothing."""

    def __init__(self, layer: Any, last: bool) -> None:
        super().__init__()
        self.last, self.seen = last, dict[str, Any]()
        for name in ("attention_type", "layer_type"):
            if hasattr(layer, name):
                setattr(self, name, getattr(layer, name))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self.seen = kwargs
        if self.last:
            raise _Stopped(hidden_states)
        return hidden_states


def _right(weight: Tensor, matrix: Tensor) -> Tensor:
    """`weight @ matrix` in the matrix's dtype, on the weight's device."""
    return weight.to(matrix.dtype) @ matrix.to(weight.device)


def _mean(moments: Sequence[Moments]) -> Tensor:
    """(D, D) float64, the mean of second moments."""
    total = torch.zeros_like(moments[0].scatter[0])
    for each in moments:
        total += each.second[0]
    return total / len(moments)


def _without_ones(size: int) -> Tensor:
    """(n, n - 1) float64, an orthonormal basis of all that is orthogonal to the vector of ones."""
    columns = torch.eye(size, dtype=torch.float64)
    columns[:, 0] = 1
    return torch.linalg.qr(columns).Q[:, 1:]


def _share(moment: Tensor, basis: Tensor) -> float:
    """The share of a second moment that a basis keeps."""
    kept = torch.einsum("pd,pq,qd->", basis, moment, basis)
    return round(float(kept / moment.trace()), 9)
