#!/usr/bin/env python
"""Makes the attention heads of a model narrower along their singular directions, and saves it like any model.

    python scripts/prune.py my-model --ratio vo=0.25 --ranks layer --calibration text.txt.gz --out my-model-pruned
    python scripts/prune.py openai-community/gpt2 --ratio qk=0.5,vo=0.25 --ranks layer --multiple 8 \\
        --calibration Salesforce/wikitext:wikitext-2-raw-v1 --out gpt2-pruned

Without --calibration directions are chosen by weights alone, which is far worse. The folder holds the model in its own
dtype, its tokenizer or processor, pruning.json (the ranks of all heads), pruning.png and a README.md. Load it with
`from_pretrained` after `import clover_peft`; of DeepSeek-V2 and V3 under uniform ranks, without. scripts/spectra.py
suggests ratios.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path
from typing import Any

import torch

from clover_peft import PruningReport, prune
from clover_peft.io.figures import find_pyplot
from clover_peft.io.hub_models import find_model, load_as_saved
from clover_peft.pruning import options
from clover_peft.pruning.card import needs_import, write_card
from clover_peft.pruning.rule import SPREADS, check_figures


def main(arguments: list[str] | None = None) -> int:
    given = _parser().parse_args(arguments)
    try:
        model, report = _run(given)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(report.summary())
    for kind, reason in report.skipped.items():
        print(f"{kind}: not pruned, {reason}")
    how = "after `import clover_peft`" if needs_import(model) else "with stock transformers"
    print(f"{given.out}: {report.seconds:.1f} s; load it {how}")
    if report.masked:
        print("masked: directions are zeroed and no size is changed, for analysis")
    return 0


def _run(given: argparse.Namespace) -> tuple[Any, PruningReport]:
    out: Path = given.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out {out}: expected a new or empty folder, found files; choose another")
    if given.ranks is not None and given.ratio is None:
        raise ValueError(f"--ranks {given.ranks}: expected --ratio with it, which it spreads, found none")
    figures = {name: options.figures(f"--{name}", getattr(given, name)) for name in ("ratio", "threshold", "energy")}
    check_figures(figures)
    if given.ranks == "gradient" and given.calibration is None:
        raise ValueError("--ranks gradient: expected --calibration with it, found none")
    if not given.no_pictures:
        find_pyplot()
    source = find_model(given.model)
    model, processor = load_as_saved(source)
    if getattr(model, "is_quantized", False):
        raise ValueError(f"{source.name}: expected weights that are not quantised, found some; prune before that")
    batches, data = options.calibration(given, model, processor)
    report = prune(
        model,
        **figures,
        method=given.method,
        calibration=batches,
        ranks=given.ranks or "global",
        multiple=given.multiple,
        masked=given.masked,
        target_modules=options.target_modules(given),
    )
    _check_loads(model, given.masked)
    model.save_pretrained(out)
    if processor is not None:
        processor.save_pretrained(out)
    report.save(out / "pruning.json")
    if not given.no_pictures:
        report.plot(out / "pruning.png")
    write_card(out, model, report, source.name, source.license, data)
    return model, report


def _check_loads(model: Any, masked: bool) -> None:
    """Raises ValueError if the model's class would not make all tensors, with their shapes, from its configuration."""
    with torch.device("meta"):
        made = {name: tensor.shape for name, tensor in type(model)(copy.deepcopy(model.config)).state_dict().items()}
    for name, tensor in model.state_dict().items():
        if made.get(name) == tensor.shape:
            continue
        if masked:
            raise ValueError(
                f"--masked: {name} holds the mean of what was removed, and {type(model).__name__} has no such bias, "
                "so that the folder would not load as it is; leave --masked out, or mask in Python"
            )
        found = "none" if name not in made else list(made[name])
        raise ValueError(
            f"{name}: expected a tensor of shape {list(tensor.shape)} when the folder is loaded, found {found}; the "
            "model was not saved, please report this with the command"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or hub name")
    rule = parser.add_mutually_exclusive_group(required=True)
    rule.add_argument("--ratio", help="share of directions to remove: 0.5, or by kind qk=0.5,vo=0.25")
    rule.add_argument("--threshold", help="smallest singular value to keep, in the same form")
    rule.add_argument("--energy", help="share of each head's energy to keep, in the same form")
    parser.add_argument(
        "--ranks",
        choices=SPREADS,
        help="how --ratio is spread: one threshold over all heads, which pads them (the default); one rank for all "
        "heads of a layer, by values relative to the layer's or weighed by gradients (best for language models, needs "
        "--calibration); or the same rank everywhere",
    )
    parser.add_argument("--method", choices=["clover", "vanilla"], default="clover", help="vanilla drops coordinates")
    parser.add_argument("--multiple", type=int, default=1, help="round ranks to multiples of this; kernels like 8")
    options.add_calibration(parser)
    parser.add_argument(
        "--masked", action="store_true", help="zero directions and keep all sizes: for analysis, nothing gets smaller"
    )
    parser.add_argument("--no-pictures", action="store_true", help="leave out pruning.png, which needs matplotlib")
    parser.add_argument("--out", type=Path, required=True, help="folder to write, new or empty")
    return parser


if __name__ == "__main__":
    sys.exit(main())
