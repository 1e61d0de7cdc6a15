"""Tables and pictures of an experiment, from its records alone."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ...io import run_record as records
from ...io.figures import canvas
from ...io.tables import markdown_table
from .plan import BASE, OWN, stages_of

Record = dict[str, Any]


def load(folder: Path) -> dict[str, Record]:
    """The records of a folder by their trials' names; other JSON files are passed over.

    Raises:
        ValueError: naming the file that is damaged.
    """
    remedy = "delete it, and the next run makes it again"
    found = {path.stem: records.read_json(path, remedy) for path in sorted(folder.glob("*.json"))}
    return {name: record for name, record in found.items() if "trial" in record and "losses" in record}


def paired(one: Sequence[Record], other: Sequence[Record], domains: Iterable[str]) -> tuple[float, float] | None:
    """Mean difference of the losses of two arms, over documents of all of these domains and seeds, with its error.

    Seeds and documents are both random: the variance is that of the means over seeds of every document, divided by
    their number, plus that of the means over documents of every seed, divided by theirs. Of one seed the second part
    is unknown, and left out. Domains count alike.

    Args:
        one: an arm's records, a seed each.
        other: those of the arm it is compared with; the seeds that both have are paired.
        domains: the domains.

    Returns:
        Mean and standard error; None where nothing can be paired.
    """
    seeds = {record["trial"]["seed"]: record for record in other}
    pairs = [(record, seeds[s]) for record in one if (s := record["trial"]["seed"]) in seeds]
    means, variances, by_seed = [], [], list[list[float]]()
    for domain in domains:
        tables = [
            {key: a["losses"][domain][key] - b["losses"][domain][key] for key in b["losses"][domain]}
            for a, b in pairs
            if not is_diverged(a) and not is_diverged(b)
        ]
        if not tables:
            return None
        documents = [statistics.fmean(table[key] for table in tables) for key in tables[0]]
        means.append(statistics.fmean(documents))
        variances.append(statistics.variance(documents) / len(documents) if len(documents) > 1 else 0.0)
        by_seed.append([statistics.fmean(table.values()) for table in tables])
    if not means:
        return None
    variance = sum(variances) / len(means) ** 2
    seed_means = [statistics.fmean(column) for column in zip(*by_seed, strict=True)]
    if len(seed_means) > 1:
        variance += statistics.variance(seed_means) / len(seed_means)
    return statistics.fmean(means), variance**0.5


def is_diverged(record: Record) -> bool:
    """Whether its training ended in a loss that is no finite number."""
    return record.get("diverged_at_step") is not None


def mean_loss(runs: Sequence[Record], domain: str) -> float | None:
    """Over documents and seeds; None if a run diverged."""
    if any(map(is_diverged, runs)):
        return None
    return statistics.fmean(loss for record in runs for loss in record["losses"][domain].values())


def accuracy(record: Record) -> float | None:
    """The share of zero-shot questions answered rightly, sets counting alike; None if none were scored."""
    found = record.get("zeroshot")
    return statistics.fmean(statistics.fmean(rows.values()) for rows in found.values()) if found else None


def adapted_to(found: dict[str, Record]) -> list[str]:
    """The tasks: domains, in the order of the base model's record, and then several in turn."""
    trials = [record["trial"] for record in found.values()]
    places = list(found[BASE]["losses"])
    tasks = {
        trial["domain"] for trial in trials if trial["arm"] != BASE and {*stages_of(trial["domain"])} <= {*places}
    }
    return sorted(tasks, key=lambda task: (len(stages_of(task)), [places.index(name) for name in stages_of(task)]))


def by_arm(found: dict[str, Record], task: str) -> dict[str, dict[float, list[Record]]]:
    """Arm -> rate -> records of all seeds, of what was adapted to a task; arms in the order of the experiment."""
    result: dict[str, dict[float, list[Record]]] = {}
    for record in sorted(found.values(), key=lambda record: record["place"]):
        trial = record["trial"]
        if trial["arm"] != BASE and trial["domain"] == task:
            result.setdefault(trial["arm"], {}).setdefault(trial["rate"], []).append(record)
    return {arm: dict(sorted(rates.items())) for arm, rates in result.items()}


