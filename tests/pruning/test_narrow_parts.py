"""Models of several parts: whatever of one is pruned, in any order, the whole and every part are saved and loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from clover_peft.pruning.narrow import loading
from clover_peft.pruning.narrow.loading import read_record
from tests.support.pruning import kinds, prune, reload
from tests.support.tiny import build, logits, relative

pytestmark = pytest.mark.usefixtures("one_thread")

# Configs that are shared (bart, whisper), copies (t5, mt5), and parts of another (clip, siglip, llava).
FAMILIES = ["bart", "whisper", "t5", "mt5", "clip", "siglip", "llava"]


def parts_of(model: transformers.PreTrainedModel) -> dict[str, transformers.PreTrainedModel]:
    return {path: part for path, part in model.named_modules() if isinstance(part, transformers.PreTrainedModel)}


def layout(model: torch.nn.Module) -> dict[str, tuple]:
    """Path -> class and content of every module, by which two models compute the same."""
    return {
        path: (type(module), *(p.tolist() for p in module._parameters.values() if p is not None))
        for path, module in model.named_modules()
    }


def facts(part: transformers.PreTrainedModel) -> dict:
    """The config, without what transformers itself enters when it saves."""
    known = {"architectures", "dtype", "transformers_version"}
    found = {key: value for key, value in vars(part.config).items() if key not in known}
    return json.loads(json.dumps(found, default=lambda value: getattr(value, "clover_pruning", None)))


def check_saved(model: transformers.PreTrainedModel, family: str, folder: Path) -> None:
    """Save and load the whole and all of its parts; what is saved stays as it was."""
    for path, part in parts_of(model).items():
        before = {name: facts(each) for name, each in parts_of(model).items()}
        loaded = reload(part, folder / (path or "whole"))
        assert layout(loaded) == layout(part)
        assert {name: facts(each) for name, each in parts_of(model).items()} == before
        twice = reload(loaded, folder / "again" / (path or "whole"))
        assert layout(twice) == layout(part)
    again = type(model).from_pretrained(folder / "whole").eval()
    assert relative(logits(again, family), logits(model, family)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_any_part_is_pruned_and_any_part_is_saved(family, tmp_path):
    for pruned in parts_of(build(family)):
        model = build(family)
        part = parts_of(model)[pruned]
        prune(part, dict.fromkeys(kinds(part), 0.4))
        assert [step["calibrated"] for step in read_record(part)["steps"]] == [False]
        check_saved(model, family, tmp_path / (pruned or "whole"))
        assert len(read_record(reload(model, tmp_path))["steps"]) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_are_pruned_one_after_the_other(family, tmp_path):
    """The whole first or last, and every part."""
    paths = list(parts_of(build(family)))
    for name, order in {"inwards": paths, "outwards": paths[::-1]}.items():
        model = build(family)
        for path in order:
            part = parts_of(model)[path]
            prune(part, dict.fromkeys(kinds(part), 0.2), ranks="uniform")
        check_saved(model, family, tmp_path / name)


@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_part_is_loaded_from_the_folder_of_the_whole(family, tmp_path):
    model = build(family)
    prune(model, 0.4)
    model.save_pretrained(tmp_path)
    part = type(model.vision_model).from_pretrained(tmp_path)
    assert layout(part) == layout(model.vision_model)
    assert read_record(part)["steps"] == read_record(model)["steps"]


def test_models_that_share_a_config_are_saved_each_by_itself(tmp_path):
    one, other = build("opt"), build("opt")
    other.config = one.config
    prune(one, 0.5)
    assert torch.equal(logits(reload(other, tmp_path / "other"), "opt"), logits(other, "opt"))
    assert torch.equal(logits(reload(one, tmp_path / "one"), "opt"), logits(one, "opt"))


@pytest.mark.parametrize(
    "options",
    [{"max_shard_size": "20KB"}, {"state_dict": True}, {"variant": "fp"}, {"is_main_process": True}],
    ids=str,
)
def test_options_of_saving(options, tmp_path):
    model = build("bart")
    prune(model.get_encoder(), 0.4)
    if "state_dict" in options:
        options = {"state_dict": model.state_dict()}
    model.save_pretrained(tmp_path, **options)
    loaded = type(model).from_pretrained(tmp_path, variant=options.get("variant")).eval()
    assert torch.equal(logits(loaded, "bart"), logits(model, "bart"))


def test_wrappers_of_torch_are_not_part_of_a_path(tmp_path):
    """Trainers leave them in place when they save."""
    model = build("llama")
    prune(model, {"vo": 0.5})
    expected = logits(model, "llama")
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1].self_attn = checkpoint_wrapper(model.model.layers[1].self_attn)
    assert torch.equal(logits(reload(model, tmp_path), "llama"), expected)
    assert list(read_record(model)["blocks"]) == [f"layers.{i}.self_attn" for i in range(2)]


def test_other_models_are_saved_as_before(monkeypatch, tmp_path):
    def called(*arguments):
        raise AssertionError("a model that was not pruned has no record")

    model = build("clip")
    monkeypatch.setattr(loading, "current_record", called)
    model.save_pretrained(tmp_path)
    assert "clover" not in (tmp_path / "config.json").read_text()
    assert not any(hasattr(part.config, "clover_pruning") for part in parts_of(model).values())


def test_records_of_a_tower_still_load(tmp_path):
    """Earlier versions recorded the paths in the part that was pruned, and its class."""
    model = build("bart")
    prune(model.get_encoder(), 0.4)
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    record = config["clover_pruning"]
    record["blocks"] = {path.removeprefix("encoder."): entry for path, entry in record["blocks"].items()}
    record["tower"] = "BartEncoder"
    file.write_text(json.dumps(config))
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, "bart"), logits(model, "bart"))
    again = reload(loaded, tmp_path / "again")
    assert torch.equal(logits(again, "bart"), logits(model, "bart"))
    assert "tower" not in read_record(again)
