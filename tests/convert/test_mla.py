"""A rotary model becomes a stock DeepseekV3 with latent attention: exact where nothing is given up, else reported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from types import MethodType

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM

import clover_peft
from clover_peft.convert import convert_to_mla, fitting, latent, layerwise, mla
from clover_peft.convert.exactness import longest_text
from tests.support.other_process import stock_answers
from tests.support.tiny import VOCAB, build, relative

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:calibration. .* tokens .*are few"),
]

ROPE = {"rope_theta": 1e4, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **ROPE}
CASES = {
    "mha": ("llama", {"num_key_value_heads": 4}),
    "gqa": ("llama", {}),
    "mqa": ("mistral", {"num_key_value_heads": 1, "sliding_window": None}),
    "biases": ("qwen2", {}),
    "all biases": ("llama", {"attention_bias": True}),
    "tied head, large epsilon": ("llama", {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama3": ("llama", {"rope_parameters": LLAMA3}),
    "linear": ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    "yarn": ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, **ROPE}}),
}


def batches(count: int = 4, length: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(3)
    return [{"input_ids": torch.randint(3, VOCAB, (2, length), generator=generator)} for _ in range(count)]


def logits(model) -> Tensor:
    with torch.no_grad():
        return model(input_ids=batches()[0]["input_ids"]).logits


def full(model) -> dict[str, int]:
    """Options with which nothing is given up."""
    config = model.config
    pairs = config.num_key_value_heads * (config.hidden_size // config.num_attention_heads)
    return {"rope_dims": pairs, "kv_lora_rank": pairs}


@pytest.mark.parametrize("case", CASES)
def test_nothing_given_up_changes_no_logit(case):
    family, choices = CASES[case]
    model = build(family, **choices)
    result, report = convert_to_mla(model, batches(), **full(model))
    assert type(result) is DeepseekV3ForCausalLM
    assert relative(logits(result), logits(model)) < 1e-5
    assert max(layer.latent_error for layer in report.layers) < 1e-5


@pytest.mark.parametrize("dims", [2, 6, 14])
def test_unrotated_pairs_alone_are_not_exact_and_a_latent_of_full_rank_adds_no_error(dims):
    model = build("llama")
    width = 2 * 2 * 12 - dims
    result, report = convert_to_mla(model, batches(), rope_dims=dims, kv_lora_rank=width)
    assert result.config.kv_lora_rank == width
    for layer in report.layers:
        assert layer.rotation_error < 1e-5
        assert layer.selection_error > 1e-3
        assert layer.latent_error == pytest.approx(layer.selection_error, rel=1e-2)


@pytest.mark.parametrize("method", ["clover", "transmla"])
def test_a_saved_model_loads_without_the_package_and_generates_the_same(tmp_path, method):
    result, _ = convert_to_mla(build("qwen2"), batches(), cache_reduction=0.5, rope_dims=6, method=method)
    result.save_pretrained(tmp_path)
    ids = batches()[0]["input_ids"]
    (found,) = stock_answers([tmp_path], ids)
    same = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
    tokens = [result.generate(ids, use_cache=cached, **same) for cached in (True, False)]
    assert found["kind"] == "DeepseekV3ForCausalLM"
    assert torch.equal(found["tokens"], torch.cat(tokens))


def test_a_tied_head_gets_weights_of_its_own(tmp_path):
    """vLLM's class does not tie the head, and took random numbers for it without an error."""
    model = build("llama", tie_word_embeddings=True)
    result, _ = convert_to_mla(model, batches(), cache_reduction=0.5)
    assert not result.config.tie_word_embeddings
    result.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(saved["lm_head.weight"], model.lm_head.weight)
    result.lm_head.weight.data.zero_()
    assert torch.equal(result.model.embed_tokens.weight, saved["model.embed_tokens.weight"])


