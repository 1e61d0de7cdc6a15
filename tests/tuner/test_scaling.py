"""Scales of adapters, by peft's methods and by diffusers'."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from peft import PeftModel
from torch import Tensor, nn

from clover_peft import CloverConfig, explicit_factors
from tests.support.adapters import FORMS, adapted, layers, several
from tests.support.tiny import TOLERANCE, build, inputs, logits, perturb, relative

CONFIGS = {**FORMS, "low rank": {"low_rank": 3}, "truncated": {"r": 4, "truncate": True}}


def rescale(model: nn.Module, scale: float) -> None:
    for layer in layers(model):
        layer.scale_layer(scale)


def multiply_s(model: nn.Module, scale: float, adapter_name: str = "default") -> None:
    """What a scale stands for: dS and B multiplied."""
    with torch.no_grad():
        for layer in layers(model):
            trained = layer.trained_tensors(adapter_name)
            for attribute in ("clover_S", "clover_B"):
                for tensor in trained.get(attribute, {}).values():
                    tensor.mul_(scale)


def frozen_pass(model: nn.Module) -> Tensor:
    return logits(model, "llama")


def decoded(model: nn.Module) -> Tensor:
    """Logits of single tokens, which run C, S and E one after the other."""
    with torch.no_grad():
        return model(input_ids=inputs("llama")["input_ids"][:, :1]).logits


def trained(model: nn.Module) -> Tensor:
    """Logits of a pass that may be differentiated."""
    return model(**inputs("llama")).logits.detach()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "run", [lambda model: logits(model, "llama"), decoded, trained], ids=["logits", "one", "train"]
)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_scale_multiplies_ds(config: str, run: Callable[[nn.Module], Tensor], frozen: bool) -> None:
    model = adapted(**CONFIGS[config])
    other = copy.deepcopy(model)
    with model.disable_adapter():  # which makes the adapter trainable at its end
        base = run(model)
    if frozen:
        model.requires_grad_(False)
    before = run(model)
    rescale(model, 0.5)
    multiply_s(other, 0.5)
    assert relative(run(model), run(other)) <= TOLERANCE[torch.float32]
    assert relative(run(model), before) > 1e-4
    assert relative(run(copy.deepcopy(model)), run(model)) <= TOLERANCE[torch.float32]
    for layer in layers(model):
        layer.unscale_layer(0.5)
    assert torch.equal(run(model), before)
    rescale(model, 0.3)
    for layer in layers(model):
        layer.unscale_layer()
    assert torch.equal(run(model), before)
    rescale(model, 0.3)
    with model.disable_adapter():
        assert torch.equal(run(model), base)


@pytest.mark.parametrize("config", CONFIGS)
def test_merging_and_delta_weights_have_the_scale(config: str) -> None:
    model = adapted(dtype=torch.float64, **CONFIGS[config])
    rescale(model, 0.5)
    unmerged = logits(model, "llama")
    base, delta = layers(model)[0].weight.clone(), layers(model)[0].get_delta_weight("default")
    model.merge_adapter()
    assert relative(logits(model, "llama"), unmerged) <= TOLERANCE[torch.float64]
    assert relative(layers(model)[0].weight - base, delta) <= TOLERANCE[torch.float64]
    model.unmerge_adapter()
    assert torch.equal(logits(model, "llama"), unmerged)


def test_a_merged_adapter_keeps_the_scale_it_was_merged_with() -> None:
    model = several({"a": {}, "b": {}})
    model.base_model.set_adapter(["a", "b"])
    for layer in layers(model):
        layer.set_scale("a", 0.5)
    expected = logits(model, "llama")
    model.merge_adapter(["a"])
    for layer in layers(model):
        layer.set_scale("a", 3.0)
    model.merge_adapter(["b"])
    assert relative(logits(model, "llama"), expected) <= TOLERANCE[torch.float32]


def test_an_adapter_merged_later_has_the_scale_of_then() -> None:
    model = several({"a": {}, "b": {}})
    model.base_model.set_adapter(["a", "b"])
    model.merge_adapter(["a"])
    for layer in layers(model):
        layer.set_scale("b", 0.25)
        layer.set_scale("a", float("inf"))
    model.merge_adapter(["b"], safe_merge=True)  # "a" is merged with 1
    merged = logits(model, "llama")
    model.unmerge_adapter()
    for layer in layers(model):
        layer.set_scale("a", 1.0)
    assert relative(merged, logits(model, "llama")) <= TOLERANCE[torch.float32]


def test_a_name_that_is_given_twice_is_merged_once() -> None:
    model = adapted("llama")
    expected = logits(model, "llama")
    for layer in layers(model):
        layer.merge(adapter_names=["default", "default"])
    assert relative(logits(model, "llama"), expected) <= TOLERANCE[torch.float32]


def test_an_update_of_an_unknown_adapter_is_refused() -> None:
    layer = layers(adapted("llama"))[0]
    with pytest.raises(
        ValueError, match=r"expected one of the adapters \['default'\], found 'typo'; correct the name"
    ):
        layer.get_delta_weight("typo")


def test_many_scales_keep_the_maps_of_one() -> None:
    model = several({"a": {}})
    model.requires_grad_(False)
    for scale in (1.0, 0.5, 0.25):
        for layer in layers(model):
            layer.set_scale("a", scale)
        expected = decoded(model)  # no map is kept of this scale
        logits(model, "llama")
        assert relative(decoded(model), expected) <= TOLERANCE[torch.float32]
        assert {len(layer._cache) for layer in layers(model)} == {1}


def test_explicit_factors_have_the_scale() -> None:
    model = adapted("llama")
    for layer in layers(model):
        layer.set_scale("default", 0.5)
    for layer in layers(model):
        name = layer.name
        if name.endswith("up_proj"):
            product = explicit_factors(model, name)["weight"].product().flatten(0, 1)
            assert relative(product, layer.weight + layer.get_delta_weight("default")) <= TOLERANCE[torch.float32]


def test_adapters_have_scales_of_their_own() -> None:
    model = several({"a": {}, "b": {}})
    model.base_model.set_adapter(["a", "b"])
    for layer in layers(model):
        layer.set_scale("a", 0.0)
        layer.set_scale("missing", 2.0)
    both = logits(model, "llama")
    model.set_adapter("b")
    assert relative(logits(model, "llama"), both) <= TOLERANCE[torch.float32]
    for layer in layers(model):
        layer.scale_layer(2)  # of the active one
        assert layer.scaling == {"a": 0.0, "b": 2}
    model.delete_adapter("a")
    assert all(layer.scaling == {"b": 2} for layer in layers(model))


def test_a_mixed_batch_has_the_scales() -> None:
    model = several({"a": {}, "b": {}})
    for layer in layers(model):
        layer.set_scale("a", 0.5)
    with torch.no_grad():
        mixed = model(**inputs("llama"), adapter_names=["a", "b"]).logits
    assert relative(mixed[0], logits(model, "llama")[0]) <= TOLERANCE[torch.float32]


def test_a_scale_is_part_of_gradients() -> None:
    model = adapted()
    gradients = []
    for scale in (1.0, 0.0):
        for layer in layers(model):
            layer.set_scale("default", scale)
        model.zero_grad()
        model(**inputs("llama"), labels=inputs("llama")["input_ids"]).loss.backward()
        gradients.append(layers(model)[0].clover_S["default"].weight.grad.norm())
    assert gradients[0] > 0
    assert gradients[1] == 0


def test_scales_are_not_saved(tmp_path) -> None:
    model = adapted()
    before = logits(model, "llama")
    rescale(model, 0.5)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(build("llama"), tmp_path).eval(), "llama"), before)


def test_a_weighted_combination_has_the_scales() -> None:
    model = several({"a": {}, "b": {}})
    for layer in layers(model):
        layer.set_scale("a", 0.5)
    model.add_weighted_adapter(["a", "b"], [2.0, 0.0], "sum")
    model.set_adapter("a")
    half = logits(model, "llama")
    multiply_s(model, 2.0, "a")
    assert relative(half, logits(model, "llama")) > 1e-4
    model.set_adapter("sum")
    whole = logits(model, "llama")
    model.set_adapter("a")
    assert relative(whole, logits(model, "llama")) <= TOLERANCE[torch.float32]


def unet(*names: str) -> nn.Module:
    """A tiny U-Net with adapters, added by diffusers' own method."""
    model = build("unet")
    for name in names:
        model.add_adapter(CloverConfig(), adapter_name=name)
    perturb(model, 0.5)
    return model.eval()


