"""CLOVER against the paper done literally: bases written into the weights, one small matrix trained between them.

The literal model (Section 3, arXiv 2411.17426) shares no code with `clover_peft`: it forms the dense D x D product of
every head, takes its SVD (or the QR of a single projection) in float64, overwrites the weights with the orthonormal
factors, and trains S. Both models must follow the same losses, and end at the same weights. Singular vectors are
defined up to sign; AdamW without weight decay does not see a sign, so nothing has to be aligned as long as no two
singular values are equal.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, linear
from transformers.pytorch_utils import Conv1D

import clover_peft.linalg.decomposition
import clover_peft.tuner.bases
from clover_peft import CloverConfig
from tests.support.tiny import TOLERANCE, VOCAB, build, relative

STEPS = 50
# Largest difference of a loss in 50 steps; largest relative difference of the weights' update at the end.
LOSS_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
UPDATE_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
# What a wrong implementation must differ by, ten times the tolerance.
MISS = 1e-3


pytestmark = pytest.mark.usefixtures("one_thread")


# ---------------------------------------------------------------------- which features are heads, written out by hand


@dataclass(frozen=True)
class Pair:
    """Two projections that meet inside heads.

    Attributes:
        inner: path of the value or key projection.
        rows: (H, d) its output features.
        outer: path of the output or query projection.
        columns: (H, G, d) features of the outer projection, for the G query heads that share head h.
        reads: the outer projection reads the head (its features are inputs), else it writes queries.
    """

    inner: str
    rows: Tensor
    outer: str
    columns: Tensor
    reads: bool


@dataclass(frozen=True)
class Single:
    """A projection decomposed alone: `rows` (H, d) are its output features."""

    inner: str
    rows: Tensor


def _heads(start: int, count: int, stride: int, dim: int) -> Tensor:
    return start + stride * torch.arange(count).unsqueeze(1) + torch.arange(dim)


def _llama(query_heads: int, heads: int, d: int, intermediate: int) -> list[Pair | Single]:
    groups = _heads(0, query_heads, d, d).view(heads, query_heads // heads, d)
    return [
        Pair("self_attn.v_proj", _heads(0, heads, d, d), "self_attn.o_proj", groups, reads=True),
        Single("self_attn.k_proj", _heads(0, heads, d, d)),
        Single("mlp.up_proj", _heads(0, intermediate // 64, 64, 64)),
    ]


def _opt(heads: int, d: int, intermediate: int) -> list[Pair | Single]:
    rows = _heads(0, heads, d, d)
    return [
        Pair("self_attn.v_proj", rows, "self_attn.out_proj", rows.unsqueeze(1), reads=True),
        Pair("self_attn.k_proj", rows, "self_attn.q_proj", rows.unsqueeze(1), reads=False),
        Single("fc1", _heads(0, intermediate // 64, 64, 64)),
    ]


def _gpt2(heads: int, d: int, intermediate: int) -> list[Pair | Single]:
    q, k, v = (_heads(part * heads * d, heads, d, d) for part in range(3))
    return [
        Pair("attn.c_attn", v, "attn.c_proj", q.unsqueeze(1), reads=True),
        Pair("attn.c_attn", k, "attn.c_attn", q.unsqueeze(1), reads=False),
        Single("mlp.c_fc", _heads(0, intermediate // 64, 64, 64)),
    ]


def _gpt_neox(heads: int, d: int, rotary: int, intermediate: int) -> list[Pair | Single]:
    fused, rest = "attention.query_key_value", d - rotary
    q, k = _heads(rotary, heads, 3 * d, rest), _heads(d + rotary, heads, 3 * d, rest)
    v, out = _heads(2 * d, heads, 3 * d, d), _heads(0, heads, d, d)
    return [
        Pair(fused, v, "attention.dense", out.unsqueeze(1), reads=True),
        Pair(fused, k, fused, q.unsqueeze(1), reads=False),
        Single(fused, _heads(d, heads, 3 * d, rotary)),
        Single("mlp.dense_h_to_4h", _heads(0, intermediate // 64, 64, 64)),
    ]


@dataclass(frozen=True)
class Case:
    """A family, its sizes, where its layers are and what is decomposed in each."""

    family: str
    layers: str
    plan: list[Pair | Single]
    sizes: dict


_SIZES = dict(hidden_size=96, intermediate_size=192, num_attention_heads=6, head_dim=16)
_BIASES = dict(attention_bias=True, mlp_bias=True)

CASES = {
    "llama-mha": Case("llama", "model.layers", _llama(6, 6, 16, 192), dict(**_SIZES, num_key_value_heads=6)),
    "llama-gqa": Case("llama", "model.layers", _llama(6, 2, 16, 192), dict(**_SIZES, num_key_value_heads=2)),
    "llama-mqa": Case("llama", "model.layers", _llama(6, 1, 16, 192), dict(**_SIZES, num_key_value_heads=1)),
    "llama-gqa-biases": Case(
        "llama", "model.layers", _llama(6, 2, 16, 192), dict(**_SIZES, **_BIASES, num_key_value_heads=2)
    ),
    # Without rotary embeddings, with biases: key with query, U of D + 1 rows.
    "opt": Case(
        "opt",
        "model.decoder.layers",
        _opt(6, 16, 192),
        dict(hidden_size=96, word_embed_proj_dim=96, ffn_dim=192, num_attention_heads=6),
    ),
    # Fused Conv1D.
    "gpt2": Case("gpt2", "transformer.h", _gpt2(6, 16, 192), dict(n_embd=96, n_head=6, n_inner=192)),
    # Interleaved, the first quarter of a head rotated: the rest of the key is paired, the quarter is not.
    "gpt_neox": Case(
        "gpt_neox",
        "gpt_neox.layers",
        _gpt_neox(6, 16, 4, 192),
        dict(hidden_size=96, intermediate_size=192, num_attention_heads=6),
    ),
}


# ---------------------------------------------------------------------- the literal model


class Literal(nn.Module):
    """A projection whose rows were overwritten, and the trained matrices that follow them.

    Holds the weight as (out, in) float64 until `done`. `y_h = S_h z_h` on the rows of every decomposed head; all other
    rows are the base's own.
    """

    def __init__(self, base: nn.Linear | Conv1D) -> None:
        super().__init__()
        weight = base.weight.mT if isinstance(base, Conv1D) else base.weight
        self.dtype = weight.dtype
        self.weight = weight.detach().double().clone()
        self.bias = None if base.bias is None else base.bias.detach().double().clone()
        self.rows: list[Tensor] = []
        self.S = nn.ParameterList()

    def whole(self) -> Tensor:
        """[W b], (out, D) or (out, D + 1)."""
        return self.weight if self.bias is None else torch.cat([self.weight, self.bias.unsqueeze(1)], 1)

    def write_rows(self, rows: Tensor, values: Tensor) -> None:
        """Overwrite `[W b][rows]`; the last column of `values` is the bias, if there is one."""
        self.weight[rows] = values[:, : self.weight.shape[1]]
        if self.bias is not None:
            self.bias[rows] = values[:, -1]

    def insert(self, rows: Tensor, s: Tensor) -> None:
        """Train `s`, (H, d, d) or its diagonal (H, d), behind the rows (H, d)."""
        self.rows.append(rows)
        self.S.append(nn.Parameter(s.to(self.dtype)))

    def done(self) -> None:
        self.weight = self.weight.to(self.dtype)
        self.bias = None if self.bias is None else self.bias.to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(linear(x, self.weight, self.bias))

    def multiply(self, z: Tensor) -> Tensor:
        y = z.clone()
        for rows, s in zip(self.rows, self.S, strict=True):
            y[..., rows] = z[..., rows] * s if s.ndim == 2 else torch.einsum("hij,...hj->...hi", s, z[..., rows])
        return y

    def effective(self) -> Tensor:
        """[W b] with S multiplied in, float64."""
        with torch.no_grad():
            return self.multiply(self.whole().mT).mT.double()


def literal_model(model: nn.Module, case: Case, diagonal: bool = False) -> nn.Module:
    """A copy of `model` rewritten as the paper does."""
    model = copy.deepcopy(model).requires_grad_(False)
    for layer in model.get_submodule(case.layers):
        for path in dict.fromkeys(p for item in case.plan for p in _paths(item)):
            parent, _, name = path.rpartition(".")
            setattr(layer.get_submodule(parent), name, Literal(layer.get_submodule(path)))
        for item in case.plan:
            if isinstance(item, Pair):
                _rewrite_pair(layer, item, diagonal)
            else:
                _rewrite_single(layer, item, diagonal)
        for module in layer.modules():
            if isinstance(module, Literal):
                module.done()
    return model


def _paths(item: Pair | Single) -> list[str]:
    return [item.inner, item.outer] if isinstance(item, Pair) else [item.inner]


def _rewrite_pair(layer: nn.Module, pair: Pair, diagonal: bool) -> None:
    inner, outer = layer.get_submodule(pair.inner), layer.get_submodule(pair.outer)
    matrices = []
    for rows, columns in zip(pair.rows, pair.columns, strict=True):
        sides = [outer.weight[:, c] if pair.reads else outer.whole()[c].mT for c in columns]
        product = torch.cat([side @ inner.whole()[rows] for side in sides])  # (G * D, D): dense, on purpose
        v, s, ut = torch.linalg.svd(product, full_matrices=False)
        d = len(rows)
        assert (s[: d - 1] - s[1:d]).min() > 1e-6 * s[0], "the test needs distinct singular values"
        inner.write_rows(rows, ut[:d])
        for c, part in zip(columns, v[:, :d].chunk(len(columns)), strict=True):
            if pair.reads:
                outer.weight[:, c] = part
            else:
                outer.write_rows(c, part.mT)
        matrices.append(s[:d])
    s0 = torch.stack(matrices)
    inner.insert(pair.rows, s0 if diagonal else torch.diag_embed(s0))


def _rewrite_single(layer: nn.Module, single: Single, diagonal: bool) -> None:
    inner = layer.get_submodule(single.inner)
    if diagonal:
        raise NotImplementedError("a diagonal has no meaning between Q and R")
    matrices = []
    for rows in single.rows:
        q, r = torch.linalg.qr(inner.whole()[rows].mT)  # W^T = Q R
        sign = torch.diagonal(r).sign()
        inner.write_rows(rows, (q * sign).mT)
        matrices.append((sign.unsqueeze(1) * r).mT)
    inner.insert(single.rows, torch.stack(matrices))


# ---------------------------------------------------------------------- what is compared


def products(model: nn.Module, case: Case) -> list[Tensor]:
    """What the model computes with, of every layer and head: products of pairs and weights of singles, in float64.

    Biases are part of them.
    """

    def whole(layer: nn.Module, path: str) -> Tensor:
        module = layer.get_submodule(path)
        if isinstance(module, Literal):
            return module.effective()
        weight = module.weight.mT if isinstance(module, Conv1D) else module.weight
        weight = weight if module.bias is None else torch.cat([weight, module.bias.unsqueeze(1)], 1)
        return weight.detach().double()

    result = []
    for layer in model.get_submodule(case.layers):
        for item in case.plan:
            inner = whole(layer, item.inner)
            if isinstance(item, Single):
                result.append(inner[item.rows])
                continue
            outer = whole(layer, item.outer)
            sides = outer[:, item.columns].permute(1, 2, 0, 3) if item.reads else outer[item.columns].mT
            result.append(sides @ inner[item.rows].unsqueeze(1))  # (H, G, D, D)
    return result


def train(model: nn.Module, learning_rate: float) -> list[float]:
    """Losses of 50 AdamW steps on random tokens, without weight decay."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, VOCAB, (2, 2, 10), generator=generator)  # two batches, in turn: something to learn
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=0.0)
    losses = []
    for step in range(STEPS):
        ids = tokens[step % 2]
        loss = cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_clover(case: Case, dtype: torch.dtype, config: CloverConfig) -> tuple[list[float], list[Tensor]]:
    """Losses of CLOVER and the products of its merged model."""
    model = get_peft_model(build(case.family, dtype, **case.sizes), config)
    losses = train(model, 3e-2 if config.s_matrix == "diagonal" else 3e-3)
    return losses, products(model.merge_and_unload(), case)


