"""The benchmarks run on tiny shapes and their records say what they should; no time is asserted."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)

    return load


def run(module: ModuleType, path: Path, *arguments: str) -> dict:
    assert module.main(["--fast", "--device", "cpu", "--out", str(path), *arguments]) == path
    return json.loads(path.read_text())


def test_init_time(benchmark, tmp_path, capsys):
    record = run(benchmark("init_time"), tmp_path / "record.json")
    assert record["options"]["fast"] is True
    assert record["environment"]["versions"]["torch"] == torch.__version__
    assert record["figures"].keys() == {"clover", "pissa_niter_16", "pissa", "textbook"}
    for name, figure in record["figures"].items():
        assert figure["one_layer"] > 0, name
        assert ("extrapolated" in figure["how"]) == (name != "clover"), name
    assert sum(len(r["clover"]) for r in record["rounds"]) == record["options"]["layers"]
    assert record["figures"]["clover"]["v_clover"] == 1.0
    assert record["targets"].keys() == {"textbook", "pissa_niter_16"}
    counts = record["trainable_parameters_per_layer"]
    assert counts["pissa_niter_16"] == pytest.approx(counts["clover"], rel=0.15)
    assert "v CLOVER" in capsys.readouterr().out


def test_init_time_without_exact_pissa(benchmark, tmp_path):
    record = run(benchmark("init_time"), tmp_path / "record.json", "--skip-exact-pissa")
    assert "pissa" not in record["figures"]


def test_init_time_refuses_rounds_that_do_not_divide_the_layers(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark("init_time").main(["--layers", "5", "--rounds", "2"])
    assert "--rounds 2 does not divide --layers 5" in capsys.readouterr().err


def test_train_step(benchmark, tmp_path, capsys):
    record = run(benchmark("train_step"), tmp_path / "record.json")
    figures = record["figures"]
    methods = {"clover", "clover diagonal", "lora", "dora", "pissa", "hira", "oft", "lora on k v up"}
    assert figures.keys() == {"frozen base"} | methods
    assert figures["frozen base"]["trainable_parameters"] == 0
    budget = figures["clover"]["trainable_parameters"]
    for name in ("lora", "dora", "pissa", "hira", "lora on k v up"):
        assert figures[name]["trainable_parameters"] == pytest.approx(budget, rel=0.2), name
    for name in methods:
        assert figures[name]["saved_over_base_bytes"] >= 0, name
        assert len(record["seconds"][name]) == record["options"]["rounds"]
    assert figures["lora"]["step_v_lora"] == 1.0
    assert record["targets"]["saved_v_lora"]["reached"] == figures["clover"]["saved_v_lora"]
    assert "frozen base" in capsys.readouterr().out


def test_ranks_match_the_papers_at_llama_2_7b(benchmark):
    harness, train_step = benchmark("harness"), benchmark("train_step")
    with torch.device("meta"):
        layer = nn.ModuleDict({name: nn.Linear(4096, 4096, bias=False) for name in ("q_proj", "k_proj", "v_proj")})
        layer["up_proj"] = nn.Linear(4096, 11008, bias=False)
        layer["down_proj"] = nn.Linear(11008, 4096, bias=False)
    budget = 56_098_816 // 32  # CLOVER's trainable parameters in one layer
    assert harness.rank_for(budget, layer, harness.PAPER_LORA_TARGETS) == 32
    assert train_step._oft_block_size(budget, layer, harness.PAPER_LORA_TARGETS) == 128


def test_the_ways_out_of_a_quantised_base(benchmark, tmp_path, capsys, monkeypatch):
    pytest.importorskip("bitsandbytes", reason="needs the quant extra")
    pytest.importorskip("trl", reason="needs the train extra")
    from tests.test_training import make_tokenizer, rows, write_jsonl

    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    write_jsonl(tmp_path / "rows.jsonl", rows(40))
    chosen = ["model=base", "data=rows.jsonl", "rows=20", "held_out_rows=4", "questions=1", "max_steps=3"]
    more = ["answer_tokens=4", "per_device_train_batch_size=4", "disable_tqdm=true"]
    record = run(benchmark("quantised"), tmp_path / "record.json", "--set", *chosen, *more)
    errors = record["errors"]
    assert record["target_met"]
    for ways in errors.values():
        assert ways["dequantised"] < 1e-3
        assert ways["dense update"] < 1e-3
        assert ways["merged (4 bits)"] > 0.1
    assert errors["lora"]["plain reload"] < 1e-3
    assert errors["clover_full"]["plain reload"] > 1e-3
    assert "target, CLOVER dequantised and dense" in capsys.readouterr().out


def test_saved_bytes_counts_each_storage_once_and_no_parameter(benchmark):
    train_step = benchmark("train_step")
    linear = nn.Linear(8, 8, bias=False)
    x = torch.ones(4, 8, requires_grad=True)
    assert train_step._saved_bytes(linear, lambda: linear(x)) == x.numel() * 4
    assert train_step._saved_bytes(linear, lambda: linear(x) + linear(x.view(4, 8))) == x.numel() * 4


def test_ratio_is_taken_within_a_round(benchmark):
    assert benchmark("harness").ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == 2.0
