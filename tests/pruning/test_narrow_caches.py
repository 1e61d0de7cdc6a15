"""Narrow attention with every kind of cache, and how its calls are read, whatever transformers calls the arguments."""

from __future__ import annotations

import copy
import inspect
import pickle
import sys

import peft
import pytest
import torch
import transformers
from packaging.version import Version
from transformers import DynamicCache, EncoderDecoderCache, StaticCache

from clover_peft.pruning.narrow.attention import STYLES
from clover_peft.pruning.narrow.calls import ROLES, call_of
from tests.support.pruning import GENERATING, NARROW, prune, ratio
from tests.support.tiny import FAMILIES, VOCAB, build, inputs, logits, relative, seq_2_seq_by_peft

pytestmark = pytest.mark.usefixtures("one_thread")

DECODERS = ["bert", "roberta", "xlm-roberta", "camembert", "electra"]  # encoders that may be decoders
# What makes layers attend to the last tokens only, so that their caches keep no more.
SLIDING = {
    "mistral": {"sliding_window": 4},
    **{
        name: {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
        for name in ("gemma2", "gemma3_text")
    },
    **{
        name: {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 4,
            "use_sliding_window": True,
        }
        for name in ("qwen2", "qwen3")
    },
}
CASES = [*((name, {}) for name in (*GENERATING, *DECODERS)), *SLIDING.items()]
NAMES = [name + (" sliding" if options else "") for name, options in CASES]


def tiny(family: str, options: dict) -> transformers.PreTrainedModel:
    """A tiny decoder whose heads are narrow."""
    model = build(family, **({"is_decoder": True, "add_cross_attention": True} if family in DECODERS else options))
    if family in DECODERS:
        decoder = transformers.AutoModelForCausalLM.from_config(model.config).eval().requires_grad_(False)
        decoder.load_state_dict(model.state_dict(), strict=False)
        model = decoder
    prune(model, ratio(model, 0.4))
    return model


def cache_keyword(module: torch.nn.Module) -> str:
    """What the installed transformers calls the cache."""
    return next(name for name in inspect.signature(module.forward).parameters if ROLES.get(name) == "cache")


def make_cache(kind: str, model, source_length: int):
    """An empty cache of a kind; of both attentions of a decoder where it reads an encoder."""
    config = model.config.get_text_config(decoder=True)
    make = {
        "dynamic": lambda length: DynamicCache(config=config),
        "static": lambda length: StaticCache(config=config, max_cache_len=length),
    }[kind]
    return EncoderDecoderCache(make(12), make(source_length)) if source_length else make(12)


def given_to(model, family: str) -> tuple[str, dict, int]:
    """The keyword of a decoder's ids, other inputs without padding, and how many tokens it reads of an encoder."""
    if family in DECODERS:
        return "input_ids", {"encoder_hidden_states": torch.randn(2, 5, 48)}, 5
    given = inputs(family)
    given.pop("attention_mask", None)
    name = "decoder_input_ids" if model.config.is_encoder_decoder else "input_ids"
    given.pop(name)
    length = {"seq2seq": 7, "audio": 20}.get(FAMILIES[family].kind, 0)
    return name, given, length


def skip_bloom(family: str) -> None:
    if family == "bloom" and Version(transformers.__version__) < Version("5.23"):  # those above 5.18 were not tried
        pytest.skip("this transformers' Bloom takes no static cache, unpruned either")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize(("family", "options"), CASES, ids=NAMES)
def test_token_by_token_is_one_pass(family, options, kind):
    """A few tokens first, then one after the other, with a cache: the logits of all tokens without one."""
    if kind == "static":
        skip_bloom(family)
    model = tiny(family, options)
    name, given, source_length = given_to(model, family)
    ids = torch.randint(3, VOCAB, (2, 10))
    whole = model(**{name: ids}, **given, use_cache=False).logits
    cache = make_cache(kind, model, source_length)
    assert not options or any(cache.is_sliding)
    if source_length and family not in DECODERS:
        given = {"encoder_outputs": model.get_encoder()(**given)}
    steps = []
    for piece in ids.split([3] + [1] * 7, dim=1):
        steps.append(model(**{name: piece}, **given, **{cache_keyword(model): cache}, use_cache=True).logits)
    assert relative(torch.cat(steps, dim=1), whole) < 1e-5
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize(("family", "options"), [case for case in CASES if case[0] not in DECODERS and case[1]])
def test_sliding_windows_generate_as_without_a_cache(family, options):
    model = tiny(family, options)
    settings = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0)
    plain = model.generate(**inputs(family), **settings, use_cache=False)
    for more in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 3}):
        assert torch.equal(model.generate(**inputs(family), **settings, **more), plain), more


