"""Which property of an update goes with forgetting: measured on the saved adapters of an experiment."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor
from tqdm.auto import tqdm

from ...io import run_record as records
from ...io.figures import canvas
from ...io.tables import markdown_table
from ..analysis import adapter_changes, collect_inputs, measure, moves_base
from . import report
from .plan import BASE, Trial
from .trial import Laboratory
from .windows import Windows, document_losses, restricted_head

Record = dict[str, Any]
DOCUMENTS = 16  # of every domain
INPUTS = 256  # tokens of a domain whose inputs are kept for every projection

# Name in the tables -> a property of an update, from its record.
PROPERTIES: dict[str, Callable[[Record], float]] = {
    "intruders": lambda found: found["intruders"],
    "effective rank": lambda found: found["effective_rank"],
    "relative size": lambda found: found["relative_size"],
    "KL, domain": lambda found: found["kl"]["domain"],
    "KL, others": lambda found: found["kl"]["others"],
    "output, domain": lambda found: found["output_change"]["domain"],
    "output, others": lambda found: found["output_change"]["others"],
    "merged rise": lambda found: found["merged_rise"],
}


def measure_all(laboratory: Laboratory) -> None:
    """Writes `<out>/mechanism/<trial>.json` for every saved adapter that has a record and no such file yet.

    Adapters whose method moves the base's weights (PiSSA, CorDA), and those that diverged, are passed over.
    """
    found, folder = report.load(laboratory.out / "records"), laboratory.out / "mechanism"
    names = [
        trial.name
        for trial in laboratory.experiment.trials()
        if trial.name in found
        and not report.is_diverged(found[trial.name])
        and not (folder / f"{trial.name}.json").exists()
        and (laboratory.out / "adapters" / trial.name).is_dir()
        and not moves_base(laboratory.experiment.arm(trial.arm).config())
    ]
    for name in tqdm(names, desc="adapters", unit="adapter"):
        records.write(folder / f"{name}.json", _measured(laboratory, Trial(**found[name]["trial"]), found[name]))


def _measured(laboratory: Laboratory, trial: Trial, record: Record) -> Record:
    """The properties of one adapter's update.

    - `intruders`, `effective_rank`, `relative_size`: of the weights, see `analysis.measure`; sum and means over
      projections.
    - `kl`: mean KL divergence of a token's prediction from the base model's, on held-out text of the (last) domain and
      of those that were not trained on. To second order it is half the squared norm of the update in the Fisher metric
      of that text.
    - `output_change`: root of the summed squares of `dW x` over those of `W x`, with the base model's inputs x there.
    - `merged_rise`: loss of the merged model less that of the unmerged one, in the base's precision, over all domains.
    """
    model = PeftModel.from_pretrained(laboratory.load(torch.float32), laboratory.out / "adapters" / trial.name).eval()
    windows = {name: _first(of_domain) for name, of_domain in laboratory.windows.items()}
    kl = {name: _divergence(model, of_domain) for name, of_domain in windows.items()}
    layers: Any = model.base_model.targeted_module_names
    inputs = {
        name: collect_inputs(model, layers, [{"input_ids": row[None]} for row in of_domain.held_out], INPUTS)
        for name, of_domain in windows.items()
    }
    found, changed, whole = [], dict.fromkeys(windows, 0.0), dict.fromkeys(windows, 0.0)
    for change in adapter_changes(model):
        found.append(measure(change))
        for name, of_domain in inputs.items():
            x = of_domain[change.name].to(change.before)
            changed[name] += float((x @ (change.after - change.before).T).square().sum())
            whole[name] += float((x @ change.before.T).square().sum())
    output = {name: math.sqrt(changed[name] / whole[name]) for name in windows}
    return {
        "trial": vars(trial),
        "intruders": sum(one["intruders"]["count"] for one in found),
        "effective_rank": statistics.fmean(one["update"]["effective_rank"] for one in found),
        "relative_size": statistics.fmean(one["update"]["relative"] for one in found),
        "kl": _split(kl, trial.stages),
        "output_change": _split(output, trial.stages),
        "merged_rise": _merged_rise(laboratory, trial, record, windows),
        "environment": records.environment(),
    }


def _first(windows: Windows) -> Windows:
    return replace(windows, held_out=windows.held_out[:DOCUMENTS], keys=windows.keys[:DOCUMENTS])


@torch.no_grad()
def _divergence(model: PeftModel, windows: Windows) -> float:
    """Mean KL divergence a token, in nats, of the adapted model's predictions from the base model's."""
    total = 0.0
    with restricted_head(model, windows.vocabulary) as labels:
        for row in windows.held_out.to(labels.device):
            after = _log_probabilities(model, row)
            with model.disable_adapter():
                before = _log_probabilities(model, row)
            total += float((before.exp() * (before - after)).sum(-1).mean())
    return total / len(windows.held_out)


def _log_probabilities(model: PeftModel, row: Tensor) -> Tensor:
    return F.log_softmax(model(input_ids=row[None], use_cache=False).logits[0, :-1].double(), -1)


def _merged_rise(laboratory: Laboratory, trial: Trial, record: Record, windows: dict[str, Windows]) -> float:
    base = laboratory.load()
    model = PeftModel.from_pretrained(base, laboratory.out / "adapters" / trial.name).merge_and_unload()
    rises = [
        loss - record["losses"][name][key]
        for name, of_domain in windows.items()
        for key, loss in document_losses(model, of_domain, laboratory.experiment.evaluation.batch_size).items()
    ]
    return statistics.fmean(rises)


def _split(found: dict[str, float], stages: Sequence[str]) -> dict[str, float]:
    return {
        "domain": found[stages[-1]],
        "others": statistics.fmean(value for name, value in found.items() if name not in stages),
    }


# ---------------------------------------------------------------------- tables and pictures


def markdown(results: Path, folder: Path) -> str:
    """A table of all measured adapters, and the rank correlation of every property with forgetting.

    Args:
        results: the experiment's records.
        folder: the measured properties.
    """
    rows = _rows(results, folder)
    if not rows:
        return ""
    header = ["adapted to", "arm", "rate", "learned", "forgot", *PROPERTIES]
    lines = [
        [
            trial["domain"],
            trial["arm"],
            f"{trial['rate']:g}",
            f"{learned:.4f}",
            f"{forgot:+.4f}",
            *(f"{v:.4g}" for v in values),
        ]
        for trial, learned, forgot, values in rows
    ]
    parts = ["## What goes with forgetting\n", markdown_table(header, lines), ""]
    if len(rows) > 2:
        _, learned_all, forgot_all, values_all = zip(*rows, strict=True)
        correlations = [
            [name, *(f"{spearman(column, other):+.2f}" for other in (forgot_all, learned_all))]
            for name, column in zip(PROPERTIES, zip(*values_all, strict=True), strict=True)
        ]
        table = markdown_table(["property", "with forgetting", "with the loss on the domain"], correlations)
        parts.append(f"Rank correlations over {len(rows)} adapters (Spearman):\n\n{table}\n")
    return "\n".join(parts)


def picture(results: Path, folder: Path, pictures: Path) -> None:
    """Forgetting against every property, an arm a colour; needs matplotlib."""
    rows = _rows(results, folder)
    pyplot, save, _ = canvas(pictures)
    figure, all_axes = pyplot.subplots(
        2, (len(PROPERTIES) + 1) // 2, figsize=(14, 6), sharey=True, layout="constrained"
    )
    for axes, (i, name) in zip(all_axes.flat, enumerate(PROPERTIES), strict=False):
        for arm in dict.fromkeys(trial["arm"] for trial, *_ in rows):
            points = [(values[i], forgot) for trial, _, forgot, values in rows if trial["arm"] == arm]
            axes.plot(*zip(*points, strict=True), "o", markersize=4, label=arm)
        axes.set_xlabel(name)
        axes.locator_params(axis="x", nbins=4)
    all_axes.flat[0].set_ylabel("rise of the loss on the other domains")
    all_axes.flat[0].legend(fontsize=6)
    save("mechanism", figure)


def _rows(results: Path, folder: Path) -> list[tuple[Record, float, float, list[float]]]:
    """Trial, loss on its domain, forgetting and properties of every measured adapter."""
    found, rows = report.load(results), []
    for name, record in found.items():
        path = folder / f"{name}.json"
        if BASE in found and path.is_file():
            point = report.point(found[BASE], [record], record["trial"]["domain"])
            if point is not None:
                properties = records.read_json(path, "delete it, and measure again")
                rows.append((record["trial"], *point, [float(of(properties)) for of in PROPERTIES.values()]))
    return rows


def spearman(one: Iterable[float], other: Iterable[float]) -> float:
    """The rank correlation; equal values have equal ranks, and 0 stands for a constant."""
    x, y = (torch.tensor(list(values), dtype=torch.float64) for values in (one, other))
    ranks = [((v[:, None] > v).sum(1) + (v[:, None] >= v).sum(1)).double() for v in (x, y)]
    a, b = (r - r.mean() for r in ranks)
    return float(a @ b / norm) if (norm := float(a.norm() * b.norm())) else 0.0
