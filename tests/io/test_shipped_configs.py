"""Shipped configuration files are found by name."""

from __future__ import annotations

from pathlib import Path

import pytest

from clover_peft.io import configs
from clover_peft.io.configs import config_names, find_config

CONFIGS = Path(__file__).parents[2] / "configs"


def test_every_file_has_a_name():
    files = {path.relative_to(CONFIGS).as_posix() for path in CONFIGS.rglob("*.yaml")}
    assert {f"{name}.yaml" for name in config_names()} == files
    for name in config_names():
        for spelled in (name, f"{name}.yaml", name.rpartition("/")[2]):
            assert find_config(spelled).samefile(CONFIGS / f"{name}.yaml")


def test_a_path_comes_first(tmp_path, monkeypatch):
    (tmp_path / "lora.yaml").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert find_config("lora.yaml") == Path("lora.yaml")
    assert find_config(tmp_path / "lora.yaml") == tmp_path / "lora.yaml"
    assert find_config("lora") == configs.FOLDER / "lora.yaml"


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"--config zzz: expected a YAML file, found none; .*, models/llama2_7b, "):
        find_config("zzz")


def test_an_ambiguous_name_lists_its_files(tmp_path, monkeypatch):
    for name in ("one/same.yaml", "other/same.yaml", "whole.yaml", "one/whole.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    monkeypatch.setattr(configs, "FOLDER", tmp_path)
    with pytest.raises(
        ValueError, match="--config same: expected one configuration, found one/same, other/same; name"
    ):
        find_config("same")
    assert find_config("other/same") == tmp_path / "other" / "same.yaml"
    assert find_config("whole") == tmp_path / "whole.yaml"
