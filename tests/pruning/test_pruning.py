"""Directions of heads and rank rules: exact at full rank, best at every other, for every family with pairs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

import clover_peft
from clover_peft.base_model.resolve import attention_blocks, resolve
from clover_peft.base_model.weight import base_weight
from clover_peft.linalg.decomposition import gram
from clover_peft.linalg.moments import Moments
from clover_peft.pruning import (
    by_layer,
    decompose,
    energy,
    find_pairs,
    global_ratio,
    mask,
    rounded,
    threshold,
    uniform,
)
from clover_peft.pruning.directions import compute_factors, decompose_pair
from clover_peft.pruning.pairs import beside_name
from tests.support.pruning import NARROW, prune
from tests.support.tiny import FAMILIES, VOCAB, build, logits, relative

pytestmark = pytest.mark.usefixtures("one_thread")
PAIRED = sorted(name for name, tiny in FAMILIES.items() if any(tiny.pairs.values()))


def text(count: int = 6, length: int = 40) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, VOCAB, (2, length), generator=generator)} for _ in range(count)]


def whole(found: dict) -> dict[str, Tensor]:
    return {name: torch.full((len(d.values),), d.values.shape[1]) for name, (_, d) in found.items()}


def kinds(model) -> list[str]:
    return sorted({pair.kind for pair in find_pairs(model)})


# ---------------------------------------------------------------------- pairs


@pytest.mark.parametrize("family", PAIRED)
def test_pairs_carry_their_attention_block(family):
    """One object for all pairs of an attention block, with the facts that the table of families reads for each."""
    model = build(family)
    pairs = find_pairs(model)
    blocks = attention_blocks(model)
    for pair in pairs:
        assert pair.attention.path in blocks
        assert pair.path.startswith(pair.attention.prefix)
        assert pair.attention is next(p for p in pairs if p.attention.path == pair.attention.path).attention
        part = "v" if pair.kind == "vo" else "k"
        target = next(target for target in resolve(model, pair.path) if target.part == part)
        assert (pair.heads, pair.partner) == (target.heads, target.partner)
        assert pair.projection is model.get_submodule(pair.path)
        assert pair.partner_projection is model.get_submodule(pair.partner.path)
        assert pair.groups * pair.heads.count == pair.partner.heads.count


# ---------------------------------------------------------------------- directions


@pytest.mark.parametrize("method", ["clover", "vanilla"])
@pytest.mark.parametrize("family", PAIRED)
def test_full_rank_changes_nothing(family, method):
    model = build(family).double().eval() if FAMILIES[family].kind == "lm" else build(family).eval()
    before = logits(model, family)
    found = decompose(model, kinds(model), method)
    assert {pair.name for pair in find_pairs(model)} == set(found)
    mask(model, found, whole(found))
    assert relative(logits(model, family), before) < 1e-4
    for _, directions in found.values():
        assert bool((directions.values.diff(dim=1) <= 0).all())


@pytest.mark.parametrize("family", PAIRED)
def test_fewer_directions_change_the_function(family):
    model = build(family).eval()
    before = logits(model, family)
    found = decompose(model, kinds(model))
    mask(model, found, {name: kept // 2 for name, kept in whole(found).items()})
    assert relative(logits(model, family), before) > 1e-4
    assert logits(model, family).isfinite().all()


def products(model, block: str, heads: int, size: int) -> tuple[Tensor, Tensor]:
    """W_o^h W_v^h and W_q^hT W_k^h of an OPT block, (H, D, D)."""
    attention = model.get_submodule(block)
    v, k, q = (getattr(attention, f"{n}_proj").weight.detach().unflatten(0, (heads, size)) for n in "vkq")
    o = attention.out_proj.weight.detach().unflatten(1, (heads, size)).transpose(0, 1)
    return o @ v, q.mT @ k


def test_what_is_left_is_the_best_of_its_rank():
    """Eckart and Young: the product of each head is its truncated singular value decomposition, for V-O and Q-K."""
    model = build("opt", torch.float64).eval()
    for layer in model.model.decoder.layers:  # a query's bias belongs to the pair, a key's to nothing
        layer.self_attn.q_proj.bias.data.zero_()
    block, size = "model.decoder.layers.1.self_attn", model.config.hidden_size // model.config.num_attention_heads
    before = products(model, block, model.config.num_attention_heads, size)
    found = decompose(model)
    mask(model, found, {name: torch.full_like(kept, size - 3) for name, kept in whole(found).items()})
    for dense, now in zip(before, products(model, block, model.config.num_attention_heads, size), strict=True):
        u, s, vt = torch.linalg.svd(dense)
        r = size - 3
        assert relative(now, u[:, :, :r] * s[:, None, :r] @ vt[:, :r]) < 1e-8
        assert relative(now, dense) > 1e-3


def test_vanilla_leaves_out_coordinates():
    model = build("opt", torch.float64).eval()
    found = decompose(model, ["vo"], "vanilla")
    name = next(name for name in found if "layers.1" in name)
    size, heads = found[name][1].values.shape[1], found[name][1].values.shape[0]
    attention = model.model.decoder.layers[1].self_attn
    v = attention.v_proj.weight.detach().unflatten(0, (heads, size)).norm(dim=2)
    o = attention.out_proj.weight.detach().unflatten(1, (heads, size)).norm(dim=0)
    weakest = (v * o).argmin(dim=1)
    mask(model, found, {name: kept - 1 for name, kept in whole(found).items()})
    left = attention.out_proj.weight.detach().unflatten(1, (heads, size)).norm(dim=0) == 0
    assert torch.equal(left.long().argmax(dim=1), weakest)
    assert left.sum() == heads


def read_by_output(model, block: str, batches: list[dict]) -> Tensor:
    rows: list[Tensor] = []
    hook = model.get_submodule(block).register_forward_pre_hook(lambda module, inputs: rows.append(inputs[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    hook.remove()
    return torch.cat([r.flatten(0, -2) for r in rows])


@pytest.mark.parametrize("family", ["opt", "llama"])
def test_data_make_a_better_cut_of_what_is_read(family):
    """The output projection's result, on the data, is nearer with the data's directions; grouped heads included."""
    batches, errors = text(), {}
    block = {"opt": "model.decoder.layers.0.self_attn.out_proj", "llama": "model.layers.0.self_attn.o_proj"}[family]
    plain = build(family, torch.float64).eval()
    seen = read_by_output(plain, block, batches)
    expected = seen @ plain.get_submodule(block).weight.mT
    for label, calibration in (("weights", None), ("data", batches)):
        model = build(family, torch.float64).eval()
        found = decompose(model, ["vo"], calibration=calibration)
        mask(model, found, {name: kept // 2 for name, kept in whole(found).items()})
        errors[label] = relative(seen @ model.get_submodule(block).weight.mT, expected)
    assert errors["data"] < errors["weights"]


def scores(model, block: str, batches: list[dict]) -> Tensor:
    """(batches, heads, tokens, tokens), with the mean over keys taken out, which softmax does not see."""
    attention, seen = model.get_submodule(block), {}
    hooks = [
        getattr(attention, name).register_forward_hook(
            lambda module, i, output, name=name: seen.update({name: output})
        )
        for name in ("q_proj", "k_proj")
    ]
    found = []
    with torch.no_grad():
        for batch in batches:
            model(**batch)
            q, k = (
                seen[name].unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj")
            )
            found.append(q @ k.mT)
    for hook in hooks:
        hook.remove()
    found = torch.cat(found)
    return found - found.mean(-1, keepdim=True)


def test_data_make_a_better_cut_of_what_keys_and_queries_make():
    batches, errors = text(), {}
    block = "model.decoder.layers.0.self_attn"
    expected = scores(build("opt", torch.float64).eval(), block, batches)
    for label, calibration in (("weights", None), ("data", batches)):
        model = build("opt", torch.float64).eval()
        found = decompose(model, ["qk"], calibration=calibration)
        mask(model, found, {name: kept // 2 for name, kept in whole(found).items()})
        errors[label] = relative(scores(model, block, batches), expected)
    assert errors["data"] < errors["weights"]


@pytest.mark.parametrize("change", ["a dead head", "a large bias"])
def test_what_softmax_does_not_see_in_keys_changes_no_directions(change):
    """A head of zero keys is none of the others' business, nor is a vector added to all keys."""
    values = []
    for changed in (False, True):
        model = build("opt").eval()
        key = model.model.decoder.layers[0].self_attn.k_proj
        if changed and change == "a dead head":
            key.weight.data[:12], key.bias.data[:12] = 0, 0
        elif changed:
            key.bias.data += 1000
        found = decompose(model, ["qk"], calibration=text())
        values.append(next(directions.values for name, (_, directions) in found.items() if ".0." in name))
    assert values[0].shape == (4, 12)
    start = 1 if change == "a dead head" else 0
    assert relative(values[1][start:], values[0][start:]) < 1e-3
    assert bool(values[1][:start].sum() == 0)


