"""The benchmarks of pruning, and the real models and texts that they take."""

import dataclasses
import gzip
import itertools
import struct

import numpy as np
import pytest
import torch
from packaging.version import Version

from tests.support.benchmarks import run

# ---------------------------------------------------------------------- pruning


@pytest.fixture
def pruning(benchmark):
    pytest.importorskip("trl", reason="needs the train extra")
    return benchmark("pruning")


@pytest.fixture
def real_models(benchmark):
    pytest.importorskip("trl", reason="needs the train extra")
    return benchmark("real_models")


def test_pruning_of_speech(pruning, tmp_path, capsys):
    pytest.importorskip("jiwer", reason="needs the bench extra")
    record = run(pruning, tmp_path / "record.json", "--model", "whisper")
    assert record["unpruned"]["jfk_kl"] == record["unpruned"]["clips_kl"] == record["unpruned"]["jfk_wer"] == 0
    assert len(record["pruned"]) == 4
    for row in record["pruned"]:
        assert abs(row["figures"]["jfk_kl"]) < 1e-4  # what a random model says hardly depends on its heads
        assert row["figures"]["parameters"] < record["unpruned"]["parameters"]
        assert row["figures"]["kv_bytes"] < record["unpruned"]["kv_bytes"]
        assert row["report"]["calibrated"] is row["setting"]["calibrated"]
    only = next(row for row in record["pruned"] if row["setting"]["target_modules"])
    assert {path.split(".")[-3] for path in only["report"]["pairs"]} == {"0", "1"}
    assert not any("encoder_attn" in path for path in only["report"]["pairs"])
    assert len(record["targets"]) == 5
    assert all(t["reached"] is not None and t["met"] is None for t in record["targets"].values())  # not of tiny models
    assert "target jfk_wer of clover data global qk 50.0% vo 25.0% at most 0.0" in capsys.readouterr().out


def test_pruning_of_embeddings(pruning, tmp_path):
    record = run(pruning, tmp_path / "record.json", "--model", "minilm", "--ratio", "qk=0.25", "qk=0.5,vo=0.75")
    settings = [row["setting"] for row in record["pruned"]]
    assert [(s["method"], s["calibrated"], s["qk"], s["vo"]) for s in settings] == [
        (method, data, *shares)
        for method in ("clover", "vanilla")
        for data in (True, False)
        for shares in ((0.25, None), (0.5, 0.75))
    ]
    assert record["unpruned"]["cosine"] == pytest.approx(1)
    assert record["unpruned"]["kv_bytes"] is None
    assert all(0.5 < row["figures"]["least_cosine"] <= row["figures"]["cosine"] for row in record["pruned"])
    assert {t["reached"] for t in record["targets"].values()} == {None}


def test_pruning_of_a_language_model(pruning, tmp_path):
    options = ["--model", "smollm2", "--sweep", "--method", "clover", "--calibration", "with", "--ranks", "uniform"]
    record = run(pruning, tmp_path / "record.json", *options, "--multiple", "2")
    even = [r for r in record["pruned"] if r["setting"]["ranks"] == "uniform"]
    assert len(record["pruned"]) - len(even) == 3  # the targets', weighed by gradients
    rows = {(r["setting"]["method"], r["setting"]["vo"]): r for r in even}
    assert len(rows) == len(even) == 7  # six shares and the baseline
    for (method, share), row in rows.items():
        figures = row["figures"]
        assert figures["kv_bytes"] == figures["kv_bytes_reported"]
        assert figures["v_base"] == pytest.approx(1, abs=0.1)
        assert row["report"]["calibrated"] is (method == "clover")
        kept = {n for pair in row["report"]["pairs"].values() for n in pair["kept"]}
        assert len(kept) == 1
        assert kept.pop() == pytest.approx(12 * (1 - share), abs=1)
    assert rows["clover", 0.5]["figures"]["kv_bytes"] == record["unpruned"]["kv_bytes"] * 3 // 4


