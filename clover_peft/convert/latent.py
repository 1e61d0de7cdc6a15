"""The latent: which directions of a layer's keys and values are kept.

Let z be the original's latent of full rank: the components of keys that lost their rotation, and the values. Let z' be
that of a model whose earlier layers are narrow. A narrow latent `A z'` from which heads read `B A z'` makes an error
`e = z - B A z'`. To second order it costs `E[(g^T e)^2]`, with g the gradient of the loss at z. With the Fisher
information `G = E[g g^T]`, taken as independent of e, that is `tr(G E[e e^T])`. A reduced-rank regression has the
minimum: with `P = E[z z'^T] E[z' z'^T]^-1`, which predicts z, A = U^T G^1/2 P and B = G^-1/2 U, where U are the
leading eigenvectors of G^1/2 P E[z' z^T] G^1/2. (Ours. Plain principal components have z for z', and a constant for G,
one for keys and one for values.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# Added to the eigenvalues of G, whose mean is 1. Chosen on validation text of SmolLM2-135M.
_DAMPING = 0.1
_RIDGE = 1e-4  # added to the eigenvalues of E[z' z'^T], whose mean is 1. Not tuned.


@dataclass
class LatentMoments:
    """Moments of one layer's latents of full rank, n numbers for each token.

    Attributes:
        second: (n, n) float64, E[z' z'^T].
        cross: (n, n) float64, E[z z'^T].
        fisher: (n, n) float64, E[g g^T] up to a factor.
    """

    second: Tensor
    cross: Tensor
    fisher: Tensor


def principal_bases(second: Tensor, keys: int, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, n) and B (n, rank), float64, of TransMLA: keys and values are scaled to equal energy.

    Args:
        second: (n, n) float64, E[z z^T].
        keys: how many of the latent's first numbers are of keys; the others are values.
        rank: of the narrow latent.
    """
    energy = second.diagonal().split([keys, len(second) - keys])
    scale = torch.cat([part.new_full(part.shape, (float(part.sum()) or 1.0) ** -0.5) for part in energy])
    u = torch.linalg.eigh(scale[:, None] * second * scale).eigenvectors[:, -rank:]
    return _of_one_size(u.T * scale, u / scale[:, None], second)


def fitted_bases(moments: LatentMoments, rank: int) -> tuple[Tensor, Tensor]:
    """A (rank, n), which makes the narrow latent, and B (n, rank), which reads it; float64.

    Args:
        moments: of the latent of full rank; used up, because n x n numbers are most of a conversion's work.
        rank: of the narrow latent.
    """
    second, predicted = moments.second, _regression(moments.cross, moments.second)
    explained = predicted @ moments.cross.T
    del moments.cross
    # Components have very different units. In units of their own gradients, no direction drowns in the damping.
    unit = _units(moments.fisher)
    values, vectors = torch.linalg.eigh(moments.fisher.div_(unit[:, None]).div_(unit))
    del moments.fisher
    values = values.clamp(min=0) + _DAMPING
    root = (vectors * values.sqrt()) @ vectors.T
    explained.mul_(unit[:, None]).mul_(unit)
    explained = root @ explained @ root
    u = torch.linalg.eigh(explained).eigenvectors[:, -rank:].clone()
    a = (u.T @ root * unit) @ predicted
    del root, explained, predicted
    b = (vectors / values.sqrt()) @ vectors.T @ u / unit[:, None]
    return _of_one_size(a, b, second)


def _of_one_size(a: Tensor, b: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of one size in the cache lose least where a server stores it in few bits."""
    size = torch.einsum("rn,nm,rm->r", a, second, a).clamp(min=0).sqrt()
    size = size.clamp(min=1e-6 * (float(size.max()) or 1.0))
    return a / size[:, None], b * size


def _units(moment: Tensor) -> Tensor:
    """(n,): the root mean square of each number, from (n, n); almost zero counts as the smallest size above."""
    diagonal = moment.diagonal()
    return diagonal.clamp(min=1e-30 * (float(diagonal.max()) or 1.0)).sqrt()


def _regression(cross: Tensor, second: Tensor) -> Tensor:
    """(n, n): E[z z'^T] E[z' z'^T]^-1, the latter in units of each number of z'."""
    unit = _units(second)
    scaled = (second / unit[:, None]).div_(unit)
    scaled.diagonal().add_(_RIDGE)
    factor = torch.linalg.cholesky(scaled)
    del scaled
    return torch.cholesky_solve((cross / unit).T, factor).T.div_(unit)


@torch.no_grad()
def narrow(attention: Any, a: Tensor, b: Tensor) -> None:
    """Make the latent of one stock attention block narrower, in place.

    Args:
        attention: `DeepseekV3Attention` with a latent of full rank, n.
        a: (rank, n).
        b: (n, rank).
    """
    down, up, norm = attention.kv_a_proj_with_mqa, attention.kv_b_proj, attention.kv_a_layernorm
    rank, (a, b) = len(a), (t.to(down.weight.device) for t in (a, b))
    latent, rope = down.weight.double().split([attention.kv_lora_rank, attention.qk_rope_head_dim])
    new = {down: torch.cat([a @ latent, rope]), up: up.weight.double() @ b, norm: norm.weight[:rank].clone()}
    for module, weight in new.items():
        module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
    if down.bias is not None:
        down.bias = nn.Parameter(down.bias[len(latent) - rank :].clone(), requires_grad=False)  # zeros come first
    down.out_features, up.in_features = rank + attention.qk_rope_head_dim, rank
    attention.kv_lora_rank = rank