def best_rate(rates: dict[float, list[Record]], domain: str) -> float | None:
    """The rate to compare an arm at; None if it diverged.

    On validation text the one with the lowest loss on the domain itself, over the seeds that all rates have. On test
    text the first of the configuration, because choosing by the loss would choose on the test text.

    Raises:
        ValueError: records of test text were made with different first rates.
    """
    runs = [record for of_rate in rates.values() for record in of_rate]
    if runs and runs[0]["split"] == "test":
        first, *others = dict.fromkeys(record["first_rate"] for record in runs)
        if others:
            raise ValueError(
                f"{runs[0]['trial']['arm']}: expected records of one first rate, which was fixed before test text was "
                f"read, found {first} and {others[0]}; use a folder of records for each configuration"
            )
        return None if first not in rates or mean_loss(rates[first], domain) is None else first
    [common] = _of_common_seeds(rates) or [rates]
    losses = {rate: loss for rate, of_rate in common.items() if (loss := mean_loss(of_rate, domain)) is not None}
    return min(losses, key=losses.__getitem__) if losses else None


def at_level(base: Record, rates: dict[float, list[Record]], domain: str, level: float) -> list[Record] | None:
    """What an arm would lose at a rate between those measured, at which its loss on the domain is `level`.

    The curve goes from the model without an adapter (rate 0) over the rates in their order, and ends at the lowest
    loss: beyond it an arm only forgets. Between two rates the losses of every document are interpolated linearly.

    Args:
        base: the record of the model without an adapter.
        rates: an arm's records by rate.
        domain: what was adapted to.
        level: mean loss on the domain.

    Returns:
        A record a seed with the losses alone; None if the curve does not reach the level.
    """
    curve = {0.0: base_runs(base, rates), **rates}
    points = [(loss, runs) for runs in curve.values() if (loss := mean_loss(runs, domain)) is not None]
    lowest = min(range(len(points)), key=lambda i: points[i][0])
    for (high, before), (low, after) in itertools.pairwise(points[: lowest + 1]):
        if low <= level <= high and low < high:
            return _between(before, after, (high - level) / (high - low))
    return None


def base_runs(base: Record, rates: dict[float, list[Record]]) -> list[Record]:
    """The record of the model without an adapter, once for each seed of an arm."""
    seeds = dict.fromkeys(record["trial"]["seed"] for runs in rates.values() for record in runs)
    return [{**base, "trial": {"seed": seed}} for seed in seeds]


def _between(before: list[Record], after: list[Record], share: float) -> list[Record]:
    later = {record["trial"]["seed"]: record["losses"] for record in after}
    return [
        {
            "trial": {"seed": seed},
            "losses": {
                domain: {key: (1 - share) * loss + share * later[seed][domain][key] for key, loss in losses.items()}
                for domain, losses in record["losses"].items()
            },
        }
        for record in before
        if (seed := record["trial"]["seed"]) in later
    ]


def markdown(found: dict[str, Record], reference: str | None = None) -> str:
    """All tables.

    Args:
        found: records by name.
        reference: the arm that the others are compared with; None for the first.

    Raises:
        ValueError: there is no such arm.
    """
    places = {record["trial"]["arm"]: record["place"] for record in found.values()}
    places.pop(BASE, None)
    if reference is not None and reference not in places:
        raise ValueError(f"reference: expected one of {', '.join(sorted(places))}, found {reference!r}")
    if reference is None and places and len(first := [a for a, p in places.items() if p == min(places.values())]) > 1:
        raise ValueError(
            f"reference: expected one arm that was first in its configuration, found {' and '.join(sorted(first))}, "
            "of different ones; name the arm that the others are compared with (--reference)"
        )
    base = found.get(BASE)
    if base is None:
        return f"no record of the model without an adapter yet ({len(found)} records)"
    parts = [_heading(base)]
    for task in adapted_to(found):
        arms, domain = by_arm(found, task), stages_of(task)[-1]
        parts += [f"## Adapted to {', then to '.join(stages_of(task))}\n", _table(base, arms, domain)]
        if reference in arms:
            arms = {reference: arms[reference], **arms}
        if len(arms) > 1:
            others = other_domains(base, task)
            kinds = {"all others": others} | ({OWN: [OWN]} if OWN in base["losses"] else {})
            before = {f"{stage}, learned before": [stage] for stage in stages_of(task)[:-1]}
            columns = {"learned": [domain]} | before | {other: [other] for other in others} | kinds
            parts.append(_differences(arms, domain, columns))
            parts += [_at_equal_learning(base, arms, domain, kind) for kind in kinds.values()]
    return "\n".join(parts)


