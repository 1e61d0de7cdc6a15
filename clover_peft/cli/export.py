"""`clover export`: merges an adapter into its base model, or approximates it by LoRAs."""

from __future__ import annotations

import argparse
import functools
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from peft import PeftConfig, PeftModel, convert_to_lora, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from ..base_model.plain import check_unquantised
from ..io.adapters import embedding_of, grow_embeddings, label_options, load_own_tokenizer, saved_shapes
from ..io.atomic import check_new_folder, new_folder
from ..io.hub_models import load_processor
from ..io.model_class import find_class, read_config
from ..io.user_warning import warn
from ..tuner.config import CloverConfig
from ..tuner.experts import refuse_experts
from ..tuner.layers import clover_layers
from ..tuner.lora_approximation import lora_errors
from . import checks, parsers
from .errors import reports_errors
from .probe import probe

# What rounding may do to float32 logits: their relative distance.
_ALLOWED = 64 * torch.finfo(torch.float32).eps


def export(
    adapter: str,
    out: Path,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    lora_ranks: list[int] | None = None,
    model_class: str | None = None,
) -> dict[str, Any]:
    """Writes the merged model, and LoRAs beside it.

    Args:
        adapter: folder or hub name of a CLOVER adapter (or of another that peft can merge).
        out: folder to write, new or empty.
        base: base model; None: the one that the adapter names.
        dtype: of the export; None: the base's own. All else is computed in float32, which must fit into memory.
        lora_ranks: ranks of the LoRAs to write.
        model_class: see `model_class.find_class`.

    Returns:
        `difference`: relative distance of the merge's float32 outputs on random inputs from the adapter's, or of the
        folder's from those of the rounded merge, the larger one; `changed`: tensors of the folder that are not the
        merge, rounded once; `rounding`: what rounding does to the logits, as a share of what the adapter does;
        `dtype`; `lora`: rank -> `weights` and `logits`, the relative error of the update and of its effect.

    Raises:
        ValueError: `out` is in use, the base is not known, something of the adapter would be lost, or no LoRA can be
            made of it.
    """
    lora_ranks = list(dict.fromkeys(lora_ranks or ()))
    for each in (out, *(_lora_folder(out, rank) for rank in lora_ranks)):
        check_new_folder(each)
    config = PeftConfig.from_pretrained(adapter)
    if config.is_prompt_learning or config.is_adaption_prompt:
        raise ValueError(
            f"{adapter}: expected an adapter of weights, found {config.peft_type.value}, which has nothing to merge "
            "into them; serve it with peft"
        )
    revision = "main" if base else config.revision or "main"  # of the base that the adapter names
    base_config = _base_config(adapter, config, base)
    base = base or str(config.base_model_name_or_path)
    extra = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
    extra += ["bias"] if getattr(config, "bias", "none") != "none" else []
    if lora_ranks and extra:
        raise ValueError(f"{adapter}: {extra[0]} cannot be part of a LoRA made of it; leave --lora-rank out")
    if lora_ranks and not isinstance(config, CloverConfig):
        raise ValueError(f"{adapter}: expected a CLOVER adapter, found {config.peft_type}; leave --lora-rank out")
    processor = load_processor(base, revision)
    trained_with = load_own_tokenizer(adapter)
    tokenizer = trained_with or getattr(processor, "tokenizer", processor)
    kind = find_class(base_config, config, model_class)
    labels = label_options(base_config, kind, config, adapter)
    load = functools.partial(kind.from_pretrained, base, revision=revision, **labels)
    model = load(dtype=dtype or "auto")
    check_unquantised(model, str(base))
    own, wide = dtype or model.dtype, torch.promote_types(model.dtype, torch.float32)
    dtypes = {name: tensor.dtype for name, tensor in model.state_dict().items()}  # a class may keep some in float32
    del model  # loaded again, not cast: what a model computes while it loads, as Gemma its scale, has its dtype
    model, info = load(dtype=wide, output_loading_info=True)
    grown = grow_embeddings(model, adapter, trained_with)
    plain = probe(model)
    model = PeftModel.from_pretrained(model, adapter).eval()
    _warn_of_random(info["missing_keys"], adapter)
    if lora_ranks:
        _check_loras(model, lora_ranks)
    expected = probe(model)
    loras = {}
    if lora_ranks:
        errors = lora_errors(model, lora_ranks)["all"]
        for rank in lora_ranks:
            folder = _lora_folder(out, rank)
            _write_lora(model, folder, rank, tokenizer if grown else None, embeddings=grown)
            lora = load(dtype=wide)
            grow_embeddings(lora, adapter, trained_with)
            found = probe(PeftModel.from_pretrained(lora, folder))
            loras[rank] = {"weights": errors[rank], "logits": _distance(found, expected, expected - plain)}
            del lora
    merged = model.merge_and_unload(safe_merge=True)
    exact = probe(merged)
    digests = _digests(merged, own, dtypes)
    _settle_ties(_cast(merged, own, dtypes))
    with new_folder(out) as folder:
        merged.save_pretrained(folder)
        for each in filter(None, (processor, trained_with)):
            each.save_pretrained(folder)
    rounded = probe(_cast(merged, wide, {}))
    del model, merged
    read = kind.from_pretrained(out, dtype=wide)
    there, found = _digests(read, own, dtypes), probe(read)
    differences = torch.tensor([_distance(exact, expected, expected), _distance(found, rounded, rounded)])
    return {
        "difference": float(differences.max()),  # NaN if any is
        "changed": [name for name in digests if there.get(name) != digests[name]],
        "rounding": _distance(found, exact, expected - plain),
        "dtype": str(own),
        "lora": loras,
    }


