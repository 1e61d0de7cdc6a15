#!/usr/bin/env python
"""Fine-tunes a language model on instruction data with TRL.

    scripts/sft.py --config configs/clover_full.yaml [key=value ...]

Keys are those of the configuration file: fields of clover_peft.training.arguments.JobArguments and of trl.SFTConfig,
and `peft.<field>` for the adapter. Examples:

    scripts/sft.py --config configs/clover_full.yaml model=Qwen/Qwen3-0.6B max_steps=500 merge=true
    scripts/sft.py --config configs/lora.yaml --data my_rows.jsonl peft.r=8 learning_rate=1e-3
"""

from __future__ import annotations

import argparse
import sys


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, as in configs/")
    parser.add_argument("--data", help="the same as data=...")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    overrides = arguments.overrides + ([f"data={arguments.data}"] if arguments.data else [])
    try:
        from clover_peft.training import arguments as settings
        from clover_peft.training.run import run

        run(settings.parse(arguments.config, overrides))
    except (ValueError, OSError) as error:
        # what a user can put right is said in one sentence; anything else keeps its traceback
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
