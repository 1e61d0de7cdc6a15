"""`prune`: make the attention heads of a model narrower."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..base_model.attention import AttentionBlock
from ..base_model.plain import check_plain, check_unquantised
from ..base_model.resolve import attention_blocks
from ..io.user_warning import warn
from ..runtime.interrupts import uninterrupted
from .calibration import Calibration, measure
from .directions import Directions, Factors, Found, Method, compute_factors, decompose_pairs, write_masks
from .narrow.loading import current_record, read_record, write_record
from .narrow.modules import become_stock, check_projections, check_supported, is_narrower, padded_width
from .narrow.rewriting import Change, rewrite
from .pairs import Kind, Pair, find_pairs, select_pairs
from .report import PrunedPair, PruningReport, share_removed
from .rule import RankRule, Rule, check_pairs, choose_ranks, choose_rule, default_spread


@torch.inference_mode(False)
@torch.no_grad()
def prune(
    model: nn.Module,
    ratio: float | Mapping[Kind, float] | None = None,
    *,
    method: Method = "clover",
    calibration: Iterable[Mapping[str, Any]] | Calibration | None = None,
    ranks: Rule | Mapping[str, Sequence[int]] | None = None,
    threshold: float | Mapping[Kind, float] | None = None,
    energy: float | Mapping[Kind, float] | None = None,
    multiple: int = 1,
    masked: bool = False,
    target_modules: str | Sequence[str] | None = None,
) -> PruningReport:
    """Make the heads of a model physically narrower, in place, along their singular directions (arXiv 2411.17426).

    Two projections that meet in a head have the product `V S U^T`. Pruning keeps its leading directions:
    `k' = S^1/2 U^T`, `q' = V S^1/2`. The softmax scale stays 1/sqrt(original head_dim). `save_pretrained` saves the
    pruned model, and `from_pretrained` loads it after `import clover_peft`.

    Everything is computed before any weight changes. Then layers are rewritten one by one, and an interrupt is raised
    when all of them are rewritten. Costs D d^2 for a head and one pass over the calibration data; "gradient" adds one.
    With data, V-O also costs D n^2 + 4 n^3, and about 100 R^3 for some 25 evaluations of a search, for each layer
    with n inputs of the output projection and R directions kept in all its heads.

    Args:
        model: a model of a known family, without adapters and not quantised.
        ratio: share of directions to remove, for each kind of pair, or one number for all kinds of the model. The
            default is 0.5 if no other rule is given; 0 removes none.
        method: "clover", or the baseline "vanilla", which removes coordinates by their norms on both sides.
        calibration: batches, each of the model's keyword arguments, or the result of `calibrate`. Moments of
            activations then replace the Grams of the weights that compute them, which is far better. The output
            projection is fitted to what is left of all heads together, and so are the directions of values, except
            with "vanilla" (ours). Pass about ten tokens for each dimension of a head, or more. `own_text` makes
            batches where there are no data.
        ranks: how `ratio` is distributed; by default "layer" for causal language models, which "global" may ruin, and
            "global" for other models. "global": one threshold for all heads; narrower heads are padded to the
            widest of their layer. "layer": one rank for all heads of a layer, by singular values relative to the
            layer's, without padding. "gradient": the same by singular values weighted by the sensitivity of the
            model's predictions, which needs `calibration` and a backward pass; Q-K is not weighted and ranked as by
            "layer". "uniform": one rank for all heads. Or a mapping from the name of a pair (as in the report) to one
            rank for each key-value head; other pairs stay as they are.
        threshold: instead of `ratio`, the smallest singular value to keep (the paper's rule for Whisper).
        energy: instead of `ratio`, the share of each head's sum of squared singular values to keep.
        multiple: round every rank to the nearest multiple of this number; kernels prefer 8.
        masked: zero directions and keep all shapes, for analysis in memory: an output projection may get a bias that
            the model's own class lacks.
        target_modules: selects pairs by the path of their key or value projection: a regular expression for the whole
            path, or a list of ends of paths; None selects all.

    Returns:
        `PruningReport`.

    Raises:
        ValueError, TypeError: if the model, the data or an argument does not fit. The model is then unchanged.
    """
    started = time.perf_counter()
    check_plain(model)
    _check_whole(model, masked)
    if method not in ("clover", "vanilla"):  # Check it before any data are read.
        raise ValueError(f"method: expected 'clover' or 'vanilla', found {method!r}")
    if not isinstance(cast(Any, multiple), Integral) or multiple < 1:
        raise ValueError(f"multiple: expected a positive whole number, found {multiple!r}")
    multiple, masked = int(multiple), bool(masked)  # A config cannot hold NumPy's numbers.
    if ranks == "gradient" and calibration is None:
        raise ValueError("ranks='gradient': expected data to run the model on, found none; pass calibration")
    if ranks is None:
        ranks = default_spread(model) if threshold is None and energy is None else "global"
    rule = choose_rule(ratio, ranks, threshold, energy)
    pairs, skipped = _choose_pairs(model, rule, target_modules)
    check_pairs(rule, pairs, multiple)
    _check_untied(model, pairs)
    for pair in pairs:
        check_projections(pair.attention)
        if not masked:
            check_supported(pair.attention)
    data = measure(model, pairs, calibration, gradients=rule.name == "gradient")
    found = decompose_pairs(pairs, method, data.moments)
    kept = choose_ranks(found, rule, multiple, data.sensitivities if rule.name == "gradient" else {})
    del data  # Of moments that belong to nobody else, `found` alone is left.
    if (
        calibration is None
        and method == "clover"
        and any(bool((k < found[n][1].values.shape[1]).any()) for n, k in kept.items())
    ):
        warn(
            "directions are chosen by weights alone, which often ruins a model; pass calibration=<batches of data>, "
            "or clover_peft.own_text(model, rows=60) for a causal language model"
        )
    factors = compute_factors(found, kept, release=True)
    attentions = attention_blocks(model)
    before = _sizes(model, attentions)
    if masked:
        new_widths = {name: directions.values.shape[1] for name, (_, directions) in found.items()}
    else:
        new_widths = {pair.name: padded_width(pair.attention, pair.kind, int(kept[pair.name].max())) for pair in pairs}
        if rule.name == "uniform":
            new_widths = _one_width(pairs, new_widths, multiple)
        _check_evident(attentions, found, factors, new_widths)
    pruned = {name: _summary(*found[name], kept[name], width) for name, width in new_widths.items()}
    for kind, share in rule.ratios(sorted({pair.kind for pair in pairs})).items() if multiple > 1 else ():
        if abs((removed := share_removed(pruned, kind)) - share) > 0.05:
            warn(
                f"{kind}: {removed:.0%} of the directions are removed instead of {share:.0%}, because ranks are "
                f"rounded to multiples of {multiple}"
            )
    if masked:
        with uninterrupted():
            write_masks(model, found, factors)
    else:
        step = {"method": method, **rule.to_dict(), "multiple": multiple, "calibrated": calibration is not None}
        _rewrite_all(model, attentions, found, factors, new_widths, step)
    after = _sizes(model, attentions)
    return PruningReport(
        method=method,
        rule=rule.to_dict() | ({"multiple": multiple} if multiple > 1 else {}),
        calibrated=calibration is not None,
        masked=masked,
        pairs=pruned,
        skipped=skipped,
        parameters=(before[0], after[0]),
        cache_bytes=(before[1], after[1]),
        seconds=time.perf_counter() - started,
    )


@torch.inference_mode(False)
@torch.no_grad()
def mask(model: nn.Module, found: Found, ranks: Mapping[str, Tensor]) -> None:
    """Zero all but the leading directions in place and keep every shape, for analysis.

    `P = E C` is multiplied into the output projection, or into the query projection. An output projection gets a bias
    if the removed directions leave a constant. All maps are computed before any weight changes.

    Args:
        model: the model that was decomposed, or a copy of it.
        found: from `decompose`.
        ranks: name of a pair -> (H,), the number of directions that every head keeps.

    Raises:
        ValueError: if a pair has no ranks, a rank exceeds the number of directions or names no pair, or the model's
            weights are adapted, quantised or tied. The model is then unchanged.
    """
    check_plain(model)
    check_unquantised(model, "model")
    _check_untied(model, [pair for pair, _ in found.values()])
    if unknown := sorted(set(ranks) - set(found)):
        raise ValueError(f"ranks: expected names of pairs that were decomposed, found {unknown[0]!r}")
    write_masks(model, found, compute_factors(found, ranks))


# ---------------------------------------------------------------------- which pairs


def _choose_pairs(
    model: nn.Module, rule: RankRule, target_modules: str | Sequence[str] | None
) -> tuple[list[Pair], dict[Kind, str]]:
    """The pairs to prune, and the kinds that the model does not have, with the reason."""
    everything = find_pairs(model)
    if unknown := set(rule.given) - {pair.name for pair in everything}:
        known = ", ".join(repr(pair.name) for pair in everything[:2])
        raise ValueError(f"ranks: expected names of pairs such as {known}, found {sorted(unknown)[0]!r}")
    kinds, skipped = _choose_kinds(model, {pair.kind for pair in everything}, rule.kinds)
    if rule.kinds is None:  # One number for all kinds means all kinds that `target_modules` names.
        named = {pair.kind for pair in everything if pair.is_named(target_modules)}
        kinds = [kind for kind in kinds if kind in named] or kinds
    pairs = select_pairs(model, everything, kinds, target_modules)
    if rule.given:
        pairs = [pair for pair in pairs if pair.name in rule.given]
        if not pairs:
            raise ValueError(
                f"ranks: expected names of pairs that target_modules={target_modules!r} names, found none"
            )
    return pairs, skipped


def _choose_kinds(
    model: nn.Module, present: set[Kind], wanted: list[Kind] | None
) -> tuple[list[Kind], dict[Kind, str]]:
    """The kinds of pairs to prune, and the wanted kinds that the model does not have, with the reason."""
    reasons: dict[Kind, str] = {
        "qk": "queries and keys are rotated by their position, or normed",
        "vo": "another operation stands between value and output",
    }
    kinds: list[Kind] = [kind for kind in reasons if kind in (wanted or reasons) and kind in present]
    skipped = {kind: reason for kind, reason in reasons.items() if kind in (wanted or reasons) and kind not in present}
    if not kinds:
        absent = "; ".join(f"{kind}: {reason}" for kind, reason in skipped.items())
        raise ValueError(f"{type(model).__name__}: expected pairs of projections to prune, found none ({absent})")
    for kind, reason in skipped.items():
        warn(f"{kind}: not pruned, because {reason}; only {', '.join(kinds)} is pruned")
    return kinds, skipped


# ---------------------------------------------------------------------- checks of the model


def _check_whole(model: nn.Module, masked: bool) -> None:
    whole = isinstance(model, PreTrainedModel) or hasattr(model, "register_to_config")
    if not masked and not whole:
        raise ValueError(
            f"{type(model).__name__}: expected a model of transformers or diffusers, whose config can record the "
            "narrow heads, found another module; prune the whole model, or pass masked=True"
        )
    read_record(model)  # This raises if the record of an earlier pruning is damaged.


def _check_untied(model: nn.Module, pairs: Iterable[Pair]) -> None:
    names = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[parameter.data_ptr()].append(name)
    for path in (path for pair in pairs for path in (pair.path, pair.partner.path)):
        for parameter in model.get_submodule(path).parameters(recurse=False):
            if others := [name for name in names[parameter.data_ptr()] if not name.startswith(f"{path}.")]:
                raise ValueError(
                    f"{path}: expected weights of its own, found them tied to {others[0]}; give every layer its own "
                    "copy, or leave it out with target_modules"
                )


def _sizes(model: nn.Module, attentions: Mapping[str, AttentionBlock]) -> tuple[int, int]:
    """The parameters of a model, and the bytes that its decoder's key-value cache needs for a token."""
    parameters, total = sum(parameter.numel() for parameter in model.parameters()), 0
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder: Any = model.get_encoder() if both and hasattr(model, "get_encoder") else None  # type: ignore[operator]
    uncached = set() if encoder is None else {id(module) for module in encoder.modules()}
    for attention in attentions.values():
        module = attention.modules[0]
        # A decoder's cross-attention is not causal, but caches the keys and values of the encoder's output.
        if id(module) not in uncached and (both or attention.is_causal):
            total += attention.cached_features(attention.path) * next(module.parameters()).element_size()
    return parameters, total


def _check_evident(
    attentions: Mapping[str, AttentionBlock], found: Found, factors: Factors, new_widths: Mapping[str, int]
) -> None:
    """Refuse new biases where no width changes: without clover_peft, the model's own class would load without them."""
    narrower = any(width != found[name][0].heads.dim for name, width in new_widths.items())
    if narrower or any(is_narrower(attention) for attention in attentions.values()):
        return
    for name, (pair, directions) in found.items():
        constant = directions.constant(*factors[name])
        if constant is not None and bool(constant.any()) and pair.partner_projection.bias is None:
            raise ValueError(
                f"{pair.partner.path}: expected ranks that make the heads of some layer narrower, found that every "
                "layer has a head that keeps all directions: the only change of shape would be a bias here, for what "
                "the other heads lose, and without clover_peft the saved model would load without it; remove more, or "
                "pass masked=True for a model in memory"
            )


# ---------------------------------------------------------------------- the weights


def _rewrite_all(
    model: nn.Module,
    attentions: Mapping[str, AttentionBlock],
    found: Found,
    factors: Factors,
    new_widths: Mapping[str, int],
    step: Mapping[str, Any],
) -> None:
    """Put narrower projections into all attention blocks that have pairs, and record it in the model's config.

    Args:
        model: the model.
        attentions: all its attention blocks, by path.
        found: the pairs and their directions.
        factors: their C and E.
        new_widths: name of a pair -> width of its heads.
        step: what the record states about this pruning.
    """
    changes: dict[str, list[Change]] = defaultdict(list)  # path of an attention block -> changes to its pairs
    for name, (pair, directions) in found.items():
        changes[pair.attention.path].append(Change(pair, directions, *factors[name], new_widths[name]))
    done = 0
    with uninterrupted():
        try:
            for each in tqdm(changes.values(), desc="CLOVER pruning", unit=" layers", delay=3, leave=False):
                rewrite(each)
                done += 1
        finally:  # After an error the layers that are narrow by then can still be saved and loaded.
            if done:
                become_stock(model, attentions)
                record = current_record(model)
                write_record(model, {**record, "steps": [*record["steps"], dict(step)]})


def _one_width(pairs: Sequence[Pair], widths: Mapping[str, int], multiple: int) -> dict[str, int]:
    """The widest of all pairs with heads of one size, as a multiple: where a layer has fewer directions than the rank,
    its heads are padded, so that one rank stays one width that kernels like."""
    widest: dict[tuple[Kind, int], int] = {}
    for pair in pairs:
        key, width = (pair.kind, pair.heads.dim), -(-widths[pair.name] // multiple) * multiple
        widest[key] = max(widest.get(key, 0), min(width, pair.heads.dim))
    return {pair.name: widest[pair.kind, pair.heads.dim] for pair in pairs}


def _summary(pair: Pair, directions: Directions, kept: Tensor, width: int) -> PrunedPair:
    before = (directions.values > 0).sum(1).cpu()
    return PrunedPair(
        pair.kind,
        pair.heads.dim,
        before.tolist(),
        torch.minimum(kept.cpu(), before).tolist(),  # a rank that was given or rounded may count padding
        width,
        [round(e, 6) for e in directions.energy(kept).tolist()],
    )
