"""`prune`: heads made physically narrower, for every family; saved and loaded like any model."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import torch.nn.utils.prune
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

import clover_peft
from clover_peft.base_model.resolve import attention_block, default_targets
from clover_peft.pruning import by_layer, decompose, find_pairs
from clover_peft.pruning.narrow.attention import split_heads
from clover_peft.pruning.narrow.loading import install, read_record
from clover_peft.pruning.narrow.modules import narrow, widths
from clover_peft.pruning.sensitivity import sensitivities
from tests.support.pruning import GENERATING, NARROW, batches, kinds, prune, ratio, shown
from tests.support.tiny import FAMILIES, TOLERANCE, VOCAB, build, inputs, logits, output, perturb, relative

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("family", NARROW)
def test_full_width_is_the_stock_module_bit_for_bit(family):
    model = build(family)
    before = logits(model, family)
    blocks = {b.path: b for path in default_targets(model) if (b := attention_block(model, path)) is not None}
    for block in blocks.values():
        state = {path: p.clone() for path, p in model.named_parameters()}
        output = model.get_submodule(block.prefix + block.family.output)
        narrow(block, *widths(block), getattr(output, "bias", None) is not None)
        model.load_state_dict(state, strict=False)
    assert torch.equal(logits(model, family), before)


@pytest.mark.parametrize("family", NARROW)
def test_nothing_removed_changes_nothing(family):
    model = build(family)
    before = logits(model, family)
    report = prune(model, ratio(model, 0.0))
    assert relative(logits(model, family), before) < 1e-5
    assert report.parameters[0] == report.parameters[1]
    assert all(report.removed(kind) == 0 for kind in kinds(model))


@pytest.mark.parametrize("ranks", ["global", "uniform", "layer"])
@pytest.mark.parametrize("family", NARROW)
def test_sliced_is_masked(family, ranks):
    model = build(family)
    twin = copy.deepcopy(model)
    report = prune(model, ratio(model, 0.4), ranks=ranks)
    prune(twin, ratio(twin, 0.4), ranks=ranks, masked=True)
    assert relative(logits(model, family), logits(twin, family)) < 1e-5
    assert report.parameters[1] < report.parameters[0]
    if "bert" in family or family in ("camembert", "electra", "vit", "clip", "siglip", "unet"):
        assert report.cache_bytes == (0, 0)
    else:
        assert report.cache_bytes[1] < report.cache_bytes[0] or "deepseek" in family


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "t5", "gpt_neox", "deepseek_v3"])
def test_nothing_removed_changes_nothing_on_data_that_are_all_alike(family):
    model = build(family)
    before, data = logits(model, family), batches(family, 2)
    for batch in data:
        for name in ("input_ids", "decoder_input_ids"):
            if name in batch:
                batch[name] = torch.full((2, 300 if family == "llama" else 20), 7)
        batch.pop("attention_mask", None)
    prune(model, ratio(model, 0.0), calibration=data)
    assert torch.equal(logits(model, family), before)
    prune(model, ratio(model, 0.3), calibration=data)
    assert logits(model, family).isfinite().all()


def test_a_known_bias_of_the_values_matters_to_no_cut():
    """Large biases of keys and values that cancel further on: the same function, and the same directions."""
    plain, shifted = build("opt", torch.float64), build("opt", torch.float64)
    for layer in shifted.model.decoder.layers:
        attention = layer.self_attn
        attention.v_proj.bias.data += 3
        attention.out_proj.bias.data -= attention.out_proj.weight.sum(1) * 3
        attention.k_proj.bias.data += 3
    assert relative(logits(shifted, "opt"), logits(plain, "opt")) < 1e-10
    for model in (plain, shifted):
        prune(model, 0.3, calibration=batches("opt"))
    assert relative(logits(shifted, "opt"), logits(plain, "opt")) < 1e-4


@pytest.mark.parametrize("family", NARROW)
def test_sliced_is_masked_with_calibration(family):
    model = build(family)
    twin = copy.deepcopy(model)
    data = batches(family)
    prune(model, ratio(model, 0.4), calibration=data)
    prune(twin, ratio(twin, 0.4), calibration=data, masked=True)
    assert relative(logits(model, family), logits(twin, family)) < 1e-4


def reload(model, folder):
    """The model from its folder, as another process finds it: only what was saved counts."""
    model.save_pretrained(folder)
    same = {"experts_implementation": "eager"} if "Deepseek" in type(model).__name__ else {}  # not saved with a config
    return type(model).from_pretrained(folder, **same).eval().requires_grad_(False)


@pytest.mark.parametrize("ranks", ["global", "uniform"])
@pytest.mark.parametrize("family", NARROW)
def test_saved_and_loaded(family, ranks, tmp_path):
    model = build(family)
    prune(model, ratio(model, 0.4), ranks=ranks, calibration=batches(family) if ranks == "global" else None)
    loaded = reload(model, tmp_path)
    assert torch.equal(logits(loaded, family), logits(model, family))
    assert read_record(loaded)["steps"] == read_record(model)["steps"]


@pytest.mark.parametrize("family", GENERATING)
def test_generates_as_without_a_cache(family, tmp_path):
    """Greedy, sampled by beams, with a static cache: what is generated is what the plain forward says."""
    model = build(family)
    prune(model, ratio(model, 0.4))
    loaded = reload(model, tmp_path)
    given = {k: v for k, v in inputs(family).items() if not k.startswith("decoder")}
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = model.generate(**given, **options, use_cache=False)
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(loaded.generate(**given, **options, **more), plain), more
    assert torch.equal(
        loaded.generate(**given, **options, num_beams=3),
        model.generate(**given, **options, num_beams=3, use_cache=False),
    )


# ---------------------------------------------------------------------- shapes


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_grouped_heads_biases_and_dtypes(heads, bias, dtype):
    model = build("llama", dtype, num_key_value_heads=heads, attention_bias=bias)
    before = logits(model, "llama")
    twin = copy.deepcopy(model)
    report = prune(model, {"vo": 0.5}, calibration=batches("llama"))
    prune(twin, {"vo": 0.5}, calibration=batches("llama"), masked=True)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert len(next(iter(report.pairs.values())).kept) == heads
    assert relative(logits(model, "llama"), logits(twin, "llama")) < 10 * TOLERANCE[dtype]
    assert relative(logits(model, "llama"), before) > TOLERANCE[dtype]


@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_cross_attention_of_decoders(family):
    """Sliced as masked, with and without a cache of both kinds of keys and values."""
    more = {} if family == "gpt2" else {"is_decoder": True}
    model = build(family, add_cross_attention=True, use_cache=True, **more)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = clover_peft.prune(model, 0.4)
        clover_peft.prune(twin, 0.4, masked=True)
    assert any("cross" in name for name in report.pairs)
    ids, read = torch.randint(3, VOCAB, (2, 6)), torch.randn(2, 5, 48)
    whole = twin(input_ids=ids, encoder_hidden_states=read).logits
    assert relative(model(input_ids=ids, encoder_hidden_states=read).logits, whole) < 1e-5
    cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
    steps = [
        model(input_ids=ids[:, i : i + 1], encoder_hidden_states=read, past_key_values=cache, use_cache=True).logits
        for i in range(6)
    ]
    assert relative(torch.cat(steps, dim=1), whole) < 1e-5


def test_softmax_keeps_its_scale():
    """Half of Q-K is zero and goes: the same attention."""
    model = build("opt", torch.float64)
    for layer in model.model.decoder.layers:
        rows = layer.self_attn.k_proj
        rows.weight.view(4, 12, -1)[:, 6:] = 0
        rows.bias.view(4, 12)[:, 6:] = 0
    before = logits(model, "opt")
    prune(model, {"qk": 0.0}, ranks="uniform")  # what is zero is no direction
    assert model.model.decoder.layers[0].self_attn.k_proj.out_features == 24
    assert relative(logits(model, "opt"), before) < 1e-9


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


def test_a_bias_is_loaded_where_no_width_changed(tmp_path):
    """One head of each layer keeps all directions, the other does not: the widths stay, the constant needs a bias."""
    model = build("qwen2")
    names = [pair.name for pair in find_pairs(model)]
    report = prune(model, ranks={name: [12, 6] for name in names})
    assert model.model.layers[0].self_attn.o_proj.bias is not None
    assert {pair.width for pair in report.pairs.values()} == {12}
    assert torch.equal(logits(reload(model, tmp_path), "qwen2"), logits(model, "qwen2"))


def test_heads_that_keep_nothing():
    """All directions but one layer's removed: the others pass on the constant alone."""
    model, data = build("opt", torch.float64), batches("opt")
    names = [pair.name for pair in find_pairs(model)]
    report = prune(model, ranks={name: [0] * 4 for name in names}, calibration=data)
    assert {pair.width for pair in report.pairs.values()} == {1}
    assert logits(model, "opt").isfinite().all()


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


