"""What tests of pruning share: the families whose heads can be made narrower, data for them, and quiet pruning."""

from __future__ import annotations

import warnings

import torch

import clover_peft
from clover_peft.pruning import find_pairs
from tests.support.tiny import FAMILIES, VOCAB, build, inputs, logits

# Families whose heads can be made narrower.
NARROW = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "bloom"),
    *("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    *("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "plbart", "whisper", "t5", "mt5"),
    *("vit", "clip", "siglip", "deepseek_v2", "deepseek_v3", "unet"),
]
NARROW = [family for family in NARROW if family in FAMILIES]  # those that the installed transformers has


def kinds(model) -> list[str]:
    return sorted({pair.kind for pair in find_pairs(model)})


def ratio(model, share: float) -> dict[str, float]:
    return dict.fromkeys(kinds(model), share)


def batches(family: str, count: int = 12) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    found = []
    for _ in range(count):
        batch = inputs(family, batch=2, length=20)
        for name in ("input_ids", "decoder_input_ids"):
            if name in batch:
                batch[name] = torch.randint(3, VOCAB, batch[name].shape, generator=generator)
        for name in ("pixel_values", "input_features", "sample", "encoder_hidden_states"):
            if name in batch:
                batch[name] = torch.randn(batch[name].shape, generator=generator)
        found.append(batch)
    return found


def prune(model, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tokens for blocks of.*are few|directions are chosen by weights")
        return clover_peft.prune(model, *args, **kwargs)


def reload(model, folder):
    """The model from its folder, as another process finds it: only what was saved counts."""
    model.save_pretrained(folder)
    same = {"experts_implementation": "eager"} if "Deepseek" in type(model).__name__ else {}  # not saved with a config
    return type(model).from_pretrained(folder, **same).eval().requires_grad_(False)


GENERATING = [name for name in NARROW if hasattr(build(name), "generate") and FAMILIES[name].kind != "contrast"]


def load_all(folder: str, families: list[str]) -> dict[str, list]:
    found = {}
    for family in families:
        kind = type(FAMILIES[family].build())
        same = {"experts_implementation": "eager"} if "deepseek" in family else {}
        found[family] = shown(kind.from_pretrained(f"{folder}/{family}", **same).eval(), family)
    return found


def shown(model, family: str) -> list:
    if family in GENERATING:
        given = {k: v for k, v in inputs(family).items() if not k.startswith("decoder")}
        return model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0).tolist()
    return [round(float(x), 3) for x in logits(model, family).flatten()[:50]]


def unchanged(model, before) -> bool:
    """Whether a model has the parameters of `before`, to the bit, and no hooks."""
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    names = dict(model.named_parameters())
    return not hooks and set(names) == set(before) and all(torch.equal(names[n], p) for n, p in before.items())


def iter_fails():
    """Batches that must not be read."""
    raise AssertionError("data were read")
    yield
