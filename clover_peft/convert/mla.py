"""`convert_to_mla`: make a rotary model one with multi-head latent attention, in a class that every server loads."""

from __future__ import annotations

import math
import time
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

from ..base_model.activations import evaluating, read_batches, warn_if_few
from . import fitting, latent, latent_passes, rotary
from .deepseek import lost_components
from .exactness import attention_error, longest_text, record, rotation_errors, selection_errors
from .layerwise import Layerwise
from .report import ConversionReport, ConvertedLayer
from .rotary import Components, Method
from .structure import Source, read_source
from .temporary import temporary_tensors

_ROTARY_SHARE = 0.6  # of the cache that remains, at most; not tuned


@torch.inference_mode(False)
def convert_to_mla(
    model: Any,
    calibration: Iterable[Mapping[str, Any]],
    *,
    rope_dims: int | None = None,
    kv_lora_rank: int | None = None,
    cache_reduction: float | None = None,
    method: Method = "clover",
    release: bool = False,
) -> tuple[DeepseekV3ForCausalLM, ConversionReport]:
    """Convert attention with rotary embeddings into latent attention (as TransMLA does, arXiv 2502.07864).

    The keys of all heads are rotated across heads at each frequency, which is exact. The pairs of dimensions whose
    rotation matters most keep it, as one rotary key that all heads share. The other keys and the values become one
    latent of few dimensions. The result is a stock `DeepseekV3ForCausalLM`: it needs no `clover_peft`, and its cache
    holds the latent and the rotary key.

    Args:
        model: a causal language model whose blocks are those of Llama, Mistral or Qwen2. It is not changed, also by an
            error or an interrupt, unless `release` says so. The result shares no memory with it.
        calibration: batches, each of the model's keyword arguments. Pass about ten tokens for each dimension of keys
            and values, or more; one text must have 16 at least. They are read several times.
        rope_dims: dimensions of the shared rotary key, even: a divisor of a head's, or more than a head has. By
            default the largest divisor that is at most 0.6 of the cache that remains.
        kv_lora_rank: dimensions of the latent. Nothing is fitted if there are as many as keys and values have.
        cache_reduction: instead of `kv_lora_rank`, the share of the key-value cache to remove. If neither is given,
            0.5.
        method: "clover" (ours), or "transmla", the published recipe: principal components of the keys at each
            frequency, no rotation for all but the first, a latent of balanced principal components, and no fit.
        release: give up the weights of each layer of `model` as soon as the converted layer exists, so that memory
            holds one of the two models instead of both. `model` is lost then, also by an error or an interrupt of the
            last stage: its weights are on the meta device. What the conversion refuses keeps its weights.

    Returns:
        The converted model, in evaluation mode, and `ConversionReport`.

    Raises:
        ValueError, TypeError: if the model, the data or an argument does not fit.
        OSError: if the temporary files have no room: for "clover" the Fisher information of all layers and the hidden
            states of all tokens, twice; and hidden states at the boundaries of groups of layers, where layers do not
            fit `latent_passes.BUDGET` together.

    Memory beside the two models: the float64 work of one layer, or a group of layers with its activations for one
    batch and its moments (`clover plan --mla` counts it).
    """
    source = read_source(model)
    if method not in ("clover", "transmla"):
        raise ValueError(f"method: expected 'clover' or 'transmla', found {method!r}")
    pairs, rank = choose_sizes(source, rope_dims, kv_lora_rank, cache_reduction)
    batches = read_batches(calibration)
    text = longest_text(model, batches)
    clock, seconds = time.perf_counter(), {}

    def lap(stage: str) -> None:
        nonlocal clock
        now = time.perf_counter()
        seconds[stage], clock = now - clock, now

    before = (_parameters(model), _cache_bytes(model, text))
    freq_fold = rotary.freq_fold_of(source, pairs)
    moments = rotary.collect(source, batches, freq_fold)
    tokens = moments[0].tokens
    warn_if_few("calibration", tokens, 4 * source.pairs, f"{4 * source.pairs} dimensions of keys and values")
    found = [rotary.components(source, of_layer, method) for of_layer in moments]
    rotated = rotary.choose(torch.stack([c.worth for c in found]).sum(0), pairs)
    recording = record(source, text)
    exact = rotation_errors(source, found if freq_fold == 1 else _unmixed(source), recording)
    lap("rotation")
    lost = lost_components(source, rotated)
    sizes = [_size(source, *of_layer, lost) for of_layer in zip(moments, found, strict=True)]
    target = Layerwise(source, found, rotated, sizes)
    selection = selection_errors(source, target, recording)
    lap("selection")
    narrow = [0.0] * len(target.layers)
    with closing(_final_layers(target, batches, tokens, 2 * (source.pairs - pairs), rank, method)) as layers:
        for i in layers:
            narrow[i] = attention_error(target, i, recording)
            if not math.isfinite(narrow[i]):
                raise ValueError(
                    f"model.layers.{i}.self_attn: expected finite weights after the fit, found others; pass other or "
                    "more calibration data"
                )
            if release:
                target.release_original(i)
    result = target.model.requires_grad_(True)
    result.config.kv_lora_rank = rank
    after = (_parameters(result), _cache_bytes(result, text))
    lap("latent")
    report = ConversionReport(
        method=method,
        rope_dims=2 * pairs,
        kv_lora_rank=rank,
        rotated=rotated.tolist(),
        frequencies=rotary.frequencies_of(source, rotated).tolist(),
        rope_type=result.config.rope_parameters["rope_type"],
        layers=[
            ConvertedLayer(*errors, c.worth.flatten().tolist())
            for errors, c in zip(zip(exact, selection, narrow, strict=True), found, strict=True)
        ],
        parameters=(before[0], after[0]),
        cache_bytes=(before[1], after[1]),
        tokens=tokens,
        seconds=seconds,
    )
    return result, report