# ---------------------------------------------------------------------- as any model


def in_another_process(code: str) -> str:
    """What `code` prints where nothing but `import clover_peft` was done before it."""
    root = str(Path(__file__).parents[2])
    start = f"import sys; sys.path.insert(0, {root!r})\nimport json, torch, transformers, clover_peft\n"
    done = subprocess.run([sys.executable, "-c", start + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip().splitlines()[-1]


def test_another_process_loads_and_generates(tmp_path):
    """Every family: the same tokens, and of those that generate none the same output."""
    expected = {}
    for family in NARROW:
        model = build(family)
        prune(model, ratio(model, 0.4), calibration=batches(family))
        model.save_pretrained(tmp_path / family)
        expected[family] = shown(model, family)
    code = f"""
from tests.support.pruning import load_all
print(json.dumps(load_all({str(tmp_path)!r}, {list(NARROW)!r})))
"""
    assert json.loads(in_another_process(code)) == expected


def test_other_heads_and_pipelines_load_it(tmp_path):
    model = build("llama")
    prune(model, {"vo": 0.5}, calibration=batches("llama"))
    model.save_pretrained(tmp_path)
    words = {word: i for i, word in enumerate(["<pad>", "<bos>", "<eos>", "one", "two", "three"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    special = dict(pad_token="<pad>", bos_token="<bos>", eos_token="<eos>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path)
    code = f"""
folder = {str(tmp_path)!r}
from tests.support.tiny import inputs
trunk = transformers.AutoModel.from_pretrained(folder)
model = transformers.AutoModelForCausalLM.from_pretrained(folder)
head = transformers.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
widths = [m.layers[1].self_attn.v_proj.out_features for m in (model.model, trunk, head.model)]
assert len(set(widths)) == 1, widths
assert torch.equal(trunk(**inputs("llama")).last_hidden_state, model.model(**inputs("llama")).last_hidden_state)
pipe = transformers.pipeline("text-generation", folder)
ids = pipe("one two", max_new_tokens=4, do_sample=False, return_tensors=True)[0]["generated_token_ids"]
print(json.dumps([int(i) for i in ids]))
"""
    found = json.loads(in_another_process(code))
    ids = torch.tensor([[words["one"], words["two"]]])
    assert found == model.generate(input_ids=ids, max_new_tokens=4, do_sample=False)[0].tolist()


def test_a_pruned_model_is_quantised_when_loaded(tmp_path):
    pytest.importorskip("bitsandbytes", reason="needs the quant extra: pip install clover-peft[quant]")
    model = build("llama")
    prune(model, {"vo": 0.5}, calibration=batches("llama"))
    model.save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(load_in_8bit=True)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert type(quantised.model.layers[0].self_attn.v_proj).__name__ == "Linear8bitLt"
    before = logits(quantised, "llama")
    assert relative(before, logits(model, "llama")) < 0.05
    adapted = peft.get_peft_model(quantised, clover_peft.CloverConfig())
    assert torch.equal(logits(adapted, "llama"), before)


@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gpt_neox"])
def test_attention_implementations_agree(family, implementation):
    model = build(family)
    prune(model, ratio(model, 0.4))
    model.set_attn_implementation("eager")
    expected = logits(model, family)
    try:
        model.set_attn_implementation(implementation)
    except ValueError as error:  # the family's own limit
        pytest.skip(str(error))
    mask = inputs(family)["attention_mask"].bool()
    assert relative(logits(model, family)[mask], expected[mask]) < 1e-4


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "whisper"])
def test_trains_with_gradient_checkpointing(family):
    model = build(family)
    prune(model, ratio(model, 0.4))
    model.requires_grad_(True)
    grads = []
    for checkpointing in (False, True):
        model.zero_grad()
        model.eval()
        if checkpointing:
            model.gradient_checkpointing_enable()
            model.train()
            for module in model.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.0
                for name in ("dropout", "activation_dropout", "attention_dropout", "dropout_rate"):
                    if isinstance(getattr(module, name, None), float):
                        setattr(module, name, 0.0)
        output(model, family).square().sum().backward()
        grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1])
    assert all(relative(grads[1][n], grads[0][n]) < 1e-4 for n in grads[0] if grads[0][n].norm() > 1e-6)


def test_compiles():
    model = build("llama")
    prune(model, {"vo": 0.5})
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**inputs("llama")).logits, logits(model, "llama"))


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "deepseek_v3", "bert"])
def test_adapters_and_a_second_pruning(family, tmp_path):
    model = build(family)
    prune(model, ratio(model, 0.25), ranks="uniform")
    before = logits(model, family)
    adapted = peft.get_peft_model(copy.deepcopy(model), clover_peft.CloverConfig())
    assert torch.equal(logits(adapted, family), before)
    perturb(adapted)
    changed = logits(adapted, family)
    assert relative(changed, before) > 1e-3
    merged = adapted.merge_and_unload()
    assert relative(logits(merged, family), changed) < 1e-4
    assert relative(logits(reload(merged, tmp_path / "merged"), family), changed) < 1e-4
    lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules="all-linear"))
    assert torch.equal(logits(lora, family), before)
    prune(model, ratio(model, 0.3))
    assert len(read_record(model)["steps"]) == 2
    assert relative(logits(reload(model, tmp_path / "twice"), family), logits(model, family)) < 1e-6


