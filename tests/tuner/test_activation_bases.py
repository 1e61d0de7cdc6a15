"""Bases from activations: moments by the plain formula, exact identity, what is saved, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from clover_peft import CloverConfig, explicit_factors, initialize_from_activations
from clover_peft.base_model.activations import Probe, collect_moments
from clover_peft.base_model.slices import HeadSlice
from clover_peft.linalg.decomposition import gram
from clover_peft.linalg.moments import Moments, centred, shrink
from clover_peft.tuner.bases import clover_layers
from clover_peft.tuner.combining import have_same_bases
from tests.support.tiny import VOCAB, build, inputs, logits, perturb, relative

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens for blocks of")
FAMILIES = ["llama", "gpt2", "bert", "t5", "gpt_neox", "deepseek_v3"]


def batches(count: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, VOCAB, (2, 24), generator=generator)} for _ in range(count)]


def adapted(family: str, dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    return get_peft_model(build(family, dtype), CloverConfig(**options)).eval()


class TwoProjections(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x, attention_mask=None):
        return self.two(self.one(x))


def test_moments_are_those_of_the_tokens_that_count():
    torch.manual_seed(0)
    model = TwoProjections().double().train()
    model.two.eval()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    data = [{"x": torch.randn(2, 3, 6).double(), "attention_mask": mask}, {"x": torch.randn(1, 5, 6).double()}]
    heads = HeadSlice.plain(2, 4)
    probes = {"out": Probe(model.one, False, heads, 4), "in": Probe(model.two, True, heads, 2)}
    found = collect_moments(model, probes, data)

    rows = torch.cat([model.one(data[0]["x"])[mask.bool()], model.one(data[1]["x"])[0]]).detach()
    for name, size in (("out", 4), ("in", 2)):
        z = rows.unflatten(-1, (-1, size))
        assert found[name].tokens == 8
        torch.testing.assert_close(found[name].second, torch.einsum("nhi,nhj->hij", z, z) / 8)
        centred = z - z.mean(0)
        torch.testing.assert_close(found[name].covariance, torch.einsum("nhi,nhj->hij", centred, centred) / 8)
    assert (model.training, model.one.training, model.two.training) == (True, True, False)
    assert not model.one._forward_hooks
    assert not model.two._forward_pre_hooks


def test_a_large_mean_drowns_nothing():
    """Products are float32: about zero they would err by more than what varies."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(3, 500, 2, 4, generator=generator) * torch.tensor([1.0, 0.5, 2.0, 0.1]) + 3e3
    moments = Moments(torch.zeros(2, 4, 4).double(), torch.zeros(2, 4).double())
    for part in rows:
        moments.add(part)
    moments.add(rows[0, :0])
    z = rows.flatten(0, 1).double()
    point = torch.full((2, 4), 3e3).double()
    for found, centre in ((moments.covariance, z.mean(0)), (moments.about(point), point), (moments.second, 0.0)):
        expected = torch.einsum("nhi,nhj->hij", z - centre, z - centre) / len(z)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments.mean, z.mean(0), rtol=1e-9, atol=0)
    assert moments.tokens == 1500


@pytest.mark.parametrize("first", [True, False])
def test_a_far_token_spoils_nothing_wherever_it_comes(first):
    generator = torch.Generator().manual_seed(3)
    rows, far = torch.randn(1000, 1, 8, generator=generator), torch.full((1, 1, 8), 1e4)
    moments = Moments(torch.zeros(1, 8, 8).double(), torch.zeros(1, 8).double())
    for part in (far, rows) if first else (rows, far):
        moments.add(part)
    z = torch.cat([rows, far]).double()[:, 0]
    centred = z - z.mean(0)
    assert relative(moments.covariance[0], centred.mT @ centred / len(z)) < 1e-11
    with torch.autocast("cpu", torch.bfloat16):
        under = Moments(torch.zeros(1, 8, 8).double(), torch.zeros(1, 8).double())
        under.add(rows)
    assert relative(under.covariance[0], rows[:, 0].double().mT.cov(correction=0)) < 1e-6


