"""The linear algebra: bases against dense SVD and QR, over random shapes, and what happens to degenerate heads.

W stands for a batch of heads (H, d, D): rows of value or key weights, or transposed columns of output weights.
"""

from __future__ import annotations

from dataclasses import astuple, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import clover_peft.linalg.decomposition
from clover_peft.linalg.decomposition import (
    Bases,
    feature_norms,
    fold,
    gram,
    limit_condition,
    pair_bases,
    qr_bases,
    svd_bases,
)
from clover_peft.tuner.config_checks import MOST_CONDITION
from clover_peft.tuner.explicit_factors import Factors
from tests.support.tiny import TOLERANCE, relative

# Required of condition numbers up to 1e3 (each side of a pair), in float64: largest absolute entry of the difference.
IDENTITY = 1e-10
ORTHONORMAL = 1e-8
CLOSE = TOLERANCE[torch.float64]

repeated = settings(max_examples=60, deadline=None, derandomize=True, database=None)


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------- random heads


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=_generator(seed), dtype=torch.float64)


def orthonormal(rows: int, columns: int, count: int, seed: int) -> Tensor:
    """(count, rows, columns) with orthonormal columns."""
    return torch.linalg.qr(randn(count, rows, columns, seed=seed))[0]


@st.composite
def weights(draw: st.DrawFn, sides: int = 1) -> list[Tensor]:
    """`sides` batches W (H, d, D) of one H and d: condition up to 1e3, every head of its own scale, 1e-3 ... 1e3."""
    count, d = draw(st.integers(1, 4)), draw(st.integers(1, 24))
    seed = draw(st.integers(0, 2**31 - 100))
    aligned = draw(st.booleans())  # both sides weak in the same direction: the product's condition is up to 1e6
    result = []
    for side in range(sides):
        width = draw(st.integers(d, 48))
        exponent = draw(st.floats(0, 3))
        steps = torch.linspace(0, 1, d, dtype=torch.float64)
        shape = draw(st.sampled_from(["even", "one weak", "one strong"]))
        falling = {"even": steps, "one weak": steps.floor(), "one strong": steps.ceil()}[shape]
        sigma = 10 ** (-exponent * falling)
        scale = 10 ** (6 * torch.rand(count, 1, 1, generator=_generator(seed + side), dtype=torch.float64) - 3)
        left = orthonormal(d, d, count, seed + (10 if aligned else 10 + side))
        right = orthonormal(width, d, count, seed + 20 + side)
        result.append(scale * (left * sigma) @ right.mT)
    return result


def gram_of(w: Tensor) -> Tensor:
    """`gram` of heads W (H, d, D)."""
    return gram(w.permute(2, 0, 1))


def largest(x: Tensor) -> float:
    return float(x.abs().max())


def off_identity(x: Tensor) -> float:
    """Largest entry of X - I."""
    return largest(x - torch.eye(x.shape[-1], dtype=x.dtype))


def dropped(bases: Bases) -> Tensor:
    """(H,), the directions that each block lacks: zero rows of C."""
    return (bases.c == 0).all(-1).sum(-1)


def back_of(bases: Bases) -> Tensor:
    return torch.eye(bases.c.shape[-1], dtype=torch.float64) if bases.e is None else bases.e


# ---------------------------------------------------------------------- pairs


@repeated
@given(weights(sides=2))
def test_pair_maps_into_the_bases_and_back_to_the_identity(sides):
    bases = pair_bases(*map(gram_of, sides))
    assert off_identity(fold(bases.singular_values, bases.c, bases.e)) <= IDENTITY
    assert not dropped(bases).any()


@repeated
@given(weights(sides=2))
def test_pair_bases_are_orthonormal_on_both_sides(sides):
    inner, outer = sides
    bases = pair_bases(gram_of(inner), gram_of(outer))
    u, v = inner.mT @ bases.c.mT, outer.mT @ bases.e
    assert off_identity(u.mT @ u) <= ORTHONORMAL
    assert off_identity(v.mT @ v) <= ORTHONORMAL


