"""Pages for people: self-contained HTML, written from the files of finished runs alone."""

from finllm_prune.pages.finished import Finished
from finllm_prune.pages.rendering import render
from finllm_prune.pages.run import PAGE, run_page, write_page
from finllm_prune.pages.runs import compare_runs

__all__ = ["PAGE", "Finished", "compare_runs", "render", "run_page", "write_page"]