def test_blocks_that_vary_are_told_from_those_that_do_not():
    """Block by block, by the rounding of the activations and not by how far from zero they are."""
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(200, 4, 3, generator=generator)
    rows[:, 1] = 0
    rows[:, 2] = torch.tensor([7.3, 0.1, 100.0])
    rows[:, 3] += 1e3
    for dtype, last in ((torch.float32, True), (torch.bfloat16, False)):
        moments = Moments(torch.zeros(4, 3, 3).double(), torch.zeros(4, 3).double())
        for part in rows.to(dtype).split(60):
            moments.add(part)
        assert moments.varies.tolist() == [True, False, False, last]
    weights = torch.eye(3).double().expand(4, 3, 3)
    found = centred(moments, weights)
    assert torch.equal(found[1:], weights[1:])
    assert relative(found[0], shrink(moments.covariance, weights, 200)[0]) == 0


def test_the_mask_of_a_text_is_not_that_of_an_image_of_its_length():
    model = build("clip").eval()
    batch = inputs("clip")
    patches = model.vision_model.embeddings.num_positions
    ids = torch.randint(3, VOCAB, (len(batch["pixel_values"]), patches))
    mask = torch.ones_like(ids)
    mask[:, -2:] = 0
    towers = {"image": model.vision_model.encoder, "text": model.text_model.encoder}
    probes = {
        name: Probe(tower.layers[0].self_attn.k_proj, False, HeadSlice.plain(4, 1), 1)
        for name, tower in towers.items()
    }
    found = collect_moments(model, probes, [{**batch, "input_ids": ids, "attention_mask": mask}])
    assert found["image"].tokens == ids.numel()
    assert found["text"].tokens == ids.numel() - 2 * len(ids)


def test_nobody_keeps_keys_and_values():
    model, kept = build("llama").eval(), []
    hook = model.register_forward_hook(lambda module, inputs, output: kept.append(output.past_key_values))
    probes = {"k": Probe(model.model.layers[0].self_attn.k_proj, False, HeadSlice.plain(2, 12), 12)}
    collect_moments(model, probes, batches())
    hook.remove()
    assert kept == [None] * len(batches())


def test_an_encoder_and_a_decoder_have_masks_of_their_own(one_thread):
    model = build("t5").eval()
    ids = inputs("t5", batch=2, length=6)["input_ids"]
    here, there = torch.ones(2, 6, dtype=torch.long), torch.ones(2, 6, dtype=torch.long)
    here[0, 4:], there[1, 5:] = 0, 0
    blocks = {
        "in": model.encoder.block[0].layer[0].SelfAttention,
        "out": model.decoder.block[0].layer[0].SelfAttention,
    }
    probes = {name: Probe(block.k, False, HeadSlice.plain(block.n_heads, 1), 1) for name, block in blocks.items()}
    batch = {"input_ids": ids, "attention_mask": here, "decoder_input_ids": ids}
    assert {k: m.tokens for k, m in collect_moments(model, probes, [batch]).items()} == {"in": 10, "out": 12}
    found = collect_moments(model, probes, [{**batch, "decoder_attention_mask": there}])
    assert {k: m.tokens for k, m in found.items()} == {"in": 10, "out": 11}


def test_hooks_come_off_when_the_model_fails():
    model = TwoProjections()
    probes = {"out": Probe(model.one, False, HeadSlice.plain(2, 4), 4)}
    with pytest.raises(RuntimeError):
        collect_moments(model, probes, [{"x": torch.randn(2, 3, 5)}])
    assert not model.one._forward_hooks
    assert model.training
    with pytest.raises(ValueError, match="expected batches to run the model on, found none"):
        collect_moments(model, probes, [])
    with pytest.raises(ValueError, match="out: expected finite activations"):
        collect_moments(model, probes, [{"x": torch.full((1, 2, 6), float("nan"))}])


