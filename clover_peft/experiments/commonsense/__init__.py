"""The commonsense-170k suite (LLM-Adapters, arXiv 2304.01933): its tasks, prompts, answers, sources and scores."""

from .protocols import PROTOCOLS, Protocol
from .tasks import TASKS, Example, Task, extract, render, task_of

__all__ = ["PROTOCOLS", "TASKS", "Example", "Protocol", "Task", "extract", "render", "task_of"]
