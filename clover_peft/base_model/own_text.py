"""`own_text`: text that a language model writes, for statistics where no other text is at hand.

`generate_plainly` generates by a call's arguments alone.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig

from ..io.text_windows import longest_window
from .activations import evaluating

_LENGTH = 256  # tokens of a row


@torch.no_grad()
def own_text(
    model: Any, *, rows: int = 24, length: int | None = None, batch_size: int = 24, seed: int = 0
) -> list[dict[str, Tensor]]:
    """Text that a causal language model writes by itself, as batches for `initialize_from_activations` (ours).

    Every row starts with a random token of the vocabulary; all further ones are drawn from the model's whole
    distribution, at temperature 1, whatever the model's own generation config says. A row goes on after an end of
    text. Such text needs no data, and statistics of it describe what the model knows before it is trained.

    Args:
        model: a causal language model of transformers, or peft's around one. Its active adapters take part.
        rows: texts.
        length: tokens of each, more than 1 and at most as many as the model has positions; by default 256, or all of
            these if they are fewer.
        batch_size: rows that are written at a time.
        seed: of the random numbers. The global generators are left as they are.

    Returns:
        Batches of `{"input_ids": (rows, length) int64}`.

    Raises:
        ValueError: if the model cannot write text from text alone, or a number is too small or too large.
    """
    can_generate = getattr(model, "can_generate", lambda: False)()
    if not can_generate or getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(
            f"expected a causal language model, found {type(model).__name__}, which writes no text by itself; pass "
            "batches of real data instead"
        )
    most = longest_window(model, None)
    length = min(_LENGTH, most or _LENGTH) if length is None else length
    for name, value, least in (("rows", rows, 1), ("length", length, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, found {value}")
    if most is not None and length > most:
        raise ValueError(f"length: expected at most the {most} positions of the model, found {length}")
    device = next(model.parameters()).device
    words = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(words, (rows, 1), generator=generator)
    accelerators = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(accelerators), evaluating(model):
        torch.manual_seed(seed)
        written = [
            generate_plainly(
                model,
                input_ids=part.to(device),
                attention_mask=torch.ones_like(part, device=device),
                max_new_tokens=length - 1,
                do_sample=True,
                top_k=0,
                use_cache=True,
            )
            for part in tqdm(first.split(batch_size), desc="CLOVER own text", unit=" batches", delay=3, leave=False)
        ]
    return [{"input_ids": ids} for ids in written]


def generate_plainly(model: Any, **arguments: Any) -> Tensor:
    """Generate as the arguments say: the model's own generation config, such as a repetition penalty, does not count.

    Returns the token ids, (B, prompt tokens + new tokens) int64.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    plain = GenerationConfig()  # peft's `generate` copies that of its own model to the inner one
    with mock.patch.object(model, "generation_config", plain), mock.patch.object(inner, "generation_config", plain):
        ids: Tensor = model.generate(**arguments)
    return ids
