#!/usr/bin/env python
"""Whether a change made a benchmark slower: runs it at two revisions, turn by turn, and compares figure by figure.

    python benchmarks/compare_revisions.py --base v0.1.0 --figures clover -- train_step --methods --rounds 5
    python benchmarks/compare_revisions.py --base v0.1.0 --figures clover -- decode --batch-sizes 1 --rounds 5

Everything after `--` is the benchmark and its own options; it also gets this command's --seed, --device and --fast.
Each round runs it once at either revision, in a process of its own, and gives one ratio a figure, now over before:
what slows a whole round down cancels. A figure is worse where the 95 % interval of the median ratio lies above 1.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import finish, interval, measured, options, parser, ratios, table, told
from tqdm.auto import tqdm

from clover_peft.io.run_record import environment

ROOT = Path(__file__).resolve().parents[1]


def main(argv: Sequence[str] | None = None) -> Path:
    given = list(sys.argv[1:] if argv is None else argv)
    own, benchmark = (given[: given.index("--")], given[given.index("--") + 1 :]) if "--" in given else (given, [])
    command = parser(__doc__.splitlines()[0], "compare_revisions")
    command.add_argument("--base", required=True, help="the revision to compare with: anything that git understands")
    command.add_argument("--rounds", type=int, default=7)
    command.add_argument("--figures", default="", help="compare figures whose path contains this")
    arguments = command.parse_args(own)
    if not benchmark or not (ROOT / "benchmarks" / f"{benchmark[0]}.py").is_file():
        command.error(f"expected a benchmark after --, such as `-- train_step --rounds 5`, found {benchmark}")
    name, *rest = benchmark
    benchmark = [name, "--seed", str(arguments.seed), "--device", arguments.device, *rest]
    if arguments.fast:
        benchmark.append("--fast")
    described, revision = environment(), _git("rev-parse", f"{arguments.base}^{{commit}}")
    found: dict[str, dict[str, list[float]]] = {"now": {}, "before": {}}
    with tempfile.TemporaryDirectory() as folder, _checkout(revision, Path(folder) / "before") as before:
        places = {"now": ROOT, "before": before}
        for number in tqdm(range(arguments.rounds), desc="rounds", unit="round"):
            for name in ("now", "before") if number % 2 else ("before", "now"):
                record = _run(places[name], benchmark, Path(folder) / f"{name}-{number}.json")
                for path, value in _chosen(record, arguments.figures):
                    found[name].setdefault(path, []).append(value)
    compared = {}
    for path, values in found["now"].items():
        earlier = found["before"].get(path, [])
        if len(earlier) == len(values) and all(value > 0 for value in earlier):
            compared[path] = {
                "now": values,
                "before": earlier,
                **measured("now_v_before", ratios(values, earlier)),
                "worse": interval(ratios(values, earlier))[0] > 1,
            }
    rows = [
        (path, told(figure, "now_v_before"), "worse" if figure["worse"] else "") for path, figure in compared.items()
    ]
    print(table(("figure", "now / before", ""), rows))
    return finish(
        arguments.out,
        {
            "benchmark": "compare_revisions",
            "options": options(arguments) | {"compared": benchmark},
            "environment": described,
            "base_revision": revision,
            "figures": compared,
        },
    )


@contextmanager
def _checkout(revision: str, folder: Path) -> Iterator[Path]:
    _git("worktree", "add", "--detach", str(folder), revision)
    try:
        yield folder
    finally:
        _git("worktree", "remove", "--force", str(folder))


def _run(root: Path, benchmark: Sequence[str], out: Path) -> dict[str, Any]:
    name, *rest = benchmark
    command = [sys.executable, str(root / "benchmarks" / f"{name}.py"), *rest, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(root)})
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: failed\n{done.stderr.strip()}")
    return dict(json.loads(out.read_text(encoding="utf-8")))


def _chosen(record: Mapping[str, Any], part: str) -> list[tuple[str, float]]:
    """The figures of a record whose path contains a part."""
    name = record["benchmark"]
    if "figures" not in record:
        raise SystemExit(f"{name}: expected a record with `figures`, found none; it cannot be compared")
    found = list(_numbers(record["figures"]))
    chosen = [(path, value) for path, value in found if part in path]
    if not chosen:
        paths = ", ".join(path for path, _ in found)
        raise SystemExit(f"--figures {part}: expected a part of a figure's path in {name}, found none in: {paths}")
    return chosen


def _numbers(figures: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Ratios and times among figures, by their paths."""
    for key, value in figures.items():
        where = f"{path}/{key}".removeprefix("/")
        if isinstance(value, Mapping):
            yield from _numbers(value, where)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and "parameters" not in key:
            yield where, float(value)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    main()
