"""Directions of much energy in one set of vectors and little in another, against the plain eigenvalue problem."""

import pytest
import torch

from clover_peft.linalg.contrast import contrast_directions


def moment(size: int, seed: int, tokens: int = 400, decay: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, size, generator=generator, dtype=torch.float64)
    scales = torch.arange(1, size + 1, dtype=torch.float64) ** -decay
    mixing = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return (x * scales @ mixing).T @ (x * scales @ mixing) / tokens


def quotients(new, known, ridge):
    """All generalised eigenvalues, by a dense solver."""
    full = known + ridge * known.diagonal().median() * torch.eye(len(known), dtype=torch.float64)
    return torch.linalg.eigvals(torch.linalg.solve(full, new)).real.sort(descending=True).values, full


@pytest.mark.parametrize(("size", "rank"), [(24, 3), (24, 24), (96, 6), (7, 1)])
@pytest.mark.parametrize("ridge", [10.0, 0.1])
def test_the_directions_are_leading_generalised_eigenvectors(size, rank, ridge):
    new, known = moment(size, 0), moment(size, 1)
    a = contrast_directions(new, known, rank, ridge)
    expected, full = quotients(new, known, ridge)
    assert a.shape == (rank, size)
    found = 1 / ((a @ full) * a).sum(1)
    assert found.sum().item() == pytest.approx(expected[:rank].sum().item(), rel=1e-3)
    assert torch.allclose(((a @ new) * a).sum(1), torch.ones(rank).double())
    across = a @ full @ a.T * found.sqrt() * found.sqrt().unsqueeze(1)
    assert torch.allclose(across, torch.eye(rank, dtype=torch.float64), atol=1e-8)
    assert (found.diff() <= 1e-9).all()


def test_a_direction_that_only_the_new_vectors_have_is_found():
    known, direction = moment(32, 1), torch.nn.functional.normalize(torch.arange(32.0, dtype=torch.float64), dim=0)
    new = known + 5 * direction.outer(direction)
    (a,) = contrast_directions(new, known, 1)
    full = quotients(new, known, 10.0)[1]
    best = torch.linalg.solve(full, direction)
    assert abs(torch.nn.functional.cosine_similarity(a, best, dim=0)) > 0.99


def test_scale_does_not_matter_and_the_answer_is_always_the_same():
    new, known = moment(40, 0), moment(40, 1)
    a = contrast_directions(new, known, 4)
    assert torch.equal(a, contrast_directions(new, known, 4))
    assert torch.allclose(contrast_directions(new, 1e6 * known, 4), a)
    assert torch.allclose(contrast_directions(1e-6 * new, known, 4), 1e3 * a)


def test_one_huge_quotient_does_not_hide_the_others():
    values = torch.cat([torch.tensor([1e6]), torch.linspace(5, 1, 79)]).double()
    mixing = torch.linalg.qr(torch.randn(80, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    new, known = mixing.T @ (values.unsqueeze(1) * mixing), torch.eye(80, dtype=torch.float64)
    a = contrast_directions(new, known, 3)
    found = ((a @ new) * a).sum(1) / (a * a).sum(1)
    assert found.tolist() == pytest.approx(values[:3].tolist(), rel=0.01)


def test_features_that_hardly_ever_fire_are_not_followed():
    """More than half of the features of a ReLU can fire once in thousands of tokens."""
    size = 64
    scales = torch.cat([torch.ones(20), torch.full((size - 20,), 1e-3)]).double()
    new, known = (moment(size, seed, decay=0.0) * scales * scales.unsqueeze(1) for seed in (0, 1))
    new[40, 40] *= 20  # it fires once on new data
    a = contrast_directions(new, known, 4)
    assert (a[:, 20:] ** 2).sum() < 0.05 * (a**2).sum()


def test_dead_features_do_no_harm():
    """After a ReLU more than half of the features can be zero on all tokens."""
    new, known = torch.zeros(2, 10, 10, dtype=torch.float64)
    new[:3, :3], known[:3, :3] = moment(3, 0), moment(3, 1)
    a = contrast_directions(new, known, 2)
    assert torch.isfinite(a).all()
    assert not a[:, 3:].any()


def test_what_has_no_directions_is_refused():
    new = torch.zeros(8, 8, dtype=torch.float64)
    new[0, 0] = 1
    with pytest.raises(ValueError, match="expected data with 2 directions, found fewer; pass more data"):
        contrast_directions(new, moment(8, 1), 2)
    three = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double()  # of float32's precision
    few = (three.T.float() @ three.float()).double()
    assert contrast_directions(few, moment(8, 1), 3).norm(dim=1).max() < 10
    for rank in (4, 8, 9):
        with pytest.raises(ValueError, match=f"expected data with {rank} directions, found fewer"):
            contrast_directions(few, moment(8, 1), rank)
    with pytest.raises(ValueError, match="expected vectors that are not zero, found a second moment of 0"):
        contrast_directions(moment(8, 1), torch.zeros(8, 8, dtype=torch.float64), 2)
    with pytest.raises(ValueError, match="a second moment of nan"):
        contrast_directions(moment(8, 1), torch.full((8, 8), torch.nan, dtype=torch.float64), 2)
