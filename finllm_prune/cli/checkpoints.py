"""What is done with a finished checkpoint: prove it again, and write it in another form."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from finllm_prune.cli.screen import console

if TYPE_CHECKING:
    from finllm_prune.export import Written


def verify(
    model: Annotated[
        str,
        typer.Argument(help="A folder that finllm-prune exported, or one that holds such, as a run's; or a Hub id."),
    ],
    revision: Annotated[str | None, typer.Option(help="Of a Hub id: a branch, tag or commit.")] = None,
) -> None:
    """Prove exported checkpoints again from their files: hashes, zeros, recorded logits; one line for each.

    Files that are not named in the manifest are allowed for people only (.md, .yaml, .png, .html, no suffix, report.json):
    transformers would take a stray weight file, adapter or script for a part of the model. A Hub id is downloaded first.

    Exit codes: 0 all hold, 2 nothing was exported there, 4 the first that does not hold.
    """
    from finllm_prune.checkpoints import exported_in, proved
    from finllm_prune.checkpoints import verify as verify_folder
    from finllm_prune.hub.pull import pull

    place = pull(model, revision)
    for folder in exported_in(place):
        name = Path(model) / folder.relative_to(place)
        console.print(f"{name}: {proved(verify_folder(folder))}", soft_wrap=True)


def export(
    model: Annotated[Path, typer.Argument(help="A saved model in any whole format, or a run's output (its masked/).")],
    out: Annotated[Path, typer.Argument(help="The folder to make: each format lies in OUT/FORMAT.")],
    to: Annotated[list[str], typer.Option(metavar="FORMAT", help="A format to write; can be given again.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an OUT that holds exported checkpoints only.")] = False,
) -> None:
    """Write a finished model in other formats, each proved; whole or not at all.

    \b
    finllm-prune export outputs/quickstart exported --to compact
    finllm-prune export outputs/quickstart/masked exported --to masked --to compact --overwrite

    \b
    masked         zeros in place: size and speed of dense; loads anywhere
    compact        what has no effect is gone, blocks are of one width; loads anywhere
    ragged         each block as narrow as it can be; after import finllm_prune
    ragged-remote  ragged for trust_remote_code=True, without this package
    packed         ragged, zeros in one bit: a small file; after import finllm_prune
    packed-int8    packed with 8-bit values: the smallest file; not equal
    onnx           ragged as a graph for onnxruntime, without PyTorch; no language models
    onnx-int8      that graph in 8 bits: smaller and faster; not equal

    What is not equal to the model is measured instead, and the manifest says how far it lies. A graph is also held against the
    model on texts: those of the recipe beside it, or embedded ones. The source is proved first where it has a manifest; its
    card and recipe are carried along.

    Exit codes: 0 done, 2 bad input or a full disk (OUT is as it was), 4 a proof failed (OUT is as it was).
    """
    from finllm_prune.export import export as write

    _print_written(write(model, out, to, overwrite=overwrite), str(model))


def delta(
    base: Annotated[str, typer.Argument(help="The dense base: a saved model or Hub id.")],
    model: Annotated[
        Path, typer.Argument(help="What was made from it, zeros in place; or a run's output (its masked/).")
    ],
    out: Annotated[Path, typer.Argument(help="The folder to make.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an OUT that holds exported checkpoints only.")] = False,
) -> None:
    """Write what a task changes in a dense base: bitmasks of zeros, and values where they differ.

    \b
    finllm-prune delta outputs/quickstart/dense outputs/quickstart deltas/quickstart

    Many tasks share one base in memory: finllm_prune.checkpoints.delta.apply turns it into one, remove turns it back. After
    score_movement, which keeps the base's values, a delta takes a 32nd of each matrix; after ordinary fine-tuning it holds the
    changed values too, and is much larger.

    Exit codes: 0 done, 2 bad input or a full disk (OUT is as it was), 4 a proof failed (OUT is as it was).
    """
    from finllm_prune.export import export_delta

    written, counts = export_delta(base, model, out, overwrite=overwrite)
    _print_written([written], str(model))
    console.print(", ".join(f"{count} tensors {_IN_A_DELTA[kind]}" for kind, count in counts.items()), soft_wrap=True)


_IN_A_DELTA = {"equal": "as in the base", "zeros": "with new zeros alone", "values": "with other values"}


def trim(
    model: Annotated[str, typer.Argument(help="A saved model or Hub id, of any head.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    texts: Annotated[
        str,
        typer.Option(
            help="Where tokens are counted: .txt (a text a line), .jsonl, .csv, .parquet, a folder of splits, or builtin."
        ),
    ],
    held_out: Annotated[
        str | None, typer.Option(help="Texts to measure the change on; of a folder, validation and test.")
    ] = None,
    min_count: Annotated[int, typer.Option(min=1, help="A token stays if it occurs this often.")] = 1,
    column: Annotated[str, typer.Option(help="The column of the text, where there are columns.")] = "text",
    overwrite: Annotated[bool, typer.Option(help="Replace a model that is already in the folder.")] = False,
) -> None:
    """Keep only the tokens that some texts use: embeddings are over half of a small encoder.

    Special tokens and single characters (or bytes) stay, so that every text can still be encoded; a word whose token is gone
    falls into smaller pieces, which --held-out counts. On texts of kept tokens the model gives the same logits: this is
    proved from the written files, or nothing is left behind; ragged stays ragged, and packed packed. The more texts, the safer:
    take all that you can get, not only the labelled ones, and fine-tune afterwards if many tokens change.

    \b
    finllm-prune trim outputs/quickstart/compact small --texts builtin --held-out builtin
    finllm-prune trim outputs/quickstart/compact small --texts filings.txt --min-count 2

    Exit codes: 0 done, 2 bad input or a full disk (OUT is as it was), 4 a proof failed (OUT is as it was).
    """
    from finllm_prune.trim import trim_saved

    trimmed, change = trim_saved(model, out, texts, held_out, min_count, column, overwrite)
    before, after = (trimmed.bytes[when] for when in ("before", "after"))
    console.print(f"{out}: {len(trimmed.old):,} of {trimmed.whole:,} tokens stay.", soft_wrap=True, highlight=False)
    console.print(
        f"Weights: {before / 1e6:.1f} MB before, {after / 1e6:.1f} MB after ({after / before:.2f} ×).", highlight=False
    )
    console.print(f"Proved on {len(trimmed.texts)} texts of kept tokens: the same logits.", highlight=False)
    if change is not None:
        console.print(f"Of {change.texts:,} texts, {change}.", soft_wrap=True, highlight=False)


def _print_written(written: "Sequence[Written]", source: str) -> None:
    table = Table("format", "files", "MB", "of the source", "loads with", "folder", title=f"{source} as")
    for each in written:
        table.add_row(
            each.format,
            str(each.files),
            f"{each.bytes / 1e6:.2f}",
            f"{each.ratio:.3f}",
            each.loads_with,
            str(each.folder),
        )
    console.print(table)
