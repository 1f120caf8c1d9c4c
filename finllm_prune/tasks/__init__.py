"""Tasks: one file each, found by its name."""

from finllm_prune.tasks.task import Examples, Task, find_task

__all__ = ["Examples", "Task", "find_task"]