def pictures(found: dict[str, Record], folder: Path, prefix: str = "learn_forget") -> list[Path]:
    """Curves of forgetting against learning over every arm's rates, `<prefix>_<task>.png`; needs matplotlib.

    Bars are standard errors over seeds.
    """
    pyplot, save, made = canvas(folder)
    base = found[BASE]
    for task in adapted_to(found):
        arms, domain = by_arm(found, task), stages_of(task)[-1]
        figure, axes = pyplot.subplots(figsize=(9, 5), layout="constrained")
        colors = pyplot.get_cmap("tab10" if len(arms) <= 10 else "tab20").colors
        others = other_domains(base, task)
        for i, (arm, rates) in enumerate(arms.items()):
            points = {rate: p for rate, runs in rates.items() if (p := point(base, runs, task)) is not None}
            if points:
                x, y = zip(*points.values(), strict=True)
                x_error, y_error = zip(*(_seed_errors(base, rates[rate], task) for rate in points), strict=True)
                style = dict(color=colors[i % len(colors)], markersize=4, linewidth=1)
                axes.errorbar(x, y, y_error, x_error, "o-", label=arm, **style)
            for rate, p in points.items():
                axes.annotate(f"{rate:g}", p, fontsize=6, xytext=(2, 2), textcoords="offset points")
        axes.set_xlabel(f"loss on {domain} after training on {', then on '.join(stages_of(task))} (learned: left)")
        axes.set_ylabel(f"rise of the loss on {', '.join(others)} (forgot: up)")
        if axes.containers:
            axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        save(f"{prefix}_{task}", figure)
    return made


def point(base: Record, runs: list[Record], task: str) -> tuple[float, float] | None:
    """Loss on the (last) domain, and rise of the loss on the others; None if a run diverged."""
    learned = mean_loss(runs, stages_of(task)[-1])
    if learned is None:
        return None
    return learned, statistics.fmean(_rise(base, runs, other) for other in other_domains(base, task))


def _seed_errors(base: Record, runs: list[Record], task: str) -> tuple[float, float]:
    """Standard errors over seeds of both numbers of `point`; 0 of one seed."""
    points = [p for record in runs if (p := point(base, [record], task)) is not None]
    if len(points) < 2:
        return 0.0, 0.0
    learned, forgot = (statistics.stdev(values) / len(points) ** 0.5 for values in zip(*points, strict=True))
    return learned, forgot


def other_domains(base: Record, task: str) -> list[str]:
    """The domains that forgetting is measured on: none that was trained on."""
    return [other for other in base["losses"] if other not in (*stages_of(task), OWN)]


def _rise(base: Record, runs: list[Record], domain: str) -> float:
    after, before = mean_loss(runs, domain), mean_loss([base], domain)
    assert after is not None
    assert before is not None
    return after - before


def _heading(base: Record) -> str:
    counts = ", ".join(
        f"{name} {len(losses)} documents"
        + (f", head of {base['vocabulary'][name]:,} tokens" if base["vocabulary"].get(name) else "")
        for name, losses in base["losses"].items()
    )
    return (
        f"{base['model']['name']} ({base['model']['origin']}), {base['settings']['dtype']} base, {base['split']} text"
        f": {counts}. Losses in nats a token; rise: of the loss over the model without an adapter"
        + (", which on its own text estimates the KL divergence from it" if OWN in base["losses"] else "")
        + ".\n"
    )