def test_the_cache_holds_what_the_config_says():
    model = build("llama")
    result, report = convert_to_mla(model, batches(), rope_dims=4, cache_reduction=0.5)
    assert (result.config.qk_rope_head_dim, result.config.kv_lora_rank) == (4, 20)
    layers = model.config.num_hidden_layers
    assert report.cache_bytes == (2 * 2 * 12 * 4 * layers, 24 * 4 * layers)
    with torch.no_grad():
        cache = result(input_ids=batches()[0]["input_ids"], use_cache=True).past_key_values
    assert sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers) == 2 * 40 * report.cache_bytes[1]


def test_our_choice_of_pairs_loses_less_than_transmla():
    model = build("llama", num_key_value_heads=4)
    errors = {}
    for method in ("clover", "transmla"):
        _, report = convert_to_mla(model, batches(), rope_dims=12, kv_lora_rank=84, method=method)
        errors[method] = sum(layer.selection_error for layer in report.layers)
    assert errors["clover"] < 0.8 * errors["transmla"]


def test_low_precision():
    model = build("llama", torch.bfloat16)
    result, _ = convert_to_mla(model, batches(), **full(model))
    assert result.dtype == torch.bfloat16
    assert relative(logits(result), logits(model)) < 3e-2


def test_padding_is_not_counted():
    model, (first, second, *_) = build("llama"), batches()
    padded = [
        {
            "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 8), value=7),
            "attention_mask": torch.nn.functional.pad(torch.ones(2, 40, dtype=torch.long), (0, 8)),
        }
        for batch in (first, second)
    ]
    plain, with_padding = (
        convert_to_mla(model, data, rope_dims=4, kv_lora_rank=44)[0] for data in ([first, second], padded)
    )
    assert relative(logits(with_padding), logits(plain)) < 1e-4


def test_the_report(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pictures: pip install clover-peft[plots]")
    _, report = convert_to_mla(build("llama"), batches(), rope_dims=4, cache_reduction=0.5)
    report.save(tmp_path / "convert.json")
    assert json.loads((tmp_path / "convert.json").read_text())["rope_dims"] == 4
    report.plot(tmp_path / "convert.png")
    assert (tmp_path / "convert.png").stat().st_size > 10_000
    assert "| KV cache, bytes a token | 384 | 192 | 50.0% |" in report.summary()


# ---------------------------------------------------------------------- what is refused

REFUSED = {
    "norms of queries and keys": ("qwen3", {}, "has k_norm"),
    "norms after the blocks": ("olmo2", {}, "lacks input_layernorm"),
    "soft caps": ("gemma2", {}, "softcapping"),
    "another norm": ("gemma", {}, "expected RMSNorm with a gain"),
    "a multiplier of the scores": ("granite", {"attention_multiplier": 0.5}, "softmax scale"),
    "a multiplier of the residual": (
        "granite",
        {"attention_multiplier": 12**-0.5, "residual_multiplier": 0.5},
        "expected embeddings, plain residual connections",
    ),
    "a sliding window": ("mistral", {"sliding_window": 8}, "sliding window of 8"),
    "biases of the MLP": ("llama", {"mlp_bias": True}, "expected no biases"),
    "a model without rotation": ("gpt2", {}, "expected lm_head, model and nothing else"),
    "one projection for gate and up": ("glm", {}, "expected act_fn, down_proj, gate_proj, up_proj and nothing else"),
    "dynamic frequencies": ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, **ROPE}}, "dynamic"),
    "a scale of queries by position": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 300,
                **ROPE,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "llama_4_scaling_beta": 0.5,
            }
        },
        "found llama_4_scaling_beta=0.5, which may depend on a text's length",
    ),
    "float16": ("llama", {"dtype": torch.float16}, "found float16"),
}


