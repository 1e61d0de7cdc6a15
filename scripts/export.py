#!/usr/bin/env python
"""Merges an adapter into its base model: a folder that stock transformers, vLLM and others load without clover_peft.

    scripts/export.py <adapter> <out> [--base <model>] [--dtype bfloat16] [--lora-rank 16 64 256]

The folder holds the model in the base's dtype (or --dtype), its generation configuration, tokenizer and chat template.
It is read back without the adapter and compared with the adapter's logits before the script ends. With --lora-rank,
LoRAs that stand in for the adapter are written to <out>-lora-r<rank>, and what each of them loses is printed.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftConfig, PeftModel, save_as_lora
from safetensors import safe_open
from torch import Tensor

from clover_peft import lora_errors
from clover_peft.bases import clover_layers

_KINDS = {
    "CAUSAL_LM": transformers.AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": transformers.AutoModelForSeq2SeqLM,
    "SEQ_CLS": transformers.AutoModelForSequenceClassification,
    "TOKEN_CLS": transformers.AutoModelForTokenClassification,
    "QUESTION_ANS": transformers.AutoModelForQuestionAnswering,
}
_FEATURES = transformers.AutoModel
# Largest difference of a logit between adapter and export, relative to the largest logit, in units of the dtype's eps.
_ROUNDING = 64
_TOKENS = 32


def export(
    adapter: str,
    out: Path,
    base: str | None = None,
    dtype: torch.dtype | None = None,
    lora_ranks: list[int] | None = None,
) -> dict[str, Any]:
    """Writes the merged model, and LoRAs beside it.

    Args:
        adapter: folder or hub name of a CLOVER adapter (or of another that peft can merge).
        out: folder to write, new or empty.
        base: base model; None: the one that the adapter names.
        dtype: of the export; None: the base's own. The merge itself is computed in float32.
        lora_ranks: ranks of the LoRAs to write.

    Returns:
        `difference` of the largest logit on random tokens and what rounding allows (`allowed`), both relative; `lora`:
        rank -> `weights` and `logits`, the relative error of the update and of its effect.

    Raises:
        ValueError: `out` is in use, the base is not known, or something of the adapter would be lost.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: expected a new or empty folder, found files; choose another")
    config = PeftConfig.from_pretrained(adapter)
    base = base or config.base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter}: expected the name of its base model, found none; pass --base")
    extra = [name for name in ("modules_to_save", "trainable_token_indices") if getattr(config, name, None)]
    if lora_ranks and extra:
        raise ValueError(f"{adapter}: {extra[0]} cannot be part of a LoRA made of it; leave --lora-rank out")
    tokenizer = _tokenizer(adapter, base)
    kind = _class_of(config)
    model = kind.from_pretrained(base, dtype=torch.float32 if dtype else "auto")
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{base}: expected weights that are not quantised, found some; merge into the original model")
    _grow(model, adapter, tokenizer)
    own = model.dtype if dtype is None else dtype
    plain = _probe(model)
    model = PeftModel.from_pretrained(model, adapter).eval()
    expected = _probe(model)
    loras = _loras(model, out, lora_ranks or [], kind, base, plain, expected)
    merged = model.merge_and_unload(safe_merge=True).to(own)
    _settle_ties(merged)
    merged.save_pretrained(out)
    if tokenizer is not None:
        tokenizer.save_pretrained(out)
    del model, merged
    found = _probe(kind.from_pretrained(out, dtype="auto"))
    difference = float((found - expected).abs().max() / expected.abs().max())
    return {"difference": difference, "allowed": _ROUNDING * torch.finfo(own).eps, "dtype": str(own), "lora": loras}


def _class_of(config: PeftConfig) -> Any:
    """The class to load the base with: by the task, else the one that peft noted, as AutoPeftModel does."""
    noted = (config.auto_mapping or {}).get("base_model_class")
    if config.task_type is None and isinstance(found := getattr(transformers, str(noted), None), type):
        return found
    return _KINDS.get(str(getattr(config.task_type, "value", config.task_type)), _FEATURES)


