"""Runs code where `clover_peft` cannot be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

_START = "import sys; sys.modules['clover_peft'] = None\nimport torch, transformers\n"
# Logits of rows of ids, the tokens that follow them with and without a cache, and the bytes of the cache.
_ANSWER = """
model = transformers.AutoModelForCausalLM.from_pretrained({folder!r}, dtype="auto").eval()
ids = torch.load({folder!r} + "-ids.pt")
with torch.no_grad():
    out = model(input_ids=ids, use_cache=True)
cache = out["past_key_values" if "past_key_values" in out else "cache"]
size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
same = dict(max_new_tokens=8, min_new_tokens=8, do_sample=False, pad_token_id=0)
tokens = torch.cat([model.generate(input_ids=ids, use_cache=cached, **same) for cached in (True, False)])
found = dict(logits=out.logits, tokens=tokens, cache=size, kind=type(model).__name__)
torch.save(found, {folder!r} + "-answer.pt")
"""


def without_clover(code: str) -> None:
    """Run code in a process that cannot import `clover_peft`."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _START + code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def stock_answers(folders: list[Path], ids: Tensor) -> list[dict]:
    """What the models in folders answer in a process that cannot import `clover_peft`."""
    for folder in folders:
        torch.save(ids, f"{folder}-ids.pt")
    without_clover("".join(_ANSWER.format(folder=str(folder)) for folder in folders))
    return [torch.load(f"{folder}-answer.pt") for folder in folders]