@pytest.mark.parametrize("family", [name for name in GENERATING if FAMILIES[name].kind == "lm"])
def test_a_prompt_in_chunks(family):
    """A static cache for it is not made with the head size of the config, but by the first keys and values."""
    skip_bloom(family)
    model = tiny(family, {})
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
    given = {"input_ids": inputs(family)["input_ids"]}
    plain = model.generate(**given, **settings, use_cache=False)
    for more in ({}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(**given, **settings, prefill_chunk_size=3, **more), plain), more
    stock = build(family)  # whose caches are made as before
    assert torch.equal(
        stock.generate(**given, **settings, prefill_chunk_size=3, cache_implementation="static"),
        stock.generate(**given, **settings, use_cache=False),
    )


# ---------------------------------------------------------------------- calls


def attention(model) -> torch.nn.Module:
    return next(module for module in model.modules() if hasattr(module, "clover_call"))


def stock_classes() -> list[type]:
    """Every class of the table that this version of transformers has."""
    found = []
    for family in NARROW:
        model = build(family, **({"is_decoder": True, "add_cross_attention": True} if family in DECODERS else {}))
        found += [type(module) for module in model.modules() if type(module).__name__ in STYLES]
    return sorted(set(found), key=lambda stock: stock.__name__)


def test_every_class_of_the_table_can_be_read():
    classes = stock_classes()
    assert {stock.__name__ for stock in classes} == set(STYLES)
    for stock in classes:
        call = call_of(stock, STYLES[stock.__name__].forward)
        assert call is call_of(stock, STYLES[stock.__name__].forward)
        assert call.own == set(inspect.signature(stock.forward).parameters) - {"self", "kwargs"}


@pytest.mark.parametrize("name", ["cache", "past_key_values", "layer_past"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "opt", "bart", "t5"])
def test_every_name_of_the_cache_is_honoured(family, name):
    model = build(family)
    prune(model, ratio(model, 0.4))
    module = attention(model.get_decoder() if FAMILIES[family].kind == "seq2seq" else model)
    width = model.config.hidden_size
    given = {"attention_mask": None, "position_embeddings": None}
    if family == "llama":
        given["position_embeddings"] = (torch.ones(1, 3, 12), torch.zeros(1, 3, 12))
    given = {key: value for key, value in given.items() if key in inspect.signature(module.forward).parameters}
    cache, x = DynamicCache(), torch.randn(1, 3, width)
    module(x, **given, **{name: cache})
    assert cache.get_seq_length(module.layer_idx) == 3
    with pytest.raises(TypeError, match="expected one argument for the cache, found another"):
        module(x, **given, **{name: cache, "cache" if name != "cache" else "past_key_values": cache})


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart", "vit", "bert", "t5"])
def test_arguments_by_place_are_those_of_the_stock_forward(family):
    """Given by place and by name in the order of the stock class: the same as the stock class at full width."""
    model = build(family)
    stock = next(module for module in model.modules() if type(module).__name__ in STYLES)
    narrow_model = build(family)
    prune(narrow_model, ratio(narrow_model, 0.0))
    module = attention(narrow_model)
    x = torch.randn(2, 3, 48)
    known = {"position_embeddings": (torch.ones(1, 3, 12), torch.zeros(1, 3, 12))}
    known |= dict.fromkeys(["attention_mask", "mask"], torch.randn(2, 1, 3, 3))
    names = [name for name in inspect.signature(stock.forward).parameters if name != "kwargs"]
    assert list(inspect.signature(module.forward).parameters)[: len(names)] == names
    arguments = [x, *(known.get(name) for name in names[1:])]
    by_place, by_name = module(*arguments), module(**dict(zip(names, arguments, strict=True)))
    assert torch.equal(by_place[0], by_name[0])
    assert relative(by_place[0], stock(*arguments)[0]) < 1e-5
    with pytest.raises(TypeError, match=rf"expected at most {len(names)} arguments by place"):
        module(*arguments, None)
    with pytest.raises(TypeError, match="expected an argument for the hidden_states, found none"):
        module()


