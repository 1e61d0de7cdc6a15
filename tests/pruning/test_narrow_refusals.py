"""What cannot be pruned is refused, and an error or an interrupt leaves a model that works."""

from __future__ import annotations

import json
import signal
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.utils.prune

import clover_peft
from clover_peft.pruning import find_pairs
from clover_peft.pruning.narrow.loading import read_record
from tests.support.pruning import batches, prune, reload, unchanged
from tests.support.tiny import FAMILIES, build, logits

pytestmark = pytest.mark.usefixtures("one_thread")


def test_weights_that_cannot_be_written_are_refused():
    with torch.inference_mode():
        model = build("gpt2")
    with pytest.raises(ValueError, match="expected a weight that can be written to, found an inference tensor"):
        prune(model, 0.5)
    for masked in (False, True):
        model = build("opt")
        projection = model.model.decoder.layers[0].self_attn.out_proj
        torch.nn.utils.prune.l1_unstructured(projection, "weight", 0.3)
        with pytest.raises(ValueError, match="out_proj: expected a weight of its own, found one that torch computes"):
            prune(model, 0.5, masked=masked)


def test_options_of_wrong_types():
    model = build("opt")
    for wrong in ("8", None, float("nan"), 1.5):
        with pytest.raises(ValueError, match="multiple: expected a positive whole number"):
            prune(model, 0.5, multiple=wrong)
    with pytest.raises(ValueError, match=r"ratio: expected a number, or one for each kind of pair, found '0\.5'"):
        prune(model, "0.5")
    with pytest.raises(ValueError, match="ratio: expected a figure for 'qk', for 'vo' or for both"):
        prune(model, {"kv": 0.5})
    with pytest.raises(TypeError, match="expected batches, found one batch; pass a list of them"):
        prune(model, 0.5, calibration=batches("opt")[0])
    with pytest.raises(ValueError, match=r"target_modules='\(': expected a regular expression"):
        prune(model, 0.5, target_modules="(")
    with pytest.raises(TypeError, match="model: expected a module, found str"):
        prune("my-model", 0.5)
    report = prune(model, 0.5, calibration=batches("opt"), masked=np.bool_(False), multiple=np.int64(2))
    json.dumps(report.to_dict())
    json.dumps(read_record(model))


def test_warnings_point_at_the_users_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clover_peft.prune(build("llama"), 0.5)
        clover_peft.calibrate(build("llama"), batches("llama", 1))
    assert len(caught) >= 3
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio: expected a share"),
        ({"ratio": -0.1}, "ratio: expected a share"),
        ({"ratio": {"kv": 0.5}}, "expected a figure for 'qk', for 'vo' or for both"),
        ({"ratio": {}}, "expected a figure for 'qk', for 'vo' or for both"),
        ({"ratio": 0.5, "energy": 0.9}, "expected one rule"),
        ({"energy": 1.5}, "energy: expected a share"),
        ({"ranks": "local"}, "ranks: expected 'global'"),
        ({"ranks": {"nothing (vo)": [1]}}, "expected names of pairs such as"),
        ({"ratio": 0.5, "method": "magic"}, "method: expected 'clover' or 'vanilla'"),
        ({"ratio": 0.5, "calibration": []}, "expected batches to run the model on, found none"),
        ({"ratio": 0.5, "multiple": 2.5}, "multiple: expected a positive whole number"),
        ({"ratio": "half"}, "ratio: expected a number"),
        ({"ranks": {}}, "ranks: expected ranks by name"),
        ({"ranks": {"x (vo)": [1.5]}}, "ranks: expected whole numbers"),
        ({"ranks": {"x (vo)": [True]}}, "ranks: expected whole numbers"),
        ({"ranks": {"model.decoder.layers.0.self_attn.v_proj (vo)": [4] * 4}, "multiple": 4}, "found given ones"),
        ({"ranks": {"x (vo)": 4}}, "ranks: expected whole numbers"),
        ({"ratio": 0.5, "multiple": 16}, "multiple: expected at most the 12 directions"),
        ({"threshold": 1e9}, "expected a rule that keeps some direction"),
        ({"threshold": float("nan")}, "threshold: expected a singular value"),
        ({"energy": 0.0}, "expected a rule that keeps some direction"),
        ({"ratio": 0.5, "ranks": "gradient"}, "ranks='gradient': expected data"),
        ({"energy": 0.5, "ranks": "uniform"}, "ranks='uniform': expected a ratio to spread, found energy"),
        ({"ratio": 0.5, "multiple": 0}, "multiple: expected a positive whole number"),
        ({"ratio": 0.5, "target_modules": "nothing"}, "expected it to name a pair"),
    ],
)
def test_bad_options_change_nothing(options, message):
    model = build("opt")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        prune(model, **options)
    assert unchanged(model, before)


