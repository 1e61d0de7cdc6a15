"""Reward by step of GRPO with CLOVER, LoRA and PiSSA on a task whose answers a function checks.

    python benchmarks/grpo.py                          SmolLM2-135M sorts digits
    python benchmarks/grpo.py --steps 200 --prompts 8 --seed 1    on a GPU

An interrupted run goes on after its last whole trial. Each method trains as many parameters, at each of its rates, on
the same prompts in the same order. The reward is the share of the sorted digits that are at their place in the first
line of the answer, or 0 for other characters. Rewards are those of the sampled answers, so they are noisy; "last" is
the mean of the last quarter of the steps. Papers report that PiSSA, which trains the leading singular directions,
collapses under such rewards (arXiv 2512.23165).
"""

from __future__ import annotations

import copy
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import real_models
import torch
from datasets import Dataset
from harness import Rows, options, parser, rank_for, table, trainable
from peft import LoraConfig, PeftConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from clover_peft import CloverConfig
from clover_peft.io import run_record as records

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]
_SHARED = ("fast", "seed", "device", "steps", "prompts", "answers", "digits")  # options of all trials
EXAMPLES = "312 -> 123\n95 -> 59\n4706 -> 0467\n"


def main(argv: Sequence[str] | None = None) -> Path:
    command = parser(__doc__.splitlines()[0], "grpo")
    command.add_argument(
        "--methods", nargs="+", choices=["clover", "lora", "pissa"], default=["clover", "lora", "pissa"]
    )
    command.add_argument("--clover-rates", type=float, nargs="+", default=[1e-3, 2.5e-3, 5e-3])
    command.add_argument("--lora-rates", type=float, nargs="+", default=[2e-4, 5e-4, 1e-3], help="also PiSSA's")
    command.add_argument("--steps", type=int, default=40)
    command.add_argument("--prompts", type=int, default=2, help="in each step")
    command.add_argument("--answers", type=int, default=8, help="to each prompt, compared with each other")
    command.add_argument("--digits", type=int, default=4)
    arguments = command.parse_args(argv)
    if arguments.fast:
        arguments.steps, arguments.answers = 3, 4
    environment = records.environment()
    base, tokenizer = _tiny() if arguments.fast else real_models.smollm2()
    configs = _configs(base, arguments.methods)
    trials = [
        (method, rate)
        for method in configs
        for rate in (arguments.clover_rates if method == "clover" else arguments.lora_rates)
    ]
    same = {name: getattr(arguments, name) for name in _SHARED}
    kept = Rows(arguments.out, same)

    def measure(method: str, rate: float) -> dict[str, Any]:
        torch.manual_seed(arguments.seed)
        model = get_peft_model(copy.deepcopy(base), copy.deepcopy(configs[method]))
        return {"parameters": trainable(model), **_train(model, tokenizer, rate, arguments)}

    results = [
        kept.get(partial(measure, method, rate), method=method, rate=rate)
        for method, rate in tqdm(trials, desc="trials", unit="trial")
    ]
    columns = ["method", "rate", "first", "last", "best step"]
    rows = [[r["method"], f"{r['rate']:g}", r["first"], r["last"], max(r["reward"])] for r in results]
    print(table(columns, rows))
    record = {"benchmark": "grpo", "options": options(arguments), "environment": environment, "results": results}
    return kept.finish(record, arguments.out)


def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
    """The share of the digits that are at their place; surplus and missing characters count as misplaced."""
    return [
        _share(completion.strip(" ").split("\n")[0], right)
        for completion, right in zip(completions, answer, strict=True)
    ]


def _share(found: str, right: str) -> float:
    if not found.isdigit():
        return 0.0
    return sum(a == b for a, b in zip(found, right, strict=False)) / max(len(found), len(right))


def _train(model: Any, tokenizer: Any, rate: float, arguments: Any) -> dict[str, Any]:
    """Rewards, lengths of answers and gradient norms by step."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder,
            learning_rate=rate,
            lr_scheduler_type="constant_with_warmup",
            warmup_steps=min(5, arguments.steps - 1),
            max_steps=arguments.steps,
            per_device_train_batch_size=arguments.prompts * arguments.answers,
            num_generations=arguments.answers,
            max_completion_length=arguments.digits + 2,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=arguments.device == "cpu",
            seed=arguments.seed,
        )
        rows = _rows(arguments.steps * arguments.prompts, arguments.digits, arguments.seed)
        trainer = GRPOTrainer(
            model=model, reward_funcs=reward, args=settings, train_dataset=rows, processing_class=tokenizer
        )
        trainer.pop_callback(PrinterCallback)  # it would print each step among the bars
        trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    rewards = [entry["reward"] for entry in log]
    quarter = max(1, len(rewards) // 4)
    return {
        "first": statistics.mean(rewards[:quarter]),
        "last": statistics.mean(rewards[-quarter:]),
        "reward": rewards,
        "length": [entry["completions/mean_length"] for entry in log],
        "gradient_norm": [entry["grad_norm"] for entry in log],
        "seconds": time.perf_counter() - start,
    }


def _configs(base: Any, methods: Sequence[str]) -> dict[str, PeftConfig]:
    """The methods' configurations, at equal numbers of parameters."""
    clover = CloverConfig(task_type="CAUSAL_LM")
    rank = rank_for(trainable(get_peft_model(copy.deepcopy(base), copy.deepcopy(clover))), base, LORA_TARGETS)
    same: dict[str, Any] = dict(r=rank, target_modules=LORA_TARGETS, task_type="CAUSAL_LM")
    niter: Any = "pissa_niter_16"  # peft's annotation names no number
    known = {
        "clover": clover,
        "lora": LoraConfig(lora_alpha=2 * rank, **same),
        "pissa": LoraConfig(lora_alpha=rank, init_lora_weights=niter, **same),
    }
    return {name: known[name] for name in methods}


def _rows(count: int, digits: int, seed: int) -> Dataset:
    draw = random.Random(seed)
    numbers = ["".join(draw.choices("0123456789", k=digits)) for _ in range(count)]
    rows = [{"prompt": f"{EXAMPLES}{number} ->", "answer": "".join(sorted(number))} for number in numbers]
    return Dataset.from_list(rows)


def _tiny() -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """A random Llama that knows the characters of the task."""
    vocabulary = {character: i for i, character in enumerate(["<end>", *sorted({*EXAMPLES, *"0123456789"})])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    config = LlamaConfig(vocab_size=len(vocabulary), num_key_value_heads=2, eos_token_id=0, bos_token_id=0, **sizes)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")
    return LlamaForCausalLM(config), fast


if __name__ == "__main__":
    main()