@repeated
@given(weights(sides=2))
def test_pair_factors_multiply_to_the_dense_product_with_its_singular_values(sides):
    inner, outer = sides
    bases = pair_bases(gram_of(inner), gram_of(outer))
    product = outer.mT @ inner  # (H, D_out, D_in)
    factors = Factors(inner.mT @ bases.c.mT, torch.diag_embed(bases.singular_values), outer.mT @ bases.e)
    expected = torch.linalg.svdvals(product)[:, : inner.shape[1]]
    for head in range(len(product)):
        assert relative(factors.product()[head], product[head]) <= CLOSE
        assert largest(bases.singular_values[head] - expected[head]) <= CLOSE * float(expected[head, 0])
    assert (bases.singular_values.diff(dim=-1) <= 0).all()


def test_pair_with_a_bias_has_it_as_the_last_row_of_U():
    inner, bias, outer = randn(3, 5, 16, seed=1), randn(3, 5, seed=2), randn(3, 5, 16, seed=3)
    bases = pair_bases(gram(inner.permute(2, 0, 1), bias), gram_of(outer))
    extended = torch.cat([inner, bias.unsqueeze(-1)], -1)
    u = extended.mT @ bases.c.mT
    assert u.shape == (3, 17, 5)
    assert off_identity(u.mT @ u) <= ORTHONORMAL
    product = Factors(u, torch.diag_embed(bases.singular_values), outer.mT @ bases.e).product()
    assert relative(product, outer.mT @ extended) <= CLOSE


def test_pair_refuses_grams_of_different_shapes():
    with pytest.raises(ValueError, match=r"\(2, 3, 3\) and \(2, 4, 4\)"):
        pair_bases(gram_of(randn(2, 3, 8, seed=1)), gram_of(randn(2, 4, 8, seed=2)))


# ---------------------------------------------------------------------- singles


@repeated
@given(weights())
def test_qr_coordinates_are_the_inverse_of_a_triangular_factor_with_positive_diagonal(sides):
    (w,) = sides
    bases = qr_bases(gram_of(w))
    assert bases.e is None
    q, r = torch.linalg.qr(w.mT)
    sign = torch.diagonal(r, dim1=-2, dim2=-1).sign()
    q, r = q * sign.unsqueeze(-2), sign.unsqueeze(-1) * r
    assert not bases.c.triu(1).any()
    assert (torch.diagonal(bases.c, dim1=-2, dim2=-1) > 0).all()
    assert off_identity(bases.c @ r.mT) <= ORTHONORMAL  # C = R^-T
    assert largest(w.mT @ bases.c.mT - q) <= ORTHONORMAL  # C W = Q^T
    u = w.mT @ bases.c.mT
    assert off_identity(u.mT @ u) <= ORTHONORMAL


def test_qr_singular_values_are_those_of_the_projection_and_zero_where_directions_are_dropped():
    torch.manual_seed(0)
    w = torch.randn(3, 8, 40, dtype=torch.float64)
    w[1] *= torch.logspace(0, -4, 8, dtype=torch.float64).unsqueeze(-1)
    w[2, 5:] = w[2, :3]
    bases, expected = qr_bases(w @ w.mT), torch.linalg.svdvals(w)
    torch.testing.assert_close(bases.singular_values[:2], expected[:2], rtol=1e-7, atol=0)
    torch.testing.assert_close(bases.singular_values[2, :5], expected[2, :5], rtol=1e-7, atol=0)
    assert not bases.singular_values[2, 5:].any()
    assert not bases.c[2, 5:].any()
    assert bases.c[2, :5].any(-1).all()


@repeated
@given(weights())
def test_svd_maps_into_the_bases_and_back_to_the_identity(sides):
    bases = svd_bases(gram_of(*sides))
    assert off_identity(fold(bases.singular_values, bases.c, bases.e)) <= IDENTITY
    assert not dropped(bases).any()


@repeated
@given(weights())
def test_svd_bases_are_the_singular_vectors_of_the_weight(sides):
    (w,) = sides
    bases = svd_bases(gram_of(w))
    u = w.mT @ bases.c.mT
    assert off_identity(u.mT @ u) <= ORTHONORMAL
    assert off_identity(bases.e.mT @ bases.e) <= ORTHONORMAL
    product = Factors(u, torch.diag_embed(bases.singular_values), bases.e).product()
    for head in range(len(w)):
        assert relative(product[head], w[head]) <= CLOSE


@repeated
@given(weights())
def test_single_bases_report_the_singular_values_of_the_weight_in_descending_order(sides):
    (w,) = sides
    expected = torch.linalg.svdvals(w)
    for function in (qr_bases, svd_bases):
        values = function(gram_of(w)).singular_values
        assert largest((values - expected) / expected[:, :1]) <= CLOSE
        assert (values.diff(dim=-1) <= 0).all()