def test_shrinking_goes_from_the_weights_to_the_data():
    torch.manual_seed(1)
    moment, weights = (gram(torch.randn(20, 3, 4).double()) for _ in range(2))
    traces = [g.diagonal(dim1=-2, dim2=-1).sum(-1).view(-1, 1, 1) for g in (moment, weights)]
    torch.testing.assert_close(shrink(moment, weights, 0), weights * traces[0] / traces[1])
    torch.testing.assert_close(shrink(moment, weights, 4), (moment + weights * traces[0] / traces[1]) / 2)
    assert relative(shrink(moment, weights, 10**9), moment) < 1e-8
    assert torch.isfinite(shrink(moment, torch.zeros_like(weights), 4)).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays_the_base_models_bit_for_bit(family, one_thread):
    base, model = build(family).eval(), adapted(family)
    before = {
        name: layer.tensors("default", layer.specs["default"][0]).u.clone() for name, layer in clover_layers(model)
    }
    with pytest.warns(UserWarning, match="tokens for blocks of"):
        initialize_from_activations(model, [inputs(family, batch=2, length=24)])
    assert torch.equal(logits(model, family), logits(base, family))
    for name, layer in clover_layers(model):
        for spec in layer.specs["default"]:
            _, u, v, s0, _ = layer.tensors("default", spec)
            if v is not None:
                identity = v @ (s0.unsqueeze(-1) * u)
                assert relative(identity, torch.eye(spec.size).expand_as(identity)) < 1e-3
            assert spec.from_activations
        assert not torch.equal(before[name], layer.tensors("default", layer.specs["default"][0]).u)
    perturb(model)
    assert relative(logits(model, family), logits(base, family)) > 1e-4
    trained = logits(model, family)
    merged = model.merge_and_unload(safe_merge=True)
    assert relative(logits(merged, family), trained) < 1e-4


def test_coordinates_are_uncorrelated_on_the_data(one_thread):
    """`C G C^T = I` with G the (shrunk) moment of what the map or output projection reads, by the plain formula."""
    model, data = adapted("llama", torch.float64), batches()
    plain = build("llama", torch.float64).eval()
    initialize_from_activations(model, data)
    seen: dict[str, list] = {"k": [], "o": []}
    block = plain.model.layers[1].self_attn
    hooks = [
        block.k_proj.register_forward_hook(lambda m, i, o: seen["k"].append(o)),
        block.o_proj.register_forward_pre_hook(lambda m, i: seen["o"].append(i[0])),
    ]
    with torch.no_grad():
        for batch in data:
            plain(**batch)
    for hook in hooks:
        hook.remove()
    dim, kv = block.head_dim, block.k_proj.out_features // block.head_dim
    layers = dict(clover_layers(model.base_model.model))
    for part, name in (("k", "k_proj"), ("o", "v_proj")):
        z = torch.cat([rows.flatten(0, -2) for rows in seen[part]]).unflatten(-1, (-1, dim))
        moment = torch.einsum("nhi,nhj->hij", z, z) / len(z)
        moment = moment.unflatten(0, (kv, -1)).sum(1)  # of the query heads that share a value head
        weight = getattr(block, name).weight.detach().unflatten(0, (kv, dim))
        g = shrink(moment, weight @ weight.mT, len(z))
        layer = layers[f"model.layers.1.self_attn.{name}"]
        u = layer.tensors("default", layer.specs["default"][0]).u
        white = u @ g @ u.mT
        assert relative(white, torch.eye(dim).double().expand_as(white)) < 1e-8


def test_padding_does_not_count(one_thread):
    one, other = adapted("llama"), adapted("llama")
    data = batches()
    padded = []
    for batch in data:
        ids = batch["input_ids"]
        mask = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), 5, dtype=ids.dtype)], 1)
        more = torch.randint(0, VOCAB, (len(ids), 5))
        padded.append({"input_ids": torch.cat([ids, more], 1), "attention_mask": mask})
    initialize_from_activations(one, [{"input_ids": batch["input_ids"]} for batch in data])
    initialize_from_activations(other, padded)
    for (_, a), (_, b) in zip(clover_layers(one), clover_layers(other), strict=True):
        for spec in a.specs["default"]:
            assert relative(a.tensors("default", spec).s0, b.tensors("default", spec).s0) < 1e-4


