"""What of a finished folder goes to the Hub, and where it lies there; everything that speaks against it is found here.

One commit holds all formats, so that they are always of one model: the best one that plain transformers loads lies at the
root, where ``from_pretrained("org/name")`` looks, each other one in a folder of its name (``subfolder="ragged"``). Branches
for formats would take a commit each, of which the second may fail.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from finllm_prune.checkpoints import LOSSY, PLUGGED, SERVED, exported_in, verify
from finllm_prune.checkpoints.manifest import MANIFEST, REPORT, of_oneshot, read_manifest
from finllm_prune.errors import InputError
from finllm_prune.settings import parse_yaml
from finllm_prune.staging import UNFINISHED
from finllm_prune.tasks import BAD_ROWS

# The first that there is. Code is looked for at the root alone.
_AT_THE_ROOT = ("compact", "masked", "ragged-remote", "ragged", "packed", "packed-int8", "onnx", "onnx-int8")
_CARD, _RECIPE, _PLOTS = "README.md", "recipe.yaml", "plots"
_GOES = {_CARD, _RECIPE, "LICENSE", "LICENSE.md", "NOTICE", "NOTICE.md"}
# Known, but nobody needs it there: the baseline, the parts of a merged model, the figures of each step, what may
# quote texts or tells of files here, and what the card tells.
_STAYS = {"dense", "lora", "runs", "recorder.parquet", "report.html", "flips.json", "governance.yaml", BAD_ROWS, REPORT}
_MID_RUN = re.compile(
    r"checkpoints|checkpoint-\d+|(optimizer|scheduler|scaler|rng_state|trainer_state|training_args)\b.*"
)
_DATA = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".xlsx", ".xls", ".txt", ".db", ".sqlite", ".zip")
_SECRET_NAME = re.compile(r"\.env.*|\.netrc|\.?git-credentials|.*token|id_(rsa|ed25519|ecdsa)|.*\.(pem|key|p12|pfx)")
_SECRET = re.compile(
    rb"hf_[A-Za-z0-9]{20,}|api_org_[A-Za-z0-9]{20,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9_-]{32,}"
    rb"|xox[abpr]-[A-Za-z0-9-]{20,}|-----BEGIN [A-Z ]*PRIVATE KEY-----"
)


@dataclass(frozen=True)
class Parcel:
    """What is to lie in the repository.

    Args:
        files: path there -> the file here, or what it is to hold.
        places: format -> its folder there, "" for the root.
    """

    files: dict[str, Path | bytes]
    places: dict[str, str]


def pack(folder: Path, repo_id: str, formats: Sequence[str] = (), *, allow_failed_gates: bool = False) -> Parcel:
    """The parcel of a run's output, of an ``export`` or of one exported format, each proved again from its files.

    Args:
        formats: which of them; none means all.
        allow_failed_gates: what is no success goes as well, and the card says so in its first line.

    Raises:
        InputError: the folder is no finished one, a gate failed or no report tells, or a file is unknown or looks like a
            secret or like data.
        ProofError: a checkpoint is not what its manifest says.
    """
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; name the output of a run or an exported checkpoint")
    _refuse_mid_run(folder)
    manifests = {path: read_manifest(path) for path in exported_in(folder)}  # each hashes all files of its checkpoint
    found = _formats({path: str(manifest["format"]) for path, manifest in manifests.items()}, formats)
    proved = {path: {*manifest["sha256"], MANIFEST} for path, manifest in manifests.items()}
    _refuse_unknown(folder, proved)
    failed = _failure(folder, found.values(), allow_failed_gates)
    _refuse_mixed({name: verify(path) for name, path in found.items()})
    first = next(name for name in _AT_THE_ROOT if name in found)
    places = {name: "" if name == first else name for name in _AT_THE_ROOT if name in found}
    if places.get("ragged-remote"):
        raise InputError(
            f"--format: transformers looks for the code of ragged-remote at the root alone, where {first} lies; push it to a "
            "repository of its own, by --format ragged-remote, and the others by naming them"
        )
    files: dict[str, Path | bytes] = {}
    for name, place in places.items():
        files |= {f"{place}/{file}".lstrip("/"): found[name] / file for file in sorted(proved[found[name]])}
    files |= _for_people(found[first], repo_id, places, failed)
    _refuse_secrets(files)
    return Parcel(files, places)


def _formats(checkpoints: dict[Path, str], asked: Sequence[str]) -> dict[str, Path]:
    """Format -> the folder that holds it."""
    found: dict[str, Path] = {}
    for path, name in checkpoints.items():
        if name not in _AT_THE_ROOT:
            raise InputError(f"{path} is a {name}, which is no model of its own; push the model that it was made of")
        if name in found:
            raise InputError(f"{path} and {found[name]} are both {name}; push one of them")
        found[name] = path
    for name in asked:
        if name not in found:
            raise InputError(
                f"--format: there is no {name} here, but {', '.join(found)}; make it with finllm-prune export"
            )
    return {name: path for name, path in found.items() if not asked or name in asked}


def _refuse_mid_run(folder: Path) -> None:
    if folder.suffix in UNFINISHED:
        raise InputError(f"{folder} is an unfinished run; let it end with --resume, and push what it leaves")
    for root, folders, files in os.walk(folder):
        for name in sorted([*folders, *files]):
            if _MID_RUN.fullmatch(name) or Path(name).suffix in UNFINISHED:
                raise InputError(f"{Path(root) / name} belongs to a run under way; push the output of a finished run")


def _refuse_unknown(folder: Path, proved: dict[Path, set[str]]) -> None:
    """What was not proved goes only if its name is known; a link could lead anywhere."""
    for root, folders, files in os.walk(folder):
        place = Path(root)
        if place == folder:
            folders[:] = [name for name in folders if name not in _STAYS]
        links = [name for name in folders if (place / name).is_symlink()]
        for name in sorted([*files, *links]):
            path = place / name
            known = (
                name in proved.get(place, ())
                or (name in _GOES | {REPORT} and (place == folder or place in proved))
                or (name in _STAYS and place == folder)
                or (place.name == _PLOTS and path.suffix == ".png" and place.parent in {folder, *proved})
            )
            if path.is_symlink() or not known:
                raise InputError(
                    f"{path} {_looks(path)}; move it out of the folder, for nothing but the model is pushed"
                )


def _refuse_mixed(manifests: dict[str, dict[str, Any]]) -> None:
    """All formats but the rounded ones recorded what the same model makes of the same probe."""
    recorded = {
        name: np.array(manifest["probe"]["logits"]) for name, manifest in manifests.items() if name not in LOSSY
    }
    first = next(iter(recorded), None)
    for name, logits in recorded.items():
        if logits.shape != recorded[str(first)].shape or not np.allclose(
            logits, recorded[str(first)], rtol=0, atol=1e-3
        ):
            raise InputError(f"{first} and {name} are formats of two models; push one of them by --format")


def _looks(path: Path) -> str:
    if path.is_symlink():
        return "is a link"
    if _SECRET_NAME.fullmatch(path.name):
        return "looks like a secret"
    return "looks like data" if path.suffix in _DATA else "is a file that finllm-prune does not know"


def _refuse_secrets(files: dict[str, Path | bytes]) -> None:
    for name, content in files.items():
        if Path(name).suffix not in (".md", ".yaml", ".json", "") or Path(name).name == "tokenizer.json":
            continue
        data = content if isinstance(content, bytes) else content.read_bytes()
        if _SECRET.search(data):
            raise InputError(f"{name} holds what looks like a token or key; take it out, and make the secret invalid")


def _failure(folder: Path, checkpoints: Iterable[Path], allowed: bool) -> str | None:
    """What the card is to begin with, where the report tells of no success; None where it does."""
    alone = [folder.parent] if (folder / MANIFEST).is_file() else []
    found = set()
    for checkpoint in checkpoints:
        places = [path / REPORT for path in (checkpoint, folder, *alone)]
        path = next((path for path in places if path.is_file()), None)
        found.add("NO REPORT tells whether this model passed any gate." if path is None else _told(path))
    told = " ".join(sorted(filter(None, found))) or None
    if told is None or allowed:
        return told
    raise InputError(
        f"{folder}: {told.lower().rstrip('.')}; mend that, or push it all the same with --allow-failed-gates"
    )


def _told(path: Path) -> str | None:
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if of_oneshot(report):
            return "NO GATES were asked of this model, which was pruned without training."
        passed, gates = report["passed"], dict(report["gates"])
        failed = [
            f"{name} ({float(gate['value']):.3f}, threshold {float(gate['threshold']):g})"
            for name, gate in gates.items()
            if gate["passed"] is not True
        ]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is damaged ({error!r}); bring back the report of the run") from error
    if passed is True and not failed:
        return None
    return f"FAILED gates: {', '.join(failed)}." if failed else "COLLAPSED: one class is predicted for every text."


def _for_people(checkpoint: Path, repo_id: str, places: dict[str, str], failed: str | None) -> dict[str, Path | bytes]:
    """Card, recipe, licence and plots of the format at the root."""
    files: dict[str, Path | bytes] = {
        name: checkpoint / name for name in sorted(_GOES) if (checkpoint / name).is_file()
    }
    for path in sorted((checkpoint / _PLOTS).glob("*.png")):
        files[f"{_PLOTS}/{path.name}"] = path
    card, recipe = checkpoint / _CARD, checkpoint / _RECIPE
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else f"# {repo_id.partition('/')[2]}\n"
    files[_CARD] = hub_card(text, repo_id, places, failed).encode()
    if recipe.is_file():
        try:
            content = _without_paths(parse_yaml(recipe.read_text(encoding="utf-8")))
        except ValueError as error:
            raise InputError(f"{recipe} is not readable ({error}); bring back the recipe of the run") from error
        files[_RECIPE] = yaml.safe_dump(content, sort_keys=False).encode()
    return files


def hub_card(card: str, repo_id: str, places: dict[str, str], failed: str | None) -> str:
    """A card as it is to be read on the Hub: first what is wrong with the model, then where each format lies."""
    head, text = _divided(card)
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    for name, place in places.items():
        if not place and title is not None:
            text = text.replace(f'"{title[1]}/{name}"', f'"{repo_id}"')
    kind = "CausalLM" if "pipeline_tag: text-generation" in head else "SequenceClassification"
    lines = [_where(repo_id, name, place, kind) for name, place in places.items()]
    where = "## In this repository\n\n" + "\n".join(lines) + "\n\n"
    begin = re.search(r"^## ", text, re.MULTILINE)
    at = begin.start() if begin else len(text)
    text = text[:at] + where + text[at:] if begin else text + "\n" + where
    warning = "" if failed is None else f"**{failed} Pushed with --allow-failed-gates.**\n\n"
    return head + warning + text.lstrip("\n")


def _divided(card: str) -> tuple[str, str]:
    """The metadata between its dashes, and the text."""
    if not card.startswith("---\n"):
        return "", card
    end = card.find("\n---\n", 3)
    return ("", card) if end < 0 else (card[: end + 5] + "\n", card[end + 5 :])


def _where(repo_id: str, name: str, place: str, kind: str) -> str:
    first = "after `import finllm_prune`, " if name in PLUGGED else ""
    if name in SERVED:
        return f"- {name}: `{place or '.'}/model.onnx`, for onnxruntime"
    more = f', subfolder="{place}"' if place else ""
    return f'- {name}: {first}`AutoModelFor{kind}.from_pretrained("{repo_id}"{more})`'


def _without_paths(value: Any) -> Any:
    """A recipe without the folders of this machine: of an absolute path only its last part is told."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return Path(value).name if isinstance(value, str) and Path(value).expanduser().is_absolute() else value
