"""One suite that every row of the architecture table must pass."""

from __future__ import annotations

import copy
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

from clover_peft import CloverConfig, explicit_factors
from clover_peft.base_model import families
from clover_peft.base_model.attention import AttentionBlock
from clover_peft.base_model.resolve import default_targets, resolve
from clover_peft.base_model.slices import HeadSlice, Partner
from clover_peft.base_model.weight import base_of
from clover_peft.tuner.config_checks import MOST_CONDITION
from clover_peft.tuner.layers import clover_layers
from tests.support.tiny import (
    FAMILIES,
    MISSING,
    TOLERANCE,
    build,
    inputs,
    load_script,
    logits,
    output,
    perturb,
    relative,
)

# Variants of a family besides the plain one: grouped-query and multi-query attention, biases, positions, norms. With
# the pairs that differ from the plain model's: suffix of a target -> parts.
GROUPED = [
    family
    for family in FAMILIES
    if getattr(build(family).config, "num_key_value_heads", None) == 2 and family not in ("mllama", "qwen3_next")
]
VARIANTS: dict[str, list[tuple[dict, dict[str, set[str]]]]] = {family: [({}, {})] for family in FAMILIES}
for family in GROUPED:
    VARIANTS[family].append(({"num_key_value_heads": 1}, {}))
for family in ("llama", "qwen3", "phi3", "glm", "cohere2"):
    VARIANTS[family].append(({"num_key_value_heads": 4}, {}))


def _partial(factor: float) -> dict:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": factor}}


for family, variant, pairs in [
    ("llama", {"attention_bias": True, "mlp_bias": True}, {}),
    ("phi3", _partial(0.5), {"qkv_proj": {"k", "v"}}),
    ("gpt_neox", {"attention_bias": False}, {}),
    ("gpt_neox", _partial(1.0), {"query_key_value": {"v"}}),
    ("phi", {"qk_layernorm": True}, {"k_proj": set()}),
    ("stablelm", {"qk_layernorm": True}, {"k_proj": set()}),
    ("persimmon", {"qk_layernorm": True}, {"query_key_value": {"v"}}),
    ("cohere", {"use_qk_norm": True}, {}),
    ("olmo", {"clip_qkv": 0.5}, {"v_proj": set()}),
    ("olmoe", {"clip_qkv": 0.5}, {"v_proj": set()}),
    ("mpt", {"attn_config": {"clip_qkv": 0.5}}, {"Wqkv": set()}),
    ("falcon", {"alibi": True}, {"query_key_value": {"k", "v"}}),
    (
        "falcon",
        {"new_decoder_architecture": False, "multi_query": True, "alibi": True},
        {"query_key_value": {"k", "v"}},
    ),
    ("falcon", {"new_decoder_architecture": False, "multi_query": False, "num_kv_heads": 4, "bias": False}, {}),
    ("gpt_bigcode", {"multi_query": False}, {}),
    ("opt", {"enable_bias": False}, {}),
    ("t5", {"feed_forward_proj": "gated-gelu"}, {}),
    ("deberta", {"relative_attention": False}, {"self.in_proj": {"k", "v"}}),
    ("deberta-v2", {"share_att_key": False}, {"self.key_proj": set()}),
    ("deberta-v2", {"relative_attention": False, "share_att_key": False}, {}),
    ("vit", {"qkv_bias": False}, {}),
    ("dinov2", {"use_swiglu_ffn": True, "mlp_ratio": 1}, {}),
    ("deepseek_v3", {"q_lora_rank": None, "attention_bias": True}, {}),
    ("sd3", {"qk_norm": "rms_norm"}, {"attn2.to_k": set()}),
    ("unet", {"use_linear_projection": True, "attention_head_dim": (4, 8)}, {}),
]:
    if family not in MISSING:
        VARIANTS[family].append((variant, pairs))
CASES = [
    pytest.param(family, kwargs, id=f"{family}-{i}")
    for family, variants in VARIANTS.items()
    for i, (kwargs, _) in enumerate(variants)
]
# Models that compute attention scores in float32, whatever they are cast to.
FLOAT32_SCORES = ("gptj", "codegen", "gpt_neo")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.skipif(bool(MISSING), reason="some families need a newer transformers")
def test_every_row_of_the_table_is_tested():
    types = {families._type_of(module) for family in FAMILIES for module in build(family).modules()}
    assert set(families.FAMILIES) <= types


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("family", "kwargs"), CASES)
def test_init_and_disabled_are_the_base_bit_for_bit(family, kwargs, dtype):
    model = build(family, dtype, **kwargs)
    expected = logits(model, family)
    model = get_peft_model(model, CloverConfig())
    assert torch.equal(logits(model, family), expected)
    perturb(model)
    assert not torch.equal(logits(model, family), expected)
    with model.disable_adapter():
        assert torch.equal(logits(model, family), expected)


