"""scripts/analyze.py: each measure on weights whose answer is known, and adapters of several methods."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from peft import HiraConfig, LoraConfig, LoraGAConfig, get_peft_model
from peft.tuners.lora import preprocess_loraga
from torch import nn
from transformers import AutoModelForCausalLM

from clover_peft import CloverConfig
from clover_peft.experiments.analysis import (
    Change,
    adapter_changes,
    collect_inputs,
    effective_rank,
    left_out_of_adapter,
    measure,
    model_changes,
    moves_base,
    projected_share,
)
from tests.support.tiny import build, inputs, perturb, relative

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from tests.support.tiny import load_script
from tests.support.tiny_chat import make_tokenizer, save_chat_model

script = load_script("analyze")


def orthonormal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).double()).Q


# --- measures ---------------------------------------------------------------------------------------


def test_effective_rank_of_known_spectra():
    assert effective_rank(torch.tensor([3.0])) == pytest.approx(1)
    assert effective_rank(torch.ones(7)) == pytest.approx(7)
    assert effective_rank(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    assert effective_rank(torch.tensor([0.75, 0.25])) == pytest.approx(1.7547654)  # 4 / 3**0.75


def intruders(before: torch.Tensor, after: torch.Tensor, **options: float) -> int:
    return measure(Change("m", before, after), **options)["intruders"]["count"]


def test_intruders_are_new_directions_only():
    u, v = orthonormal(20, 10), orthonormal(30, 10, seed=1)
    before = u @ torch.diag(torch.arange(10.0, 0.0, -1).double()) @ v.T
    assert intruders(before, before) == 0
    assert intruders(before, 3 * before) == 0
    rescaled = u @ torch.diag(torch.arange(1.0, 11.0).double()) @ v.T  # other sizes, the same directions
    assert intruders(before, rescaled) == 0
    new = torch.linalg.qr(torch.cat([u, orthonormal(20, 1, seed=2)], dim=1)).Q[:, -1:]  # in none of the ten old ones
    assert (u.T @ new).abs().max() < 1e-9
    assert intruders(before, before + 100 * new @ v[:, :1].T) == 1
    assert intruders(before, before + 100 * new @ v[:, :1].T, threshold=0.0) == 0
    assert intruders(before, before + 1e-3 * new @ v[:, :1].T) == 0  # too small to show among the leading ones


def test_projected_share_of_known_inputs():
    q = orthonormal(8, 2)
    rest = torch.linalg.qr(torch.cat([q, torch.eye(8).double()[:, :6]], dim=1)).Q[:, 2:]
    rows = 3 * q.T[:1] + 4 * rest.T[:1]
    assert projected_share(rows, q) == pytest.approx(9 / 25)
    assert projected_share(rows, torch.eye(8).double()) == pytest.approx(1)
    assert projected_share(torch.zeros(2, 8).double(), q) == 0


def test_all_measures_of_a_low_rank_change():
    u, v = orthonormal(16, 16), orthonormal(24, 16, seed=1)
    before = u @ v.T
    update = 0.3 * u[:, :2] @ torch.diag(torch.tensor([2.0, 1.0]).double()) @ v[:, 3:5].T
    data = torch.randn(50, 24, generator=torch.Generator().manual_seed(3)).double()
    found = measure(Change("m", before, before + update), data)
    assert found["update"]["rank"] == 2
    assert found["update"]["effective_rank"] == pytest.approx(effective_rank(torch.tensor([2.0, 1.0])), abs=1e-4)
    assert found["update"]["stable_rank"] == pytest.approx(1.25)
    assert found["update"]["norm"] == pytest.approx(0.3 * 5**0.5)
    assert found["update"]["relative"] == pytest.approx(0.3 * 5**0.5 / 4)
    assert found["update"]["singular_values"][:2] == pytest.approx([0.6, 0.3])
    assert found["before"]["singular_values"] == pytest.approx([1.0] * 16)
    assert found["share"]["chance"] == pytest.approx(2 / 24)
    assert found["share"]["trained"] == pytest.approx(projected_share(data, v[:, 3:5]))
    assert json.loads(json.dumps(found)) == found
    assert measure(Change("m", before, before))["update"]["rank"] == 0


# --- changes ----------------------------------------------------------------------------------------

CONFIGS = {  # functions: peft writes into a config that it is given
    "clover": CloverConfig,
    "lora": lambda: LoraConfig(r=2, init_lora_weights=False, target_modules="all-linear"),
    "dora": lambda: LoraConfig(r=2, init_lora_weights=False, use_dora=True, target_modules="all-linear"),
    "hira": lambda: HiraConfig(r=2, init_weights=False, target_modules="all-linear"),
}


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_changes_are_what_merging_does_and_leave_the_model_alone(family, method):
    model = get_peft_model(build(family).double(), CONFIGS[method]())
    perturb(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    changes = {change.name: change for change in adapter_changes(model)}
    assert set(changes) == set(model.base_model.targeted_module_names)
    after = model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    base, merged = build(family).double(), model.merge_and_unload()
    pairs = {change.name: change for change in model_changes(base, merged)}
    assert set(pairs) == set(changes)
    for name, change in pairs.items():
        assert relative(changes[name].after, change.after) < 1e-12
        assert torch.equal(changes[name].before, change.before)
        assert change.before.shape == change.after.shape


def test_a_clover_update_has_full_rank_in_its_heads_and_a_lora_has_not():
    clover = get_peft_model(build("llama").double(), CONFIGS["clover"]())
    perturb(clover)
    for change in adapter_changes(clover):
        assert measure(change)["update"]["rank"] == min(change.before.shape)
    lora = get_peft_model(build("llama").double(), CONFIGS["lora"]())
    assert {measure(change)["update"]["rank"] for change in adapter_changes(lora)} == {2}


def test_inputs_are_those_of_the_base_model_and_hooks_come_off():
    model = get_peft_model(build("llama"), CONFIGS["clover"]())
    perturb(model)
    batch = inputs("llama")
    names = model.base_model.targeted_module_names
    before = [list(module._forward_pre_hooks.values()) for module in model.modules()]
    found = collect_inputs(model, names, [batch, batch], tokens=6)
    assert all(rows.shape[0] == 6 for rows in found.values())
    plain = collect_inputs(build("llama"), names, [batch, batch], tokens=6)
    assert all(torch.equal(found[name], plain[name]) for name in names)
    assert [list(module._forward_pre_hooks.values()) for module in model.modules()] == before
    with pytest.raises(ValueError, match="input_ids"):
        collect_inputs(model, names, [{"nonsense": torch.zeros(1)}])
    assert [list(module._forward_pre_hooks.values()) for module in model.modules()] == before


@pytest.mark.parametrize("size", [1e-2, 1e-4, 3e-6])
def test_the_rank_of_a_small_update_is_not_that_of_its_rounding(size):
    generator = torch.Generator().manual_seed(0)
    before = torch.randn(192, 576, generator=generator) * 0.05
    low_rank = torch.randn(192, 5, generator=generator) @ torch.randn(5, 576, generator=generator)
    after = before + low_rank * (size * before.norm() / low_rank.norm())
    assert measure(Change("m", before, after))["update"]["rank"] == 5


@pytest.mark.parametrize("read_as", [torch.float32, torch.bfloat16])
def test_the_rank_of_a_rounded_update_is_that_before_its_rounding(read_as):
    """Whatever dtype a model is loaded in, its weights have the rounding of the dtype that they were saved in."""
    before = nn.Linear(128, 128, bias=False)
    low_rank = torch.outer(*torch.randn(2, 128)) + torch.outer(*torch.randn(2, 128))
    after = copy.deepcopy(before)
    after.weight.data += low_rank * (0.2 * before.weight.norm() / low_rank.norm())
    one, two = (nn.Sequential(module.to(torch.bfloat16).to(read_as)) for module in (before, after))
    [change] = model_changes(one, two)
    assert measure(change)["update"]["rank"] == 2


@pytest.mark.parametrize(("tokens", "kept"), [(8, (2, 7)), (4, (5,)), (12, (1, 5, 8)), (2, None)])
def test_inputs_are_spread_over_all_batches_and_all_of_a_batch(tokens, kept):
    """Not the first token of each, which has seen nothing before it, nor the first batches alone."""
    batches = [torch.arange(10.0).reshape(1, 10, 1) + 100 * i for i in range(4)]
    model = torch.nn.Sequential(torch.nn.Linear(1, 1))
    found = collect_inputs(model, ["0"], [{"input": batch} for batch in batches], tokens=tokens)["0"]
    where = [divmod(int(row), 100) for row in found.flatten()]
    assert where == ([(i, at) for i in range(4) for at in kept] if kept else [(1, 5), (3, 5)])


def test_every_module_gets_its_mode_back():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(0.5)).train()
    model[1].eval()
    seen = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(module.training))
    collect_inputs(model, ["0"], [{"input": torch.ones(3, 2)}])
    assert seen == [False]
    assert [module.training for module in model.modules()] == [True, True, False]


def test_what_cannot_be_analysed_is_refused():
    model = get_peft_model(build("llama"), CONFIGS["lora"]())
    model.merge_adapter()
    with pytest.raises(ValueError, match="expected an unmerged adapter on float weights"):
        list(adapter_changes(model))
    with pytest.raises(ValueError, match="expected two models of one architecture"):
        list(model_changes(torch.nn.Sequential(), torch.nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r"0: expected the shape \(3, 2\) in both models, found \(4, 2\)"):
        list(model_changes(torch.nn.Sequential(torch.nn.Linear(2, 3)), torch.nn.Sequential(torch.nn.Linear(2, 4))))
    with pytest.raises(ValueError, match="found None in the other"):
        list(model_changes(torch.nn.Sequential(torch.nn.Linear(2, 3)), torch.nn.Sequential()))


# --- the script -------------------------------------------------------------------------------------


def test_the_script_compares_adapters_and_models(tmp_path, capsys):
    save_chat_model(tmp_path / "model")
    (tmp_path / "texts.txt").write_text("one text\n\nanother text that is longer\n")
    for name in ("clover", "lora"):
        config = CONFIGS[name]()
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), config)
        perturb(model)
        model.save_pretrained(tmp_path / name / "adapter")
        model.merge_and_unload().save_pretrained(tmp_path / name / "merged")
    common = ["--model", str(tmp_path / "model"), "--texts", str(tmp_path / "texts.txt")]
    adapters = [o for name in ("clover", "lora") for o in ("--adapter", str(tmp_path / name / "adapter"))]
    assert script.main([*adapters, *common, "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "| clover | k_proj | 2 |" in shown
    assert "| lora | down_proj | 2 | 2.0 |" in shown
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {f"{n}.png" for n in ("update", "intruders", "similarities", "share", "singular_values")} | {
        "analysis.json"
    }
    record = json.loads((tmp_path / "out" / "analysis.json").read_text())
    pair = ["--before", str(tmp_path / "model"), "--after", str(tmp_path / "clover" / "merged"), "--no-pictures"]
    assert script.main([*pair, "--out", str(tmp_path / "pair")]) == 0
    of_models = json.loads((tmp_path / "pair" / "analysis.json").read_text())["modules"]["after"]
    by_name = {module["name"]: module for module in record["modules"]["clover"]}
    for module in of_models:
        expected = by_name[module["name"]]["update"]
        assert module["update"]["effective_rank"] == pytest.approx(expected["effective_rank"], rel=1e-3)
    assert script.main([*adapters, *common, "--out", str(tmp_path / "out")]) == 2
    assert "found an analysis in it" in capsys.readouterr().err
    same = ["--before", str(tmp_path / "model"), "--after", str(tmp_path / "model"), "--out", str(tmp_path / "none")]
    assert script.main(same) == 2
    assert "expected other weights than before, found the same" in capsys.readouterr().err
    assert script.main([*adapters, "--top", "0", "--out", str(tmp_path / "none")]) == 2
    assert "--top: expected at least 1, found 0" in capsys.readouterr().err
    assert script.main(["--out", str(tmp_path / "none")]) == 2
    assert "expected --adapter, or --before and --after" in capsys.readouterr().err
    assert script.main([*adapters, "--label", "a", "--label", "a", "--out", str(tmp_path / "none")]) == 2
    assert "expected a name of its own for each adapter" in capsys.readouterr().err


STARTS = [True, False, "gaussian", "mica", "orthogonal", "pissa", "pissa_niter_4", "olora", "lora_ga"]


@pytest.mark.parametrize("start", STARTS)
def test_starts_of_lora_that_move_the_base_are_known(start):
    """What peft does to the base's weights decides."""
    base, data = build("llama"), inputs("llama")
    config = LoraConfig(r=2, init_lora_weights=start, target_modules=["q_proj", "v_proj"])
    if start == "lora_ga":
        config.lora_ga_config = LoraGAConfig()
        preprocess_loraga(base, config, lambda: base(**data, labels=data["input_ids"]).loss.backward())
    before = {name: weight.clone() for name, weight in base.named_parameters()}
    model = get_peft_model(base, config).base_model.model
    after = {name.replace("base_layer.", ""): weight for name, weight in model.named_parameters()}
    assert moves_base(config) == any(not torch.equal(before[name], after[name]) for name in before)


