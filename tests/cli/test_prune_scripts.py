"""scripts/prune.py and scripts/spectra.py: from a folder to a pruned one, and what heads would lose."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizers import processors
from torch import Tensor, nn
from transformers import AutoTokenizer

import clover_peft
from clover_peft.base_model import rewritten
from clover_peft.cli.checks import figures
from clover_peft.io.text_windows import batches_for, text_batches
from clover_peft.pruning import decompose, find_pairs, global_ratio
from clover_peft.pruning import figures as pictures
from clover_peft.pruning.narrow import loading
from clover_peft.pruning.spectra import SHARES, Spectrum, by_energy, labels, measure_spectra
from tests.support.tiny import build, load_script, relative
from tests.support.tiny_chat import make_tokenizer, rows

pytest.importorskip("trl", reason="the scripts find models as training does: pip install clover-peft[train]")
pytest.importorskip("matplotlib", reason="pictures: pip install clover-peft[plots]")

prune_script, spectra_script = load_script("prune"), load_script("spectra")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*tokens for blocks of.*are few"),
    pytest.mark.filterwarnings("ignore:.*not pruned.*"),
]

TEXT = "\n".join(" ".join(row.values()) for row in rows(120))
CALIBRATED = ["--rows", "10", "--max-length", "48", "--batch-size", "4"]


@pytest.fixture
def text(tmp_path) -> str:
    (tmp_path / "text.txt").write_text(TEXT)
    return str(tmp_path / "text.txt")


def save(family: str, folder: Path, dtype: torch.dtype = torch.float32, **choices) -> str:
    """A tiny model with a tokenizer that knows its texts."""
    tokenizer = make_tokenizer()
    build(family, dtype, vocab_size=len(tokenizer), **choices).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def run(script, *arguments) -> int:
    return script.main([str(argument) for argument in arguments])


def load(folder: Path) -> nn.Module:
    config = json.loads((folder / "config.json").read_text())
    kind = getattr(__import__("transformers"), config["architectures"][0])
    return kind.from_pretrained(folder, dtype="auto").eval()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.arange(3, 40).unsqueeze(0)
    more = {"decoder_input_ids": ids.flip(-1)} if model.config.is_encoder_decoder else {}
    result = model(input_ids=ids, **more)
    return result.logits if "logits" in result else result.last_hidden_state


@pytest.mark.parametrize("with_text", [False, True])
def test_the_model_s_own_text_calibrates_alone_and_beside_other_text(with_text, tmp_path, text, capsys):
    source, out = save("opt", tmp_path / "model"), tmp_path / "out"
    given = ["--calibration", text, *CALIBRATED] if with_text else ["--batch-size", "4"]
    assert run(prune_script, source, "--ratio", "0.4", "--own-text", "10", *given, "--out", out) == 0
    model, tokenizer = load(tmp_path / "model"), AutoTokenizer.from_pretrained(source)
    batches = batches_for(model, tokenizer, text, rows=10, max_length=48, batch_size=4) if with_text else []
    batches += clover_peft.own_text(model, rows=10, length=64, batch_size=4)  # 64 is this model's limit
    clover_peft.prune(model, 0.4, calibration=batches)
    assert torch.equal(logits(load(out)), logits(model))
    described = "10 windows of 48 tokens from text.txt and " if with_text else ""
    described += "10 windows of 64 tokens that the model wrote"
    assert f"calibration: {described}\n" in capsys.readouterr().out
    assert described in (out / "README.md").read_text()


def test_a_model_that_writes_no_text_needs_other_text(tmp_path, capsys):
    source = save("bert", tmp_path / "model")
    assert run(prune_script, source, "--ratio", "0.4", "--own-text", "4", "--out", tmp_path / "out") == 2
    assert "expected a causal language model, found Bert" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def report_of(folder: Path) -> dict:
    return {k: v for k, v in json.loads((folder / "pruning.json").read_text()).items() if k != "seconds"}


# ---------------------------------------------------------------------- scripts/prune.py


@pytest.mark.parametrize("family", ["opt", "llama", "gpt2", "bert", "bart"])
def test_the_folder_is_the_pruned_model(family, tmp_path, text, capsys):
    source, out = save(family, tmp_path / "model"), tmp_path / "out"
    assert run(prune_script, source, "--ratio", "0.4", "--calibration", text, *CALIBRATED, "--out", out) == 0
    shown = capsys.readouterr().out
    model, tokenizer = load(tmp_path / "model"), AutoTokenizer.from_pretrained(source)
    batches = batches_for(model, tokenizer, text, rows=10, max_length=48, batch_size=4)
    report = clover_peft.prune(model, 0.4, calibration=batches)
    loaded = load(out)
    assert torch.equal(logits(loaded), logits(model))
    assert relative(logits(loaded), logits(load(tmp_path / "model"))) > 1e-3
    assert AutoTokenizer.from_pretrained(out)("a cat").input_ids == tokenizer("a cat").input_ids
    expected = json.loads(json.dumps(report.to_dict()))
    del expected["seconds"]
    assert report_of(out) == expected
    made = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "pruning.json", "pruning.png", "README.md"} <= made
    card = (out / "README.md").read_text()
    assert "import clover_peft  #" in card
    assert "base_model" not in card  # a folder's name
    assert "| base model | model, folder model, licence: not stated |" in card
    assert f"model: model, folder model, licence: not stated, read from {source}" in shown
    assert "10 windows of 48 tokens from text.txt" in card
    assert str(tmp_path) not in card
    assert f"| parameters | {report.parameters[0]:,} | {report.parameters[1]:,} |" in shown
    assert "| vo directions |" in shown
    assert ("KV cache" in shown) == (family != "bert")
    assert "after `import clover_peft`" in shown
    assert ("qk: not pruned, queries and keys are rotated" in shown) == (family == "llama")


def test_a_model_that_its_class_describes_needs_no_import(tmp_path):
    source, out = save("deepseek_v2", tmp_path / "model"), tmp_path / "out"
    assert run(prune_script, source, "--ratio", "0.5", "--ranks", "uniform", "--no-pictures", "--out", out) == 0
    assert "import clover_peft" not in (out / "README.md").read_text()
    assert "stock transformers loads it" in (out / "README.md").read_text()
    assert not (out / "pruning.png").exists()
    code = (
        "import sys; sys.modules['clover_peft'] = None\n"
        "import torch; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained('out', experts_implementation='eager').eval()\n"
        "assert model.model.layers[0].self_attn.v_head_dim == 5\n"
        "torch.save(model(input_ids=torch.arange(3, 40).unsqueeze(0)).logits.detach(), 'logits.pt')\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
    assert relative(torch.load(tmp_path / "logits.pt"), logits(load(out))) < 1e-5
    # Layers that differ are what no class describes.
    ragged, first = tmp_path / "ragged", ["--target-modules", "layers.0.self_attn.kv_b_proj"]
    assert run(prune_script, source, "--ratio", "0.5", *first, "--no-pictures", "--out", ragged) == 0
    assert "import clover_peft  #" in (ragged / "README.md").read_text()


def test_a_rotary_model_in_a_stock_class(tmp_path, capsys):
    source, out = save("llama", tmp_path / "model"), tmp_path / "out"
    options = ["--ratio", "vo=0.5", "--ranks", "uniform", "--no-pictures"]
    assert run(prune_script, source, *options, "--stock", "--out", out) == 0
    assert "with stock transformers" in capsys.readouterr().out
    assert "import clover_peft" not in (out / "README.md").read_text()
    assert "AutoModelForCausalLM.from_pretrained" in (out / "README.md").read_text()
    assert json.loads((out / "config.json").read_text())["architectures"] == ["MiMoV2FlashForCausalLM"]
    assert run(prune_script, source, *options, "--out", tmp_path / "narrow") == 0
    assert relative(logits(load(out)), logits(load(tmp_path / "narrow"))) < 1e-5
    gpt2 = save("gpt2", tmp_path / "gpt2")
    assert run(prune_script, gpt2, *options, "--stock", "--out", tmp_path / "none") == 2
    assert "GPT2LMHeadModel: expected one of LlamaForCausalLM" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_dtype_is_kept(tmp_path):
    source, out = save("opt", tmp_path / "model", torch.bfloat16), tmp_path / "out"
    assert run(prune_script, source, "--ratio", "vo=0.5", "--out", out) == 0
    assert {p.dtype for p in load(out).parameters()} == {torch.bfloat16}


def test_models_without_a_tokenizer_keep_what_they_have(tmp_path, text, capsys):
    build("vit").save_pretrained(tmp_path / "model")
    source, out = tmp_path / "model", tmp_path / "out"
    assert run(prune_script, source, "--ratio", "0.5", "--calibration", text, "--out", out) == 2
    assert "ViTForImageClassification: expected a model that reads text" in capsys.readouterr().err
    assert not out.exists()
    assert run(prune_script, source, "--ratio", "0.5", "--out", out) == 0
    assert "model: no tokenizer or processor could be loaded" in capsys.readouterr().out
    pixels = torch.randn(1, 3, 8, 8)
    model = load(source)
    clover_peft.prune(model, 0.5)
    with torch.no_grad():
        assert relative(load(out)(pixel_values=pixels).logits, model(pixel_values=pixels).logits) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        "--ratio 0.25",
        "--ratio qk=0.5",
        "--ratio qk=0.5,vo=0.25",
        "--ratio 0.5 --ranks global",
        "--ratio 0.5 --method vanilla",
        "--ratio 0.5 --multiple 4",
        "--ratio 0.5 --target-modules layers.0.self_attn.k_proj layers.1.self_attn.v_proj",
        r"--ratio 0.5 --target-modules .*layers\.0.*",
        "--threshold 0.6",
        "--threshold qk=1,vo=0.5",
        "--energy 0.8",
        "--ratio 0.5 --masked",
        "--ratio 0.5 --calibration TEXT",
        "--ratio 0.5 --calibration TEXT --rows 2",
        "--ratio 0.5 --calibration TEXT --max-length 20",
        "--ratio 0.5 --calibration TEXT --batch-size 64",
    ],
)
def test_every_option_counts(options, tmp_path, text):
    """It is the call of `prune` that it stands for, and none of the others."""
    source = save("opt", tmp_path / "model")
    expected = {
        "--ratio 0.25": dict(ratio=0.25),
        "--ratio qk=0.5": dict(ratio={"qk": 0.5}),
        "--ratio qk=0.5,vo=0.25": dict(ratio={"qk": 0.5, "vo": 0.25}),
        "--ratio 0.5 --ranks global": dict(ratio=0.5, ranks="global"),
        "--ratio 0.5 --method vanilla": dict(ratio=0.5, method="vanilla"),
        "--ratio 0.5 --multiple 4": dict(ratio=0.5, multiple=4),
        "--threshold 0.6": dict(threshold=0.6),
        "--threshold qk=1,vo=0.5": dict(threshold={"qk": 1.0, "vo": 0.5}),
        "--energy 0.8": dict(energy=0.8),
        "--ratio 0.5 --masked": dict(ratio=0.5, masked=True),
    }.get(options, dict(ratio=0.5))
    if "layers.1" in options:
        expected["target_modules"] = ["layers.0.self_attn.k_proj", "layers.1.self_attn.v_proj"]
    elif "target" in options:
        expected["target_modules"] = r".*layers\.0.*"
    model = load(tmp_path / "model")
    if "TEXT" in options:
        sizes = {"rows": 64, "max_length": 64, "batch_size": 8}
        for name, value in (("rows", 2), ("max_length", 20), ("batch_size", 64)):
            if f"--{name.replace('_', '-')} {value}" in options:
                sizes[name] = value
        expected["calibration"] = batches_for(model, AutoTokenizer.from_pretrained(source), text, **sizes)
    report = clover_peft.prune(model, **expected)
    plain = load(tmp_path / "model")
    clover_peft.prune(plain, 0.5)
    out = tmp_path / "out"
    arguments = [text if part == "TEXT" else part for part in options.split(" ")]
    assert run(prune_script, source, *arguments, "--no-pictures", "--out", out) == 0
    found = json.loads(json.dumps(report.to_dict()))
    del found["seconds"]
    assert report_of(out) == found
    assert relative(logits(load(out)), logits(model)) < 1e-6
    masked = "masked" in options
    assert masked or relative(logits(load(out)), logits(plain)) > 1e-6
    if masked:
        assert "import clover_peft" not in (out / "README.md").read_text()
        assert load(out).model.decoder.layers[0].self_attn.v_proj.out_features == 48


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--ratio 1.5", "--ratio 1.5: expected a share of at least 0 and below 1"),
        ("--ratio half", "--ratio half: expected a figure such as 0.5, or one for each kind as qk=0.5,vo=0.25"),
        ("--ratio kv=0.5", "--ratio kv=0.5: expected a figure"),
        ("--ratio vo=0.5,vo=0.25", "--ratio vo=0.5,vo=0.25: expected a figure"),
        ("--threshold vo=", "--threshold vo=: expected a figure"),
        ("--energy 2", "--energy 2: expected a share"),
        ("--energy 0.9 --ranks layer", "--ranks layer: expected --ratio with it"),
        ("--ratio 0.5 --multiple 0", "--multiple 0: expected at least 1"),
        ("--ratio 0.5 --ranks gradient", "--ranks gradient: expected --calibration or --own-text with it, found none"),
        ("--ratio 0.5 --stock", "--stock: expected --ranks uniform, for one width in all layers, found no --ranks"),
        ("--ratio 0.5 --ranks layer --stock", "--stock: expected --ranks uniform"),
        ("--ratio 0.5 --ranks uniform --masked --stock", "found --masked"),
        ("--ratio 0.5 --rows 3", "--rows: expected --calibration with it, found none"),
        ("--ratio 0.5 --max-length 3", "--max-length: expected --calibration with it, found none"),
        ("--ratio 0.5 --target-modules nothing", "expected it to name a pair"),
        ("--ratio 0.5 --calibration missing.txt", "missing.txt: expected a .txt or .jsonl file"),
        ("--ratio 0.5 --own-text 0", "--own-text 0: expected at least 1"),
        ("--ratio 0.5 --calibration TEXT --rows 0", "rows=0: expected at least 1"),
        ("--ratio 0.5 --calibration TEXT --max-length 65", "max_length=65: expected at most 64, which OPTForCausalLM"),
    ],
)
def test_bad_options_are_said_and_leave_nothing(options, message, tmp_path, text, capsys):
    source, before = save("opt", tmp_path / "model"), {path.name for path in tmp_path.iterdir()}
    arguments = [text if part == "TEXT" else part for part in options.split(" ")]
    assert run(prune_script, source, *arguments, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert {path.name for path in tmp_path.iterdir()} == before


def test_what_cannot_be_pruned_is_said_and_leaves_nothing(tmp_path, text, capsys):
    out, half = tmp_path / "out", ["--ratio", "0.5"]
    assert run(prune_script, tmp_path / "none", *half, "--out", out) == 2
    assert "expected a folder or a model on the hub" in capsys.readouterr().err
    source = save("opt", tmp_path / "model")
    assert run(prune_script, source, *half, "--out", source) == 2
    assert "expected a new or empty folder, found files" in capsys.readouterr().err
    save("albert", tmp_path / "albert")
    assert run(prune_script, tmp_path / "albert", *half, "--out", out) == 2
    assert "expected attention that can be made narrow, found AlbertAttention" in capsys.readouterr().err
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    for name in (["OwnModel"], None):
        (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "architectures": name}))
        assert run(prune_script, source, *half, "--out", out) == 2
        assert f"found {name[0] if name else 'none'}" in capsys.readouterr().err
    assert not out.exists()
    with pytest.raises(SystemExit):
        run(prune_script, source, "--ratio", "0.5", "--energy", "0.9", "--out", out)
    with pytest.raises(SystemExit):
        run(prune_script, source, "--out", out)


def test_a_mask_whose_constant_has_no_place_is_not_saved(tmp_path, text, capsys):
    """The value's bias leaves a constant for the output's, and Qwen2's class has none."""
    source, out = save("qwen2", tmp_path / "model"), tmp_path / "out"
    common = ["--ratio", "vo=0.5", "--masked", "--no-pictures"]
    assert run(prune_script, source, *common, "--out", out) == 2
    assert "o_proj.bias holds the mean of what was removed" in capsys.readouterr().err
    assert not out.exists()
    source = save("llama", tmp_path / "without biases")
    assert run(prune_script, source, *common, "--calibration", text, "--out", out) == 0
    assert "for analysis" in capsys.readouterr().out


