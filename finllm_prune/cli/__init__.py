"""The command line: arguments to the package; no logic. One file for each kind of thing that commands are about."""

import logging
import os
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

import finllm_prune
from finllm_prune.cli.checkpoints import delta, export, trim, verify
from finllm_prune.cli.hub import card, push
from finllm_prune.cli.models import evaluate, inspect, pull_and_compare
from finllm_prune.cli.recipes import oneshot, plan, run
from finllm_prune.cli.report import report
from finllm_prune.cli.screen import BAD_INPUT, NOT_PUSHED, PROOF_FAILED, console
from finllm_prune.cli.sweeps import SeveralValues, dense, sweep
from finllm_prune.errors import HubError, InputError, ProofError

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Fine-tune financial language models while pruning them."
)
for command in (
    run,
    plan,
    oneshot,
    evaluate,
    inspect,
    verify,
    export,
    delta,
    trim,
    report,
    card,
    push,
    pull_and_compare,
):
    app.command()(command)
app.command(cls=SeveralValues)(sweep)
app.command(hidden=True)(dense)


def _version(show: bool) -> None:
    if show:
        console.print(f"finllm-prune {finllm_prune.__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    ranks, rank = (int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    logging.basicConfig(
        level=logging.WARNING if rank else logging.INFO,
        format="%(message)s" if ranks == 1 else f"[rank {rank}] %(message)s",
    )
    for talkative in ("httpx2", "accelerate", "bm25s"):
        logging.getLogger(talkative).setLevel(logging.WARNING)
    if ranks > 1:
        _one_of_several(rank)


def _one_of_several(rank: int) -> None:
    """The first process tells how it goes, with bars; the others only warn, and all warnings say whose they are."""
    if rank:
        os.environ["TQDM_DISABLE"] = os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    from transformers.utils import logging as theirs

    logging.captureWarnings(True)
    theirs.disable_default_handler()
    theirs.enable_propagation()
    if rank:
        theirs.disable_progress_bar()


def main() -> None:
    """The console script: errors that a user can act on are one line, not a traceback."""
    try:
        app()
    except InputError as error:
        Console(stderr=True, emoji=False).print(
            f"[bold red]Error:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        raise SystemExit(BAD_INPUT) from None
    except ProofError as error:
        Console(stderr=True, emoji=False).print(
            f"[bold red]Proof failed:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        raise SystemExit(PROOF_FAILED) from None
    except HubError as error:
        Console(stderr=True, emoji=False).print(
            f"[bold red]Not pushed:[/] {escape(str(error))}", highlight=False, soft_wrap=True
        )
        raise SystemExit(NOT_PUSHED) from None