@cache
def train_literal(name: str, dtype: torch.dtype, diagonal: bool = False) -> tuple[list[float], list[Tensor]]:
    """Losses of the literal model and its products."""
    case = _case(name, diagonal)
    model = literal_model(build(case.family, dtype, **case.sizes), case, diagonal)
    return train(model, 3e-2 if diagonal else 3e-3), products(model, case)


def _case(name: str, diagonal: bool = False) -> Case:
    case = CASES[name]
    return replace(case, plan=[item for item in case.plan if isinstance(item, Pair)]) if diagonal else case


def largest_difference(a: list[float], b: list[float]) -> float:
    """Of two loss curves."""
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


def _assert_same(name: str, dtype: torch.dtype, config: CloverConfig, diagonal: bool = False) -> None:
    case = _case(name, diagonal)
    literal_losses, literal_end = train_literal(name, dtype, diagonal)
    losses, end = train_clover(case, dtype, config)
    start = products(build(case.family, dtype, **case.sizes), case)
    assert losses[0] - losses[-2] > 0.1, "on the same batch, nothing was learned: the comparison would mean little"
    assert largest_difference(losses, literal_losses) <= LOSS_TOLERANCE[dtype]
    for here, there, before in zip(end, literal_end, start, strict=True):
        assert relative(there, before) > 0.01
        assert relative(here - before, there - before) <= UPDATE_TOLERANCE[dtype]


