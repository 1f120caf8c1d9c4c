"""A process of its own that runs ``finllm-prune`` again and again: its huggingface_hub knows no other Hub than ours."""

import contextlib
import io
import json
import logging
import os
import subprocess
import sys
import traceback
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str

    @property
    def all(self) -> str:
        return self.out + self.err


class Shell:
    def __init__(self, endpoint: str, home: Path):
        self.environment = environment(endpoint, home)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub.shell"], env=self.environment, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def __call__(self, *arguments: object, token: str | None = None) -> Done:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        asked = {"arguments": [str(argument) for argument in arguments], "token": token}
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        return Done(**json.loads(self.process.stdout.readline()))

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


def environment(endpoint: str, home: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    return kept | {
        "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "COLUMNS": "200",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }  # fmt: skip


class _Here(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes where stderr is now."""

    stream = property(lambda self: sys.stderr, lambda self, _: None)


def serve() -> None:
    from finllm_prune.cli import main

    logging.basicConfig(level=logging.INFO, handlers=[_Here()])
    answers = sys.stdout
    for line in sys.stdin:
        asked, out, err = json.loads(line), io.StringIO(), io.StringIO()
        os.environ.pop("HF_TOKEN", None)
        if asked["token"] is not None:
            os.environ["HF_TOKEN"] = asked["token"]
        code = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                sys.argv = ["finllm-prune", *asked["arguments"]]
                main()
            except SystemExit as left:
                code = int(left.code or 0)
            except BaseException:
                traceback.print_exc()
                code = 1
        print(json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}), file=answers, flush=True)


if __name__ == "__main__":
    serve()
