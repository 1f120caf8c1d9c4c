"""Tasks: one file each, found by its name."""

from finllm_prune.tasks.rows import BAD_ROWS
from finllm_prune.tasks.task import KEPT, Examples, Task, find_task
from finllm_prune.tasks.texts import read_texts

__all__ = ["BAD_ROWS", "KEPT", "Examples", "Task", "find_task", "read_texts"]
