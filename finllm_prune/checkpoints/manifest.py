"""The manifest beside an exported checkpoint: what its files must be, and what its model must say."""

import hashlib
import json
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor

import finllm_prune
from finllm_prune.errors import InputError, ProofError
from finllm_prune.staging import UNFINISHED

MANIFEST = "finllm_prune.json"
FORMAT_VERSION = 1
REPORT = "report.json"
DELTA = "delta.safetensors"  # the one file of a delta, which alone has no model to be proved
FOR_PEOPLE = ("", ".md", ".yaml", ".png", ".html")
_COLUMNS, _LINES = 509, 64  # words in a row, a prime so that neighbours of a matrix fall into different columns; rows
_SPOTS, _SPOT = 64, 4096  # bytes
_JUNK = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError, OSError)


def write_manifest(
    folder: Path, format_name: str, zeros: dict[str, int], probe: dict[str, Tensor], logits: Tensor,
    tolerance: float, more: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Put down what ``verify`` holds the files of a folder against.

    Args:
        zeros: path -> number of exact zeros; none for a format that is no torch model.
        probe, logits: the inputs, all attended to, and what the model in memory makes of them.
        tolerance: how far the logits of the files may lie from these.
        more: what else is to be known; "agreement" with the model in memory, where it is not 1, is verified again.
    """
    manifest = {
        "format": format_name,
        "format_version": FORMAT_VERSION,
        "versions": {"finllm_prune": finllm_prune.__version__, "transformers": transformers.__version__},
        "zeros": zeros,
        "sha256": {path.name: sha256(path) for path in sorted(folder.iterdir()) if path.is_file()},
        "sums": {path.name: sums_sha256(path) for path in sorted(folder.glob("*.safetensors"))},
        "probe": {"input_ids": probe["input_ids"].tolist(), "logits": logits.tolist(), "tolerance": tolerance},
        **(more or {}),
    }
    (folder / MANIFEST).write_text(json.dumps(manifest))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are those that it names, to the bit.

    Beside them only what people read may lie there (card, recipe, plots): transformers would take a second weight file, an
    adapter or code for a part of the model.

    Raises:
        InputError, ProofError: as ``verify``.
    """
    manifest = manifest_alone(folder)
    hashes: dict[str, str] = manifest["sha256"]
    try:
        for path in folder.glob("*.index.json"):
            refuse_outside(set(json.loads(path.read_text())["weight_map"].values()), hashes)
    except _JUNK as error:
        raise damaged(folder, error) from error
    if changed := _changed(folder, hashes):
        raise ProofError(f"{changed} is missing or is not the file that was proved; export it anew")
    known = {*hashes, MANIFEST, REPORT}
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in known and path.suffix not in FOR_PEOPLE:
            raise ProofError(
                f"{path} is not a file that was proved, and a loader may read it; remove it, or export anew"
            )
    return manifest


def refuse_changed(folder: Path) -> None:
    """Raise InputError where a file that the manifest of a folder names is another one, before its model is asked anything.

    A folder without a manifest is taken as it is: ``save_pretrained`` wrote it. Not covered: files that the manifest does
    not name, which ``verify`` refuses.
    """
    if (folder / MANIFEST).is_file() and (changed := _changed(folder, manifest_alone(folder)["sha256"])):
        raise InputError(_not_proved(changed))


def refuse_damaged(path: Path) -> None:
    """Raise InputError where a weight file is not the one of the manifest beside it, told by its sums (``sums_sha256``).

    For ``from_pretrained``, of whose time a hash of all bytes would take a good part; folders that record no sums are hashed.
    A file that the manifest does not name is taken as it is: ``save_pretrained`` wrote it.
    """
    if not (path.parent / MANIFEST).is_file():
        return
    manifest = manifest_alone(path.parent)
    sums, hashes = manifest.get("sums"), manifest["sha256"]
    if isinstance(sums, dict) and path.name in sums:
        same = sums_sha256(path) == sums[path.name]
    else:
        same = path.name not in hashes or sha256(path) == hashes[path.name]
    if not same:
        raise InputError(_not_proved(path))


def manifest_alone(folder: Path) -> dict[str, Any]:
    """Without a look at the files beside it; raises as ``verify`` does."""
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text())
        manifest["sha256"], version, _ = dict(manifest["sha256"]), int(manifest["format_version"]), manifest["format"]
        refuse_outside(manifest["sha256"])
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{folder} holds no {MANIFEST}: it is not a checkpoint that finllm-prune exported") from None
    except _JUNK as error:
        raise damaged(folder, error) from error
    if version != FORMAT_VERSION:
        raise ProofError(
            f"{folder} has the format version {version}, and this finllm_prune reads {FORMAT_VERSION}; upgrade with pip "
            "install -U finllm-prune, or export it anew"
        )
    return manifest


