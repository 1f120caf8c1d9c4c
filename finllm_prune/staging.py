"""Whole or not at all: folders and files are written beside their place and renamed when they are complete."""

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from finllm_prune.errors import InputError, one_line

UNFINISHED = (".partial", ".old")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """Yield an empty folder beside ``folder`` that takes its place if the block ends well and vanishes if it does not.

    What a killed process left here is cleaned up first.

    Raises:
        InputError: the disk is full.
    """
    recover(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        publish(partial, folder)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        # A folder within this one may have said it already; the user knows the outer one.
        cause = error.__cause__ if isinstance(error, InputError) and error.__cause__ else error
        if _is_disk_full(cause):
            raise InputError(
                f"{folder} cannot be written: {one_line(cause)}; free some space there or name a folder on another disk "
                "(nothing was changed)"
            ) from cause
        raise


@contextmanager
def clear_when_full(folder: Path) -> Iterator[None]:
    """While a training writes checkpoints into ``folder``.

    Raises:
        InputError: the disk is full.
    """
    try:
        yield
    except Exception as error:
        if _is_disk_full(error):
            raise InputError(
                f"{folder} cannot be written: {one_line(error)}; free some space there and go on with --resume (the "
                "checkpoints before this one are whole)"
            ) from error
        raise


def publish(partial: Path, folder: Path) -> None:
    """Rename a complete folder into place; what was there before goes only when the new one stands."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.rename(folder, old)
    os.rename(partial, folder)
    shutil.rmtree(old, ignore_errors=True)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file that is there when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial)
    os.replace(partial, path)


def save_text(text: str, path: Path) -> None:
    """Write a text file that is there when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def free_bytes(folder: Path) -> int:
    """On the disk of a folder that need not be there yet."""
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
    return shutil.disk_usage(there).free


def recover(folder: Path) -> None:
    """Put the old folder back where a process was killed between the two renames of ``publish``."""
    old = folder.with_name(f"{folder.name}.old")
    if old.exists() and not folder.exists():
        os.rename(old, folder)


def _is_disk_full(error: BaseException) -> bool:
    """Libraries in Rust (safetensors, tokenizers) give the number in words alone, and PyTorch no number at all."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    if isinstance(error, RuntimeError) and re.search(
        r"PytorchStreamWriter failed writing|inline_container\.cc", str(error)
    ):
        return True
    told = re.search(r"\(os error (\d+)\)", str(error))
    return told is not None and int(told[1]) in _FULL
