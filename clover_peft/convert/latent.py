"""The latent: which directions of a layer's keys and values are kept.

Let z be the latent of full rank, the components of keys that lost their rotation and the values. A narrow latent `A z`
from which heads read `B A z` makes an error `D z`, D = I - B A. To second order it costs `E[(g^T D z)^2]`, with g the
gradient of the loss at z. With the Fisher information `G = E[g g^T]` and `M = E[z z^T]`, taken as independent, that is
`tr(G D M D^T)`, and the best D of a rank follows from one eigendecomposition: A = U^T G^1/2, B = G^-1/2 U, U the
leading eigenvectors of G^1/2 M G^1/2. (Ours. Plain principal components have a constant for G, one for keys and one
for values.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .rotary import Method

# Of this many predictions one is taken a gradient of, because large vocabularies cost more than the rest. Not tuned.
EVERY = 4
# Added to the eigenvalues of G, whose mean is 1. Chosen on validation text of SmolLM2-135M.
_DAMPING = 0.1


@dataclass
class LatentMoments:
    """Sums over one layer's latents z of full rank, n numbers for each token.

    Attributes:
        second: (n, n) float64, sum of `z z^T` over tokens.
        fisher: (n, n) float64, sum of `g g^T` over tokens.
        tokens: number of tokens.
    """

    second: Tensor
    fisher: Tensor
    tokens: int = 0

    @classmethod
    def zeros(cls, n: int) -> LatentMoments:
        """Sums of nothing."""
        return cls(torch.zeros(n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64))


def bases(moments: LatentMoments, keys: int, rank: int, method: Method) -> tuple[Tensor, Tensor]:
    """A (rank, n), which makes the narrow latent, and B (n, rank), which reads it; float64.

    Args:
        moments: of the latent of full rank; used up, because n x n numbers are most of a conversion's work.
        keys: how many of its first numbers are of keys; the others are values.
        rank: of the narrow latent.
        method: "clover", or "transmla": principal components, after keys and values are scaled to equal energy.
    """
    second = moments.second.div_(moments.tokens)
    if method == "transmla":
        energy = second.diagonal().split([keys, len(second) - keys])
        scale = torch.cat(
            [part.new_full(part.shape, float(part.sum()) ** -0.5) if len(part) else part for part in energy]
        )
        u = torch.linalg.eigh(scale[:, None] * second * scale).eigenvectors[:, -rank:]
        a, b = u.T * scale, u / scale[:, None]
    else:
        # Components have very different units. In units of their own gradients, no direction drowns in the damping.
        unit = moments.fisher.diagonal().clamp(min=1e-30 * float(moments.fisher.diagonal().max())).sqrt()
        values, vectors = torch.linalg.eigh(moments.fisher.div_(unit[:, None]).div_(unit))
        moments.fisher = vectors.new_empty(0)
        values = values.clamp(min=0) + _DAMPING
        root = (vectors * values.sqrt()) @ vectors.T
        u = torch.linalg.eigh(root @ (unit[:, None] * second * unit) @ root).eigenvectors[:, -rank:].clone()
        a = u.T @ root * unit
        del root
        b = (vectors / values.sqrt()) @ vectors.T @ u / unit[:, None]
    # Numbers of one size in the cache lose least where a server stores it in few bits.
    size = torch.einsum("rn,nm,rm->r", a, second, a).clamp(min=0).sqrt()
    size = size.clamp(min=1e-6 * float(size.max()))
    return a / size[:, None], b * size


@torch.no_grad()
def narrow(attention: Any, moments: LatentMoments, keys: int, rank: int, method: Method) -> None:
    """Make the latent of one stock attention block narrower, in place.

    Args:
        attention: `DeepseekV3Attention` with a latent of full rank.
        moments: of its latent; used up.
        keys: how many of the latent's first numbers are of keys.
        rank: of the narrow latent.
        method: see `bases`.
    """
    down, up, norm = attention.kv_a_proj_with_mqa, attention.kv_b_proj, attention.kv_a_layernorm
    a, b = (t.to(down.weight.device) for t in bases(moments, keys, rank, method))
    latent, rope = down.weight.double().split([attention.kv_lora_rank, attention.qk_rope_head_dim])
    new = {down: torch.cat([a @ latent, rope]), up: up.weight.double() @ b, norm: norm.weight[:rank].clone()}
    for module, weight in new.items():
        module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
    if down.bias is not None:
        down.bias = nn.Parameter(down.bias[len(latent) - rank :].clone(), requires_grad=False)  # zeros come first
    down.out_features, up.in_features = rank + attention.qk_rope_head_dim, rank
    attention.kv_lora_rank = rank
