"""Bases from activations: moments by the plain formula, exact identity, what is saved, and what is refused."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from clover_peft import CloverConfig, explicit_factors, initialize_from_activations
from clover_peft.linalg.moments import shrink
from clover_peft.tuner.combining import have_same_bases
from clover_peft.tuner.layers import clover_layers
from tests.support.tiny import VOCAB, build, inputs, logits, perturb, relative

pytestmark = pytest.mark.filterwarnings("ignore:.*tokens for blocks of")
FAMILIES = ["llama", "gpt2", "bert", "t5", "gpt_neox", "deepseek_v3"]


def batches(count: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(5)
    return [{"input_ids": torch.randint(3, VOCAB, (2, 24), generator=generator)} for _ in range(count)]


def adapted(family: str, dtype: torch.dtype = torch.float32, **options) -> PeftModel:
    return get_peft_model(build(family, dtype), CloverConfig(**options)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays_the_base_models_bit_for_bit(family, one_thread):
    base, model = build(family).eval(), adapted(family)
    before = {
        name: layer.tensors("default", layer.specs["default"][0]).c.clone() for name, layer in clover_layers(model)
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
        assert not torch.equal(before[name], layer.tensors("default", layer.specs["default"][0]).c)
    perturb(model)
    assert relative(logits(model, family), logits(base, family)) > 1e-4
    trained = logits(model, family)
    merged = model.merge_and_unload(safe_merge=True)
    assert relative(logits(merged, family), trained) < 1e-4


def test_coordinates_are_uncorrelated_on_the_data(one_thread):
    """`C G C^T = c I` with G the (shrunk) moment of what the map or output projection reads, by the plain formula.

    The rows of `C W` have a mean square of 1, as they have without data: so learning rates carry over.
    """
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
        u = layer.tensors("default", layer.specs["default"][0]).c
        white = u @ g @ u.mT
        variance = white.diagonal(dim1=-2, dim2=-1).mean(-1)
        assert not variance.isclose(torch.ones_like(variance), rtol=1e-2).any()
        assert relative(white, torch.eye(dim).double() * variance.view(-1, 1, 1)) < 1e-8
        strength = (u @ weight).square().sum(-1).mean(-1)
        assert relative(strength, torch.ones_like(strength)) < 1e-6


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


@pytest.mark.parametrize(
    "options", [{}, {"r": 4}, {"basis": "svd", "cross_layer": False}, {"max_condition": 1.5}, {"s_matrix": "diagonal"}]
)
@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without rotary embeddings, keys meet queries
def test_blocks_keep_their_strength(family, options, one_thread):
    """C and E have the size that they have without data, measured by the weights before and behind them."""
    plain, made = (adapted(family, torch.float64, **options) for _ in range(2))
    initialize_from_activations(made, batches())
    changed = 0
    for (path, one), (_, other) in zip(clover_layers(plain), clover_layers(made), strict=True):
        weight = one.base_weight.transposed().detach()
        for spec in one.specs["default"]:
            blocks = spec.heads.blocks(weight, spec.size).permute(1, 2, 0).double()
            (_, u, v, *_), (_, u2, v2, s02, _) = (layer.tensors("default", spec) for layer in (one, other))
            bias = one.base_weight.bias
            if bias is not None:
                blocks = torch.cat([blocks, spec.heads.blocks(bias, spec.size).unsqueeze(-1).double()], -1)
            before, after = ((c @ blocks).square().sum((1, 2)) for c in (u, u2))
            assert relative(after, before) < 1e-6, path
            changed += not torch.allclose(u, u2, rtol=1e-2)
            if v is None:
                continue
            if spec.partner is None:
                assert relative(v2.norm(dim=(1, 2)), v.norm(dim=(1, 2))) < 1e-6, path
            if spec.r == spec.size:
                identity = v2 @ (s02.unsqueeze(-1) * u2)
                assert relative(identity, torch.eye(spec.size).double().expand_as(identity)) < 1e-6
    assert changed


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
        e = layer.tensors("default", layer.specs["default"][0]).e.double()
        q, _ = torch.linalg.qr(e)
        shares.append(float(torch.einsum("nhd,hdr->nhr", z, q).square().sum() / z.square().sum()))
    assert shares[0] > shares[1]


def test_what_cannot_be_done_is_refused_and_changes_nothing(one_thread, tmp_path):
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
    model = adapted("llama")
    initialize_from_activations(model, data)
    model.peft_config["default"].save_bases = False  # as may be done before the last save; the bases would be lost
    with pytest.raises(ValueError, match="save_bases=False computes the bases again"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.safetensors"))
    with pytest.raises(ValueError, match="expected a model with this CLOVER adapter"):
        initialize_from_activations(get_peft_model(build("llama"), LoraConfig(target_modules=["v_proj"])), data)
    model = adapted("llama")
    initialize_from_activations(model, data)
    with pytest.raises(ValueError, match="whose U and V are not orthonormal"):
        explicit_factors(model, "model.layers.0.self_attn.v_proj")
