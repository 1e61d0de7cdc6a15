"""The published ways to put the suite's questions to a model, in training and in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Protocol:
    """How instructions are worded, and how answers are generated.

    Attributes:
        trained: prompt in training, with `{instruction}`.
        asked: prompt in evaluation; not the same everywhere.
        before_answer: what separates prompt and answer; no part of the prompt, so that no token spans the boundary.
        beams: of the search for an answer; 1 = greedy.
        new_tokens: longest answer.
    """

    trained: str
    asked: str
    before_answer: str
    beams: int
    new_tokens: int

    def question(self, instruction: str, training: bool) -> str:
        """The prompt for one instruction."""
        return (self.trained if training else self.asked).replace("{instruction}", instruction)


_ASK = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_PLAIN = f"{_ASK}\n\n### Instruction:\n{{instruction}}\n\n### Response:"
_INDENT = " " * 16

# What was published, oddities included: LLM-Adapters (arXiv 2304.01933; DoRA, arXiv 2402.09353, evaluates with the
# same) indents as its source code does, trains with a linter's comment in the prompt, and evaluates without.
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


def find_protocol(name: str | None, tokenizer: Any) -> Protocol | None:
    """Returns the protocol of that name, or None for the tokenizer's chat template.

    Args:
        name: a name in `PROTOCOLS`, "chat", or None: the chat template where there is one, else "clover".
        tokenizer: of the model.

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
