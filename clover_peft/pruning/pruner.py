"""`prune`: from a model to the same model with narrower heads."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..architectures import AttentionBlock, HeadSlice, attention_block, attention_blocks
from . import ranks as rules
from .directions import (
    Directions,
    Found,
    Kind,
    Method,
    Pair,
    check_ranks,
    cut,
    decompose,
    find_pairs,
    mask,
    select_pairs,
)
from .loading import VERSION, read_record, relative_base, relative_prefix, write_record
from .narrow import become_stock, check_projections, check_supported, narrow, padded_width, widths
from .report import PrunedPair, PruningReport
from .sensitivity import sensitivities
from .sequential import refit

Rule = Literal["global", "gradient", "layer", "uniform"]
_RULES: dict[str, Callable[[rules.Spectra, Any], rules.Ranks]] = {
    "global": rules.global_ratio,
    "gradient": rules.by_layer,  # of values that are weighed
    "layer": rules.by_layer,  # of values relative to the layer's
    "uniform": rules.uniform,
    "threshold": rules.threshold,
    "energy": rules.energy,
}


@torch.inference_mode(False)
@torch.no_grad()
def prune(
    model: nn.Module,
    ratio: float | Mapping[Kind, float] | None = None,
    *,
    method: Method = "clover",
    calibration: Iterable[Mapping[str, Any]] | None = None,
    ranks: Rule | Mapping[str, Sequence[int]] = "global",
    threshold: float | Mapping[Kind, float] | None = None,
    energy: float | Mapping[Kind, float] | None = None,
    multiple: int = 1,
    sequential: bool = False,
    masked: bool = False,
    target_modules: str | Sequence[str] | None = None,
) -> PruningReport:
    """Make the heads of a model physically narrower, in place, along their singular directions (arXiv 2411.17426).

    The product of the two projections that meet in a head, `V S U^T`, keeps its leading directions:
    `k' = S^1/2 U^T`, `q' = V S^1/2`. The softmax scale stays 1/sqrt(original head_dim). The model is then one that
    `save_pretrained` saves and, after `import clover_peft`, `from_pretrained` loads.

    Everything is computed before any weight is changed; then layers are rewritten one by one, which an interrupt
    waits for. Costs D d^2 for a head, beside one pass over the calibration data; `sequential` and "gradient" add one.

    Args:
        model: a model of a known family, without adapters and not quantised.
        ratio: share of directions to remove, for each kind of pair; one number is for all that the model has. 0.5 if
            no other rule is given; 0 removes none.
        method: "clover", or the baseline "vanilla", which drops coordinates by the norms on both sides.
        calibration: batches, keyword arguments of the model. With them moments of activations take the place of the
            weights that compute them, which is far better; some ten tokens for each dimension of a head are needed.
        ranks: how `ratio` is spread. "global": one threshold over all heads, which are padded to the widest of their
            layer. "layer": one rank for all heads of a layer, so that none is padded, by values relative to the
            layer's. "gradient": the same by values weighed by what an error there does to the model's predictions
            (needs `calibration`, and a backward pass over it). "uniform". Or ranks by name of a pair (as in the
            report), for every key-value head; other pairs stay whole.
        threshold: instead of `ratio`, the smallest singular value to keep (the paper's rule for Whisper).
        energy: instead of `ratio`, the share of each head's sum of squared singular values to keep.
        multiple: round every rank to the nearest multiple of this; kernels like 8.
        sequential: fit every layer to what the pruned layers before it pass on. Needs `calibration`, as a sequence
            of batches, which are then all under way at once.
        masked: zero directions and keep all shapes, for analysis.
        target_modules: which pairs, by the path of the key or value projection: a regular expression that matches all
            of it, or ends of paths; None for all.

    Returns:
        `PruningReport`.

    Raises:
        ValueError: for a model, data or figures that do not fit, with the model as it was.
    """
    started = time.perf_counter()
    _check_plain(model, masked)
    if method not in ("clover", "vanilla"):
        raise ValueError(f"method: expected 'clover' or 'vanilla', found {method!r}")
    if multiple < 1 or int(multiple) != multiple:
        raise ValueError(f"multiple: expected a positive number, found {multiple}")
    multiple = int(multiple)  # NumPy's, too
    for option, wanted in {"sequential=True": sequential, "ranks='gradient'": ranks == "gradient"}.items():
        if wanted and calibration is None:
            raise ValueError(f"{option}: expected data to run the model on, found none; pass calibration")
        if wanted:
            calibration = list(cast("Iterable[Mapping[str, Any]]", calibration))
    rule, there = _choose_rule(ratio, ranks, threshold, energy), find_pairs(model)
    if unknown := set(rule.given) - {pair.name for pair in there}:
        known = ", ".join(repr(pair.name) for pair in there[:2])
        raise ValueError(f"ranks: expected names of pairs such as {known}, found {sorted(unknown)[0]!r}")
    kinds, skipped = _kinds(model, {pair.kind for pair in there}, rule.kinds)
    if rule.kinds is None:  # a figure for all kinds is one for those that are named
        named = {pair.kind for pair in there if pair.is_named(target_modules)}
        kinds = [kind for kind in kinds if kind in named] or kinds
    pairs = select_pairs(model, kinds, target_modules)
    _check_untied(model, pairs)
    blocks = _blocks(model, pairs, masked)
    found = decompose(model, kinds, method, calibration, target_modules)
    weights = {}
    if rule.name == "gradient" and (behind := [pair for pair in pairs if pair.kind == "vo"]):
        weights = sensitivities(model, behind, cast("Iterable[Mapping[str, Any]]", calibration))
    kept = _ranks(found, rule, multiple, weights)
    if (
        calibration is None
        and method == "clover"
        and any(bool((k < found[n][1].values.shape[1]).any()) for n, k in kept.items())
    ):
        warnings.warn(
            "directions are chosen by weights alone, which models bear badly; pass calibration=<batches of data>",
            stacklevel=2,
        )
    if sequential:
        found = refit(model, found, kept, method, cast("list[Mapping[str, Any]]", calibration))
    before = _sizes(model)
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
        step = {"method": method, **rule.to_dict(), "multiple": multiple}
        step |= {"calibrated": calibration is not None, "sequential": sequential}
        with _uninterrupted(), _recorded(model, step) as done:
            for block, names in tqdm(blocks.values(), desc="CLOVER pruning", unit=" layers", delay=3, leave=False):
                _rewrite(block, [(*found[name], *factors[name], wide[name]) for name in names])
                done.append(block)
    after = _sizes(model)
    report = PruningReport(
        method=method,
        rule=rule.to_dict() | ({"multiple": multiple} if multiple > 1 else {}),
        calibrated=calibration is not None,
        sequential=sequential,
        masked=masked,
        pairs={name: _summary(*found[name], kept[name], width) for name, width in wide.items()},
        skipped=skipped,
        parameters=(before[0], after[0]),
        cache_bytes=(before[1], after[1]),
        seconds=time.perf_counter() - started,
    )
    for kind, share in rule.ratios(kinds).items() if multiple > 1 else ():
        if abs(report.removed(kind) - share) > 0.05:
            warnings.warn(
                f"{kind}: {report.removed(kind):.0%} of the directions are removed, not {share:.0%}, by rounding "
                f"ranks to multiples of {multiple}",
                stacklevel=2,
            )
    return report


# ---------------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class _Rule:
    """A rule for ranks: "global", "layer", "uniform", "threshold" or "energy" with a figure for each kind of pair (or
    one for all), or "given" with ranks by name."""

    name: str
    figures: float | Mapping[Kind, float] | None = None
    given: Mapping[str, Sequence[int]] = field(default_factory=dict)

    @property
    def kinds(self) -> list[Kind] | None:
        """The kinds of pairs that it speaks of; None for all."""
        if self.name == "given":
            return sorted({cast(Kind, name.rpartition("(")[2].rstrip(")")) for name in self.given})
        return sorted(self.figures) if isinstance(self.figures, Mapping) else None

    def ranks(self, kind: Kind, spectra: rules.Spectra) -> rules.Ranks:
        """Ranks of all heads of one kind of pair."""
        if self.name == "given":
            full = {name: torch.full((len(values),), values.shape[1]) for name, values in spectra.items()}
            found = full | {name: torch.tensor(list(self.given[name])) for name in spectra if name in self.given}
            for name, values in spectra.items():
                check_ranks(name, found[name], values)
            return found
        figure = self.figures[kind] if isinstance(self.figures, Mapping) else self.figures
        return _RULES[self.name](spectra, figure)

    def ratios(self, kinds: Iterable[Kind]) -> dict[Kind, float]:
        """The shares that are to be removed, where they are said."""
        if self.name not in ("global", "gradient", "layer", "uniform") or self.figures is None:
            return {}
        return {k: self.figures[k] if isinstance(self.figures, Mapping) else self.figures for k in kinds}

    def to_dict(self) -> dict[str, Any]:
        """For the report."""
        if self.name == "given":
            return {"ranks": "given"}
        return {
            "ranks": self.name,
            "figure": dict(self.figures) if isinstance(self.figures, Mapping) else self.figures,
        }


def _choose_rule(
    ratio: float | Mapping[Kind, float] | None,
    ranks: Rule | Mapping[str, Sequence[int]],
    threshold: float | Mapping[Kind, float] | None,
    energy: float | Mapping[Kind, float] | None,
) -> _Rule:
    figures = {n: _plain(n, figure) for n, figure in (("ratio", ratio), ("threshold", threshold), ("energy", energy))}
    given = [name for name, figure in figures.items() if figure is not None]
    if not isinstance(ranks, str):
        given.append("ranks by name")
    if len(given) > 1:
        raise ValueError(f"expected one rule for ranks, found {' and '.join(given)}; pass one of them")
    for name, figure in figures.items():
        if isinstance(figure, Mapping) and (not figure or set(figure) - {"qk", "vo"}):
            raise ValueError(f"{name}: expected figures for 'qk' and 'vo', found {dict(figure)}")
        shares = figure.values() if isinstance(figure, Mapping) else [] if figure is None else [figure]
        for share in shares:
            if name == "threshold" and not 0 <= share < float("inf"):
                raise ValueError(f"threshold: expected a singular value, found {share}")
            if name != "threshold":
                rules.check_share(name, share, whole=name == "energy")
    if not isinstance(ranks, str):
        for name, each in ranks.items() if isinstance(ranks, Mapping) else [("ranks", ranks)]:
            if not isinstance(each, Sequence) or not all(isinstance(r, Integral) for r in each):
                raise ValueError(f"ranks: expected whole numbers by name of a pair, found {name!r}: {each!r}")
        if not ranks:
            raise ValueError("ranks: expected ranks by name of a pair, found none")
        return _Rule("given", given=ranks)
    if ranks not in ("global", "gradient", "layer", "uniform"):
        raise ValueError(f"ranks: expected 'global', 'gradient', 'layer', 'uniform' or ranks by name, found {ranks!r}")
    if ranks != "global" and (threshold is not None or energy is not None):
        raise ValueError(f"ranks={ranks!r}: expected a ratio to spread, found {given[0]}")
    for name in ("threshold", "energy"):
        if figures[name] is not None:
            return _Rule(name, figures[name])
    return _Rule(ranks, 0.5 if ratio is None else figures["ratio"])


def _plain(name: str, figure: Any) -> float | dict[Kind, float] | None:
    """A figure, or figures by kind of pair, as Python's own numbers, which a config can hold."""
    try:
        if isinstance(figure, Mapping):
            return {kind: float(value) for kind, value in figure.items()}
        return None if figure is None else float(figure)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: expected a number, or one for each kind of pair, found {figure!r}") from error


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
        warnings.warn(f"{kind}: not pruned, {reason}; pruning {', '.join(kinds)} alone", stacklevel=3)
    return kinds, skipped


def _ranks(found: Found, rule: _Rule, multiple: int, weights: Mapping[str, float]) -> rules.Ranks:
    for name, (pair, _) in found.items():
        if multiple > pair.heads.dim:
            raise ValueError(f"multiple: expected at most the {pair.heads.dim} directions of {name}, found {multiple}")
    kept: rules.Ranks = {}
    for kind in sorted({pair.kind for pair, _ in found.values()}):
        spectra = {
            name: directions.values * weights.get(name, 1.0)
            for name, (pair, directions) in found.items()
            if pair.kind == kind
        }
        if rule.name == "layer":
            spectra = {name: values / values.norm().clamp(min=1e-300) for name, values in spectra.items()}
        of_kind = rules.rounded(rule.ranks(kind, spectra), spectra, multiple)
        if rule.name != "given" and not any(bool(part.any()) for part in of_kind.values()):
            raise ValueError(f"{kind}: expected a rule that keeps some direction, found none kept by {rule.to_dict()}")
        kept |= of_kind
    return {name: kept[name] for name in found}


# ---------------------------------------------------------------------- what a model must be


def _check_plain(model: nn.Module, masked: bool) -> None:
    if isinstance(model, PeftModel):
        raise ValueError(
            f"{type(model).__name__}: expected a model without adapters; call merge_and_unload() or unload() first"
        )
    whole = isinstance(model, PreTrainedModel) or hasattr(model, "register_to_config")
    if not masked and not whole:
        raise ValueError(
            f"{type(model).__name__}: expected a model of transformers or diffusers, whose config can say what is "
            "narrow, found another module; prune the whole model, or pass masked=True"
        )
    read_record(model)  # raises if it is damaged
    for path, module in model.named_modules():
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            raise ValueError(
                f"{path}: expected a model without adapters, found {type(module).__name__}; call merge_and_unload() "
                "or unload() first"
            )
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            f"{type(model).__name__}: expected all weights in memory, found some offloaded or on the meta device; "
            "load it without offloading"
        )


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