@pytest.mark.parametrize("family", ["opt", "bert", "gpt2"])
def test_copies_and_pickles(family):
    model = build(family)
    prune(model, ratio(model, 0.4))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, family), logits(model, family))


def test_a_part_is_sharded_by_its_heads():
    """Tensor parallelism leaves some heads of every projection of one part to a process."""
    model = build("opt")
    prune(model, ratio(model, 0.5), ranks="uniform")
    attention = model.model.decoder.layers[0].self_attn
    x = torch.randn(1, 3, 48)
    whole = attention.v_proj(x).unflatten(-1, (4, -1)).transpose(1, 2)
    attention.v_proj.weight.data = attention.v_proj.weight.data[:12]
    attention.v_proj.bias.data = attention.v_proj.bias.data[:12]
    assert torch.equal(split_heads(attention, x, None, True)["v"], whole[:, :2])


def test_what_is_not_touched_stays():
    model = build("llama")
    query = model.model.layers[0].self_attn.q_proj
    state = torch.get_rng_state()
    prune(model, {"vo": 0.5})
    assert model.model.layers[0].self_attn.q_proj is query
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tower_of_a_shared_config(tmp_path):
    model = build("whisper")
    prune(model.get_encoder(), {"vo": 0.5})
    assert torch.equal(logits(reload(model, tmp_path), "whisper"), logits(model, "whisper"))