def test_the_energy_of_a_group_is_that_of_its_query_heads():
    """As of as many heads with keys and values of their own: what all of them read, times what each of them writes."""
    model = build("llama", torch.float64).eval()
    pair = find_pairs(model)[0]
    heads, groups, size = pair.partner.heads.count, pair.partner.heads.count // pair.heads.count, pair.heads.dim
    assert groups > 1
    seen = gram(torch.randn(40, 1, size, generator=torch.Generator().manual_seed(1)).double())
    tokens = 10**12  # the weights have no say
    scatter = torch.block_diag(*seen.repeat(heads, 1, 1)).unsqueeze(0) * tokens
    moments = Moments(scatter, torch.zeros(1, heads * size).double(), tokens, 1e-16)
    found = decompose_pair(pair, "clover", {beside_name(pair): moments}).values
    o = model.get_submodule(pair.partner.path).weight.detach().unflatten(1, (heads, size))
    each = torch.einsum("ohd,ohe,ed->h", o, o, seen[0])
    torch.testing.assert_close(found.square().sum(1), each.unflatten(0, (-1, groups)).sum(1))


def test_too_few_tokens_are_warned_of():
    with pytest.warns(UserWarning, match="6 tokens for blocks of 12 features are few; pass at least 120"):
        decompose(build("llama"), ["vo"], calibration=[{"input_ids": torch.arange(3, 9).unsqueeze(0)}])


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "gpt2", "deepseek_v3"])
@pytest.mark.parametrize("method", ["clover", "vanilla"])
def test_heads_are_fitted_together(family, method):
    """The output of a block on the calibration data loses less than with every head by itself."""
    batches = text()
    model = build(family, torch.float64).eval()
    found = decompose(model, ["vo"], method, batches)
    name, (pair, directions) = next(iter(found.items()))
    size = pair.heads.dim
    ranks = {name: torch.full((pair.heads.count,), size // 2)}
    z = pair.partner.heads.blocks(read_by_output(model, pair.partner.path, batches), size)
    output = pair.partner.heads.blocks(base_weight(model, pair.partner.path).transposed().mT, size)
    none = dataclasses.replace(directions.fit.together, tokens=0)
    apart = dataclasses.replace(directions, fit=dataclasses.replace(directions.fit, together=none))
    each = [apart.factors(ranks[name], pair.groups), compute_factors({name: (pair, directions)}, ranks)[name]]
    assert torch.equal(each[0][0], each[1][0]) == (method == "vanilla")  # whose directions are coordinates
    lost = []
    for down, back in each:
        p = directions.product(down, back)
        constant = directions.constant(down, back)
        kept = torch.einsum("ngd,hegd->nhe", z, p) + (0 if constant is None else constant)
        lost.append(float(torch.einsum("ohd,nhd->no", output, z - kept).square().sum()))
    assert lost[1] < 0.98 * lost[0]


@pytest.mark.parametrize("family", ["llama", "opt", "bert", "t5", "deepseek_v3"])
def test_without_tokens_no_head_knows_of_another(family):
    model = build(family).eval()
    pair = next(pair for pair in find_pairs(model) if pair.kind == "vo")
    features = pair.partner.heads.features
    moments = Moments.empty(torch.Size((1, features)), torch.device("cpu"))
    moments.add(torch.randn(50, 1, features, generator=torch.Generator().manual_seed(0)))
    moments = dataclasses.replace(moments, tokens=0)
    directions = decompose_pair(pair, "clover", {beside_name(pair): moments})
    ranks = torch.full((pair.heads.count,), pair.heads.dim // 2)
    _, back = directions.factors(ranks, pair.groups)
    for g in range(pair.partner.heads.count):
        assert back[g, :, g].any()
        assert not back[g, :, :g].any()
        assert not back[g, :, g + 1 :].any()


def test_what_cannot_be_cut_is_said():
    with pytest.raises(
        ValueError, match="qk: expected pairs of projections, found none in LlamaForCausalLM; its queries"
    ):
        decompose(build("llama"), ["qk"])
    assert {pair.kind for pair, _ in decompose(build("llama")).values()} == {"vo"}
    with pytest.raises(ValueError, match="method: expected 'clover' or 'vanilla', found 'magic'"):
        decompose(build("llama"), method="magic")
    with pytest.raises(ValueError, match=r"they are called .*k_proj, \.\.\. \(qk\), .*v_proj, \.\.\. \(vo\)"):
        decompose(build("opt"), target_modules=["nothing"])
    model = build("opt")
    before = {name: p.clone() for name, p in model.named_parameters()}
    found = decompose(model)
    ranks = whole(found)
    last = list(ranks)[-1]
    for wrong in (None, ranks[last] + 1, ranks[last] * 0 - 1, ranks[last][:-1]):
        with pytest.raises(ValueError, match="ranks from 0 to 12, found"):
            mask(model, found, {**ranks, last: wrong})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


# ---------------------------------------------------------------------- ranks

SPECTRA = st.lists(
    st.lists(st.lists(st.floats(0, 10), min_size=4, max_size=4), min_size=1, max_size=3), min_size=1, max_size=3
)


@settings(max_examples=50, deadline=None)
@given(SPECTRA, st.floats(0, 0.99))
@example([[[0.0, 0.0, 1.0, 4.5e-23], [1.0, 1.0, 1.0, 1.0]]], 0.5625)  # directions 2 to 4 have one mean square
def test_a_ratio_is_the_share_of_directions_removed(lists, ratio):
    spectra = {str(i): torch.tensor(rows).sort(dim=1, descending=True).values for i, rows in enumerate(lists)}
    total = sum(int((values > 0).sum()) for values in spectra.values())  # the others pad their heads
    ranks = global_ratio(spectra, ratio)
    assert sum(int(kept.sum()) for kept in ranks.values()) == total - round(ratio * total)
    kept = [spectra[n][h, : int(r)] for n, part in ranks.items() for h, r in enumerate(part)]
    cut = [spectra[n][h, int(r) :] for n, part in ranks.items() for h, r in enumerate(part)]
    if (kept := torch.cat(kept)).numel() and (cut := torch.cat(cut)).numel():
        assert kept.min() >= cut.max()
    for name, part in uniform(spectra, ratio).items():
        there = (spectra[name] > 0).sum(1).tolist()
        assert part.tolist() == [n - round(n * ratio) for n in there]
    there = {name: (values > 0).sum(1) for name, values in spectra.items()}
    for name, part in by_layer(spectra, ratio).items():
        assert torch.equal(part, there[name].clamp(max=int(part.max())))  # one rank, and no padding
    removed = sum(int((there[name] - part).sum()) for name, part in by_layer(spectra, ratio).items())
    assert abs(removed - ratio * total) <= max(len(values) for values in spectra.values()) / 2
    for full in (by_layer(spectra, 0.0), threshold(spectra, 0.0), rounded(there, spectra, 2)):
        assert all(torch.equal(full[name], there[name]) for name in spectra)


def test_rules():
    spectra = {"a": torch.tensor([[3.0, 2.0, 1.0, 0.0], [4.0, 0.0, 0.0, 0.0]])}
    assert threshold(spectra, 1.5)["a"].tolist() == [2, 1]
    assert energy(spectra, 0.9)["a"].tolist() == [2, 1]  # 9 + 4 of 14
    assert energy(spectra, 0.93)["a"].tolist() == [3, 1]
    assert energy(spectra, 1)["a"].tolist() == [3, 1]
    assert energy(spectra, 0)["a"].tolist() == [0, 0]
    assert energy({"a": torch.zeros(1, 4)}, 0.9)["a"].tolist() == [0]
    wide = {"a": torch.ones(3, 12)}
    assert rounded({"a": torch.tensor([0, 3, 11])}, wide, 8)["a"].tolist() == [0, 8, 8]
    assert rounded({"a": torch.tensor([12, 5, 1])}, wide, 8)["a"].tolist() == [12, 8, 8]  # the first is whole
    for rule in (uniform, global_ratio):
        with pytest.raises(ValueError, match="ratio: expected a share from 0 to below 1, found 1"):
            rule(spectra, 1.0)
    with pytest.raises(ValueError, match=r"share: expected a share from 0 to 1, found 1\.5"):
        energy(spectra, 1.5)
    with pytest.raises(ValueError, match="multiple: expected a positive number"):
        rounded({"a": torch.tensor([1])}, wide, 0)


@pytest.mark.parametrize("family", ["llama", "opt", "bert"])
def test_rows_of_one_batch_give_the_moments_of_rows_one_by_one(family):
    """Rows differ in length: their masks leave padding out."""
    model = build(family).double()
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, 96, (1, length), generator=generator) for length in (9, 4, 12, 7)]
    padded = torch.stack([torch.nn.functional.pad(row[0], (0, 12 - row.shape[1]), value=1) for row in rows])
    mask = torch.stack([(torch.arange(12) < row.shape[1]).long() for row in rows])
    one = clover_peft.calibrate(model, [{"input_ids": row} for row in rows]).moments
    batched = clover_peft.calibrate(model, [{"input_ids": padded, "attention_mask": mask}]).moments
    assert one.keys() == batched.keys()
    for name, moments in one.items():
        assert moments.tokens == batched[name].tokens == 32
        assert relative(batched[name].scatter, moments.scatter) < 1e-12
        assert relative(batched[name].mean, moments.mean) < 1e-12


@pytest.mark.parametrize("family", NARROW)
def test_the_default_rule_is_safe_for_the_kind_of_model(family):
    """One threshold for all layers ruins causal language models; it is best for encoders."""
    model = build(family)
    causal = FAMILIES[family].kind == "lm" and not family.startswith(("bert", "roberta", "xlm", "camem", "electra"))
    report = prune(model, 0.25, masked=True)
    assert report.rule["ranks"] == ("layer" if causal else "global")
    assert prune(build(family), 0.25, ranks="global", masked=True).rule["ranks"] == "global"
    assert prune(build(family), energy=0.9, masked=True).rule["ranks"] == "energy"