def test_a_folder_that_would_not_load_is_not_written(tmp_path, monkeypatch, capsys):
    source, out = save("opt", tmp_path / "model"), tmp_path / "out"
    monkeypatch.setitem(rewritten._APPLIES, loading.RECORD, lambda model: None)
    assert run(prune_script, source, "--ratio", "0.5", "--ranks", "uniform", "--out", out) == 2
    error = capsys.readouterr().err
    assert (
        "self_attn.k_proj.weight: expected a tensor of shape [24, 48] when the folder is loaded, found [48, 48]"
        in error
    )
    assert not out.exists()


def test_pictures_are_missed_before_any_work(tmp_path, monkeypatch, capsys):
    source = save("opt", tmp_path / "model")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for script, options in ((prune_script, ["--ratio", "0.5"]), (spectra_script, [])):
        with monkeypatch.context() as patch:
            patch.setattr(script, "load_as_saved", lambda *_: pytest.fail("loaded"))
            assert run(script, source, *options, "--out", tmp_path / "out") == 2
        assert "pictures: expected matplotlib, found none" in capsys.readouterr().err
        assert run(script, source, *options, "--no-pictures", "--out", tmp_path / script.__name__) == 0


# ---------------------------------------------------------------------- text to calibrate with


def special(before: str = "<|im_start|>", after: str = "<|im_end|>"):
    """A tokenizer that puts tokens around any text, as BERT's does."""
    tokenizer = make_tokenizer()
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in (before, after)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(f"{before} $A {after}", None, ids)
    return tokenizer