def test_other_keywords_reach_the_attention_function(monkeypatch):
    model, seen = build("llama"), []
    prune(model, {"vo": 0.4})
    modeling = sys.modules["transformers.models.llama.modeling_llama"]
    eager = modeling.eager_attention_forward
    monkeypatch.setattr(modeling, "eager_attention_forward", lambda *a, **k: (seen.append(k), eager(*a, **k))[1])
    model.set_attn_implementation("eager")
    model(**inputs("llama"), theirs=1)
    assert all(keywords["theirs"] == 1 for keywords in seen)
    assert len(seen) == 2


class Pages:
    """The store of continuous batching: what it does is up to the attention function."""

    def update(self, key, value, layer_idx, kwargs):
        kwargs["pages"] = self
        return key, value


def test_pages_of_continuous_batching_go_where_the_stock_class_sends_them(monkeypatch):
    """To the attention function by the name of `cache`; where that is a parameter, what the update adds."""
    model, seen, pages = build("llama"), [], Pages()
    prune(model, {"vo": 0.4})
    modeling = sys.modules["transformers.models.llama.modeling_llama"]
    eager = modeling.eager_attention_forward
    monkeypatch.setattr(modeling, "eager_attention_forward", lambda *a, **k: (seen.append(k), eager(*a, **k))[1])
    model.set_attn_implementation("eager")
    rotary = (torch.ones(1, 3, 12), torch.zeros(1, 3, 12))
    attention(model)(torch.randn(1, 3, 48), rotary, cache=pages)
    assert seen[0]["pages" if "cache" in attention(model).clover_call.own else "cache"] is pages


def test_a_cache_by_an_unknown_name_is_refused():
    model = build("llama")
    prune(model, {"vo": 0.4})
    rotary = (torch.ones(1, 3, 12), torch.zeros(1, 3, 12))
    with pytest.raises(TypeError, match=r"LlamaAttention.forward \(pruned\): expected no cache .*DynamicCache as kv"):
        attention(model)(torch.randn(1, 3, 48), rotary, kv=DynamicCache())
    image = build("vit")
    prune(image, {"vo": 0.4})
    with pytest.raises(TypeError, match="expected no cache but that of its own"):
        attention(image)(torch.randn(1, 3, 48), cache=DynamicCache())


def renamed(stock: type, source: str) -> type:
    """A class as a later transformers may have it: its forward with other parameters."""
    namespace: dict = {}
    exec(f"def forward({source}): raise AssertionError('the stock forward was called')", namespace)
    return type(stock.__name__, (stock,), {"forward": namespace["forward"], "__module__": stock.__module__})


def test_a_stock_forward_that_takes_no_other_keywords():
    stock = renamed(type(build("llama").model.layers[0].self_attn), "self, hidden_states, *, attention_mask=None")
    call = call_of(stock, STYLES["LlamaAttention"].forward)
    assert call.order == ("hidden_states",)
    with pytest.raises(TypeError, match="expected attention_mask, hidden_states, found theirs too"):
        call.read((torch.ones(1),), {"theirs": 1})
    with pytest.raises(TypeError, match="expected at most 1 arguments by place, found 2"):
        call.read((torch.ones(1), None), {})