@pytest.mark.parametrize("options", [{}, {"s_matrix": "diagonal"}, {"r": 4}])
def test_saved_and_reloaded_under_another_seed(options, tmp_path, one_thread):
    model = adapted("llama", **options)
    initialize_from_activations(model, batches())
    perturb(model)
    expected = logits(model, "llama")
    model.save_pretrained(tmp_path / "whole")
    torch.manual_seed(99)
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "whole").eval()
    assert again.peft_config["default"].from_activations
    assert torch.equal(logits(again, "llama"), expected)
    model.peft_config["default"].save_bases = "folded"
    model.save_pretrained(tmp_path / "folded")
    folded = PeftModel.from_pretrained(build("llama"), tmp_path / "folded").eval()
    assert relative(logits(folded, "llama"), expected) < 1e-5
    # a reference adapter of the same configuration is born with the same bases, as trainers need
    model.peft_config["default"].save_bases = True
    model.add_adapter("reference", model.peft_config["default"])
    assert all(have_same_bases(layer, "default", "reference") for _, layer in clover_layers(model))
    # one of its own is not
    model.add_adapter("other", CloverConfig(**options))
    assert not any(have_same_bases(layer, "default", "other") for _, layer in clover_layers(model))


def test_leading_directions_are_those_of_the_data(one_thread):
    """With r < d, the directions that are trained carry more of the data than those of the weights do."""
    data, shares = batches(8), []
    for from_data in (True, False):
        model = adapted(
            "llama", torch.float64, r=2, s_matrix="diagonal", target_modules=["up_proj"], mlp_block_size=16
        )
        if from_data:
            initialize_from_activations(model, data)
        plain = build("llama", torch.float64).eval()
        name, layer = clover_layers(model.base_model.model)[0]
        rows: list = []
        hook = plain.get_submodule(name).register_forward_hook(lambda m, i, o, rows=rows: rows.append(o))
        with torch.no_grad():
            for batch in data:
                plain(**batch)
        hook.remove()
        z = torch.cat([r.flatten(0, -2) for r in rows]).unflatten(-1, (-1, 16))
        e = layer.tensors("default", layer.specs["default"][0]).v.double()
        q, _ = torch.linalg.qr(e)
        shares.append(float(torch.einsum("nhd,hdr->nhr", z, q).square().sum() / z.square().sum()))
    assert shares[0] > shares[1]


def test_what_cannot_be_done_is_refused_and_changes_nothing(one_thread):
    data = batches()
    model = adapted("llama", save_bases=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="expected save_bases=True or 'folded', found False"):
        initialize_from_activations(model, data)
    with pytest.raises(ValueError, match="adapter 'other': expected a model with this CLOVER adapter"):
        initialize_from_activations(model, data, "other")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="expected batches to run the model on, found none"):
        initialize_from_activations(adapted("llama"), [])
    model = adapted("llama")
    perturb(model)
    with pytest.raises(ValueError, match="found one that is trained; make another"):
        initialize_from_activations(model, data)
    model = adapted("llama")
    model.merge_adapter()
    with pytest.raises(ValueError, match="found one that is merged"):
        initialize_from_activations(model, data)
    with pytest.raises(ValueError, match="from_activations is set by initialize_from_activations"):
        get_peft_model(build("llama"), CloverConfig(from_activations=True))
    with pytest.raises(ValueError, match="save_bases=False computes the bases again"):
        CloverConfig(from_activations=True, save_bases=False)
    with pytest.raises(ValueError, match="expected a model with this CLOVER adapter"):
        initialize_from_activations(get_peft_model(build("llama"), LoraConfig(target_modules=["v_proj"])), data)
    model = adapted("llama")
    initialize_from_activations(model, data)
    with pytest.raises(ValueError, match="whose U and V are not orthonormal"):
        explicit_factors(model, "model.layers.0.self_attn.v_proj")


def test_no_tokens_is_no_division_by_zero():
    empty = Moments(torch.zeros(1, 2, 2).double(), torch.zeros(1, 2).double())
    assert not empty.second.any()
    assert not empty.covariance.any()
