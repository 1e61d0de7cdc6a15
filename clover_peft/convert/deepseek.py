"""The configuration and the attention weights with which `DeepseekV3ForCausalLM` computes what rotary attention does.

The latent holds the components of the keys that lost their rotation, and the values. Two things stand between in the
stock class. A norm on the latent: latents so small that its epsilon drowns their mean square pass it linearly, divided
by sqrt(eps), and its gain restores their size. The class has no query bias either; it passes through a query latent
in the same way. A bias of keys that lost their rotation changes no softmax, and a bias of values is one of the output.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3Config

from .rotary import Components, freq_fold_of, frequencies_of
from .structure import Source

EPS = 1e-6  # transformers' constant in the latent's norm; other servers read `rms_norm_eps`, so that both must agree
_SMALL, _GAIN = 2.0**-30, 2.0**20  # of the latent before its norm, and of the norm: powers of two, exact in bfloat16
_LINEAR = math.sqrt(EPS) / (_SMALL * _GAIN)  # what the two and the norm leave to undo


def lost_components(source: Source, rotated: Tensor) -> Tensor:
    """(groups, n) bool, the components of keys that lose their rotation, from those that keep it."""
    freq_fold = freq_fold_of(source, len(rotated))
    lost = torch.ones(source.pairs, dtype=torch.bool).index_fill(0, rotated, False)
    return lost.view(-1, source.key_value_heads * freq_fold)


def make_config(source: Source, rotated: Tensor) -> DeepseekV3Config:
    """The configuration with a latent of full rank.

    Args:
        source: the model.
        rotated: (pairs,) int64, the components of keys that keep their rotation.
    """
    config, rope, part = source.model.config, 2 * len(rotated), lost_components(source, rotated).any(1)
    biased = any(getattr(source.layers[0].self_attn, name).bias is not None for name in _PROJECTIONS)
    return DeepseekV3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=source.layers[0].mlp.up_proj.out_features,
        num_hidden_layers=len(source.layers),
        num_attention_heads=source.heads,
        num_key_value_heads=source.heads,
        first_k_dense_replace=len(source.layers),
        num_nextn_predict_layers=0,
        q_lora_rank=config.hidden_size + 1 if source.layers[0].self_attn.q_proj.bias is not None else None,
        kv_lora_rank=2 * source.key_value_heads * source.head_dim - rope,
        qk_nope_head_dim=source.head_dim * int(part.sum()) // len(part),
        qk_rope_head_dim=rope,
        v_head_dim=source.head_dim,
        hidden_act=config.hidden_act,
        rms_norm_eps=EPS,
        attention_bias=biased,
        attention_dropout=getattr(config, "attention_dropout", 0.0),
        initializer_range=config.initializer_range,
        max_position_embeddings=config.max_position_embeddings,
        tie_word_embeddings=False,  # vLLM's class ignores it, and then makes a head of random numbers
        rope_parameters=_rope_parameters(source, frequencies_of(source, rotated)),
        **{name: getattr(config, name, None) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
        dtype=source.model.dtype,
    )


_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


def _rope_parameters(source: Source, frequencies: Tensor) -> dict[str, Any]:
    """Rotary parameters for any list of frequencies: the default ones if they give it, else factors of "longrope"."""
    config = source.model.config
    base = float(config.rope_parameters["rope_theta"])
    default = base ** -(torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies))
    if torch.allclose(frequencies, default, rtol=1e-5, atol=0):
        return {"rope_type": "default", "rope_theta": base}
    factors = (default / frequencies).tolist()
    return {
        "rope_type": "longrope",
        "rope_theta": base,
        "short_factor": factors,
        "long_factor": factors,
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": config.max_position_embeddings,
    }


def attention_weights(
    source: Source,
    attention: Any,
    found: Components,
    rotated: Tensor,
    size: float,
) -> dict[str, Tensor]:
    """The weights of one attention block, with a latent of full rank, in float64; exact but for rotations given up.

    Args:
        source: the model.
        attention: its attention block.
        found: the components of its keys.
        rotated: (pairs,) int64, the components that keep their rotation.
        size: root mean square of the latent before it is scaled.

    Returns:
        Name in the stock attention block -> weight.
    """
    h, heads, d = source.key_value_heads, source.heads, source.head_dim
    groups, n, _ = found.mix.shape
    freq_fold = n // h
    device = attention.q_proj.weight.device
    mix, split, factor = (t.to(device) for t in (found.mix, found.split, found.unrotated))
    lost = lost_components(source, rotated).to(device)
    rotated, part = rotated.to(device), lost.any(1)

    def paired(name: str) -> Tensor:
        """(heads, groups, freq_fold, D + 1) complex128, the pairs' rows with the bias last."""
        module = getattr(attention, name)
        bias = torch.zeros(module.out_features, device=device) if module.bias is None else module.bias.detach()
        rows = torch.cat([module.weight.detach(), bias[:, None]], 1).double().unflatten(0, (-1, 2, groups, freq_fold))
        return torch.complex(rows[:, 0], rows[:, 1])

    q, k = paired("q_proj"), paired("k_proj")
    c = split @ k.permute(1, 2, 0, 3).flatten(1, 2)  # (groups, n, D + 1), the components
    of_head = mix.unflatten(1, (freq_fold, h)).repeat_interleave(source.groups, 2)  # (groups, freq_fold, H, n)
    rotated_of_head = of_head[rotated // n, :, :, rotated % n]  # (pairs, freq_fold, H)
    q_rope = torch.einsum("pfa,apfx->apx", rotated_of_head.conj(), q[:, rotated // n])
    q_nope = (q * factor.unflatten(1, (groups, freq_fold))[..., None])[:, part].flatten(1, 2)
    widths = [2 * q_nope.shape[1], 2 * q_rope.shape[1]]
    stretch = source.scale * math.sqrt(sum(widths))
    queries = stretch * torch.cat([_halves(q_nope), _interleaved(q_rope)], 1).flatten(0, 1)  # (H (nope + rope), D + 1)

    values = attention.v_proj.weight.detach().double()
    latent = torch.cat([_interleaved(c[lost]), torch.cat([values, values.new_zeros(len(values), 1)], 1)])
    rope = _interleaved(c.flatten(0, 1)[rotated])
    # The latent's first numbers are components; every head reads its keys' share of them, and its values.
    read = of_head[part].permute(2, 0, 1, 3).flatten(1, 2)  # (H, nope pairs, n)
    place = torch.zeros(heads, read.shape[1], int(lost.sum()), dtype=read.dtype, device=device)
    column = 0
    for i, row in enumerate(lost[part]):
        width = int(row.sum())
        here = slice(i * freq_fold, (i + 1) * freq_fold)
        place[:, here, column : column + width] = read[:, here, row]
        column += width
    keys_up = torch.stack([torch.stack([place.real, -place.imag], -1), torch.stack([place.imag, place.real], -1)], 1)
    keys_up = keys_up.flatten(3).flatten(1, 2)  # (H, nope, 2 lost)
    up = queries.new_zeros(heads, widths[0] + d, len(latent))
    up[:, : widths[0], : keys_up.shape[2]] = keys_up
    for a in range(heads):
        start = keys_up.shape[2] + a // source.groups * d
        up[a, widths[0] :, start : start + d] = torch.eye(d, dtype=up.dtype, device=device)

    down = torch.cat([latent * (_SMALL / size), rope])
    result = {
        "kv_a_proj_with_mqa.weight": down[:, :-1],
        "kv_a_layernorm.weight": torch.full((len(latent),), _GAIN, dtype=torch.float64),
        "kv_b_proj.weight": up.flatten(0, 1).mul_(size * _LINEAR),
        "o_proj.weight": attention.o_proj.weight.detach().double(),
    }
    if attention.q_proj.bias is None:
        result["q_proj.weight"] = queries[:, :-1]
    else:
        width = queries.shape[1]
        result["q_a_proj.weight"] = _SMALL * torch.eye(width, width - 1, dtype=torch.float64)
        result["q_a_proj.bias"] = _SMALL * torch.eye(width, dtype=torch.float64)[-1]
        result["q_a_layernorm.weight"] = torch.full((width,), _GAIN, dtype=torch.float64)
        result["q_b_proj.weight"] = queries * _LINEAR
    if any(getattr(attention, name).bias is not None for name in _PROJECTIONS):
        result["kv_a_proj_with_mqa.bias"] = torch.cat([0 * latent[:, -1], rope[:, -1]])
        result["o_proj.bias"] = _output_bias(source, attention)
    return result


def _output_bias(source: Source, attention: Any) -> Tensor:
    """(D,) float64: softmax sums to 1, so a bias of the values is one of the output."""
    weight, bias = attention.o_proj.weight.detach().double(), attention.v_proj.bias
    total = weight.new_zeros(len(weight)) if attention.o_proj.bias is None else attention.o_proj.bias.detach().double()
    if bias is None:
        return total
    return (
        total
        + weight
        @ bias.detach().double().view(source.key_value_heads, -1).repeat_interleave(source.groups, 0).flatten()
    )


def _interleaved(rows: Tensor) -> Tensor:
    """(..., pairs, x) complex to (..., 2 pairs, x), real and imaginary rows in turn."""
    return torch.stack([rows.real, rows.imag], -2).flatten(-3, -2)


def _halves(rows: Tensor) -> Tensor:
    """(..., pairs, x) complex to (..., 2 pairs, x), all real rows first."""
    return torch.cat([rows.real, rows.imag], -2)
