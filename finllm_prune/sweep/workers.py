"""Processes on devices, one at a time on each; who tells this one to stop tells them all."""

import fcntl
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from finllm_prune.errors import InputError
from finllm_prune.sweep.devices import Device

Tell = Callable[[str, int | None], None]
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# What a process writes goes to a file, where bars are noise and tables may be wide.
_TO_A_FILE = {"TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "140"}


@dataclass(frozen=True)
class Job:
    """A command, and the file to which all that it says is added."""

    name: str
    command: list[str]
    log: Path


@contextmanager
def held(folder: Path) -> Iterator[int]:
    """A folder in which no other sweep works; yields what its processes must inherit, so that they hold it too.

    The system takes the lock back when the last of them ends, however it ends.

    Raises:
        InputError: a sweep, or a run that a killed one left behind, is at work there.
    """
    place = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"output: a sweep is at work in {folder}, or a run that a killed one left behind; wait until it ends, or end it"
            ) from None
        yield place
    finally:
        os.close(place)


def work(jobs: Sequence[Job], devices: Sequence[Device], lock: int, tell: Tell) -> dict[str, int]:
    """Carry all jobs out, whatever comes of each; name -> exit code.

    SIGINT, SIGTERM and SIGHUP are passed on as SIGTERM, upon which a run saves first; a second one kills.

    Args:
        lock: of ``held``.
        tell: hears a job's name and None when it starts, and its exit code when it has ended.

    Raises:
        SystemExit: after such a signal, when all processes have ended, with the exit code that says so.
    """
    waiting, free, codes = deque(jobs), list(devices), {}
    busy: dict[str, tuple[Device, subprocess.Popen[bytes]]] = {}
    heard: list[int] = []
    answered = 0
    before = {number: signal.signal(number, lambda number, _: heard.append(number)) for number in _SIGNALS}
    try:
        while busy or (waiting and not heard):
            while free and waiting and not heard:
                job, device = waiting.popleft(), free.pop(0)
                busy[job.name] = device, _start(job, device, lock)
                tell(job.name, None)
            if len(heard) > answered:
                for _, process in busy.values():
                    process.send_signal(signal.SIGKILL if answered else signal.SIGTERM)
                answered = len(heard)
            for name, (device, process) in list(busy.items()):
                if (code := process.poll()) is not None:
                    del busy[name]
                    free.append(device)
                    codes[name] = code
                    tell(name, code)
            time.sleep(0.1)
    finally:
        for _, process in busy.values():
            process.terminate()
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        raise SystemExit(128 + heard[0])
    return codes


def last_line(log: Path) -> str:
    """What a process said last."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")


def _start(job: Job, device: Device, lock: int) -> subprocess.Popen[bytes]:
    """In a session of its own: a Ctrl-C at the terminal reaches this process alone."""
    with job.log.open("ab") as log:
        return subprocess.Popen(
            job.command, env=os.environ | _TO_A_FILE | device.environment, stdin=subprocess.DEVNULL, stdout=log,
            stderr=subprocess.STDOUT, start_new_session=True, pass_fds=(lock,),
        )  # fmt: skip