def _table(base: Record, arms: dict[str, dict[float, list[Record]]], domain: str) -> str:
    others = [other for other in base["losses"] if other != domain]  # and, last, the model's own text
    scored = accuracy(base) is not None
    head = ["arm", "rate", "seeds", "parameters", f"{domain} loss", *(f"{other} rise" for other in others)]
    head += ["zero-shot"] * scored + ["s/step", "peak MiB", "adapter MiB"]
    first = ["no adapter", "", "", "0", f"{mean_loss([base], domain):.4f}", *("0" for _ in others)]
    first += [_share(accuracy(base))] * scored + ["", f"{base['peak_memory_bytes'] / 2**20:.0f}", ""]
    rows = [first]
    for arm, rates in arms.items():
        best = best_rate(rates, domain)
        for rate, runs in rates.items():
            learned = mean_loss(runs, domain)
            row = [arm, f"{rate:g}", str(len(runs)), f"{runs[0]['parameters']:,}"]
            if learned is None:
                row += ["diverged", *("" for _ in others)]
            else:
                shown = f"{learned:.4f}"
                row += [f"**{shown}**" if rate == best else shown]
                row += [f"{_rise(base, runs, other):+.4f}" for other in others]
            if scored:
                shares = [share for record in runs if (share := accuracy(record)) is not None]
                row.append(_share(statistics.fmean(shares) if shares else None))
            steps = sum(len(record["training_loss"]) for record in runs)
            row.append(f"{sum(record['seconds']['train'] for record in runs) / max(1, steps):.2f}")
            row.append(f"{max(record['peak_memory_bytes'] for record in runs) / 2**20:.0f}")
            size = runs[0]["adapter_bytes"]
            row.append("" if size is None else f"{size / 2**20:.1f}")
            rows.append(row)
    return markdown_table(head, rows) + "\n"


def _differences(arms: dict[str, dict[float, list[Record]]], domain: str, columns: dict[str, list[str]]) -> str:
    """Every arm against the first, each at its own best rate, with standard errors by document and seed.

    Args:
        arms: arm -> rate -> records; the first arm is the reference.
        domain: what was adapted to.
        columns: heading -> the domains that are compared.
    """
    reference, *rest = arms
    rate = best_rate(arms[reference], domain)
    if rate is None:
        return f"{reference}, which the other arms would be compared with, diverged.\n"
    compared, rows = arms[reference][rate], []
    for arm in rest:
        best = best_rate(arms[arm], domain)
        if best is None:
            rows.append([f"{arm}, diverged", *("" for _ in columns)])
            continue
        found = [paired(arms[arm][best], compared, domains) for domains in columns.values()]
        rows.append([f"{arm}, {best:g}", *("" if d is None else f"{d[0]:+.4f} ({d[1]:.4f})" for d in found)])
    table = markdown_table(["arm, best rate", *columns], rows)
    return f"Loss less that of {reference} at {rate:g} (standard error):\n\n{table}\n"


def _at_equal_learning(
    base: Record, arms: dict[str, dict[float, list[Record]]], domain: str, others: list[str]
) -> str:
    """What every arm forgets more than the first, at each level of learning that the first one's rates reach.

    Only seeds that both arms have at all their rates count: a curve with other seeds at every rate would be none.
    """
    reference, *rest = arms
    best = best_rate(arms[reference], domain)
    own = _of_common_seeds(arms[reference])
    levels = {
        rate: loss
        for rate, runs in (own[0] if own else {}).items()
        if best is not None and rate <= best and (loss := mean_loss(runs, domain)) is not None
    }
    rows = []
    for arm in rest:
        row, both = [arm], _of_common_seeds(arms[reference], arms[arm])
        for rate in levels:
            found = None
            if both and (level := mean_loss(both[0][rate], domain)) is not None:
                runs = at_level(base, both[1], domain, level)
                found = None if runs is None else paired(runs, both[0][rate], others)
            row.append("not reached" if found is None else f"{found[0]:+.4f} ({found[1]:.4f})")
        rows.append(row)
    if not levels or not rows:
        return ""
    table = markdown_table(["arm", *(f"{level:.4f} (rate {rate:g})" for rate, level in levels.items())], rows)
    return (
        f"Forgetting at equal learning: loss on {', '.join(others)} less that of {reference}, at the losses on "
        f"{domain} that its rates reach (standard error; interpolated between rates, below an arm's lowest rate from "
        f"the model without an adapter):\n\n{table}\n"
    )


def _of_common_seeds(*arms: dict[float, list[Record]]) -> list[dict[float, list[Record]]]:
    """Arms with the seeds alone that all of them have at all of their rates."""
    seeds = [{record["trial"]["seed"] for record in runs} for rates in arms for runs in rates.values()]
    common = set.intersection(*seeds)
    return [
        {rate: [record for record in runs if record["trial"]["seed"] in common] for rate, runs in rates.items()}
        for rates in arms
        if common
    ]


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f} %"
