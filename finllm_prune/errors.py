"""The errors that a user can act on. Each message is one sentence: what is wrong, where, and the remedy."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

logger = logging.getLogger(__name__)


class InputError(ValueError):
    """A recipe, data set or model that cannot be used as given; found before training starts (exit code 2)."""


class ProofError(RuntimeError):
    """A saved checkpoint is not equal to the model in memory, or to what its manifest says."""


class HubError(RuntimeError):
    """The Hub cannot be reached or refuses; everything that lies here is whole (exit code 5)."""


def one_line(error: BaseException) -> str:
    """What a library said, as a part of such a sentence."""
    return " ".join(str(error).split())


def optional(module: str, key: str, extra: str) -> Any:
    """A package that only ``key`` of a recipe needs; raises InputError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError:
        package = module.replace("_", "-")
        raise InputError(
            f"{key}: it needs the package {package}, which is not installed: pip install 'finllm-prune[{extra}]'"
        ) from None


@contextmanager
def warned(what: str, remedy: str) -> Iterator[None]:
    """Whatever fails in the block is a warning: what it writes is of what was measured, which stands without it."""
    try:
        yield
    except Exception as error:
        logger.warning(
            "%s could not be written (%s); all else is there: %s.", what, one_line(error) or repr(error), remedy
        )
