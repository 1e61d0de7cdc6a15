"""Maps that are folded for the whole model: the same gradients as the plain formula's, and where they are not used."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from clover_peft import CloverConfig, CloverLayer
from clover_peft.tuner import execution, model_maps
from clover_peft.tuner.maps import formula
from tests.support.adapters import adapted, layers, loss_and_grads, two_trained
from tests.support.tiny import TOLERANCE, build, inputs, perturb, relative


@pytest.fixture
def forms(monkeypatch) -> list[str]:
    """For each slice of a pass, whether its map was folded "together" with the model's others or "alone"."""
    found: list[str] = []
    head_map, maps = model_maps._Slice.head_map, CloverLayer.maps
    monkeypatch.setattr(model_maps._Slice, "head_map", lambda self: found.append("together") or head_map(self))
    monkeypatch.setattr(CloverLayer, "maps", lambda *a, **k: found.append("alone") or maps(*a, **k))
    return found


@pytest.fixture
def by_formula(monkeypatch):
    """Runs something with every layer on its own, by the plain formula."""

    def run(what):
        with monkeypatch.context() as patch:
            patch.setattr(execution, "maps_of_model", lambda *_: None)
            patch.setattr(execution, "apply_maps", lambda z, maps, output_is_kept=False: formula(z, maps))
            return what()

    return run


def grads(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def loss(model: nn.Module, seed: int = 0, family: str = "llama") -> Tensor:
    y = model(**inputs(family)).logits
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))
    return (y.float() * weights).mean()


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    assert found.keys() == wanted.keys()
    assert found
    for name, gradient in wanted.items():
        assert found[name].dtype == gradient.dtype
        assert relative(found[name], gradient) < TOLERANCE[dtype], name


def write(model: nn.Module, factor: float) -> None:
    """As fused optimizers do: torch counts no change."""
    for name, p in model.named_parameters():
        if "clover_S" in name:
            p.data.mul_(factor)


CONFIGS = {
    "full": {},
    "diagonal": {"s_matrix": "diagonal"},
    "two bases": {"basis": "svd"},
    "most directions": {"r": 11, "target_modules": ["v_proj"]},
    "small blocks": {"block_size": 4, "mlp_block_size": 8},
    "beside a low rank": {"low_rank": 2},
    "of activations' size": {"target_modules": ["up_proj", "down_proj", "q_proj"], "mlp_block_size": 4},
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gradients_are_the_formulas(config, forms, by_formula):
    model = adapted(**config).train()
    wanted = by_formula(lambda: loss_and_grads(model))
    forms.clear()
    found = loss_and_grads(model)
    assert set(forms) == {"together"}
    assert relative(found[0], wanted[0]) < TOLERANCE[torch.float32]
    agree(found[1], wanted[1])


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "deepseek_v3", "mixtral", "bert", "vit"])
def test_gradients_are_the_formulas_in_other_families(family, forms, by_formula):
    model = adapted(family)

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        output = model(**inputs(family))
        next(iter(output.values())).square().mean().backward()
        return grads(model)

    wanted = by_formula(run)
    forms.clear()
    agree(run(), wanted)
    assert set(forms) == {"together"}


def test_half_precision_rounds_as_layer_by_layer(by_formula, monkeypatch):
    """The error of gradients in bfloat16 against float32 is no larger than where layers fold their own maps."""
    model = adapted()
    exact = by_formula(lambda: loss_and_grads(model))[1]
    model.to(torch.bfloat16)
    found = loss_and_grads(model)[1]
    monkeypatch.setattr(execution, "maps_of_model", lambda *_: None)
    alone = loss_and_grads(model)[1]
    for name, gradient in exact.items():
        assert found[name].dtype == torch.float32
        assert relative(found[name], gradient) < 1.05 * relative(alone[name], gradient) < 0.1, name


