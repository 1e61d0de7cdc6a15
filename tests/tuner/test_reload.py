"""A saved adapter is the same function after a reload: under another seed, in another precision, without weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import nn

from clover_peft import CloverConfig
from tests.support.adapters import layers
from tests.support.saved_adapters import LAYOUTS, SAVE_BASES, WEIGHTS, load, save_trained, trained_model
from tests.support.tiny import TOLERANCE, build, inputs, logits, relative

# ---------------------------------------------------------------------- the same function again


@pytest.mark.parametrize("save_bases", SAVE_BASES)
@pytest.mark.parametrize("case", LAYOUTS)
def test_reload_under_another_seed_is_the_same_function(case: str, save_bases: bool | str, tmp_path: Path) -> None:
    family, choices = LAYOUTS[case]
    base = logits(build(family), family)
    before = save_trained(tmp_path, family, save_bases=save_bases, **choices)
    after = logits(load(build(family), tmp_path), family)
    assert relative(before, base) > 1e-3
    if save_bases == "folded" and {"r", "rank_pattern"} & choices.keys():
        assert relative(after, before) < TOLERANCE[torch.float32]  # what was applied in two stages is now one matrix
    else:
        assert torch.equal(after, before)


@pytest.mark.parametrize("save_bases", SAVE_BASES)
@pytest.mark.parametrize("case", ["full", "diagonal", "r", "truncate", "all-linear", "fused", "pairs with biases"])
def test_low_cpu_mem_usage_loads_the_same_function(case: str, save_bases: bool | str, tmp_path: Path) -> None:
    family, choices = LAYOUTS[case]
    before = save_trained(tmp_path, family, save_bases=save_bases, **choices)
    model = load(build(family), tmp_path, low_cpu_mem_usage=True)
    assert relative(logits(model, family), before) < TOLERANCE[torch.float32]
    assert not any(tensor.is_meta for tensor in model.state_dict().values())
    merged = logits(model.merge_and_unload(safe_merge=True), family)
    assert relative(merged, before) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("save_bases", [True, False])
def test_reloaded_adapter_trains_on_and_saves_the_same(save_bases: bool, tmp_path: Path) -> None:
    before = save_trained(tmp_path / "first", r=5, save_bases=save_bases)
    model = load(build("llama"), tmp_path / "first", is_trainable=True)
    assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"clover_S"}
    model(**inputs("llama")).logits.square().mean().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
    model.save_pretrained(tmp_path / "second")
    first, second = load_file(tmp_path / "first" / WEIGHTS), load_file(tmp_path / "second" / WEIGHTS)
    assert first.keys() == second.keys()
    for key in first:
        assert torch.equal(first[key], second[key]), key
    assert torch.equal(logits(load(build("llama"), tmp_path / "second"), "llama"), before)


@pytest.mark.parametrize("save_bases", SAVE_BASES)
def test_degenerate_heads_reload_as_they_were(save_bases: bool | str, tmp_path: Path) -> None:
    def degenerate() -> nn.Module:
        model = build("llama")
        with torch.no_grad():
            model.model.layers[0].self_attn.v_proj.weight[:12] = 0  # a zero head
            model.model.layers[1].self_attn.k_proj.weight[13] = model.model.layers[1].self_attn.k_proj.weight[12]
        return model

    with pytest.warns(UserWarning, match="will not be trained"):
        model = trained_model(degenerate(), save_bases=save_bases)
    model.save_pretrained(tmp_path)
    assert torch.isfinite(logits(model, "llama")).all()
    assert torch.equal(logits(load(degenerate(), tmp_path), "llama"), logits(model, "llama"))


@pytest.mark.parametrize("case", LAYOUTS)
def test_reloaded_adapter_merges_into_a_plain_model(case: str, tmp_path: Path) -> None:
    family, choices = LAYOUTS[case]
    before = save_trained(tmp_path, family, **choices)
    base = build(family)
    types = [type(module) for module in base.modules()]
    merged = load(base, tmp_path).merge_and_unload(safe_merge=True)
    assert [type(module) for module in merged.modules()] == types
    assert merged.state_dict().keys() == build(family).state_dict().keys()
    assert relative(logits(merged, family), before) < TOLERANCE[torch.float32]


# ---------------------------------------------------------------------- another precision of the base


def _condition(model: nn.Module) -> float:
    """The largest condition number of any block: S0 is the spectrum that C and E invert."""
    worst = 1.0
    for layer in layers(model):
        for spec in layer.specs["default"]:
            s0 = layer.tensors("default", spec).s0
            worst = max(worst, float((s0[:, 0] / s0[:, -1]).max()))
    return worst


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
@pytest.mark.parametrize("there", [torch.bfloat16, torch.float64])
def test_trained_on_float32_loads_on_another_precision(family: str, there: torch.dtype, tmp_path: Path) -> None:
    model = trained_model(build(family))
    model.save_pretrained(tmp_path)
    with model.disable_adapter():
        base = logits(model, family).double()
    effect = logits(model, family).double() - base
    other = load(build(family, there), tmp_path)
    found = logits(other, family).double()
    with other.disable_adapter():
        found -= logits(other, family).double()
    rounding = TOLERANCE[torch.bfloat16 if there == torch.bfloat16 else torch.float32]
    assert relative(found, effect) < rounding * max(10.0, _condition(model))
    assert relative(found, effect) < 0.5


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_trained_on_bfloat16_loads_on_float32(family: str, tmp_path: Path) -> None:
    model = trained_model(build(family, torch.bfloat16))
    model.save_pretrained(tmp_path)
    other = load(build(family), tmp_path)
    assert relative(logits(other, family), logits(model, family)) < 2 * TOLERANCE[torch.bfloat16]
    for mine, theirs in zip(layers(other), layers(model), strict=True):
        for key, tensor in mine.state_dict().items():
            if "clover_" in key:
                assert tensor.dtype == torch.float32
                assert torch.equal(tensor, theirs.state_dict()[key]), key


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_adapter_stays_in_float32_on_a_bfloat16_base(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    save_trained(tmp_path)
    model = load(build("llama", torch.bfloat16), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert {t.dtype for k, t in model.state_dict().items() if "clover_" in k} == {torch.float32}
    assert logits(model, "llama").dtype == torch.bfloat16


def test_without_bases_another_precision_is_right_or_refused(tmp_path: Path) -> None:
    before = save_trained(tmp_path, save_bases=False)
    base = logits(build("llama"), "llama")
    try:
        model = load(build("llama", torch.bfloat16), tmp_path)
    except ValueError as error:
        assert "save_bases=True" in str(error)  # noqa: PT017 - either outcome is right
    else:
        effect = logits(model, "llama").double()
        with model.disable_adapter():
            effect -= logits(model, "llama").double()
        assert relative(effect, before.double() - base.double()) < 0.5


# ---------------------------------------------------------------------- the meta device


@pytest.mark.parametrize("save_bases", [True, "folded"])
def test_base_on_meta_takes_its_weights_after_the_adapter(save_bases: bool | str, tmp_path: Path) -> None:
    before = save_trained(tmp_path, "opt", save_bases=save_bases)
    with torch.device("meta"):
        base = hf.AutoModelForCausalLM.from_config(build("opt").config)
    model = load(base, tmp_path, low_cpu_mem_usage=True)
    weights = build("opt").state_dict()
    renamed = {name.replace(".base_layer.", "."): name for name in model.get_base_model().state_dict()}
    state = {renamed[name]: tensor for name, tensor in weights.items()}
    model.get_base_model().load_state_dict(state, assign=True, strict=False)
    model.get_base_model().tie_weights()
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model.eval(), "opt"), before)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_base_without_weights_cannot_be_given_bases(low_cpu_mem_usage: bool, tmp_path: Path) -> None:
    save_trained(tmp_path, "opt", save_bases=False)
    with torch.device("meta"):
        base = hf.AutoModelForCausalLM.from_config(build("opt").config)
    with pytest.raises(ValueError, match=r"layers\.0\.\S+: the adapter was saved without its bases.*save_bases=True"):
        load(base, tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert not layers(base)


@pytest.mark.parametrize("action", ["run", "save", "merge", "merge_and_unload", "state_dict"])
@pytest.mark.parametrize("where", ["low_cpu_mem_usage", "meta base"])
def test_adapter_that_was_never_computed_is_not_used(action: str, where: str, tmp_path: Path) -> None:
    if where == "meta base":
        with torch.device("meta"):
            base = hf.AutoModelForCausalLM.from_config(build("opt").config)
        model = get_peft_model(base, CloverConfig())
    else:
        model = get_peft_model(build("opt"), CloverConfig(), low_cpu_mem_usage=True)
    assert len(layers(model)) == 6
    actions = {
        "run": lambda: model(torch.ones(1, 3, dtype=torch.long, device=next(model.parameters()).device)),
        "save": lambda: model.save_pretrained(tmp_path / "adapter"),
        "merge": model.merge_adapter,
        "merge_and_unload": model.merge_and_unload,
        "state_dict": lambda: get_peft_model_state_dict(model),
    }
    message = r"layers\.0\.\S+: cannot \w+ adapter 'default'.*never computed or loaded.*load its weights"
    with pytest.raises(ValueError, match=message):
        actions[action]()
    assert not (tmp_path / "adapter" / WEIGHTS).exists()
    assert not any(layer.merged for layer in layers(model))


# ---------------------------------------------------------------------- beside another adapter


def test_loading_one_adapter_leaves_another_of_the_same_structure_alone(tmp_path: Path) -> None:
    """Bases are shared when an adapter is made; writing another's into it must not reach the first."""
    rounded = build("llama").to(torch.bfloat16).float()
    trained_model(rounded).save_pretrained(tmp_path)
    model = trained_model(build("llama"))
    before = logits(model, "llama")
    config = CloverConfig.from_pretrained(tmp_path)
    config.check_base = False
    model.add_adapter("b", config)
    model.load_adapter(tmp_path, "b")
    assert torch.equal(logits(model, "llama"), before)
    model.set_adapter("b")
    assert not torch.equal(logits(model, "llama"), before)
    model.set_adapter("default")
    assert torch.equal(logits(model, "llama"), before)
