"""The benchmarks of speed run on tiny shapes and their records say what they should; no time is asserted."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from clover_peft import CloverConfig
from tests.support import tiny_chat
from tests.support.benchmarks import FOLDER, run


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
    assert record["targets"].keys() == {"textbook", "pissa_niter_16", "seconds"}
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


def test_rounding(benchmark, tmp_path, capsys):
    figures = run(benchmark("rounding"), tmp_path / "record.json")["figures"]
    assert figures.keys() == {"clover, 10000, rate 0.0005", "clover, 100, rate 0.0005", "lora, rate 0.001"}
    for figure in figures.values():
        assert figure["parameters"] > 0
        assert len(figure["training_loss"]) == 2
        assert 0 <= figure["merged_v_unmerged"] < 1e-4
    assert "merged_v_unmerged" in capsys.readouterr().out


def test_rounding_compares_with_the_weights_before_the_merge(benchmark, tmp_path, monkeypatch):
    """LoRA's unmerging leaves rounding errors in bfloat16 weights, which are no error of the unmerged model."""
    rounding = benchmark("rounding")
    base, _, held_out = rounding.load_whisper(fast=True)
    batches = [{n: t.bfloat16() if t.is_floating_point() else t for n, t in batch.items()} for batch in held_out]
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    model = get_peft_model(base.bfloat16(), config, autocast_adapter_dtype=False)
    wide = copy.deepcopy(model).float()

    @torch.no_grad()
    def logits(model, dtype):
        moved = [{n: t.to(dtype) if t.is_floating_point() else t for n, t in batch.items()} for batch in batches]
        return torch.cat([model(**batch).logits.double().flatten() for batch in moved])

    with wide.disable_adapter(), model.disable_adapter():
        exact, rounded = logits(wide, torch.float32), logits(model, torch.bfloat16)
    effect = (logits(wide, torch.float32) - exact).norm()
    found = rounding._measure(model, batches)
    assert found["base_v_float32"] == pytest.approx(float((rounded - exact).norm() / effect))


def test_rounding_has_one_tiny_model(benchmark, capsys):
    with pytest.raises(SystemExit):
        benchmark("rounding").main(["--model", "smollm2", "--fast"])
    assert "--fast: there is a tiny model for whisper alone" in capsys.readouterr().err


def test_one_rate(benchmark, tmp_path, capsys):
    out = tmp_path / "record.json"
    methods = ["clover", "clover balanced", "lora", "lora all", "dora", "pissa", "hira", "hira all"]
    record = run(benchmark("one_rate"), out, "--models", "minilm", "vit", "--seeds", "2")
    for name in ("minilm", "vit"):
        figure = record["figures"][name]
        trials = figure["trials"]
        assert [(t["method"], t["rate"]) for t in trials] == [(m, rate) for m in methods for rate in (2e-4, 5e-4)]
        losses = {(t["method"], t["rate"]): t["validation_loss"] for t in trials}
        for method in methods:
            assert figure["best_rates"][method] == min((2e-4, 5e-4), key=lambda rate: losses[method, rate])
        # From the best rate on, test data alone count, and seeds are paired.
        seen = {(t["method"], t["seed"]): t for t in figure["at_best_rates"]}
        assert seen.keys() == {(method, seed) for method in methods for seed in (0, 1)}
        assert all(t["rate"] == figure["best_rates"][method] for (method, _), t in seen.items())
        differences = [seen["clover", s]["test_loss"] - seen["lora", s]["test_loss"] for s in (0, 1)]
        assert figure["test"]["clover"]["less_reference"] == pytest.approx(sum(differences) / 2)
        assert figure["test"]["clover"]["standard_error"] == pytest.approx(abs(differences[0] - differences[1]) / 2)
        assert figure["test"]["lora"]["less_reference"] == 0
        counts = {method: found["parameters"] for method, found in figure["test"].items()}
        assert counts["clover"] == counts["clover balanced"]
        assert all(count == pytest.approx(counts["clover"], rel=0.15) for count in counts.values()), counts
    assert "loss before training" in capsys.readouterr().out


def test_one_rate_without_its_reference(benchmark, tmp_path, capsys):
    record = run(benchmark("one_rate"), tmp_path / "record.json", "--models", "minilm", "--methods", "clover", "dora")
    for found in record["figures"]["minilm"]["test"].values():
        assert found["less_reference"] is None
    assert "+0.000" not in capsys.readouterr().out


