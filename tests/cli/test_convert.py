"""clover convert: from a folder to one that stock transformers loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support.other_process import stock_answers
from tests.support.tiny import build, load_script, relative
from tests.support.tiny_chat import make_tokenizer, rows

pytest.importorskip("trl", reason="the command finds models as training does: pip install clover-peft[train]")
pytest.importorskip("matplotlib", reason="pictures: pip install clover-peft[plots]")

script = load_script("convert")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*tokens for .* are few"),
]
CALIBRATED = ["--rows", "10", "--max-length", "48", "--batch-size", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    """A tiny model, its tokenizer and a text."""
    path, tokenizer = tmp_path_factory.mktemp("model"), make_tokenizer()
    build("llama", vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    (path / "text.txt").write_text("\n".join(" ".join(row.values()) for row in rows(120)))
    return str(path)


def run(folder, out, *options) -> int:
    text = ["--calibration", f"{folder}/text.txt", *CALIBRATED]
    return script.main([folder, *text, "--out", str(out), *map(str, options)])


def assert_loads_without_clover(out) -> None:
    ids = torch.arange(3, 20)[None]
    (found,) = stock_answers([out], ids)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(out)(ids).logits
    assert relative(found["logits"], expected) < 1e-6


def test_a_converted_and_pruned_folder_is_a_stock_model(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", "--mla", 0.5, "--prune", 0.5, "--rope-dims", 4) == 0
    out = tmp_path / "out"
    written = {path.name for path in out.iterdir()}
    assert {"convert.json", "convert.png", "pruning.json", "pruning.png", "README.md", "tokenizer.json"} <= written
    config = json.loads((out / "config.json").read_text())
    assert (config["qk_rope_head_dim"], config["kv_lora_rank"], config["v_head_dim"]) == (4, 20, 6)
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    assert_loads_without_clover(out)
    card = (out / "README.md").read_text()
    assert "without `clover_peft`" in card
    assert f"| base model | {Path(folder).name}, folder {Path(folder).name}, licence: not stated |" in card
    assert "KV cache, bytes a token" in card
    assert "load it with stock transformers" in capsys.readouterr().out


def test_a_latent_of_a_given_size(folder, tmp_path):
    options = ["--mla", "--kv-lora-rank", 10, "--rope-dims", 4, "--no-pictures", "--method", "transmla"]
    assert run(folder, tmp_path / "out", *options) == 0
    report = json.loads((tmp_path / "out" / "convert.json").read_text())
    assert (report["method"], report["kv_lora_rank"]) == ("transmla", 10)


@pytest.mark.parametrize("rotation", ["shared", "per_block"])
def test_a_sliced_and_pruned_folder(folder, tmp_path, capsys, rotation):
    options = ["--slice", 0.25, "--rotation", rotation, "--multiple", 4, "--prune", 0.5, "--no-pictures"]
    assert run(folder, tmp_path / "out", *options) == 0
    out = tmp_path / "out"
    assert {"slicing.json", "pruning.json", "README.md", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    report = json.loads((out / "slicing.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.model.layers[0].self_attn.v_proj.in_features == report["width"][1] < report["width"][0]
    assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()
    assert "import clover_peft  # needed" in (out / "README.md").read_text()
    assert "load it after `import clover_peft`" in capsys.readouterr().out


def test_a_folder_sliced_with_one_basis_is_a_stock_model(folder, tmp_path, capsys):
    assert run(folder, tmp_path / "out", "--slice", 0.25, "--rotation", "shared", "--multiple", 4) == 0
    assert_loads_without_clover(tmp_path / "out")
    assert "load it with stock transformers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--slice", "0"], "--slice 0.0: expected a share above 0 and below 1"),
        (["--slice", "0.25", "--rope-dims", "4"], "--rope-dims: expected --mla with it, found none"),
        (["--slice", "0.25", "--method", "clover"], "--method: expected --mla with it, found none"),
        (["--mla", "0.5", "--rotation", "shared"], "--rotation: expected --slice with it, found none"),
        (["--mla", "1.5"], "--mla 1.5: expected a share above 0 and below 1"),
        (["--mla"], "--mla: expected the share of the cache to remove or --kv-lora-rank, and not both"),
        (
            ["--mla", "0.5", "--kv-lora-rank", "8"],
            "--mla: expected the share of the cache to remove or --kv-lora-rank",
        ),
        (["--mla", "0.5", "--prune", "2"], "--prune 2.0: expected a share above 0 and below 1"),
        (["--mla", "0.5", "--multiple", "8"], "--multiple: expected --prune or --slice with it"),
        (["--mla", "0.5", "--rope-dims", "99"], "rope_dims: expected an even number from 2 to 24"),
    ],
)
def test_wrong_options(folder, tmp_path, capsys, options, message):
    assert run(folder, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_files_are_not_overwritten_and_text_is_needed(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    assert run(folder, tmp_path, "--mla", 0.5) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err
    assert script.main([folder, "--mla", "0.5", "--out", str(tmp_path / "new")]) == 2
    assert "--calibration: expected text" in capsys.readouterr().err


def test_the_model_s_own_text_calibrates_a_conversion(folder, tmp_path, capsys):
    out = tmp_path / "out"
    own = ["--own-text", "12", "--batch-size", "4"]
    assert script.main([folder, "--mla", "0.5", *own, "--out", str(out)]) == 0
    assert "calibration: 12 windows of " in capsys.readouterr().out
    assert_loads_without_clover(out)


def test_a_checkpoint_in_float16_is_converted_in_another_dtype(folder, tmp_path, capsys):
    half = tmp_path / "half"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(half)
    for name in ("text.txt", "tokenizer.json", "tokenizer_config.json"):
        (half / name).write_bytes((Path(folder) / name).read_bytes())
    assert run(str(half), tmp_path / "out", "--mla", 0.5, "--rope-dims", 4) == 2
    assert "found float16, whose range is too small" in capsys.readouterr().err
    assert (
        run(str(half), tmp_path / "out", "--mla", 0.5, "--rope-dims", 4, "--dtype", "bfloat16", "--no-pictures") == 0
    )
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
