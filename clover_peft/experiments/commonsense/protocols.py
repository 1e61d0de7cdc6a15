"""The published prompts of the suite, in training and in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """How instructions are worded, and how answers are generated.

    Attributes:
        trained: the prompt in training, with `{instruction}`.
        asked: the prompt in evaluation; some publications change it.
        before_answer: the text between prompt and answer; it belongs to the answer, so that no token spans both.
        beams: the number of beams in the search for an answer; 1 = greedy.
        new_tokens: the longest answer, in tokens.
    """

    trained: str
    asked: str
    before_answer: str
    beams: int
    new_tokens: int

    def question(self, instruction: str, training: bool) -> str:
        """Return the prompt for one instruction."""
        return (self.trained if training else self.asked).replace("{instruction}", instruction)


_ASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_PLAIN = f"{_ASK}\n\n### Instruction:\n{{instruction}}\n\n### Response:"
_INDENT = " " * 16

# The prompts are as published, oddities included. LLM-Adapters (arXiv 2304.01933) indents them as its source code,
# trains with a linter's comment in the prompt, and evaluates without it, as DoRA (arXiv 2402.09353) does.
PROTOCOLS: dict[str, Protocol] = {
    "clover": Protocol(_PLAIN, _PLAIN, before_answer=" ", beams=1, new_tokens=32),
    "llm_adapters": Protocol(
        f"{_ASK}  # noqa: E501\n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n"
        f"{_INDENT}### Response:\n{_INDENT}",
        f"{_ASK} \n\n{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Response:\n{_INDENT}",
        before_answer="",
        beams=4,
        new_tokens=32,
    ),
}


def prompt_tokens(tokenizer: Any, prompt: str, special: bool) -> list[int]:
    """Return a prompt's token ids; with `special`, those that a tokenizer puts before a text, not those behind it.

    An end token behind the prompt would end the text in front of its answer, as no training does.
    """
    found = tokenizer(prompt, add_special_tokens=special, return_special_tokens_mask=True)
    ids, mask = list(found["input_ids"]), list(found["special_tokens_mask"])
    while special and ids and mask[len(ids) - 1]:
        ids.pop()
    return ids


def find_protocol(name: str | None, tokenizer: Any) -> Protocol | None:
    """Return the protocol of that name, or None for the tokenizer's chat template.

    Args:
        name: a name in `PROTOCOLS`, "chat", or None: the chat template where there is one, else "clover".
        tokenizer: the model's tokenizer.

    Raises:
        ValueError: there is no such protocol, or no chat template.
    """
    if name is None:
        name = "clover" if tokenizer.chat_template is None else "chat"
    if name == "chat" and tokenizer.chat_template is None:
        raise ValueError(
            "prompt=chat: expected a tokenizer with a chat template; pass chat_template_path=<file>.jinja"
        )
    if name != "chat" and name not in PROTOCOLS:
        raise ValueError(f"prompt={name}: expected one of chat, {', '.join(PROTOCOLS)}")
    return PROTOCOLS.get(name)
