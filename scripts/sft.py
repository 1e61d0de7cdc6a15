#!/usr/bin/env python
"""Fine-tunes a language model on instruction data with TRL.

    scripts/sft.py --config configs/clover_full.yaml [key=value ...]

Keys are those of the configuration file: fields of clover_peft.experiments.training.arguments.JobArguments and of
trl.SFTConfig, and `peft.<field>` for the adapter. Examples:

    scripts/sft.py --config configs/clover_full.yaml model=Qwen/Qwen3-0.6B max_steps=500 merge=true
    scripts/sft.py --config configs/lora.yaml --data my_rows.jsonl peft.r=8 learning_rate=1e-3
    scripts/sft.py --config configs/clover_full.yaml model_init_kwargs.dtype=bfloat16   # loads the base in bfloat16

Several files add up, and one that holds several methods is told which: the CLOVER paper's run of DoRA on Llama-2-7B is

    scripts/sft.py --config configs/protocols/clover.yaml --config configs/models/llama2_7b.yaml method=dora
"""

from __future__ import annotations

import argparse
import dataclasses
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=_keys(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", required=True, action="append", help="a YAML file, as in configs/; again for one on top of it"
    )
    parser.add_argument("--data", help="the same as data=...")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments, dashed = parser.parse_known_intermixed_args()  # --max_steps=1 means max_steps=1
    overrides = dashed + arguments.overrides + ([f"data={arguments.data}"] if arguments.data else [])
    try:
        from clover_peft.experiments.training import arguments as settings
        from clover_peft.experiments.training.run import run

        run(settings.parse(arguments.config, overrides))
    except (ValueError, OSError, ImportError) as error:
        # what a user can put right is said in one sentence; anything else keeps its traceback
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _keys() -> str:
    """The job's own keys, read from their file alone: importing the package would take seconds."""
    job = runpy.run_path(str(ROOT / "clover_peft" / "experiments" / "training" / "job_arguments.py"))["JobArguments"]
    lines = [f"  {key.name:<18}{key.metadata['help']}" for key in dataclasses.fields(job)]
    return "\n".join(["keys of the job (any other is one of trl.SFTConfig, or peft.<field>):", *lines])


if __name__ == "__main__":
    sys.exit(main())