def _blocks(model: nn.Module, pairs: Iterable[Pair], masked: bool) -> dict[str, tuple[AttentionBlock, list[str]]]:
    """Path of an attention block -> the block and the names of its pairs."""
    blocks: dict[str, tuple[AttentionBlock, list[str]]] = {}
    for pair in pairs:
        block = attention_block(model, pair.path)
        assert block is not None  # the pair was found in it
        check_projections(block)
        if not masked:
            check_supported(block)
        blocks.setdefault(block.path, (block, []))[1].append(pair.name)
    return blocks


def _sizes(model: nn.Module) -> tuple[int, int]:
    """Parameters, and bytes of the keys and values that are kept of one token: those of decoders."""
    parameters, total = sum(parameter.numel() for parameter in model.parameters()), 0
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    encoder: Any = model.get_encoder() if both and hasattr(model, "get_encoder") else None  # type: ignore[operator]
    uncached = set() if encoder is None else {id(module) for module in encoder.modules()}
    for block in attention_blocks(model).values():
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
def _recorded(model: nn.Module, step: Mapping[str, Any]) -> Iterator[list[AttentionBlock]]:
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
        known = {} if become_stock(model, attention_blocks(model)) else record["blocks"] | made
        config = getattr(model, "config", None)
        if getattr(config, "is_encoder_decoder", False) and not hasattr(relative_base(model), "decoder"):
            record = {**record, "tower": type(model).__name__}  # the config is that of the whole
        write_record(model, {**record, "blocks": known, "steps": [*record["steps"], dict(step)]})