def test_update_scale(benchmark, tmp_path, capsys):
    record = run(benchmark("update_scale"), tmp_path / "record.json", "--windows", "5")
    assert record["figures"]["kappa"].keys() == {"k_proj", "v_proj", "up_proj", "down_proj"}
    assert record["figures"]["ratios"].keys() == {"email", "asyncio, 4 windows", "random tokens"}
    for ratio in record["figures"]["ratios"].values():
        assert 0 < ratio["low"] <= 1 <= ratio["high"]
    assert "10 % of blocks" in capsys.readouterr().out


def test_input_dimensions(benchmark, tmp_path, capsys):
    """Bases from activations see as many dimensions as a block has features, up to the shrinking of moments."""
    record = run(benchmark("input_dimensions"), tmp_path / "record.json", "--windows", "8", "--block-size", "16")
    figures = record["figures"]
    assert figures.keys() == {"LoRA", "CLOVER", "CLOVER from activations", "HiRA"}
    for kind in ("v_proj", "up_proj", "down_proj"):
        assert all(1 <= figure[kind] <= 128 for figure in figures.values())
        assert figures["CLOVER"][kind] < figures["CLOVER from activations"][kind] <= 16 + 1e-6
    assert "dimensions on asyncio" in capsys.readouterr().out


def test_gradient_share(benchmark, tmp_path, capsys):
    """Blocks that span all rows of a weight contain the gradient's part in the row space: here, all of it."""
    options = ["--windows", "6", "--block-size", "64", "--rank", "4"]
    record = run(benchmark("gradient_share"), tmp_path / "record.json", *options)
    for shares in record["figures"].values():
        one, eight = (shares[f"its {label} largest singular directions"] for label in ("1", "8"))
        for kind in ("v_proj", "up_proj", "down_proj"):
            assert one[kind] < eight[kind] <= 1.5
            assert shares["LoRA r=4, at the start"][kind] < shares["LoRA r=4, turned to it"][kind]
        assert shares["CLOVER"]["up_proj"] == pytest.approx(1.0)
    assert "share of the gradient on asyncio" in capsys.readouterr().out


def test_kernel_count(benchmark, tmp_path, capsys):
    """The count does not depend on the machine: a higher one is a step backwards."""
    figures = run(benchmark("kernel_count"), tmp_path / "record.json")["figures"]
    assert figures["base"]["beyond_base"] == 0
    assert figures["lora"]["beyond_base"] == 5 * 10  # five products and scalings, and five sums of gradients
    assert figures["clover"]["beyond_base"] <= 18
    assert figures["clover low rank"]["beyond_base"] <= 40
    assert figures["clover"]["once_beyond_base"] == 32
    assert (figures["clover"]["waits"], figures["clover"]["waits_once"]) == (0, 1)
    assert "beyond the base" in capsys.readouterr().out


def test_kernels_are_counted_as_on_an_accelerator_whatever_the_seed(benchmark, tmp_path):
    """No norm is read where products could go on, and models of two and of four layers take as many products."""
    for seed in (0, 2):
        figures = run(benchmark("kernel_count"), tmp_path / f"{seed}.json", "--seed", str(seed))["figures"]
        assert figures["clover"]["once_beyond_base"] == 32


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
    assert record["targets"]["step_v_base"]["reached"] == figures["clover"]["step_v_base"]
    assert record["targets"]["saved_over_base_v_lora"]["reached"] == figures["clover"]["saved_over_base_v_lora"]
    assert record["targets"]["peak_over_base_v_dora"]["met"] is None  # no GPU
    assert figures["lora"]["saved_over_base_v_lora"] == 1.0
    assert "frozen base" in capsys.readouterr().out


def test_train_step_of_some_methods(benchmark, tmp_path):
    record = run(benchmark("train_step"), tmp_path / "record.json", "--methods")
    assert record["figures"].keys() == {"frozen base", "clover", "lora"}
    for name in ("clover", "lora"):
        low, high = record["figures"][name]["step_v_base_interval"]
        assert low <= record["figures"][name]["step_v_base"] <= high


def test_train_step_with_gradient_checkpointing_saves_a_layers_input_alone(benchmark, tmp_path):
    plain = run(benchmark("train_step"), tmp_path / "plain.json", "--methods")["figures"]
    record = run(benchmark("train_step"), tmp_path / "record.json", "--methods", "--gradient-checkpointing")
    for name, found in record["figures"].items():
        assert found["saved_bytes"] < plain[name]["saved_bytes"] / 4, name


