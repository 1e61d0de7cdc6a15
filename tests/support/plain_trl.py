"""A training script as TRL's users write it, for `accelerate launch`: no word of processes or of sharding.

plain_trl.py MODEL DATA OUT BATCH [ADAPTER]
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from clover_peft import CloverConfig

if __name__ == "__main__":
    name, data, out, batch, *adapter = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter[0], is_trainable=True)
    else:
        model = get_peft_model(model, CloverConfig(task_type="CAUSAL_LM"))
    rows = load_dataset("json", data_files=data, split="train")
    rows = rows.map(lambda row: {"prompt": row["instruction"], "completion": row["output"]})
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            out,
            per_device_train_batch_size=int(batch),
            max_steps=3,
            learning_rate=2e-3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu="ACCELERATE_TORCH_DEVICE" not in os.environ,  # set where a CPU stands for an accelerator
            seed=0,
        ),
        train_dataset=rows.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
    )
    trainer.train()
    trainer.save_model(out)
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        Path(out, "losses.json").write_text(json.dumps(losses))
    trainer.accelerator.end_training()
