"""The latent: which directions of a layer's keys and values are kept.

Let z be the latent of full rank, the components of keys that lost their rotation and the values. A narrow latent `A z`
from which heads read `B A z` makes an error `D z`, D = I - B A. To second order it costs `E[(g^T D z)^2]`, with g the
gradient of the loss at z. With the Fisher information `G = E[g g^T]` and `M = E[z z^T]`, taken as independent, that is
`tr(G D M D^T)`, and the best D of a rank follows from one eigendecomposition: A = U^T G^1/2, B = G^-1/2 U, U the
leading eigenvectors of G^1/2 M G^1/2. (Ours. Plain principal components have a constant for G, one for keys and one
for values.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..base_model.activations import OF_LOGITS, TokenReader, evaluating
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


def collect(model: Any, batches: Iterable[Mapping[str, Any]], gradients: bool) -> list[LatentMoments]:
    """Run a stock model with latents of full rank over data.

    The loss is the cross-entropy of answers that are sampled from the model's own logits, which makes the squared
    gradients its Fisher information. It counts a random quarter of the tokens, for speed.

    Args:
        model: `DeepseekV3ForCausalLM`, whose weights get no gradients.
        batches: keyword arguments; rows are texts.
        gradients: whether to make a backward pass too, for `fisher`.
    """
    n = model.config.kv_lora_rank
    zeros = torch.zeros(n, n, dtype=torch.float64)
    sums = [LatentMoments(zeros.clone(), zeros.clone()) for _ in model.model.layers]
    reader = TokenReader(model)
    generator = torch.Generator(reader.device).manual_seed(0)
    real: dict[str, Tensor] = {}

    def add(of: LatentMoments, gradient: Tensor) -> None:
        g = gradient.float().flatten(0, 1)
        of.fisher += (g.T @ g).to(of.fisher)

    def hook(of: LatentMoments, module: Any, inputs: Any, output: Tensor) -> Tensor:
        z = output.detach().float() * real["mask"].unsqueeze(-1)  # (rows, T, n)
        of.tokens += int(real["mask"].sum())
        of.second += (z.flatten(0, 1).T @ z.flatten(0, 1)).to(of.second)
        if gradients:
            output = output if output.requires_grad else output.detach().requires_grad_()
            output.register_hook(partial(add, of))
        return output

    model.requires_grad_(False)
    with torch.set_grad_enabled(gradients), evaluating(model), ExitStack() as hooked:
        for layer, of in zip(model.model.layers, sums, strict=True):
            hooked.enter_context(layer.self_attn.kv_a_layernorm.register_forward_hook(partial(hook, of)))
        for batch in tqdm(batches, desc="CLOVER latent", unit=" batches", delay=3, leave=False):
            values, masks = reader.start(batch)
            ids = values["input_ids"]
            real["mask"] = masks.get("attention_mask", torch.ones_like(ids, dtype=torch.bool))
            of_trunk = {k: v for k, v in values.items() if k not in OF_LOGITS}
            hidden = model.model(**of_trunk).last_hidden_state[real["mask"]]
            if gradients:
                chosen = torch.randperm(len(hidden), generator=generator, device=hidden.device)
                logits = model.lm_head(hidden[chosen[: -(-len(hidden) // EVERY)]])
                logs = logits.float().log_softmax(-1)
                drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
                logs.gather(-1, drawn).sum().neg().backward()
    return sums


def bases(moments: LatentMoments, keys: int, rank: int, method: Method) -> tuple[Tensor, Tensor]:
    """A (rank, n), which makes the narrow latent, and B (n, rank), which reads it; float64.

    Args:
        moments: of the latent of full rank.
        keys: how many of its first numbers are of keys; the others are values.
        rank: of the narrow latent.
        method: "clover", or "transmla": principal components, after keys and values are scaled to equal energy.
    """
    second = moments.second / moments.tokens
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
        values, vectors = torch.linalg.eigh(moments.fisher / unit[:, None] / unit)
        values = values.clamp(min=0) + _DAMPING
        root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
        u = torch.linalg.eigh(root @ (unit[:, None] * second * unit) @ root).eigenvectors[:, -rank:]
        a, b = u.T @ root * unit, inverse @ u / unit[:, None]
    # Numbers of one size in the cache lose least where a server stores it in few bits.
    size = torch.einsum("rn,nm,rm->r", a, second, a).clamp(min=0).sqrt()
    size = size.clamp(min=1e-6 * float(size.max()))
    return a / size[:, None], b * size


@torch.no_grad()
def narrow(model: Any, keys: int, rank: int, batches: Sequence[Mapping[str, Any]], method: Method) -> None:
    """Make the latents of a stock model narrower, in place.

    Args:
        model: `DeepseekV3ForCausalLM` with latents of full rank.
        keys: how many of a latent's first numbers are of keys.
        rank: of the narrow latents.
        batches: keyword arguments of the model.
        method: see `bases`.
    """
    moments, config = collect(model, batches, gradients=method == "clover"), model.config
    for layer, of in zip(model.model.layers, moments, strict=True):
        attention = layer.self_attn
        a, b = (t.to(model.device) for t in bases(of, keys, rank, method))
        down, up, norm = attention.kv_a_proj_with_mqa, attention.kv_b_proj, attention.kv_a_layernorm
        latent, rope = down.weight.double().split([config.kv_lora_rank, config.qk_rope_head_dim])
        new = {down: torch.cat([a @ latent, rope]), up: up.weight.double() @ b, norm: norm.weight[:rank].clone()}
        for module, weight in new.items():
            module.weight = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
        if down.bias is not None:
            down.bias = nn.Parameter(down.bias[len(latent) - rank :].clone(), requires_grad=False)  # zeros come first
        down.out_features, up.in_features = rank + config.qk_rope_head_dim, rank
        attention.kv_lora_rank = rank
    config.kv_lora_rank = rank
    model.requires_grad_(True)
