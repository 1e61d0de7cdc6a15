"""Whether a base model is the one that an adapter was trained on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..base_model.weight import BaseWeight, partner_side
from .adapter_tensors import tensor_keys
from .bases import row_norms
from .block_spec import BlockSpec, BlockTensors
from .config import CloverConfig
from .layer import CloverLayer

# The largest relative difference of two fingerprints by rounding of the base's weights, for the coarser precision of
# the two. It is far below the precision itself, because rounding averages out over a row.
FINGERPRINT_TOLERANCE = {"float64": 1e-5, "float32": 1e-5, "bfloat16": 5e-3, "float16": 1e-3, "bnb 8bit": 1e-2}
COARSE_TOLERANCE = 0.1  # any other quantisation; chosen for 4 bits
# Root mean square of the rounding error of normally distributed weights, relative to that of the weights.
WEIGHT_ERROR = {
    "float64": 0.0,
    "float32": 0.0,
    "bfloat16": 1.7e-3,
    "float16": 2e-4,
    "bnb 8bit": 8e-3,
    "bnb 4bit": 0.092,
}
COARSE_ERROR = 0.1  # any other quantisation, as of 4 bits
# Loading warns if rounding of the base's weights changes more than this share of an adapter's effect.
MUCH_CHANGED = 0.05
_COMPARED = 8  # features of a block in a fingerprint: reading all of them takes longer than the rest of loading


@torch.no_grad()
def fingerprint(model: nn.Module, base: BaseWeight, spec: BlockSpec) -> Tensor | None:
    """`clover_norm` of the first features of every block, (H, min(8, d)); None if the weight cannot be read.

    It differs between base models, and hardly changes by rounding.
    """
    with base.whole():
        if not base.is_present:
            return None
        with partner_side(model, spec.partner) as partner:
            return row_norms(spec, base.side, partner, _COMPARED)


@torch.no_grad()
def error_from_rounding(layers: dict[str, CloverLayer], adapter_name: str, config: CloverConfig, state: dict) -> float:
    """The share of an adapter's effect, `E dS C W`, that changes because W has another precision than in training.

    An estimate, which takes rounding errors in W to be white, of the usual size for the coarser precision. It is 0 if
    the precisions are the same, or the weights cannot be read. The arguments are those of `check_and_complete`.
    """
    changed = effect = 0.0
    for name, layer in layers.items():
        precisions = {layer.base_weight.precision, config.base_precision or layer.base_weight.precision}
        rounded = max(WEIGHT_ERROR.get(precision, COARSE_ERROR) for precision in precisions)
        if len(precisions) == 1 or not rounded:
            continue
        with layer.base_weight.whole():
            if not layer.base_weight.is_present:
                continue
            weight = layer.base_weight.transposed()
            weight = weight[:: 1 + weight.shape[0] // 512]  # some inputs are enough for an estimate
            for spec in layer.specs[adapter_name]:
                keys = tensor_keys(name, adapter_name, spec.name)
                tensors = BlockTensors.of({attribute: state.get(key) for attribute, key in keys.items()})
                if tensors.s.is_meta:
                    continue
                folded = spec.residual_map(tensors).to(weight.device)
                blocks = spec.heads.blocks(weight, spec.size).to(folded.dtype).transpose(0, 1)  # (H, D, d)
                effect += float((blocks @ folded.mT).square().sum())
                energy = blocks.square().sum((1, 2)) * folded.square().sum((1, 2))
                changed += rounded**2 * float(energy.sum()) / spec.size
    return (changed / effect) ** 0.5 if effect else 0.0


def check_fingerprint(base: BaseWeight, spec: BlockSpec, config: CloverConfig, here: Tensor, there: Tensor) -> None:
    """Compare the fingerprint of a layer's weights with an adapter's `clover_norm`, (H, d), from training.

    Refuse it if it differs by more than rounding.
    """
    there = there[:, : here.shape[1]]
    error = (here - there).abs() / torch.maximum(here, there).clamp(min=1e-30)
    precisions = (base.precision, config.base_precision or base.precision)
    allowed = max(FINGERPRINT_TOLERANCE.get(precision, COARSE_TOLERANCE) for precision in precisions)
    if float(error.max()) > allowed:
        block = int(error.amax(-1).argmax())
        raise ValueError(
            f"{base.path} ({spec.part}, block {block}): expected the weights of the base model that the adapter was "
            f"trained on ({config.base_model_name_or_path}), found norms of their rows that differ by "
            f"{float(error.max()):.2g}, where rounding explains {allowed:.2g}; load it onto that model (without "
            "an adapter merged into it), or pass config=c after c = PeftConfig.from_pretrained(<adapter>) and "
            "c.check_base = False"
        )