def test_an_adapter_that_moves_the_base_is_compared_with_the_whole_base(tmp_path, capsys):
    """PiSSA leaves a residual in the base's weights: against that, all of the principal part would be an update."""
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj", "v_proj"]))
    with pytest.raises(ValueError, match="'default': expected one that leaves the base as it is"):
        list(adapter_changes(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1.001)
    model.save_pretrained(tmp_path / "adapter")
    make_tokenizer().save_pretrained(tmp_path / "base")
    arguments = ["--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--no-pictures"]
    assert script.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    [record] = json.loads((tmp_path / "out" / "analysis.json").read_text())["modules"].values()
    assert len(record) == 4
    assert all(0 < module["update"]["relative"] < 1e-3 for module in record)  # of the principal part's
    assert "| q_proj | 2 |" in capsys.readouterr().out


def test_weights_that_diverged_are_named_and_zero_weights_measured():
    weight = torch.randn(4, 3)
    with pytest.raises(ValueError, match="up_proj: expected finite weights"):
        measure(Change("up_proj", weight, weight * float("nan")))
    found = measure(Change("up_proj", torch.zeros(4, 3), weight))
    assert found["update"]["relative"] == float("inf")
    assert set(found["intruders"]["similarities"]) == {0.0}


@pytest.mark.parametrize(
    ("family", "config", "left_out"),
    [
        (
            "mixtral",
            lambda: LoraConfig(
                r=2,
                init_lora_weights=False,
                target_modules=["q_proj"],
                target_parameters=["experts.gate_up_proj", "experts.down_proj"],
            ),
            "model.layers.*.mlp.experts (2)",
        ),
        (
            "mixtral",
            lambda: CloverConfig(target_modules=["v_proj"], target_parameters=["experts.down_proj"]),
            "model.layers.*.mlp.experts (2)",
        ),
        (
            "llama",
            lambda: LoraConfig(
                r=2,
                init_lora_weights=False,
                target_modules=["q_proj", "embed_tokens"],
                modules_to_save=["lm_head"],
            ),
            "model.embed_tokens (1), lm_head (1)",
        ),
        (
            "llama",
            lambda: LoraConfig(
                r=2, init_lora_weights=False, target_modules=["q_proj"], trainable_token_indices=[1, 2]
            ),
            "model.embed_tokens (1), lm_head (1)",
        ),
    ],
    ids=["experts", "experts, CLOVER", "embedding and whole modules", "tokens"],
)
def test_what_is_not_measured_is_named(tmp_path, capsys, family, config, left_out):
    (tmp_path / "texts.txt").write_text("one text\n\nanother text that is longer\n")
    if family == "llama":
        save_chat_model(tmp_path / "base")
    else:
        build(family).save_pretrained(tmp_path / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config())
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    command = ["--adapter", str(tmp_path / "adapter"), "--model", str(tmp_path / "base"), "--no-pictures"]
    command += ["--label", "it", *(["--texts", str(tmp_path / "texts.txt")] if family == "llama" else [])]
    assert script.main([*command, "--out", str(tmp_path / "out")]) == 0, capsys.readouterr().err
    assert f"it: changed too, but not measured, as they are no projections: {left_out}\n" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "analysis.json").read_text())
    assert len(record["left_out"]["it"]) == sum(int(part[1:-1]) for part in left_out.replace(",", "").split()[1::2])


