"""The directions of a narrow latent, against plain formulas."""

from __future__ import annotations

import pytest
import torch

from clover_peft.convert import latent
from clover_peft.convert.latent import LatentMoments, fitted_bases, principal_bases

N, RANK, KEYS = 12, 4, 5


def moments(tokens: int = 400):
    """Samples of z and z', and the moments of a latent."""
    generator = torch.Generator().manual_seed(0)
    z, noise, g = (torch.randn(tokens, N, dtype=torch.float64, generator=generator) for _ in range(3))
    mix, skew = (torch.randn(N, N, dtype=torch.float64, generator=generator) for _ in range(2))
    z = z @ mix
    here = z @ (torch.eye(N, dtype=z.dtype) + 0.3 * skew) + 2 * noise
    fisher = (g @ skew * torch.logspace(-2, 2, N, dtype=z.dtype)).T @ (
        g @ skew * torch.logspace(-2, 2, N, dtype=z.dtype)
    )
    return z, here, fisher / tokens


def cost(z, here, fisher, a, b):
    error = z - here @ a.T @ b.T
    return float(((error @ fisher) * error).sum() / len(z))


def fitted(z, here, fisher, rank=RANK):
    return fitted_bases(LatentMoments(here.T @ here / len(here), z.T @ here / len(z), fisher.clone()), rank)


def test_no_latent_of_this_rank_costs_less(monkeypatch):
    monkeypatch.setattr(latent, "_DAMPING", 1e-12)
    monkeypatch.setattr(latent, "_RIDGE", 1e-12)
    z, here, fisher = moments()
    found = cost(z, here, fisher, *fitted(z, here, fisher))
    # Eckart and Young: what least squares predict, in the metric of the Fisher information, loses its smallest values.
    predicted = torch.linalg.lstsq(here, z).solution
    root = torch.linalg.cholesky(fisher)
    unexplained = cost(z, here, fisher, predicted.T, torch.eye(N, dtype=z.dtype))
    lost = torch.linalg.svdvals(here @ predicted @ root)[RANK:].square().sum() / len(z)
    assert found == pytest.approx(unexplained + float(lost), rel=1e-6)


@pytest.mark.parametrize("rank", [1, RANK])
def test_the_numbers_of_a_latent_have_one_size(rank):
    z, here, fisher = moments()
    a, b = fitted(z, here, fisher, rank)
    assert (a.shape, b.shape) == ((rank, N), (N, rank))
    torch.testing.assert_close((here @ a.T).square().mean(0), torch.ones(rank, dtype=z.dtype))


def test_the_published_rule_is_principal_components_of_balanced_parts():
    z, _, _ = moments()
    a, b = principal_bases(z.T @ z / len(z), KEYS, RANK)
    scale = torch.cat(
        [part.square().sum(1).mean().rsqrt().expand(part.shape[1]) for part in z.split([KEYS, N - KEYS], 1)]
    )
    lost = torch.linalg.svdvals(z * scale)[RANK:].square().sum()
    torch.testing.assert_close(((z - z @ a.T @ b.T) * scale).square().sum(), lost)


def test_numbers_that_are_always_zero_give_finite_bases():
    z, here, fisher = moments()
    z[:, :3], here[:, :3] = 0, 0
    second = here.T @ here / len(here)
    for each in (fisher, fisher * 0):
        assert all(t.isfinite().all() for t in fitted(z, here, each))
    assert all(t.isfinite().all() for t in fitted(z * 0, here * 0, fisher))
    for each in (second, second * 0):
        assert all(t.isfinite().all() for t in principal_bases(each, KEYS, RANK))