# ---------------------------------------------------------------------- conventions


def _every_bases(w: Tensor, outer: Tensor) -> dict[str, Bases]:
    return {"pair": pair_bases(gram_of(w), gram_of(outer)), "qr": qr_bases(gram_of(w)), "svd": svd_bases(gram_of(w))}


@repeated
@given(weights(sides=2))
def test_the_largest_coordinate_of_every_singular_direction_is_positive(sides):
    for name, bases in _every_bases(*sides).items():
        if name != "qr":
            assert (bases.c.amax(-1) == bases.c.abs().amax(-1)).all()


@pytest.mark.parametrize("name", ["pair", "qr", "svd"])
def test_a_decomposition_repeats_bit_for_bit(name):
    w, outer = randn(4, 8, 32, seed=1), randn(4, 8, 32, seed=2)
    first, second = (_every_bases(w.clone(), outer.clone())[name] for _ in range(2))
    for a, b in zip(astuple(first), astuple(second), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


@pytest.mark.parametrize("name", ["pair", "qr", "svd"])
def test_bases_in_head_space_do_not_change_under_a_rotation_of_the_hidden_space(name):
    # Signs included: without a convention another rounding could flip them.
    w, outer = randn(4, 8, 32, seed=1), randn(4, 8, 32, seed=2)
    first = _every_bases(w, outer)[name]
    for seed in range(5):
        rotation = orthonormal(32, 32, 1, seed=seed)
        second = _every_bases(w @ rotation, outer @ rotation)[name]
        assert relative(second.c, first.c) <= ORTHONORMAL
        assert relative(back_of(second), back_of(first)) <= ORTHONORMAL


@pytest.mark.parametrize("name", ["pair", "qr", "svd"])
@pytest.mark.parametrize("r", [1, 3, 6])
def test_leading_keeps_the_first_directions_and_leaves_out_the_others(name, r):
    whole = _every_bases(randn(2, 6, 16, seed=1), randn(2, 6, 16, seed=2))[name]
    bases = whole.leading(r)
    assert torch.equal(bases.c, whole.c[:, :r])
    assert torch.equal(bases.singular_values, whole.singular_values[:, :r])
    assert torch.equal(dropped(bases), dropped(whole))
    assert bases.c.is_contiguous()
    if name == "qr":
        assert bases.e is None
    else:
        assert torch.equal(bases.e, whole.e[:, :, :r])
        assert bases.e.is_contiguous()


def test_leading_directions_are_the_best_approximation_of_the_product():
    inner, outer = randn(3, 6, 16, seed=1), randn(3, 6, 16, seed=2)
    bases = pair_bases(gram_of(inner), gram_of(outer)).leading(4)
    product = outer.mT @ inner
    cut = outer.mT @ fold(bases.singular_values, bases.c, bases.e) @ inner
    rest = torch.linalg.svdvals(product)[:, 4:]
    error = torch.linalg.matrix_norm(product - cut)
    assert largest(error / torch.linalg.vector_norm(rest, dim=-1) - 1) <= CLOSE  # Eckart-Young


# ---------------------------------------------------------------------- gram and fold


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 150, 10**9])
def test_gram_is_the_sum_of_outer_products_whatever_the_chunks_and_the_dtype(chunk, dtype, with_bias, monkeypatch):
    monkeypatch.setattr(clover_peft.linalg.decomposition, "_CHUNK_ELEMENTS", chunk)
    blocks = randn(10, 7, 5, seed=1).to(dtype)
    bias = randn(7, 5, seed=2).to(dtype) if with_bias else None
    result = gram(blocks, bias)
    assert result.dtype == torch.float64
    assert result.shape == (7, 5, 5)
    for head in range(7):
        w = blocks[:, head].double().mT
        w = w if bias is None else torch.cat([w, bias[head].double().unsqueeze(-1)], -1)
        assert relative(result[head], w @ w.mT) <= CLOSE
        assert torch.equal(result[head], result[head].mT)