def _base_config(adapter: str, config: PeftConfig, base: str | None) -> PretrainedConfig:
    """The configuration of the base model: of the one that is passed, else of the one that the adapter names."""
    if base:
        return read_config(base)
    if not (named := config.base_model_name_or_path):
        raise ValueError(f"{adapter}: expected the name of its base model, found none; pass --base")
    try:
        return read_config(named, config.revision)
    except (OSError, HFValidationError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise ValueError(
            f"{adapter}: expected its base model {named} in that folder, seen from here, or on the hub, found neither "
            f"({reason}); pass --base with the base's folder or name"
        ) from error


def _lora_folder(out: Path, rank: int) -> Path:
    return out.absolute().with_name(f"{out.absolute().name}-lora-r{rank}")  # "." has no name of its own


def _cast(model: Any, dtype: torch.dtype, dtypes: Mapping[str, torch.dtype]) -> Any:
    """The model with what it saves in the dtypes of `dtypes`, others in `dtype`, in place; what it computes when it is
    loaded stays as it is."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtypes.get(name, dtype))
    return model


def _digests(model: Any, dtype: torch.dtype, dtypes: Mapping[str, torch.dtype]) -> dict[str, bytes]:
    """A digest of every tensor that the model saves, rounded as in `_cast`: two models need not be in memory."""
    result = {}
    for name, tensor in model.state_dict().items():
        tensor = tensor.to(dtypes.get(name, dtype)) if tensor.is_floating_point() else tensor
        result[name] = hashlib.blake2b(tensor.contiguous().flatten().view(torch.uint8).numpy()).digest()
    return result


def _settle_ties(model: Any) -> None:
    """Say in the config whether output and input embeddings are one: an adapter may have trained one of two."""
    decoder: Any = getattr(model, "decoder", None)
    if isinstance(decoder, PreTrainedModel) and decoder.config is getattr(model.config, "decoder", None):
        model = decoder  # one model reads and another one writes
    config = model.config.get_text_config()
    out: Any = embedding_of(model, "output")
    into: Any = embedding_of(model, "input")
    if not getattr(config, "tie_word_embeddings", False) or out is None or into is None or out.weight is into.weight:
        return
    if torch.equal(out.weight, into.weight):
        out.weight = into.weight
        return
    for each in {id(config): config, id(model.config): model.config}.values():
        each.tie_word_embeddings = False


def _warn_of_random(missing: Iterable[str], adapter: str) -> None:
    """Warn of parameters that neither the base's file nor the adapter's has, as a classifier's pooler."""
    if new := sorted(set(missing) - saved_shapes(adapter).keys()):
        warn(
            f"neither the base nor the adapter has {', '.join(new)}: each load initialises them anew, so that what "
            "reads them is not what was trained; name their modules in modules_to_save and train again"
        )


def _check_loras(model: PeftModel, ranks: list[int]) -> None:
    """Refuse ranks that no LoRA of these modules has, and modules whose bias a LoRA would leave out."""
    layers = clover_layers(model)
    refuse_experts(layers, "--lora-rank")
    for _, layer in layers:
        if not layer.supports_lora_conversion():
            raise ValueError(
                f"{layer.name}: expected a module without bias, found one whose bias the adapter changes too, which a "
                "LoRA cannot; leave --lora-rank out and serve the merged model, or leave modules with biases out of "
                "target_modules in training"
            )
    narrowest = min(min(layer.in_features, layer.out_features) for _, layer in layers)
    for rank in ranks:
        if not 1 <= rank <= narrowest:
            raise ValueError(
                f"--lora-rank {rank}: expected 1 to {narrowest}, the narrowest of the adapted projections; choose "
                "another"
            )


def _write_lora(model: PeftModel, folder: Path, rank: int, tokenizer: Any, embeddings: bool) -> None:
    """Save the best LoRA of a rank, and with it embeddings that have more rows than the base's."""
    config, state = convert_to_lora(model, rank=rank)
    if embeddings:
        own = get_peft_model_state_dict(model, save_embedding_layers=True)
        state |= {name: tensor.clone() for name, tensor in own.items() if "clover_" not in name}
    with new_folder(folder) as partial:
        save_file(state, partial / "adapter_model.safetensors")
        config.save_pretrained(str(partial))
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def _distance(this: Tensor, that: Tensor, unit: Tensor) -> float:
    """The distance of two tensors of logits, in lengths of `unit`; 0 where they are equal."""
    distance = torch.linalg.vector_norm(this - that)
    return float(distance / torch.linalg.vector_norm(unit)) if distance != 0 else 0.0


@reports_errors(TypeError)
def run(given: argparse.Namespace) -> int:
    checks.export(given)
    dtype = getattr(torch, given.dtype) if given.dtype else None
    report = export(given.adapter, given.out, given.base, dtype, given.lora_rank, given.model_class)
    for rank, lost in report["lora"].items():
        print(f"LoRA r={rank}: {lost['weights']:.1%} of the update lost, {lost['logits']:.1%} of its effect on logits")
    difference, changed = report["difference"], report["changed"]
    print(
        f"{given.out}: {report['dtype']}, logits off by {difference:.1e} from the adapter before rounding; rounding "
        f"moves them by {report['rounding']:.1%} of what the adapter does"
    )
    if changed:
        problem = f"{changed[0]}: expected the merged tensor in the folder, found another ({len(changed)} such)"
    elif not difference <= _ALLOWED:
        problem = f"the export is not the adapted model: expected logits within {_ALLOWED:.1e}"
    else:
        return 0
    print(f"FAILED: {problem}; do not use {given.out}", file=sys.stderr)
    return 1


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parsers.export(arguments))
