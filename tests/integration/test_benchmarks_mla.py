"""The benchmark of latent attention, on a tiny model."""

import json
import os
from pathlib import Path

import pytest

from tests.support.benchmarks import run

pytestmark = pytest.mark.filterwarnings("ignore:calibration. .* are few", "ignore:.*tokens for blocks.* are few")


def test_latent_attention_by_both_rules(benchmark, tmp_path, capsys):
    pytest.importorskip("trl", reason="needs the train extra")
    benchmark("pruning")  # which it takes the windows from
    options = ["--reductions", "0.5", "--rope-dims", "4"]
    record = run(benchmark("mla"), tmp_path / "record.json", *options)
    found = {(row["method"], row["halved"]): row for row in record["converted"]}
    assert set(found) == {(method, halved) for method in ("clover", "transmla") for halved in (False, True)}
    for (_, halved), row in found.items():
        assert row["report"]["cache_bytes"][1] * 2 == row["report"]["cache_bytes"][0]
        assert row["convert_bytes"] > 0
        assert set(row["planned"]["seconds"]) == set(row["report"]["seconds"])
        assert row["planned"]["cache_bytes"] == row["report"]["cache_bytes"]
        assert bool(row["report"]["layers"]) is not halved
        assert (row["parameters"] < found[row["method"], False]["parameters"]) is halved
    assert record["targets"]["log ratio v TransMLA's at -50 %"]["wanted"] == 0.5
    assert "clover -50.00%, heads halved" in capsys.readouterr().out


def test_an_interrupted_run_goes_on_with_the_rows_that_are_missing(benchmark, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs the train extra")
    benchmark("pruning")
    module, path = benchmark("mla"), tmp_path / "record.json"
    options = ["--reductions", "0.5", "0.6", "--rope-dims", "4"]
    converted, convert, prune = [], module.convert_to_mla, module.clover_peft.prune
    monkeypatch.setattr(module, "convert_to_mla", lambda *a, **k: converted.append(k) or convert(*a, **k))

    def interrupt(*args, **kwargs):
        if len(converted) == 2:
            raise KeyboardInterrupt
        return prune(*args, **kwargs)

    monkeypatch.setattr(module.clover_peft, "prune", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(module, path, *options)
    monkeypatch.setattr(module.clover_peft, "prune", prune)
    assert not path.exists()
    [rows] = rows_of(path)
    kept = {json.dumps(each["settings"]): each["row"] for each in json.loads(rows.read_text())["rows"]}
    assert len(kept) == 4  # the original, two of the first conversion, and one of the second
    record = run(module, path, *options)
    assert len(converted) == 2 + 3  # the second one again, for its halved heads
    assert record["original"] in kept.values()
    assert [row for row in record["converted"] if row in kept.values()] == record["converted"][:3]
    assert len(record["converted"]) == 8
    assert not rows_of(path)


def test_a_reduction_that_cannot_be_reached_is_refused_before_anything_is_measured(benchmark, tmp_path):
    pytest.importorskip("trl", reason="needs the train extra")
    benchmark("pruning")
    path = tmp_path / "record.json"
    with pytest.raises(ValueError, match=r"cache_reduction=0\.99: .* leaves no room for a latent"):
        run(benchmark("mla"), path, "--reductions", "0.5", "0.99")
    assert not rows_of(path)


def test_rows_of_other_settings_are_not_taken(benchmark, tmp_path, monkeypatch):
    pytest.importorskip("trl", reason="needs the train extra")
    benchmark("pruning")
    module, path = benchmark("mla"), tmp_path / "record.json"
    finish = module.Rows.finish
    monkeypatch.setattr(module.Rows, "finish", lambda self, record, out: module.Path(out).write_text("{}") and out)
    options = ["--reductions", "0.5", "--methods", "transmla", "--no-prune"]
    for seed in (0, 1):
        run(module, path, *options, "--seed", str(seed))
    files = {json.loads(file.read_text())["rows"][0]["settings"]["seed"]: file for file in rows_of(path)}
    assert sorted(files) == [0, 1]
    assert all(len(json.loads(file.read_text())["rows"]) == 2 for file in files.values())

    monkeypatch.setattr(module.Rows, "finish", finish)
    path.unlink()
    run(module, path, *options, "--seed", "1")
    assert rows_of(path) == [files[0]]  # an unfinished run keeps its rows
    files[0].write_text('{"rows": [')
    with pytest.raises(ValueError, match=r"record\.\w{8}\.rows\.json: expected a JSON object.*move it away"):
        run(module, path, *options)


@pytest.mark.skipif("CLOVER_DATA" not in os.environ, reason="CLOVER_DATA names no folder with zeroshot/")
def test_zero_shot_accuracy_is_measured_of_every_row(benchmark, tmp_path):
    pytest.importorskip("trl", reason="needs the train extra")
    benchmark("pruning")
    options = ["--reductions", "0.5", "--methods", "transmla", "--zeroshot", "1"]
    record = run(benchmark("mla"), tmp_path / "record.json", *options)
    for row in (record["original"], *record["converted"]):
        assert len(row["zeroshot"]) == 7
        assert all(0 <= accuracy <= 1 for accuracy in row["zeroshot"].values())


def test_text_of_other_kinds_is_measured_of_every_row(benchmark, tmp_path, capsys):
    benchmark("pruning")
    options = ["--reductions", "0.5", "--methods", "transmla", "--other-windows", "2"]
    record = run(benchmark("mla"), tmp_path / "record.json", *options)
    for row in (record["original"], *record["converted"]):
        assert set(row["other"]) == {"python", "french"}
        assert all(value > 1 for value in row["other"].values())
    assert record["original"]["other"] != record["converted"][0]["other"]
    assert f"python {record['original']['other']['python']:.1f}, french" in capsys.readouterr().out


def rows_of(path: Path) -> list[Path]:
    return list(path.parent.glob("record.*.rows.json"))


def test_decoding_is_compared_in_rounds(benchmark, tmp_path, capsys):
    benchmark("pruning")
    benchmark("pruned_decode")
    record = run(benchmark("mla_decode"), tmp_path / "record.json")
    found = {(row["batch"], row["context"], row["model"]): row for row in record["results"]}
    assert len(found) == 2 * 3
    for (batch, context, model), row in found.items():
        original = found[batch, context, "original"]
        assert original["cache_bytes"] == 4 * batch * context * 2 * 2 * 3 * 4
        share = {"original": 1, "latent -50.00%": 0.5, "latent -75.00%": 0.25}[model]
        assert row["cache_bytes"] == share * original["cache_bytes"]
        low, high = row["v_original_interval"]
        assert low <= row["v_original"] <= high
        assert (row["share_in_kv_b_proj"] > 0) is (model != "original")
        assert len(row["seconds"]) == 2
    assert original["v_original"] == 1
    assert set(record["targets"]) == {f"latent -{share}%, batch 2, context 16" for share in ("50.00", "75.00")}
    assert "share in kv_b_proj" in capsys.readouterr().out