def _final_layers(
    target: Layerwise, batches: Sequence[Mapping[str, Any]], tokens: int, keys: int, rank: int, method: Method
) -> Generator[int]:
    """Give each layer its final weights, and yield its number; `tokens` are real ones, the rest as in `latent`."""
    if rank == target.model.config.kv_lora_rank:
        for i in range(len(target.layers)):
            target.fill(i)
            yield i
    elif method == "transmla":
        with closing(latent_passes.collect(target, batches, gradients=False)) as collected:
            for i, second in collected:
                latent.narrow(target.layers[i].self_attn, *latent.principal_bases(second.div_(tokens), keys, rank))
                del second
                yield i
    else:
        needed = fitting.stored_bytes(target.model.config, batches, target.model.dtype.itemsize)
        with temporary_tensors(needed, target.device) as files:
            with closing(latent_passes.collect(target, batches, gradients=True)) as collected:
                for i, fisher in collected:
                    files.write(f"fisher-{i}", fisher.float())
                    del fisher
                    target.empty(i)
            yield from fitting.narrow_layers(target, batches, rank, files)


def choose_sizes(source: Source, rope_dims: int | None, rank: int | None, reduction: float | None) -> tuple[int, int]:
    """The number of rotated pairs, and the rank of the latent."""
    whole = 4 * source.pairs  # dimensions of keys and values of all heads
    if rank is not None and reduction is not None:
        raise ValueError(f"expected kv_lora_rank or cache_reduction, found both ({rank} and {reduction})")
    reduction = 0.5 if reduction is None else reduction
    if not 0 < reduction < 1:
        raise ValueError(f"cache_reduction: expected a share above 0 and below 1, found {reduction}")
    budget = round((1 - reduction) * whole)
    if rope_dims is None:
        rope_dims = _default_rope_dims(source, budget if rank is None else whole)
    if not 2 <= rope_dims <= 2 * source.pairs or rope_dims % 2:
        raise ValueError(f"rope_dims: expected an even number from 2 to {2 * source.pairs}, found {rope_dims}")
    if rope_dims < source.head_dim and source.head_dim % rope_dims:
        fitting_dims = ", ".join(map(str, _head_divisors(source)))
        raise ValueError(
            f"rope_dims: below a head's {source.head_dim} dimensions, expected a divisor of them, so that each "
            f"rotated pair stands for as many frequencies, found {rope_dims}; choose one of {fitting_dims}"
        )
    if rank is None:
        rank = budget - rope_dims
        if rank < 1:
            raise ValueError(
                f"cache_reduction={reduction}: {budget} dimensions of {whole} remain, which leaves no "
                f"room for a latent beside rope_dims={rope_dims}; pass fewer"
            )
    if not 1 <= rank <= whole - rope_dims:
        raise ValueError(f"kv_lora_rank: expected 1 to {whole - rope_dims} beside rope_dims={rope_dims}, found {rank}")
    return rope_dims // 2, rank


def _default_rope_dims(source: Source, budget: int) -> int:
    """A head's worth, or most of a smaller cache: rotation given up costs more than a narrower latent."""
    return max(dims for dims in _head_divisors(source) if dims <= max(2, _ROTARY_SHARE * budget))


def _head_divisors(source: Source) -> list[int]:
    """Even divisors of a head's dimensions: with one pair for each frequency, or for two, three, ... of them."""
    return [dims for dims in range(2, source.head_dim + 1, 2) if source.head_dim % dims == 0]


def _size(source: Source, moments: rotary.LayerMoments, found: Components, lost: Tensor) -> float:
    """Root mean square of a number in the latent of full rank."""
    c = found.split @ (moments.keys / moments.tokens) @ found.split.mH
    energy = c.diagonal(dim1=-2, dim2=-1).real
    total = float(energy[lost].sum()) + moments.values / moments.tokens
    count = 2 * source.pairs + 2 * int(lost.sum())
    return max(math.sqrt(total / count), 1e-6)


def _unmixed(source: Source) -> list[Components]:
    """Components that are the heads themselves."""
    half, h = source.head_dim // 2, source.key_value_heads
    eye = torch.eye(h, dtype=torch.complex128).expand(half, h, h)
    ones = torch.ones(source.heads, half, dtype=torch.complex128)
    return [Components(eye, eye, torch.zeros(half, h), ones)] * len(source.layers)


def _parameters(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.no_grad()
def _cache_bytes(model: Any, ids: Tensor) -> int:
    """Bytes of the key-value cache for a token, in the cache that a forward pass fills."""
    with evaluating(model):
        cache = model(input_ids=ids, use_cache=True).past_key_values
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) // ids.numel()
