"""`clover prepare-data`: builds the commonsense suite's rows."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

from ..experiments.commonsense import prepare, sources
from . import checks, parsers
from .errors import reports_errors

_MISSING = {"wheel": ", without WinoGrande's debiased rows, and without HellaSwag's section tags in training"}


@reports_errors()
def run(given: argparse.Namespace) -> int:
    checks.prepare_data(given)
    chosen = prepare.Options(**{field.name: getattr(given, field.name) for field in fields(prepare.Options)})
    suite = prepare.read(chosen)
    if given.compare is not None:
        _show_comparison(suite, given.compare)
    prepare.clean(suite, chosen)
    record = prepare.write(suite, given.out, asdict(chosen))
    print(f"source: {record['source']}{_MISSING.get(record['source'], '')}")
    for what, counts in record["left_out"].items():
        taken = ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "none"
        print(f"left out, {what}: {taken}")
    for name, described in record["files"].items():
        print(f"{given.out / name}: {described['rows']:,} rows")
    return 0


def _show_comparison(suite: prepare.Suite, reference: Path) -> None:
    for split, rows in (("train", suite.train), ("test", suite.test)):
        for name, found in prepare.compare(rows, sources.from_folder(reference, split, rows)).items():
            if name not in rows:
                continue
            same = found["equal"] == found["rows"] == found["reference_rows"]
            print(
                f"{split} {name}: {found['equal']:,} of {found['reference_rows']:,} rows equal"
                + ("" if same else f" ({found['rows']:,} found)")
            )
            if found["difference"]:
                print(f"  found     ...{found['difference']['found']!r}")
                print(f"  reference ...{found['difference']['reference']!r}")


def main(arguments: Sequence[str] | None = None) -> int:
    return run(parsers.prepare_data(arguments))