def test_a_pruned_encoder_alone(tmp_path):
    model = build("t5")
    prune(model, 0.5)
    model.save_pretrained(tmp_path)
    alone = transformers.T5EncoderModel.from_pretrained(tmp_path).eval()
    ids = inputs("t5")["input_ids"]
    assert relative(alone(input_ids=ids).last_hidden_state, model.encoder(input_ids=ids).last_hidden_state) < 1e-6


def test_the_name_of_the_base_is_taken_back(tmp_path):
    """Or an adapter would be loaded onto the base as it was before."""
    build("opt").save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    prune(model, 0.5)
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["fc1"])).save_pretrained(tmp_path / "adapter")
    with pytest.raises(Exception, match="pruned: save it"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("wrapped", ["first", "ours"])
def test_loading_is_installed_once_and_for_all(wrapped, monkeypatch):
    post_init = transformers.PreTrainedModel.post_init
    if wrapped == "first":

        @functools.wraps(lambda self: None)
        def theirs(self):
            post_init.__wrapped__(self)

        monkeypatch.setattr(transformers.PreTrainedModel, "post_init", theirs)
    else:
        monkeypatch.setattr(transformers.PreTrainedModel, "post_init", post_init)
    before = transformers.PreTrainedModel.post_init
    install()
    assert transformers.PreTrainedModel.post_init.clover
    assert (transformers.PreTrainedModel.post_init is before) == (wrapped == "ours")


def test_records_of_other_versions_are_refused(tmp_path):
    model = build("opt")
    prune(model, 0.5)
    record = copy.deepcopy(model.config.clover_pruning)
    path = next(iter(record["blocks"]))
    for wrong, message in (
        ({**record, "version": 99}, "expected version 1, found 99"),
        ("yes", "expected version 1, found 'yes'"),
        ({**record, "blocks": None}, "expected blocks and steps"),
        ({**record, "blocks": {path: [12, -3, False]}}, "expected two widths"),
        ({**record, "blocks": {path: ["12", 6, False]}}, "expected two widths"),
        ({**record, "blocks": {path: None}}, "expected two widths"),
    ):
        model.config.clover_pruning = wrong
        with pytest.raises(ValueError, match=f"clover_pruning in the config: .*{message}"):
            reload(model, tmp_path)
        with pytest.raises(ValueError, match=f"clover_pruning in the config: .*{message}"):
            prune(model, 0.5)


def test_records_that_say_sequential_still_load(tmp_path):
    """Earlier versions wrote `sequential`, which is no option any more, into every step of the record."""
    model = build("opt")
    prune(model, {"vo": 0.5}, ranks="uniform")
    expected = logits(model, "opt")
    for step in model.config.clover_pruning["steps"]:
        step["sequential"] = True
    again = reload(model, tmp_path)
    assert torch.equal(logits(again, "opt"), expected)
    prune(again, {"qk": 0.5})
    assert [step.get("sequential") for step in again.config.clover_pruning["steps"]] == [True, None]


def test_figures_of_other_libraries_are_saved(tmp_path):
    model = build("opt")
    prune(model, {"vo": np.float32(0.5)}, multiple=np.int64(4))
    prune(model, threshold=torch.tensor(0.1))
    assert torch.equal(logits(reload(model, tmp_path), "opt"), logits(model, "opt"))


def test_one_figure_is_for_the_kinds_that_are_named():
    report = prune(build("opt"), 0.5, target_modules=["v_proj"])
    assert {pair.kind for pair in report.pairs.values()} == {"vo"}


def test_what_has_no_config_of_its_own():
    for part in (torch.nn.Sequential(build("opt")), build("llama").model.layers[0], build("bert").bert.encoder):
        before = {name: p.clone() for name, p in part.named_parameters()}
        with pytest.raises(ValueError, match="expected a model of transformers or diffusers"):
            prune(part, 0.5)
        assert unchanged(part, before)


@pytest.mark.parametrize("family", ["opt", "bert", "deepseek_v3", "unet"])
def test_a_failure_half_way_can_still_be_saved(family, monkeypatch, tmp_path):
    """Inside a block, whose projections are new and empty by then: it is as it was."""
    from clover_peft.pruning.narrow import rewriting as module

    model, calls = build(family), []
    before = {name: p.clone() for name, p in model.named_parameters()}

    def failing(*arguments):
        narrow(*arguments)
        calls.append(arguments[0].path)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(module, "narrow", failing)
    with pytest.raises(torch.OutOfMemoryError):
        prune(model, {"vo": 0.5}, ranks="uniform")
    assert set(read_record(model)["blocks"]) == {calls[0].removeprefix("model.").removeprefix("bert.")}
    now = dict(model.named_parameters())
    changed = {name for name in before if now[name].shape != before[name].shape}
    assert changed
    assert all(name.startswith(calls[0].rpartition(".")[0]) for name in changed)
    block = calls[0].removesuffix(".self") + "."
    assert all(torch.equal(now[name], before[name]) for name in before if not name.startswith(block))
    assert torch.isfinite(output(model, family)).all()
    if family != "unet":
        assert torch.equal(logits(reload(model, tmp_path), family), logits(model, family))


def test_weights_that_cannot_be_written_are_refused():
    with torch.inference_mode():
        model = build("gpt2")
    with pytest.raises(
        ValueError, match="c_attn: expected a weight that can be written to, found an inference tensor"
    ):
        prune(model, 0.5)
    for masked in (False, True):
        model = build("opt")
        projection = model.model.decoder.layers[0].self_attn.out_proj
        torch.nn.utils.prune.l1_unstructured(projection, "weight", 0.3)
        with pytest.raises(ValueError, match="out_proj: expected a weight of its own, found one that is computed"):
            prune(model, 0.5, masked=masked)


def test_a_second_ratio_counts_no_padding():
    """Heads that are padded to the widest of their layer have no directions there that could be removed."""
    model = build("opt")
    first = prune(model, 0.5, calibration=batches("opt"))
    assert any(min(pair.kept) < pair.width for pair in first.pairs.values())
    expected = logits(model, "opt")
    none = prune(model, 0.0)
    assert {n: p.before for n, p in none.pairs.items()} == {n: p.kept for n, p in first.pairs.items()}
    assert {n: p.kept for n, p in none.pairs.items()} == {n: p.kept for n, p in first.pairs.items()}
    assert none.removed("qk") == none.removed("vo") == 0
    assert relative(logits(model, "opt"), expected) < 1e-5
    for ranks in ("global", "uniform", "layer"):
        again = copy.deepcopy(model)
        report = prune(again, 0.25, calibration=batches("opt"), ranks=ranks)
        assert report.removed("vo") == pytest.approx(0.25, abs=0.1)
        assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in model.parameters())
    assert report.summary().count("directions, padding counted") == 2
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