def _tokenizer(adapter: str, base: str) -> Any:
    """The adapter's own tokenizer, else the base's; None where neither has one."""
    for place in (adapter, base):
        try:
            return transformers.AutoTokenizer.from_pretrained(place)
        except (OSError, ValueError):
            continue
    return None


def _grow(model: Any, adapter: str, tokenizer: Any) -> None:
    """Give the embeddings the rows that they had in training: as many as were saved, else as the tokenizer needs."""
    embedding = model.get_input_embeddings()
    path = next(name for name, module in model.named_modules() if module is embedding)
    rows = None
    if (file := Path(adapter, "adapter_model.safetensors")).is_file():
        with safe_open(file, framework="pt") as saved:
            if (key := f"base_model.model.{path}.weight") in set(saved.keys()):
                rows = saved.get_slice(key).get_shape()[0]
    if rows is None:
        rows = max(len(tokenizer) if tokenizer is not None else 0, embedding.weight.shape[0])
    if rows != embedding.weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)


def _settle_ties(model: Any) -> None:
    """Say in the config whether output and input embeddings are one: an adapter may have trained one of two."""
    config = model.config.get_text_config()
    out, into = model.get_output_embeddings(), model.get_input_embeddings()
    if not getattr(config, "tie_word_embeddings", False) or out is None or out.weight is into.weight:
        return
    if torch.equal(out.weight, into.weight):
        out.weight = into.weight
        return
    for each in {id(config): config, id(model.config): model.config}.values():
        each.tie_word_embeddings = False


def _loras(
    model: PeftModel, out: Path, ranks: list[int], kind: Any, base: str, plain: Tensor, expected: Tensor
) -> dict[int, dict[str, float]]:
    """Writes a LoRA of each rank and measures what it loses."""
    if not ranks:
        return {}
    weights = lora_errors(model, ranks)["all"]
    smallest = min(min(layer.weight.shape) for _, layer in clover_layers(model))
    result = {}
    for rank in ranks:
        if rank > smallest:
            raise ValueError(
                f"--lora-rank {rank}: expected at most {smallest}, the narrowest of the adapted projections"
            )
        folder = out.with_name(f"{out.name}-lora-r{rank}")
        save_as_lora(folder, model, rank=rank)
        lora = PeftModel.from_pretrained(kind.from_pretrained(base, dtype=model.dtype), folder).eval()
        effect = torch.linalg.vector_norm(expected - plain)
        lost = torch.linalg.vector_norm(_probe(lora) - expected)
        result[rank] = {"weights": weights[rank], "logits": float(lost / effect) if effect else 0.0}
    return result


@torch.no_grad()
def _probe(model: Any) -> Tensor:
    """Float32 logits (or last hidden states) on fixed random tokens."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.get_input_embeddings().weight.shape[0], (1, _TOKENS), generator=generator)
    more = {"decoder_input_ids": ids.flip(-1)} if model.config.is_encoder_decoder else {}
    result = model.eval()(input_ids=ids.to(model.device), **more)
    return (result.logits if "logits" in result else result[0]).float().cpu()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter")
    parser.add_argument("out", type=Path)
    parser.add_argument("--base", help="base model; by default the one that the adapter names")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="by default the base's own")
    parser.add_argument("--lora-rank", type=int, nargs="+", help="also write LoRAs of these ranks")
    given = parser.parse_args(arguments)
    try:
        dtype = getattr(torch, given.dtype) if given.dtype else None
        report = export(given.adapter, given.out, given.base, dtype, given.lora_rank)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for rank, lost in report["lora"].items():
        print(f"LoRA r={rank}: {lost['weights']:.1%} of the update lost, {lost['logits']:.1%} of its effect on logits")
    difference, allowed = report["difference"], report["allowed"]
    print(f"{given.out}: {report['dtype']}, logits off by {difference:.1e} from the adapter (rounding {allowed:.1e})")
    if not difference <= allowed:
        print("FAILED: the export is not the adapted model", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
