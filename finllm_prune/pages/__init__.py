"""Pages for people: self-contained HTML, written from the files of finished runs alone."""

from finllm_prune.pages.rendering import render
from finllm_prune.pages.run import PAGE, run_page
from finllm_prune.pages.runs import runs_page

__all__ = ["PAGE", "render", "run_page", "runs_page"]
