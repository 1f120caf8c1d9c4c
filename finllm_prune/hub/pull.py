"""A model of the Hub into the local cache, as a whole."""

from pathlib import Path

from huggingface_hub import snapshot_download

from finllm_prune.errors import InputError
from finllm_prune.hub.faults import FAULTS, remedy


def pull(name: str, revision: str | None = None, only: list[str] | None = None) -> Path:
    """The folder of a local model, or of a snapshot of the Hub's: all files of it, or those of some patterns.

    Raises:
        InputError: there is no such folder, and the Hub does not give such a repository.
    """
    if Path(name).is_dir():
        return Path(name)
    if Path(name).is_absolute() or name.count("/") != 1:
        raise InputError(f"there is no folder {name}, and it is no Hub id, owner/name, either")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=only))
    except FAULTS as error:
        raise InputError(remedy(error, name)) from error