def scaled(model: nn.Module, scales: dict[str, float]) -> Tensor:
    """The output with the adapters' dS multiplied."""
    model = copy.deepcopy(model)
    model.set_adapter(list(scales))
    for name, scale in scales.items():
        multiply_s(model, scale, name)
    return logits(model, "unet")


def test_diffusers_sets_weights_of_adapters() -> None:
    pytest.importorskip("diffusers", reason="needs the dev extra: pip install clover-peft[dev]")
    model = unet("a", "b")
    expected = scaled(model, {"a": 0.5, "b": 0.25})
    model.set_adapters(["a", "b"], [0.5, 0.25])
    assert relative(logits(model, "unet"), expected) <= TOLERANCE[torch.float32]
    model.set_adapters(["a"])
    assert torch.equal(logits(model, "unet"), scaled(model, {"a": 1.0}))


def test_diffusers_scales_a_call() -> None:
    pytest.importorskip("diffusers", reason="needs the dev extra: pip install clover-peft[dev]")
    model = unet("a")
    before = logits(model, "unet")
    with torch.no_grad():
        for scale in (0.5, 0.0):
            found = model(**inputs("unet"), cross_attention_kwargs={"scale": scale}).sample
            assert relative(found, scaled(model, {"a": scale})) <= TOLERANCE[torch.float32]
    assert torch.equal(logits(model, "unet"), before)


