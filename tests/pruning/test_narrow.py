"""`prune`: heads made physically narrower, for every family, which then work like any model's."""

from __future__ import annotations

import copy
import pickle
import warnings

import peft
import pytest
import torch
import torch.nn.utils.prune
import transformers

import clover_peft
from clover_peft.base_model.resolve import attention_block, default_targets
from clover_peft.pruning import find_pairs
from clover_peft.pruning.narrow.attention import split_heads
from clover_peft.pruning.narrow.loading import read_record
from clover_peft.pruning.narrow.modules import narrow, widths
from tests.support.pruning import GENERATING, NARROW, batches, kinds, prune, ratio, reload
from tests.support.tiny import TOLERANCE, VOCAB, build, inputs, logits, output, perturb, relative

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


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("encoded", [6, 4])
@pytest.mark.parametrize("family", ["gpt2", "bert"])
def test_cross_attention_has_a_mask_of_its_own(family, encoded, implementation):
    more = {} if family == "gpt2" else {"is_decoder": True}
    model = build(family, add_cross_attention=True, attn_implementation=implementation, **more)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clover_peft.prune(model, 0.4)
        clover_peft.prune(twin, 0.4, masked=True)
    ids, read = torch.randint(3, VOCAB, (2, 6)), torch.randn(2, encoded, 48)
    padded, short = torch.ones(2, 6, dtype=torch.long), torch.ones(2, encoded, dtype=torch.long)
    padded[0, :2], short[1, -1] = 0, 0
    for masks in ({}, {"attention_mask": padded}, {"encoder_attention_mask": short}):
        for more_masks in ({}, {"attention_mask": padded, "encoder_attention_mask": short}):
            batch = {"input_ids": ids, "encoder_hidden_states": read, **masks, **more_masks}
            with torch.no_grad():
                expected, found = twin(**batch).logits, model(**batch).logits
            assert relative(found[:, 2:], expected[:, 2:]) < 1e-5, batch.keys()


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_a_vision_encoder_decoder_generates_as_its_masked_twin(implementation):
    torch.manual_seed(0)
    small = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    encoder = transformers.ViTConfig(image_size=8, patch_size=4, **small)  # five tokens
    decoder = transformers.GPT2Config(vocab_size=VOCAB, n_embd=48, n_layer=2, n_head=4, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id, config.pad_token_id, config.eos_token_id = 3, 0, None
    model = transformers.VisionEncoderDecoderModel(config).eval()
    model.set_attn_implementation(implementation)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "decoder" in name:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    twin = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        clover_peft.prune(model, 0.4)
        clover_peft.prune(twin, 0.4, masked=True)
    pixels = torch.randn(2, 3, 8, 8)
    ids = torch.randint(3, VOCAB, (2, 5))
    mask = torch.tensor([[0, 0, 1, 1, 1], [1] * 5])
    with torch.no_grad():
        found, expected = (
            m(pixel_values=pixels, decoder_input_ids=ids, decoder_attention_mask=mask) for m in (model, twin)
        )
    assert relative(found.logits[:, 2:], expected.logits[:, 2:]) < 1e-5
    for cache in ("dynamic", "static"):
        options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "eos_token_id": None}
        written = [m.generate(pixel_values=pixels, pad_token_id=0, **options) for m in (model, twin)]
        assert torch.equal(*written), cache


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


def test_heads_that_keep_nothing():
    """All directions but one layer's removed: the others pass on the constant alone."""
    model, data = build("opt", torch.float64), batches("opt")
    names = [pair.name for pair in find_pairs(model)]
    report = prune(model, ranks={name: [0] * 4 for name in names}, calibration=data)
    assert {pair.width for pair in report.pairs.values()} == {1}
    assert logits(model, "opt").isfinite().all()


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


@pytest.mark.parametrize("family", ["opt", "bert", "gpt2", "unet"])
def test_copies_and_pickles(family):
    model = build(family)
    prune(model, ratio(model, 0.4))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(output(twin, family), output(model, family))
        assert [type(module) for module in twin.modules()] == [type(module) for module in model.modules()]


def test_the_processor_of_diffusers_stays(tmp_path):
    """Others fit where keys and values have the same width, and compute something else there."""
    processors = pytest.importorskip("diffusers.models.attention_processor", reason="needs the dev extra")
    AttnProcessor2_0 = processors.AttnProcessor2_0
    model = build("unet")
    prune(model, 0.5, ranks="uniform")
    twins = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), reload(model, tmp_path))
    for each in (model, *twins, reload(twins[2], tmp_path / "again")):
        expected = output(each, "unet")
        for change in (
            lambda: each.set_attn_processor(AttnProcessor2_0()),  # noqa: B023
            each.fuse_qkv_projections,
            lambda: each.set_attention_slice("max"),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=r"pruned heads: expected NarrowAttnProcessor.*keep the processor"):
                change()
        each.set_attn_processor(each.attn_processors)
        assert torch.equal(output(each, "unet"), expected)
        assert torch.equal(expected, output(model, "unet"))
    prune(model, {"vo": 0.2})
    lora = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(target_modules=["to_q", "to_v", "to_out.0"]))
    assert torch.equal(output(lora, "unet"), output(model, "unet"))


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
