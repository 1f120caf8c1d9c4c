"""What goes to the Hub, and the card that tells of it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finllm_prune.cli.screen import console

if TYPE_CHECKING:
    from finllm_prune.hub.push import Pushed


def push(
    folder: Annotated[Path, typer.Argument(help="The output of a run or of export, or one exported format.")],
    repo_id: Annotated[str, typer.Argument(help="owner/name; made where there is none.")],
    revision: Annotated[str | None, typer.Option(help="The branch; main without it.")] = None,
    tag: Annotated[str | None, typer.Option(help="A name for this very commit.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the commit instead of making it.")] = False,
    public: Annotated[
        bool, typer.Option("--public", help="For everybody; without it a new repository is private.")
    ] = False,
    formats: Annotated[
        list[str] | None, typer.Option("--format", metavar="FORMAT", help="A format to push; can be given again.")
    ] = None,
    allow_failed_gates: Annotated[
        bool, typer.Option("--allow-failed-gates", help="Push what is no success; the card says so in its first line.")
    ] = False,
) -> None:
    """Push a finished model to the Hub in one commit, after proving it again from its files.

    \b
    finllm-prune push outputs/quickstart org/name
    finllm-prune push outputs/quickstart org/name --format compact --format onnx --tag v1

    The best format that plain transformers loads lies at the root, where from_pretrained("org/name") finds it; each other one
    in a folder of its name (subfolder="ragged"). The token is that of `hf auth login` or HF_TOKEN. What the Hub has already is
    not sent again. Local paths are left out of the recipe's copy; report and recorded steps stay here.

    Exit codes: 0 pushed, 2 bad input (a failed gate, an unknown file, a secret; nothing was sent), 4 a proof failed, 5 the
    Hub cannot be reached or refuses.
    """
    from finllm_prune.hub.push import Hub
    from finllm_prune.hub.push import push as push_folder

    hub = Hub(repo_id, private=not public, revision=revision, create_pr=create_pr, tag=tag)
    print_pushed(push_folder(folder, hub, formats or [], allow_failed_gates=allow_failed_gates), repo_id)


def card(
    folder: Annotated[Path, typer.Argument(help="The output of a run.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY.SUB=VALUE]...", help="governance.<field> or model.license.")
    ] = None,
) -> None:
    """Write the cards of a finished run again, with what people say of it now; what was measured stays as it was.

    \b
    finllm-prune card outputs/quickstart governance.owner="Model Risk" governance.intended_use="Triage of news, by analysts"
    finllm-prune card outputs/quickstart model.license=cc-by-nc-sa-3.0

    Fields: owner, contact, intended_use, out_of_scope, monitoring, data_license. They are kept in governance.yaml beside the
    report. The cards of all formats are written; their proofs hold as before.
    """
    from finllm_prune.hub.card import rewrite_card

    for path in rewrite_card(folder, overrides or []):
        console.print(str(path), soft_wrap=True, highlight=False)


def print_pushed(pushed: "Pushed", repo_id: str) -> None:
    """Which format lies where, and the commit."""
    for name, place in pushed.places.items():
        console.print(f"{name}: {repo_id}" + (f", subfolder {place}" if place else ""), soft_wrap=True, highlight=False)
    console.print(f"{'Pushed' if pushed.new else 'Nothing new'}: {pushed.url}", soft_wrap=True, highlight=False)
