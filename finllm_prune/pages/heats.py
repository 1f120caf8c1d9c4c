"""Tables that are looked at: each cell its text, and 0 to 1 for its colour."""

from dataclasses import dataclass
from typing import Any

from finllm_prune.evaluation.sparsity import place_of

Cell = tuple[str, float]


@dataclass(frozen=True)
class Heat:
    """What there is to see (``title``), and the table; an empty place has no cell."""

    title: str
    corner: str
    columns: list[str]
    rows: list[tuple[str, list[Cell | None]]]


def density(layers: list[dict[str, Any]]) -> Heat:
    """Blocks down, matrices across."""
    blocks: dict[str, dict[str, float]] = {}
    for layer in layers:
        block, matrix = place_of(layer["layer"])
        blocks.setdefault(block, {})[matrix] = layer["density"]
    matrices = list(dict.fromkeys(name for block in blocks.values() for name in block))
    lists = {block.rpartition(".")[0] for block in blocks}
    low, high = (100 * pick(layer["density"] for layer in layers) for pick in (min, max))
    return Heat(
        f"Density: each matrix keeps {low:.1f} %"
        if low == high
        else f"Density: matrices keep {low:.1f} to {high:.1f} %",
        "block",
        matrices,
        [
            (
                block.rpartition(".")[2] if len(lists) == 1 else block,
                [(f"{100 * row[name]:.0f}", row[name]) if name in row else None for name in matrices],
            )
            for block, row in blocks.items()
        ],
    )


def confusion(found: dict[str, Any]) -> tuple[str, dict[str, Heat]]:
    """What changed most, in a sentence, and a table for ``dense`` and ``pruned``: right classes down, answers across."""
    labels, kinds = found["labels"], ("dense", "pruned")
    before, after = (found[kind] for kind in kinds)
    cells = [(right, told) for right in range(len(labels)) for told in range(len(labels))]
    right, told = max(cells, key=lambda cell: abs(after[cell[0]][cell[1]] - before[cell[0]][cell[1]]))
    heats = {
        kind: Heat(
            kind, "right ↓ told →", labels,
            [(name, [(f"{n:,}", n / max(1, sum(row))) for n in row]) for name, row in zip(labels, found[kind], strict=True)],
        )
        for kind in kinds
    }  # fmt: skip
    counts = f"{before[right][told]:,} rows of the dense model, {after[right][told]:,} of the pruned one"
    return f"Most changed: {labels[right]} told to be {labels[told]}, {counts}", heats