def test_train_step_of_grouped_key_value_heads(benchmark, tmp_path):
    record = run(benchmark("train_step"), tmp_path / "record.json", "--methods", "--key-value-heads", "2")
    assert record["options"]["key_value_heads"] == 2
    blocks = {"k, v": 2 * 2 * 16**2, "up": 4 * 43**2}  # up has 172 features
    assert record["figures"]["clover"]["trainable_parameters"] == sum(blocks.values())


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
    from tests.support.tiny_chat import make_tokenizer, rows, write_jsonl

    monkeypatch.chdir(tmp_path)
    tokenizer = make_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **shape)).save_pretrained("base")
    tokenizer.save_pretrained("base")
    write_jsonl(tmp_path / "rows.jsonl", rows(40))
    chosen = ["model=base", "data=rows.jsonl", "rows=20", "held_out_rows=4", "questions=1", "max_steps=3"]
    more = ["answer_tokens=4", "per_device_train_batch_size=4", "disable_tqdm=true"]
    quantised, path = benchmark("quantised"), tmp_path / "record.json"
    assert quantised.main(["--device", "cpu", "--out", str(path), "--set", *chosen, *more]) == path
    record = json.loads(path.read_text())
    errors = record["errors"]
    assert record["target_met"]
    for ways in errors.values():
        assert ways["dequantised"] < 1e-3
        assert ways["merged (4 bits)"] > 0.1
    assert errors["clover_full"]["dense update"] < 1e-3
    assert errors["clover_full"]["plain reload"] > 1e-3
    # What LoRA adds does not depend on the weights: nothing is measured of it.
    assert (errors["lora"]["dense update"], errors["lora"]["plain reload"], errors["lora"]["weights"]) == (
        None,
        None,
        {},
    )
    assert "target, CLOVER dequantised and dense" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        quantised.main(["--fast"])
    assert "--fast: there is no tiny model here" in capsys.readouterr().err


def test_a_step_is_taken_apart(benchmark, tmp_path, capsys):
    pytest.importorskip("trl", reason="needs the train extra")
    profile = benchmark("sft_profile")
    record = run(profile, tmp_path / "record.json")
    for figures in record["figures"].values():
        assert tuple(figures["milliseconds"]) == profile.PARTS
        assert all(figures["milliseconds"][part] > 0 for part in profile.PARTS)
        assert sum(figures["shares"].values()) == pytest.approx(1)
    assert "adapter" in capsys.readouterr().out


def test_whole_fine_tunings_are_compared_on_as_many_tokens(benchmark, tmp_path, capsys, monkeypatch):
    pytest.importorskip("trl", reason="needs the train extra")
    tiny_chat.save_chat_model(tmp_path / "model")
    data = tiny_chat.write_jsonl(tmp_path / "train.jsonl", tiny_chat.rows(60))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    programs = benchmark("sft_end_to_end")
    record = run(programs, tmp_path / "record.json", "--model", str(tmp_path / "model"), "--data", str(data))
    assert record["figures"].keys() == {"clover", "clover lora", "trl lora"}
    for figures in record["figures"].values():
        assert figures["tokens"] == [2 * 2 * programs.LENGTH]
        assert all(figures[f"{name}_v_trl lora"] > 0 for name in programs.FIGURES)
    assert record["figures"]["trl lora"]["seconds_v_trl lora"] == 1
    assert "tokens per second v trl lora" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="ended with 3: no data"):
        programs._run([programs.sys.executable, "-c", "print('no data'); raise SystemExit(3)"])


def test_operations_count_where_their_forward_is_and_kernels_once(benchmark):
    pytest.importorskip("trl", reason="needs the train extra")
    from torch.autograd import DeviceType

    def event(name, own, parent=None, number=-1, device=DeviceType.CPU):
        times = {"self_cpu_time_total": own * 1000.0, "self_device_time_total": own * 1000.0}
        return SimpleNamespace(name=name, cpu_parent=parent, sequence_nr=number, device_type=device, **times)

    maps = event("part: adapter", 1)
    backward = event("autograd::engine::evaluate_function: X", 3, number=7)
    events = [
        maps,
        event("aten::bmm", 2, maps, number=7),
        event("gemm", 2, device=DeviceType.CUDA),
        event("part: adapter", 9, device=DeviceType.CUDA),
        backward,
        event("aten::bmm", 4, event("X", 5, backward)),
        event("aten::copy_", 6, event("Optimizer.step#AdamW.step", 0)),
        event("aten::loss", 8),
    ]
    for cuda in (False, True):
        found = benchmark("sft_profile")._by_part(events, cuda, steps=2)
        assert {part: ms for part, ms in found.items() if ms} == {"adapter": 5.0, "optimizer": 3.0, "elsewhere": 4.0}


