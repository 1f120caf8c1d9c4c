"""Tasks: one file each, found by its name."""

from finllm_prune.tasks.task import Examples, Task, find_task
from finllm_prune.tasks.texts import read_texts

__all__ = ["Examples", "Task", "find_task", "read_texts"]
