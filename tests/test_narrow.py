"""`prune`: heads made physically narrower, for every family; saved and loaded like any model."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

import clover_peft
from clover_peft.architectures import attention_block, default_targets
from clover_peft.pruning import find_pairs
from clover_peft.pruning.narrow import narrow, read_record, widths
from tests.tiny import FAMILIES, VOCAB, build, inputs, logits, relative

pytestmark = pytest.mark.usefixtures("one_thread")

# Families whose heads can be made narrower.
NARROW = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "opt", "bloom"),
    *("bert", "roberta", "xlm-roberta", "camembert", "electra"),
    *("bart", "mbart", "pegasus", "marian", "m2m_100", "blenderbot", "plbart", "whisper", "t5", "mt5"),
    *("vit", "clip", "siglip", "deepseek_v2", "deepseek_v3", "unet"),
]


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
        warnings.filterwarnings("ignore", message=".*tokens for blocks of.*are few")
        return clover_peft.prune(model, *args, **kwargs)


@pytest.mark.parametrize("family", NARROW)
def test_full_width_is_the_stock_module_bit_for_bit(family):
    model = build(family)
    before = logits(model, family)
    blocks = {b.path: b for path in default_targets(model) if (b := attention_block(model, path)) is not None}
    for block in blocks.values():
        state = {path: p.clone() for path, p in model.named_parameters()}
        output = model.get_submodule(block.prefix + block.family.output)
        narrow(block, *widths(block), getattr(output, "bias", None) is not None)
        model.load_state_dict(state, strict=False)
    assert torch.equal(logits(model, family), before)


@pytest.mark.parametrize("family", NARROW)
def test_nothing_removed_changes_nothing(family):
    model = build(family)
    before = logits(model, family)
    report = prune(model, ratio(model, 0.0))
    assert relative(logits(model, family), before) < 1e-4
    assert report.parameters[0] >= report.parameters[1] - model_bias_size(model)
    assert all(report.removed(kind) == 0 for kind in kinds(model))


def model_bias_size(model) -> int:
    return sum(p.numel() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("ranks", ["global", "uniform", "layer"])
@pytest.mark.parametrize("family", NARROW)
def test_sliced_is_masked(family, ranks):
    model = build(family)
    twin = copy.deepcopy(model)
    report = prune(model, ratio(model, 0.4), ranks=ranks)
    prune(twin, ratio(twin, 0.4), ranks=ranks, masked=True)
    assert relative(logits(model, family), logits(twin, family)) < 1e-5
    assert report.parameters[1] < report.parameters[0]
    assert report.cache_bytes[1] < report.cache_bytes[0] or "deepseek" in family


@pytest.mark.parametrize("family", NARROW)
def test_sliced_is_masked_with_calibration(family):
    model = build(family)
    twin = copy.deepcopy(model)
    data = batches(family)
    prune(model, ratio(model, 0.4), calibration=data)
    prune(twin, ratio(twin, 0.4), calibration=data, masked=True)
    assert relative(logits(model, family), logits(twin, family)) < 1e-4


def reload(model, folder):
    """The model from its folder, as another process finds it: only what was saved counts."""
    model.save_pretrained(folder)
    same = {"experts_implementation": "eager"} if "Deepseek" in type(model).__name__ else {}  # not saved with a config
    return type(model).from_pretrained(folder, **same).eval().requires_grad_(False)


@pytest.mark.parametrize("ranks", ["global", "uniform"])
@pytest.mark.parametrize("family", NARROW)
def test_saved_and_loaded(family, ranks, tmp_path):
    model = build(family)
    prune(model, ratio(model, 0.4), ranks=ranks, calibration=batches(family) if ranks == "global" else None)
    loaded = reload(model, tmp_path)
    assert torch.equal(logits(loaded, family), logits(model, family))
    assert read_record(loaded)["steps"] == read_record(model)["steps"]


GENERATING = [name for name in NARROW if hasattr(build(name), "generate") and FAMILIES[name].kind != "contrast"]


@pytest.mark.parametrize("family", GENERATING)
def test_generates_as_without_a_cache(family, tmp_path):
    """Greedy, sampled by beams, with a static cache: what is generated is what the plain forward says."""
    model = build(family)
    prune(model, ratio(model, 0.4))
    loaded = reload(model, tmp_path)
    given = {k: v for k, v in inputs(family).items() if not k.startswith("decoder")}
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = model.generate(**given, **options, use_cache=False)
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(loaded.generate(**given, **options, **more), plain), more
    assert torch.equal(
        loaded.generate(**given, **options, num_beams=3),
        model.generate(**given, **options, num_beams=3, use_cache=False),
    )
