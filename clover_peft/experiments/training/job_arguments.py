"""The job's own settings; this file imports nothing heavy, so that `--help` can list them at once."""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass
class JobArguments:
    """The settings that `trl.SFTConfig` does not have; the `peft` block is parsed on its own."""

    model: str | None = field(default=None, metadata={"help": "Folder or hub name; by default SmolLM2-135M-Instruct."})
    data: str | None = field(
        default=None,
        metadata={"help": "Folder, .jsonl or .txt file (also .gz) or hub data set; by default commonsense-170k."},
    )
    prompt: str | None = field(
        default=None,
        metadata={"help": "Prompt: chat, clover or llm_adapters; by default chat if the tokenizer has a template."},
    )
    rows: int | None = field(
        default=None, metadata={"help": "Training rows to draw, all if there are fewer; by default all."}
    )
    held_out_rows: int = field(
        default=64, metadata={"help": "Rows set aside, and evaluated before and after training."}
    )
    calibration_rows: int = field(
        default=0,
        metadata={"help": "Training rows whose activations CLOVER's bases are made from; 0: from weights alone."},
    )
    own_text_rows: int = field(
        default=0,
        metadata={"help": "Texts of 256 tokens that the model writes itself, for CLOVER's bases; 0: none."},
    )
    contrast_rows: int = field(
        default=0,
        metadata={"help": "Training rows by which CLOVER's low-rank part starts, against own texts; 0: random."},
    )
    balance_updates: int = field(
        default=0, metadata={"help": "Training batches by which CLOVER's updates are balanced; 0: not balanced."}
    )
    teacher: str | None = field(
        default=None,
        metadata={"help": "Folder or hub name of a model whose predictions are learned too, such as the original."},
    )
    teacher_weight: float = field(
        default=0.5, metadata={"help": "Share of the teacher's predictions in the loss, above 0 and at most 1."}
    )
    teacher_temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the teacher's and the model's predictions."}
    )
    questions: int = field(default=3, metadata={"help": "Held-out questions to answer before and after training."})
    answer_tokens: int = field(default=16, metadata={"help": "Longest answer to a held-out question, in tokens."})
    skip_bad_rows: bool = field(default=False, metadata={"help": "Leave bad rows out instead of stopping."})
    resume: bool = field(default=False, metadata={"help": "Continue from the last checkpoint in output_dir."})
    merge: bool = field(default=False, metadata={"help": "Also save the merged model in output_dir/merged."})

    def __post_init__(self) -> None:
        if not 0 < self.teacher_weight <= 1:
            raise ValueError(f"teacher_weight: expected more than 0 and at most 1, found {self.teacher_weight}")
        if not 0 < self.teacher_temperature < math.inf:
            raise ValueError(f"teacher_temperature: expected a positive number, found {self.teacher_temperature}")
        data = ("held_out_rows", "calibration_rows", "own_text_rows", "contrast_rows", "balance_updates")
        counts = (*data, "questions")
        least = {"rows": 1, "answer_tokens": 1, **dict.fromkeys(counts, 0)}
        for name, number in least.items():
            value = getattr(self, name)
            if value is not None and value < number:
                hint = "; leave it out to train on all" if name == "rows" else ""
                raise ValueError(f"{name}: expected at least {number}, found {value}{hint}")
        if self.calibration_rows and self.own_text_rows:
            raise ValueError(
                "own_text_rows: expected no calibration_rows beside it, because bases are made from one of them, "
                f"found {self.calibration_rows}; leave one of them out"
            )
