"""Modules that share a weight: two layers, or the embedding and the head."""

from __future__ import annotations

import copy
import inspect
import warnings
from pathlib import Path

import pytest
import torch
import transformers as hf
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

import clover_peft
from clover_peft import CloverConfig, CloverModel
from tests.support.adapters import adapted
from tests.support.tiny import TOLERANCE, build, logits, perturb, relative

TARGETS = ["k_proj", "v_proj", "up_proj"]


def tied_layers(dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model whose second layer has the weights of its first."""
    model = build("llama", dtype, attention_bias=True)
    first, second = model.model.layers
    for path, module in first.named_modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(second.get_submodule(path), name, parameter)
    return model


def tied_head(dtype: torch.dtype = torch.float32) -> nn.Module:
    model = build("llama", dtype, tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


CASES = {"layers": (tied_layers, TARGETS), "head": (tied_head, ["lm_head"])}


def shared(model: nn.Module) -> set[frozenset[str]]:
    """The groups of parameters that are one, without the tuner layers in their names."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name.replace(".base_layer", "").removeprefix("base_model.model."))
    return {frozenset(group) for group in groups.values() if len(group) > 1}


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", CASES)
def test_merged_computes_what_unmerged_does_and_unmerging_restores_the_bits(case, dtype, copied) -> None:
    make, targets = CASES[case]
    base = make(dtype)
    before, groups = logits(base, "llama"), shared(base)
    model = adapted(model=base, target_modules=targets)
    unmerged = logits(model, "llama")
    assert relative(unmerged, before) > TOLERANCE[dtype]
    model.merge_adapter()
    if copied:
        model = copy.deepcopy(model)
    assert relative(logits(model, "llama"), unmerged) <= TOLERANCE[dtype]
    model.unmerge_adapter()
    assert torch.equal(logits(model, "llama"), unmerged)
    assert shared(model) == groups
    with model.disable_adapter():
        assert torch.equal(logits(model, "llama"), before)


@pytest.mark.parametrize("case", CASES)
def test_one_of_two_modules_merged_leaves_the_other(case: str) -> None:
    make, targets = CASES[case]
    base = make()
    weights = {name: p.clone() for name, p in base.named_parameters(remove_duplicate=False)}
    chosen = {path for path, _ in base.named_modules() if path.endswith(tuple(targets)) and "layers.1" not in path}
    model = adapted(model=base, target_modules=chosen)
    unmerged = logits(model, "llama")
    merged = model.merge_and_unload()
    assert relative(logits(merged, "llama"), unmerged) <= TOLERANCE[torch.float32]
    for name, parameter in merged.named_parameters(remove_duplicate=False):
        if not name.rpartition(".")[0].endswith(tuple(chosen)):
            assert torch.equal(parameter, weights[name]), name


@pytest.mark.parametrize("case", CASES)
def test_merged_weights_follow_the_model(case: str) -> None:
    make, targets = CASES[case]
    model = adapted(model=make(), target_modules=targets)
    model.merge_adapter()
    groups_before, merged = shared(model), logits(model, "llama")
    model.to(torch.float64)
    assert relative(logits(model, "llama"), merged.double()) <= TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert shared(model) > groups_before
    assert {p.dtype for n, p in model.named_parameters() if "clover_" not in n} == {torch.float64}


def test_a_merged_head_is_saved_and_loaded(tmp_path) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(no implementation exists|lead to complications).*")
        model = adapted(model=tied_head(), target_modules=["lm_head", "v_proj"])
        merged = model.merge_and_unload()
    assert not merged.config.tie_word_embeddings
    merged.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, "llama"), logits(merged, "llama"))


