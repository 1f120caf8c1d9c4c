"""What a one-shot pruning measured: the table on the screen, report.json, the model card."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from finllm_prune.checkpoints import PLUGGED
from finllm_prune.evaluation import Quality, quality_rows
from finllm_prune.hub.card import inert
from finllm_prune.oneshot.likelihood import Perplexity

_TEMPLATE = Path(__file__).with_name("card_template.md")
_OF = {
    "targeted": "the targeted weights",
    "encoder_linear": "all linear layers of the blocks",
    "all_parameters": "all parameters",
}


@dataclass(frozen=True)
class OneShotReport:
    """The figures, measured on the files that were written.

    Args:
        perplexity: of the dense and the pruned model.
        quality: of predictions by label likelihood.
        sparsity: denominator -> the part of zeros.
        bytes: format -> of its weights on disk; of the dense model in the dtype in which it was pruned.
        dropped: the blocks that became identities, by their numbers from 0.
        run: what the figures are made of.
    """

    perplexity: tuple[Perplexity, Perplexity] | None
    quality: Quality | None
    sparsity: dict[str, float]
    bytes: dict[str, int]
    dropped: list[int]
    run: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "perplexity": None if self.perplexity is None else self._perplexity(*self.perplexity),
            "labels": None if self.quality is None else asdict(self.quality),
            "sparsity": self.sparsity,
            "bytes": self.bytes,
            "dropped_blocks": self.dropped,
            **self.run,
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def rows(self) -> list[tuple[str, str, str]]:
        """What, dense, pruned."""
        out: list[tuple[str, str, str]] = []
        if self.perplexity is not None:
            dense, pruned = self.perplexity
            values = [_within(each.value, each.interval()) for each in self.perplexity]
            out.append(("perplexity [95 % interval]", values[0], values[1]))
            ratio = _within(pruned.value / dense.value, pruned.interval(dense))
            out.append(("  ratio to the dense model's", "", ratio))
        if self.quality is not None:
            out += [(f"{what}, by label likelihood", was, now) for what, was, now in quality_rows(self.quality)]
        out += [(f"zeros among {_OF[name]}", "", f"{part:.1%}") for name, part in self.sparsity.items()]
        if self.dropped:
            out.append(("blocks dropped", "", ", ".join(map(str, self.dropped))))
        whole = self.bytes["dense"]
        for name, size in self.bytes.items():
            if name != "dense":
                out.append(
                    (f"weights, {name}", f"{whole / 1e6:.1f} MB", f"{size / 1e6:.1f} MB, ratio {size / whole:.2f}")
                )
        return out

    @staticmethod
    def _perplexity(dense: Perplexity, pruned: Perplexity) -> dict[str, Any]:
        return {
            "dense": dense.value,
            "dense_interval": dense.interval(),
            "pruned": pruned.value,
            "pruned_interval": pruned.interval(),
            "ratio": pruned.value / dense.value,
            "ratio_interval": pruned.interval(dense),
            "windows": len(dense.counts),
            "predicted_tokens": int(dense.counts.sum()),
        }


def _within(value: float, interval: list[float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def write_card(report: OneShotReport, folder: Path, name: str, exported: list[str]) -> None:
    """``README.md`` of the output, with copies in the folders of its formats."""
    run = report.run
    base = run["base_model"]["name"]
    local = Path(base).is_dir()
    tags = ["finance", "pruning", "finllm-prune", f"{run['recipe']['pruning']['oneshot']['name']}-pruning"]
    metadata = ModelCardData(
        model_name=name, language="en", library_name="transformers", pipeline_tag="text-generation", tags=tags,
        base_model=None if local else base, **({"license": run["license"]} if run["license"] else {}),
    )  # fmt: skip
    card = ModelCard.from_template(
        metadata,
        template_path=str(_TEMPLATE),
        title=inert(name),
        base_model=inert(Path(base).name if local else f"[{base}](https://huggingface.co/{base})"),
        rows=inert(report.rows()),
        report=inert(report.to_dict()),
        recipe=inert(run["recipe"]),
        exported=exported,
        plugged=[each for each in exported if each in PLUGGED],
    )
    card.save(folder / "README.md")
    for each in exported:
        for file in ("README.md", "recipe.yaml"):
            shutil.copy(folder / file, folder / each / file)