def test_windows_are_full_and_spread_over_the_text(tmp_path):
    tokenizer = make_tokenizer()
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    whole = tokenizer(TEXT).input_ids
    batches = text_batches(path, tokenizer, rows=7, max_length=32, batch_size=3)
    assert [batch["input_ids"].shape for batch in batches] == [(3, 32), (3, 32), (1, 32)]
    windows = torch.cat([batch["input_ids"] for batch in batches]).tolist()
    every = len(whole) // 32 * 32
    # At most four or so times what is needed is read.
    starts = [next(i for i in range(0, every, 32) if whole[i : i + 32] == window) for window in windows]
    assert starts == sorted(set(starts))
    assert starts[0] == 0
    assert starts[-1] > 7 * 32
    few = text_batches(path, tokenizer, rows=10_000, max_length=32)
    assert torch.equal(torch.cat([batch["input_ids"] for batch in few]).flatten(), torch.tensor(whole[:every]))


def test_windows_have_the_special_tokens_of_any_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    tokenizer = special()
    begin, end = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    (batch,) = text_batches(path, tokenizer, rows=5, max_length=16)
    assert batch["input_ids"][:, 0].tolist() == [begin] * 5
    assert batch["input_ids"][:, -1].tolist() == [end] * 5
    assert batch["input_ids"][0, 1:-1].tolist() == make_tokenizer()(TEXT).input_ids[:14]
    with pytest.raises(ValueError, match="max_length=2: expected room beside 2 special tokens"):
        text_batches(path, tokenizer, max_length=2)