@pytest.mark.parametrize("s_matrix", ["full", "diagonal"])
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=str)
@pytest.mark.parametrize(("family", "kwargs"), CASES)
def test_merged_equals_unmerged_and_unmerging_restores_the_bits(family, kwargs, dtype, s_matrix):
    model = build(family, dtype, **kwargs)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    expected = logits(model, family)
    model = get_peft_model(model, CloverConfig(s_matrix=s_matrix))
    perturb(model)
    unmerged = logits(model, family)
    model.merge_adapter()
    assert relative(logits(model, family), unmerged) < TOLERANCE[dtype]
    model.unmerge_adapter()
    assert torch.equal(logits(model, family), unmerged)
    base = model.unload()
    assert torch.equal(logits(base, family), expected)
    assert all(torch.equal(p, before[name]) for name, p in base.state_dict().items())


@pytest.mark.parametrize(("family", "kwargs"), CASES)
def test_a_reload_under_another_seed_is_the_same_function(family, kwargs, tmp_path):
    model = build(family, **kwargs)
    base = copy.deepcopy(model)
    model = get_peft_model(model, CloverConfig())
    perturb(model)
    expected = logits(model, family)
    model.save_pretrained(tmp_path)
    torch.manual_seed(12345)
    again = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, is_trainable=True)
    assert torch.equal(logits(again, family), expected)
    frozen = logits(PeftModel.from_pretrained(base, tmp_path), family)
    assert relative(frozen, expected) < TOLERANCE[torch.float32]
    # Their attention pools with one query, which is as a step of decoding: folded for frozen adapters alone.
    assert torch.equal(frozen, expected) or family in ("siglip", "siglip2")