def test_models_that_differ_in_what_is_not_measured_are_not_called_the_same(tmp_path, capsys):
    model = build("mixtral")
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "experts" in name or "embed_tokens" in name:
                parameter.mul_(1.01)
    model.save_pretrained(tmp_path / "after")
    command = ["--before", str(tmp_path / "before"), "--after", str(tmp_path / "after"), "--no-pictures"]
    assert script.main([*command, "--out", str(tmp_path / "out")]) == 2
    message = capsys.readouterr().err
    assert "others in model.embed_tokens.weight (1), model.layers.*.mlp.experts.gate_up_proj (2)" in message
    assert "alone, which are not measured" in message
    with torch.no_grad():
        model.get_parameter("model.layers.0.self_attn.q_proj.weight").mul_(1.01)
    model.save_pretrained(tmp_path / "more")
    command[3] = str(tmp_path / "more")
    assert script.main([*command, "--out", str(tmp_path / "out")]) == 0
    assert "after: changed too, but not measured" in capsys.readouterr().out


def test_saved_biases_and_resized_embeddings_are_named():
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["c_attn"], bias="all")
    model = get_peft_model(build("gpt2"), config)
    saved = ["transformer.h.0.attn.c_attn.base_layer.bias", "transformer.wte.weight"]
    named = ["transformer.h.0.attn.c_attn.bias", "transformer.wte.weight"]
    assert left_out_of_adapter(model, [*saved, "transformer.h.0.attn.c_attn.lora_A.weight"]) == named