def iter_fails():
    raise AssertionError("data were read")
    yield


def test_options_of_wrong_types():
    model = build("opt")
    for wrong in ("8", None, float("nan"), 1.5):
        with pytest.raises(ValueError, match="multiple: expected a positive whole number"):
            prune(model, 0.5, multiple=wrong)
    with pytest.raises(ValueError, match=r"ratio: expected a number, or one for each kind of pair, found '0\.5'"):
        prune(model, "0.5")
    with pytest.raises(ValueError, match="ratio: expected a figure for 'qk', for 'vo' or for both"):
        prune(model, {"kv": 0.5})
    with pytest.raises(TypeError, match="expected batches, found one batch; pass a list of them"):
        prune(model, 0.5, calibration=batches("opt")[0])
    with pytest.raises(ValueError, match=r"target_modules='\(': expected a regular expression"):
        prune(model, 0.5, target_modules="(")
    with pytest.raises(TypeError, match="model: expected a module, found str"):
        prune("my-model", 0.5)
    report = prune(model, 0.5, calibration=batches("opt"), masked=np.bool_(False), multiple=np.int64(2))
    json.dumps(report.to_dict())
    json.dumps(read_record(model))


def test_the_base_of_any_name_is_taken_back():
    model = build("opt")
    model.name_or_path = model.config._name_or_path = "base (v2)"
    for _ in range(2):
        prune(model, 0.25)
        assert model.name_or_path == "base (v2) (pruned: save it, and load it from there)"


