"""`balance_updates`: the function stays, every block gets one sensitivity, and a step costs the KL it should."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from clover_peft import (
    CloverConfig,
    balance_updates,
    explicit_factors,
    hotswap_adapter,
    initialize_from_activations,
)
from clover_peft.tuner.combining import have_same_bases
from clover_peft.tuner.layers import clover_layers
from clover_peft.tuner.update_scale import SENSITIVITY, count_predictions, update_sensitivities
from tests.support.tiny import TOLERANCE, VOCAB, build, inputs, logits, perturb, relative

LANGUAGE = [
    "llama",
    "gpt2",
    "gpt_neox",
    "deepseek_v3",
    "t5",
    "phi3",
    "falcon",
    "albert",
]  # albert runs one layer twice
OPTIONS = [
    {},
    {"s_matrix": "diagonal"},
    {"r": 4},
    {"r": 4, "truncate": True},
    {"target_modules": ["v_proj", "up_proj", "down_proj"], "mlp_block_size": 16, "low_rank": 2},
]


def batches(count: int = 3, length: int = 24) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    drawn = [torch.randint(3, VOCAB, (2, length), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "labels": ids} for ids in drawn]


def adapted(family: str = "llama", dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    return get_peft_model(build(family, dtype), CloverConfig(**options))


def kappas(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat(list(update_sensitivities(model, batches()).values()))


@pytest.mark.parametrize("family", LANGUAGE)
def test_every_block_gets_one_sensitivity_and_the_function_stays(family, one_thread):
    model = adapted(family)
    before = kappas(model)
    unchanged = logits(model.eval(), family)
    balance_updates(model, batches())
    assert torch.equal(logits(model, family), unchanged)
    assert torch.equal(logits(model, family), logits(build(family).eval(), family))
    assert float(before.max() / before.min()) > 1.5
    torch.testing.assert_close(kappas(model), torch.full_like(before, SENSITIVITY), rtol=1e-3, atol=0)
    for _, layer in clover_layers(model):
        for spec in layer.specs["default"]:
            _, u, v, s0, _ = layer.tensors("default", spec)
            if v is not None:
                identity = v @ (s0.unsqueeze(-1) * u)
                assert relative(identity, torch.eye(spec.size).expand_as(identity)) < 1e-3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_all_forms_keep_their_function(options, dtype, one_thread):
    model = adapted("llama", dtype, **options).eval()
    unchanged = logits(model, "llama")
    balance_updates(model, batches())
    if options.get("truncate"):
        assert relative(logits(model, "llama"), unchanged) < TOLERANCE[dtype]
    else:
        assert torch.equal(logits(model, "llama"), unchanged)
    rounding = 1e-3 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(
        kappas(model), torch.full_like(kappas(model), SENSITIVITY), rtol=rounding, atol=rounding * SENSITIVITY
    )


def test_sensitivity_by_the_plain_formula(one_thread):
    model = adapted("llama", torch.float64).eval()
    layer = dict(clover_layers(model.base_model.model))["model.layers.1.self_attn.v_proj"]
    spec = layer.specs["default"][0]
    seen, tokens, predictions = {"z": [], "g": []}, 0, 0
    hook = layer.register_forward_hook(
        lambda m, i, o: (seen["z"].append(o.detach()), o.register_hook(seen["g"].append))[0]
    )
    for batch in batches():
        loss = model(**batch).loss
        (loss * batch["labels"][:, 1:].numel()).backward()  # the first token is not predicted
        tokens += batch["labels"].numel()
        predictions += batch["labels"][:, 1:].numel()
    hook.remove()
    _, u, v, *_ = layer.tensors("default", spec)
    z, g = (torch.cat([x.flatten(0, 1) for x in seen[key]]).unflatten(-1, (-1, spec.size)) for key in ("z", "g"))
    c_z, e_g = torch.einsum("hrd,nhd->nhr", u, z), torch.einsum("hdr,nhd->nhr", v, g)
    expected = (c_z.square().sum(0) / tokens).mean(-1) * (e_g.square().sum(0) / predictions).mean(-1)
    model.zero_grad()
    found = update_sensitivities(model, batches())["model.layers.1.self_attn.v_proj", spec.name]
    torch.testing.assert_close(found, expected.sqrt())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("options", [{}, {"s_matrix": "diagonal"}, {"mlp_block_size": 16, "r": 6}], ids=str)
def test_a_step_costs_the_kl_that_is_expected(options, one_thread):
    """`lr^2 / 2 * sum of kappa^2` over the entries of S, for a step of lr in every entry, with random signs."""
    torch.manual_seed(0)
    base = build("llama", torch.float64, initializer_range=0.3)
    model = get_peft_model(base, CloverConfig(**options)).eval()
    data = batches(12, 48)
    with torch.no_grad():  # labels that the model draws itself: the gradients are then those of the Fisher information
        for batch in data:
            drawn = torch.distributions.Categorical(logits=model(batch["input_ids"]).logits).sample()
            batch["labels"] = torch.cat([batch["input_ids"][:, :1], drawn[:, :-1]], 1)
    balance_updates(model, data)
    rate, measured, entries = 1e-3, [], 0
    with torch.no_grad():
        before = [model(batch["input_ids"]).logits.log_softmax(-1) for batch in data]
        for seed in range(8):
            generator, entries = torch.Generator().manual_seed(seed), 0
            for _, layer in clover_layers(model):
                for s in layer.clover_S["default"].parameters():
                    s.copy_(rate * torch.randn(s.shape, generator=generator, dtype=s.dtype).sign())
                    entries += s.numel()
            for batch, old in zip(data, before, strict=True):
                new = model(batch["input_ids"]).logits.log_softmax(-1)
                measured.append(float((old.exp() * (old - new)).sum(-1).mean()))
    expected = rate**2 / 2 * entries * SENSITIVITY**2
    assert sum(measured) / len(measured) == pytest.approx(expected, rel=0.3)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_saved_and_reloaded_under_another_seed(options, tmp_path, one_thread):
    model = adapted("llama", **options).eval()
    balance_updates(model, batches())
    perturb(model)
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path / "whole")
    torch.manual_seed(99)
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "whole").eval()
    assert again.peft_config["default"].balanced_updates
    assert torch.equal(logits(again, "llama"), expected)
    if not options.get("low_rank"):
        model.peft_config["default"].save_bases = "folded"
        model.save_pretrained(tmp_path / "folded")
        folded = PeftModel.from_pretrained(build("llama"), tmp_path / "folded").eval()
        assert relative(logits(folded, "llama"), expected) < 1e-5
        model.peft_config["default"].save_bases = True
    # a reference adapter of the same configuration is born with the same bases, as trainers need
    model.add_adapter("reference", model.peft_config["default"])
    assert all(have_same_bases(layer, "default", "reference") for _, layer in clover_layers(model))
    # one of its own is not
    model.add_adapter("other", CloverConfig(**options))
    assert not any(have_same_bases(layer, "default", "other") for _, layer in clover_layers(model))
    model.delete_adapter("other")
    merged = model.merge_and_unload(safe_merge=True)
    assert relative(logits(merged, "llama"), expected) < 1e-4


def test_hotswap_knows_scaled_bases(tmp_path, one_thread):
    model = adapted().eval()
    model.save_pretrained(tmp_path / "plain")
    balance_updates(model, batches())
    with pytest.raises(ValueError, match="expected balanced_updates=True as in the loaded adapter, found False"):
        hotswap_adapter(model, str(tmp_path / "plain"))


@pytest.mark.parametrize("target", ["model.layers.0.self_attn.v_proj", "model.layers.0.mlp.up_proj"])
def test_explicit_factors_are_those_of_the_weights(target, one_thread):
    model, plain = adapted("llama", torch.float64), adapted("llama", torch.float64)
    balance_updates(model, batches())
    perturb(model)
    with torch.no_grad():
        for (_, here), (_, there) in zip(clover_layers(model), clover_layers(plain), strict=True):
            for spec in here.specs["default"]:  # the same map in unscaled bases
                scaled, unscaled = here.tensors("default", spec), there.tensors("default", spec)
                scale = (scaled.c / unscaled.c).flatten(1).nanmedian(-1).values
                unscaled.s.copy_(scaled.s * scale.view(-1, 1, 1))
    found, expected = explicit_factors(model, target)["weight"], explicit_factors(plain, target)["weight"]
    for one, other in ((found.U, expected.U), (found.S, expected.S), (found.V, expected.V)):
        assert relative(one, other) < 1e-9


def test_data_bases_first(one_thread):
    model = adapted().eval()
    initialize_from_activations(model, [{"input_ids": b["input_ids"]} for b in batches(8)])
    balance_updates(model, batches())
    config = model.peft_config["default"]
    assert config.from_activations
    assert config.balanced_updates
    torch.testing.assert_close(kappas(model), torch.full_like(kappas(model), SENSITIVITY), rtol=1e-3, atol=0)
    initialize_from_activations(model, [{"input_ids": b["input_ids"]} for b in batches(8)])  # new bases are unscaled
    assert not config.balanced_updates
    assert float(kappas(model).max()) > 1.1 * SENSITIVITY or float(kappas(model).min()) < 0.9 * SENSITIVITY


def test_padding_does_not_count(one_thread):
    one, other = adapted().eval(), adapted().eval()
    padded = []
    for batch in batches():
        ids = batch["input_ids"]
        more = torch.full((len(ids), 5), 7)
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(more)], 1)
        labels = torch.cat([ids, torch.full_like(more, -100)], 1)
        padded.append({"input_ids": torch.cat([ids, more], 1), "attention_mask": mask, "labels": labels})
    here = torch.cat(list(update_sensitivities(one, batches()).values()))
    there = torch.cat(list(update_sensitivities(other, padded).values()))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=0)


def test_a_classifier_counts_samples(one_thread):
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=VOCAB,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=80,
        num_labels=3,
    )
    model = get_peft_model(hf.BertForSequenceClassification(config), CloverConfig(task_type="SEQ_CLS")).eval()
    batch = {**inputs("bert"), "labels": torch.tensor([1] * len(inputs("bert")["input_ids"]))}
    balance_updates(model, [batch])
    found = torch.cat(list(update_sensitivities(model, [batch]).values()))
    torch.testing.assert_close(found, torch.full_like(found, SENSITIVITY), rtol=1e-3, atol=0)


@pytest.mark.parametrize(("family", "first"), [("llama", 1), ("gpt2", 1), ("t5", 0)])
def test_predictions_are_those_that_the_loss_is_the_mean_of(family, first, one_thread):
    """A causal model shifts labels, and makes no prediction of the first token."""
    model = adapted(family).eval()
    batch = batches(1)[0]
    labels = batch["labels"].clone()
    labels[0, 3:9] = -100
    batch["labels"] = labels
    loss, logits = model(**batch)[:2]
    logits = logits[:, : logits.shape[1] - first].flatten(0, 1)
    total = torch.nn.functional.cross_entropy(logits, labels[:, first:].flatten(), reduction="sum")
    assert float(total / loss) == pytest.approx(count_predictions(model, batch), rel=1e-5)


def test_mode_hooks_and_gradients_stay(one_thread):
    model = adapted().train()
    balance_updates(model, batches())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    for _, layer in clover_layers(model):
        assert not layer._forward_hooks
        assert not layer.base_layer._forward_hooks


def test_an_adapter_of_inference_mode_is_refused(one_thread):
    with torch.inference_mode():
        model = adapted()
        with pytest.raises(ValueError, match=r"outside of torch\.inference_mode\(\)"):
            balance_updates(model, batches())


def test_what_cannot_be_done_is_refused_and_changes_nothing(one_thread):
    data = batches()
    model = adapted()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"'other': expected a model with this CLOVER adapter, found \['default'\]; pass adapter_name"
    ):
        balance_updates(model, data, "other")
    with pytest.raises(ValueError, match="expected batches to run the model on, found none"):
        balance_updates(model, [])
    with pytest.raises(ValueError, match=r"give the model a loss, found \['input_ids'\]; add labels"):
        balance_updates(model, [{"input_ids": data[0]["input_ids"]}])
    model.add_adapter("other", CloverConfig())
    with pytest.raises(
        ValueError, match=r"'other': expected no other active .* found default; call set_adapter\('other"
    ):
        balance_updates(model, data, "other")
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"'default': expected no other active adapter, .* found other; call set_ad"):
        balance_updates(model, data)
    model.set_adapter("default")
    with model.disable_adapter(), pytest.raises(ValueError, match="expected adapter 'default' to be active"):
        balance_updates(model, data)
    model.delete_adapter("other")
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="found it frozen; make it with inference_mode=False, or load"):
        balance_updates(model, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="expected save_bases=True or 'folded', found False"):
        balance_updates(adapted(save_bases=False), data)
    with pytest.raises(ValueError, match="save_bases=False computes the bases again"):
        CloverConfig(balanced_updates=True, save_bases=False)
    with pytest.raises(ValueError, match="balanced_updates is set by balance_updates"):
        get_peft_model(build("llama"), CloverConfig(balanced_updates=True))
    model = adapted()
    perturb(model)
    with pytest.raises(ValueError, match="found one that is trained; make another"):
        balance_updates(model, data)
    model = adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="found one that is merged"):
        balance_updates(model, data)
    with pytest.raises(ValueError, match="expected a model with this CLOVER adapter"):
        balance_updates(get_peft_model(build("llama"), LoraConfig(target_modules=["v_proj"])), data)