def test_s_in_half_precision_and_scales(forms, by_formula):
    model = get_peft_model(build("llama", torch.bfloat16), CloverConfig(), autocast_adapter_dtype=False)
    perturb(model)
    for number, layer in enumerate(layers(model)):
        layer.set_scale("default", 0.5 + number % 2)
    wanted = by_formula(lambda: loss_and_grads(model))[1]
    forms.clear()
    agree(loss_and_grads(model)[1], wanted, torch.bfloat16)
    assert set(forms) == {"together"}


@pytest.mark.parametrize("large", range(4))
def test_a_layer_whose_map_is_large_keeps_its_input_and_the_others_do_not(large, by_formula):
    """The others' inverses are computed together, without it."""
    model = get_peft_model(build("llama", num_hidden_layers=4), CloverConfig(target_modules=["v_proj"]))
    perturb(model)
    with torch.no_grad():
        layers(model)[large].clover_S["default"].weight.mul_(200)
        layers(model)[large - 1].clover_S["default"].weight.mul_(1e-4)  # its inverse would take fewer products
    wanted = by_formula(lambda: loss_and_grads(model))[1]
    agree(loss_and_grads(model)[1], wanted)


def test_norms_are_read_once_a_pass(monkeypatch):
    model, reads = adapted(), []
    monkeypatch.setattr(Tensor, "tolist", lambda self, plain=Tensor.tolist: reads.append(self.shape) or plain(self))
    loss_and_grads(model)
    assert len(reads) == 1


# ---------------------------------------------------------------------- passes and changes between them


def test_each_forward_pass_has_its_own_maps(by_formula):
    """Two passes before one backward pass, with S written to between them without a trace."""
    model = adapted()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        first = loss(model, 0)
        write(model, 1.5)
        second = loss(model, 1)
        write(model, 2)
        (first + second).backward()
        write(model, 1 / 3)
        return grads(model)

    agree(run(), by_formula(run))


def test_gradients_add_up_over_passes(by_formula):
    model = adapted()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        for seed in range(3):
            loss(model, seed).backward()
        return grads(model)

    agree(run(), by_formula(run))


@pytest.mark.parametrize("how", ["counted", "data", "parameter", "scale"])
def test_a_change_within_a_pass_takes_effect(how, by_formula, forms):
    model = adapted(target_modules=["v_proj", "up_proj"])
    first, *_, last = layers(model)
    holder = last.clover_S["default"]
    own = holder.weight

    def change(*_) -> None:
        if how == "counted":
            with torch.no_grad():
                own.copy_(2 * start)
        elif how == "data":
            own.data = 2 * start
        elif how == "parameter":
            holder.weight = nn.Parameter(2 * start)
        else:
            last.set_scale("default", 2.0)

    start = own.detach().clone()
    first.register_forward_hook(change)

    def run() -> dict[str, Tensor]:
        own.data, holder.weight = start.clone(), own
        last.set_scale("default", 1.0)
        model.zero_grad()
        loss(model).backward()
        return grads(model)

    found = run()
    assert forms == ["together"] * (len(layers(model)) - 1) + ["alone"]
    agree(found, by_formula(run))


def test_a_backward_pass_ends_what_it_may_have_changed(by_formula):
    """A model that trains its first layers within its own forward pass, by an optimizer that leaves no trace."""
    model = adapted(target_modules=["v_proj"])
    first, last = layers(model)
    start = {id(layer): layer.clover_S["default"].weight.detach().clone() for layer in (first, last)}

    def train(module, args, y) -> None:
        torch.autograd.grad(y.square().sum(), [module.clover_S["default"].weight], retain_graph=True)
        last.clover_S["default"].weight.data.mul_(2)

    first.register_forward_hook(train)

    def run() -> dict[str, Tensor]:
        for layer in (first, last):
            layer.clover_S["default"].weight.data.copy_(start[id(layer)])
        model.zero_grad()
        loss(model).backward()
        return grads(model)

    agree(run(), by_formula(run))


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_interrupted_pass_leaves_nothing_behind(error, forms):
    model = adapted()
    decoder, x = model.get_base_model().model, torch.randn(2, 5, 48)

    def stop(*_) -> None:
        raise error

    handle = layers(model)[-1].register_forward_hook(stop)
    with pytest.raises(error):
        loss(model)
    handle.remove()
    loss(model).backward()
    assert model_maps._current.get() is None
    write(model, 2)
    forms.clear()
    decoder(inputs_embeds=x)
    assert set(forms) == {"alone"}