@pytest.mark.parametrize("parameter", ["key_value_cache", "position_bias", "*args"])
def test_a_parameter_that_is_not_known_is_refused(parameter, monkeypatch, tmp_path):
    """When pruned, loaded and unpickled, and before anything is changed."""
    model = build("opt")
    before = logits(model, "opt")
    pruned = copy.deepcopy(model)
    prune(pruned, 0.4)
    pruned.save_pretrained(tmp_path)
    pickled = pickle.dumps(pruned)
    modeling = sys.modules["transformers.models.opt.modeling_opt"]
    later = renamed(modeling.OPTAttention, f"self, hidden_states, {parameter}, **kwargs")
    for layer in model.model.decoder.layers:
        layer.self_attn.__class__ = later
    name = parameter.strip("*")
    message = (
        rf"self_attn: OPTAttention: expected a forward whose parameters are known, found {name} in transformers "
        rf"{transformers.__version__}; install transformers 5.23 or 5.24, or prune with masked=True"
    )
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune(model, 0.4)
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert not hasattr(model.config, "clover_pruning")
    for layer in model.model.decoder.layers:
        assert type(layer.self_attn) is later
        layer.self_attn.__class__ = modeling.OPTAttention
    assert torch.equal(logits(model, "opt"), before)
    monkeypatch.setattr(modeling, "OPTAttention", later)
    with pytest.raises(ValueError, match=message):
        type(model).from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="OPTAttention: expected a forward whose parameters are known"):
        pickle.loads(pickled)
    masked = type(model)(model.config)
    prune(masked, 0.4, masked=True)


def test_a_processor_of_diffusers_that_reads_more_is_refused():
    model = build("unet")
    module = next(module for module in model.modules() if hasattr(module, "set_processor"))
    processor = type(module.processor)
    module.processor.__class__ = type(
        processor.__name__, (processor,), {"__call__": lambda self, attn, hidden_states, rotary=None: None}
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=rf"{processor.__name__}: .*known, found rotary in diffusers .*an older diff"):
        prune(model, 0.4)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("family", ["whisper", "bart", "t5", "m2m_100"])
def test_another_batch_of_the_encoder_is_read_as_by_the_stock_class(family):
    """Whisper joins the encoder's outputs, others fail; narrow heads broadcast them."""
    stock, same, narrow = (build(family) for _ in range(3))
    prune(same, 0.0, ranks="uniform")
    prune(narrow, 0.4)
    given = {**inputs(family), "decoder_input_ids": inputs(family)["decoder_input_ids"][:1]}
    given.pop("decoder_attention_mask", None)
    if family == "whisper":
        expected = stock(**given).logits
        assert relative(same(**given).logits, expected) < 1e-5
        assert narrow(**given).logits.shape == expected.shape
        return
    for model in (stock, same, narrow):
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            model(**given)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", pytest.param("bart", marks=seq_2_seq_by_peft)])
def test_prefix_tuning_of_narrow_heads_is_refused_by_name(family):
    model = build(family)
    prune(model, {"vo": 0.4})
    task = "SEQ_2_SEQ_LM" if family == "bart" else "CAUSAL_LM"
    adapted = peft.get_peft_model(model, peft.PrefixTuningConfig(num_virtual_tokens=4, task_type=task))
    with pytest.raises(
        ValueError, match=r"pruned\), layer 0: expected a cache whose values have \d+ dim.*another adapter than pre"
    ):
        adapted(**inputs(family))


def test_continuous_batching_refuses_narrow_heads():
    """It hung: the thread that generates failed to write narrow keys into its pages."""
    model = build("llama")
    prune(model, {"vo": 0.5})
    for start in (lambda: model.generate_batch([[3, 4, 5]]), model.init_continuous_batching):
        with pytest.raises(ValueError, match=r"self_attn: expected heads as wide as the config says.*use generate"):
            start()
    build("llama").init_continuous_batching()  # heads of the config's size
