"""The benchmarks, called as their command lines call them, in the process of a test."""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import finllm_prune

Script = Callable[..., None]
_ROOMS = ("bench", "scale")  # what the scripts share


@contextmanager
def script(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    """Gives what runs ``scripts/<name>.py`` with some arguments, and forgets what it imported afterwards."""
    monkeypatch.syspath_prepend(str(Path(finllm_prune.__file__).parents[1] / "scripts"))

    def main(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        importlib.import_module(name).main()

    yield main
    for module in [module for module in sys.modules if module.split(".")[0] in (name, *_ROOMS)]:
        del sys.modules[module]