def test_warnings_point_at_the_users_line():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        clover_peft.prune(build("llama"), 0.5)
        clover_peft.calibrate(build("llama"), batches("llama", 1))
    assert len(caught) >= 3
    assert {Path(warning.filename).name for warning in caught} == {Path(__file__).name}


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


# ---------------------------------------------------------------------- bad input


def unchanged(model, before) -> bool:
    hooks = any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    names = dict(model.named_parameters())
    return not hooks and set(names) == set(before) and all(torch.equal(names[n], p) for n, p in before.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 1.0}, "ratio: expected a share"),
        ({"ratio": -0.1}, "ratio: expected a share"),
        ({"ratio": {"kv": 0.5}}, "expected a figure for 'qk', for 'vo' or for both"),
        ({"ratio": {}}, "expected a figure for 'qk', for 'vo' or for both"),
        ({"ratio": 0.5, "energy": 0.9}, "expected one rule"),
        ({"energy": 1.5}, "energy: expected a share"),
        ({"ranks": "local"}, "ranks: expected 'global'"),
        ({"ranks": {"nothing (vo)": [1]}}, "expected names of pairs such as"),
        ({"ratio": 0.5, "method": "magic"}, "method: expected 'clover' or 'vanilla'"),
        ({"ratio": 0.5, "calibration": []}, "expected batches to run the model on, found none"),
        ({"ratio": 0.5, "multiple": 2.5}, "multiple: expected a positive whole number"),
        ({"ratio": "half"}, "ratio: expected a number"),
        ({"ranks": {}}, "ranks: expected ranks by name"),
        ({"ranks": {"x (vo)": [1.5]}}, "ranks: expected whole numbers"),
        ({"ranks": {"x (vo)": 4}}, "ranks: expected whole numbers"),
        ({"ratio": 0.5, "multiple": 16}, "multiple: expected at most the 12 directions"),
        ({"threshold": 1e9}, "expected a rule that keeps some direction"),
        ({"threshold": float("nan")}, "threshold: expected a singular value"),
        ({"energy": 0.0}, "expected a rule that keeps some direction"),
        ({"ratio": 0.5, "ranks": "gradient"}, "ranks='gradient': expected data"),
        ({"energy": 0.5, "ranks": "uniform"}, "ranks='uniform': expected a ratio to spread, found energy"),
        ({"ratio": 0.5, "multiple": 0}, "multiple: expected a positive whole number"),
        ({"ratio": 0.5, "target_modules": "nothing"}, "expected it to name a pair"),
    ],
)
def test_bad_options_change_nothing(options, message):
    model = build("opt")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=message):
        prune(model, **options)
    assert unchanged(model, before)


