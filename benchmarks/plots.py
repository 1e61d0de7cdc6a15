"""The pictures of docs/results, drawn from the records in benchmarks/results.

    python benchmarks/plots.py [RECORD ...]

Of every benchmark it takes the record with the highest number (`decode-3.json` before `decode.json`), of pruning that
of a sweep, unless one is named. Written to docs/images: `step.png` (train_step), `decode.png`, `growth.png` (scaling),
`adapter_io.png`, `start.png` (init_time) and `pruning_<model>.png`; a benchmark without a record is left out. Every
picture says which machine and revision its numbers are of. Needs the extra `plots`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from harness import RESULTS

from clover_peft.io import run_record as records
from clover_peft.io.figures import canvas

IMAGES = Path(__file__).parents[1] / "docs" / "images"
CLOVER, OTHER, LIMIT = "C0", "0.7", "C3"  # colours: ours, the others, what was aimed at
NAMES = {"head_dim": "head size", "hidden_size": "hidden size", "heads": "heads, with the hidden size", "r": "r"}

Record = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> list[Path]:
    """Draws all pictures there are records for, and returns them."""
    arguments = _arguments(argv)
    given = {_name(record): record for record in map(_read, arguments.records)}
    if wrong := sorted(set(given) - set(PICTURES)):
        raise ValueError(f"{wrong[0]}: expected records of {', '.join(PICTURES)}")
    pyplot, save, made = canvas(arguments.out)
    for benchmark, (name, draw) in PICTURES.items():
        record = given.get(benchmark) or newest(arguments.results, benchmark)
        if record is None:
            print(f"{name}.png: no record of {benchmark} in {arguments.results}, left out")
            continue
        figure = draw(pyplot, record)
        figure.suptitle(f"{record['file']}: {_where(record)}", fontsize="small")
        figure.tight_layout()
        save(name, figure)
        print(f"{made[-1]}: {record['file']}")
    return made


def newest(folder: Path, benchmark: str) -> Record | None:
    """The benchmark's record with the highest number in its name, that can be drawn; None if there is none."""
    found = {}
    for path in folder.glob(f"{benchmark}*.json"):
        if match := re.fullmatch(rf"{benchmark}(?:-(\d+))?\.json", path.name):
            found[int(match[1] or 1)] = path
    for _, path in sorted(found.items(), reverse=True):
        record = _read(path)
        if record["options"].get("sweep", True) and not record["options"].get("compile"):
            return record
    return None


def _name(record: Record) -> str:
    """A record's benchmark, as its file is called."""
    benchmark: str = record["benchmark"]
    return f"{benchmark}_{record['options'].get('model')}" if benchmark == "pruning" else benchmark


def _read(path: Path) -> Record:
    return {**records.read_json(path, "name a record that a benchmark has written"), "file": path.name}


def _where(record: Record) -> str:
    environment, options = record["environment"], record["options"]
    revision = (environment["git_revision"] or "no revision")[:8] + ("+" if environment["git_dirty"] else "")
    threads = f"threads {environment['torch_threads']}"
    device = environment["cuda"] if options["device"].startswith("cuda") else f"{environment['cpu']}, {threads}"
    return ", ".join(filter(None, (device, options.get("dtype"), revision)))


def _step(pyplot: Any, record: Record) -> Any:
    figures = {name: found for name, found in record["figures"].items() if name != "frozen base"}
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), sharey=True)
    _bars(left, {name: found["step_v_base"] for name, found in figures.items()}, "{:.2f}", start=1)
    left.set(xlabel="training step, against the frozen base")
    _bars(right, {name: found["saved_over_base_bytes"] / 2**20 for name, found in figures.items()}, "{:.1f}")
    right.set(xlabel="saved activations beyond the frozen base, MiB")
    return figure


def _decode(pyplot: Any, record: Record) -> Any:
    figures, targets = record["figures"], record["targets"]
    figure, grid = pyplot.subplots(1, len(figures) + 1, figsize=(4.5 * (len(figures) + 1), 4))
    for axes, (batch, rows) in zip(grid, figures.items(), strict=False):
        _bars(axes, {n: f["v_base"] for n, f in rows.items() if n not in ("base", "dora")}, "{:.3f}", start=1)
        _limit(axes, targets["clover"])
        # Without its cache it would leave no room for the others.
        axes.set(
            xlabel="token step, against the base", title=f"{batch}; dora not cached: {rows['dora']['v_base']:.1f}"
        )
    switches = {
        f"{name}, {kind}": found["ms_a_layer"]
        for name, both in record["switching"].items()
        for kind, found in both.items()
    }
    _bars(grid[-1], switches, "{:.2f}")
    _limit(grid[-1], targets["switching_ms_a_layer"])
    grid[-1].set(xlabel="ms a layer", title="switching to an adapter")
    return figure


def _growth(pyplot: Any, record: Record) -> Any:
    dimensions = record["dimensions"]
    figure, grid = pyplot.subplots(2, len(dimensions), figsize=(3 * len(dimensions), 5), squeeze=False, sharex="col")
    for column, (dimension, found) in zip(grid.T, dimensions.items(), strict=True):
        sizes = [row["size"] for row in found["rows"]]
        for axes, what in zip(column, ("seconds", "bytes"), strict=True):
            scale, key = {"seconds": (1e3, "extra_seconds"), "bytes": (2**-20, "extra_saved_bytes")}[what]
            values = [row[key] * scale for row in found["rows"]]
            axes.plot([0, *sizes], [0, *(n * values[-1] / sizes[-1] for n in sizes)], "--", color=OTHER)
            axes.plot(sizes, values, "o-", color=CLOVER)
            powers = [p for name, p in found["exponents"].items() if name.endswith(what) and p is not None]
            axes.set_title("exponent " + (" / ".join(f"{p:.2f}" for p in powers) or "none"), fontsize="small")
            axes.set(xlim=(0, None), ylim=(min(0, *values), None))
        axes.set_xlabel(NAMES.get(dimension, dimension))
    grid[0][0].set_ylabel("extra ms a step")
    grid[1][0].set_ylabel("extra saved MiB")
    return figure


