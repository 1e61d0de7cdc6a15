"""A conversion holds one group of layers at work: the same bits, less memory, and no trace after an error."""

from __future__ import annotations

import copy
import shutil
import tempfile
from contextlib import ExitStack
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from clover_peft.convert import convert_to_mla, fitting, latent, latent_passes
from clover_peft.convert.latent import LatentMoments
from clover_peft.convert.latent_passes import EVERY
from clover_peft.convert.plan import plan_mla
from clover_peft.convert.temporary import TemporaryTensors
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


def seen(model, data, **of) -> dict[str, list[Tensor]]:
    """The input or the output of some modules, by name, in a pass through a whole model; real tokens alone."""
    found = {name: [] for name in of}
    with ExitStack() as hooked, torch.no_grad():
        for name, (module, reads) in of.items():

            def hook(module, args, kwargs, output, name=name, reads=reads):
                x = (args[0] if args else kwargs["hidden_states"]) if reads else output
                found[name].append(x[0] if isinstance(x, tuple) else x)

            hooked.enter_context(module.register_forward_hook(hook, with_kwargs=True))
        for batch in data:
            model(**batch, use_cache=False)
    real = [batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool() for batch in data]
    return {
        name: torch.cat([x[mask].double() for x, mask in zip(each, real, strict=True)]) for name, each in found.items()
    }