def snapshot(model) -> Iterator[tuple[str, Tensor]]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_in_the_way_is_named_and_nothing_changes(case):
    family, choices, message = REFUSED[case]
    model = build(family, **choices)
    before, attention = snapshot(model), model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        convert_to_mla(model, batches(), rope_dims=4, cache_reduction=0.5)
    assert model.config._attn_implementation == attention
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_partial_rotation_is_refused():
    model = build("llama")
    model.model.rotary_emb.inv_freq = model.model.rotary_emb.inv_freq[:4]
    with pytest.raises(ValueError, match="expected rotation of all 12 dimensions of a head, found 8"):
        convert_to_mla(model, batches(), cache_reduction=0.5)


def test_norms_of_different_epsilon_are_refused_with_all_values():
    model = build("llama")
    model.model.norm.variance_epsilon = 0.25
    with pytest.raises(ValueError, match=r"expected norms with one epsilon, found \[1e-06, 0.25\]"):
        convert_to_mla(model, batches(), cache_reduction=0.5)


@pytest.mark.parametrize("first", ["one token", "all padding"])
def test_the_longest_text_is_compared_whatever_stands_first(first):
    """A class that computes rotary embeddings of its own: no sine."""
    model, short = build("llama"), {"input_ids": torch.full((1, 20), 5), "attention_mask": torch.zeros(1, 20).long()}
    if first == "one token":
        short = {"input_ids": torch.full((1, 1), 5)}
    data = [short, *batches()]
    assert torch.equal(longest_text(model, data), batches()[0]["input_ids"][:1])
    convert_to_mla(model, data, cache_reduction=0.5, rope_dims=4)
    original = type(model.model.rotary_emb).forward

    def without_sine(self, *args, **kwargs):
        cos, sin = original(self, *args, **kwargs)
        return cos, 0 * sin

    model.model.rotary_emb.forward = MethodType(without_sine, model.model.rotary_emb)
    with pytest.raises(ValueError, match=r"self_attn: expected softmax\(rotated q k\^T"):
        convert_to_mla(model, data, cache_reduction=0.5, rope_dims=4)


@pytest.mark.parametrize("change", ["a weight is lost", "a weight is too many"])
def test_every_weight_of_the_stock_class_is_loaded_and_no_other(change, monkeypatch):
    made = layerwise.attention_weights

    def changed(*args):
        weights = made(*args)
        if change == "a weight is lost":
            del weights["o_proj.weight"]
        else:
            weights["o_proj.scale"] = torch.ones(1)
        return weights

    monkeypatch.setattr(layerwise, "attention_weights", changed)
    with pytest.raises(ValueError, match=r"self_attn.o_proj.*expected the weights of DeepseekV3ForCausalLM"):
        convert_to_mla(build("llama"), batches(), cache_reduction=0.5)


