"""Supervised fine-tuning with TRL: one job, any peft method, a record of every run.

Needs the `train` extra; in the package only `experiments.ablation` and the
command line import this.
"""

from importlib.util import find_spec

from ...io import extras

if missing := [name for name in ("trl", "datasets") if find_spec(name) is None]:
    raise ImportError(f"clover_peft.experiments.training: {extras.missing(missing[0])}")