def _adapter_io(pyplot: Any, record: Record) -> Any:
    figures = record["figures"]
    texts = {
        "save_v_write": "saving, against writing its bytes",
        "load_v_read": "loading, against reading its bytes",
        "load_low_cpu_v_read": "the same, low_cpu_mem_usage=True",
    }
    figure, grid = pyplot.subplots(1, len(texts), figsize=(12, 3), sharey=True)
    for axes, (key, text) in zip(grid, texts.items(), strict=True):
        axes.set(xscale="linear" if key.startswith("save") else "log", xlabel=text)
        _bars(axes, {name: found[key] for name, found in figures.items()}, "{:.2f}", start=1)
        if key in record["targets"]:
            _limit(axes, record["targets"][key])
    return figure


def _start(pyplot: Any, record: Record) -> Any:
    figure, axes = pyplot.subplots(figsize=(7, 3))
    seconds = {name: found["one_layer"] for name, found in record["figures"].items()}
    axes.set(xscale="log", xlabel="seconds a layer to make the adapter")
    _bars(axes, seconds, "{:.2f}", start=min(seconds.values()) / 10)
    return figure


FIGURES = {  # of pruned models: what is drawn, its name, and the axis
    "whisper": ("jfk_kl", "KL on unseen speech, nats a token", "log"),
    "minilm": ("cosine", "cosine to the unpruned embedding", "linear"),
    "smollm2": ("perplexity", "perplexity on WikiText-2 test", "log"),
}
MOST = 10  # times the unpruned perplexity, that is drawn
KINDS = {(True, False): "Q-K", (False, True): "V-O", (True, True): "Q-K and V-O"}


def _pruning(pyplot: Any, record: Record) -> Any:
    figure_name, label, scale = FIGURES[record["options"]["model"]]
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}  # kind -> name -> share and figure
    for row in record["pruned"]:
        setting = row["setting"]
        shares = {share for share in (setting["qk"], setting["vo"]) if share is not None}
        if len(shares) == 1 and setting["target_modules"] is None:
            kind = KINDS[setting["qk"] is not None, setting["vo"] is not None]
            name = f"{setting['method']}, {'data' if setting['calibrated'] else 'weights'}, {setting['ranks']}"
            curves.setdefault(kind, {}).setdefault(name, []).append((shares.pop(), row["figures"][figure_name]))
    unpruned = record["unpruned"].get(figure_name) if scale == "log" else None
    figure, grid = pyplot.subplots(1, len(curves), figsize=(4 * len(curves) + 1, 4), sharey=True, squeeze=False)
    for axes, (kind, found) in zip(grid[0], curves.items(), strict=True):
        for name, points in found.items():
            if len(points) == 1:  # a target's
                continue
            colour, line = CLOVER if name.startswith("clover") else OTHER, "-" if ", data" in name else ":"
            marker = MARKERS[name.rpartition(" ")[2]]
            above = " (above)" if unpruned and min(value for _, value in points) > MOST * unpruned else ""
            axes.plot(*zip(*sorted(points), strict=True), line, marker=marker, color=colour, label=name + above)
        axes.set(xlabel=f"share of {kind} removed", yscale=scale)
        if unpruned:
            axes.axhline(unpruned, color="black", linewidth=1)
            axes.set_ylim(0.9 * unpruned, MOST * unpruned)
    grid[0][0].set_ylabel(label)
    grid[0][-1].legend(fontsize="x-small")
    return figure


MARKERS = {"global": "o", "gradient": "s", "layer": "^", "uniform": "x"}  # by how ranks are spread
PICTURES: dict[str, tuple[str, Callable[[Any, Record], Any]]] = {
    "train_step": ("step", _step),
    "decode": ("decode", _decode),
    "scaling": ("growth", _growth),
    "adapter_io": ("adapter_io", _adapter_io),
    "init_time": ("start", _start),
    **{f"pruning_{model}": (f"pruning_{model}", _pruning) for model in FIGURES},
}


def _bars(axes: Any, values: dict[str, float], form: str, start: float = 0) -> None:
    """Horizontal bars from `start`, the first on top, with their values; CLOVER's in a colour of their own."""
    colours = [CLOVER if name.startswith("clover") else OTHER for name in values]
    bars = axes.barh(range(len(values)), [value - start for value in values.values()], left=start, color=colours)
    axes.bar_label(bars, [form.format(value) for value in values.values()], padding=3, fontsize="small")
    axes.axvline(start, color="black", linewidth=1)
    axes.set_yticks(range(len(values)), list(values))
    if not axes.yaxis_inverted():  # axes that share it are turned around together
        axes.invert_yaxis()
    axes.margins(x=0.25)


def _limit(axes: Any, target: dict[str, Any]) -> None:
    axes.axvline(target["wanted"], color=LIMIT, linestyle="--", linewidth=1)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    command.add_argument("records", nargs="*", type=Path, help="records to draw instead of the newest")
    command.add_argument("--results", type=Path, default=RESULTS, help="folder of the records")
    command.add_argument("--out", type=Path, default=IMAGES, help="folder for the pictures")
    return command.parse_args(argv)


if __name__ == "__main__":
    main()