@pytest.fixture
def recovery(benchmark):
    trl = pytest.importorskip("trl", reason="needs the train extra")
    if Version(trl.__version__) < Version("1.16"):
        pytest.skip(f"TRL {trl.__version__} leaves its own forward pass on a model that it has trained")
    benchmark("pruning")  # from which it takes the model and its measure
    return benchmark("recovery")


def test_recovery(recovery, tmp_path, capsys):
    record = run(recovery, tmp_path / "record.json", "--ratio", "0.375", "0.5")
    rows = {(row["removed"], row["method"]): row for row in record["results"]}
    methods = ("clover", "lora", "attention")
    trained = {(share, method) for share in (0.375, 0.5) for method in methods}
    assert set(rows) == {(share, None) for share in (0.0, 0.25, 0.375, 0.5)} | trained
    assert all(row["perplexity"] > 0 for row in rows.values())
    assert all(rows[key]["losses"] for key in trained)
    assert rows[0.5, "lora"]["trainable"] == pytest.approx(rows[0.5, "clover"]["trainable"], rel=0.15)
    assert rows[0.5, "clover"]["trainable"] < rows[0.375, "clover"]["trainable"]
    assert [target["met"] for target in record["targets"].values()] == [None]
    assert "50.0% removed, lora" in capsys.readouterr().out


def test_loras_start_does_not_depend_on_what_was_trained_before(recovery, tmp_path):
    losses = []
    for number, methods in enumerate((["lora"], ["attention", "lora"])):
        record = run(recovery, tmp_path / f"record{number}.json", "--ratio", "0.5", "--methods", *methods)
        losses += [row["losses"] for row in record["results"] if row["method"] == "lora"]
    assert losses[0] == losses[1]


def test_decoding_with_narrower_heads(benchmark, tmp_path, capsys):
    record = run(benchmark("pruned_decode"), tmp_path / "record.json")
    size = {(r["model"], r["batch"]): r["cache_bytes"] for r in record["results"]}
    for batch in (1, 2):
        assert size["50% of both removed", batch] * 2 == size["unpruned", batch]
        assert size["25% of both removed", batch] * 4 == size["unpruned", batch] * 3
    assert all(r["v_unpruned"] == 1.0 for r in record["results"] if r["model"] == "unpruned")
    assert record["targets"].keys() == {"batch 1", "large"}
    assert "tokens/s" in capsys.readouterr().out


def test_decoding_of_one_shape_alone(benchmark):
    """Without a batch of 1 its target is not judged."""
    benchmark("pruning")
    half = {"model": "50% of both removed", "batch": 16, "context": 2048, "v_unpruned": 1.2}
    met = {name: target["met"] for name, target in benchmark("pruned_decode")._targets([half]).items()}
    assert met == {"batch 1": None, "large": True}


@pytest.mark.parametrize("wrong", ["qk", "qk=a", "kq=0.5", "qk=0.5;vo=0.5", "0.5"])
def test_pruning_refuses_what_is_no_ratio(pruning, capsys, wrong):
    with pytest.raises(SystemExit):
        pruning.main(["--model", "minilm", "--ratio", wrong])
    assert f"--ratio {wrong}: expected" in capsys.readouterr().err


def test_pruning_refuses_queries_and_keys_that_are_rotated(pruning, capsys):
    with pytest.raises(SystemExit):
        pruning.main(["--model", "smollm2", "--ratio", "vo=0.5", "qk=0.5,vo=0.5"])
    assert "--ratio vo=0.5 qk=0.5,vo=0.5: expected vo alone" in capsys.readouterr().err


def test_targets_of_embeddings_are_judged_on_enough_test_data(pruning):
    row = {"setting": vars(pruning.TARGETS["minilm"][0].setting), "figures": {"cosine": 0.99}}

    def verdict(*options):
        return next(iter(pruning._judge(pruning._arguments(["--model", "minilm", *options]), [row]).values()))["met"]

    assert verdict() is verdict("--sentences", "2048") is True
    assert verdict("--sentences", "4") is verdict("--split", "validation") is verdict("--fast") is None