def test_saved_bytes_counts_each_storage_once_and_no_parameter(benchmark):
    train_step = benchmark("train_step")
    linear = nn.Linear(8, 8, bias=False)
    x = torch.ones(4, 8, requires_grad=True)
    assert train_step.saved_bytes(linear, lambda: linear(x)) == x.numel() * 4
    assert train_step.saved_bytes(linear, lambda: linear(x) + linear(x.view(4, 8))) == x.numel() * 4
    assert train_step.saved_bytes(linear, lambda: linear(x).exp()) == 2 * x.numel() * 4
    assert train_step.saved_bytes(linear, lambda: linear(x).exp(), output_is_kept=True) == x.numel() * 4


def test_the_device_that_is_named_becomes_the_current_one(benchmark, monkeypatch, capsys):
    """Peaks of memory and trainers are of the current device."""
    command, chosen = benchmark("harness").parser("", "name"), []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append(str(device)))
    for name in ("cpu", "cuda", "cuda:1"):
        assert command.parse_args(["--device", name]).device == name
    assert chosen == ["cuda:1"]
    with pytest.raises(SystemExit):
        command.parse_args(["--device", "gpu"])
    assert "expected cpu, cuda or cuda:N, found gpu" in capsys.readouterr().err


def test_ratio_is_taken_within_a_round(benchmark):
    assert benchmark("harness").ratio([2.0, 20.0, 200.0], [1.0, 10.0, 100.0]) == 2.0


def test_forms(benchmark, tmp_path, capsys):
    record = run(benchmark("forms"), tmp_path / "record.json")
    names = {f"{part}, {setting}" for part in ("key", "value", "up") for setting in ("full", "a quarter")}
    assert record["training"].keys() == record["few_tokens"].keys() == names
    for name, forms in record["training"].items():
        assert forms.keys() == {"as it is", "keeps z", "plain operations", "unfolded", "(I + M) z"}
        assert forms["as it is"]["v_first"] == 1.0
        assert forms["as it is"]["kept_bytes"] <= forms["keeps z"]["kept_bytes"], name
    kept = {name: forms["as it is"]["kept_bytes"] for name, forms in record["training"].items()}
    assert kept["value, a quarter"] < kept["key, full"]
    for sizes in record["few_tokens"].values():
        assert sizes.keys() == {"1 tokens", "2 tokens"}
        assert all(forms.keys() == {"folded before", "folded", "unfolded"} for forms in sizes.values())
    assert "(I + M) z" in capsys.readouterr().out


@torch.no_grad()
def test_all_forms_compute_the_same(benchmark):
    forms, harness = benchmark("forms"), benchmark("harness")
    model = get_peft_model(harness.llama(64, 4, 172, 1, 0, torch.float64, "cpu"), CloverConfig())
    harness.randomise(model, 0)
    layer = harness.decoder_of(model).layers[0].self_attn.v_proj
    z = forms._features(layer, 3)
    expected = forms.apply_maps(z, layer.maps(["default"]))
    assert float((expected - z).norm()) > 1e-3
    for y in (forms._literal(layer, z), forms.formula(z, layer.staged_maps(["default"]))):
        assert float((y - expected).norm()) < 1e-10


def test_targets_say_what_was_reached(benchmark):
    reached = {"met": 1.0, "missed": 1.5, "not measured": None, "beside": 0.0, "open": 0.9}
    reached |= {"well met": 0.9, "well missed": 1.1}
    reached |= {"open_interval": (0.8, 1.1), "well met_interval": (0.8, 1.0), "well missed_interval": (1.01, 1.2)}
    found = benchmark("harness").at_most(
        {name: 1.0 for name in reached if "_" not in name and name != "beside"}, reached
    )
    assert {name: (target["reached"], target["met"]) for name, target in found.items()} == {
        "met": (1.0, True),
        "missed": (1.5, False),
        "not measured": (None, None),
        "open": (0.9, None),
        "well met": (0.9, True),
        "well missed": (1.1, False),
    }