def test_wrong_ranks_by_name():
    model = build("opt")
    name = find_pairs(model)[0].name
    for wrong in ([1, 2, 3], [1, 2, 3, 13], [1, 2, 3, -1]):
        with pytest.raises(ValueError, match="expected 4 ranks from 0 to 12"):
            prune(model, ranks={name: wrong})


def test_models_that_cannot_be_pruned():
    adapted = peft.get_peft_model(build("opt"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="expected a model without adapters"):
        prune(adapted, 0.5)
    with pytest.raises(ValueError, match=r"can be made narrow, found AlbertAttention of.*masked"):
        prune(build("albert"), 0.5)
    with pytest.raises(ValueError, match="expected pairs of projections to prune, found none"):
        prune(torch.nn.Sequential(torch.nn.Linear(4, 4)), 0.5, masked=True)
    tied = build("opt")
    layers = tied.model.decoder.layers
    layers[1].self_attn.v_proj.weight = layers[0].self_attn.v_proj.weight
    with pytest.raises(ValueError, match="found them tied to"):
        prune(tied, 0.5)
    with torch.device("meta"):
        empty = FAMILIES["opt"].build()
    with pytest.raises(ValueError, match="expected all weights in memory"):
        prune(empty, 0.5)
    with pytest.warns(UserWarning, match="qk: not pruned, because queries and keys are rotated"):
        report = prune(build("llama"), 0.5)
    assert report.skipped == {"qk": "queries and keys are rotated by their position, or normed"}


def test_what_cannot_work_is_said_before_the_data_are_read():
    def data():
        raise AssertionError("calibrated")
        yield

    tied = build("opt")
    layers = tied.model.decoder.layers
    layers[1].self_attn.v_proj.weight = layers[0].self_attn.v_proj.weight
    for model, options in (
        (tied, {}),
        (build("albert"), {}),
        (build("opt"), {"ratio": 2}),
        (build("opt"), {"energy": 2}),
        (build("opt"), {"multiple": 0}),
        (build("opt"), {"method": "magic"}),
    ):
        with pytest.raises(ValueError, match="expected"):
            prune(model, calibration=data(), **options)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (["text"], "expected a list of batches, each of a model's keyword arguments.*found str"),
        ({"input_ids": torch.ones(1, 4, dtype=torch.long)}, "expected batches, found one batch; pass a list"),
        ([torch.ones(1, 4)], "expected a list of batches.*found Tensor"),
        ([{"input_ids": [1, 2]}], "input_ids: expected a tensor of .rows, tokens., found list"),
        ([{"input_ids": torch.arange(4)}], "found shape"),
    ],
)
def test_what_is_no_batch(data, message):
    with pytest.raises(TypeError, match=message):
        prune(build("opt"), 0.5, calibration=data)