def _rewrite(block: AttentionBlock, pairs: list[tuple[Pair, Directions, Tensor, Tensor, int]]) -> None:
    """Put narrower projections in place of a block's, those that change; in float64, one block at a time."""
    at = pairs[0][2].device
    changed = {part for pair, *_ in pairs for part in ("qk" if pair.kind == "qk" else "v")}
    parts: dict[str, Tensor] = {}  # rows of a head's features, the bias as the last row: (D + 1, heads, d)
    slices: dict[str, HeadSlice] = {}
    for name in block.present():
        layout = block.layout(block.prefix + name, name)
        slices |= layout
        if changed & set(layout):
            projection = block.module_of(name)
            rows = _rows(projection).to(at).double()
            if projection.bias is not None:
                rows = torch.cat([rows, projection.bias.to(rows).unsqueeze(0)])
            parts |= {part: heads.blocks(rows, heads.dim) for part, heads in layout.items()}
    output, read = block.module_of(block.family.output), None
    bias = None if output.bias is None else output.bias.to(at).double()
    for pair, directions, down, back, width in pairs:
        down, back = down[:, :width], back[..., :width]
        if pair.kind == "vo":
            read = pair.partner.heads.blocks(_rows(output).mT.to(at).double(), pair.heads.dim)
            if (constant := directions.constant(down, back)) is not None:
                lost = torch.einsum("ogd,gd->o", read, constant)
                bias = lost if bias is None else bias + lost
            parts["v"] = torch.einsum("nhd,hwd->nhw", parts["v"], down)
            read = torch.einsum("ogd,gdw->ogw", read, back)
            continue
        for part, heads, factor in (("k", pair.heads, down.mT), ("q", pair.partner.heads, back)):
            start, whole = heads.offset - slices[part].offset, parts[part]
            first, middle, last = whole.split([start, heads.dim, whole.shape[-1] - start - heads.dim], dim=-1)
            parts[part] = torch.cat([first, torch.einsum("nhd,hdw->nhw", middle, factor), last], dim=-1)
    if output.bias is None and bias is not None and not bool(bias.any()):
        bias = None
    dims = {part: parts[part].shape[-1] if part in parts else slices[part].dim for part in "kv"}
    narrow(block, dims["k"], dims["v"], bias is not None)
    for name in block.present():
        layout = block.layout(block.prefix + name, name)
        projection = block.module_of(name)
        for part, heads in layout.items() if changed & set(layout) else ():
            rows = _rows(projection)
            place = heads.heads(rows)
            place.copy_(parts[part][: len(rows)].reshape(place.shape))
            if projection.bias is not None:
                place = heads.heads(projection.bias)
                place.copy_(parts[part][-1].reshape(place.shape))
    output = block.module_of(block.family.output)
    if read is not None:
        _rows(output).copy_(read.flatten(1).mT)
    if bias is not None:
        output.bias.copy_(bias)


def _rows(projection: Any) -> Tensor:
    """The weight as (in, out), a view."""
    return projection.weight if isinstance(projection, Conv1D) else projection.weight.mT


def _summary(pair: Pair, directions: Directions, kept: Tensor, width: int) -> PrunedPair:
    return PrunedPair(
        pair.kind,
        pair.heads.dim,
        kept.tolist(),
        width,
        [round(e, 6) for e in directions.energy(kept).tolist()],
    )