# ---------------------------------------------------------------------- tests


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_the_literal_model_starts_as_the_base_model(name, dtype):
    case = CASES[name]
    base = build(case.family, dtype, **case.sizes)
    ids = torch.randint(3, VOCAB, (2, 12), generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        here, there = literal_model(base, case)(input_ids=ids).logits, base(input_ids=ids).logits
    assert relative(here, there) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_clover_follows_the_losses_of_the_literal_model_and_ends_at_its_weights(name, dtype):
    _assert_same(name, dtype, CloverConfig())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", ["llama-gqa-biases", "opt"])
def test_diagonal_clover_follows_the_literal_model_with_trained_singular_values(name, dtype):
    targets = [item.inner.rpartition(".")[2] for item in CASES[name].plan if isinstance(item, Pair)]
    _assert_same(name, dtype, CloverConfig(s_matrix="diagonal", target_modules=targets), diagonal=True)


# ---------------------------------------------------------------------- proof that these tests can fail


def _transpose_coordinates(bases):
    return replace(bases, c=bases.c.mT.contiguous())


def _swap(bases):
    eye = torch.eye(bases.c.shape[-1], dtype=torch.float64)
    back = eye.expand_as(bases.c) if bases.e is None else bases.e
    return replace(bases, c=back.contiguous(), e=bases.c)


def _change_bases(function: str, change: Callable) -> Callable[[pytest.MonkeyPatch], None]:
    original = getattr(clover_peft.tuner.bases, function)
    return lambda patch: patch.setattr(clover_peft.tuner.bases, function, lambda *grams: change(original(*grams)))


def _symmetric_root(patch: pytest.MonkeyPatch) -> None:
    """G^1/2 for the Cholesky factor; any root of G gives the same pair, so this changes singles alone."""
    original = clover_peft.linalg.decomposition._factor

    def factor(g):
        values, vectors = torch.linalg.eigh(g)
        root = vectors * values.sqrt().unsqueeze(-2) @ vectors.mT
        return root, torch.linalg.inv(root), *original(g)[2:]

    patch.setattr(clover_peft.linalg.decomposition, "_factor", factor)


MUTATIONS = {
    "pair: C transposed": _change_bases("pair_bases", _transpose_coordinates),
    "pair: C and E swapped": _change_bases("pair_bases", _swap),
    "single: C transposed": _change_bases("qr_bases", _transpose_coordinates),
    "single: C and E swapped": _change_bases("qr_bases", _swap),
    "single: symmetric root for Cholesky": _symmetric_root,
}


@pytest.mark.parametrize(
    ("name", "mutation"),
    [*(("llama-gqa", mutation) for mutation in MUTATIONS), *(("opt", m) for m in MUTATIONS if m.startswith("pair"))],
)
def test_a_wrong_basis_leaves_the_losses_of_the_literal_model(name, mutation, monkeypatch):
    MUTATIONS[mutation](monkeypatch)
    losses, _ = train_clover(CASES[name], torch.float32, CloverConfig())
    assert largest_difference(losses, train_literal(name, torch.float32)[0]) >= MISS


def test_any_root_of_the_gram_gives_the_same_pair(monkeypatch):
    name = "llama-gqa-biases"
    _symmetric_root(monkeypatch)
    config = CloverConfig(s_matrix="diagonal", target_modules=["v_proj"])
    losses, _ = train_clover(_case(name, diagonal=True), torch.float64, config)
    assert largest_difference(losses, train_literal(name, torch.float64, True)[0]) <= LOSS_TOLERANCE[torch.float64]