def test_a_submodule_that_is_called_directly_folds_alone(forms, by_formula):
    model = adapted()
    loss(model).backward()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        x = torch.linspace(-1, 1, 2 * 5 * 48).view(2, 5, 48)
        model.get_base_model().model(inputs_embeds=x).last_hidden_state[..., :7].square().mean().backward()
        return grads(model)

    forms.clear()
    found = run()
    assert set(forms) == {"alone"}
    agree(found, by_formula(run))


def test_a_layer_may_run_several_times_in_a_pass(by_formula):
    model = adapted()
    decoder = model.get_base_model().model
    decoder.layers = nn.ModuleList([*decoder.layers, decoder.layers[0]])
    wanted = by_formula(lambda: loss_and_grads(model))[1]
    agree(loss_and_grads(model)[1], wanted)


# ---------------------------------------------------------------------- adapters


def test_several_adapters_at_once_fold_alone(forms, by_formula):
    model = two_trained()
    model.base_model.set_adapter(["a", "b"])
    wanted = by_formula(lambda: loss_and_grads(model))[1]
    forms.clear()
    agree(loss_and_grads(model)[1], wanted)
    assert set(forms) == {"alone"}


def test_maps_that_replace_and_maps_that_add_are_told_apart(forms, by_formula):
    options = {"target_modules": ["v_proj"], "r": 12}
    model = get_peft_model(build("llama"), CloverConfig(**options, layers_to_transform=[0], truncate=True))
    model.add_adapter("b", CloverConfig(**options, layers_to_transform=[1]))
    perturb(model)
    model.base_model.set_adapter(["default", "b"])
    wanted = by_formula(lambda: loss_and_grads(model))[1]
    assert len(wanted) == 2
    forms.clear()
    agree(loss_and_grads(model)[1], wanted)
    assert set(forms) == {"together"}


def test_a_switch_of_adapters_takes_effect(by_formula):
    model = two_trained()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        losses = []
        for name in ("a", "b", "a"):
            model.set_adapter(name)
            losses.append(loss(model, len(losses)))
        with model.disable_adapter():
            losses.append(loss(model, 3))
        for name, p in model.named_parameters():
            p.requires_grad_("clover_S" in name)
        torch.stack(losses).sum().backward()
        return grads(model)

    found = run()
    assert any(".a." in name for name in found)
    assert any(".b." in name for name in found)
    agree(found, by_formula(run))


def test_samples_with_adapters_of_their_own(by_formula):
    model = two_trained().eval()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        for name, p in model.named_parameters():
            p.requires_grad_("clover_S" in name)
        model(**inputs("llama"), adapter_names=["b", "a"]).logits.square().mean().backward()
        return grads(model)

    agree(run(), by_formula(run))


def test_frozen_adapters_and_layers_fold_alone(forms, by_formula):
    model = adapted()
    frozen = layers(model)[::2]
    for layer in frozen:
        layer.requires_grad_(False)
    wanted = by_formula(lambda: loss_and_grads(model))[1]
    forms.clear()
    agree(loss_and_grads(model)[1], wanted)
    assert forms.count("alone") == len(frozen)
    assert "together" in forms


def test_dropout_folds_alone(forms):
    model = adapted(clover_dropout=0.3).train()
    loss(model).backward()
    assert set(forms) == {"alone"}
    forms.clear()
    loss(model.eval()).backward()
    assert set(forms) == {"together"}