ROWS = {
    "text": {"text": "the cat", "other": 3},
    "content": {"content": "the cat"},
    "instruction": {"instruction": "the", "input": "", "output": "cat"},
    "prompt": {"prompt": "the", "completion": "cat"},
    "messages": {"messages": [{"role": "user", "content": "the"}, {"role": "assistant", "content": "cat"}]},
    "chat": {
        "prompt": [{"role": "user", "content": "the"}],
        "completion": [{"role": "assistant", "content": "cat"}],
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "the"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "cat"}]},
        ]
    },
    "tool call": {
        "messages": [
            {"role": "user", "content": "the"},
            {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "cat"},
        ]
    },
    "null text": {"text": None, "content": "", "messages": [{"content": "the"}, {"content": "cat"}]},
    "null prompt": {"prompt": None, "completion": "the\ncat"},
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_read(kind, packed, tmp_path):
    lines = "\n\n".join(json.dumps(ROWS[kind]) for _ in range(20))
    path = tmp_path / ("rows.jsonl.gz" if packed else "rows.jsonl")
    path.write_bytes(gzip.compress(lines.encode()) if packed else lines.encode())
    tokenizer = make_tokenizer()
    (batch,) = text_batches(path, tokenizer, rows=1, max_length=24)
    said = "the cat\n\n" if kind in ("text", "content") else "the\ncat\n\n"
    assert tokenizer.decode(batch["input_ids"][0]) == tokenizer.decode(tokenizer(said * 20).input_ids[:24])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.txt", None, "none.txt: expected a .txt or .jsonl file.*found no such file"),
        ("folder.txt", "folder", "folder.txt: expected .* found a folder"),
        ("table.csv", b"a,b", "table.csv: expected .* found another file"),
        ("empty.txt", b" \n", "empty.txt: expected text, found none"),
        ("empty.jsonl", b"\n", "empty.jsonl: expected text, found none"),
        ("nulls.jsonl", b'{"text": null}', "nulls.jsonl: expected text, found none"),
        ("short.txt", b"one cat", "short.txt: expected at least 40 tokens, for one window of 40, found"),
        ("bytes.txt", b"\xff\xfe\xfa", "bytes.txt: expected text in UTF-8, found damage"),
        ("plain.txt.gz", b"not packed", "plain.txt.gz: expected text in UTF-8, found damage"),
        ("cut.txt.gz", gzip.compress(os.urandom(3000).hex().encode())[:-500], "cut.txt.gz: expected text in UTF-8"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": ', "bad.jsonl:2: expected one JSON object, found Expecting value"),
        ("other.jsonl", b'{"a": 1, "b": 2}', r"other.jsonl:1: expected a row with text, .* the fields \['a', 'b'\]"),
        ("list.jsonl", b"[1]", "list.jsonl:1: expected a row with text, .* found list"),
    ],
)
def test_unusable_text_is_said(name, content, message, tmp_path):
    if content == "folder":
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        text_batches(tmp_path / name, make_tokenizer(), max_length=40)


