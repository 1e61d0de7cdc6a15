"""Faults of models and data that gave wrong models without an error, or lost something before one."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.distributed.tensor import DTensor

import clover_peft
from clover_peft.base_model.resolve import attention_blocks
from clover_peft.pruning import Calibration, decompose, mask, measured, pruner
from clover_peft.pruning.rule import default_spread
from tests.support.pruning import batches, prune
from tests.support.tiny import TOLERANCE, build, logits, relative

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_head_whose_values_are_only_their_bias_has_no_directions() -> None:
    """What its activations vary by is rounding: as directions, that made biases of a million, which cancel."""
    model = build("qwen2", initializer_range=0.1)
    block = next(iter(attention_blocks(model).values()))
    value = block.module_of("v_proj")
    with torch.no_grad():
        value.weight[: block.dim("v", f"{block.prefix}v_proj")] = 0
        value.bias.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    report = prune(model, {"vo": 0.25}, calibration=batches("qwen2"))
    biases = [bias for name in ("v_proj", "o_proj") if (bias := block.module_of(name).bias) is not None]
    assert max(float(bias.abs().max()) for bias in biases) < 10
    assert next(iter(report.pairs.values())).before[0] == 0
    expected = logits(model, "qwen2")
    assert relative(logits(model.to(torch.bfloat16), "qwen2"), expected) < 2 * TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("family", ["mpnet", "deberta", "deberta-v2"])
def test_encoders_that_do_not_say_so_are_no_causal_models(family: str) -> None:
    model = build(family)
    assert default_spread(model) == "global"
    assert prune(model, {"vo": 0.5}, masked=True).cache_bytes == (0, 0)


def test_padding_of_labels_is_no_token() -> None:
    ids = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
    padded = ids.clone()
    padded[0, 3:] = -100
    real = [{"input_ids": ids[:1], "labels": ids[:1, :3]}, {"input_ids": ids[1:], "labels": ids[1:]}]

    def tokens(data: list[dict]) -> dict[str, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = clover_peft.calibrate(build("bart"), data).moments
        return {name: moments.tokens for name, moments in found.items() if "decoder.layers.0.self_attn" in name}

    [found], [expected] = (set(tokens(data).values()) for data in ([{"input_ids": ids, "labels": padded}], real))
    assert (found, expected) == (9 + 4, 9 + 3)  # the decoder also reads the last label before the padding


def test_a_masked_model_with_a_bias_that_its_class_lacks_says_so() -> None:
    with pytest.warns(UserWarning, match=r"o_proj: gets a bias .*a saved model would lose it"):
        clover_peft.prune(build("qwen2"), {"vo": 0.5}, calibration=batches("qwen2"), masked=True)


def test_masks_have_the_checks_of_pruning() -> None:
    model = build("llama")
    found = decompose(model, ["vo"])
    ranks = {name: torch.full((len(each.values),), 2) for name, (_, each) in found.items()}
    tied = copy.deepcopy(model)
    tied.model.layers[1].self_attn.o_proj.weight = tied.model.layers[0].self_attn.o_proj.weight
    with pytest.raises(ValueError, match="expected weights of its own, found them tied"):
        mask(tied, found, ranks)
    adapted = clover_peft.CloverConfig()
    from peft import get_peft_model

    with pytest.raises(ValueError, match="expected a model without adapters"):
        mask(get_peft_model(copy.deepcopy(model), adapted), found, ranks)
    with pytest.raises(ValueError, match="expected names of pairs that were decomposed, found 'other'"):
        mask(model, found, {**ranks, "other": torch.tensor([1])})


def test_what_is_behind_padding_does_not_count_in_measured_ratios() -> None:
    model = build("llama")
    other = copy.deepcopy(model)
    torch.nn.init.normal_(other.lm_head.weight, generator=torch.Generator().manual_seed(1))
    ids = torch.randint(3, 90, (2, 8), generator=torch.Generator().manual_seed(0))
    kept = torch.arange(8) < torch.tensor([[8], [5]])
    found = [
        measured._divergence(model, other, [{"input_ids": torch.where(kept, ids, pad), "attention_mask": kept.long()}])
        for pad in (0, 2)
    ]
    assert found[0] == found[1]


def test_an_error_at_the_first_layer_leaves_no_trace() -> None:
    model = build("llama")
    model.name_or_path = "base/llama"
    with mock.patch.object(pruner, "rewrite", side_effect=MemoryError), pytest.raises(MemoryError):
        prune(model, {"vo": 0.5})
    assert model.name_or_path == "base/llama"
    assert not hasattr(model.config, "clover_pruning")


@pytest.mark.parametrize(
    "run",
    [
        lambda model: clover_peft.prune(model, {"vo": 0.4}, multiple=4, calibration=batches("llama", 40)),
        lambda model: clover_peft.slice_hidden_size(model, 0.25, batches("llama", 1), multiple=4),
    ],
    ids=["prune", "slice"],
)
def test_a_warning_that_is_an_error_comes_before_the_model_changes(run) -> None:
    model = build("llama")
    before = logits(model, "llama")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning):
            run(model)
    assert torch.equal(logits(model, "llama"), before)


def test_sharded_weights_and_those_of_inference_mode_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    with torch.inference_mode():
        made_there = build("llama")
    for run in (
        lambda model: clover_peft.calibrate(model, batches("llama"), gradients=True),
        lambda model: prune(model, {"vo": 0.5}),
        lambda model: clover_peft.slice_hidden_size(model, 0.25, batches("llama")),
        lambda model: clover_peft.convert_to_mla(model, batches("llama")),
    ):
        with pytest.raises(ValueError, match="found an inference tensor"):
            run(made_there)
        with monkeypatch.context() as patch:
            patch.setattr("clover_peft.base_model.plain.DTensor", torch.nn.Parameter)  # stands for a sharded weight
            with pytest.raises(ValueError, match="expected a weight that is whole in this process, found it sharded"):
                run(model)
    assert issubclass(DTensor, torch.Tensor)


def test_data_of_wrong_types() -> None:
    for wrong in (None, 5):
        with pytest.raises(TypeError, match="expected a list of batches"):
            clover_peft.calibrate(build("llama"), wrong)
    with pytest.raises(TypeError, match="expected a list of batches, found int"):
        prune(build("llama"), {"vo": 0.5}, calibration=5)
    assert isinstance(clover_peft.calibrate(build("llama"), batches("llama")), Calibration)


def test_a_sliced_model_keeps_the_mode_of_every_module(tmp_path: Path) -> None:
    model = build("llama").train()
    model.model.layers[0].mlp.eval()
    model.model.norm.eval()
    clover_peft.slice_hidden_size(model, 0.25, batches("llama", 40), multiple=4)
    assert model.model.layers[0].self_attn.training
    assert not model.model.layers[0].mlp.training
    assert not model.model.layers[0].mlp.up_proj.training
    assert not model.model.norm.training


def test_layers_that_are_one_module_are_sliced() -> None:
    model = build("llama")
    model.model.layers[1] = model.model.layers[0]
    clover_peft.slice_hidden_size(model, 0.25, batches("llama", 40), multiple=4, rotation="per_block")
    ids = torch.arange(3, 11).unsqueeze(0)
    assert model(input_ids=ids, use_cache=False).logits.isfinite().all()