@pytest.mark.filterwarnings("ignore:.*use_mamba_kernels.*")
@pytest.mark.parametrize("targets", [TARGETS, ["lm_head"], [*TARGETS, "lm_head"]], ids=str)
def test_zamba_whose_layers_share_an_attention_block(targets: list[str], tmp_path: Path) -> None:
    sizes = dict(vocab_size=96, hidden_size=48, num_hidden_layers=4, intermediate_size=96, num_attention_heads=4)
    mamba = dict(n_mamba_heads=2, mamba_d_state=8, mamba_dt_rank=4, layers_block_type=["mamba", "hybrid"] * 2)
    torch.manual_seed(0)
    base = hf.ZambaForCausalLM(hf.ZambaConfig(**sizes, **mamba, num_key_value_heads=4, pad_token_id=0))
    for parameter in base.parameters():
        nn.init.normal_(parameter, std=0.2)
    base.eval().requires_grad_(False)

    def run(model: nn.Module) -> Tensor:
        with torch.no_grad():
            return model(input_ids=torch.arange(3, 17).view(2, 7), use_cache=False).logits

    before = run(base)
    model = adapted(model=base, target_modules=targets, head_dim=24)
    unmerged = run(model)
    assert relative(unmerged, before) > 1e-3
    model.merge_adapter()
    assert relative(run(model), unmerged) <= TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert torch.equal(run(model), unmerged)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(run(hf.ZambaForCausalLM.from_pretrained(tmp_path).eval()), run(merged))
    assert relative(run(merged), unmerged) <= TOLERANCE[torch.float32]


@pytest.mark.parametrize("family", ["t5", "bart", "whisper", "bert"])
def test_a_merged_head_leaves_a_model_that_is_saved_whole(family: str, tmp_path: Path) -> None:
    model = build(family)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    model = get_peft_model(model, CloverConfig(target_modules=[head]))
    perturb(model)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(type(merged).from_pretrained(tmp_path).eval(), family), logits(merged, family))


@pytest.mark.parametrize("case", CASES)
def test_merging_onto_another_base(case: str) -> None:
    make, targets = CASES[case]
    model = adapted(model=make(), target_modules=targets)
    assert relative(logits(clover_peft.merge_onto(model, make()), "llama"), logits(model, "llama")) <= 1e-5


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["v_proj"], "trainable_token_indices": [5]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:.*tie.*")
def test_what_is_merged_onto_a_tied_base_is_saved_and_loaded(options: dict, tmp_path: Path) -> None:
    model = get_peft_model(tied_head(), CloverConfig(**options))
    perturb(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "clover_S" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    expected = logits(model, "llama")
    base = clover_peft.merge_onto(model, tied_head())
    assert relative(logits(base, "llama"), expected) <= 1e-5
    base.save_pretrained(tmp_path)
    loaded = hf.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(loaded, "llama"), logits(base, "llama"))