def test_unloading_takes_out_the_hooks():
    model = adapted()
    base = model.get_base_model()
    assert base._forward_hooks
    assert base._forward_pre_hooks
    result = model.unload()
    assert not result._forward_hooks
    assert not result._forward_pre_hooks


def test_a_second_adapter_adds_no_hooks():
    model = adapted()
    model.add_adapter("other", CloverConfig())
    assert len(model.get_base_model()._forward_hooks) == len(model.get_base_model()._forward_pre_hooks) == 1


@pytest.mark.parametrize("how", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_folds_its_own_maps(how, forms, by_formula):
    model = adapted()
    loss(model).backward()
    other: PeftModel = how(model)
    write(other, 2)
    wanted = by_formula(lambda: loss_and_grads(other))[1]
    forms.clear()
    agree(loss_and_grads(other)[1], wanted)
    assert set(forms) == {"together"}


# ---------------------------------------------------------------------- backward passes


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_fold_alone(reentrant, forms, by_formula):
    model = adapted().train()
    wanted = by_formula(lambda: loss_and_grads(model))[1]
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    forms.clear()
    agree(loss_and_grads(model)[1], wanted)
    assert set(forms) == {"alone"}


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_whole_model_may_be_checkpointed(reentrant, by_formula):
    model = adapted()

    def run() -> dict[str, Tensor]:
        model.zero_grad()
        x = torch.linspace(-1, 1, 2 * 5 * 48).view(2, 5, 48).requires_grad_(True)
        run_model = lambda x: model(inputs_embeds=x).logits  # noqa: E731
        checkpoint(run_model, x, use_reentrant=reentrant).square().mean().backward()
        return grads(model)

    agree(run(), by_formula(run))


def test_parts_of_a_graph_and_the_same_part_twice(by_formula):
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> list[Tensor]:
        result = loss(model)
        found = list(torch.autograd.grad(result, trained[-1:], retain_graph=True))
        found += torch.autograd.grad(result, trained[:1], retain_graph=True)
        found += torch.autograd.grad(result, trained, retain_graph=True)
        return [*found, *torch.autograd.grad(result, trained)]

    for one, wanted in zip(run(), by_formula(run), strict=True):
        assert relative(one, wanted) < TOLERANCE[torch.float32]


def test_gradients_of_gradients_and_of_steps(by_formula):
    """One step of gradient descent, differentiated, as meta-learning does."""
    model = adapted(model=build("llama", torch.float64, attn_implementation="eager"))
    start = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def run() -> tuple[Tensor, ...]:
        first = loss(model, 0)
        inner = torch.autograd.grad(first, list(start.values()), create_graph=True)
        later = {name: p - 0.1 * g for (name, p), g in zip(start.items(), inner, strict=True)}
        y = torch.func.functional_call(model, later, kwargs=inputs("llama")).logits
        return torch.autograd.grad(y.square().mean(), list(start.values()))

    for one, wanted in zip(run(), by_formula(run), strict=True):
        assert relative(one, wanted) < 1e-6  # the loss is summed in float32


def test_several_cotangents_at_once(by_formula):
    model = adapted(model=build("llama", attn_implementation="eager"))
    trained = [p for p in model.parameters() if p.requires_grad]
    y = model(**inputs("llama")).logits
    cotangents = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(4))
    found = torch.autograd.grad(y, trained, cotangents, is_grads_batched=True, retain_graph=True)
    for number, cotangent in enumerate(cotangents):
        wanted = by_formula(lambda g=cotangent: torch.autograd.grad(model(**inputs("llama")).logits, trained, g))
        for one, other in zip(found, wanted, strict=True):
            assert relative(one[number], other) < TOLERANCE[torch.float32]


def test_nothing_is_alive_after_the_backward_pass(monkeypatch):
    """Beyond what the graph itself keeps, also while the loss is."""
    alive = []
    plain = model_maps._Inverses.__init__
    monkeypatch.setattr(
        model_maps._Inverses, "__init__", lambda self, *a: alive.append(weakref.ref(self)) or plain(self, *a)
    )
    model = adapted()
    result = loss(model)
    assert any(ref() is not None for ref in alive)
    result.backward()
    gc.collect()
    assert not any(ref() is not None for ref in alive)