def test_data_sets_on_the_hub_are_read_as_far_as_needed(monkeypatch):
    import datasets

    from clover_peft.io import downloads

    asked, read = [], []

    def stream():
        while True:
            read.append(1)
            yield {"text": "the cat and the river"}

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return stream()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(downloads, "hub_reachable", lambda: True)
    (batch,) = text_batches("some/texts:v1", make_tokenizer(), rows=2, max_length=16)
    assert batch["input_ids"].shape == (2, 16)
    assert asked == [(("some/texts", "v1"), {"split": "train", "streaming": True})]
    assert len(read) < 2 * 16
    monkeypatch.setattr(downloads, "hub_reachable", lambda: False)
    with pytest.raises(ValueError, match="found no such file, and the hub cannot be reached"):
        text_batches("some/texts", make_tokenizer())


def test_what_nobody_reads_is_not_made(text):
    model = build("llama", vocab_size=360)
    batches = batches_for(model, make_tokenizer(), text, rows=2)
    assert batches[0]["input_ids"].shape == (2, 64)  # 512, but for the model's limit
    result = model(**batches[0])
    assert result.logits.shape[1] == 1
    assert result.past_key_values is None
    bart = build("bart", vocab_size=360)
    (batch,) = batches_for(bart, make_tokenizer(), text, rows=2, max_length=20)
    assert batch["decoder_input_ids"][:, 0].tolist() == [bart.config.decoder_start_token_id] * 2
    assert torch.equal(batch["decoder_input_ids"][:, 1:], batch["input_ids"][:, :-1])


