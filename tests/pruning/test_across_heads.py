"""Directions and output maps of all heads of a block together: best on the samples that they are fitted to."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from clover_peft.linalg.decomposition import pair_bases
from clover_peft.linalg.moments import Moments, diagonal_blocks, shrink
from clover_peft.pruning.across_heads import _RIDGE, balance, fit_back, fit_down, joint_moments

HEADS, GROUPS, SIZE, OUT = 2, 2, 6, 20
COUNT = HEADS * GROUPS
N = COUNT * SIZE


def samples(groups: int = GROUPS, tokens: int = 4000) -> tuple[Tensor, Tensor]:
    """Features of query heads that have much in common, (tokens, n), and an output weight (OUT, n)."""
    generator = torch.Generator().manual_seed(0)
    n = HEADS * groups * SIZE
    common = torch.randn(tokens, 8, generator=generator) @ torch.randn(8, n, generator=generator)
    features = common + 0.5 * torch.randn(tokens, n, generator=generator)
    return features.double(), torch.randn(OUT, n, generator=generator).double()


def problem(ranks: list[int], groups: int = GROUPS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """C by each head alone, the moments, the Gram of the output, and the features."""
    features, output = samples(groups)
    moments, gram = features.mT @ features / len(features), output.mT @ output
    shape = (HEADS, groups, SIZE, HEADS, groups, SIZE)
    own, out = (
        torch.stack([sum(each.view(shape)[h, g, :, h, g] for g in range(groups)) for h in range(HEADS)])
        for each in (moments, gram)
    )
    kept = torch.arange(SIZE) < torch.tensor(ranks).unsqueeze(1)
    down = pair_bases(own, out).c * kept.unsqueeze(-1)
    whole = kept.all(-1).view(-1, 1, 1)
    return torch.where(whole, torch.eye(SIZE).double(), down), moments, gram, features


def error(down: Tensor, back: Tensor, moments: Tensor, gram: Tensor) -> float:
    """`tr((I - P) M (I - P)^T G)`, as it is written."""
    each = down.repeat_interleave(len(back) // len(down), dim=0)
    lost = torch.eye(len(moments)).double() - back.flatten(2).flatten(0, 1) @ torch.block_diag(*each)
    return float(torch.trace(lost @ moments @ lost.mT @ gram))


def test_the_way_back_is_the_regression_on_the_kept_coordinates():
    down, moments, _, features = problem([3, 2])
    each = down.repeat_interleave(GROUPS, dim=0)
    back = fit_back(each, moments)
    kept = torch.block_diag(*each)[each.any(-1).flatten()]
    coordinates = features @ kept.mT
    ridge = torch.diag((_RIDGE * coordinates.square().sum(0)).sqrt())  # as further rows, whose features are zero
    rows, targets = torch.cat([coordinates, ridge]), torch.cat([features, torch.zeros(len(ridge), N).double()])
    expected = torch.linalg.lstsq(rows, targets).solution.mT
    found = back.flatten(2).flatten(0, 1)
    torch.testing.assert_close(found[:, each.any(-1).flatten()], expected)
    assert bool((found[:, ~each.any(-1).flatten()] == 0).all())


@pytest.mark.parametrize("groups", [1, 2])
def test_a_head_that_keeps_all_its_directions_stays_exact(groups):
    down, moments, gram, _ = problem([6, 2], groups)
    weak = torch.ones(len(moments)).double()
    weak[:3] = 1e-4
    moments = weak.diag() @ moments @ weak.diag()
    moments = joint_moments(diagonal_blocks(moments, HEADS * groups), moments, 10**6)
    turned = fit_down(down, moments, gram, groups)
    back = fit_back(turned.repeat_interleave(groups, dim=0), moments)
    turned, back = balance(turned, back, moments, gram, groups)
    eye = torch.eye(SIZE).double()
    assert torch.equal(turned[0], eye)
    for head in range(groups):
        assert torch.equal(back[head, :, head], eye)
        assert not back[head, :, :head].any()
        assert not back[head, :, head + 1 :].any()


def test_a_search_that_finds_nothing_better_changes_nothing(monkeypatch):
    down, moments, gram, _ = problem([3, 2])
    monkeypatch.setattr(torch.optim.LBFGS, "step", lambda search, closure: closure())
    assert fit_down(down, moments, gram, GROUPS) is down

    def fail(search, closure):
        raise torch.linalg.LinAlgError("dependent")

    monkeypatch.setattr(torch.optim.LBFGS, "step", fail)
    assert fit_down(down, moments, gram, GROUPS) is down


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("ranks", [[3, 3], [4, 1], [6, 2], [0, 3]])
def test_directions_of_all_heads_together_lose_less(ranks, groups):
    down, moments, gram, _ = problem(ranks, groups)
    apart = torch.block_diag(*diagonal_blocks(moments, HEADS * groups))
    each = down.repeat_interleave(groups, dim=0)
    alone = error(down, fit_back(each, apart), moments, gram)
    fitted = error(down, fit_back(each, moments), moments, gram)
    turned = fit_down(down, moments, gram, groups)
    best = error(turned, fit_back(turned.repeat_interleave(groups, dim=0), moments), moments, gram)
    assert best < 0.99 * fitted < 0.95 * alone
    assert torch.equal(turned.any(-1), down.any(-1))
    for head, rank in enumerate(ranks):
        if rank == SIZE:
            assert torch.equal(turned[head], down[head])


def test_no_directions_nearby_are_better():
    """The gradient of the plain formula vanishes where the search ends."""
    down, moments, gram, _ = problem([3, 3])
    for _ in range(10):  # the search stops after few steps
        down = fit_down(down, moments, gram, GROUPS)
    best = error(down, fit_back(down.repeat_interleave(GROUPS, dim=0), moments), moments, gram)
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        noise = 1e-2 * down.norm() * torch.randn(down.shape, generator=generator).double()
        near = down + noise * down.any(-1, keepdim=True)
        worse = error(near, fit_back(near.repeat_interleave(GROUPS, dim=0), moments), moments, gram)
        assert worse > best * (1 - 1e-6)


def test_a_single_head_cannot_do_better_than_its_singular_directions():
    """Eckart and Young: with one head there is nothing to share."""
    features, output = samples(1)
    features, output = features[:, :SIZE], output[:, :SIZE]
    moments, gram = features.mT @ features, output.mT @ output
    down = pair_bases(moments.unsqueeze(0), gram.unsqueeze(0)).c
    down[:, 3:] = 0
    s = torch.linalg.svdvals(output @ torch.linalg.cholesky(moments))
    optimum = float(s[3:].square().sum())
    turned = fit_down(down, moments, gram, 1)
    assert error(down, fit_back(down, moments), moments, gram) == pytest.approx(optimum)
    assert error(turned, fit_back(turned, moments), moments, gram) == pytest.approx(optimum)


@pytest.mark.parametrize("ranks", [[3, 3], [6, 2]])
def test_balance_leaves_the_product_and_orders_the_directions(ranks):
    down, moments, gram, _ = problem(ranks)
    down = fit_down(down, moments, gram, GROUPS)
    back = fit_back(down.repeat_interleave(GROUPS, dim=0), moments)
    other_down, other_back = balance(down, back, moments, gram, GROUPS)
    before, after = (
        torch.einsum("gdhr,hre->gdhe", b, d.repeat_interleave(GROUPS, dim=0))
        for d, b in ((down, back), (other_down, other_back))
    )
    torch.testing.assert_close(after, before)
    for head, rank in enumerate(ranks):
        if rank == SIZE:
            assert torch.equal(other_down[head], torch.eye(SIZE).double())
            continue
        heads = range(head * GROUPS, (head + 1) * GROUPS)
        blocks = moments.view(COUNT, SIZE, COUNT, SIZE)
        read = sum(other_down[head] @ blocks[h, :, h] @ other_down[head].mT for h in heads) / GROUPS
        columns = [other_back.flatten(0, 1)[:, h] for h in heads]
        written = sum(c.mT @ gram @ c for c in columns)
        torch.testing.assert_close(read, torch.diag(read.diagonal()))
        torch.testing.assert_close(written, read)  # S^1/2 on both sides
        assert bool((read.diagonal().diff() <= 1e-9).all())
        assert bool((other_down[head, rank:] == 0).all())


def test_features_that_carry_nothing_are_no_obstacle():
    """As in a head that an earlier pruning padded."""
    down, moments, gram, _ = problem([3, 3])
    dead = torch.ones(N).double()
    dead[SIZE - 2 : SIZE] = dead[2 * SIZE - 2 : 2 * SIZE] = 0
    moments, gram = (dead.diag() @ each @ dead.diag() for each in (moments, gram))
    down[0] = 0
    down[0, range(5), range(5)] = 1  # the fifth is dead
    moments = joint_moments(own_of(moments), moments, 10**6)
    turned = fit_down(down, moments, gram, GROUPS)
    back = fit_back(turned.repeat_interleave(GROUPS, dim=0), moments)
    assert bool(back.isfinite().all())
    assert bool(turned.isfinite().all())
    assert error(turned, back, moments, gram) < float(torch.trace(moments @ gram))


@pytest.mark.parametrize("dead", ["all", "one head", "the weights", "the data"])
def test_dead_heads_keep_nothing_and_disturb_nobody(dead):
    down, moments, gram, _ = problem([3, 3])
    if dead in ("all", "one head"):
        down[: 1 if dead == "one head" else 2] = 0
    moments, gram = moments * (dead != "the data"), gram * (dead != "the weights")
    moments = joint_moments(own_of(moments), moments, 10**6)
    turned = fit_down(down, moments, gram, GROUPS)
    back = fit_back(turned.repeat_interleave(GROUPS, dim=0), moments)
    turned, back = balance(turned, back, moments, gram, GROUPS)
    assert bool(turned.isfinite().all())
    assert bool(back.isfinite().all())
    if dead == "one head":
        assert not turned[0].any()
        assert error(turned, back, moments, gram) < float(torch.trace(moments @ gram))


def own_of(moments: Tensor) -> Tensor:
    return diagonal_blocks(moments, COUNT)


APART = torch.block_diag(*torch.ones(COUNT, SIZE, SIZE)).bool()


@pytest.mark.parametrize("tokens", [1, 6, 24, 1000])
def test_joint_moments_are_positive_if_moments_of_heads_are_drawn_to_the_weights(tokens):
    """Then heads have less of their own than they seem to have in common, so that this must be less too."""
    generator = torch.Generator().manual_seed(4)
    features = torch.randn(tokens, 3, generator=generator) @ torch.randn(3, N, generator=generator)
    moments = (features.mT @ features).double() / tokens
    weights = torch.eye(SIZE).double().expand(COUNT, -1, -1)
    found = joint_moments(shrink(own_of(moments), weights, tokens), moments, tokens)
    assert float(torch.linalg.eigvalsh(found)[0]) > 0
    assert float((found[~APART] / moments[~APART]).mean()) <= tokens / (SIZE + tokens) + 1e-12


@pytest.mark.parametrize("tokens", [0, 24, 10**9])
def test_joint_moments_of_heads_with_much_in_common_keep_it(tokens):
    _, moments, _, _ = problem([3, 3])
    found = joint_moments(own_of(moments), moments, tokens)
    share = (found[~APART] / moments[~APART]).mean()
    torch.testing.assert_close(found[~APART], share * moments[~APART])
    torch.testing.assert_close(found[APART], torch.block_diag(*own_of(moments))[APART])
    assert float(torch.linalg.eigvalsh(found)[0]) > 0
    assert float(share) == pytest.approx(tokens / (SIZE + tokens), abs=0.3) if tokens else share == 0


@pytest.mark.parametrize("tokens", [48, 480, 4800])
def test_joint_moments_of_heads_with_nothing_in_common_are_those_of_heads_apart(tokens):
    """What so many tokens seem to have in common is noise, however many tokens there are."""
    generator = torch.Generator().manual_seed(2)
    mixed = torch.block_diag(*torch.randn(COUNT, SIZE, SIZE, generator=generator)).double()
    features = torch.randn(tokens, N, generator=generator).double() @ mixed
    moments = features.mT @ features / tokens
    found = joint_moments(own_of(moments), moments, tokens)
    assert float(found[~APART].norm()) < 0.35 * float(moments[~APART].norm())


def test_two_halves_tell_what_repeated_tokens_hide():
    """Forty tokens, each a hundred times: as many tokens as wanted, and nothing that another token would show."""
    generator = torch.Generator().manual_seed(5)
    common = torch.randn(3, N, generator=generator)
    for shared in (0.0, 3.0):
        tokens = torch.randn(40, N, generator=generator) + shared * torch.randn(40, 3, generator=generator) @ common
        parts = [each.double().mT @ each.double() / 20 for each in tokens.split(20)]
        joint = (parts[0] + parts[1]) / 2
        own = own_of(joint)
        alone, split = (joint_moments(own, joint, 4000, half) for half in (None, (parts[0], 2000)))
        shares = [float((found[~APART] / joint[~APART]).mean()) for found in (alone, split)]
        assert shares[0] > 0.9  # as if they were independent
        assert shares[1] < 0.2 if shared == 0 else shares[1] > 0.6


def test_halves_of_independent_tokens_agree_with_the_formula():
    features, _ = samples(GROUPS, 4000)
    features = features + 3 * torch.randn(features.shape, generator=torch.Generator().manual_seed(6)).double()
    joint, half = features.mT @ features / 4000, features[:2000].mT @ features[:2000] / 2000
    alone, split = (joint_moments(own_of(joint), joint, 4000, each) for each in (None, (half, 2000)))
    torch.testing.assert_close(split, alone, rtol=0.02, atol=0)


def test_directions_that_carry_only_rounding_are_not_sought():
    """Values of low rank: float32 sums leave indefinite moments in directions that no feature has."""
    generator = torch.Generator().manual_seed(3)
    worst = 0.0
    for _ in range(10):
        low = torch.randn(HEADS, SIZE, 3, generator=generator) @ torch.randn(HEADS, 3, 40, generator=generator)
        features = torch.randn(600, 40, generator=generator) @ low.flatten(0, 1).mT
        gathered = Moments.empty(torch.Size((1, HEADS * SIZE)), torch.device("cpu"))
        gathered.add(features.unsqueeze(1))
        output = torch.randn(OUT, HEADS * SIZE, generator=generator).double()
        gram, exact = output.mT @ output, features.double().mT @ features.double() / len(features)
        read = diagonal_blocks(gathered.second[0], HEADS)
        moments = joint_moments(read, gathered.second[0], 600)
        down = pair_bases(read, diagonal_blocks(gram, HEADS)).c
        down[:, 2:] = 0
        before = error(down, fit_back(down, moments), exact, gram)
        turned = fit_down(down, moments, gram, 1)
        worst = max(worst, error(turned, fit_back(turned, moments), exact, gram) / before)
    assert worst < 1
