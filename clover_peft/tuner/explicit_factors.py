"""The paper's explicit factors of an adapted projection."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..base_model.slices import Partner
from ..linalg.decomposition import (
    Factors,
    factors,
)
from .bases import clover_layers, inner_model, partner_weight
from .block_spec import BlockSpec


@torch.no_grad()
def explicit_factors(model: nn.Module, target: str, adapter_name: str = "default") -> dict[str, Factors]:
    """The paper's U, S and V (Eq. 3, arXiv 2411.17426) of an adapted projection.

    U and V have orthonormal columns. Where nothing was cut (r = d, no degenerate head), `V S U^T` is the current
    product of a pair, `W_o (I + E dS C) W_v`, and for an intra-layer target the current weight itself.

    Args:
        model: a model with a CLOVER adapter: a `PeftModel`, or one that an adapter was injected into.
        target: path of the projection in the base model, or a suffix that only one adapted module has.
        adapter_name: the adapter.

    Returns:
        Slice name ("weight" where there is only one) -> `Factors` of its blocks, in float64. Under grouped-query
        attention V's rows are those of all query heads that share the key-value head.

    Raises:
        ValueError: if no module or more than one matches, or the adapter is not there.
    """
    inner = inner_model(model)
    found = [(n, m) for n, m in clover_layers(inner) if n == target or n.endswith("." + target)]
    if len(found) != 1 or adapter_name not in found[0][1].specs:
        raise ValueError(
            f"{target}: expected one module with an adapter {adapter_name!r}, found {[name for name, _ in found]}; "
            "pass the whole path of one of them"
        )
    layer = found[0][1]
    layer.check_bases(adapter_name, "factor")
    with layer.base_weight.whole():
        weight, bias = layer.base_weight.transposed().double(), layer.base_weight.bias
    result = {}
    for spec in layer.specs[adapter_name]:
        tensors = layer.tensors(adapter_name, spec)
        if tensors.u is None:
            raise ValueError(
                f"{layer.name}: the adapter was saved folded and has no bases; save it with save_bases=True"
            )
        if spec.from_activations:
            raise ValueError(
                f"{layer.name}: expected bases of the weights, found some of activations, whose U and V are not "
                "orthonormal; make the adapter without initialize_from_activations"
            )
        rows = spec.heads.blocks(weight, spec.size).permute(1, 0, 2)
        if bias is not None:
            rows = torch.cat([rows, spec.heads.blocks(bias.double(), spec.size).unsqueeze(1)], dim=1)
        columns = None if spec.partner is None else _partner_columns(inner, spec, spec.partner)
        s, u = tensors.s.double(), tensors.u.double()
        if spec.balanced_updates:  # which scaled C; U has columns of norm 1, but for dropped directions
            norms = torch.linalg.vector_norm(rows @ u.mT, dim=1).amax(-1)
            scale = torch.where(norms > 0, norms, torch.ones_like(norms))
            s, u = s * scale.view(-1, *[1] * (s.ndim - 1)), u / scale.view(-1, 1, 1)
        result[spec.name] = factors(rows, columns, s, u, tensors.v)
    return result


def _partner_columns(model: nn.Module, spec: BlockSpec, partner: Partner) -> Tensor:
    """(H, D, d) float64: the partner's side of every block, the query heads of a group one below the other."""
    heads = partner.heads
    with partner_weight(model, partner) as (weight, bias):
        if bias is not None:
            weight = torch.cat([weight, bias.to(weight).unsqueeze(0)])
        blocks = heads.blocks(weight.double(), spec.size)  # (D, groups * H, d)
    groups = heads.count // spec.heads.count
    grouped = blocks.unflatten(1, (spec.heads.count, groups, -1))  # (D, kv heads, groups, blocks a head, d)
    return grouped.permute(1, 3, 2, 0, 4).flatten(2, 3).flatten(0, 1)
