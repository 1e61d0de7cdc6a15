"""Adapters in files: saves, loads and changes them, for the tests of what a file holds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers as hf
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from clover_peft import CloverConfig
from tests.support.adapters import layers
from tests.support.tiny import build, logits, perturb

WEIGHTS = "adapter_model.safetensors"
SAVE_BASES = [True, False, "folded"]
# name -> (family, choices): every way an adapter's tensors can be laid out.
LAYOUTS: dict[str, tuple[str, dict]] = {
    "full": ("llama", dict()),
    "diagonal": ("llama", dict(s_matrix="diagonal")),
    "svd basis": ("llama", dict(basis="svd")),
    "r": ("llama", dict(r=5)),
    "r diagonal": ("llama", dict(r=5, s_matrix="diagonal")),
    "rank_pattern": ("llama", dict(rank_pattern={"v_proj": 3, r"1\.mlp\.up_proj": 7})),
    "truncate": ("llama", dict(r=7, truncate=True)),
    "truncate diagonal": ("llama", dict(r=7, truncate=True, s_matrix="diagonal")),
    "block_size": ("llama", dict(block_size=6)),
    "block_size over heads": ("llama", dict(block_size=24, cross_layer=False)),
    "mlp_block_size": ("llama", dict(mlp_block_size=16)),
    "intra-layer": ("opt", dict(cross_layer=False)),
    "all-linear": ("llama", dict(target_modules="all-linear")),
    "one layer": ("llama", dict(layers_to_transform=0)),
    "modules_to_save": ("llama", dict(modules_to_save=["lm_head"])),
    "token indices": ("llama", dict(trainable_token_indices=[4, 9])),
    "bias all": ("opt", dict(bias="all")),
    "bias clover_only": ("opt", dict(bias="clover_only")),
    "pairs with biases": ("opt", dict()),
    "fused": ("gpt2", dict()),
    "interleaved": ("gpt_neox", dict()),
    "decoupled": ("deepseek_v3", dict()),
    "encoder-decoder": ("t5", dict()),
}


def trained_model(base: nn.Module, adapter_name: str = "default", seed: int = 3, **choices) -> PeftModel:
    """An adapter on `base` whose trainable numbers, all of them, are not what they were at the start."""
    model = get_peft_model(base, CloverConfig(**choices), adapter_name=adapter_name).eval()
    perturb(model, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "clover_S" not in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def save_trained(folder: Path, family: str = "llama", adapter_name: str = "default", **choices) -> Tensor:
    """Save a trained adapter for the tiny model of `family`; returns the logits it gives."""
    model = trained_model(build(family), adapter_name, **choices)
    model.save_pretrained(folder)
    return logits(model, family)


def load(base: nn.Module, folder: Path | str, **kwargs) -> PeftModel:
    torch.manual_seed(987)  # never the seed that anything was made with
    return PeftModel.from_pretrained(base, folder, **kwargs)


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the tensors of a saved adapter."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def edit_config(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def base_in(folder: Path, family: str = "llama") -> nn.Module:
    """The tiny model, saved as a checkpoint and loaded from there."""
    build(family).save_pretrained(folder)
    return hf.AutoModelForCausalLM.from_pretrained(folder).eval()


def first_tensor(tensors: dict[str, Tensor], part: str) -> Tensor:
    return tensors[next(key for key in sorted(tensors) if f"1.self_attn.v_proj.clover_{part}." in key)]


@contextmanager
def kept(model: PeftModel) -> Iterator[None]:
    """What fails inside leaves a model with adapters as it was."""
    before = logits(model, "llama")
    modules = [(name, module) for name, module in model.named_modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapters, active = list(model.peft_config), list(model.active_adapters)
    yield
    assert list(model.peft_config) == adapters
    assert list(model.active_adapters) == active
    assert [(name, module) for name, module in model.named_modules()] == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    for layer in layers(model):
        assert list(layer.specs) == list(layer.clover_S) == list(layer.clover_dropout)
    assert torch.equal(logits(model, "llama"), before)
