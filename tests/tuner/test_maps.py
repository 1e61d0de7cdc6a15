"""The fast map of heads against the plain formula: values, first and second derivatives, and what it keeps."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from torch.autograd import forward_ad

from clover_peft import CloverConfig
from clover_peft.base_model.slices import HeadSlice
from clover_peft.tuner import execution
from clover_peft.tuner.fused_maps import _inversions, apply_maps, inverse_of_one_plus
from clover_peft.tuner.maps import HeadMap, Place, formula
from tests.support.tiny import TOLERANCE, build, inputs, perturb, relative

LAYOUTS = {
    "plain": (HeadSlice.plain(4, 6), 6, 24),
    "one head": (HeadSlice.plain(1, 24), 24, 24),
    "split heads": (HeadSlice.plain(4, 6), 3, 24),
    "joined heads": (HeadSlice.plain(4, 6), 12, 24),
    "a region": (HeadSlice.plain(3, 4, start=8), 4, 24),
    "part of each head": (HeadSlice(0, 4, 6, 2, 4), 4, 24),
    "split parts": (HeadSlice(0, 4, 6, 2, 4), 2, 24),
    "joined parts": (HeadSlice(0, 4, 6, 2, 4), 8, 24),
    "shards": (HeadSlice(0, 4, 12, 6, 3, 2, 3), 3, 24),
    "spread shards": (HeadSlice(0, 4, 12, 0, 2, 2, 3), 2, 24),
}
KINDS = ["folded", "factored", "replaces", "factored replaces"]


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype).requires_grad_(True)


def head_map(layout: str, kind: str = "folded", scale: float = 0.05, dtype: torch.dtype = torch.float64) -> HeadMap:
    heads, size, _ = LAYOUTS[layout]
    blocks, r = heads.features // size, max(1, size // 2)
    place = Place(heads, size, "replaces" in kind)
    if "factored" in kind:
        coordinates = random(blocks, r, size, seed=2, dtype=dtype).detach()
        return HeadMap(place, random(blocks, size, r, scale=scale, seed=1, dtype=dtype), coordinates)
    return HeadMap(place, random(blocks, size, size, scale=scale, seed=1, dtype=dtype))


def dense(m: HeadMap, features: int) -> Tensor:
    """(features, features), what all of it does to a vector, by the definition of a head slice."""
    h, replaces = m.place.heads, m.place.replaces
    index = [
        h.start + i // h.inner * h.stride + h.offset + i % h.inner * h.inner_stride + j
        for i in range(h.count)
        for j in range(h.dim)
    ]
    blocks = torch.block_diag(*(m.matrix if m.c is None else m.matrix @ m.c))
    one = torch.eye(features, dtype=blocks.dtype)
    own = one[:, index]
    return one + own @ blocks @ own.mT - (own @ own.mT if replaces else 0)


def gradients(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y)
    return list(torch.autograd.grad((y * weights).sum(), inputs))


@pytest.mark.parametrize("tokens", [(2, 5), (1, 1), (3,), ()])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_formula_is_a_product_with_one_matrix(layout, kind, tokens):
    m, z = head_map(layout, kind), random(*tokens, 24)
    for apply in (formula, apply_maps):
        expected, y = z @ dense(m, 24).mT, apply(z, [m])
        assert y.shape == z.shape
        assert relative(y, expected) < TOLERANCE[torch.float64]
        for found, wanted in zip(gradients(y, [z, m.matrix]), gradients(expected, [z, m.matrix]), strict=True):
            assert relative(found, wanted) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_autocast_changes_nothing(kind, kept):
    m, z = head_map("plain", kind, dtype=torch.float32), random(2, 5, 24, dtype=torch.float32)
    expected = apply_maps(z, [m], kept)
    wanted = gradients(expected, [z, m.matrix])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = apply_maps(z, [m], kept)
        within = gradients(apply_maps(z, [m], kept), [z, m.matrix])  # torch's own operations are cast there
        with torch.no_grad():
            assert torch.equal(apply_maps(z, [m]), expected)
            assert torch.equal(apply_maps(z[:1, :1], [m]), expected[:1, :1])
    assert torch.equal(y, expected)
    for found in [gradients(y, [z, m.matrix]), *([within] if m.is_folded else [])]:
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_values_and_gradients_are_the_formulas(layout, kind, kept, dtype):
    master = torch.promote_types(dtype, torch.float32)
    m, z = head_map(layout, kind, dtype=master), random(2, 5, 24, dtype=dtype)
    exact = head_map(layout, kind)
    wide = z.detach().double().requires_grad_(True)
    expected = formula(wide, [exact])
    y = apply_maps(z, [m], kept)
    assert y.dtype == dtype
    assert relative(y.double(), expected) < TOLERANCE[dtype]
    with torch.no_grad():
        assert torch.equal(apply_maps(z, [m]), y)
    for found, wanted in zip(gradients(y, [z, m.matrix]), gradients(expected, [wide, exact.matrix]), strict=True):
        assert relative(found.double(), wanted) < 2 * TOLERANCE[dtype]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_are_views_where_it_says_so(layout):
    heads, size, features = LAYOUTS[layout]
    x = torch.zeros(2, 3, features)
    shares = heads.blocks(x, size).untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert shares is heads.has_views(size)


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["plain", "part of each head", "joined parts"])
def test_it_can_be_differentiated_twice(layout, kind, kept):
    m, z = head_map(layout, kind), random(2, 24)

    def run(z: Tensor, matrix: Tensor) -> Tensor:
        return apply_maps(z, [m._replace(matrix=matrix)], kept)

    assert torch.autograd.gradcheck(run, (z, m.matrix))
    assert torch.autograd.gradgradcheck(run, (z, m.matrix))


@pytest.mark.parametrize(("mean", "limit"), [(20, TOLERANCE[torch.bfloat16]), (100, 0.1)])
def test_a_feature_with_a_large_mean_does_not_drown_the_others(mean, limit):
    """In bfloat16, where the map that is inverted and the sum over tokens must not be rounded otherwise than y was."""
    z = (random(4096, 24).detach() + mean * (torch.arange(24) % 6 == 0)).bfloat16()
    g = random(4096, 24, seed=5).detach().bfloat16()
    matrix = torch.zeros(4, 6, 6, dtype=torch.float64)
    matrix[:, 1:, 0] = torch.linspace(0.2, 0.6, 5, dtype=torch.float64)  # others read the large one
    exact = head_map("plain")._replace(matrix=matrix.requires_grad_(True))
    wanted = torch.autograd.grad(formula(z.double(), [exact]), exact.matrix, g.double())[0]
    m = exact._replace(matrix=matrix.detach().float().requires_grad_(True))
    assert _inversions([m]) is not None
    for kept in (False, True):
        found = torch.autograd.grad(apply_maps(z, [m], kept), m.matrix, g)[0]
        errors = (found - wanted).norm(dim=(0, 1)) / wanted.norm(dim=(0, 1))
        assert float(errors.max()) < limit, kept


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_transforms_of_functions_take_it(layout, kind):
    m, z = head_map(layout, kind), random(5, 24)

    def loss(matrix: Tensor, apply=apply_maps) -> Tensor:
        return apply(z.detach(), [m._replace(matrix=matrix)]).square().sum()

    matrix = m.matrix.detach()
    several = torch.func.vmap(torch.func.grad(loss))(torch.stack([matrix, 2 * matrix]))
    assert relative(several[1], torch.func.grad(loss)(2 * matrix)) < TOLERANCE[torch.float64]
    found = torch.func.grad(loss)(matrix)
    assert relative(found, torch.func.grad(lambda matrix: loss(matrix, formula))(matrix)) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_mode_takes_it(kind):
    m, z = head_map("plain", kind), random(5, 24)
    direction = random(*m.matrix.shape, seed=7).detach()
    with forward_ad.dual_level():
        y = apply_maps(z, [m._replace(matrix=forward_ad.make_dual(m.matrix.detach(), direction))])
        tangent = forward_ad.unpack_dual(y).tangent
    wanted = torch.func.jvp(lambda matrix: formula(z, [m._replace(matrix=matrix)]), (m.matrix,), (direction,))[1]
    assert relative(tangent, wanted) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("grad", [False, True])
def test_the_output_can_be_written_to(tokens, grad):
    m, z = head_map("plain"), random(tokens, 24)
    with torch.set_grad_enabled(grad):
        y = apply_maps(z, [m])
        expected = 2 * y.detach()
    y.mul_(2)
    assert torch.equal(y, expected)


def test_several_maps_read_the_same_features():
    maps = [head_map("split heads", "replaces"), head_map("plain"), head_map("plain", "factored")]
    z = random(3, 24)
    matrices = [m.matrix for m in maps]
    y, expected = apply_maps(z, maps), formula(z, maps)
    assert relative(y, expected) < TOLERANCE[torch.float64]
    for kept in (False, True):  # y does not tell which map did what
        found = gradients(apply_maps(z, maps[1:], kept), [z, *matrices[1:]])
        for one, wanted in zip(found, gradients(formula(z, maps[1:]), [z, *matrices[1:]]), strict=True):
            assert relative(one, wanted) < TOLERANCE[torch.float64]
    for found, wanted in zip(gradients(y, [z, *matrices]), gradients(expected, [z, *matrices]), strict=True):
        assert relative(found, wanted) < TOLERANCE[torch.float64]


@pytest.mark.parametrize("norm", [0.0, 1e-9, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("applied_in", [torch.float64, torch.bfloat16])
def test_the_inverse_is_that_of_the_map_as_it_was_applied(norm, dtype, applied_in):
    m = random(3, 8, 8, dtype=dtype).detach()
    m = norm * m / torch.linalg.matrix_norm(m, keepdim=True)
    found = inverse_of_one_plus(m, float(torch.linalg.matrix_norm(m @ m).max()), applied_in)
    expected = torch.linalg.inv(torch.eye(8, dtype=torch.float64) + m.to(applied_in).double())
    assert relative(found.double(), expected) < 20 * torch.finfo(dtype).eps / (1 - norm)


def saved(run) -> list[Tensor]:
    tensors = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: tensors.append(t) or t, lambda t: t):
        result = run()
    del result
    return tensors


def test_what_is_kept_is_the_output_where_it_determines_the_input():
    z, zero, near = random(7, 24), torch.zeros(4, 6, 6, dtype=torch.float64, requires_grad=True), head_map("plain")
    kept = {}

    def keep(name: str, matrix: Tensor, output_is_kept: bool = True) -> None:
        y = None

        def run() -> Tensor:
            nonlocal y
            y = apply_maps(z, [near._replace(matrix=matrix)], output_is_kept)
            return y

        storages = {t.untyped_storage().data_ptr() for t in saved(run)}
        kept[name] = ("z" if z.untyped_storage().data_ptr() in storages else "") + (
            "y" if y.untyped_storage().data_ptr() in storages else ""
        )

    keep("at the start", zero)
    keep("trained", near.matrix)
    keep("not kept by others", near.matrix, output_is_kept=False)
    keep("the map takes away a direction", (-torch.eye(6, dtype=torch.float64)).repeat(4, 1, 1).requires_grad_(True))
    keep("far away", (5 * near.matrix.detach() / near.matrix.detach().norm()).requires_grad_(True))
    keep("not a number", torch.full_like(zero, torch.nan).requires_grad_(True))
    keep("not trained", near.matrix.detach())
    assert kept == {
        "at the start": "y",
        "trained": "y",
        "not kept by others": "z",
        "the map takes away a direction": "z",
        "far away": "z",
        "not a number": "z",
        "not trained": "",
    }


@pytest.mark.parametrize("precision", ["ieee", "tf32", "bf16"])
@pytest.mark.parametrize(("factor", "keeps"), [(-0.99, True), (-0.3, False)])
def test_z_is_kept_where_the_coarsest_rounding_of_float32_products_would_be_amplified(
    precision, factor, keeps, monkeypatch
):
    z = random(7, 24, dtype=torch.float32)
    matrix = (factor * torch.eye(6)).repeat(4, 1, 1)  # -0.99: getting z back from y multiplies by 100
    matrix[:, 1:] = 0
    m = head_map("plain")._replace(matrix=matrix.requires_grad_(True))
    monkeypatch.setattr(torch.backends, "fp32_precision", precision)
    storages = {t.untyped_storage().data_ptr() for t in saved(lambda: apply_maps(z, [m], output_is_kept=True))}
    assert (z.untyped_storage().data_ptr() in storages) == keeps


def test_low_rank_keeps_r_numbers_a_token():
    z, m = random(7, 24), head_map("plain", "factored")
    sizes = {t.numel() for t in saved(lambda: apply_maps(z, [m]))}
    assert 7 * 4 * 3 in sizes
    assert 7 * 24 not in sizes


def test_a_direction_that_is_taken_away_still_gets_its_gradient():
    """There y says nothing about z: recovering it would be dividing by zero."""
    z = random(9, 24)
    matrix = (-torch.eye(6, dtype=torch.float64)).repeat(4, 1, 1).requires_grad_(True)
    m = head_map("plain")._replace(matrix=matrix)
    found = gradients(apply_maps(z, [m], output_is_kept=True), [z, matrix])
    wanted = gradients(formula(z, [m]), [z, matrix])
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < TOLERANCE[torch.float64]


CONFIGS = {
    "full": [{}],
    "diagonal": [{"s_matrix": "diagonal"}],
    "leading": [{"r": 3}],
    "most": [{"r": 8}],
    "truncated": [{"r": 8, "truncate": True}],
    "alike": [{}, {}],
    "cut otherwise": [{}, {"block_size": 2}],
    "of other ranks": [{"r": 3}, {}],
}


@pytest.mark.parametrize("configs", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "olmo", "deepseek_v3"])
def test_a_model_trains_as_by_the_formula(family, configs, monkeypatch):
    model = get_peft_model(build(family), CloverConfig(**configs[0]), adapter_name="0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(str(i), CloverConfig(**config))
    model.base_model.set_adapter([str(i) for i in range(len(configs))])
    perturb(model)

    def run() -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        y = model.eval()(**inputs(family)).logits  # without the dropout of some
        y.square().mean().backward()
        return y.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    y, found = run()
    monkeypatch.setattr(execution, "apply_maps", lambda z, maps, output_is_kept=False: formula(z, maps))
    expected, wanted = run()
    assert relative(y, expected) < TOLERANCE[torch.float32]
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert relative(one, other) < 10 * TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("config", "key_value_heads", "extra"),
    [
        ({}, 4, 48),
        ({}, 2, 24),
        ({"target_modules": ["v_proj"]}, 4, 0),
        ({"target_modules": ["up_proj"]}, 4, 0),
        ({"target_modules": ["k_proj"]}, 4, 48),
        ({"r": 2}, 4, 2 * (4 + 4)),
        ({"r": 1}, 4, 4 + 4 + 20),
        ({"r": 3}, 4, 3 * (4 + 4)),
        ({"low_rank": 2, "target_modules": ["up_proj"]}, 4, 80 + 48 + 2),
    ],
)
def test_what_a_model_keeps_for_every_token_beyond_its_base(config, key_value_heads, extra):
    """Of 48 features: keys keep their input, values and up projections nothing; with a part beside them, as before."""

    def floats(model, tokens: int) -> int:
        x = torch.randn(1, tokens, 48, requires_grad=True)
        own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        kept = {}

        def pack(t: Tensor) -> Tensor:
            if t.untyped_storage().data_ptr() not in own:
                kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = model(inputs_embeds=x, use_cache=False)
        del y
        return sum(kept.values())

    base = build("llama", num_key_value_heads=key_value_heads, num_hidden_layers=1)
    before = floats(base, 24) - floats(base, 12)
    model = get_peft_model(base, CloverConfig(mlp_block_size=4, **config))
    perturb(model)
    assert (floats(model, 24) - floats(model, 12)) - before == 12 * extra
