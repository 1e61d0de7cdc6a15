#!/usr/bin/env python
"""Whether vLLM serves what this package makes: log-probabilities and greedy tokens against transformers, in float32.

    scripts/serving.sh                  # makes vLLM's environment and runs this in it and in this one

Each kind of result is made from SmolLM2 and saved. vLLM continues prompts greedily in a process of its own, without
`clover_peft`. Transformers reads the same tokens. A kind is served if no log-probability differs by more than 1e-3,
and no new token is less probable by more than that than transformers' first choice. The exit status is 1 if a kind is
not served.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from harness import finish, options, parser, randomise, table
from peft import PeftModel, get_peft_model, save_as_lora
from real_models import smollm2, wikitext2
from tqdm.auto import tqdm

from clover_peft import CloverConfig, convert_to_mla, prune, save_stock
from clover_peft.io import run_record as records

ALLOWED = 1e-3  # the largest difference of a log-probability
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    if n < 2:",
    "Water boils at a temperature of one hundred degrees, and it freezes at",
)
# What vLLM's CPU build needs.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}


@dataclass
class Made:
    """A result to serve.

    Attributes:
        models: name -> the model that transformers runs; "" for the folder's own.
        arguments: of `vllm.LLM`.
        environment: variables of vLLM's process.
        loras: name -> folder of a LoRA, served with the folder's model.
    """

    models: dict[str, Any]
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    loras: dict[str, str] = field(default_factory=dict)


LORA_RANK = 16


def main(argv: Sequence[str] | None = None) -> Path:
    command = parser(__doc__.splitlines()[0], "serving")
    command.add_argument("--server", help="the Python of an environment with vLLM", required=True)
    command.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    command.add_argument("--new-tokens", type=int, default=24)
    command.add_argument("--timeout", type=int, default=900, help="seconds for vLLM, a kind")
    arguments = command.parse_args(argv)
    environment, versions = records.environment(), _versions(arguments.server)
    if CALIBRATED.intersection(arguments.kinds):
        wikitext2("train")  # raises now rather than after an hour where there is none
    figures = {}
    for name in tqdm(arguments.kinds, desc="kinds", unit="kind"):
        with tempfile.TemporaryDirectory() as folder:
            figures[name] = _compare(KINDS[name], Path(folder), arguments)
        print(f"{name}: {figures[name]}", flush=True)
    rows = [
        (name, *("" if f[key] is None else f"{f[key]:.1e}" for key in ("difference", "lead")), f["outcome"])
        for name, f in figures.items()
    ]
    print(table(["result", "log-probabilities differ by", "another token leads by", "outcome"], rows))
    return finish(
        arguments.out,
        {
            "benchmark": "serving",
            "options": options(arguments),
            "environment": environment,
            "server": versions,
            "allowed": ALLOWED,
            "figures": figures,
        },
    )


def _compare(make: Callable[[Any, Any, Path], Made], folder: Path, arguments: Any) -> dict[str, Any]:
    model, tokenizer = smollm2()
    model = model.float().eval()
    tokenizer.save_pretrained(folder / "model")
    made = make(model, tokenizer, folder)
    prompts = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    question = {
        "folder": str(folder / "model"),
        "prompts": prompts,
        "new_tokens": arguments.new_tokens,
        "arguments": {"max_model_len": 256, **made.arguments},
        "loras": made.loras,
        "lora_rank": LORA_RANK,
    }
    (folder / "question.json").write_text(json.dumps(question))
    script = Path(__file__).with_name("serving_vllm.py")
    try:
        done = subprocess.run(
            [arguments.server, str(script), str(folder / "question.json"), str(folder / "answer.json")],
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | ENVIRONMENT | made.environment,
            capture_output=True,
            text=True,
            timeout=arguments.timeout,
        )
    except subprocess.TimeoutExpired:
        return {"difference": None, "lead": None, "outcome": "failed: timeout"}
    if done.returncode:
        lines = (done.stdout + done.stderr).splitlines()
        causes = [line for line in lines if re.search(r"Error: (?!Engine|EngineCore)", line)] or lines[-1:]
        return {"difference": None, "lead": None, "outcome": f"failed: {causes[-1].strip()[-300:]}"}
    found = json.loads((folder / "answer.json").read_text())
    pairs = [
        _compared(made.models[name], prompt, answer)
        for name, answers in found.items()
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    difference, lead = torch.tensor(pairs).amax(0).tolist()  # NaN if one is
    outcome = "served" if all(value <= ALLOWED for pair in pairs for value in pair) else "wrong"
    return {"difference": difference, "lead": lead, "outcome": outcome}


@torch.no_grad()
def _compared(model: Any, prompt: list[int], answer: dict[str, Any]) -> tuple[float, float]:
    """The largest difference of a log-probability, and by how much transformers prefers another new token."""
    ids, new = torch.tensor([[*prompt, *answer["tokens"]]]), len(answer["tokens"])
    scores = model(input_ids=ids).logits[0, :-1].float().log_softmax(-1)
    ours = scores.gather(1, ids[0, 1:, None])[:, 0]
    theirs = torch.tensor(answer["logprobs"])
    lead = scores[-new:].amax(-1) - ours[-new:]
    return float((ours[-len(theirs) :] - theirs).abs().max()), float(lead.max())


def _versions(server: str) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json; "
        "print(json.dumps({n: m.version(n) for n in ('vllm-cpu', 'torch', 'transformers')}))"
    )
    done = subprocess.run([server, "-c", code], capture_output=True, text=True, check=True)
    versions: dict[str, str] = json.loads(done.stdout)
    return versions


# ---------------------------------------------------------------------- the kinds of results


def _base(model: Any, tokenizer: Any, folder: Path) -> Made:
    model.save_pretrained(folder / "model")
    return Made({"": model})


def _adapter(model: Any, seed: int, name: str = "default") -> PeftModel:
    """The model with a CLOVER adapter that changes its predictions."""
    adapted = get_peft_model(model, CloverConfig(), adapter_name=name)
    randomise(adapted, seed, std=0.02)
    return adapted.eval()


def _merged(model: Any, tokenizer: Any, folder: Path) -> Made:
    merged: Any = _adapter(model, 0).merge_and_unload()
    merged.save_pretrained(folder / "model")
    return Made({"": merged})


def _loras(model: Any, tokenizer: Any, folder: Path) -> Made:
    """Two adapters as LoRAs, served at once."""
    model.save_pretrained(folder / "model")
    made = Made({})
    for name, seed in {"first": 0, "second": 1}.items():
        base, _ = smollm2()
        save_as_lora(str(folder / name), _adapter(base.float(), seed), rank=LORA_RANK)
        base, _ = smollm2()
        made.models[name] = PeftModel.from_pretrained(base.float(), folder / name).eval()
        made.loras[name] = str(folder / name)
    return made


def _latent(model: Any, tokenizer: Any, folder: Path, share: float | None = None) -> Made:
    """Latent attention with a third of the cache, its heads made narrower by `share`."""
    batches = _calibration(tokenizer)
    converted, report = convert_to_mla(model, batches, cache_reduction=0.6875)
    if share is not None:
        # vLLM's kernels know some widths of keys; these are a rotary key of 64 and a multiple of 16.
        prune(converted, share, calibration=batches, ranks="uniform", multiple=16)
    converted.save_pretrained(folder / "model")
    # The native class takes every list of frequencies for YaRN. It has no biases either; this model has none.
    native = report.rope_type == "default"
    # Its kernel for the norm misreads the latent on a CPU.
    arguments: dict[str, Any] = {"compilation_config": {"custom_ops": ["none"]}}
    return Made({"": converted}, arguments if native else {"model_impl": "transformers"}, {"VLLM_MLA_DISABLE": "1"})


def _narrow_values(model: Any, tokenizer: Any, folder: Path) -> Made:
    """A quarter of the value dimensions removed, in a stock class with the keys that vLLM's class reads."""
    prune(model, {"vo": 0.25}, calibration=_calibration(tokenizer), ranks="uniform")
    save_stock(model, folder / "stock", hub_keys=True)
    for file in (folder / "stock").iterdir():
        file.rename(folder / "model" / file.name)
    return Made({"": model})


def _calibration(tokenizer: Any) -> list[dict[str, Any]]:
    ids = tokenizer("\n\n".join(wikitext2("train")[:4000]), return_tensors="pt", verbose=False)["input_ids"][0]
    return [{"input_ids": window[None]} for window in ids[: 24 * 512].split(512)]


KINDS: dict[str, Callable[[Any, Any, Path], Made]] = {
    "the base model": _base,
    "merged adapter": _merged,
    "two LoRAs exported from adapters": _loras,
    "latent attention": _latent,
    "latent attention, heads halved": partial(_latent, share=0.5),
    "narrow values, MiMo class": _narrow_values,
}
CALIBRATED = {name for name in KINDS if "latent" in name or "narrow" in name}  # need WikiText-2


def all_served(record: Path) -> bool:
    """Whether every kind of a record is served."""
    figures = json.loads(record.read_text(encoding="utf-8"))["figures"]
    return all(found["outcome"] == "served" for found in figures.values())


if __name__ == "__main__":
    sys.exit(0 if all_served(main()) else 1)
