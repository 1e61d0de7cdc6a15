"""Supervised fine-tuning with TRL: one job, any peft method, a record of every run.

Needs the `train` extra (`pip install "clover-peft[train]"`); in the package only `experiments.ablation` and the
command line import this.
"""

from importlib.util import find_spec

if missing := [name for name in ("trl", "datasets") if find_spec(name) is None]:
    raise ImportError(
        f'clover_peft.experiments.training: expected {missing[0]}, found none; pip install "clover-peft[train]"'
    )
