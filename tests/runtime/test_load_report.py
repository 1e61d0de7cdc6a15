"""What is read from transformers and peft while they load an adapter: their frames, and their report."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers.integrations import PeftAdapterMixin
from transformers.integrations import peft as integration

from clover_peft.runtime import loading
from tests.support.saved_adapters import WEIGHTS, edit, save_trained
from tests.support.tiny import build

# ---------------------------------------------------------------------- who loads


def test_the_installed_loaders_are_recognised_and_name_what_they_load() -> None:
    assert None not in loading._LOADERS
    assert len(loading._LOADERS) == 3
    code = PeftAdapterMixin.load_adapter.__code__
    assert code.co_name == "load_adapter"  # not a decorator's function
    assert {*code.co_varnames, *code.co_cellvars} >= loading._SOURCES


def test_the_file_is_read_while_transformers_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_trained(tmp_path)
    seen = []
    monkeypatch.setattr(
        "clover_peft.tuner.model.loaded_by_transformers",
        lambda: seen.append(loading.loaded_by_transformers()) or seen[0],
    )
    build("llama").load_adapter(str(tmp_path), adapter_name="other")
    (found,) = seen
    tensors = load_file(tmp_path / WEIGHTS)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[key], tensors[key]) for key in tensors)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loading.loaded_by_transformers() == {}
        assert not loading.weights_follow()


def test_a_loader_without_the_variable_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_adapter(adapter_id: str) -> dict:
        return loading.loaded_by_transformers()

    monkeypatch.setattr(loading, "_TRANSFORMERS", load_adapter.__code__)
    with pytest.warns(UserWarning, match=r"expected the variables \[.*'peft_model_id'\] in load_adapter"):
        assert load_adapter("folder") == {}


# ---------------------------------------------------------------------- the report


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[tuple[set[str], set[str]]]:
    """The missing and unexpected keys of each report, in place of the text that transformers logs."""
    found: list[tuple[set[str], set[str]]] = []

    def log_state_dict_report(model: Any, pretrained_model_name_or_path: str, loading_info: Any, **_: Any) -> None:
        found.append((set(loading_info.missing_keys), set(loading_info.unexpected_keys)))

    monkeypatch.setattr(integration, "log_state_dict_report", log_state_dict_report)
    return found


def lora_with_foreign_keys(folder: Path) -> None:
    """A LoRA whose file has keys that a model's own `from_pretrained` would pass over, and lacks one."""
    get_peft_model(build("llama"), LoraConfig(target_modules=["v_proj"])).save_pretrained(folder)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(next(iter(tensors)))
        tensors["base_model.model.model.rotary_emb.inv_freq"] = torch.ones(2)

    edit(folder, change)


def test_reports_of_other_methods_are_the_same_after_a_clover_load(tmp_path: Path, reports: list) -> None:
    save_trained(tmp_path / "clover")
    lora_with_foreign_keys(tmp_path / "lora")
    build("llama").load_adapter(str(tmp_path / "lora"), adapter_name="other")
    model = build("llama")
    model.load_adapter(str(tmp_path / "clover"), adapter_name="clover")
    build("llama").load_adapter(str(tmp_path / "lora"), adapter_name="other")
    model.load_adapter(str(tmp_path / "lora"), adapter_name="other")
    before, clover, after, beside = reports
    assert all(before)
    assert clover == (set(), set())
    assert after == before
    assert beside == before


def loading_info() -> SimpleNamespace:
    return SimpleNamespace(missing_keys={"a.left_out", "b"}, unexpected_keys={"c.left_out", "d"})


def test_the_report_takes_positional_arguments_and_filters_once(reports: list) -> None:
    model, other = nn.Linear(1, 1), nn.Linear(1, 1)
    loading.leave_out_of_report(model, "left_out", "left_out")
    loading.leave_out_of_report(model, "left_out", "left_out")
    for each in (other, model, model):
        integration.log_state_dict_report(each, "folder", loading_info())
    whole = ({"a.left_out", "b"}, {"c.left_out", "d"})
    assert reports == [whole, ({"b"}, {"d"}), whole]


def test_a_report_with_other_arguments_runs_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(integration, "log_state_dict_report", lambda info, logger: calls.append((info, logger)))
    loading.leave_out_of_report(nn.Linear(1, 1), "left_out", "left_out")
    info, logger = loading_info(), logging.getLogger(__name__)
    integration.log_state_dict_report(info, logger=logger)
    assert calls == [(info, logger)]
    assert vars(info) == vars(loading_info())
    with pytest.raises(TypeError, match="logger"):
        integration.log_state_dict_report(info)
