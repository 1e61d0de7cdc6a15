"""Where the time of a fine-tuning step goes: TRL's SFTTrainer with CLOVER and with LoRA, part by part.

    python benchmarks/sft_profile.py                     # SmolLM2-135M-Instruct
    python benchmarks/sft_profile.py --model llama       # Llama-2-7B's layers with random weights, two of them

Rows are random tokens of one length, so that no step pads. Forward time is what torch's profiler counts in a module
but in no module below it: "adapter" is a tuner's layer without the projection in it, "attention" and "activation" what
an attention or MLP block does apart from its projections. An operation of the backward pass counts where its forward
operation did. "elsewhere" is what belongs to no module: loss, clipping, the trainer itself. LoRA has the rank with as
many trainable parameters as CLOVER, on q, k, v, up and down. On CUDA the figures are of the device.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from harness import PAPER_LORA_TARGETS, finish, options, parser, rank_for, table, trainable
from peft import LoraConfig, PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from real_models import smollm2
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import SFTConfig, SFTTrainer

from clover_peft import CloverConfig
from clover_peft.io import run_record as records

PARTS = ("projections", "adapter", "attention", "activation", "norms", "optimizer", "elsewhere")
PREFIX = "part: "


def main(argv: Sequence[str] | None = None) -> Path:
    arguments = _arguments(argv)
    environment = records.environment()
    model = _model(arguments)
    budget = trainable(get_peft_model(model, CloverConfig()).base_model)
    model = _model(arguments)
    rank = rank_for(budget, model, PAPER_LORA_TARGETS)
    configs: dict[str, PeftConfig] = {
        "clover": CloverConfig(),
        "lora": LoraConfig(r=rank, lora_alpha=rank, target_modules=list(PAPER_LORA_TARGETS)),
    }
    found: dict[str, dict[str, Any]] = {}
    for name, config in configs.items():
        found[name] = _profiled(get_peft_model(_model(arguments), config), arguments)
        gc.collect()
    rows = [
        (part, *(x for f in found.values() for x in (f["milliseconds"][part], f"{f['shares'][part]:.1%}")))
        for part in PARTS
    ]
    rows.append(("all operations", *(x for f in found.values() for x in (sum(f["milliseconds"].values()), ""))))
    print(table(("part", *(x for name in found for x in (f"{name} ms", "share"))), rows))
    return finish(
        arguments.out,
        {
            "benchmark": "sft_profile",
            "options": options(arguments),
            "environment": environment,
            "lora_rank": rank,
            "figures": found,
        },
    )


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    command = parser("Where the time of a fine-tuning step goes", "sft_profile")
    command.add_argument("--model", default="smollm2", choices=["smollm2", "llama"])
    command.add_argument("--batch-size", type=int, default=4)
    command.add_argument("--tokens", type=int, default=256, help="of a row")
    command.add_argument("--steps", type=int, default=3, help="profiled, after one that is not")
    arguments = command.parse_args(argv)
    if arguments.fast:
        arguments.batch_size, arguments.tokens, arguments.steps = 2, 16, 2
    return arguments


def _model(arguments: argparse.Namespace) -> Any:
    torch.manual_seed(arguments.seed)
    if arguments.model == "smollm2" and not arguments.fast:
        return smollm2()[0].to(arguments.device)
    shape = {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "vocab_size": 32000}
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64}
    with torch.device(arguments.device):
        return LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, **(tiny if arguments.fast else shape)))


class _Ranges:
    """Gives the profiler a range for each module that has a part of its own."""

    def __init__(self, model: nn.Module) -> None:
        self.open: list[record_function] = []
        for path, module in model.named_modules():
            if (part := self.part(path, module)) is not None:
                module.register_forward_pre_hook(lambda *_, part=part: self.enter(part))
                module.register_forward_hook(lambda *_: self.leave())

    @staticmethod
    def part(path: str, module: nn.Module) -> str | None:
        name = path.rpartition(".")[2]
        if isinstance(module, BaseTunerLayer):
            return "adapter"
        if isinstance(module, nn.Linear):
            return None if "lora_" in path or name == "lm_head" else "projections"
        if name in ("self_attn", "mlp"):
            return "attention" if name == "self_attn" else "activation"
        return "norms" if "Norm" in type(module).__name__ else None

    def enter(self, part: str) -> None:
        self.open.append(record_function(PREFIX + part))
        self.open[-1].__enter__()

    def leave(self) -> None:
        self.open.pop().__exit__(None, None, None)


class _Profile(TrainerCallback):
    """Profiles all steps but the first."""

    def __init__(self, activities: list[ProfilerActivity]) -> None:
        self.profile = profile(activities=activities)
        self.running = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self.running:
            self.running = True
            self.profile.__enter__()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.profile.__exit__(None, None, None)


def _profiled(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    _Ranges(model)
    cuda = arguments.device.startswith("cuda")
    watch = _Profile([ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else []))
    count = arguments.batch_size * (arguments.steps + 1)
    generator = torch.Generator().manual_seed(arguments.seed)
    rows = torch.randint(3, model.config.vocab_size, (count, arguments.tokens), generator=generator)
    vocabulary = WordLevel({"<pad>": 0, "<eos>": 1}, unk_token="<pad>")
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=arguments.steps + 1,
            per_device_train_batch_size=arguments.batch_size,
            max_length=arguments.tokens,
            seed=arguments.seed,
            save_strategy="no",
            report_to="none",
            bf16=cuda,
            gradient_checkpointing=False,
            use_cpu=not cuda,
            dataset_kwargs={"skip_prepare_dataset": True},
        )
        trainer = SFTTrainer(
            model=model,
            args=settings,
            train_dataset=Dataset.from_list([{"input_ids": row.tolist()} for row in rows]),
            processing_class=PreTrainedTokenizerFast(
                tokenizer_object=Tokenizer(vocabulary), pad_token="<pad>", eos_token="<eos>"
            ),
            callbacks=[watch],
        )
        trainer.train()
    milliseconds = _by_part(watch.profile.events(), cuda, arguments.steps)
    total = sum(milliseconds.values())
    shares = {part: value / total for part, value in milliseconds.items()}
    return {"trainable_parameters": trainable(model), "milliseconds": milliseconds, "shares": shares}


def _by_part(events: Any, cuda: bool, steps: int) -> dict[str, float]:
    """Milliseconds a step: of every operation its own time, at the part it belongs to."""
    forward: dict[int, str] = {}  # number of an operation that autograd recorded -> its part
    found: defaultdict[str, float] = defaultdict(float)
    waiting: list[tuple[int, float]] = []  # of the backward pass
    for event in events:
        if event.device_type != DeviceType.CPU:  # a kernel, whose time its operation has, or a range around kernels
            continue
        own = (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1000 / steps
        part, number = None, -1
        parent = event
        while parent is not None and part is None and number < 0:
            if parent.name.startswith(PREFIX):
                part = parent.name.removeprefix(PREFIX)
            elif parent.name.startswith("Optimizer.step"):
                part = "optimizer"
            elif parent.name.startswith("autograd::engine::evaluate_function"):
                number = parent.sequence_nr
            parent = parent.cpu_parent
        if part is not None and event.sequence_nr >= 0:
            forward[event.sequence_nr] = part
        if number >= 0:
            waiting.append((number, own))
        else:
            found[part or "elsewhere"] += own
    for number, own in waiting:
        found[forward.get(number, "elsewhere")] += own
    return {part: found[part] for part in PARTS}


if __name__ == "__main__":
    main()