def _changed(folder: Path, hashes: Mapping[str, str]) -> Path | None:
    """The first file that is missing or has another hash."""
    names = (name for name, expected in hashes.items() if not _holds(folder / name, expected))
    return next((folder / name for name in names), None)


def _holds(path: Path, expected: str) -> bool:
    return path.is_file() and sha256(path) == expected


def _not_proved(path: Path) -> str:
    return (
        f"{path} is missing or is not the file that {MANIFEST} beside it tells of; export or download the model anew, or "
        f"remove {MANIFEST} if you changed the model yourself"
    )


def refuse_outside(names: Iterable[Any], known: Container[Any] | None = None) -> None:
    """Raise ValueError where a file tells of one that lies in another folder, or is none of the ``known``."""
    for name in names:
        plain = isinstance(name, str) and Path(name).name == name and name not in ("", "..") and "\0" not in name
        if not plain or (known is not None and name not in known):
            raise ValueError(f"{name!r} is no file of this folder")


def exported_in(folder: Path) -> list[Path]:
    """The exported checkpoints of a folder: itself, and those directly in it, as in the output of a run or a pushed repository.

    Without any, the folder itself.
    """
    inside = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [path for path in (folder, *inside) if (path / MANIFEST).is_file() and path.suffix not in UNFINISHED]
    return found or [folder]


def of_oneshot(report: Mapping[str, Any]) -> bool:
    """Whether ``finllm-prune oneshot`` wrote this report, which holds other figures than that of a run."""
    return "dropped_blocks" in report


def damaged(folder: Path, error: Exception) -> ProofError:
    """What to raise where a manifest is not what it should be."""
    return ProofError(f"{folder / MANIFEST} is damaged ({error}); export the checkpoint anew")


def sha256(path: Path) -> str:
    """The hash of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums_sha256(path: Path) -> str:
    """The hash of a safetensors file's size and of sums over its bytes, in hex, in a small part of the time of ``sha256``.

    Of each quarter of a megabyte the sums of every 509th word, modulo 2 ** 64: any byte that changes moves one, and what is
    negated, scaled or exchanged moves many. Only of a tensor that is more than half of the file, as embeddings are beside
    packed matrices, 64 spots of 4 KB are hashed instead. Not covered: the bytes between those, and changes that leave each sum
    as it is, such as the exchange of two words that are added up; ``sha256`` tells these.
    """
    data = np.asarray(np.memmap(path, np.uint8, "r"))
    begin, end = _half(data)
    digest = hashlib.sha256(f"{len(data)} ".encode())
    for part in (data[:begin], data[end:]):
        summed = len(part) - len(part) % (8 * _LINES * _COLUMNS)
        digest.update(part[summed:].data)
        for words in part[:summed].view(np.uint64).reshape(-1, _LINES, _COLUMNS):
            digest.update(words.sum(0).data)
    for place in np.linspace(begin, max(begin, end - _SPOT), _SPOTS, dtype=np.int64):
        digest.update(data[place : min(place + _SPOT, end)].data)
    return digest.hexdigest()


def _half(data: NDArray[np.uint8]) -> tuple[int, int]:
    """Where the tensor that takes more than half of the file begins and ends; its end twice, if none does."""
    header = 8 + int.from_bytes(data[:8].tobytes(), "little")
    for name, entry in json.loads(data[8:header].tobytes()).items():
        if name != "__metadata__":
            begin, end = entry["data_offsets"]
            if end - begin > max(len(data) // 2, _SPOTS * _SPOT):
                return header + begin, header + end
    return len(data), len(data)


def tensors_sha256(state: Iterable[tuple[str, Tensor]]) -> str:
    """The hash of names, types, shapes and bytes, in hex, in whatever order they come."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state, key=lambda item: item[0]):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
