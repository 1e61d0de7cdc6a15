"""How many directions each head keeps: rules, ranks by name, calibrations and gradients."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
import torch.nn.utils.prune
import transformers

import clover_peft
from clover_peft.pruning import by_layer, decompose, find_pairs
from clover_peft.pruning.narrow.loading import read_record
from clover_peft.pruning.sensitivity import sensitivities
from tests.support.pruning import batches, iter_fails, prune, unchanged
from tests.support.tiny import VOCAB, build, inputs, logits, relative

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("rule", ["threshold", "energy", "given", "multiple", "layer", "one kind"])
def test_rules(rule):
    model = build("opt")
    if rule == "given":
        names = [pair.name for pair in find_pairs(model)]
        report = prune(model, ranks={names[0]: [3, 4, 5, 6]})
        assert list(report.pairs) == names[:1]
        assert report.pairs[names[0]].kept == [3, 4, 5, 6]
        assert report.pairs[names[0]].width == 6
        return
    options = {
        "threshold": {"threshold": {"vo": 0.7}},
        "energy": {"energy": {"vo": 0.9}},
        "multiple": {"ratio": {"vo": 0.5}, "multiple": 4},
        "layer": {"ratio": {"vo": 0.5}, "ranks": "layer"},
        "one kind": {"ratio": {"vo": 0.5}, "target_modules": ["layers.1.self_attn.v_proj"]},
    }
    report = prune(model, **options[rule])
    kept = [pair.kept for pair in report.pairs.values()]
    assert {pair.kind for pair in report.pairs.values()} == {"vo"}
    if rule == "multiple":
        assert all(k % 4 == 0 for heads in kept for k in heads)
    elif rule == "layer":
        assert all(len(set(heads)) == 1 for heads in kept)
        assert sum(map(sum, kept)) / (2 * 4 * 12) == pytest.approx(0.5, abs=4 / 96)
    elif rule == "one kind":
        assert len(kept) == 1
        assert model.model.decoder.layers[0].self_attn.v_proj.out_features == 48
    elif rule == "energy":
        assert all(e >= 0.9 for pair in report.pairs.values() for e in pair.energy)
    assert min(map(min, kept)) < 12


def test_ragged_ranks_cost_what_the_report_says():
    model = build("gpt2")
    report = prune(model, 0.5)
    cache = model(**inputs("gpt2")).past_key_values
    tokens = inputs("gpt2")["input_ids"].numel()
    measured = sum(t.numel() * t.element_size() for layer in cache.layers for t in (layer.keys, layer.values))
    assert measured == report.cache_bytes[1] * tokens
    assert report.parameters[1] == sum(p.numel() for p in model.parameters())
    uniform = build("gpt2")
    report = prune(uniform, 0.5, ranks="uniform")
    assert report.cache_bytes[1] * 2 == report.cache_bytes[0]


@pytest.mark.parametrize("family", ["llama", "bart", "bert", "vit"])
def test_gradient_weighs_layers_by_what_the_loss_minds(family):
    """Against autograd with all weights trained, on the same draws."""
    model, data = build(family), batches(family, 2)
    model.requires_grad_(True)
    before = {name: (p.clone(), p.requires_grad) for name, p in model.named_parameters()}
    pairs = [pair for pair in find_pairs(model) if pair.kind == "vo"]
    found = sensitivities(model, pairs, data)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters())
    generator, outputs = torch.Generator().manual_seed(0), {pair.name: [] for pair in pairs}
    for batch in data:
        handles = []
        for pair in pairs:
            module = model.get_submodule(pair.partner.path)
            handles.append(module.register_forward_hook(lambda m, i, o, n=pair.name: outputs[n].append(o)))
        logs = model(**batch).logits.log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp().flatten(0, -2), 1, generator=generator)
        losses = -logs.flatten(0, -2).gather(-1, drawn).view(logs.shape[:-1])
        mask = batch.get("attention_mask", torch.ones(1)) if family in ("llama", "bert") else torch.ones(1)
        for outs in outputs.values():
            outs[-1].retain_grad()
        (losses * mask).sum().backward()
        for handle in handles:
            handle.remove()
    for pair in pairs:
        total = sum(float(o.grad.double().square().sum()) for o in outputs[pair.name]) ** 0.5
        assert found[pair.name] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("family", ["llama", "bart", "gpt_neox"])
@pytest.mark.parametrize("ranks", ["global", "gradient"])
def test_calibrated_once_and_pruned_often(family, ranks):
    """As with the batches themselves, bit by bit, at every ratio, of every copy and by both methods."""
    whole, data = build(family), batches(family, 2)
    before = {name: p.clone() for name, p in whole.named_parameters()}
    measured = clover_peft.calibrate(whole, iter(data), gradients=ranks == "gradient")
    assert all(torch.equal(p, before[name]) for name, p in whole.named_parameters())
    for share, method in ((0.25, "clover"), (0.5, "clover"), (0.5, "vanilla")):
        one, other = (copy.deepcopy(whole) for _ in range(2))
        reports = [
            prune(model, share, ranks=ranks, method=method, calibration=c)
            for model, c in ((one, measured), (other, data))
        ]
        assert reports[0].calibrated
        assert reports[0].pairs == reports[1].pairs
        pairs = zip(one.named_parameters(), other.named_parameters(), strict=True)
        assert all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)


def test_what_was_calibrated_must_fit():
    model, data = build("bart"), batches("bart")
    measured = clover_peft.calibrate(model, data, target_modules=["v_proj"])
    assert repr(measured) == f"Calibration({len(measured.moments)} moments of at least 456 tokens)"
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"k_proj.*: expected moments, found none; calibrate with the same target_mod"
    ):
        prune(model, 0.5, calibration=measured)
    with pytest.raises(ValueError, match="expected a sensitivity, found none; calibrate with gradients=True"):
        prune(model, {"vo": 0.5}, calibration=measured, ranks="gradient")
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    with pytest.raises(ValueError, match="target_modules='nothing'"):
        clover_peft.calibrate(build("bart"), data, target_modules="nothing")
    with pytest.raises(ValueError, match="expected a model without adapters"):
        clover_peft.calibrate(peft.get_peft_model(build("llama"), clover_peft.CloverConfig()), data)


@pytest.mark.parametrize("change", ["pruned", "masked", "trained", "cast", "another"])
def test_a_calibration_belongs_to_its_weights(change):
    model, data = build("opt"), batches("opt")
    measured = clover_peft.calibrate(model, data)
    prune(copy.deepcopy(model), {"qk": 0.5}, calibration=measured)  # a copy is the same
    if change == "trained":
        weight = model.model.decoder.layers[0].fc1.weight
        weight.data += 1e-4 * torch.randn_like(weight)
    elif change == "cast":
        model.bfloat16()
    elif change == "another":
        torch.manual_seed(99)
        model = type(model)(model.config)
    else:
        prune(model, {"vo": 0.5}, calibration=measured, masked=change == "masked")
    with pytest.raises(ValueError, match="expected one of this model as it is, found other weights"):
        prune(model, {"qk": 0.5}, calibration=measured)


def test_gradient_spreads_by_weighed_values():
    model, data = build("llama"), batches("llama")
    pairs = find_pairs(model)
    weights = sensitivities(model, pairs, data)
    spectra = {
        name: d.values * weights[name] for name, (_, d) in decompose(model, calibration=data, kinds=["vo"]).items()
    }
    both = build("opt"), build("opt")
    given = batches("opt")
    kept = [prune(m, 0.4, ranks=r, calibration=given).pairs for m, r in zip(both, ("gradient", "layer"), strict=True)]
    keys = [{n: p.kept for n, p in pairs.items() if p.kind == "qk"} for pairs in kept]
    assert keys[0] == keys[1]  # queries with keys are not weighed
    report = prune(model, {"vo": 0.4}, ranks="gradient", calibration=data)
    assert {n: p.kept for n, p in report.pairs.items()} == {n: k.tolist() for n, k in by_layer(spectra, 0.4).items()}


@pytest.mark.parametrize("ranks", ["global", "gradient"])
def test_an_error_in_a_batch_changes_nothing(ranks):
    model = build("opt").requires_grad_()
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = [*batches("opt", 3), {"input_ids": torch.tensor([[VOCAB + 5]])}]
    with pytest.raises(IndexError):
        prune(model, 0.5, calibration=data, ranks=ranks)
    assert unchanged(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_one_figure_is_for_the_kinds_that_are_named():
    report = prune(build("opt"), 0.5, target_modules=["v_proj"])
    assert {pair.kind for pair in report.pairs.values()} == {"vo"}


def test_a_second_ratio_counts_no_padding():
    """Heads that are padded to the widest of their layer have no directions there that could be removed."""
    model = build("opt")
    first = prune(model, 0.5, calibration=batches("opt"), ranks="global")
    assert any(min(pair.kept) < pair.width for pair in first.pairs.values())
    expected = logits(model, "opt")
    given = {name: [pair.width] * len(pair.kept) for name, pair in first.pairs.items()}
    for options in ({"ranks": "global"}, {"ranks": "layer"}, {"ranks": "uniform", "multiple": 4}, {"ranks": given}):
        again = copy.deepcopy(model)
        none = prune(again, None if options["ranks"] is given else 0.0, **options)
        assert {n: p.before for n, p in none.pairs.items()} == {n: p.kept for n, p in first.pairs.items()}
        assert {n: p.kept for n, p in none.pairs.items()} == {n: p.kept for n, p in first.pairs.items()}
        assert none.removed("qk") == none.removed("vo") == 0
        assert relative(logits(again, "opt"), expected) < 1e-5
    for ranks in ("global", "uniform", "layer"):
        again = copy.deepcopy(model)
        report = prune(again, 0.25, calibration=batches("opt"), ranks=ranks)
        assert report.removed("vo") == pytest.approx(0.25, abs=0.02 if ranks != "uniform" else 0.1)
        assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    assert report.summary().count("directions with padding") == 2
    with pytest.raises(ValueError, match="kind: expected 'qk' or 'vo', found 'zz'"):
        report.removed("zz")


def test_ranks_by_name_leave_other_layers_alone():
    model, data = build("opt"), batches("opt")
    before = {name: p.clone() for name, p in model.named_parameters()}
    name = next(pair.name for pair in find_pairs(model) if pair.kind == "vo")
    with pytest.raises(ValueError, match=r"expected 4 ranks from 0 to 12, found \[3\]"):
        prune(model, ranks={name: [3]}, calibration=iter_fails())
    with pytest.raises(ValueError, match="multiple: expected at most the 12 directions"):
        prune(model, 0.5, multiple=16, calibration=iter_fails())
    report = prune(model, ranks={name: [3, 4, 5, 6]}, calibration=data)
    assert list(report.pairs) == [name]
    assert list(read_record(model)["blocks"]) == ["decoder.layers.0.self_attn"]
    now = dict(model.named_parameters())
    assert all(torch.equal(p, now[n]) for n, p in before.items() if "layers.0.self_attn" not in n)
    assert type(model.model.decoder.layers[1].self_attn) is transformers.models.opt.modeling_opt.OPTAttention


def test_labels_do_not_matter_to_an_encoder():
    model = build("bert")
    ids = inputs("bert", batch=2, length=12)["input_ids"]
    padded = torch.ones_like(ids)
    padded[0, 5:] = 0
    pairs = [pair for pair in find_pairs(model) if pair.kind == "vo"]
    batch = {"input_ids": ids, "attention_mask": padded}
    assert sensitivities(model, pairs, [batch]) == sensitivities(model, pairs, [{**batch, "labels": ids}])


def test_no_gradients_are_left_on_inputs():
    model = build("llama")
    embedded = torch.randn(2, 8, 48, requires_grad=True)
    clover_peft.calibrate(model, [{"inputs_embeds": embedded}], gradients=True)
    assert embedded.grad is None


def test_gradients_with_labels_and_without_values():
    data = [{"input_ids": inputs("t5")["input_ids"], "labels": inputs("t5")["input_ids"]}] * 2
    assert prune(build("t5"), 0.5, calibration=data, ranks="gradient").removed("vo") > 0.3
    report = prune(build("opt"), {"qk": 0.5}, calibration=batches("opt"), ranks="gradient")
    assert report.removed("vo") == 0
    assert report.removed("qk") == pytest.approx(0.5, abs=0.05)
    data, model = batches("opt"), build("opt")
    with torch.inference_mode():
        prune(model, 0.5, calibration=data, ranks="gradient")
    assert not any(p.is_inference() for p in model.parameters())