def test_attention_of_another_code_is_refused():
    """A class of the same name in a model's own code may do anything."""
    model = build("llama")
    attention = model.model.layers[0].self_attn
    foreign = type("LlamaAttention", (type(attention),), {"__module__": "transformers_modules.theirs"})
    attention.__class__ = foreign
    with pytest.raises(ValueError, match=r"found LlamaAttention of transformers_modules\.theirs"):
        prune(model, {"vo": 0.5})
    hooked = build("llama")
    hooked.model.layers[0].self_attn.forward = lambda *args: None
    with pytest.raises(ValueError, match="remove_hook_from_submodules"):
        prune(hooked, {"vo": 0.5})


def test_an_interrupt_while_calibrating_changes_nothing():
    model = build("opt")
    before = {name: p.clone() for name, p in model.named_parameters()}

    def data():
        yield batches("opt", 1)[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, 0.5, calibration=data())
    assert unchanged(model, before)


def test_an_interrupt_while_rewriting_waits_for_the_last_layer(monkeypatch, tmp_path):
    from clover_peft.pruning import pruner as module

    model = build("opt")
    rewrite = module.rewrite

    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        rewrite(*arguments)

    monkeypatch.setattr(module, "rewrite", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores interrupts
    try:
        with pytest.raises(KeyboardInterrupt):
            prune(model, 0.5, ranks="uniform")
    finally:
        signal.signal(signal.SIGINT, before)
    widths = {layer.self_attn.v_proj.out_features for layer in model.model.decoder.layers}
    assert widths == {24}
    assert torch.equal(logits(reload(model, tmp_path), "opt"), logits(model, "opt"))