def test_diffusers_fuses_with_a_scale() -> None:
    pytest.importorskip("diffusers", reason="needs the dev extra: pip install clover-peft[dev]")
    model = unet("a")
    expected = scaled(model, {"a": 0.5})
    model.fuse_lora(0.5)
    assert relative(logits(model, "unet"), expected) <= TOLERANCE[torch.float32]
    model.unfuse_lora()
    assert relative(logits(model, "unet"), expected) <= TOLERANCE[torch.float32]


def test_a_pipeline_scales_adapters() -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs the dev extra: pip install clover-peft[dev]")
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8)
    sizes = dict(vocab_size=96, hidden_size=24, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    pipeline = diffusers.StableDiffusionPipeline(
        vae,
        transformers.CLIPTextModel(transformers.CLIPTextConfig(**sizes)),
        None,
        unet("a", "b"),
        diffusers.DDIMScheduler(),
        None,
        None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    texts = torch.randn(2, 1, 7, 24, generator=torch.Generator().manual_seed(0))

    def image(**options) -> Tensor:
        return pipeline(
            prompt_embeds=texts[0],
            negative_prompt_embeds=texts[1],
            latents=torch.ones(1, 4, 8, 8),
            num_inference_steps=2,
            output_type="latent",
            **options,
        ).images

    pipeline.set_adapters(["a"])
    whole = image()
    pipeline.set_adapters(["a"], [0.5])
    half = image()
    assert relative(half, whole) > 1e-4
    pipeline.set_adapters(["a"])
    assert torch.equal(image(), whole)
    assert relative(image(cross_attention_kwargs={"scale": 0.5}), half) <= TOLERANCE[torch.float32]
    pipeline.fuse_lora(lora_scale=0.5, components=["unet"])
    assert relative(image(), half) <= TOLERANCE[torch.float32]


def test_diffusers_counts_adapters_in_r() -> None:
    """It names a LoRA that is loaded without a name by the number of adapters in a layer's `r`."""
    peft_utils = pytest.importorskip("diffusers.utils.peft_utils")
    assert peft_utils.get_adapter_name(adapted()) == "default_1"
    assert layers(adapted(r=4))[0].r == {"default": 4}
