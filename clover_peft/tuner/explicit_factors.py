"""The paper's explicit factors of an adapted projection."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.linalg import pinv

from ..base_model.weight import Side, partner_side
from .bases import compute_bases
from .block_spec import BlockSpec
from .layer import CloverLayer
from .layers import clover_layers, inner_model


@dataclass(frozen=True)
class Factors:
    """The paper's explicit factors of H blocks: `V S U^T` is the block's product of weights.

    Attributes:
        U: (H, D_in, r), columns orthonormal, except in blocks whose condition number `max_condition` limited. A
            projection with a bias has it as the last of its D_in rows.
        S: (H, r, r), the current matrix: frozen singular values plus the trained offset.
        V: (H, D_out, r), as U; the identity (D_out = d) for an intra-layer QR basis.
    """

    U: Tensor
    S: Tensor
    V: Tensor

    def product(self) -> Tensor:
        """`V S U^T`, (H, D_out, D_in): for tests and analysis of small models only."""
        return self.V @ self.S @ self.U.mT


@torch.no_grad()
def explicit_factors(model: nn.Module, target: str, adapter_name: str = "default") -> dict[str, Factors]:
    """The paper's U, S and V (Eq. 3, arXiv 2411.17426) of an adapted projection, in float64.

    `U = W^T C^T`, `V = W_o E`, and S is `V^+ W_o W U^+T` plus the trained offset; pseudo-inverses stand for transposes
    because `max_condition` may have changed weak directions. If no direction was cut, `V S U^T` is the current product
    of a pair, `W_o (I + E dS C) W_v`, or the current weight of an intra-layer target.
    Costs (D_in + D_out) H d^2.

    Args:
        model: a model with a CLOVER adapter: a `PeftModel`, or one that an adapter was injected into.
        target: path of the projection (or stack of experts' weights) in the base model, or a suffix that only one
            adapted module has.
        adapter_name: the adapter.

    Returns:
        Slice name ("weight" for a single slice) -> `Factors`. Under grouped-query attention V has the rows of all
        query heads that share the key-value head.

    Raises:
        ValueError: if no module or more than one matches, or the adapter is not there, or has no bases of the weights.
    """
    inner = inner_model(model)
    found = [layer for _, layer in clover_layers(inner) if f".{layer.name}".endswith(f".{target}")]
    if len(found) != 1 or adapter_name not in found[0].specs:
        raise ValueError(
            f"{target}: expected one module with an adapter {adapter_name!r}, found "
            f"{[layer.name for layer in found]}; pass the whole path of one of them"
        )
    layer = found[0]
    layer.check_bases(adapter_name, "factor")
    with layer.base_weight.whole():
        return {spec.name: _factors(inner, layer, adapter_name, spec) for spec in layer.specs[adapter_name]}


def _factors(model: nn.Module, layer: CloverLayer, adapter_name: str, spec: BlockSpec) -> Factors:
    """The factors of one slice; the base weight is whole."""
    tensors, own = layer.tensors(adapter_name, spec), layer.base_weight.side
    if tensors.c is None:
        raise ValueError(f"{layer.name}: the adapter was saved folded and has no bases; save it with save_bases=True")
    if spec.from_activations:
        raise ValueError(
            f"{layer.name}: expected bases of the weights, found some of activations, whose U and V are not "
            "orthonormal; make the adapter without initialize_from_activations"
        )
    rows = spec.heads.blocks(_with_bias(own), spec.size).transpose(0, 1)
    u, ds = rows @ tensors.c.double().mT, layer.scaling[adapter_name] * tensors.s.double()
    v = torch.eye(spec.size).to(u) if tensors.e is None else tensors.e.double()
    v = v.expand(spec.blocks, -1, -1)
    with partner_side(model, spec.partner) as partner:
        if spec.balanced_updates:  # which scaled C
            norms = torch.linalg.matrix_norm(compute_bases(spec, own, partner).c.to(u))
            scale = torch.linalg.matrix_norm(tensors.c.double()) / torch.where(norms > 0, norms, 1.0)
            scale = torch.where(scale > 0, scale, 1.0)
            u, ds = u / scale.view(-1, 1, 1), ds * scale.view(-1, *[1] * (ds.ndim - 1))
        product = rows.mT @ pinv(u).mT
        if partner is not None:
            columns = _columns(spec, partner)
            v, product = columns @ v, columns @ product
    return Factors(u, pinv(v) @ product + (torch.diag_embed(ds) if ds.ndim == 2 else ds), v)


def _with_bias(side: Side) -> Tensor:
    """(D, features), with the bias as one more row, in float64."""
    weight, bias = side
    return weight.double() if bias is None else torch.cat([weight, bias.to(weight).unsqueeze(0)]).double()


def _columns(spec: BlockSpec, partner: Side) -> Tensor:
    """(H, D, d) float64: the partner's side of every block, the query heads of a group one below the other."""
    assert spec.partner is not None
    heads, count = spec.partner.heads, spec.heads.count
    blocks = heads.blocks(_with_bias(partner), spec.size)  # (D, groups * H, d)
    grouped = blocks.unflatten(1, (count, heads.count // count, -1))  # (D, kv heads, groups, blocks a head, d)
    return grouped.permute(1, 3, 2, 0, 4).flatten(2, 3).flatten(0, 1)