@pytest.mark.parametrize("s_matrix", ["full", "diagonal"])
@pytest.mark.parametrize(("family", "kwargs"), CASES)
def test_gradients_reach_every_trainable_number(family, kwargs, s_matrix):
    model = get_peft_model(build(family, **kwargs), CloverConfig(s_matrix=s_matrix))
    model.train()
    outputs = output(model, family, batch=4, length=30)  # enough tokens that no ReLU is dead on all of them
    (outputs * torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert trainable
    assert all(".clover_S." in name for name in trainable)
    without = [name for name, p in trainable.items() if p.grad is None or not (p.grad != 0).all()]
    assert not without


@pytest.mark.parametrize(
    ("family", "index"), [(f, i) for f, variants in VARIANTS.items() for i in range(len(variants))]
)
def test_what_the_table_pairs(family, index):
    kwargs, differences = VARIANTS[family][index]
    expected = {s: parts for s, parts in {**FAMILIES[family].pairs, **differences}.items() if parts}
    model = get_peft_model(build(family, **kwargs), CloverConfig())
    seen = {suffix: set() for suffix in expected}
    for name, layer in clover_layers(model):
        for spec in layer.specs["default"]:
            suffix = next((s for s in expected if name.endswith(s)), None)
            assert (spec.basis == "pair") == (suffix is not None and spec.part in expected[suffix]), name
            if suffix is not None and spec.basis == "pair":
                seen[suffix].add(spec.part)
    assert seen == expected


def _index(heads: HeadSlice) -> torch.Tensor:
    """(count, dim): feature of coordinate j of head i, by the definition of a HeadSlice."""
    i, j = torch.arange(heads.count).unsqueeze(1), torch.arange(heads.dim)
    shard, head = i // heads.inner, i % heads.inner
    return heads.start + shard * heads.stride + heads.offset + head * heads.inner_stride + j


def _mix(module: torch.nn.Module, heads: HeadSlice, maps: torch.Tensor, of_outputs: bool) -> None:
    """Replace each head z of a projection's outputs by `maps[head] z`, or each head's columns W by `W maps[head]`."""
    weight = module.weight.data if isinstance(module, Conv1D) else module.weight.data.mT  # (in, out)
    for features, a in zip(_index(heads), maps.repeat_interleave(heads.count // len(maps), 0), strict=True):
        if of_outputs:
            weight[:, features] = weight[:, features] @ a.mT
            if module.bias is not None:
                module.bias.data[features] = a @ module.bias.data[features]
        else:
            weight[features] = a.mT @ weight[features]


def _rotated_pair(model, path, target, partner) -> None:
    """Mix the wrapped heads by A and undo it in the partner: the identity if they truly meet inside a head."""
    generator = torch.Generator().manual_seed(5)
    count, dim = target.heads.count, target.heads.dim
    a = torch.eye(dim).double() + 0.4 * torch.randn(count, dim, dim, generator=generator, dtype=torch.float64)
    _mix(base_of(model.get_submodule(path)), target.heads, a, of_outputs=True)
    inverse = torch.linalg.inv(a)
    _mix(
        base_of(model.get_submodule(partner.path)),
        partner.heads,
        inverse if partner.reads else inverse.mT,
        not partner.reads,
    )


@pytest.mark.parametrize(("family", "kwargs"), CASES)
def test_paired_heads_meet_in_the_model_itself(family, kwargs):
    """Mixing the wrapped heads by any A and the partner by its inverse leaves the model's function alone."""
    model = build(family, torch.float64, **kwargs)
    expected = logits(model, family)
    pairs = 0
    for path, module in list(model.named_modules()):
        owner = families.family_of(model, path) if hasattr(module, "weight") else None
        if owner is None or not path.endswith(tuple("." + name for name in owner.projections)):
            continue
        for target in resolve(model, path):
            if target.partner is not None:
                pairs += 1
                _rotated_pair(model, path, target, target.partner)
                allowed = 1e-5 if family in FLOAT32_SCORES else 1e-8
                assert relative(logits(model, family), expected) < allowed, (path, target.part)
    assert pairs or not any(FAMILIES[family].pairs.values()) or "clip_qkv" in str(kwargs)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_keys_that_are_rotated_or_normalised_could_not_be_paired(family):
    model = build(family, torch.float64, num_key_value_heads=4)
    expected = logits(model, family)
    path = next(p for p, _ in model.named_modules() if p.endswith("layers.0.self_attn.k_proj"))
    (target,) = resolve(model, path)
    assert target.partner is None
    (query,) = resolve(model, path.replace("k_proj", "q_proj"))
    _rotated_pair(model, path, target, Partner(path.replace("k_proj", "q_proj"), query.heads, reads=False))
    assert relative(logits(model, family), expected) > 1e-3


@pytest.mark.parametrize(("family", "kwargs"), CASES)
@pytest.mark.parametrize("max_condition", [None, MOST_CONDITION])
def test_s_changes_exactly_the_product_it_should(family, kwargs, max_condition):
    """`V S U^T` starts as the dense product of the base's weights and follows the merged weights.

    U and V are orthonormal, except where the condition was limited.
    """
    model = build(family, torch.float64, **kwargs)
    adapted = get_peft_model(copy.deepcopy(model), CloverConfig(max_condition=max_condition))
    for trained in (False, True):
        if trained:
            perturb(adapted)
            merged = copy.deepcopy(adapted).merge_and_unload()
        reference = merged if trained else model
        for name, layer in clover_layers(adapted.base_model.model):
            factors = explicit_factors(adapted, name)
            for spec in layer.specs["default"]:
                f = factors[spec.name]
                eye = torch.eye(spec.size, dtype=torch.float64)
                if max_condition is not None:
                    assert (f.U.mT @ f.U - eye).abs().max() < 1e-8
                    assert (f.V.mT @ f.V - eye).abs().max() < 1e-8
                assert relative(f.product(), _dense_product(reference, name, spec)) < 1e-8, (name, spec.part)


def _dense_product(model, name, spec) -> torch.Tensor:
    """The product of dense weights that a slice stands for: W_o W_v, W_q^T W_k, or the weight alone."""
    module = model.get_submodule(name)
    rows = _rows(module, spec.heads)  # (count, dim, in)
    if spec.basis != "pair":
        return rows.flatten(0, 1).unflatten(0, (spec.blocks, spec.size))
    other = model.get_submodule(spec.partner.path)
    index = _index(spec.partner.heads)
    if spec.partner.reads:
        weight = other.weight.data.mT if not isinstance(other, Conv1D) else other.weight.data  # (in, out)
        columns = weight[index]  # (query heads, dim, out)
    else:
        columns = _rows(other, spec.partner.heads)
    groups = len(columns) // len(rows)
    stacked = columns.unflatten(0, (len(rows), groups)).transpose(1, 2).flatten(2)  # (kv heads, dim, groups * out)
    return stacked.mT @ rows


def _rows(module, heads: HeadSlice) -> torch.Tensor:
    """(count, dim, in + 1 with a bias): the rows of a projection that compute the heads."""
    weight = module.weight.data if not isinstance(module, Conv1D) else module.weight.data.mT
    if module.bias is not None:
        weight = torch.cat([weight, module.bias.data.unsqueeze(1)], dim=1)
    return weight[_index(heads)]


def test_gpt2_cross_attention_has_its_query_elsewhere():
    model = build("gpt2", add_cross_attention=True)
    path = "transformer.h.0.crossattention.c_attn"
    key, value = resolve(model, path)
    assert (key.part, value.part) == ("k", "v")
    assert key.heads == HeadSlice.plain(4, 12)
    assert value.heads == HeadSlice.plain(4, 12, start=48)
    assert key.partner.path == "transformer.h.0.crossattention.q_attn"
    (query,) = resolve(model, "transformer.h.0.crossattention.q_attn")
    assert query.part == "q"
    assert query.heads.dim == 12


def test_a_row_added_at_run_time_counts_at_once(monkeypatch):
    model = build("llama")
    model.config.model_type = "mine"
    with pytest.raises(ValueError, match="FAMILIES"):
        get_peft_model(model, CloverConfig())
    monkeypatch.setitem(families.FAMILIES, "mine", families.FAMILIES["llama"])
    adapted = get_peft_model(model, CloverConfig())
    assert adapted.peft_config["default"].target_modules == {"k_proj", "v_proj", "up_proj"}
    assert {s.basis for _, layer in clover_layers(adapted) for s in layer.specs["default"]} == {"pair", "qr"}


@pytest.mark.parametrize(
    ("part", "fact", "basis"),
    [
        ("v", "norm", "qr"),
        ("v", families.If("value_layernorm", "norm", "nothing"), "qr"),
        ("v", families.If("no_such_norm", "norm", "nothing"), "pair"),
        ("k", "stream", "qr"),
    ],
)
def test_what_a_row_puts_between_a_part_and_its_partner_counts(monkeypatch, part, fact, basis):
    family, target = ("llama", "v_proj") if part == "v" else ("opt", "k_proj")
    model = build(family)
    for module in model.modules():
        if hasattr(module, target):
            module.value_layernorm = torch.nn.LayerNorm(4)  # a name that no other family has
    row = families.FAMILIES[family]
    monkeypatch.setitem(families.FAMILIES, family, dataclasses.replace(row, between={part: fact}))
    adapted = get_peft_model(model, CloverConfig(target_modules=[target]))
    assert {s.basis for _, layer in clover_layers(adapted) for s in layer.specs["default"]} == {basis}


def test_the_towers_of_a_multimodal_model_are_told_apart():
    model = build("llava")
    model.model.vision_tower.config.model_type = "unknown"
    with pytest.warns(UserWarning, match="does not know"):
        adapted = get_peft_model(model, CloverConfig())
    assert all("language_model" in name for name, _ in clover_layers(adapted))
    # What joins the towers belongs to neither, and is cut into blocks like any other projection.
    adapted = get_peft_model(build("llava"), CloverConfig(target_modules="all-linear"))
    parts = {name.split(".")[-1]: layer.specs["default"][0].part for name, layer in clover_layers(adapted)}
    assert parts["linear_1"] == "linear"


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "qwen3_moe"])
def test_stacks_of_experts_are_refused_by_name(family):
    with pytest.raises(ValueError, match=r"experts.gate_up_proj.*stack.*leave it out"):
        get_peft_model(build(family), CloverConfig(target_modules=["k_proj", "gate_up_proj"]))


def test_the_page_of_families_has_the_support_matrix():
    script = Path(__file__).parents[2] / "scripts" / "support_matrix.py"
    subprocess.run([sys.executable, str(script), "--check"], check=True)


def _rows_of_the_page() -> dict[str, dict[str, str]]:
    """Model type -> what the table of the documentation says of its value and its key."""
    script = load_script("support_matrix")
    table_text = script.PAGE.read_text(encoding="utf-8").partition(script.BEGIN)[2].partition(script.END)[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table_text.strip().splitlines()[2:]]
    return {name: {"value": row[2], "key": row[3]} for row in rows for name in row[0].split(", ")}


def _alternative(cell: str, attention: AttentionBlock) -> str:
    """Of a cell "A if `x`, else B", what holds for this block: "A if `x`" or "B"."""
    first, _, rest = cell.partition(", else ")
    if rest and not attention.fact(first.split("`")[1]):
        return _alternative(rest, attention)
    return first


def _said(alternative: str, attention: AttentionBlock, path: str) -> str:
    """The alternative without its condition and its reason."""
    words = alternative.partition(" if `")[0].partition(" (")[0]
    if words == "any unrotated part with Q":
        dim = attention.dim("k", path)
        return "alone" if attention.rotary_dim(dim) == dim else "unrotated part with Q"
    return words


def _done(model, attention: AttentionBlock, path: str, part: str) -> str | None:
    """What `resolve` does with the "value" or the "key" at `path`, in the same words; None if it computes none."""
    partners = {target.part: target.partner for target in resolve(model, path)}
    if part[0] not in {name[0] for name in partners}:
        return None
    partner = partners.get(part[0])
    if partner is None:
        return "alone"
    if partner.reads:
        return "with O"
    return "with Q" if partner.heads.dim == attention.dim("q", path) else "unrotated part with Q"


def test_the_page_says_of_every_family_what_resolve_does():
    rows = _rows_of_the_page()
    tried = {name: {part: set() for part in cells} for name, cells in rows.items()}
    wrong = {}
    for family, kwargs in [(family, kwargs) for family, variants in VARIANTS.items() for kwargs, _ in variants]:
        model = build(family, **kwargs)
        for path in default_targets(model):
            owner, model_type, config = families.owner_of(model, path)
            if (name := families.find_suffix(path, owner.projections)) is None:
                continue
            attention = AttentionBlock(model, path.removesuffix(name), owner, config)
            for part, cell in rows[model_type].items():
                if (done := _done(model, attention, path, part)) is not None:
                    alternative = _alternative(cell, attention)
                    tried[model_type][part].add(alternative)
                    if _said(alternative, attention, path) != done:
                        wrong[model_type, part, alternative] = done
    assert wrong == {}
    for name, cells in rows.items() if not MISSING else ():  # no alternative is left untried
        assert tried[name] == {part: set(cell.split(", else ")) for part, cell in cells.items()}, name


def test_shards_of_several_heads_are_one_view():
    heads = HeadSlice(start=1, count=6, stride=20, offset=4, dim=3, inner=3, inner_stride=5)
    x = torch.arange(2 * 45.0).view(2, 45)
    expected = x[:, _index(heads)]
    assert torch.equal(heads.blocks(x, 3), expected)
    assert torch.equal(heads.blocks(x, 1), expected.reshape(2, -1, 1))
    heads.heads(x).add_(100)
    assert torch.equal(x[:, _index(heads)], expected + 100)
    assert int((x >= 100).sum()) == 2 * 18
    assert torch.equal(heads.part(1, 2).blocks(x, 2), x[:, _index(heads)][..., 1:])


@pytest.mark.parametrize("dim", [6, 4, 12])
def test_a_head_slice_views_and_blocks_what_its_definition_says(dim):
    heads = HeadSlice(start=5, count=3, stride=12, offset=12 - dim, dim=dim)
    x = torch.arange(2 * 50.0).view(2, 50)
    expected = x[:, _index(heads)]
    assert torch.equal(heads.heads(x), expected)
    assert torch.equal(heads.blocks(x, dim), expected)
    assert torch.equal(heads.blocks(x, 2), expected.reshape(2, -1, 2))
    assert heads.heads(x).data_ptr() == x[0, heads.start + heads.offset :].data_ptr()
    assert torch.equal(heads.part(1, 2).heads(x), expected[..., 1:3])


@pytest.mark.skipif("gemma4_text" in MISSING, reason="transformers before 5.23 has no Gemma 4")
def test_each_layer_has_heads_of_its_own_width():
    model = build("gemma4_text")
    layers = model.model.layers
    widths = [resolve(model, f"model.layers.{i}.self_attn.{name}_proj")[0].heads.dim for i in (0, 1) for name in "kv"]
    assert widths == [12, 12, 24, 24] == [layers[i].self_attn.head_dim for i in (0, 0, 1, 1)]
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.k_proj: expected head_dim=24, .* found head_dim=12"):
        get_peft_model(model, CloverConfig(head_dim=12))
    adapted = get_peft_model(model, CloverConfig())
    adapted(**inputs("gemma4_text")).logits.square().mean().backward()
    gradients = [p.grad for name, p in adapted.named_parameters() if "clover_S" in name]
    assert len(gradients) == 6
    assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)