def test_wrong_ranks_by_name():
    model = build("opt")
    name = find_pairs(model)[0].name
    for wrong in ([1, 2, 3], [1, 2, 3, 13], [1, 2, 3, -1]):
        with pytest.raises(ValueError, match="expected 4 ranks from 0 to 12"):
            prune(model, ranks={name: wrong})


def test_models_that_cannot_be_pruned():
    adapted = peft.get_peft_model(build("opt"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="expected a model without adapters"):
        prune(adapted, 0.5)
    with pytest.raises(ValueError, match=r"can be made narrow, found AlbertAttention of.*masked"):
        prune(build("albert"), 0.5)
    with pytest.raises(ValueError, match="expected pairs of projections to prune, found none"):
        prune(torch.nn.Sequential(torch.nn.Linear(4, 4)), 0.5, masked=True)
    tied = build("opt")
    layers = tied.model.decoder.layers
    layers[1].self_attn.v_proj.weight = layers[0].self_attn.v_proj.weight
    with pytest.raises(ValueError, match="found them tied to"):
        prune(tied, 0.5)
    with torch.device("meta"):
        empty = FAMILIES["opt"].build()
    with pytest.raises(ValueError, match="expected all weights in memory"):
        prune(empty, 0.5)
    with pytest.warns(UserWarning, match="qk: not pruned, because queries and keys are rotated"):
        report = prune(build("llama"), 0.5)
    assert report.skipped == {"qk": "queries and keys are rotated by their position, or normed"}


def test_what_cannot_work_is_said_before_the_data_are_read():
    def data():
        raise AssertionError("calibrated")
        yield

    tied = build("opt")
    layers = tied.model.decoder.layers
    layers[1].self_attn.v_proj.weight = layers[0].self_attn.v_proj.weight
    for model, options in (
        (tied, {}),
        (build("albert"), {}),
        (build("opt"), {"ratio": 2}),
        (build("opt"), {"energy": 2}),
        (build("opt"), {"multiple": 0}),
        (build("opt"), {"method": "magic"}),
    ):
        with pytest.raises(ValueError, match="expected"):
            prune(model, calibration=data(), **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["text"], "expected a list of batches, each of a model's keyword arguments.*found str"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long)}, "expected batches, found one batch; pass a list"),
        ([torch.ones(1, 4)], "expected a list of batches.*found Tensor"),
        ([{"input_ids": [1, 2]}], "input_ids: expected a tensor of .rows, tokens., found list"),
        ([{"input_ids": torch.arange(4)}], "found shape"),
    ],
)
def test_what_is_no_batch(data, message):
    with pytest.raises(TypeError, match=message):
        prune(build("opt"), 0.5, calibration=data)


def test_attention_of_another_code_is_refused():
    """A class of the same name in a model's own code may do anything."""
    model = build("llama")
    attention = model.model.layers[0].self_attn
    foreign = type("LlamaAttention", (type(attention),), {"__module__": "transformers_modules.theirs"})
    attention.__class__ = foreign
    with pytest.raises(ValueError, match=r"found LlamaAttention of transformers_modules\.theirs"):
        prune(model, {"vo": 0.5})
    hooked = build("llama")
    hooked.model.layers[0].self_attn.forward = lambda *args: None
    with pytest.raises(ValueError, match="remove_hook_from_submodules"):
        prune(hooked, {"vo": 0.5})


def test_an_interrupt_while_calibrating_changes_nothing():
    model = build("opt")
    before = {name: p.clone() for name, p in model.named_parameters()}

    def data():
        yield batches("opt", 1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, 0.5, calibration=data())
    assert unchanged(model, before)


def test_an_interrupt_while_rewriting_waits_for_the_last_layer(monkeypatch, tmp_path):
    from clover_peft.pruning import pruner as module

    model = build("opt")
    rewrite = module.rewrite

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        rewrite(*arguments)

    monkeypatch.setattr(module, "rewrite", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores interrupts
    try:
        with pytest.raises(KeyboardInterrupt):
            prune(model, 0.5, ranks="uniform")
    finally:
        signal.signal(signal.SIGINT, before)
    widths = {layer.self_attn.v_proj.out_features for layer in model.model.decoder.layers}
    assert widths == {24}
    assert torch.equal(logits(reload(model, tmp_path), "opt"), logits(model, "opt"))


def test_norms_between_value_and_output_are_the_reason():
    model = build("gemma4_text")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"expected pairs .* found none \(qk: .* normed; vo: another operation"):
        prune(model, 0.5)
    assert unchanged(model, before)
