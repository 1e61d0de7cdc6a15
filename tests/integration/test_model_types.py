"""Every model type that transformers builds in small: an adapter is exact or refused, and the model stays what it was.

A walk like this one found more than any reading. It needs no list of models: new ones of the newest transformers come
by themselves. A type that cannot be built in small from its config alone is skipped, with the reason.
"""

from __future__ import annotations

import copy
import traceback

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from clover_peft import CloverConfig
from tests.support.model_types import build_type, inputs_of, output_of

pytestmark = pytest.mark.filterwarnings("ignore")
# Types that the walk must reach: it skips what it cannot build, and would pass if that were everything.
REACHED = ("llama", "qwen2_moe", "gpt2", "bert", "t5", "bart", "whisper", "wav2vec2", "vit", "clip", "llava")
CONFIGS = {
    "default": {},
    "all-linear": {"target_modules": "all-linear"},
    "described": {"target_modules": "all-linear", "mlp_block_size": 8},  # also what the table does not know
}


@pytest.mark.parametrize("model_type", REACHED)
def test_the_walk_reaches_well_known_types(model_type):
    model = build_type(model_type)
    inputs = inputs_of(model)
    assert output_of(model, inputs).isfinite().all()
    assert torch.equal(output_of(model, inputs), output_of(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", sorted(CONFIG_MAPPING))
def test_an_adapter_is_exact_or_refused(model_type, tmp_path):
    transformers.logging.set_verbosity_error()
    try:
        model = build_type(model_type).requires_grad_(False)  # which chooses torch's kernels
        inputs = inputs_of(model)
        outputs = [output_of(model, inputs) for _ in range(2)]
    except Exception as error:  # the walk is wide because it asks for nothing
        pytest.skip(f"not built in small: {type(error).__name__}: {str(error)[:100]}")
    if not outputs[0].isfinite().all() or not torch.equal(*outputs):
        pytest.skip("its output is not finite, or differs from call to call")
    for name, options in CONFIGS.items():
        try:
            _check(name, copy.deepcopy(model), inputs, CloverConfig(**options), tmp_path / name)
        except AssertionError:
            raise
        except Exception as error:  # such as a module that is called in a way of its own: LoRA meets it too
            lora, message = LoraConfig(target_modules="all-linear", r=2), f"{name}: {error}"
            assert _fails(copy.deepcopy(model), inputs, lora, tmp_path / "lora"), message


def _fails(*arguments):
    """Whether an adapter ends in an error too; one that computes something wrong does not count."""
    try:
        _check("lora", *arguments)
    except AssertionError:
        return False
    except Exception:
        return True
    return False


def _check(name, model, inputs, config, folder):
    reference, names, base = copy.deepcopy(model), set(model.state_dict()), output_of(model, inputs)
    try:
        adapted = get_peft_model(model, config).eval()
    except (ValueError, TypeError) as error:
        *_, frame = traceback.extract_tb(error.__traceback__)
        if "peft" not in frame.filename:  # no refusal, but an accident
            raise
        assert torch.equal(output_of(model, inputs), base), f"{name}: refused, but changed the model"
        return
    assert torch.equal(output_of(adapted, inputs), base), f"{name}: not exact at the start"
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for path, parameter in adapted.named_parameters():
            if "clover_S" in path:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    changed = output_of(adapted, inputs)
    with adapted.disable_adapter():
        assert torch.equal(output_of(adapted, inputs), base), f"{name}: not exact when disabled"
    adapted.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(reference, folder).eval()
    assert _relative(output_of(loaded, inputs), changed) <= 1e-6, f"{name}: loads as something else"
    adapted.merge_adapter()
    assert _relative(output_of(adapted, inputs), changed) <= 1e-4, f"{name}: merges to something else"
    adapted.unmerge_adapter()
    assert torch.equal(output_of(adapted, inputs), changed), f"{name}: does not unmerge to what it was"
    unloaded = adapted.merge_and_unload()
    assert _relative(output_of(unloaded, inputs), changed) <= 1e-4, f"{name}: unloads as something else"
    assert set(unloaded.state_dict()) == names, f"{name}: leaves other tensors"


def _relative(found, expected):
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