def test_targets_that_are_to_be_reached_from_below(benchmark):
    at_least = benchmark("harness").at_least
    assert at_least(1.5, 1.6) == {"wanted": 1.5, "reached": 1.6, "met": True}
    assert at_least(1.5, 1.6, (1.4, 1.7))["met"] is False
    assert at_least(1.5, 1.6, (1.5, 1.7))["met"] is True
    assert at_least(1.5, None)["met"] is None


@pytest.mark.parametrize(("count", "left_out"), [(1, 0), (5, 0), (6, 0), (9, 1), (15, 3), (40, 13)])
def test_an_interval_leaves_out_what_a_coin_would(benchmark, count, left_out):
    """As in tables of the sign test, at 95 %."""
    values = list(range(count))[::-1]
    assert benchmark("harness").interval(values) == (left_out, count - 1 - left_out)


def test_records_of_compiled_models_have_a_name_of_their_own(benchmark, tmp_path, monkeypatch):
    for name in ("decode", "train_step"):
        assert benchmark(name)._arguments([]).out.name == f"{name}.json"
        assert benchmark(name)._arguments(["--compile"]).out.name == f"{name}_compiled.json"
        assert benchmark(name)._arguments(["--compile", "--out", "x.json"]).out.name == "x.json"
    for number, compiled in ((1, False), (2, True)):
        record = {"options": {"compile": compiled}}
        (tmp_path / f"decode-{number}.json").write_text(json.dumps(record))
    assert benchmark("plots").newest(tmp_path, "decode")["file"] == "decode-1.json"


def test_decode(benchmark, tmp_path, capsys):
    record = run(benchmark("decode"), tmp_path / "record.json")
    methods = {
        "base",
        "clover",
        "clover in training",
        "clover merged",
        "clover low rank",
        "lora",
        "dora",
        "dora cached",
    }
    rounds = record["options"]["rounds"]
    assert record["figures"].keys() == {"batch 1", "batch 2"}
    for rows in record["figures"].values():
        assert rows.keys() == methods
        budget = rows["clover"]["trainable_parameters"]
        assert rows["clover merged"]["trainable_parameters"] == budget
        assert rows["clover low rank"]["trainable_parameters"] < budget / 8
        for name in ("lora", "dora", "dora cached"):
            assert rows[name]["trainable_parameters"] == pytest.approx(budget, rel=0.2), name
        assert rows["base"]["v_base"] == rows["lora"]["v_lora"] == 1.0
    for name in methods:
        assert [len(seconds) for seconds in record["seconds"][name].values()] == [rounds, rounds], name
    effects = record["effects"]
    assert effects["base"] == 0
    assert all(effect > 1e-5 for name, effect in effects.items() if name != "base"), effects
    assert effects["clover merged"] == pytest.approx(effects["clover"], rel=1e-3)
    assert effects["clover in training"] == pytest.approx(effects["clover"], rel=1e-3)
    assert effects["dora cached"] == pytest.approx(effects["dora"], rel=1e-3)
    for kinds in record["switching"].values():
        assert [len(found["rounds"]) for found in kinds.values()] == [2 * rounds, 2 * rounds]
    targets = record["targets"]
    assert targets.keys() == {"clover", "clover low rank", "clover merged", "switching_ms_a_layer"}
    assert targets["clover"]["reached"] == max(rows["clover"]["v_base"] for rows in record["figures"].values())
    assert targets["switching_ms_a_layer"]["reached"] == record["switching"]["clover"]["new"]["ms_a_layer"]
    assert "clover, to a new adapter" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(("name", "arguments"), [("decode", []), ("train_step", ["--methods"])])
def test_compiled(benchmark, tmp_path, name, arguments):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    run(benchmark(name), tmp_path / "plain.json", *arguments)
    assert not torch._dynamo.utils.counters["stats"]
    record = run(benchmark(name), tmp_path / "record.json", "--compile", *arguments)
    assert record["options"]["compile"] is True
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 3


