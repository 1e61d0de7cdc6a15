"""Fine-tunes a model with CLOVER and TRL, then loads the adapter again.

    python examples/finetune_with_trl.py --out my-adapter
    python examples/finetune_with_trl.py --model my-model --steps 200 --out my-adapter

Needs the extra: pip install -e ".[train]"
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from trl import SFTConfig, SFTTrainer

import clover_peft


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="folder or hub name")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", default="my-adapter", help="folder for the adapter")
    given = parser.parse_args(arguments)

    rows = [
        {"prompt": f"Is {n} more than {n % 7}? ", "completion": f"the correct answer is {str(n > n % 7).lower()}"}
        for n in range(200)
    ]
    trainer = SFTTrainer(
        model=given.model,
        args=SFTConfig(
            learning_rate=2e-3,
            max_steps=given.steps,
            per_device_train_batch_size=4,
            logging_steps=5,
            bf16=torch.cuda.is_available(),
            report_to="none",
            output_dir=f"{given.out}-run",
        ),
        train_dataset=Dataset.from_list(rows),
        peft_config=clover_peft.CloverConfig(),
    )
    trainer.train()
    trainer.save_model(given.out)

    model = AutoPeftModelForCausalLM.from_pretrained(given.out)
    model.print_trainable_parameters()
    print(f"saved and loaded: {given.out}")


if __name__ == "__main__":
    main()