def test_trained_modules_stay_tied_as_with_lora() -> None:
    options = dict(target_modules=["v_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    for config in (CloverConfig(**options), LoraConfig(**options)):
        model = get_peft_model(tied_head(), config)
        inner = model.get_base_model()
        head, embedding = (m.modules_to_save["default"] for m in (inner.lm_head, inner.model.embed_tokens))
        assert head.weight is embedding.weight


def test_peft_asks_a_tuner_which_modules_to_tie_with_these_arguments() -> None:
    for name in ("_add_modules_to_save_to_tie", "_add_targets_to_tie"):
        expected = list(inspect.signature(getattr(BaseTuner, name)).parameters)
        assert list(inspect.signature(getattr(CloverModel, name)).parameters) == expected


@pytest.mark.parametrize(
    "names", [["lm_head"], ["lm_head", "embed_tokens"], ["model.embed_tokens"], ["o_proj", "lm_head"]]
)
def test_modules_are_tied_and_trained_as_peft_does_for_lora(names: list[str]) -> None:
    found = []
    for kind in (CloverConfig, LoraConfig):
        config = kind(target_modules=["v_proj"], modules_to_save=list(names), ensure_weight_tying=True)
        model = get_peft_model(tied_head(), config)
        trained = {n for n, p in model.named_parameters() if p.requires_grad and "modules_to_save" in n}
        groups = {group for group in shared(model) if any("modules_to_save" in name for name in group)}
        found.append((trained, groups, set(config.modules_to_save), config.modules_to_tie))
    assert found[0] == found[1]
    assert found[0][1]


def test_tied_trained_modules_are_saved_and_loaded(tmp_path) -> None:
    options = dict(target_modules=["v_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = adapted(model=tied_head(), **options)
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(1.5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tied_head(), tmp_path).eval()
    assert torch.equal(logits(again, "llama"), logits(model, "llama"))


def test_a_target_cannot_be_kept_tied() -> None:
    model = tied_head()
    before = logits(model, "llama")
    with pytest.raises(ValueError, match=r"lm_head: expected ensure_weight_tying to tie modules in modules_to_save"):
        get_peft_model(model, CloverConfig(target_modules=["lm_head"], ensure_weight_tying=True))
    assert not any("clover" in name for name, _ in model.named_modules())
    assert torch.equal(logits(model, "llama"), before)


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.up_proj"])
def test_a_module_that_two_layers_run_is_refused(name: str) -> None:
    """Its adapter would be found by one of them, and a merge would change both."""
    model = build("llama")
    first, second = model.model.layers
    parent, _, child = name.rpartition(".")
    setattr(second.get_submodule(parent), child, first.get_submodule(name))
    before = logits(model, "llama")
    with pytest.raises(
        ValueError, match=rf"layers\.0\.{name}: expected a module at one place, .* at model\.layers\.1"
    ):
        get_peft_model(model, CloverConfig())
    assert not any("clover" in name for name, _ in model.named_modules())
    assert torch.equal(logits(model, "llama"), before)
    others = get_peft_model(model, CloverConfig(exclude_modules=[name]))
    assert torch.equal(logits(others, "llama"), before)


@pytest.mark.parametrize("part", ["mlp", "self_attn.o_proj"])
def test_shared_parts_around_targets_are_one_function(part: str, tmp_path: Path) -> None:
    """A part that is shared whole has its targets at one place each; a shared partner is only read."""

    def shared() -> nn.Module:
        model = build("llama")
        first, second = model.model.layers
        parent, _, child = part.rpartition(".")
        setattr(second.get_submodule(parent), child, first.get_submodule(part))
        return model

    model = get_peft_model(shared(), CloverConfig())
    perturb(model)
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(shared(), tmp_path, is_trainable=True), "llama"), expected)
    model.merge_adapter()
    assert relative(logits(model, "llama"), expected) < TOLERANCE[torch.float32]
    model.unmerge_adapter()
    assert torch.equal(logits(model, "llama"), expected)
    if part != "mlp":  # which no head has
        with pytest.raises(ValueError, match=r"o_proj: expected weights of its own, found them tied to"):
            clover_peft.prune(model.unload(), 0.5)


def test_dequantising_keeps_weights_tied() -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs the quant extra: pip install clover-peft[quant]")
    model = build("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    quantised = bnb.nn.Linear8bitLt(48, 24, bias=False, has_fp16_weights=False)
    quantised.load_state_dict(first.v_proj.state_dict())
    first.v_proj = second.v_proj = quantised.to("cpu")
    before = logits(model, "llama")
    first.q_proj, second.q_proj = (bnb.nn.Linear4bit(48, 48, bias=False).to("cpu") for _ in range(2))
    second.q_proj.weight = first.q_proj.weight
    clover_peft.dequantize(model)
    assert type(first.v_proj) is nn.Linear
    assert second.v_proj is first.v_proj
    assert type(first.q_proj) is nn.Linear
    assert second.q_proj.weight is first.q_proj.weight
    first.q_proj, second.q_proj = (layer.self_attn.q_proj for layer in build("llama").model.layers)
    assert relative(logits(model, "llama"), before) <= 3e-2