# ---------------------------------------------------------------------- runtimes


def test_threads_do_not_share_a_pass(by_formula):
    """One model in two threads, whose first layer waits for the other thread."""
    model = adapted()
    barrier = threading.Barrier(2, timeout=60)

    def wait(*_) -> None:
        barrier.wait()

    handle = layers(model)[0].register_forward_pre_hook(wait)
    trained = [p for p in model.parameters() if p.requires_grad]
    found: dict[int, tuple[Tensor, ...]] = {}

    def run(seed: int) -> None:
        found[seed] = torch.autograd.grad(loss(model, seed), trained)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    handle.remove()
    for seed in range(2):
        wanted = by_formula(lambda seed=seed: torch.autograd.grad(loss(model, seed), trained))
        for one, other in zip(found[seed], wanted, strict=True):
            assert relative(one, other) < TOLERANCE[torch.float32]


def test_captured_graphs_fold_alone_and_read_nothing(forms, monkeypatch, by_formula):
    model = adapted()
    wanted = by_formula(lambda: loss_and_grads(model))[1]
    for module in ("execution", "fused_maps"):
        monkeypatch.setattr(f"clover_peft.tuner.{module}.is_captured", lambda tensor: True)
    forms.clear()
    agree(loss_and_grads(model)[1], wanted)
    assert set(forms) == {"alone"}


def test_replicas_fold_alone(forms):
    model = adapted()
    for layer in layers(model):
        layer._is_replica = True
    loss(model).backward()
    assert set(forms) == {"alone"}


def test_s_that_is_gathered_for_its_modules_call_is_folded_alone(forms):
    """As ZeRO-3 does: outside of the call, S is empty."""
    model = adapted()
    for layer in layers(model):
        holder = layer.clover_S["default"]
        whole = holder.weight.data

        def gather(module, args, whole=whole) -> None:
            module.weight.data = whole

        def release(module, args, output, whole=whole) -> None:
            module.weight.data = torch.empty(0)

        holder.register_forward_pre_hook(gather)
        holder.register_forward_hook(release)
        release(holder, None, None)
    forms.clear()
    loss(model)
    assert set(forms) == {"alone"}


def test_tensors_that_are_elsewhere_are_left_to_the_layer(forms):
    """As with offloading: on the meta device outside of the call."""
    model = adapted(target_modules=["v_proj"])
    last = layers(model)[-1]
    bases = last.clover_U["default"]
    here = bases.weight

    def bring(*_) -> None:
        bases.weight = here

    bases.weight = here.to("meta")
    last.register_forward_pre_hook(bring)
    loss(model).backward()
    assert forms == ["together", "alone"]


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("place", ["layer", "holder"])
def test_layers_with_hooks_in_front_fold_alone(place, counted, forms, by_formula):
    """A hook may write to S after the maps of all layers were folded, and torch may not count it."""

    def trained() -> dict[str, Tensor]:
        model = adapted()
        perturb(model)
        for layer in layers(model):
            holder = layer.clover_S["default"]
            (s,) = holder.parameters()

            def scale(*_, s=s):
                with torch.no_grad():
                    (s if counted else s.data).mul_(1.5)

            (layer if place == "layer" else holder).register_forward_pre_hook(scale)
        loss(model).backward()
        return grads(model)

    found = trained()
    assert set(forms) == {"alone"}
    agree(found, by_formula(trained))


def test_inference_tensors_fold_alone(forms):
    with torch.inference_mode():
        model = adapted()
    loss(model)
    assert set(forms) == {"alone"}


def test_shapes_alone_can_be_computed():
    model = adapted()
    perturb(model)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        batch = {name: mode.from_tensor(value) for name, value in inputs("llama").items()}
        model(**batch).logits.sum().backward()