@pytest.mark.parametrize("chunk", [1, 100, 10**6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
def test_norms_are_those_of_the_features_whatever_the_chunks_and_the_dtype(chunk, dtype, transposed, monkeypatch):
    monkeypatch.setattr(clover_peft.linalg.decomposition, "_CHUNK_ELEMENTS", chunk)
    weight = randn(40, 24, seed=1).to(dtype)
    before = weight.clone()
    blocks = (weight.mT.contiguous().mT if transposed else weight).unflatten(1, (4, 6))
    found = feature_norms(blocks)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    expected = torch.linalg.vector_norm(before.double().unflatten(1, (4, 6)), dim=0)
    assert float((found / expected - 1).abs().max()) < (1e-14 if dtype == torch.float64 else 1e-6)
    assert torch.equal(weight, before)


def test_gram_leaves_its_arguments_alone():
    blocks, bias = randn(10, 3, 5, seed=1), randn(3, 5, seed=2)
    kept = blocks.clone(), bias.clone()
    gram(blocks, bias)
    assert torch.equal(blocks, kept[0])
    assert torch.equal(bias, kept[1])


@pytest.mark.parametrize(
    ("with_coordinates", "with_back", "r"),
    [(True, True, 3), (True, True, 5), (True, False, 5), (False, True, 5), (False, False, 5)],
)
@pytest.mark.parametrize("form", ["full", "diagonal"])
def test_fold_is_E_S_C_where_a_missing_basis_is_the_identity(form, with_coordinates, with_back, r):
    s = randn(4, r, r, seed=1) if form == "full" else randn(4, r, seed=1)
    coordinates = randn(4, r, 5, seed=2) if with_coordinates else None
    back = randn(4, 5, r, seed=3) if with_back else None
    result = fold(s, coordinates, back)
    eye = torch.eye(5, dtype=torch.float64)
    for head in range(4):
        matrix = s[head] if form == "full" else torch.diag(s[head])
        e = eye if back is None else back[head]
        c = eye if coordinates is None else coordinates[head]
        assert relative(result[head], e @ matrix @ c) <= CLOSE


def test_fold_is_linear_in_S_and_passes_gradients_to_it():
    s, c, e = randn(2, 3, seed=1).requires_grad_(), randn(2, 3, 5, seed=2), randn(2, 5, 3, seed=3)
    fold(s, c, e).sum().backward()
    assert relative(s.grad, e.sum(1) * c.sum(2)) <= CLOSE


# ---------------------------------------------------------------------- degenerate heads

D_HEAD, WIDTH = 8, 24


def _rank(rank: int) -> Tensor:
    return randn(D_HEAD, rank, seed=31) @ randn(rank, WIDTH, seed=32)


def _equal_rows(count: int) -> Tensor:
    w = randn(D_HEAD, WIDTH, seed=33)
    w[1:count] = w[0]
    return w


def _with_condition(condition: float, next_to_last: float = 1.0) -> Tensor:
    """All singular values 1 but the last two."""
    sigma = torch.ones(D_HEAD, dtype=torch.float64)
    sigma[-2] = next_to_last
    sigma[-1] = 1 / condition
    left, right = orthonormal(D_HEAD, D_HEAD, 1, seed=34)[0], orthonormal(WIDTH, D_HEAD, 1, seed=35)[0]
    return (left * sigma) @ right.mT


def _zero_row() -> Tensor:
    w = randn(D_HEAD, WIDTH, seed=36)
    w[2] = 0
    return w


# name -> (head (d, D), directions that must be dropped)
DEGENERATE = {
    "zero": (torch.zeros(D_HEAD, WIDTH, dtype=torch.float64), D_HEAD),
    "one row is zero": (_zero_row(), 1),
    "two rows are equal": (_equal_rows(2), 1),
    "four rows are equal": (_equal_rows(4), 3),
    "rank 1": (_rank(1), D_HEAD - 1),
    "rank 5": (_rank(5), D_HEAD - 5),
    "rank 5, tiny": (1e-6 * _rank(5), D_HEAD - 5),
    "rank 5, huge": (1e6 * _rank(5), D_HEAD - 5),
    "condition 1e7": (_with_condition(1e7), 1),
    "condition 1e12": (_with_condition(1e12), 1),
    "condition 1e12, and a weak direction": (_with_condition(1e12, next_to_last=5e-4), 1),
}
# name -> bases from the Gram of the heads and that of healthy ones
METHODS = {
    "pair, inner": lambda g, healthy: pair_bases(g, healthy),
    "pair, outer": lambda g, healthy: pair_bases(healthy, g),
    "qr": lambda g, healthy: qr_bases(g),
    "svd": lambda g, healthy: svd_bases(g),
}


def _batch(head: Tensor, place: int = 1) -> Tensor:
    w = randn(3, D_HEAD, WIDTH, seed=40)
    w[place] = head
    return w


def _healthy() -> Tensor:
    return randn(3, D_HEAD, WIDTH, seed=41)


def _assert_finite(bases: Bases) -> None:
    for tensor in (bases.c, back_of(bases), bases.singular_values):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_a_degenerate_head_loses_its_dead_directions_and_nothing_else(kind, method):
    head, expected = DEGENERATE[kind]
    bases = METHODS[method](gram_of(_batch(head)), gram_of(_healthy()))
    _assert_finite(bases)
    assert dropped(bases).tolist() == [0, expected, 0]
    alive = D_HEAD - expected
    # Dropped directions are the last ones, and exactly zero.
    rows = bases.c[1].abs().amax(-1)
    assert (rows[:alive] > 0).all()
    assert not rows[alive:].any()
    if bases.e is not None:
        columns = bases.e[1].abs().amax(-2)
        assert (columns[:alive] > 0).all()
        assert not columns[alive:].any()
        assert (bases.singular_values[1, :alive] > 0).all()
        assert not bases.singular_values[1, alive:].any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_the_directions_that_a_degenerate_head_keeps_are_orthonormal_and_carry_its_function(kind, method):
    head, dropped = DEGENERATE[kind]
    w, healthy = _batch(head), _healthy()
    bases = METHODS[method](gram_of(w), gram_of(healthy))
    alive = D_HEAD - dropped
    inner = healthy[1] if method == "pair, outer" else w[1]
    u = (inner.mT @ bases.c[1].mT)[:, :alive]
    assert alive == 0 or off_identity(u.mT @ u) <= ORTHONORMAL
    if method == "qr":
        return
    outer = torch.eye(D_HEAD, dtype=torch.float64)
    if method != "svd":
        outer = w[1] if method == "pair, outer" else healthy[1]
    v = (outer.mT @ bases.e[1])[:, :alive]
    assert alive == 0 or off_identity(v.mT @ v) <= ORTHONORMAL
    # What was dropped is less than 1e-5 of the head, and zero where the head is singular.
    product = outer.mT @ inner
    error = product - outer.mT @ fold(bases.singular_values, bases.c, bases.e)[1] @ inner
    scale = torch.linalg.matrix_norm(outer) * torch.linalg.matrix_norm(inner)
    assert float(error.norm()) <= 1e-6 * float(scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_healthy_heads_beside_a_degenerate_one_are_those_decomposed_alone_bit_for_bit(kind, method):
    g, healthy = gram_of(_batch(DEGENERATE[kind][0])), gram_of(_healthy())
    together = METHODS[method](g, healthy)
    for head in (0, 2):
        alone = METHODS[method](g[head : head + 1], healthy[head : head + 1])
        for a, b in zip(astuple(together), astuple(alone), strict=True):
            assert (a is None and b is None) or torch.equal(a[head], b[0])


@pytest.mark.parametrize("condition", [1e3, 1e4])
@pytest.mark.parametrize("method", METHODS)
def test_an_ill_conditioned_head_below_the_limit_drops_nothing(method, condition):
    bases = METHODS[method](gram_of(_batch(_with_condition(condition))), gram_of(_healthy()))
    assert not dropped(bases).any()
    if method == "qr":
        assert not bases.c.triu(1).any()  # still R^-T, from Cholesky


@pytest.mark.parametrize("width", [1, 3, 7])
@pytest.mark.parametrize("function", [qr_bases, svd_bases])
def test_a_block_with_fewer_inputs_than_features_keeps_as_many_directions_as_inputs(function, width):
    bases = function(gram_of(randn(3, D_HEAD, width, seed=1)))
    _assert_finite(bases)
    assert dropped(bases).tolist() == [D_HEAD - width] * 3
    assert (bases.c.abs().amax(-1) > 0).sum(-1).tolist() == [width] * 3


@pytest.mark.parametrize(("inner", "outer"), [(3, 24), (24, 3), (3, 5), (5, 3), (4, 4)])
def test_a_pair_with_few_inputs_or_outputs_keeps_as_many_directions_as_the_narrower_side(inner, outer):
    w, o = randn(3, D_HEAD, inner, seed=1), randn(3, D_HEAD, outer, seed=2)
    bases = pair_bases(gram_of(w), gram_of(o))
    _assert_finite(bases)
    rank = min(inner, outer)
    assert dropped(bases).tolist() == [D_HEAD - rank] * 3
    product = Factors(w.mT @ bases.c.mT, torch.diag_embed(bases.singular_values), o.mT @ bases.e)
    assert relative(product.product(), o.mT @ w) <= ORTHONORMAL


# name -> (head coordinates that the inner side writes, those that the outer side reads)
_ALL = list(range(D_HEAD))
BOTH_SIDES = {
    "the same coordinate is missing": (_ALL[1:], _ALL[1:]),
    "different coordinates are missing": (_ALL[1:], _ALL[:-1]),
    "overlapping halves": (_ALL[:5], _ALL[3:]),
    "orthogonal halves": (_ALL[:4], _ALL[4:]),
    "one of them is zero": ([], _ALL),
    "both are zero": ([], []),
}


@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize("kind", BOTH_SIDES)
def test_a_pair_degenerate_on_both_sides_keeps_the_rank_of_the_product(kind, rotated):
    writes, reads = BOTH_SIDES[kind]
    basis = orthonormal(D_HEAD, D_HEAD, 1, seed=50)[0] if rotated else torch.eye(D_HEAD, dtype=torch.float64)
    inner = basis[:, writes] @ randn(len(writes), WIDTH, seed=51)
    outer = basis[:, reads] @ randn(len(reads), WIDTH, seed=52)
    w, o = _batch(inner), _healthy()
    o[1] = outer
    bases = pair_bases(gram_of(w), gram_of(o))
    _assert_finite(bases)
    rank = len(set(writes) & set(reads))
    assert dropped(bases).tolist() == [0, D_HEAD - rank, 0]
    assert not bases.c[1, rank:].any()
    assert not bases.e[1, :, rank:].any()
    assert not bases.singular_values[1, rank:].any()
    u, v = w.mT @ bases.c.mT, o.mT @ bases.e
    product = Factors(u, torch.diag_embed(bases.singular_values), v).product()
    scale = torch.linalg.matrix_norm(inner) * torch.linalg.matrix_norm(outer)
    assert float((product[1] - outer.mT @ inner).norm()) <= ORTHONORMAL * float(scale)
    for side in (u, v):
        gram_side = side[1, :, :rank].mT @ side[1, :, :rank]
        assert rank == 0 or off_identity(gram_side) <= ORTHONORMAL


# ---------------------------------------------------------------------- limited condition


def condition_of(g: Tensor) -> Tensor:
    """(H,), of a factor R of every Gram `R^T R`."""
    values = torch.linalg.eigvalsh(g)
    return (values[:, -1] / values[:, 0]).sqrt()


@repeated
@given(weights(), st.sampled_from([1.5, 3.0, 30.0, 1e4]))
def test_no_condition_exceeds_the_limit_and_heads_within_it_keep_their_bits(sides, most):
    g = gram_of(*sides)
    limited = limit_condition(g, most)
    assert (condition_of(limited) <= most * (1 + 1e-6)).all()
    for head in (condition_of(g) < 0.99 * most).nonzero().flatten():
        assert torch.equal(limited[head], g[head])
    added = (limited - g).diagonal(dim1=-2, dim2=-1)  # a multiple of the identity: the directions are as they were
    scale = torch.linalg.matrix_norm(g, ord=2)
    assert (added >= 0).all()
    assert largest((limited - g - torch.diag_embed(added)) / scale.view(-1, 1, 1)) == 0
    assert largest(added - added[:, :1]) <= 1e-12 * float(scale.max())
    assert (added[:, 0] <= scale / (most**2 - 1) * (1 + 1e-9)).all()


@pytest.mark.parametrize("method", ["svd", "pair, inner", "pair, outer"])
def test_bases_of_a_limited_head_do_not_depend_on_rounding(method):
    sigma = torch.tensor([1, 0.9, 0.8, 0.7, 0.6, 3e-3, 1e-3, 3e-4], dtype=torch.float64)
    left, right = orthonormal(D_HEAD, D_HEAD, 1, seed=34)[0], orthonormal(WIDTH, D_HEAD, 1, seed=35)[0]
    g, healthy = gram_of(_batch((left * sigma) @ right.mT)), gram_of(_healthy())
    noise = 1e-15 * randn(*g.shape, seed=9) * torch.linalg.matrix_norm(g, ord=2).view(-1, 1, 1)
    bases, other = (METHODS[method](limit_condition(x, 100.0), healthy) for x in (g, g + noise + noise.mT))
    assert relative(other.c, bases.c) <= 1e-7
    assert relative(other.e, bases.e) <= 1e-7


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_the_highest_limit_drops_nothing(kind, method):
    g, healthy = (limit_condition(gram_of(w), MOST_CONDITION) for w in (_batch(DEGENERATE[kind][0]), _healthy()))
    assert not dropped(METHODS[method](g, healthy)).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", DEGENERATE)
def test_limited_bases_of_a_degenerate_head_drop_nothing_and_map_to_the_identity(kind, method):
    most = 100.0
    g, healthy = (limit_condition(gram_of(w), most) for w in (_batch(DEGENERATE[kind][0]), _healthy()))
    bases = METHODS[method](g, healthy)
    assert not dropped(bases).any()
    if method == "qr":
        assert off_identity(bases.c @ g @ bases.c.mT) <= IDENTITY
    else:
        assert off_identity(fold(bases.singular_values, bases.c, bases.e)) <= IDENTITY
    for tensor in (bases.c, bases.e):
        values = torch.linalg.svdvals(back_of(bases)[None] if tensor is None else tensor)
        assert (values[:, 0] / values[:, -1] <= most * (1 + 1e-6)).all()


def test_a_block_of_zeros_becomes_the_identity():
    g = torch.zeros(2, 3, 3, dtype=torch.float64)
    g[1] = torch.eye(3) * 4
    assert torch.equal(limit_condition(g, 10.0), torch.stack([torch.eye(3), torch.eye(3) * 4]).double())


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite_are_refused_and_their_heads_named(method, value):
    w = randn(5, D_HEAD, WIDTH, seed=1)
    w[1, 0, 0] = w[3, 2, 1] = value
    with pytest.raises(ValueError, match=r"head\(s\) 1, 3 contain NaN or infinite"):
        METHODS[method](gram_of(w), gram_of(randn(5, D_HEAD, WIDTH, seed=2)))


def test_bases_as_strong_as_others():
    generator = torch.Generator().manual_seed(0)
    grams = []
    for _ in range(4):
        rows = torch.randn(3, 8, 24, generator=generator, dtype=torch.float64)
        grams.append(rows @ rows.mT)
    one, other = pair_bases(*grams[:2]), pair_bases(*grams[2:])
    found = other.as_strong_as(one, *grams[:2])
    for rows, wanted, g in (
        (found.c, one.c, grams[0]),
        (found.e.mT, one.e.mT, grams[1]),
    ):
        sizes = [(a @ g @ a.mT).diagonal(dim1=-2, dim2=-1).sum(-1) for a in (rows, wanted)]
        torch.testing.assert_close(*sizes)
    torch.testing.assert_close(
        found.e @ (found.singular_values.unsqueeze(-1) * found.c),
        torch.eye(8, dtype=torch.float64).expand(3, 8, 8),
    )
    assert not torch.allclose(found.e, other.e, rtol=1e-2)
    zero = replace(other, c=torch.zeros_like(other.c))
    assert torch.equal(zero.as_strong_as(one, *grams[:2]).c, zero.c)


@pytest.mark.parametrize("function", [pair_bases, qr_bases, svd_bases, limit_condition])
def test_small_matrices_are_decomposed_on_one_thread(function, monkeypatch):
    """With two threads that sleep between calls (OMP_WAIT_POLICY=passive) they took three times as long."""
    grams = torch.eye(4, dtype=torch.float64).expand(2, 4, 4)
    arguments = {pair_bases: (grams, grams), limit_condition: (grams, 10.0)}.get(function, (grams,))
    seen, threads = [], torch.get_num_threads()
    for name in ("svd", "eigh", "eigvalsh", "cholesky_ex", "solve_triangular"):
        plain = getattr(torch.linalg, name)
        counting = lambda *a, plain=plain, **k: seen.append(torch.get_num_threads()) or plain(*a, **k)  # noqa: E731
        monkeypatch.setattr(torch.linalg, name, counting)
    torch.set_num_threads(2)
    try:
        function(*arguments)
        assert set(seen) == {1}
        assert torch.get_num_threads() == 2
        with pytest.raises(ValueError, match="NaN"):
            function(*(a * float("nan") for a in arguments))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