def fisher_information(full, data) -> list[Tensor]:
    """Of each layer's latent, by one backward pass through the whole model for each batch."""
    sums = [torch.zeros(full.config.kv_lora_rank, full.config.kv_lora_rank).double() for _ in full.model.layers]
    generator = torch.Generator().manual_seed(0)
    full.requires_grad_(False)

    def add(of, gradient):
        g = gradient.float().flatten(0, 1)
        of += (g.T @ g).double()

    def watch(of, module, inputs, output):
        output = output if output.requires_grad else output.detach().requires_grad_()
        output.register_hook(partial(add, of))
        return output

    with ExitStack() as hooked:
        for layer, of in zip(full.model.layers, sums, strict=True):
            hooked.enter_context(layer.self_attn.kv_a_layernorm.register_forward_hook(partial(watch, of)))
        for batch in data:
            real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
            hidden = full.model(**batch, use_cache=False).last_hidden_state[real]
            chosen = torch.randperm(len(hidden), generator=generator)
            logs = full.lm_head(hidden[chosen[: -(-len(hidden) // EVERY)]]).float().log_softmax(-1)
            drawn = torch.multinomial(logs.detach().exp(), 1, generator=generator)
            logs.gather(-1, drawn).sum().neg().backward()
    return sums


def narrowed_as_a_whole(original, full, data, keys: int, rank: int, method: str):
    """The plain way: whole models from the first layer on, for each layer anew."""
    scale = (1e-6 / original.config.rms_norm_eps) ** 0.5
    whole, sums = copy.deepcopy(full), fisher_information(full, data) if method == "clover" else None
    for i, layer in enumerate(full.model.layers):
        attention, reference = layer.self_attn, original.model.layers[i]
        latents = {"z": (attention.kv_a_layernorm, False)}
        if method == "transmla":
            z = seen(whole, data, z=(whole.model.layers[i].self_attn.kv_a_layernorm, False))["z"]
            latent.narrow(attention, *latent.principal_bases(z.T @ z / len(z), keys, rank))
            continue
        here = seen(full, data, **latents)["z"]
        # The narrow layers before this one are not there in the original: its latents are those of exact layers.
        x = seen(original, data, x=(reference, True), y=(reference.self_attn, False))
        hidden = layer.input_layernorm((x["x"] * scale).to(full.dtype))
        wanted = attention.kv_a_layernorm(attention.kv_a_proj_with_mqa(hidden)[:, : attention.kv_lora_rank]).double()
        moments = LatentMoments(here.T @ here / len(here), wanted.T @ here / len(here), sums[i].clone())
        latent.narrow(attention, *latent.fitted_bases(moments, rank))
        left = seen(full, data, x=(layer, True), h=(attention.o_proj, True), y=(attention, False))
        h, weight = left["h"], attention.o_proj.weight.double()
        missing = x["y"] * scale + fitting.PULL * (x["x"] * scale - left["x"]) - left["y"]
        # Least squares with a penalty are least squares with more rows.
        penalty = (fitting.RIDGE * h.square().sum(0).mean()).sqrt() * torch.eye(h.shape[1], dtype=h.dtype)
        wanted = torch.cat([missing, missing.new_zeros(len(penalty), missing.shape[1])])
        change = torch.linalg.lstsq(torch.cat([h, penalty]), wanted).solution
        attention.o_proj.weight = torch.nn.Parameter((weight + change.T).to(full.dtype))
    full.config.kv_lora_rank = rank
    return full


@pytest.mark.parametrize(
    ("method", "choices"),
    [("clover", {"attention_bias": True}), ("clover", {"tie_word_embeddings": True}), ("transmla", {})],
)
def test_layers_are_narrowed_as_whole_models_would_be(method, choices):
    choices |= {"rms_norm_eps": 1e-3, "dtype": torch.float64}
    full, _ = convert_to_mla(model(**choices), batches(), rope_dims=4, kv_lora_rank=44, method=method)
    found, report = convert_to_mla(model(**choices), batches(), method=method, **SIZES)
    assert report.kv_lora_rank == 20
    expected = narrowed_as_a_whole(model(**choices), full, batches(), 20, 20, method)
    with torch.no_grad():
        outputs = [m(**batches()[1]).logits for m in (found, expected)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("method", ["clover", "transmla"])
@pytest.mark.parametrize(("layers", "dtype"), [(1, torch.bfloat16), (2, torch.float32)])
def test_groups_of_layers_change_no_bit(method, layers, dtype, monkeypatch):
    choices = {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}
    at_once(monkeypatch, LAYERS)
    expected, _ = convert_to_mla(model(dtype=dtype, **choices), batches(), method=method, **SIZES)
    at_once(monkeypatch, layers)
    found, _ = convert_to_mla(model(dtype=dtype, **choices), batches(), method=method, **SIZES)
    assert same(found, expected)
    assert all(parameter.requires_grad for parameter in found.parameters())


@pytest.mark.parametrize("method", ["clover", "transmla"])
def test_no_more_layers_than_a_group_have_full_rank(method, monkeypatch):
    at_once(monkeypatch, 2)
    real, narrow, seen, original = latent_passes._Passes.sweep, latent.narrow, [], model()

    def note(layers):
        filled = [layer for layer in layers if not layer.mlp.up_proj.weight.is_meta]
        whole = [layer.self_attn.kv_lora_rank == 44 for layer in filled]
        left = [not layer.mlp.up_proj.weight.is_meta for layer in original.model.layers]
        seen.append((sum(whole), sum(left) + len(whole) - sum(whole)))

    def sweep(self, k, group, sums):
        real(self, k, group, sums)
        sweep.layers = self.target.layers
        note(sweep.layers)

    def narrowed(*args):
        note(sweep.layers)
        narrow(*args)

    monkeypatch.setattr(latent_passes._Passes, "sweep", sweep)
    monkeypatch.setattr(latent, "narrow", narrowed)
    convert_to_mla(original, batches(), method=method, release=True, **SIZES)
    assert len(seen) == (5 if method == "clover" else 3) + LAYERS
    assert all(whole <= 2 and both == LAYERS for whole, both in seen)
    assert method == "transmla" or max(whole for whole, _ in seen[-LAYERS:]) == 1


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


@pytest.mark.parametrize("failing", [None, "narrow", "read"])
def test_temporary_files_are_bounded_and_removed(failing, tmp_path, monkeypatch):
    at_once(monkeypatch, 2)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    write, most = TemporaryTensors.write, [0]

    def watched(self, name, tensor):
        write(self, name, tensor)
        files = [torch.load(path).nbytes for path in tmp_path.rglob("*.pt")]
        most.append(sum(files))

    monkeypatch.setattr(TemporaryTensors, "write", watched)
    original = model()
    if failing is None:
        convert_to_mla(original, batches(), **SIZES)
        with torch.device("meta"):
            empty = model()
        plan = plan_mla(empty, windows=6, length=40, batch_size=2, **SIZES)
        assert 0.7 * plan.stages["latent"].files < max(most) <= plan.stages["latent"].files
    else:

        def fail(*args, **kwargs):
            raise KeyboardInterrupt

        monkeypatch.setattr(*{"narrow": (latent, "narrow"), "read": (TemporaryTensors, "read")}[failing], fail)
        with pytest.raises(KeyboardInterrupt):
            convert_to_mla(original, batches(), **SIZES)
        assert same(original, model())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("method", ["clover", "transmla"])
def test_a_full_disk_is_refused_before_anything_is_lost(method, monkeypatch):
    at_once(monkeypatch, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    original = model()
    with pytest.raises(OSError, match=r"expected room for 0.0 GiB of temporary files, found .*; set TMPDIR"):
        convert_to_mla(original, batches(), release=True, method=method, **SIZES)
    assert same(original, model())
    if method == "transmla":  # One group needs no files.
        at_once(monkeypatch, LAYERS)
        convert_to_mla(original, batches(), release=True, method=method, **SIZES)


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
