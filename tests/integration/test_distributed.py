"""Several processes, sharded and offloaded models: the numbers and the files of one process with the whole model."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate import cpu_offload, disk_offload, dispatch_model
from packaging.version import Version
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaForCausalLM

import clover_peft.tuner.bases
import clover_peft.tuner.layer
from clover_peft import CloverConfig, CloverLayer, broadcast_bases
from clover_peft.tuner.layers import clover_layers
from tests.support.tiny import build, inputs, logits, perturb, relative

pytest.importorskip("trl", reason="needs the train extra: pip install clover-peft[train]")

from clover_peft.experiments.training.arguments import parse
from clover_peft.experiments.training.run import run
from clover_peft.experiments.training.verify import verify
from tests.support.tiny_chat import rows, save_chat_model, write_jsonl

ROOT = Path(__file__).parents[2]
LOSS = 1e-4  # largest difference of a loss from one process at the same global batch
GLOO = [str(ROOT / "tests" / "support" / "fsdp_on_gloo.py")]
pytestmark = pytest.mark.usefixtures("one_thread")


# --- launched: two processes over gloo -------------------------------------------------------------


def sft_options(tiny: SimpleNamespace, out: Path, batch: int, **more: object) -> list[str]:
    chosen = {
        "model": tiny.model,
        "data": tiny.data,
        "output_dir": out,
        "rows": 40,
        "held_out_rows": 7,  # the last batches of two processes repeat rows
        "questions": 1,
        "answer_tokens": 4,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "warmup_steps": 0,
        "disable_tqdm": "true",
        "per_device_train_batch_size": batch,
        **more,
    }
    return [f"{key}={value}" for key, value in chosen.items()]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> SimpleNamespace:
    """A tiny chat model, a file of rows, and what one process makes of them: `record` and the saved run in `alone`."""
    folder = tmp_path_factory.mktemp("distributed")
    save_chat_model(folder / "model")
    made = SimpleNamespace(model=folder / "model", data=write_jsonl(folder / "train.jsonl", rows(60)))
    made.alone = folder / "alone"
    made.record = run(
        parse(ROOT / "configs" / "clover_full.yaml", sft_options(made, made.alone, batch=4, use_cpu="true"))
    )
    return made


OLD_ACCELERATE = Version(accelerate.__version__) < Version("1.15")
needs_fsdp_on_cpus = pytest.mark.skipif(OLD_ACCELERATE, reason="this accelerate refuses FSDP without an accelerator")


def free_port() -> int:
    """For accelerate, which chooses one itself (0) in later versions alone."""
    if not OLD_ACCELERATE:
        return 0
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def launch(config: Path, *command: object, **environment: str) -> None:
    process = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)),
            *("--main_process_port", str(free_port()), *map(str, command)),
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]


def check_same_run(tiny: SimpleNamespace, out: Path) -> None:
    """Two processes made what one made: losses, answers, adapter; and one process reads what they saved."""
    record = json.loads((out / "record.json").read_text())
    assert (record["processes"], tiny.record["processes"]) == (2, 1)
    ours, theirs = record["loss"], tiny.record["loss"]
    for key in ("held_out_before", "held_out_after"):
        assert ours[key] == pytest.approx(theirs[key], abs=LOSS)
    assert len(ours["log"]) == len(theirs["log"]) == 4
    for here, there in zip(ours["log"], theirs["log"], strict=True):
        assert here["loss"] == pytest.approx(there["loss"], abs=LOSS)
        assert here["grad_norm"] == pytest.approx(there["grad_norm"], rel=1e-3)
    assert record["answers"] == tiny.record["answers"]
    saved, expected = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (out, tiny.alone))
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == expected[name].dtype
        torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    # The probe holds the logits that the processes computed together.
    probe = load_file(out / "probe.safetensors")
    with torch.no_grad():
        model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(tiny.model), out / "adapter")
        ids = torch.cat([probe["prompt.0"], probe["answer.0"]], dim=1)
        again = model(input_ids=ids).logits[0, probe["prompt.0"].shape[1] - 1 :]
    torch.testing.assert_close(again, probe["logits.0"], rtol=1e-4, atol=1e-4)


def test_ddp_trains_as_one_process(tiny, tmp_path):
    out = tmp_path / "run"
    options = sft_options(tiny, out, batch=2, use_cpu="true", merge="true")
    config = ROOT / "configs" / "accelerate" / "ddp.yaml"
    launch(config, "scripts/sft.py", "--config", "configs/clover_full.yaml", *options)
    check_same_run(tiny, out)
    assert verify(out)["problems"] == []


@needs_fsdp_on_cpus
def test_fsdp2_trains_as_one_process(tiny, tmp_path):
    out = tmp_path / "run"
    config = ROOT / "configs" / "accelerate" / "fsdp2.yaml"
    options = sft_options(tiny, out, batch=2)
    launch(config, *GLOO, "scripts/sft.py", "--config", "configs/clover_full.yaml", *options)
    check_same_run(tiny, out)


@needs_fsdp_on_cpus
@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2_efficient_loading", "fsdp2_sharded_checkpoints"])
def test_fsdp2_resumes_as_it_would_have_gone_on(tiny, tmp_path, name):
    config = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    out = tmp_path / "run"
    options = ["scripts/sft.py", "--config", "configs/clover_full.yaml", *sft_options(tiny, out, batch=2)]
    launch(config, *GLOO, *options)
    check_same_run(tiny, out)
    for done in ("record.json", "probe.safetensors", "adapter", "checkpoint-4"):  # as if killed after step 2
        shutil.rmtree(out / done) if (out / done).is_dir() else (out / done).unlink()
    launch(config, *GLOO, *options, "resume=true")
    assert json.loads((out / "record.json").read_text())["resumed_from_step"] == 2
    check_same_run(tiny, out)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2", "fsdp2_efficient_loading"])
def test_an_adapter_of_one_process_goes_on_in_two(tiny, tmp_path, name):
    shim = [] if name == "ddp" else GLOO
    script = str(ROOT / "tests" / "support" / "plain_trl.py")
    adapter = str(tiny.alone / "adapter")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run([sys.executable, script, tiny.model, tiny.data, one, "4", adapter], env=environment, check=True)
    config = ROOT / "configs" / "accelerate" / f"{name}.yaml"
    launch(config, *shim, script, tiny.model, tiny.data, two, "2", adapter)
    losses = [json.loads((out / "losses.json").read_text()) for out in (one, two)]
    assert losses[1] == pytest.approx(losses[0], abs=LOSS)
    assert len(losses[0]) == 3
    saved = [load_file(out / "adapter_model.safetensors") for out in (one, two)]
    assert saved[0].keys() == saved[1].keys()
    for key, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="needs DeepSpeed: pip install deepspeed")
@pytest.mark.parametrize("at_load", ["true", "false"])
def test_zero3_trains_as_one_process(tiny, tmp_path, at_load):
    """Every parameter is sharded, however small, from its loading on or from the start of training on."""
    settings = {
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        "gradient_clipping": "auto",
        **dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size"), "auto"),
    }
    (tmp_path / "zero3.json").write_text(json.dumps(settings))
    config = tmp_path / "zero3.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\nnum_processes: 2\n"
        f"deepspeed_config:\n  deepspeed_config_file: {tmp_path / 'zero3.json'}\n  zero3_init_flag: {at_load}\n"
    )
    options = sft_options(tiny, tmp_path / "run", batch=2, use_cpu="true")
    arguments = ["scripts/sft.py", "--config", "configs/clover_full.yaml", *options]
    launch(config, *arguments, DS_ACCELERATOR="cpu")
    check_same_run(tiny, tmp_path / "run")


# --- in this process: what the launches rest on ----------------------------------------------------


@pytest.fixture
def process_group(tmp_path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("wrap", ["peft", "tuner", "bare"])
def test_ddp_does_not_send_the_bases(process_group, wrap):
    model = get_peft_model(build("llama"), CloverConfig())
    model = {"peft": model, "tuner": model.base_model, "bare": model.base_model.model}[wrap]
    bases = [name for name, _ in model.named_buffers() if ".clover_" in name]
    assert len(bases) == 2 * (4 + 3 + 3)
    parallel = DistributedDataParallel(model)
    sent = {id(buffer) for buffer in parallel.modules_buffers}
    assert not sent & {id(model.get_buffer(name)) for name in bases}
    assert sent == {id(b) for name, b in model.named_buffers() if ".clover_" not in name}
    parallel(**inputs("llama")).logits.square().mean().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if "clover_S" in n)


def test_what_others_keep_from_ddp_stays_kept():
    model = build("llama")
    model._ddp_params_and_buffers_to_ignore = ["model.norm.weight"]
    adapted = get_peft_model(model, CloverConfig())
    assert "model.norm.weight" in model._ddp_params_and_buffers_to_ignore
    assert adapted.merge_and_unload()._ddp_params_and_buffers_to_ignore == ["model.norm.weight"]


def test_nothing_of_the_model_is_kept_from_ddp_when_the_adapter_is_gone(process_group):
    plain = get_peft_model(build("llama"), CloverConfig()).unload()
    assert not hasattr(plain, "_ddp_params_and_buffers_to_ignore")
    parallel = DistributedDataParallel(plain.requires_grad_(True))
    assert {id(p) for p in parallel._module_parameters} == {id(p) for p in plain.parameters()}
    assert {id(b) for b in parallel.modules_buffers} == {id(b) for b in plain.buffers()}
    parallel(**inputs("llama")).logits.square().mean().backward()
    assert all(p.grad is not None for p in plain.parameters())


def test_a_second_adapter_of_the_same_name_is_kept_from_ddp(process_group):
    plain = get_peft_model(build("llama"), CloverConfig()).unload()
    model = get_peft_model(plain, CloverConfig(target_modules=["v_proj"]))
    sent = {id(buffer) for buffer in DistributedDataParallel(model).modules_buffers}
    assert sent == {id(b) for name, b in model.named_buffers() if ".clover_" not in name}


def test_all_processes_get_the_bases_of_the_first(process_group, monkeypatch):
    model, sent = get_peft_model(build("llama"), CloverConfig()), []
    monkeypatch.setattr(dist, "broadcast", lambda tensor, src: sent.append((id(tensor), src)))
    broadcast_bases(model)
    assert sent == [(id(b), 0) for name, b in model.named_buffers() if ".clover_" in name]


@pytest.mark.parametrize("sharding", ["tensor parallel", "fsdp2"])
def test_sharded_weights_are_refused(process_group, sharding):
    model = build("llama")
    mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("tp" if sharding == "tensor parallel" else "fsdp",))
    if sharding == "fsdp2":
        fully_shard(model, mesh=mesh)
    else:
        o = model.model.layers[1].self_attn.o_proj
        o.weight = torch.nn.Parameter(distribute_tensor(o.weight.detach(), mesh, [Shard(1)]))
    named = "embed_tokens.weight" if sharding == "fsdp2" else "layers.1.self_attn.o_proj.weight"
    with pytest.raises(ValueError, match=rf"{named}: expected a whole weight, found one sharded .*without tp_plan"):
        get_peft_model(model, CloverConfig())
    assert not clover_layers(model)


def test_fully_shard_shards_every_s_and_runs_as_before(process_group):
    model = get_peft_model(build("llama"), CloverConfig())
    perturb(model)
    expected = logits(model, "llama")
    for layer in model.base_model.model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(**inputs("llama")).logits, expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_zero3_gathers_weights_for_the_bases(monkeypatch, family):
    """A stand-in for DeepSpeed: a parameter is empty but within its context."""
    expected = get_peft_model(build(family), CloverConfig())
    model = build(family)
    whole = {id(p): p.data for p in model.parameters()}
    for parameter in model.parameters():
        parameter.ds_shape, parameter.data = parameter.shape, torch.empty(0)
    modifiers = set()

    @contextmanager
    def gather(parameters, modifier_rank=0, fwd_module=None):
        parameters = list(parameters)
        modifiers.add(modifier_rank)
        for parameter in parameters:
            parameter.data = whole[id(parameter)].clone()
        yield
        for parameter in parameters:
            parameter.data.fill_(float("nan"))  # nothing may be read later
            parameter.data = torch.empty(0)

    monkeypatch.setattr(clover_peft.runtime.sharding, "gather_params_ctx", gather)
    model = get_peft_model(model, CloverConfig())
    assert modifiers == {None}  # read, not written
    found, wanted = get_peft_model_state_dict(model), get_peft_model_state_dict(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_s_is_read_inside_its_modules_call():
    """ZeRO-3 gathers the parameters of a module for its call: here they are empty at any other time."""
    model = get_peft_model(build("llama"), CloverConfig())
    perturb(model)
    expected = logits(model, "llama")
    for _, layer in clover_layers(model):
        holder = layer.clover_S["default"]
        whole = {id(p): p.data for p in holder.parameters()}

        def gather(module, args, whole=whole):
            for p in module.parameters():
                p.data = whole[id(p)]

        def release(module, args, output):
            for p in module.parameters():
                p.data = torch.empty(0)

        holder.register_forward_pre_hook(gather)
        holder.register_forward_hook(release)
        release(holder, None, None)
    assert torch.equal(logits(model, "llama"), expected)


@pytest.fixture
def rank_0_has_the_weights(monkeypatch) -> SimpleNamespace:
    """As under `fsdp_cpu_ram_efficient_loading`, with `rank` to choose; what rank 0 sends is kept in `sent`."""
    state = SimpleNamespace(rank=0, sent=[])

    def broadcast(found: list, src: int) -> None:
        assert src == 0
        if state.rank == 0:
            state.sent.append(found[0])
        else:
            found[0] = state.sent.pop(0)

    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    monkeypatch.setattr(clover_peft.runtime.sharding, "is_fsdp_enabled", lambda: True)
    monkeypatch.setattr(clover_peft.runtime.sharding.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(clover_peft.runtime.sharding.dist, "get_rank", lambda: state.rank)
    monkeypatch.setattr(clover_peft.runtime.sharding.dist, "broadcast_object_list", broadcast)
    return state


def test_bases_come_from_the_process_that_has_the_weights(rank_0_has_the_weights, tmp_path):
    first = get_peft_model(build("llama"), CloverConfig())
    rank_0_has_the_weights.rank = 1
    second = get_peft_model(build("llama").to("meta"), CloverConfig())
    assert not rank_0_has_the_weights.sent
    here, there = ({n: b for n, b in m.named_buffers() if ".clover_" in n} for m in (first, second))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    # Accelerate's loader takes each entry of the state dict to be sharded; the adapter's file is whole all the same.
    assert not [name for name in first.state_dict() if ".clover_U" in name]
    perturb(first)
    first.save_pretrained(tmp_path)
    expected = logits(first, "llama")
    rank_0_has_the_weights.rank = 0
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert torch.equal(logits(loaded, "llama"), expected)


def test_loading_replaces_bases_that_the_state_dict_leaves_out(rank_0_has_the_weights, tmp_path):
    model = get_peft_model(build("llama"), CloverConfig())
    with torch.no_grad():  # other bases than would be computed here: as on another machine
        for _, layer in clover_layers(model):
            for attribute in ("clover_U", "clover_S0"):
                for buffer in getattr(layer, attribute)["default"].buffers():
                    buffer.mul_(1.5)
    perturb(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path)
    assert relative(logits(loaded, "llama"), logits(model, "llama")) == 0


def test_every_layer_has_every_tensor_once():
    """The names that DDP is told to leave alone are those of buffers, never of a trained tensor."""
    model = get_peft_model(build("llama"), CloverConfig())
    kept = set(model.base_model.model._ddp_params_and_buffers_to_ignore)
    assert not kept & {name for name, _ in model.named_parameters()}
    assert {name for name, _ in model.named_buffers() if ".clover_" in name} <= kept
    assert all(isinstance(layer, CloverLayer) for _, layer in clover_layers(model))


# --- offloaded models ------------------------------------------------------------------------------

DISK = {
    "model.embed_tokens": "cpu",
    "model.layers.0": "disk",
    "model.layers.1": "cpu",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> None:
    """Peft writes what it merges on disk below the working directory."""
    monkeypatch.chdir(tmp_path)


def offloaded(kind: str, folder: Path) -> LlamaForCausalLM:
    """A tiny model whose first layer, or all of it, is not in memory until it runs."""
    if kind == "loaded by transformers":
        build("llama").save_pretrained(folder / "base")
        return LlamaForCausalLM.from_pretrained(
            folder / "base", device_map=dict(DISK), offload_folder=folder / "weights"
        )
    model, cpu = build("llama"), torch.device("cpu")
    if kind == "cpu_offload":
        return cpu_offload(model, execution_device=cpu)
    if kind == "disk_offload":
        return disk_offload(model, folder, execution_device=cpu)
    return dispatch_model(model, dict(DISK), main_device="cpu", offload_dir=folder)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload", "dispatch_model", "loaded by transformers"])
@pytest.mark.parametrize("save_bases", [True, False, "folded"])
def test_offloaded_weights_are_there_for_the_bases(tmp_path, kind, save_bases):
    model = get_peft_model(offloaded(kind, tmp_path / "first"), CloverConfig(save_bases=save_bases))
    assert model.base_model.model.model.layers[0].self_attn.v_proj.base_layer.weight.is_meta
    assert torch.equal(logits(model, "llama"), logits(build("llama"), "llama"))
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model, "llama")
    second = get_peft_model(offloaded(kind, tmp_path / "second"), CloverConfig())
    if save_bases != "folded":  # a folded adapter takes a model of its own
        second.load_adapter(tmp_path / "adapter", "trained")
        second.set_adapter("trained")
        assert torch.equal(logits(second, "llama"), expected)
    assert relative(logits(model.merge_and_unload(), "llama"), expected) < 1e-5


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize("save_bases", [True, "folded"])
def test_an_adapter_is_loaded_onto_a_model_on_disk(tmp_path, save_bases):
    """Peft takes the hooks off first: there are no weights while the adapter is made."""
    trained = get_peft_model(build("llama"), CloverConfig(save_bases=save_bases))
    perturb(trained)
    trained.save_pretrained(tmp_path / "adapter")
    device_map = {f"base_model.model.{name}": device for name, device in DISK.items()}
    model = PeftModel.from_pretrained(
        offloaded("loaded by transformers", tmp_path),
        tmp_path / "adapter",
        device_map=device_map,
        offload_dir=tmp_path / "again",
    )
    assert torch.equal(logits(model, "llama"), logits(trained, "llama"))


def test_bases_that_were_not_saved_need_the_weights(tmp_path):
    trained = get_peft_model(build("llama"), CloverConfig(save_bases=False))
    trained.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.k_proj: .*saved without its bases.*save_bases=True"):
        PeftModel.from_pretrained(offloaded("loaded by transformers", tmp_path), tmp_path / "adapter")
