"""A conversion holds one group of layers at work: the same bits, less memory, and no trace after an error."""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from clover_peft.convert import convert_to_mla, latent, latent_passes
from clover_peft.convert.latent import EVERY, LatentMoments
from clover_peft.convert.plan import plan_mla
from tests.support.live_memory import LiveMemory
from tests.support.tiny import VOCAB, build

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:calibration. .* tokens .*are few"),
]
SIZES = {"rope_dims": 4, "cache_reduction": 0.5}
LAYERS = 5


def model(**choices):
    return build("llama", num_hidden_layers=LAYERS, **choices)


def batches(count: int = 3, length: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    ids = [torch.randint(3, VOCAB, (2, length - i), generator=generator) for i in range(count)]
    padded = {"input_ids": ids[0], "attention_mask": torch.ones_like(ids[0])}
    padded["attention_mask"][1, -9:] = 0
    return [padded, *({"input_ids": each} for each in ids[1:])]


def at_once(monkeypatch, layers: int) -> None:
    """Let groups have this many layers."""
    monkeypatch.setattr(latent_passes, "group_size", lambda *args: layers)


def same(first, second) -> bool:
    names = first.state_dict().keys() | second.state_dict().keys()
    return all(torch.equal(first.state_dict()[name], second.state_dict()[name]) for name in names)


def narrowed_as_a_whole(full, data, keys: int, rank: int, method: str):
    """The plain way: passes through the whole model, all moments at once, and then all layers."""
    sums = [LatentMoments.zeros(full.config.kv_lora_rank) for _ in full.model.layers]
    generator = torch.Generator().manual_seed(0)
    full.requires_grad_(False)
    mask = {}

    def fisher(of, gradient):
        g = gradient.float().flatten(0, 1)
        of.fisher += (g.T @ g).double()

    def second(of, module, inputs, output):
        z = (output.detach().float() * mask["real"].unsqueeze(-1)).flatten(0, 1)
        of.second += (z.T @ z).double()
        of.tokens += int(mask["real"].sum())
        output = output if output.requires_grad else output.detach().requires_grad_()
        output.register_hook(partial(fisher, of))
        return output

    with ExitStack() as hooked:
        for layer, of in zip(full.model.layers, sums, strict=True):
            hooked.enter_context(layer.self_attn.kv_a_layernorm.register_forward_hook(partial(second, of)))
        for batch in data:
            mask["real"] = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            hidden = full.model(**batch, use_cache=False).last_hidden_state[mask["real"]]
            chosen = torch.randperm(len(hidden), generator=generator)
            logs = full.lm_head(hidden[chosen[: -(-len(hidden) // EVERY)]]).float().log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            logs.gather(-1, drawn).sum().neg().backward()
    for layer, of in zip(full.model.layers, sums, strict=True):
        latent.narrow(layer.self_attn, of, keys, rank, method)
    return full


@pytest.mark.parametrize("method", ["clover", "transmla"])
@pytest.mark.parametrize(("layers", "dtype"), [(1, torch.bfloat16), (2, torch.float32), (LAYERS, torch.float32)])
def test_groups_of_layers_change_no_bit(method, layers, dtype, monkeypatch):
    choices = {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}
    full, _ = convert_to_mla(model(dtype=dtype, **choices), batches(), rope_dims=4, kv_lora_rank=44, method=method)
    expected = narrowed_as_a_whole(full, batches(), 20, 20, method)
    at_once(monkeypatch, layers)
    found, report = convert_to_mla(model(dtype=dtype, **choices), batches(), method=method, **SIZES)
    assert report.kv_lora_rank == 20
    assert same(found, expected)
    assert all(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize("method", ["clover", "transmla"])
def test_no_more_layers_than_a_group_have_full_rank(method, monkeypatch):
    at_once(monkeypatch, 2)
    real, seen, original = latent_passes._Passes.sweep, [], model()

    def sweep(self, k, group, moments):
        real(self, k, group, moments)
        filled = [layer for layer in self.target.layers if not layer.mlp.up_proj.weight.is_meta]
        whole = [layer.self_attn.kv_lora_rank == 44 for layer in filled]
        left = [not layer.mlp.up_proj.weight.is_meta for layer in original.model.layers]
        seen.append((sum(whole), sum(left) + len(whole) - sum(whole)))

    monkeypatch.setattr(latent_passes._Passes, "sweep", sweep)
    convert_to_mla(original, batches(), method=method, release=True, **SIZES)
    assert len(seen) == (5 if method == "clover" else 3)
    assert all(whole <= 2 and both == LAYERS for whole, both in seen)


@pytest.mark.parametrize("sizes", [SIZES, {"rope_dims": 4, "kv_lora_rank": 44}])
def test_a_released_model_gives_the_same_and_is_lost(sizes, monkeypatch):
    at_once(monkeypatch, 1)
    kept, released = model(), model()
    expected, found = (convert_to_mla(m, batches(), release=m is released, **sizes)[0] for m in (kept, released))
    assert same(found, expected)
    assert same(kept, model())
    assert all(parameter.is_meta for parameter in released.parameters())
    with pytest.raises(ValueError, match="offloaded"):
        convert_to_mla(released, batches(), **sizes)


def test_what_is_refused_is_not_released():
    granite = {"attention_multiplier": 12**-0.5, "residual_multiplier": 0.5}
    refused = build("granite", **granite)
    with pytest.raises(ValueError, match="expected embeddings, plain residual connections"):
        convert_to_mla(refused, batches(), release=True, **SIZES)
    assert same(refused, build("granite", **granite))


@pytest.mark.parametrize("failing", [None, "narrow", "_read"])
def test_temporary_files_are_bounded_and_removed(failing, tmp_path, monkeypatch):
    at_once(monkeypatch, 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write, most = latent_passes._Passes._write, [0]

    def watched(self, name, tensor):
        write(self, name, tensor)
        files = [torch.load(path).nbytes for path in tmp_path.rglob("*.pt")]
        most.append(sum(files))

    monkeypatch.setattr(latent_passes._Passes, "_write", watched)
    original = model()
    if failing is None:
        convert_to_mla(original, batches(), **SIZES)
        planned = latent_passes.stored_bytes(3, sum(b["input_ids"].numel() for b in batches()), 48, 4, gradients=True)
        assert 0 < max(most) <= planned
    else:

        def fail(*args):
            raise KeyboardInterrupt

        monkeypatch.setattr(*{"narrow": (latent, "narrow"), "_read": (latent_passes._Passes, "_read")}[failing], fail)
        with pytest.raises(KeyboardInterrupt):
            convert_to_mla(original, batches(), **SIZES)
        assert same(original, model())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_refused_before_anything_is_lost(monkeypatch):
    at_once(monkeypatch, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    original = model()
    with pytest.raises(OSError, match=r"expected room for 0.0 GiB of temporary files, found .*; set TMPDIR"):
        convert_to_mla(original, batches(), release=True, **SIZES)
    assert same(original, model())
    at_once(monkeypatch, LAYERS)
    convert_to_mla(original, batches(), release=True, **SIZES)


@pytest.mark.parametrize(
    ("heads", "method", "release", "length", "budget"),
    [
        (8, "clover", False, 64, 0),
        (8, "clover", True, 64, 0),
        (2, "clover", True, 64, 0),
        (8, "transmla", True, 64, 0),
        (2, "clover", False, 512, 2**31),
        (2, "clover", True, 512, 5 * 10**7),
    ],
)
def test_the_plan_counts_what_is_held(heads, method, release, length, budget, monkeypatch):
    monkeypatch.setattr(latent_passes, "BUDGET", budget)
    size = {"hidden_size": 256, "head_dim": 32, "num_attention_heads": 8, "num_key_value_heads": heads}
    choices = {**size, "intermediate_size": 688, "num_hidden_layers": 6}
    data = [{"input_ids": torch.randint(VOCAB, (1, length))} for _ in range(2)]
    with torch.device("meta"):
        empty = build("llama", **choices)
    sizes = {"rope_dims": 32, "cache_reduction": 0.6875, "method": method, "release": release}
    plan = plan_mla(empty, windows=2, length=length, batch_size=1, **sizes)
    before = LiveMemory()
    with before:
        original = build("llama", **choices)
        weights = before.live
        before.peak = before.live
        convert_to_mla(original, data, **sizes)
    # LAPACK's workspace is inside a decomposition.
    workspace = 2 * 8 * plan.largest**2 if "activations" not in plan.stages["latent"].held else 0
    planned = max(stage.peak for stage in plan.stages.values())
    assert weights == pytest.approx(4 * plan.parameters[0], rel=0.01)
    assert planned / 1.15 < before.peak + workspace < 1.15 * planned