@pytest.mark.parametrize("training", [True, False])
def test_doras_graph_breaks_leave_the_other_models_whole(benchmark, monkeypatch, training):
    """All models have the code of one class, and what torch learns of a function counts for all that run its code."""
    harness, decode, train_step = benchmark("harness"), benchmark("decode"), benchmark("train_step")
    compile_ = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda module: compile_(module, backend="eager"))
    torch._dynamo.reset()
    base = harness.llama(32, 2, 32, 1, 0, torch.float32, "cpu").requires_grad_(False)
    dora = LoraConfig(r=2, use_dora=True, target_modules=["q_proj"])
    models = {
        "base": base,
        **{n: get_peft_model(copy.deepcopy(base), c) for n, c in (("clover", CloverConfig()), ("dora", dora))},
    }
    x, cache = torch.ones(1, 1, 32), decode._filled(base, 1, 4)

    def step(model):
        if training:
            train_step.decode(model, x.clone().requires_grad_(True), torch.float32).sum().backward()
        else:
            with torch.no_grad():
                decode._steps(model.eval(), x, cache, 1, "cpu")

    def regions(model):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
            step(model)
        return sum(event.name.startswith("Torch-Compiled Region") for event in found.events())

    with torch._dynamo.config.patch(recompile_limit=8):  # set back afterwards
        harness.compile_decoders(models.values())
        for name in ("dora", "base", "clover") * 2:
            step(models[name])
        assert regions(models["dora"]) > 1
        assert regions(models["base"]) == regions(models["clover"]) == 1
    torch._dynamo.reset()


def test_a_step_of_decoding_leaves_the_cache_as_it_was(benchmark):
    decode, harness = benchmark("decode"), benchmark("harness")
    model = harness.llama(64, 4, 64, 2, 0, torch.float32, "cpu").eval()
    cache = decode._filled(model, 3, 5)
    before = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    with torch.no_grad():
        decode._steps(model, torch.randn(3, 1, 64), cache, 4, "cpu")
    assert cache.get_seq_length() == 5
    for layer, (keys, values) in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert torch.equal(layer.values, values)


def test_scaling(benchmark, tmp_path, capsys):
    scaling = benchmark("scaling")
    record = run(scaling, tmp_path / "record.json")
    found = record["dimensions"]
    assert list(found) == list(scaling.DIMENSIONS)
    for dimension, measured in found.items():
        sizes = [row["size"] for row in measured["rows"]]
        assert sizes == sorted(set(sizes)), dimension
        assert [row["point"][dimension] for row in measured["rows"]] == sizes
        others = [{k: v for k, v in row["point"].items() if k != dimension} for row in measured["rows"]]
        if dimension == "heads":
            assert [point.pop("hidden_size") for point in others] == [n * record["point"]["head_dim"] for n in sizes]
        assert all(point == others[0] for point in others), dimension
        assert all(len(row["seconds"]["clover"]) == record["options"]["rounds"] for row in measured["rows"])
    exponents = {dimension: measured["exponents"] for dimension, measured in found.items()}
    for dimension in ("tokens", "heads", "layers"):
        assert exponents[dimension]["growing bytes"] == pytest.approx(1, abs=0.01), dimension
    # Besides what is kept of every token there are the folded maps, which do not grow with them.
    assert exponents["tokens"]["bytes"] == pytest.approx(1, abs=0.25)
    assert exponents["layers"]["bytes"] == pytest.approx(1)
    assert exponents["hidden_size"]["bytes"] == pytest.approx(0, abs=1e-9)
    assert exponents["hidden_size"]["growing bytes"] is None
    assert record["targets"]["tokens, growing bytes"]["reached"] == exponents["tokens"]["growing bytes"]
    assert "exponents of what is extra: bytes" in capsys.readouterr().out


def test_scaling_of_some_dimensions(benchmark, tmp_path):
    record = run(benchmark("scaling"), tmp_path / "record.json", "--dimensions", "r")
    assert list(record["dimensions"]) == ["r"]
    assert record["targets"] == {}


def test_exponents(benchmark):
    exponent = benchmark("scaling").exponent
    assert exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
    assert exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0)
    assert exponent([1, 2, 4], [1, 0, 1]) is None


def test_adapter_io(benchmark, tmp_path, capsys):
    record = run(benchmark("adapter_io"), tmp_path / "record.json")
    figures = record["figures"]
    assert figures.keys() == {"clover", "clover folded", "clover without bases", "lora"}
    assert figures["clover"]["bytes"] > max(
        figures["clover folded"]["bytes"], figures["clover without bases"]["bytes"]
    )
    for name, found in figures.items():
        assert found["difference"].keys() == {"load", "load_low_cpu"}
        assert max(found["difference"].values()) < 1e-4, name
        assert record["seconds"][name].keys() == {"read", "write", "save", "load", "load_low_cpu"}
        assert all(len(seconds) == record["options"]["rounds"] for seconds in record["seconds"][name].values())
    assert record["targets"]["load_v_read"]["reached"] == figures["clover"]["load_v_read"]
    assert "low_cpu ms" in capsys.readouterr().out


