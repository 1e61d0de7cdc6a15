"""The benchmark of latent attention, on a tiny model."""

import pytest

from tests.support.benchmarks import run


@pytest.mark.filterwarnings("ignore:calibration. .* are few", "ignore:.*tokens for blocks.* are few")
def test_latent_attention_by_both_rules(benchmark, tmp_path, capsys):
    pytest.importorskip("trl", reason="needs the train extra")
    benchmark("pruning")  # which it takes the windows from
    options = ["--reductions", "0.5", "--rope-dims", "4"]
    record = run(benchmark("mla"), tmp_path / "record.json", *options)
    found = {(row["method"], row["halved"]): row for row in record["converted"]}
    assert set(found) == {(method, halved) for method in ("clover", "transmla") for halved in (False, True)}
    for (_, halved), row in found.items():
        assert row["report"]["cache_bytes"][1] * 2 == row["report"]["cache_bytes"][0]
        assert (row["parameters"] < found[row["method"], False]["parameters"]) is halved
    assert record["targets"]["log ratio v TransMLA's at -50 %"]["wanted"] == 0.5
    assert "clover -50.00%, heads halved" in capsys.readouterr().out
