"""Compares a converted model with the original, part by part, on the beginning of the longest text.

What a class computes between its projections cannot be read off its modules alone. So the original runs once with
hooks, and each part of the conversion must give what was recorded, before anything is approximated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..base_model.activations import TokenReader, evaluating
from .rotary import Components
from .structure import Source

TOKENS = 256  # compared at most
FEWEST = 16  # compared at least: one token attends to itself alone, whatever its rotation
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 0.1}


@dataclass
class Recording:
    """What one short text makes of the original model.

    Attributes:
        ids: (1, T).
        logits: (1, T, vocabulary).
        layers: for each layer, by name: "hidden" (1, T, D), the input of its attention; "q_proj", "k_proj" and
            "v_proj" (1, T, features); "heads" (1, T, H d), the input of the output projection; "output" (1, T, D).
    """

    ids: Tensor
    logits: Tensor
    layers: list[dict[str, Tensor]] = field(default_factory=list)


def longest_text(model: Any, batches: Iterable[Mapping[str, Any]]) -> Tensor:
    """(1, T) int64: the text with the most tokens that are not padding, `TOKENS` of them at most.

    Raises:
        ValueError: if a batch has no token numbers, or a mask of another shape, or all texts are too short to compare.
    """
    reader, longest = TokenReader(model), torch.empty(0, dtype=torch.long)
    for batch in batches:
        values, masks = reader.start(batch)
        if "input_ids" not in values:
            raise ValueError(
                f"calibration: expected batches with input_ids, found {', '.join(batch)}; pass token numbers"
            )
        ids = values["input_ids"]
        real = masks.get("attention_mask", torch.ones_like(ids, dtype=torch.bool))
        if real.shape != ids.shape:
            raise ValueError(
                f"attention_mask: expected the shape of input_ids, {tuple(ids.shape)}, found {tuple(real.shape)}; "
                "pass the tokenizer's"
            )
        for row, mask in zip(ids, real, strict=True):
            if mask.sum() > len(longest):
                longest = row[mask]
    if len(longest) < FEWEST:
        raise ValueError(
            f"calibration: expected a text of {FEWEST} tokens or more, to compare the models on, found {len(longest)} "
            "in the longest; pass longer texts"
        )
    return longest[None, :TOKENS]


@torch.no_grad()
def record(source: Source, ids: Tensor) -> Recording:
    """Run the original on one text, (1, T)."""
    found = [dict[str, Tensor]() for _ in source.layers]

    def output(of: dict[str, Tensor], name: str, module: Any, inputs: Any, output: Any) -> None:
        of[name] = output[0] if isinstance(output, tuple) else output

    def inputs(of: dict[str, Tensor], name: str, module: Any, inputs: Any) -> None:
        of[name] = inputs[0]

    with evaluating(source.model), ExitStack() as hooked:
        for layer, of in zip(source.layers, found, strict=True):
            attention = layer.self_attn
            for name in ("q_proj", "k_proj", "v_proj"):
                hooked.enter_context(getattr(attention, name).register_forward_hook(partial(output, of, name)))
            hooked.enter_context(attention.q_proj.register_forward_pre_hook(partial(inputs, of, "hidden")))
            hooked.enter_context(attention.o_proj.register_forward_pre_hook(partial(inputs, of, "heads")))
            hooked.enter_context(attention.register_forward_hook(partial(output, of, "output")))
        logits = source.model(input_ids=ids, use_cache=False).logits
    return Recording(ids, logits, found)


def rotation_errors(source: Source, found: Sequence[Components], recording: Recording) -> list[float]:
    """The relative error of each layer's heads if all components keep their rotation: that of rounding.

    Raises:
        ValueError: if it is more, because the class computes something else between its projections.
    """
    errors = []
    for i, (components, of) in enumerate(zip(found, recording.layers, strict=True)):
        errors.append(_error(_heads(source, components, of), of["heads"]))
        _check(errors[-1], source, f"model.layers.{i}.self_attn", "softmax(rotated q k^T / sqrt(head_dim)) v")
    return errors


def _heads(source: Source, found: Components, of: Mapping[str, Tensor]) -> Tensor:
    """(1, T, H d) float64: attention with all components rotated."""
    half = source.head_dim // 2
    groups = len(found.mix)
    q, k, v = (of[name][0].double().unflatten(-1, (-1, source.head_dim)) for name in ("q_proj", "k_proj", "v_proj"))
    q, k = (torch.complex(x[..., :half], x[..., half:]).unflatten(-1, (groups, -1)) for x in (q, k))
    mix, split, frequencies = (t.to(q.device) for t in (found.mix, found.split, source.frequencies))
    c = torch.einsum("gnm,tgm->tgn", split, k.permute(0, 2, 3, 1).flatten(2))
    of_head = mix.unflatten(1, (-1, source.key_value_heads)).repeat_interleave(source.groups, 2)
    read = torch.einsum("gfan,tagf->atgn", of_head.conj(), q)
    # TransMLA turns a group of frequencies by its first one; without that approximation groups have one frequency.
    angles = torch.arange(len(q), device=q.device)[:, None] * frequencies[:: half // groups]
    turn = torch.polar(torch.ones_like(angles), angles)[:, :, None]
    scores = torch.einsum("atgn,sgn->ats", (read * turn).conj(), c * turn).real * source.scale
    later = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
    weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    return torch.einsum("ats,sad->tad", weights, v.repeat_interleave(source.groups, 1)).flatten(1)[None]


@torch.no_grad()
def check_rest(source: Source, model: Any, scale: float, recording: Recording) -> None:
    """Check that the stock model computes the original's logits if its attention returns what the original's did.

    Args:
        source: the original.
        model: the stock model, whatever its attention computes.
        scale: of its residual stream.
        recording: of the original.

    Raises:
        ValueError: if it does not.
    """

    def replace(of: Mapping[str, Tensor], module: Any, inputs: Any, output: Any) -> Any:
        return (of["output"] * scale, *output[1:])

    with ExitStack() as hooked:
        for layer, of in zip(model.model.layers, recording.layers, strict=True):
            hooked.enter_context(layer.self_attn.register_forward_hook(partial(replace, of)))
        logits = model(input_ids=recording.ids, use_cache=False).logits
    error = _error(logits, recording.logits)
    _check(
        error, source, type(source.model).__name__, "embeddings, plain residual connections, RMSNorm and gated MLPs"
    )


@torch.no_grad()
def attention_errors(model: Any, scale: float, recording: Recording) -> list[float]:
    """The relative error of each layer's attention output, with the original's hidden states as input."""
    hidden = recording.layers[0]["hidden"]
    positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
    turn, errors = model.model.rotary_emb(hidden, positions), []
    length = hidden.shape[1]
    mask = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype, device=hidden.device)
    for layer, of in zip(model.model.layers, recording.layers, strict=True):
        output, _ = layer.self_attn(of["hidden"], position_embeddings=turn, attention_mask=mask.triu(1)[None, None])
        errors.append(_error(output / scale, of["output"]))
    return errors


def _error(found: Tensor, expected: Tensor) -> float:
    expected = expected.double()
    return float((found.double() - expected).norm() / expected.norm().clamp(min=1e-300))


def _check(error: float, source: Source, path: str, what: str) -> None:
    if not error <= _TOLERANCE[source.model.dtype]:
        raise ValueError(
            f"{path}: expected {what} and nothing else, found outputs that differ by {error:.2g}; this "
            "class has operations that DeepseekV3 lacks"
        )