def test_grpo(benchmark, tmp_path, capsys):
    pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")
    record = run(benchmark("grpo"), tmp_path / "record.json")
    results = {(result["method"], result["rate"]): result for result in record["results"]}
    rates = {"clover": (1e-3, 2.5e-3, 5e-3), "lora": (2e-4, 5e-4, 1e-3), "pissa": (2e-4, 5e-4, 1e-3)}
    assert results.keys() == {(method, rate) for method in rates for rate in rates[method]}
    for trial, result in results.items():
        assert result["parameters"] == pytest.approx(results["clover", 1e-3]["parameters"], rel=0.2), trial
        for name in ("reward", "length", "gradient_norm"):
            assert len(result[name]) == record["options"]["steps"], trial
        assert all(0 <= value <= 1 for value in result["reward"]), trial
        assert max(result["gradient_norm"]) > 0, trial
    # CLOVER and LoRA start as the base model; the first answers of both are the base's.
    assert results["clover", 1e-3]["reward"][0] == results["lora", 1e-3]["reward"][0]
    assert "best step" in capsys.readouterr().out


def test_grpo_rewards_digits_at_their_place(benchmark):
    pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")
    answers = [" 0467\n95", "0467", "0476", "04670", "04", "0467 is", "", "\n0467"]
    assert benchmark("grpo").reward(answers, ["0467"] * 8) == [1, 1, 0.5, 0.8, 0.5, 0, 0, 0]


# ---------------------------------------------------------------------- pictures


@pytest.fixture
def plots(benchmark):
    pytest.importorskip("matplotlib", reason="needs the plots extra")
    return benchmark("plots")


def test_pictures_of_all_benchmarks(benchmark, plots, tmp_path):
    run(benchmark("decode"), tmp_path / "decode.json")
    run(benchmark("scaling"), tmp_path / "scaling.json", "--dimensions", "tokens", "r")
    run(benchmark("adapter_io"), tmp_path / "adapter_io.json")
    run(benchmark("train_step"), tmp_path / "train_step.json")
    run(benchmark("init_time"), tmp_path / "init_time.json", "--skip-exact-pissa")
    pruning = benchmark("pruning")
    run(pruning, tmp_path / "pruning_minilm.json", "--model", "minilm", "--sweep", "--method", "clover")
    run(pruning, tmp_path / "pruning_minilm-2.json", "--model", "minilm", "--ratio", "qk=0.5")  # newer, but no sweep
    run(pruning, tmp_path / "pruning_smollm2.json", "--model", "smollm2", "--sweep", "--method", "clover")
    made = plots.main(["--results", str(tmp_path), "--out", str(tmp_path / "images")])
    names = ["step", "decode", "growth", "adapter_io", "start", "pruning_minilm", "pruning_smollm2"]
    assert [path.stem for path in made] == names
    assert all(path.stat().st_size > 5000 for path in made)
    assert plots.newest(tmp_path, "pruning_minilm")["file"] == "pruning_minilm.json"


def test_pictures_are_of_the_newest_record_or_of_the_one_named(plots, tmp_path, capsys):
    source = json.loads((FOLDER / "results" / "train_step.json").read_text())
    for name in ("train_step", "train_step-2", "train_step-10", "train_step-old"):
        (tmp_path / f"{name}.json").write_text(json.dumps(source))
    assert plots.newest(tmp_path, "train_step")["file"] == "train_step-10.json"
    assert plots.newest(tmp_path, "train") is None
    out = ["--results", str(tmp_path), "--out", str(tmp_path / "images")]
    made = plots.main([str(tmp_path / "train_step-old.json"), *out])
    assert made == [tmp_path / "images" / "step.png"]
    said = capsys.readouterr().out
    assert "step.png: train_step-old.json" in said
    assert "decode.png: no record of decode" in said
    (tmp_path / "other.json").write_text(json.dumps({"benchmark": "recovery", "options": {}}))
    with pytest.raises(ValueError, match="recovery: expected records of train_step"):
        plots.main([str(tmp_path / "other.json"), *out])
