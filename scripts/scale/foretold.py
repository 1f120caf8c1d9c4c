"""From what was measured on a few ranks to many: a model whose every number is stated, and what it says breaks first."""

import math
from dataclasses import dataclass
from typing import Any

INSIDE, ACROSS = 200e9, 25e9  # bytes per second of one GPU, in a machine of eight and between machines: assumed
HOP = 10e-6  # seconds that a collective call takes for each doubling of the ranks: assumed
CHOICES = 64  # per run, the default of a schedule


@dataclass(frozen=True)
class Big:
    """What the model needs to know of a language model.

    Args:
        targeted: weights in the linear layers of its blocks.
        matrices: how many these are.
        neurons: units of each MLP.
        blocks: how many MLPs.
        bytes: of one weight in training.
    """

    name: str
    targeted: float
    matrices: int
    neurons: int
    blocks: int
    bytes: int


MODELS = (Big("BERT-base, fp32", 85e6, 72, 3072, 12, 4), Big("Llama 8B, bf16", 6.98e9, 224, 14336, 32, 2))


def call_seconds(gpus: int) -> float:
    """A collective call of a few bytes."""
    return HOP * math.log2(gpus)


def sum_seconds(gpus: int, size: float) -> float:
    """An all-reduce of so many bytes on a ring."""
    return 2 * (gpus - 1) / gpus * size / (INSIDE if gpus <= 8 else ACROSS)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown; ``rows`` are those of ``scale.ranks``, which say how many calls a choice of masks makes per matrix."""
    split = [row for row in rows if row["engine"] == "FSDP2" and row["pruning"] == "single weights, global"]
    most = max(split, key=lambda row: row["ranks"])
    per_matrix, sent = (value / most["groups"] for value in most["choice"])
    lines = [
        f"Assumed: {INSIDE / 1e9:.0f} GB/s in a machine of 8 GPUs, {ACROSS / 1e9:.0f} GB/s between machines, "
        f"{HOP * 1e6:.0f} µs x log2(ranks) for each call. Measured: {per_matrix:.1f} calls and {sent / 1e3:.0f} kB "
        f"per matrix and choice, {CHOICES} choices a run.\n",
        "| model | GPUs | DDP: held on each GPU, GB (factored moments, no regrowth) | FSDP2, single weights: held, GB "
        "| added per step, ms | per choice, ms | sent per choice, MB (a gather at its worst) "
        "| FSDP2, neurons: added per step, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for big in MODELS:
        held = big.targeted * (12 + big.bytes + 1)  # scores and moments in fp32, parked values, masks
        light = big.targeted * (4 + 1)  # scores and masks
        for gpus in (8, 64, 512):
            call = call_seconds(gpus)
            worst = gpus * 4 * min(2**17, big.targeted / gpus)
            choice = call * per_matrix * big.matrices + sum_seconds(gpus, sent * big.matrices)
            neurons = (1 + big.blocks) * call + sum_seconds(gpus, 4 * big.neurons * big.blocks)
            lines.append(
                f"| {big.name} | {gpus} | {held / 1e9:.2f} ({light / 1e9:.2f}) | {held / gpus / 1e9:.3f} | {1e3 * call:.2f} "
                f"| {1e3 * choice:.0f} | {sent * big.matrices / 1e6:.0f} ({worst / 1e6:.0f}) | {1e3 * neurons:.2f} |"
            )
    return "\n".join(lines)