def test_targets_are_judged_on_all_of_the_data(pruning):
    wanted = pruning.TARGETS["smollm2"][0].setting
    row = {"setting": vars(dataclasses.replace(wanted, ranks="layer", multiple=8)), "figures": {"v_base": 1.05}}

    judged = pruning._judge(pruning._arguments(["--model", "smollm2"]), [row])
    assert [target["met"] for target in judged.values()] == [True, None, None, None]
    for options in (["--windows", "3"], ["--split", "validation"], ["--fast"]):
        part = pruning._judge(pruning._arguments(["--model", "smollm2", *options]), [row])
        assert {target["met"] for target in part.values()} == {None}
    worse = {**row, "figures": {"v_base": 1.2}}
    judged = pruning._judge(pruning._arguments(["--model", "smollm2"]), [worse])
    assert next(iter(judged.values()))["met"] is False


# ---------------------------------------------------------------------- real models


def ctranslate2_file(version: int, variables: dict[str, np.ndarray]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<H", len(value) + 1) + value.encode() + b"\0"

    result = struct.pack("<I", version) + text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, value in variables.items():
        kind = {"float32": 0, "int8": 1, "float16": 4}[str(value.dtype)]
        result += text(name) + struct.pack(f"<B{value.ndim}I", value.ndim, *value.shape)
        result += struct.pack("<BI", kind, value.nbytes) + value.tobytes()
    return result


def test_weights_of_ctranslate2(real_models, tmp_path):
    numbers = np.random.default_rng(0)
    fused, bias = numbers.standard_normal((6, 2)).astype(np.float16), np.array([1, 2, 0, 0, 3, 4], np.float16)
    variables = {
        "decoder/layer_1/self_attention/linear_0/weight": fused,
        "decoder/layer_1/self_attention/linear_0/bias": bias,
        "decoder/layer_1/attention/linear_1/weight": fused[:4],
        "decoder/layer_norm/gamma": fused[:, 0].astype(np.float32),
        "encoder/layer_0/ffn/layer_norm/beta": bias,
        "encoder/conv1/weight": fused.reshape(2, 2, 3),
        "decoder/num_heads": np.array(6, np.int8),
        "encoder/position_encodings/encodings": fused,
    }
    file = tmp_path / "model.bin"
    file.write_bytes(ctranslate2_file(6, variables))
    found = real_models._whisper_weights(file)
    layer = "model.decoder.layers.1"
    rows = torch.from_numpy(fused.astype(np.float32))
    expected = {
        f"{layer}.self_attn.q_proj.weight": rows[:2],
        f"{layer}.self_attn.k_proj.weight": rows[2:4],
        f"{layer}.self_attn.v_proj.weight": rows[4:],
        f"{layer}.self_attn.q_proj.bias": torch.tensor([1.0, 2.0]),
        f"{layer}.self_attn.v_proj.bias": torch.tensor([3.0, 4.0]),
        f"{layer}.encoder_attn.k_proj.weight": rows[:2],
        f"{layer}.encoder_attn.v_proj.weight": rows[2:4],
        "model.decoder.layer_norm.weight": rows[:, 0],
        "model.encoder.layers.0.final_layer_norm.bias": torch.from_numpy(bias.astype(np.float32)),
        "model.encoder.conv1.weight": rows.view(2, 2, 3),
        "model.encoder.embed_positions.weight": rows,
    }
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    file.write_bytes(ctranslate2_file(6, {"encoder/layer_0/self_attention/linear_0/bias": bias[::-1].copy() + 1}))
    with pytest.raises(ValueError, match="expected no bias of the key, found"):
        real_models._whisper_weights(file)
    file.write_bytes(ctranslate2_file(5, {}))
    with pytest.raises(ValueError, match="expected a Whisper model in format 6, found WhisperSpec in format 5"):
        real_models._whisper_weights(file)


def test_rows_of_wikitext2(pruning, real_models, tmp_path, monkeypatch):
    monkeypatch.delenv("CLOVER_DATA", raising=False)
    with pytest.raises(ValueError, match=r"CLOVER_DATA=: expected a folder with wikitext2/test.txt.gz"):
        real_models.wikitext2("test")
    monkeypatch.setenv("CLOVER_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=r"found none; set CLOVER_DATA to one"):
        real_models.wikitext2("test")
    (tmp_path / "wikitext2").mkdir()
    with gzip.open(tmp_path / "wikitext2" / "test.txt.gz", "wt", encoding="utf-8", newline="\n") as file:
        file.write("\n = A = \n\n One \x85 row . Another one of many more words than eight .\n")
    assert real_models.wikitext2("test")[:3] == ["", " = A = \n", ""]
    assert len(real_models.wikitext2("test")) == 4
    assert pruning._sentences("test", 1, 0) == ["Another one of many more words than eight ."]


@pytest.mark.slow
def test_whisper_writes_down_what_is_said(real_models):
    """Word for word; the model itself has one comma less than the usual transcript."""
    whisper, clip = real_models.whisper_tiny_en(), real_models.speech()["jfk"]
    features = whisper.features(clip.audio, sampling_rate=real_models.SAMPLE_RATE, return_tensors="pt")
    ids = whisper.model.generate(features.input_features, do_sample=False, num_beams=1)[0]
    assert whisper.tokenizer.decode(ids).strip() == clip.text.replace("Americans,", "Americans")


@pytest.mark.slow
def test_sentences_of_one_meaning_are_near(real_models):
    model, tokenizer = real_models.minilm()
    sentences = ["A cat sits on the mat.", "A kitten is sitting on a rug.", "The stock market fell on Monday."]
    found = real_models.embed(model, dict(tokenizer(sentences, padding=True, return_tensors="pt")))
    near, far = float(found[0] @ found[1]), float(found[0] @ found[2])
    assert near > 0.5 > 0.3 > far


def test_pruning_goes_on_after_an_interruption(pruning, tmp_path, monkeypatch):
    """The settings that were measured are not measured again, and the record is that of one run."""
    prune, pruned = pruning._prune, []
    options = ["--model", "smollm2", "--ratio", "vo=0.25", "vo=0.5", "--calibration", "with"]
    whole = run(pruning, tmp_path / "whole.json", *options)

    def interrupted(*args):
        pruned.append(args[1])
        if len(pruned) == 3:
            raise KeyboardInterrupt
        return prune(*args)

    monkeypatch.setattr(pruning, "_prune", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(pruning, tmp_path / "record.json", *options)
    record = run(pruning, tmp_path / "record.json", *options)
    assert len(pruned) == 5  # the third one twice
    assert [row["setting"] for row in record["pruned"]] == [row["setting"] for row in whole["pruned"]]
    assert [row["figures"] for row in record["pruned"]] == [row["figures"] for row in whole["pruned"]]


def test_calibration_with_several_texts(benchmark, tmp_path, capsys):
    pytest.importorskip("trl", reason="needs the train extra")
    record = run(benchmark("calibration_text"), tmp_path / "record.json")
    rows = {(row["calibrated_with"], row["ratio"]): row for row in record["pruned"]}
    texts = ["wikitext", "python", "french"]
    assert rows.keys() == {
        (text, ratio) for text in [*texts, "all", "own", "wikitext and own"] for ratio in (0.25, 0.5)
    }
    for row in rows.values():
        for name in texts:
            before, after = record["unpruned"]["losses"][name], row["losses"][name]
            assert row["rises"][name][0] == pytest.approx(np.mean(after) - np.mean(before), abs=1e-9)
    losses = [rows[text, 0.5]["losses"] for text in ("python", "all", "own", "wikitext and own")]
    assert all(one != other for one, other in itertools.combinations(losses, 2))
    assert "calibrated with" in capsys.readouterr().out
