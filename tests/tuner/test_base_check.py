"""An adapter is refused on another base model than its own, and nothing changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from clover_peft import CloverConfig, CloverLayer
from clover_peft.tuner.base_check import fingerprint
from tests.support.adapters import layers
from tests.support.saved_adapters import LAYOUTS, WEIGHTS, edit, edit_config, kept, load, save_trained, trained_model
from tests.support.tiny import build, logits, relative

# ---------------------------------------------------------------------- another base


@pytest.mark.parametrize("save_bases", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_base_of_another_seed_is_refused_by_name(save_bases: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained_model(build("llama", dtype), save_bases=save_bases)
    model.save_pretrained(tmp_path)
    base = build("llama", dtype, seed=1)
    before = logits(base, "llama")
    message = (
        r"^model\.layers\.0\.self_attn\.k_proj \(k, block \d\): expected the weights of the base.*check_base = False"
    )
    with pytest.raises(ValueError, match=message):
        load(base, tmp_path)
    assert not layers(base)
    assert torch.equal(logits(base, "llama"), before)


@pytest.mark.parametrize("case", LAYOUTS)
def test_a_load_compares_the_first_features_of_every_block(case: str) -> None:
    family, choices = LAYOUTS[case]
    model = get_peft_model(build(family), CloverConfig(**choices))
    for layer in layers(model):
        for spec in layer.specs["default"]:
            found, stored = (
                fingerprint(model.base_model.model, layer.base_weight, spec),
                layer.tensors("default", spec).norm,
            )
            assert found.shape == (spec.blocks, min(8, spec.size))
            torch.testing.assert_close(found, stored[:, :8], rtol=1e-6, atol=0)


def test_first_module_that_differs_is_named(tmp_path: Path) -> None:
    save_trained(tmp_path)
    base, other = build("llama"), build("llama", seed=1)
    base.model.layers[1].mlp.up_proj = other.model.layers[1].mlp.up_proj
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.up_proj \(up, block \d\)"):
        load(base, tmp_path)


def test_partner_that_differs_is_noticed(tmp_path: Path) -> None:
    save_trained(tmp_path)
    base, other = build("llama"), build("llama", seed=1)
    base.model.layers[1].self_attn.o_proj = other.model.layers[1].self_attn.o_proj
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.v_proj \(v, block \d\)"):
        load(base, tmp_path)


@pytest.mark.parametrize(
    "shape", [dict(hidden_size=24), dict(intermediate_size=96), dict(num_hidden_layers=3)], ids=str
)
def test_base_of_another_shape_is_refused_by_name(shape: dict, tmp_path: Path) -> None:
    save_trained(tmp_path)
    base = build("llama", **shape)
    before = logits(base, "llama")
    with pytest.raises(ValueError, match=r"^model\.layers\.\d\.\S+ ?.*: expected .*, found "):
        load(base, tmp_path)
    assert not layers(base)
    assert torch.equal(logits(base, "llama"), before)


@pytest.mark.parametrize("shape", [dict(head_dim=6), dict(intermediate_size=96)], ids=str)
def test_base_of_another_shape_is_refused_without_the_check_too(shape: dict, tmp_path: Path) -> None:
    save_trained(tmp_path, check_base=False)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.\S+: expected clover_\w+ of shape .*, found "):
        load(build("llama", **shape), tmp_path)


def test_base_with_fewer_layers_is_refused(tmp_path: Path) -> None:
    save_trained(tmp_path)
    base = build("llama")
    del base.model.layers[1]
    base.config.num_hidden_layers = 1
    with pytest.raises(ValueError, match=r"layers\.1\."):
        load(base, tmp_path)
    assert not layers(base)


@pytest.mark.parametrize("how", ["saved so", "changed in the file", "changed in the config"])
def test_check_base_false_lets_another_base_through(how: str, tmp_path: Path) -> None:
    save_trained(tmp_path, check_base=how != "saved so")
    kwargs = {}
    if how == "changed in the file":
        edit_config(tmp_path, check_base=False)
    elif how == "changed in the config":
        kwargs["config"] = CloverConfig.from_pretrained(tmp_path)
        kwargs["config"].check_base = False
    model = load(build("llama", seed=1), tmp_path, **kwargs)
    expected = load_file(tmp_path / WEIGHTS)
    found = get_peft_model_state_dict(model)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


def test_second_adapter_for_another_base_leaves_the_first(tmp_path: Path) -> None:
    trained_model(build("llama", seed=1)).save_pretrained(tmp_path)
    model = trained_model(build("llama"))
    with kept(model), pytest.raises(ValueError, match=r"k_proj \(k, block \d\): expected the weights of the base"):
        model.load_adapter(tmp_path, adapter_name="second")


def test_another_base_is_noticed_with_low_cpu_mem_usage(tmp_path: Path) -> None:
    save_trained(tmp_path)
    base = build("llama", seed=1)
    with pytest.raises(ValueError, match=r"k_proj \(k, block \d\): expected the weights of the base"):
        load(base, tmp_path, low_cpu_mem_usage=True)
    assert not layers(base)


# ---------------------------------------------------------------------- S alone, and what it stands on


@pytest.mark.parametrize("module", ["self_attn.v_proj", "self_attn.k_proj", "mlp.up_proj"])
def test_sign_of_a_basis_that_differs_is_refused(module: str, tmp_path: Path) -> None:
    """Singular vectors are defined up to sign, which S0 does not show; the probe does."""
    save_trained(tmp_path, r=5, save_bases=False)
    key = f"base_model.model.model.layers.1.{module}.clover_probe.weight"

    def flip(tensors: dict[str, Tensor]) -> None:
        direction = int(tensors[key][0].abs().argmax())
        tensors[key][0, direction] *= -1

    edit(tmp_path, flip)
    base = build("llama")
    message = (
        rf"layers\.1\.{module} \(\w+\): the adapter was saved with save_bases=False.*are not those.*save_bases=True"
    )
    with pytest.raises(ValueError, match=message):
        load(base, tmp_path)
    assert not layers(base)
    with pytest.raises(ValueError, match=message):
        load(base, tmp_path, low_cpu_mem_usage=True)
    assert not layers(base)


def _isotropic(noise: float = 0.0) -> nn.Module:
    """A model whose value-output heads have equal singular values, so that any rotation of their bases will do."""
    model = build("llama", num_key_value_heads=4)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.v_proj.weight, layer.self_attn.o_proj.weight):
                weight.copy_(torch.linalg.qr(torch.randn(48, 48, generator=generator))[0])
                weight.add_(noise * torch.randn(48, 48, generator=generator))
    return model


def test_ambiguous_bases_are_refused_unless_they_are_saved(tmp_path: Path) -> None:
    """On a base that rounding alone sets apart, the recomputed bases are others; S alone would be another function."""
    for save_bases in (True, False):
        model = trained_model(_isotropic(), target_modules=["v_proj"], save_bases=save_bases)
        model.save_pretrained(tmp_path / str(save_bases))
    before = logits(model, "llama")
    assert torch.equal(logits(load(_isotropic(), tmp_path / "False"), "llama"), before)
    with pytest.raises(ValueError, match=r"v_proj \(v\): the adapter was saved with save_bases=False"):
        load(_isotropic(1e-6), tmp_path / "False")
    assert relative(logits(load(_isotropic(1e-6), tmp_path / "True"), "llama"), before) < 1e-4


def test_a_folded_adapter_knows_its_base(tmp_path: Path) -> None:
    save_trained(tmp_path, save_bases="folded")
    with pytest.raises(ValueError, match="expected the weights of the base"):
        load(build("llama", seed=1), tmp_path)


def test_another_base_of_the_same_statistics_is_noticed(tmp_path: Path) -> None:
    """Wide random weights have nearly the same singular values; the norms of their rows tell them apart."""
    shape = dict(hidden_size=512, intermediate_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    model = get_peft_model(build("llama", torch.bfloat16, **shape), CloverConfig())
    model.save_pretrained(tmp_path)
    load(build("llama", torch.bfloat16, **shape), tmp_path)
    with pytest.raises(ValueError, match="expected the weights of the base"):
        load(build("llama", torch.bfloat16, seed=1, **shape), tmp_path)


@pytest.mark.parametrize("reader", [None, CloverConfig, PeftConfig])
def test_a_load_that_is_refused_leaves_no_layers(reader, tmp_path: Path) -> None:
    save_trained(tmp_path)
    base = build("llama", seed=9)
    config = None if reader is None else reader.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected the weights of the base model"):
        PeftModel.from_pretrained(base, tmp_path, config=config)
    assert not any(isinstance(module, CloverLayer) for module in base.modules())
