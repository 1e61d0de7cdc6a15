"""`clover spectra`: what attention heads would lose to pruning."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from typing import Any

from ..io import run_record as records
from ..io.figures import find_pyplot
from ..io.hub_models import announce_model, load_as_saved
from ..io.tables import markdown_table
from ..pruning import calibrate, find_pairs, ranks
from ..pruning.figures import plot_spectra
from ..pruning.measured import SMALL, measure_ratios
from ..pruning.pairs import select_pairs
from ..pruning.rule import default_spread
from ..pruning.spectra import METHODS, SHARES, PairSpectra, by_energy, labels, measure_spectra
from . import checks, parsers
from . import pruning_options as options
from .errors import reports_errors

_CALIBRATED = (
    "Energies are those of activations on this text. They say what attention loses, not what the model loses: measure "
    "the pruned model."
)
_UNCALIBRATED = (
    "Energies are those of weights, a weak guide: what data never use counts as much as what they do. SmolLM2-135M is "
    "ruined without an eighth of its value-output directions when weights choose them, and hardly harmed when "
    "data do. Pass --calibration, here and to `clover prune`."
)


_LEGEND = (
    "clover: singular values of the heads' products; vanilla: norms of their coordinates, which is pruning without a "
    "decomposition. Effective rank: how many equal values would be as spread out. The last columns: how many "
    "directions hold so much of a head's energy, the sum of its squared values. Ranks are means over the heads."
)


@reports_errors(TypeError)
def run(given: argparse.Namespace) -> int:
    checks.spectra(given)
    threshold = checks.figures("--threshold", given.threshold)
    if given.out is not None and not given.no_pictures:
        find_pyplot()
    model, processor = load_as_saved(announce_model(given.model), given.model_class)
    kinds = given.kinds or sorted({pair.kind for pair in find_pairs(model)})
    if not kinds or (isinstance(threshold, dict) and set(threshold) - set(kinds)):
        wanted = f"pairs for --threshold {given.threshold}" if kinds else "pairs of projections"
        raise ValueError(f"{given.model}: expected {wanted}, found {' and '.join(kinds) or 'none'}")
    pattern = options.target_modules(given)
    chosen = select_pairs(model, find_pairs(model), kinds, pattern)
    for kind in kinds if given.layers else ():
        count = sum(pair.kind == kind for pair in chosen)
        if wrong := [layer for layer in given.layers if not 0 <= layer < count]:
            raise ValueError(f"--layers: expected 0 to {count - 1} for {kind}, found {wrong[0]}")
    batches, data = options.calibration(given, model, processor)
    calibrated = None if batches is None else calibrate(model, batches, target_modules=pattern)
    held_out = [] if batches is None else options.held_out(given, model, processor, batches)
    found = measure_spectra(model, kinds, calibrated, pattern)
    energies: dict[str, Any] = {}
    measured: dict[str, dict[float, float]] = {}
    kept: ranks.Ranks = {}
    titles: dict[str, str] = {}
    for kind in kinds:
        pairs = [each for each in found.values() if each.pair.kind == kind]
        energies[kind] = _energies(pairs)
        least = threshold.get(kind) if isinstance(threshold, dict) else threshold
        if least is None:
            least = energies[kind]["clover"][str(SHARES[-1])]["threshold"]
        of_kind = ranks.threshold({each.pair.name: each.clover.values for each in pairs}, least)
        count, total = int(sum(map(sum, of_kind.values()))), sum(each.clover.values.numel() for each in pairs)
        kept, titles[kind] = kept | of_kind, f"ranks at threshold {least:.4g}"
        print("\n".join([_table(kind, pairs), "", *_thresholds(kind, energies[kind])]))
        given_here = given.threshold is not None and not (isinstance(threshold, dict) and kind not in threshold)
        what = "a threshold of" if given_here else "ranks are drawn, not advised, at the last of these thresholds:"
        print(f"{kind}: {what} {least:.4g} keeps {count:,} of {total:,} directions")
        if calibrated is not None and held_out:
            measured[kind] = measure_ratios(model, kind, calibrated, held_out, pattern)
        print("\n".join(_advice(kind, measured.get(kind), default_spread(model), batches)) + "\n")
    print(_CALIBRATED if data else _UNCALIBRATED)
    if given.out is None:
        return 0
    made = [] if given.no_pictures else plot_spectra(found, given.out, kept, titles, given.layers)
    record = {
        "options": {key: value for key, value in vars(given).items() if value is not None},
        "environment": records.environment(),
        "calibrated_with": data,
        "energies": energies,
        "measured": {kind: {str(ratio): loss for ratio, loss in losses.items()} for kind, losses in measured.items()},
        "ranks": {name: rank.tolist() for name, rank in kept.items()},
        "pairs": {name: each.to_dict() for name, each in found.items()},
    }
    for path in [*made, records.write(given.out / "spectra.json", record)]:
        print(path)
    return 0


def _energies(pairs: Sequence[PairSpectra]) -> dict[str, dict[str, dict[str, float]]]:
    """Method -> share of energy -> ratio and threshold."""
    return {
        method: {str(share): by_energy([getattr(each, method) for each in pairs], share) for share in SHARES}
        for method in METHODS
    }


def _table(kind: str, pairs: Sequence[PairSpectra]) -> str:
    heads = [f"{kind}, layer", "heads x width"]
    for method in METHODS:
        heads += [
            f"{method}: largest value",
            "median value",
            "smallest value",
            "effective rank",
            "rank for 90 % energy",
            "rank for 99 % energy",
        ]
    rows = []
    for name, each in zip(labels([each.pair.path for each in pairs]), pairs, strict=True):
        found = each.to_dict()
        row = [name, f"{found['heads']} x {found['size']}"]
        for method in METHODS:
            values = getattr(each, method).values
            row += [f"{float(value):.3g}" for value in (values.max(), values.median(), values.min())]
            of_method = found[method]
            for figures in (of_method["effective_rank"], *(of_method["directions"][s] for s in ("0.9", "0.99"))):
                row.append(f"{statistics.mean(figures):.1f}")
        rows.append(row)
    return f"{markdown_table(heads, rows)}\n\n{_LEGEND}"


def _thresholds(kind: str, energies: dict[str, Any]) -> list[str]:
    lines = []
    for share in map(str, SHARES):
        clover, vanilla = (energies[method][share] for method in METHODS)
        lines.append(
            f"{kind}: {float(share):.0%} of the energy is in {1 - clover['ratio']:.1%} of the directions (threshold "
            f"{clover['threshold']:.4g}), and in {1 - vanilla['ratio']:.1%} of the coordinates"
        )
    return lines


def _advice(
    kind: str, losses: dict[float, float] | None, spread: str, batches: Sequence[dict[str, Any]] | None
) -> list[str]:
    """The ratios that were measured, and the largest one that changes predictions little."""
    if losses is None:
        remedy = "pass --calibration TEXT" if batches is None else _more_text(batches)
        return [f"{kind}: no ratio is suggested, because none was measured; {remedy}"]
    lines = [
        f"{kind}: --ratio {kind}={ratio} --ranks {spread} changes predictions on held-out text by {loss:.3g} (KL "
        "divergence in nats, or 1 - cosine without logits)"
        for ratio, loss in losses.items()
    ]
    small = [ratio for ratio, loss in losses.items() if loss <= SMALL]
    chosen = f"--ratio {kind}={max(small)} --ranks {spread}" if small else "none"
    return [*lines, f"{kind}: suggested is the largest ratio that changes them by at most {SMALL}: {chosen}"]


def _more_text(batches: Sequence[dict[str, Any]]) -> str:
    """How much text a measurement needs: a window beside those of the calibration."""
    count, length = sum(len(batch["input_ids"]) for batch in batches), batches[0]["input_ids"].shape[1]
    fewer = f", or --rows {count - 1} to calibrate with one less" if count > 1 else ""
    return (
        f"that needs a window of {length} tokens besides the {count} that calibrate, and the text has no other; pass "
        f"more text{fewer}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parsers.spectra(arguments))
