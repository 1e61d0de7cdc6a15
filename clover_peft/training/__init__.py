"""Supervised fine-tuning with TRL: one job, any peft method, a record of every run.

Needs the `train` extra (`pip install "clover-peft[train]"`); the rest of the package never imports this.
"""
