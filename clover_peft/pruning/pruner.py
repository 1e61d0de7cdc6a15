"""`prune`: from a model to the same model with narrower heads."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..base_model.attention import AttentionBlock
from ..base_model.resolve import attention_blocks
from ..io.user_warning import warn
from .calibration import Calibration, measure
from .directions import Directions, Method, cut, decompose_pairs, mask
from .narrow.loading import VERSION, read_record, relative_base, relative_prefix, write_record
from .narrow.modules import become_stock, check_projections, check_supported, padded_width, widths
from .narrow.rewriting import Change, rewrite
from .pairs import Kind, Pair, check_plain, find_pairs, select_pairs
from .report import PrunedPair, PruningReport
from .rule import Rule, check_pairs, choose_ranks, choose_rule


@torch.inference_mode(False)
@torch.no_grad()
def prune(
    model: nn.Module,
    ratio: float | Mapping[Kind, float] | None = None,
    *,
    method: Method = "clover",
    calibration: Iterable[Mapping[str, Any]] | Calibration | None = None,
    ranks: Rule | Mapping[str, Sequence[int]] = "global",
    threshold: float | Mapping[Kind, float] | None = None,
    energy: float | Mapping[Kind, float] | None = None,
    multiple: int = 1,
    masked: bool = False,
    target_modules: str | Sequence[str] | None = None,
) -> PruningReport:
    """Make the heads of a model physically narrower, in place, along their singular directions (arXiv 2411.17426).

    The product of the two projections that meet in a head, `V S U^T`, keeps its leading directions:
    `k' = S^1/2 U^T`, `q' = V S^1/2`. The softmax scale stays 1/sqrt(original head_dim). The model is then one that
    `save_pretrained` saves and, after `import clover_peft`, `from_pretrained` loads.

    Everything is computed before any weight is changed; then layers are rewritten one by one, which an interrupt
    waits for. Costs D d^2 for a head, beside one pass over the calibration data; "gradient" adds one.

    Args:
        model: a model of a known family, without adapters and not quantised.
        ratio: share of directions to remove, for each kind of pair; one number is for all that the model has. 0.5 if
            no other rule is given; 0 removes none.
        method: "clover", or the baseline "vanilla", which drops coordinates by the norms on both sides.
        calibration: batches, keyword arguments of the model, or what `calibrate` made of them. With them moments of
            activations take the place of the weights that compute them, which is far better; some ten tokens for each
            dimension of a head are needed.
        ranks: how `ratio` is spread. "global": one threshold over all heads, which are padded to the widest of their
            layer. "layer": one rank for all heads of a layer, so that none is padded, by values relative to the
            layer's. "gradient": the same by values weighed by what an error there does to the model's predictions
            (needs `calibration`, and a backward pass over it); of Q-K, which is not weighed, as "layer". "uniform". Or
            ranks by name of a pair (as in the report), for every key-value head; other pairs are left alone.
        threshold: instead of `ratio`, the smallest singular value to keep (the paper's rule for Whisper).
        energy: instead of `ratio`, the share of each head's sum of squared singular values to keep.
        multiple: round every rank to the nearest multiple of this; kernels like 8.
        masked: zero directions and keep all shapes, for analysis.
        target_modules: which pairs, by the path of the key or value projection: a regular expression that matches all
            of it, or ends of paths; None for all.

    Returns:
        `PruningReport`.

    Raises:
        ValueError, TypeError: for a model, data or figures that do not fit, with the model as it was.
    """
    started = time.perf_counter()
    check_plain(model)
    _check_whole(model, masked)
    if method not in ("clover", "vanilla"):  # before any data are read
        raise ValueError(f"method: expected 'clover' or 'vanilla', found {method!r}")
    if not isinstance(cast(Any, multiple), Integral) or multiple < 1:
        raise ValueError(f"multiple: expected a positive whole number, found {multiple!r}")
    multiple, masked = int(multiple), bool(masked)  # NumPy's, too
    if ranks == "gradient" and calibration is None:
        raise ValueError("ranks='gradient': expected data to run the model on, found none; pass calibration")
    rule, there = choose_rule(ratio, ranks, threshold, energy), find_pairs(model)
    if unknown := set(rule.given) - {pair.name for pair in there}:
        known = ", ".join(repr(pair.name) for pair in there[:2])
        raise ValueError(f"ranks: expected names of pairs such as {known}, found {sorted(unknown)[0]!r}")
    kinds, skipped = _kinds(model, {pair.kind for pair in there}, rule.kinds)
    if rule.kinds is None:  # a figure for all kinds is one for those that are named
        named = {pair.kind for pair in there if pair.is_named(target_modules)}
        kinds = [kind for kind in kinds if kind in named] or kinds
    pairs = select_pairs(model, there, kinds, target_modules)
    if rule.given:
        pairs = [pair for pair in pairs if pair.name in rule.given]
        if not pairs:
            raise ValueError(
                f"ranks: expected names of pairs that target_modules={target_modules!r} names, found none"
            )
    check_pairs(rule, pairs, multiple)
    _check_untied(model, pairs)
    blocks, every = _blocks(pairs, masked), attention_blocks(model)
    data = measure(model, pairs, calibration, gradients=rule.name == "gradient")
    found = decompose_pairs(pairs, method, data.moments)
    kept = choose_ranks(found, rule, multiple, data.sensitivities if rule.name == "gradient" else {})
    if (
        calibration is None
        and method == "clover"
        and any(bool((k < found[n][1].values.shape[1]).any()) for n, k in kept.items())
    ):
        warn("directions are chosen by weights alone, which models bear badly; pass calibration=<batches of data>")
    before = _sizes(model, every)
    if masked:
        wide = {name: directions.values.shape[1] for name, (_, directions) in found.items()}
        with _uninterrupted():
            mask(model, found, kept)
    else:
        wide = {
            name: padded_width(block, found[name][0].kind, int(kept[name].max()))
            for block, names in blocks.values()
            for name in names
        }
        factors = cut(found, kept)
        step = {"method": method, **rule.to_dict(), "multiple": multiple, "calibrated": calibration is not None}
        with _uninterrupted(), _recorded(model, every, step) as done:
            for block, names in tqdm(blocks.values(), desc="CLOVER pruning", unit=" layers", delay=3, leave=False):
                rewrite(block, [Change(*found[name], *factors[name], wide[name]) for name in names])
                done.append(block)
    after = _sizes(model, every)
    report = PruningReport(
        method=method,
        rule=rule.to_dict() | ({"multiple": multiple} if multiple > 1 else {}),
        calibrated=calibration is not None,
        masked=masked,
        pairs={name: _summary(*found[name], kept[name], width) for name, width in wide.items()},
        skipped=skipped,
        parameters=(before[0], after[0]),
        cache_bytes=(before[1], after[1]),
        seconds=time.perf_counter() - started,
    )
    for kind, share in rule.ratios(kinds).items() if multiple > 1 else ():
        if abs(report.removed(kind) - share) > 0.05:
            warn(
                f"{kind}: {report.removed(kind):.0%} of the directions are removed, not {share:.0%}, by rounding "
                f"ranks to multiples of {multiple}"
            )
    return report


# ---------------------------------------------------------------------- what is asked for


def _kinds(model: nn.Module, present: set[Kind], wanted: list[Kind] | None) -> tuple[list[Kind], dict[Kind, str]]:
    """The kinds of pairs to prune, and of those that the model does not have, why."""
    reasons: dict[Kind, str] = {
        "qk": "queries and keys are rotated by their position, or normed",
        "vo": "something stands between value and output",
    }
    kinds: list[Kind] = [kind for kind in reasons if kind in (wanted or reasons) and kind in present]
    skipped = {kind: reason for kind, reason in reasons.items() if kind in (wanted or reasons) and kind not in present}
    if not kinds:
        said = "; ".join(f"{kind}: {reason}" for kind, reason in skipped.items())
        raise ValueError(f"{type(model).__name__}: expected pairs of projections to prune, found none ({said})")
    for kind, reason in skipped.items():
        warn(f"{kind}: not pruned, {reason}; pruning {', '.join(kinds)} alone")
    return kinds, skipped


# ---------------------------------------------------------------------- what a model must be


def _check_whole(model: nn.Module, masked: bool) -> None:
    whole = isinstance(model, PreTrainedModel) or hasattr(model, "register_to_config")
    if not masked and not whole:
        raise ValueError(
            f"{type(model).__name__}: expected a model of transformers or diffusers, whose config can say what is "
            "narrow, found another module; prune the whole model, or pass masked=True"
        )
    read_record(model)  # raises if it is damaged


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


def _blocks(pairs: Iterable[Pair], masked: bool) -> dict[str, tuple[AttentionBlock, list[str]]]:
    """Path of an attention block -> the block and the names of its pairs."""
    blocks: dict[str, tuple[AttentionBlock, list[str]]] = {}
    for pair in pairs:
        check_projections(pair.attention)
        if not masked:
            check_supported(pair.attention)
        blocks.setdefault(pair.attention.path, (pair.attention, []))[1].append(pair.name)
    return blocks


def _sizes(model: nn.Module, blocks: Mapping[str, AttentionBlock]) -> tuple[int, int]:
    """Parameters, and bytes of the keys and values that are kept of one token: those of decoders."""
    parameters, total = sum(parameter.numel() for parameter in model.parameters()), 0
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder: Any = model.get_encoder() if both and hasattr(model, "get_encoder") else None  # type: ignore[operator]
    uncached = set() if encoder is None else {id(module) for module in encoder.modules()}
    for block in blocks.values():
        # A decoder's cross-attention is not causal and keeps what it makes of the encoder.
        if id(block.modules[0]) not in uncached and (both or getattr(block.modules[0], "is_causal", True)):
            total += block.cached_features(block.path) * next(block.modules[0].parameters()).element_size()
    return parameters, total


# ---------------------------------------------------------------------- the weights


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Within it an interrupt is kept for the end, so that no model is left half rewritten."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[Any] = []
    before = signal.signal(signal.SIGINT, lambda *arguments: waiting.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if waiting:
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _recorded(
    model: nn.Module, every: Mapping[str, AttentionBlock], step: Mapping[str, Any]
) -> Iterator[list[AttentionBlock]]:
    """Takes the blocks that are rewritten, and enters them in the model's config; after an error, too, so that what
    is narrow by then can be saved and loaded."""
    done: list[AttentionBlock] = []
    try:
        yield done
    finally:
        record = read_record(model) or {"version": VERSION, "blocks": {}, "steps": []}
        prefix = relative_prefix(model)
        made = {
            block.path.removeprefix(prefix): [*widths(block), block.module_of(block.family.output).bias is not None]
            for block in done
        }
        known = {} if become_stock(model, every) else record["blocks"] | made
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False) and not hasattr(relative_base(model), "decoder"):
            record = {**record, "tower": type(model).__name__}  # the config is that of the whole
        write_record(model, {**record, "blocks": known, "steps": [*record["steps"], dict(step)]})


def _summary(pair: Pair, directions: Directions, kept: Tensor, width: int) -> PrunedPair:
    return PrunedPair(
        pair.kind,
        pair.heads.dim,
        (directions.values > 0).sum(1).tolist(),
        kept.tolist(),
        width,
        [round(e, 6) for e in directions.energy(kept).tolist()],
    )
