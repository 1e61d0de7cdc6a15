"""What the tests of trainers share."""

from __future__ import annotations

from pathlib import Path

import transformers as hf


def settings(folder: Path, **more) -> dict:
    """Arguments of a run of three steps on a CPU."""
    return {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **more,
    }


class StopAfter(hf.TrainerCallback):
    """A kill that comes at a known step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or state.global_step >= self.step
        return control
