"""Real processes that run out of disk or are killed in the middle of a write: what was there stays whole."""

import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from finllm_prune.errors import InputError
from finllm_prune.export import export, export_delta
from finllm_prune.staging import staged
from tests.conftest import tiny_model
from tests.test_processes import ENVIRONMENT

# Waits where it is told, with what is written so far on disk, until it is killed.
STOP = """
import importlib, sys, time
from finllm_prune.cli import main
room = importlib.import_module("finllm_prune.{module}")
original = room.{name}
def stop(*arguments, **named):
    {before}
    print("here", flush=True)
    time.sleep(60)
room.{name} = stop
sys.argv = ["finllm-prune", *sys.argv[1:]]
main()
"""


@pytest.fixture
def source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> Path:
    folder = tmp_path / "source"
    tiny_model().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from finllm_prune.cli import main; main()", *map(str, arguments)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kilobytes"), [("export", 1), ("export", 60), ("delta", 8)])
def test_a_full_disk_is_one_sentence_and_the_old_folder_stays(
    source: Path, tmp_path: Path, name: str, kilobytes: int
) -> None:
    """A limit on the size of files is a disk that fills up: early in the small files, or within the weights."""
    out = tmp_path / "new"
    tiny_model(seed=1).save_pretrained(tmp_path / "base")
    if name == "export":
        export(source, out, ["masked"])
        arguments = ["export", source, out, "--to", "compact", "--to", "masked", "--overwrite"]
    else:
        export_delta(str(tmp_path / "base"), source, out)
        arguments = ["delta", tmp_path / "base", source, out, "--overwrite"]
    before = contents(tmp_path)
    done = subprocess.run(
        command(*arguments), env=ENVIRONMENT, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000 * kilobytes, 1000 * kilobytes)),
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith(f"Error: {out} cannot be written: ")
    assert line.endswith("free some space there or name a folder on another disk (nothing was changed)")
    assert "Traceback" not in done.stderr
    assert contents(tmp_path) == before


def killed_at(place: str, *arguments: object) -> None:
    """Run a command in a process of its own and kill it there."""
    module, _, name = place.rpartition(".")
    before = "original(*arguments, **named)" if name == "_carry_card" else "pass"
    code = STOP.format(module=module, name=name, before=before)
    with subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == "here\n"
        started.send_signal(signal.SIGKILL)
    assert started.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("there", [pytest.param(False, marks=pytest.mark.full), True], ids=["nothing", "an old one"])
@pytest.mark.parametrize("place", ["checkpoints.proof.zero_counts", "export._carry_card", "staging.publish"])
def test_a_killed_export_leaves_what_was_there_and_the_next_one_cleans_up(
    source: Path, tmp_path: Path, place: str, there: bool
) -> None:
    out = tmp_path / "new"
    if there:
        export(source, out, ["masked"])
    before = contents(out)
    killed_at(place, "export", source, out, "--to", "masked", "--to", "compact", "--overwrite")
    assert contents(out) == before
    assert out.exists() == there, "nothing half is taken for a whole"
    assert (tmp_path / "new.partial").is_dir(), "it was in the middle"
    export(source, out, ["compact"], overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "new"}
    assert [path.name for path in out.iterdir()] == ["compact"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "name"), [("checkpoints.proof.zero_counts", "packed"), ("checkpoints.delta.apply", "delta")]
)
def test_a_killed_packed_export_or_delta_leaves_what_was_there(
    source: Path, tmp_path: Path, place: str, name: str
) -> None:
    out, base = tmp_path / "new", tmp_path / "base"
    tiny_model(seed=1).save_pretrained(base)
    if name == "delta":
        export_delta(str(base), source, out)
        arguments = ["delta", base, source, out, "--overwrite"]
    else:
        export(source, out, ["packed"])
        arguments = ["export", source, out, "--to", "packed", "--overwrite"]
    before = contents(out)
    killed_at(place, *arguments)
    assert contents(out) == before
    assert (tmp_path / "new.partial").is_dir(), "it was in the middle"
    if name == "delta":
        export_delta(str(base), source, out, overwrite=True)
    else:
        export(source, out, ["packed"], overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "base", "new"}


def test_a_kill_between_the_two_renames_loses_nothing(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "new"
    export(source, out, ["masked"])
    before = contents(out)
    shutil.copytree(out, tmp_path / "new.partial")
    out.rename(tmp_path / "new.old")
    with pytest.raises(InputError, match="new exists; use --overwrite"):
        export(source, out, ["compact"])
    assert contents(out) == before, "the old one is back in its place"
    export(source, out, ["compact"], overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "new"}


def test_a_failed_write_after_such_a_kill_brings_the_old_folder_back(tmp_path: Path) -> None:
    (tmp_path / "new.old").mkdir()
    (tmp_path / "new.old" / "weights").write_text("whole")
    with pytest.raises(RuntimeError, match="midway"), staged(tmp_path / "new") as partial:  # noqa: PT012
        (partial / "weights").write_text("ha")
        raise RuntimeError("midway")
    assert contents(tmp_path) == {"new/weights": b"whole"}


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(28, "No space left on device"), True),
        (OSError(122, "Disk quota exceeded"), True),
        (Exception("I/O error: No space left on device (os error 28)"), True),
        (OSError(13, "Permission denied"), False),
        (Exception("I/O error: Permission denied (os error 13)"), False),
        (KeyError("x"), False),
    ],
)
def test_only_a_full_disk_is_told_as_one(tmp_path: Path, error: Exception, full: bool) -> None:
    with pytest.raises(InputError if full else type(error)) as caught, staged(tmp_path / "outer") as outer:  # noqa: SIM117
        with staged(outer / "inner"):
            raise error
    assert (str(caught.value).count("cannot be written"), "inner" in str(caught.value)) == (int(full), False)
    assert list(tmp_path.iterdir()) == []
