"""A model's answers to held-out questions, before and after its training, and their logits."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ...base_model.activations import evaluating
from ...base_model.own_text import generate_plainly
from ...io.rows import Row
from ..commonsense.protocols import prompt_tokens

_BEGINNING = 32  # tokens of a window of plain text that a model is asked to continue


class Questions:
    """Held-out questions that a model answers greedily.

    Args:
        rows: held-out rows with `prompt` and `completion`.
        tokenizer: the model's tokenizer.
        tokens: the largest number of tokens in an answer.
    """

    def __init__(self, rows: list[Row], tokenizer: PreTrainedTokenizerBase, tokens: int) -> None:
        self.rows, self.tokenizer, self.tokens = rows, tokenizer, tokens
        self.prompts = [prompt_ids(tokenizer, row) for row in rows]

    def ask(self, model: PreTrainedModel) -> list[torch.Tensor]:
        """Return the token ids of the model's answers, (1, new tokens) each, on the CPU."""
        return [greedy_ids(model, self.tokenizer, prompt, self.tokens) for prompt in self.prompts]

    def texts(self, answers: list[torch.Tensor]) -> list[str]:
        """Decode answers from `ask`."""
        return [str(self.tokenizer.decode(ids[0], skip_special_tokens=True)).strip() for ids in answers]

    def compare(self, before: list[str], after: list[str]) -> list[dict[str, str]]:
        """List `question`, `expected`, and the answers `before` and `after`, for every question."""
        return [
            {"question": _text(row["prompt"]), "expected": _text(row["completion"]), "before": one, "after": other}
            for row, one, other in zip(self.rows, before, after, strict=True)
        ]

    def probe(self, model: PreTrainedModel, answers: list[torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return the tensors that `verify` compares a saved model with: `prompt.<i>`, `answer.<i>`, `logits.<i>`."""
        tensors: dict[str, torch.Tensor] = {}
        for i, (prompt, ids) in enumerate(zip(self.prompts, answers, strict=True)):
            tensors |= {f"prompt.{i}": prompt, f"answer.{i}": ids, f"logits.{i}": answer_logits(model, prompt, ids)}
        return tensors


def question(row: Row, tokenizer: PreTrainedTokenizerBase, tokens: int) -> Row:
    """Return a row as a question: a window of plain text asks for the `tokens` after its beginning."""
    if "input_ids" not in row:
        return row
    ids = row["input_ids"]
    begun = min(_BEGINNING, len(ids) // 2)
    prompt, rest = (
        str(tokenizer.decode(part, skip_special_tokens=True)) for part in (ids[:begun], ids[begun : begun + tokens])
    )
    return {"prompt": prompt, "completion": rest}


def greedy_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: torch.Tensor, tokens: int
) -> torch.Tensor:
    """Continue a prompt greedily up to the tokenizer's end token.

    Args:
        model: the model, in any mode; generation runs in evaluation mode.
        tokenizer: has the end and pad tokens.
        prompt: token ids, (1, prompt tokens).
        tokens: the largest number of tokens to generate.

    Returns:
        The new token ids, (1, new tokens), on the CPU.
    """
    prompt = prompt.to(model.device)
    with evaluating(model), torch.no_grad():
        generated = generate_plainly(
            model,
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    return generated[:, prompt.shape[1] :].cpu().contiguous()


def prompt_ids(tokenizer: PreTrainedTokenizerBase, row: Row) -> torch.Tensor:
    """Return the prompt's token ids, (1, tokens), the same as in training."""
    prompt = row["prompt"]
    plain = isinstance(prompt, str)
    if not plain:
        prompt = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    return torch.tensor([prompt_tokens(tokenizer, prompt, special=plain)])


def answer_logits(model: PreTrainedModel, prompt: torch.Tensor, answer: torch.Tensor) -> torch.Tensor:
    """Return the logits after the prompt (1, p) and after each answer token (1, a): (1 + a, vocabulary), float32."""
    with evaluating(model), torch.no_grad():
        ids = torch.cat([prompt, answer], dim=1).to(model.device)
        return model(input_ids=ids).logits[0, prompt.shape[1] - 1 :].float().cpu().contiguous()


def _text(part: str | list[Row]) -> str:
    return part.strip() if isinstance(part, str) else str(part[-1]["content"])
