"""A file holds the triangles of triangular bases; what it gives back is the same to the bit, however it is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from clover_peft import CloverConfig, hotswap_adapter
from clover_peft.linalg.triangles import unpack
from tests.support.adapters import layers
from tests.support.saved_adapters import WEIGHTS, edit, load, trained_model
from tests.support.tiny import build, logits


def _plain(tensors: dict[str, Tensor]) -> None:
    """The form that earlier versions wrote: whole matrices."""
    for key in [key for key in tensors if ".clover_L." in key]:
        packed = tensors.pop(key)
        d = tensors[key.replace("clover_L", "clover_norm")].shape[1]
        tensors[key.replace("clover_L", "clover_U")] = unpack(packed, d)


def _by_transformers(base: nn.Module, folder: Path) -> nn.Module:
    base.load_adapter(str(folder))
    return base


def _by_transformers_from_a_state_dict(base: nn.Module, folder: Path) -> nn.Module:
    config = CloverConfig.from_pretrained(folder)
    base.load_adapter(peft_config=config, adapter_state_dict=load_file(folder / WEIGHTS))
    return base


def _by_transformers_from_a_subfolder(base: nn.Module, folder: Path) -> nn.Module:
    if Version(transformers.__version__) < Version("5.23"):  # 5.18 does not; those between were not tried
        pytest.skip("this transformers finds no adapter in a subfolder, a LoRA neither")
    base.load_adapter(str(folder.parent), adapter_kwargs={"subfolder": folder.name})
    return base


def _by_transformers_from_the_hub(base: nn.Module, folder: Path) -> nn.Module:
    """From the hub's cache, as after a download."""
    revision, cached = "0" * 40, folder.parent / "hub" / "models--someone--adapter"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(revision)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / revision)
    base.load_adapter(
        "someone/adapter", adapter_kwargs={"cache_dir": str(folder.parent / "hub"), "local_files_only": True}
    )
    return base


def _by_hotswap(base: nn.Module, folder: Path) -> nn.Module:
    model = trained_model(base, seed=5)
    hotswap_adapter(model, str(folder))
    return model


WAYS: dict[str, Callable[[nn.Module, Path], nn.Module]] = {
    "peft": load,
    "low_cpu_mem_usage": lambda base, folder: load(base, folder, low_cpu_mem_usage=True),
    "is_trainable": lambda base, folder: load(base, folder, is_trainable=True).eval(),
    "hotswap": _by_hotswap,
    "transformers": _by_transformers,
    "transformers, state dict": _by_transformers_from_a_state_dict,
    "transformers, subfolder": _by_transformers_from_a_subfolder,
    "transformers, hub": _by_transformers_from_the_hub,
}


def _tensors(model: nn.Module) -> list[dict[str, Tensor]]:
    return [
        {name: tensor for name, tensor in layer.state_dict().items() if ".default." in name} for layer in layers(model)
    ]


def _is_the_same(model: nn.Module, saved: nn.Module) -> None:
    for found, expected in zip(_tensors(model), _tensors(saved), strict=True):
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name


@pytest.mark.parametrize("form", ["packed", "plain"])
@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_load_gives_the_same_bits(way: str, form: str, tmp_path: Path) -> None:
    saved = trained_model(build("llama"))
    saved.save_pretrained(tmp_path / "adapter")
    if form == "plain":
        edit(tmp_path / "adapter", _plain)
    tensors = load_file(tmp_path / "adapter" / WEIGHTS)
    assert any("clover_L" in key for key in tensors) == (form == "packed")
    model = WAYS[way](build("llama"), tmp_path / "adapter").eval()
    _is_the_same(model, saved)
    assert torch.equal(logits(model, "llama"), logits(saved, "llama"))


@pytest.mark.parametrize("way", ["peft", "transformers"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "phi3", "opt"])
def test_other_layouts_keep_their_bits(family: str, way: str, tmp_path: Path) -> None:
    choices = dict(target_modules=r".*\.(qkv_proj|k_proj|v_proj)", cross_layer=family != "opt")
    saved = trained_model(build(family), **choices)
    saved.save_pretrained(tmp_path / "adapter")
    assert any("clover_L" in key for key in load_file(tmp_path / "adapter" / WEIGHTS))
    _is_the_same(WAYS[way](build(family), tmp_path / "adapter"), saved)


def test_a_default_file_is_less_than_twice_a_loras(tmp_path: Path) -> None:
    model = trained_model(build("llama", head_dim=64, intermediate_size=512))
    model.save_pretrained(tmp_path / "clover")
    numbers = sum(p.numel() for name, p in model.named_parameters() if "clover_S" in name)
    lora = get_peft_model(
        build("llama", head_dim=64, intermediate_size=512), LoraConfig(r=8, target_modules="all-linear")
    )
    lora.save_pretrained(tmp_path / "lora")
    per_number = [
        (tmp_path / name / WEIGHTS).stat().st_size / count
        for name, count in (
            ("clover", numbers),
            ("lora", sum(p.numel() for n, p in lora.named_parameters() if "lora_" in n)),
        )
    ]
    assert per_number[0] < 2 * per_number[1]


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_bases_that_are_not_triangular_are_saved_whole(way: str, tmp_path: Path) -> None:
    """Those of degenerate blocks, in adapters of earlier versions, which did not limit the condition number."""
    saved = trained_model(build("llama"))
    layers(saved)[0].clover_U["default"].weight[1, 2, 3] = 1e-3
    saved.save_pretrained(tmp_path)
    keys = {key.removeprefix("base_model.model.model.layers.") for key in load_file(tmp_path / WEIGHTS)}
    kept = {f"{i}.self_attn.k_proj.clover_{name}.weight" for i, name in ((0, "U"), (1, "L"))}
    assert kept == {key for key in keys if "k_proj" in key and key.split(".")[-2] in ("clover_U", "clover_L")}
    _is_the_same(WAYS[way](build("llama"), tmp_path), saved)


@pytest.mark.parametrize("way", ["peft", "transformers"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t[:, :-1].contiguous(), r"k_proj: expected clover_U of shape \(2, 12, 12\), found \(2, 77\)"),
        (lambda t: t[:1].contiguous(), r"k_proj: expected clover_U of shape \(2, 12, 12\), found \(1, 78\)"),
        (lambda t: t.flatten(), r"k_proj: expected clover_U of shape \(2, 12, 12\), found \(156,\)"),
        (lambda t: torch.full_like(t, torch.nan), r"k_proj: clover_U\S* in the adapter's file has NaN"),
    ],
)
def test_a_damaged_triangle_is_refused(way: str, spoil: Callable, message: str, tmp_path: Path) -> None:
    trained_model(build("llama")).save_pretrained(tmp_path)
    key = "base_model.model.model.layers.1.self_attn.k_proj.clover_L.weight"
    edit(tmp_path, lambda tensors: tensors.update({key: spoil(tensors[key])}))
    base = build("llama")
    with pytest.raises(ValueError, match=message):
        WAYS[way](base, tmp_path)
    assert not layers(base)


def test_a_state_dict_has_its_own_copy() -> None:
    model = trained_model(build("llama"))
    before = [{name: tensor.clone() for name, tensor in each.items()} for each in _tensors(model)]
    state = get_peft_model_state_dict(model)
    state[next(key for key in state if "clover_L" in key)].zero_()
    assert all(torch.equal(a[name], b[name]) for a, b in zip(_tensors(model), before, strict=True) for name in a)