def test_windows_are_as_long_as_a_table_of_positions_that_begins_behind_the_padding(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("word " * 4000)
    roberta = build("roberta", vocab_size=360)
    most = roberta.config.max_position_embeddings - roberta.config.pad_token_id - 1
    (batch, *_) = batches_for(roberta, make_tokenizer(), text, rows=2)
    assert batch["input_ids"].shape[1] == most
    roberta(**batch)
    with pytest.raises(ValueError, match=f"max_length={most + 1}: expected at most {most}"):
        batches_for(roberta, make_tokenizer(), text, rows=2, max_length=most + 1)
    with pytest.raises(ValueError, match="max_length"):
        batches_for(roberta, make_tokenizer(), text, rows=2, max_length=0)


def test_figures():
    assert figures("--ratio", None) is None
    assert figures("--ratio", "0.5") == 0.5
    assert figures("--ratio", "vo=1e-2, qk=.5") == {"vo": 0.01, "qk": 0.5}


# ---------------------------------------------------------------------- spectra


def products(model: nn.Module, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Of an OPT layer's heads: the factors of the product, (H, D, d) on the output's side and (H, d, D)."""
    attention = model.model.decoder.layers[layer].self_attn
    heads, size = attention.num_heads, attention.head_dim
    split = {n: getattr(attention, f"{n}_proj").weight.detach().double().view(heads, size, -1) for n in "qkv"}
    bias = attention.q_proj.bias.detach().double().view(heads, size, 1)
    o = attention.out_proj.weight.detach().double().unflatten(1, (heads, size)).transpose(0, 1)
    return {"vo": (o, split["v"]), "qk": (torch.cat([split["q"], bias], dim=2).mT, split["k"])}


def test_the_record_is_of_the_dense_products(tmp_path, capsys):
    source, out = save("opt", tmp_path / "model"), tmp_path / "out"
    assert run(spectra_script, source, "--out", out, "--no-pictures") == 0
    record = json.loads((out / "spectra.json").read_text())
    assert len(record["pairs"]) == 4
    assert record["calibrated_with"] is None
    model = load(tmp_path / "model")
    energies: dict[str, list[Tensor]] = {"qk": [], "vo": []}
    for layer in range(2):
        for kind, (left, right) in products(model, layer).items():
            part = "v" if kind == "vo" else "k"
            found = record["pairs"][f"model.decoder.layers.{layer}.self_attn.{part}_proj ({kind})"]
            assert (found["kind"], found["heads"], found["size"]) == (kind, 4, 12)
            singular = torch.linalg.svdvals(left @ right)[:, :12]
            assert relative(torch.tensor(found["clover"]["values"]), singular) < 1e-5
            shares = singular / singular.sum(1, keepdim=True)
            entropy = -(shares * shares.log()).sum(1)
            assert found["clover"]["effective_rank"] == pytest.approx(entropy.exp().tolist(), rel=1e-6)
            kept = singular.square().cumsum(1) / singular.square().sum(1, keepdim=True)
            energies[kind].append(singular.square().flatten())
            norms, order = (left.norm(dim=1) * right.norm(dim=2)).sort(dim=1, descending=True)
            assert relative(torch.tensor(found["vanilla"]["values"]), norms) < 1e-5
            for share in (0.99, 0.95, 0.9):
                assert found["clover"]["directions"][str(share)] == ((kept < share).sum(1) + 1).tolist()
                assert found["vanilla"]["directions"][str(share)] == [
                    needed(left[h], right[h], order[h], share) for h in range(4)
                ]
    for kind, parts in energies.items():
        ascending = torch.cat(parts).sort().values
        lost = ascending.cumsum(0) / ascending.sum()
        for share in SHARES:
            advice = record["energies"][kind]["clover"][str(share)]
            count = int((lost <= 1 - share).sum())
            assert advice["ratio"] == count / len(lost)
            assert advice["threshold"] == pytest.approx(float(ascending[count].sqrt()))
            assert advice["ratio"] > record["energies"][kind]["vanilla"][str(share)]["ratio"]
    shown = capsys.readouterr().out
    kept = 1 - record["energies"]["qk"]["clover"]["0.99"]["ratio"]
    assert f"qk: 99% of the energy is in {kept:.1%} of the directions" in shown
    assert "--ratio" not in shown
    assert "qk: no ratio is suggested, because none was measured; pass --calibration TEXT" in shown
    assert record["measured"] == {}
    assert shown.count("| 4 x 12 |") == 4
    assert shown.count("Effective rank: how many") == 2
    assert "qk: ranks are drawn, not advised, at the last of these thresholds: " in shown
    assert "a threshold of" not in shown
    assert "a weak guide" in shown
    kept_there = sum(map(sum, record["ranks"].values()))
    assert kept_there == sum(
        int((torch.cat(parts).sqrt() >= record["energies"][kind]["clover"]["0.9"]["threshold"] - 1e-9).sum())
        for kind, parts in energies.items()
    )


def needed(left: Tensor, right: Tensor, order: Tensor, share: float) -> int:
    """Coordinates to keep, one more at a time, until none fewer would do."""
    whole = left @ right
    lacking = [
        float((whole - left[:, order[:k]] @ right[order[:k]]).square().sum() / whole.square().sum()) for k in range(13)
    ]
    return max((k for k in range(13) if 1 - lacking[k] < share * (1 - 1e-12)), default=-1) + 1


@pytest.mark.parametrize("family", ["opt", "llama", "gpt_neox"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_both_methods_share_out_one_energy(family, calibrated, text):
    """What coordinates and singular directions add up to is the same; a suggested ratio keeps what it says."""
    model = build(family, torch.float64, vocab_size=360)
    kinds = sorted({pair.kind for pair in find_pairs(model)})
    data = batches_for(model, make_tokenizer(), text, rows=8, max_length=40) if calibrated else None
    found = measure_spectra(model, kinds, data)
    expected = decompose(model, kinds, "vanilla", data)
    assert set(found) == set(expected)
    for name, each in found.items():
        assert relative(each.vanilla.values, expected[name][1].values) < 1e-12
        assert relative(each.vanilla.energy.sum(1), each.clover.energy.sum(1)) < 1e-8
    for kind in kinds:
        for method in ("clover", "vanilla"):
            spectra = {n: getattr(each, method) for n, each in found.items() if each.pair.kind == kind}
            total = sum(float(spectrum.energy.sum()) for spectrum in spectra.values())
            count = sum(spectrum.energy.numel() for spectrum in spectra.values())
            for share in SHARES:
                ratio = by_energy(list(spectra.values()), share)["ratio"]
                for removed, enough in ((ratio, True), (ratio + 1 / count, False)):
                    ranks = global_ratio({n: s.values for n, s in spectra.items()}, removed)
                    kept = sum(
                        float(s.energy[h, :rank].sum()) for n, s in spectra.items() for h, rank in enumerate(ranks[n])
                    )
                    assert (kept / total >= share - 1e-12) == enough


def test_heads_without_energy_need_nothing():
    nothing = torch.zeros(1, 4, dtype=torch.float64)
    spectrum = Spectrum(nothing, nothing)
    assert spectrum.needed(0.9).tolist() == [0]
    assert by_energy([spectrum], 0.9) == {"ratio": 0.0, "threshold": 0.0}
    values = torch.tensor([[3.0, 2.0, 1.0, 0.0, 0.0]]).double()  # padded
    assert by_energy([Spectrum(values, values.square())], 0.9)["ratio"] == pytest.approx(1 / 3)


def test_the_pictures_of_spectra(tmp_path, text, capsys):
    source, out = save("llama", tmp_path / "model"), tmp_path / "out"
    arguments = ["--calibration", text, *CALIBRATED, "--threshold", "vo=0.02", "--layers", "1"]
    assert run(spectra_script, source, *arguments, "--out", out) == 0
    assert {path.name for path in out.iterdir()} == {"spectra_vo.png", "ranks.png", "spectra.json"}
    record = json.loads((out / "spectra.json").read_text())
    assert record["calibrated_with"] == "10 windows of 48 tokens from text.txt"
    for name, ranks in record["ranks"].items():
        values = torch.tensor(record["pairs"][name]["clover"]["values"])
        assert ranks == (values >= 0.02).sum(1).tolist()
    shown = capsys.readouterr().out
    assert "a threshold of 0.02 keeps" in shown
    assert "measure the pruned model" in shown
    assert run(spectra_script, source, "--out", out) == 2
    assert "expected a new folder, found spectra in it" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["opt", "llama", "bert", "bart"])
def test_ratios_are_suggested_by_what_they_do_to_predictions(family, tmp_path, text, capsys):
    source, out = save(family, tmp_path / "model"), tmp_path / "out"
    arguments = ["--calibration", text, *CALIBRATED, "--no-pictures"]
    assert run(spectra_script, source, *arguments, "--out", out) == 0
    shown = capsys.readouterr().out
    record = json.loads((out / "spectra.json").read_text())
    spread = "layer" if family in ("opt", "llama") else "global"
    assert record["measured"].keys() == record["energies"].keys()
    for kind, losses in record["measured"].items():
        assert list(losses) == ["0.125", "0.25", "0.5"]
        assert 0 < losses["0.125"] < losses["0.5"]
        small = [ratio for ratio, loss in losses.items() if loss <= 0.1]
        chosen = f"--ratio {kind}={small[-1]} --ranks {spread}" if small else "none"
        assert f"{kind}: suggested is the largest ratio that changes them by at most 0.1: {chosen}\n" in shown
    assert run(spectra_script, source, "--calibration", text, "--rows", "9999", "--max-length", "48") == 0
    shown = capsys.readouterr().out
    count = int(shown.partition("calibration: ")[2].split()[0])
    assert (
        f"none was measured; that needs a window of 48 tokens besides the {count} that calibrate, and the text has no "
        f"other; pass more text, or --rows {count - 1} to calibrate with one less" in shown
    )
    assert run(spectra_script, source, "--calibration", text, "--rows", count - 1, "--max-length", "48") == 0
    assert "suggested is the largest ratio" in capsys.readouterr().out


def test_one_kind_of_pair_and_some_modules(tmp_path, capsys):
    source, out = save("opt", tmp_path / "model"), tmp_path / "out"
    arguments = ["--kinds", "vo", "--target-modules", "layers.1.self_attn.v_proj", "--out", out]
    assert run(spectra_script, source, *arguments) == 0
    assert list(json.loads((out / "spectra.json").read_text())["pairs"]) == [
        "model.decoder.layers.1.self_attn.v_proj (vo)"
    ]
    assert "qk" not in capsys.readouterr().out
    assert {path.name for path in out.iterdir()} == {"spectra_vo.png", "ranks.png", "spectra.json"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--threshold qk=1", "expected pairs for --threshold qk=1, found vo"),
        ("--threshold many", "--threshold many: expected a figure"),
        ("--kinds qk", "qk: expected pairs of projections, found none in LlamaForCausalLM"),
        ("--layers 5", "--layers: expected 0 to 1 for vo, found 5"),
        ("--layers 1 --no-pictures", "--layers: expected pictures to draw them in"),
        ("--rows 3", "--rows: expected --calibration with it"),
        ("--calibration none.txt", "none.txt: expected a .txt or .jsonl file"),
    ],
)
def test_bad_options_of_spectra(options, message, tmp_path, capsys):
    source = save("llama", tmp_path / "model")
    assert run(spectra_script, source, *options.split(" "), "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_layer_that_is_not_there_is_refused_before_measuring(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("clover_peft.cli.spectra.measure_spectra", pytest.fail)
    assert run(spectra_script, save("llama", tmp_path / "model"), "--layers", "1", "2", "--out", tmp_path / "out") == 2
    assert "--layers: expected 0 to 1 for vo, found 2" in capsys.readouterr().err


def test_pictures_without_a_folder_are_refused(tmp_path, capsys):
    source = save("llama", tmp_path / "model")
    for options in (["--layers", "0"], ["--no-pictures"]):
        assert run(spectra_script, source, *options) == 2
        assert "expected --out with them" in capsys.readouterr().err
    assert run(spectra_script, source) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("family", ["clip", "whisper"])
def test_towers_with_unlike_heads_are_drawn(family, tmp_path):
    model = build(family)
    kinds = sorted({pair.kind for pair in find_pairs(model)})
    found = measure_spectra(model, kinds)
    ranks = {name: each.clover.needed(0.9) for name, each in found.items()}
    made = pictures.plot_spectra(found, tmp_path, ranks, dict.fromkeys(kinds, "ranks"))
    assert [path.name for path in made] == ["spectra_qk.png", "spectra_vo.png", "ranks.png"]
    assert all(path.stat().st_size > 5000 for path in made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="directions are chosen by weights")
        report = clover_peft.prune(model, 0.3)
        report.plot(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes()[:4] == b"%PDF"


def test_labels():
    assert labels(["model.layers.0.attn.k", "model.layers.10.attn.k"]) == ["0", "10"]
    assert labels(["encoder.block.0.layer.0.a.k", "encoder.block.1.layer.0.a.k"]) == ["0.0", "1.0"]
    assert labels(["m.encoder.0.a.k", "m.decoder.0.a.k"]) == ["encoder.0.a", "decoder.0.a"]
    assert labels(["m.attn.k"]) == ["m.attn"]