def test_adapters_and_other_objects_are_refused():
    saved = build("llama")
    saved.lm_head = ModulesToSaveWrapper(saved.lm_head, "default")
    with pytest.raises(ValueError, match="expected a model without adapters, found ModulesToSaveWrapper"):
        convert_to_mla(saved, batches())
    quantised = build("llama")
    quantised.is_quantized = True
    with pytest.raises(ValueError, match="expected weights that are not quantised, found some; use the model as it"):
        convert_to_mla(quantised, batches())
    with pytest.raises(ValueError, match="expected a model without adapters"):
        convert_to_mla(get_peft_model(build("llama"), LoraConfig(target_modules=["q_proj"])), batches())
    with pytest.raises(TypeError, match="expected a causal language model"):
        convert_to_mla(torch.nn.Linear(2, 2), batches())
    tied = build("llama")
    tied.model.layers[1].self_attn = tied.model.layers[0].self_attn
    with pytest.raises(ValueError, match="expected weights of its own"):
        convert_to_mla(tied, batches())
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(build("llama").config)
    with pytest.raises(ValueError, match="offloaded"):
        convert_to_mla(empty, batches())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rope_dims": 3}, "rope_dims: expected an even number from 2 to 24"),
        ({"rope_dims": 26}, "rope_dims: expected an even number from 2 to 24"),
        ({"rope_dims": 10}, "rope_dims: below a head's 12 dimensions, .* choose one of 2, 4, 6, 12"),
        ({"rope_dims": 4, "kv_lora_rank": 45}, "kv_lora_rank: expected 1 to 44"),
        ({"rope_dims": 4, "kv_lora_rank": 0}, "kv_lora_rank: expected 1 to 44"),
        ({"cache_reduction": 1.0}, "cache_reduction: expected a share above 0 and below 1"),
        ({"cache_reduction": 0.5, "kv_lora_rank": 8}, "expected kv_lora_rank or cache_reduction, found both"),
        ({"rope_dims": 24, "cache_reduction": 0.9}, "leaves no room"),
        ({"method": "svd"}, "method: expected 'clover' or 'transmla'"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        convert_to_mla(build("llama"), batches(), **options)


def test_bad_data():
    model = build("llama")
    with pytest.raises(TypeError, match="expected batches, found one batch"):
        convert_to_mla(model, batches()[0], cache_reduction=0.5)
    with pytest.raises(ValueError, match="expected batches to run the model on, found none"):
        convert_to_mla(model, [], cache_reduction=0.5)
    with pytest.raises(TypeError, match="expected a list of batches, found NoneType"):
        convert_to_mla(model, None, cache_reduction=0.5)
    with pytest.raises(ValueError, match=r"expected a text of 16 tokens or more.*found 15 in the longest"):
        convert_to_mla(model, batches(2, 15), cache_reduction=0.5)
    with pytest.raises(ValueError, match="expected batches with input_ids, found inputs_embeds"):
        convert_to_mla(model, [{"inputs_embeds": torch.randn(1, 20, 48)}], cache_reduction=0.5)
    mask = torch.ones(2, 1, 40, 40)
    with pytest.raises(ValueError, match="attention_mask: expected the shape of input_ids"):
        convert_to_mla(model, [{**batches()[0], "attention_mask": mask}], cache_reduction=0.5)
    with pytest.warns(UserWarning, match="tokens .* are few"):
        convert_to_mla(model, batches(1, 16), cache_reduction=0.5)


def state(model) -> list:
    """All that a conversion could change but the weights."""
    return [
        [module.training for module in model.modules()],
        [parameter.requires_grad for parameter in model.parameters()],
        model.config.to_dict(),
        model.config._attn_implementation,
        model.generation_config.to_dict(),
    ]


def mixed_up():
    """A model in training, but for one layer, of which some parameters are frozen."""
    model = build("llama").train()
    model.model.layers[0].eval()
    model.model.layers[1].requires_grad_(True)
    return model


@pytest.mark.parametrize(
    "broken",
    [
        *(None, "collect", "record", "rotation_errors", "Layerwise", "selection_errors", "attention_error"),
        *("_cache_bytes", "narrow"),
    ],
)
def test_the_source_is_as_it_was_also_after_an_error(broken, monkeypatch):
    model = mixed_up()
    before, numbers = state(model), snapshot(model)
    if broken is None:
        convert_to_mla(model, batches(), cache_reduction=0.5)
    else:
        where = {"collect": mla.rotary, "narrow": latent}.get(broken, mla)
        real = getattr(where, broken)

        def fail(*args, **kwargs):
            real(*args, **kwargs)
            raise RuntimeError("broken")

        monkeypatch.setattr(where, broken, fail)
        with pytest.raises(RuntimeError, match="broken"):
            convert_to_mla(model, batches(), cache_reduction=0.5)
    assert state(model) == before
    assert all(torch.equal(tensor, numbers[name]) for name, tensor in model.state_dict().items())


def test_labels_cost_no_logits_and_unknown_keywords_reach_the_model(monkeypatch):
    """Only what the trunk has no use for is left out."""
    model, seen, sizes = build("llama"), [], []
    model.register_forward_hook(lambda module, args, output: sizes.append((output.loss, output.logits.shape[1])))
    made = layerwise.DeepseekV3ForCausalLM.__init__

    def watched(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.model.register_forward_pre_hook(lambda m, args, kwargs: seen.append(set(kwargs)), with_kwargs=True)

    monkeypatch.setattr(layerwise.DeepseekV3ForCausalLM, "__init__", watched)
    data = [{**batch, "labels": batch["input_ids"], "token_type_ids": batch["input_ids"] * 0} for batch in batches()]
    found, _ = convert_to_mla(model, data, cache_reduction=0.5)
    assert sizes.count((None, 1)) == len(data)
    assert all(loss is None for loss, _ in sizes)
    of_data = [names for names in seen if "token_type_ids" in names]
    layers = model.config.num_hidden_layers
    assert len(of_data) == (2 + 2 * layers) * len(data)  # once for the gradients, once and twice a layer to fit
    assert not any({"labels", "logits_to_keep"} & names for names in seen if "token_type_ids" in names)
    plain, _ = convert_to_mla(model, batches(), cache_reduction=0.5)
    assert torch.equal(logits(found), logits(plain))


@pytest.mark.parametrize("after", [2, 6, 10, 18, 27])
def test_an_interrupt_leaves_the_model_as_it_was(after):
    model = build("llama").train()
    before = snapshot(model)

    class Interrupting(dict):
        seen = 0

        def items(self):
            Interrupting.seen += 1
            if Interrupting.seen > after:
                raise KeyboardInterrupt
            return super().items()

    with pytest.raises(KeyboardInterrupt):
        convert_to_mla(model, [Interrupting(batch) for batch in batches()], rope_dims=4, cache_reduction=0.5)
    _is_as_it_was(model, before)


@pytest.mark.parametrize("after", [1, 5, 11, 17])
def test_an_interrupt_inside_a_layer_leaves_the_model_as_it_was(after):
    model, calls = build("llama").train(), []
    layer = model.model.layers[1]
    before, forward = snapshot(model), layer.forward

    def interrupting(*args, **kwargs):
        calls.append(1)
        if len(calls) == after:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    layer.forward = interrupting
    with pytest.raises(KeyboardInterrupt):
        convert_to_mla(model, batches(count=8), rope_dims=4, cache_reduction=0.5)
    _is_as_it_was(model, before)


def _is_as_it_was(model, before):
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("method", ["clover", "transmla"])
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj", "o_proj"])
def test_a_layer_of_zeros_is_converted(name, method):
    """Then a moment is zero, and so is everything that is divided by it."""
    model = build("llama")
    with torch.no_grad():
        getattr(model.model.layers[0].self_attn, name).weight.zero_()
    result, report = convert_to_mla(model, batches(), rope_dims=4, cache_reduction=0.5, method=method)
    assert logits(result).isfinite().all()
    assert max(layer.latent_error for layer in report.layers) < float("inf")


def test_a_layer_that_is_not_finite_is_refused_before_anything_is_released(monkeypatch):
    fit = fitting._Layer.fit_output

    def broken(self):
        fit(self)
        self.output.weight.data[0, 0] = float("nan")

    monkeypatch.setattr(fitting._Layer, "fit_output", broken)
    model = build("llama")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"model.layers.0.self_attn: expected finite weights after the fit"):
        convert_to_mla(model, batches(), rope_dims=4, cache_reduction=0.5, release=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_hidden_states_of_the_result_are_there_after_batches_that_ask_for_them():
    data = [{**batch, "output_hidden_states": True} for batch in batches()]
    result, _ = convert_to_mla(build("llama"), data, rope_dims=4, cache_reduction=0.5)
    with torch.no_grad():
        assert len(result(**data[0]).hidden_states) == 3


def test_the_public_name():
    assert clover_peft.convert_to_mla is convert_to_mla
