"""The commonsense-170k suite (LLM-Adapters, arXiv 2304.01933): its eight tasks, their prompts, answers and sources."""

from .tasks import TASKS, Example, Task, extract, render, task_of

__all__ = ["TASKS", "Example", "Task", "extract", "render", "task_of"]
