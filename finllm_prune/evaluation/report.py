"""The report of a run: measured values only, frozen; the table, the card and the gates are read from it."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from finllm_prune.errors import InputError
from finllm_prune.evaluation.evidence import Evidence
from finllm_prune.evaluation.quality import Quality
from finllm_prune.metrics import ERRORS

_BETTER = (
    "accuracy", "macro_f1", "micro_f1", "mcc", "top3_accuracy", "pearson", "spearman", "r2", "ndcg_at_10", "mrr_at_10", "map",
    "recall_at_10", "recall_at_100", "token_accuracy",
)  # fmt: skip
GATES = dict.fromkeys(_BETTER, "min") | dict.fromkeys(ERRORS, "max")
GATES |= {f"{name}_retention": way for name, way in GATES.items()} | {"agreement": "min", "latency_ratio": "max"}


@dataclass(frozen=True)
class Report:
    """Everything that a run measured and what it was made of; ``report.json`` holds it with the metrics at the top level.

    Args:
        quality: dense against pruned on the test split.
        sparsity: denominator -> part of the weights that is zero or gone.
        bytes: folder -> size of its weights.
        latency: one entry per batch size; ``model`` in it names the folder that was measured.
        layers: path, shape, density of every prunable layer of the masked model.
        history: the training's log: step, loss, sparsity.
        run: seed, versions, machine, data, recipe, wall times, warnings.
        gates: the thresholds asked for.
        target: what the pruned model was to cost (``check_target``); None where the recipe names no target.
        exported: format -> dense against it on the test split, for formats that are not exactly the pruned model.
        evidence: what else was asked of both models on the test split; None where the recipe asks nothing.
    """

    quality: Quality
    sparsity: dict[str, float]
    bytes: dict[str, int]
    latency: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    history: list[dict[str, Any]]
    run: dict[str, Any]
    gates: dict[str, float] = field(default_factory=dict)
    target: dict[str, Any] | None = None
    exported: dict[str, Quality] = field(default_factory=dict)
    evidence: Evidence | None = None

    def value(self, name: str) -> float:
        """The measured value that a gate of this name looks at."""
        quality = self.quality
        if name == "agreement":
            return quality.agreement
        if name == "latency_ratio":
            return float(self.latency[0]["ratio"])
        if name.endswith("_retention"):
            return quality.retention[name.removesuffix("_retention")]
        return float(quality.metrics[name]["pruned"])

    def verdicts(self) -> dict[str, dict[str, Any]]:
        """Gate -> threshold, measured value, and whether it passed. A collapsed model passes none."""
        out = {}
        for name, threshold in self.gates.items():
            value = self.value(name)
            good = value >= threshold if GATES[name] == "min" else value <= threshold
            out[name] = {"threshold": threshold, "value": value, "passed": good and not self.quality.collapsed}
        return out

    def passed(self) -> bool:
        collapsed = any(quality.collapsed for quality in (self.quality, *self.exported.values()))
        return not collapsed and all(verdict["passed"] for verdict in self.verdicts().values())

    def to_dict(self) -> dict[str, Any]:
        quality = asdict(self.quality)
        return {
            **quality.pop("metrics"),
            **{f"{name}_retention": value for name, value in quality.pop("retention").items()},
            **quality,
            "evidence": self.evidence.to_dict() if self.evidence is not None else None,
            "exported": {name: asdict(other) for name, other in self.exported.items()},
            "sparsity": self.sparsity,
            "bytes": self.bytes,
            "latency_ratio": self.latency[0]["ratio"],
            "latency": self.latency,
            "target": self.target,
            "gates": self.verdicts(),
            "passed": self.passed(),
            **self.run,
            "layers": self.layers,
            "history": self.history,
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=2) + "\n")

    def rows(self) -> list[tuple[str, str, str]]:
        """The table of a run: what, dense, pruned."""
        out = quality_rows(self.quality) + first_stage_rows(self.quality.metrics, self.run.get("data", {}))
        for name, other in self.exported.items():
            out += [(f"{what.strip()}, {name}", dense, pruned) for what, dense, pruned in quality_rows(other)]
        for name, part in self.sparsity.items():
            out.append((f"sparsity of {TITLES.get(name, name)}", "0.0 %", f"{100 * part:.1f} %"))
        for name, size in self.bytes.items():
            if name != "dense":
                cells = [f"{b / 1e6:.1f} MB" for b in (self.bytes["dense"], size)]
                out.append(
                    (f"weights on disk, {name}", cells[0], f"{cells[1]}, ratio {size / self.bytes['dense']:.2f}")
                )
        if vocabulary := self.run.get("vocabulary"):
            kept = f"{vocabulary['kept']:,} kept"
            out.append((f"tokens: {vocabulary['summary']}", f"{vocabulary['tokens']:,}", kept))
            before = vocabulary["weight_bytes"]["before"]
            ratios = ", ".join(f"{name} {size / before:.2f}" for name, size in self.bytes.items())
            out.append(
                ("weights on disk, against the dense model with all its tokens", f"{before / 1e6:.1f} MB", ratios)
            )
        for entry in self.latency:
            shape = f"{entry['batch']} × {entry['tokens']} tokens"
            what = f"CPU latency, {entry['model']}, {shape} (median)"
            speed = f"{entry['small_ms']:.1f} ms, ratio {entry['ratio']:.2f}"
            out.append((what, f"{entry['dense_ms']:.1f} ms", speed))
        if self.run.get("skipped_steps"):
            out.append(("steps skipped for infinite or NaN gradients", "", str(self.run["skipped_steps"])))
        if (target := self.target) is not None:
            whole = " with all its tokens" if target["kind"] == "size" and self.run.get("vocabulary") else ""
            what = f"target {target['kind']} {target['asked']:g} of the dense model's{whole}"
            out.append((what, "1.000", f"{target['measured']:.3f} {'met' if target['met'] else 'MISSED'}"))
        for name, verdict in self.verdicts().items():
            sign = "≥" if GATES[name] == "min" else "≤"
            word = "passed" if verdict["passed"] else "FAILED"
            out.append((f"gate {name} {sign} {verdict['threshold']:g}", "", f"{verdict['value']:.3f} {word}"))
        return out


TITLES = {
    "accuracy": "accuracy", "macro_f1": "macro-F1", "mcc": "MCC", "targeted": "the targeted weights",
    "encoder_linear": "the encoder's linear weights", "all_parameters": "all parameters",
    "micro_f1": "micro-F1", "top3_accuracy": "top-3 accuracy", "mse": "mean squared error", "mae": "mean absolute error",
    "pearson": "Pearson's correlation", "spearman": "Spearman's rank correlation", "r2": "R²",
    "ndcg_at_10": "nDCG@10", "mrr_at_10": "MRR@10", "map": "MAP", "recall_at_10": "Recall@10",
    "recall_at_100": "Recall@100",
    "perplexity": "perplexity of completions", "token_accuracy": "accuracy of the next token",
}  # fmt: skip


def quality_rows(quality: Quality) -> list[tuple[str, str, str]]:
    """The part of the table that compares predictions: what, dense, pruned."""
    out = []
    for name, value in quality.metrics.items():
        dense, pruned = (with_interval(value, kind) for kind in ("dense", "pruned"))
        out.append((f"{TITLES.get(name, name)} [95 % interval]", dense, pruned))
        what = "part of the dense model's" if name in ERRORS else "retention of"
        part = (
            f"{quality.retention[name]:.1%}" if value["dense"] > 0 else "–"
        )  # of a correlation below 0 it says nothing
        out.append((f"  {what} {TITLES.get(name, name)}", "", part))
    same = "same passage first" if quality.unit == "query" else "same prediction"
    out.append((f"{same} (agreement)", "", f"{quality.agreement:.1%}"))
    names = " / ".join(name.replace("_to_", "→").replace("_", " ") for name in quality.flips)
    out.append((f"flips {names}", "", " / ".join(str(n) for n in quality.flips.values())))
    out.append((f"{quality.paired_test}, p", "", f"{quality.paired_p:.3f}"))
    return out


def first_stage_rows(metrics: dict[str, dict[str, Any]], facts: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What the candidates of a reranker are worth as they came, where there are some, and what each model adds to that."""
    if (found := facts.get("first_stage")) is None:
        return []
    rows = []
    for name, value in metrics.items():
        if "first_stage" in value:
            alone = with_interval(value, "first_stage")
            rows.append((f"{TITLES[name]} of {found['name']} alone", alone, alone))
            dense, pruned = (with_interval(value, f"{kind}_above_first_stage", "+.3f") for kind in ("dense", "pruned"))
            rows.append((f"  {TITLES[name]} above that", dense, pruned))
    recall = f"{found['test']['recall']:.3f}"
    return [*rows, (f"relevant passages among its {found['candidates']} candidates", recall, recall)]


def with_interval(value: dict[str, Any], kind: str, shape: str = ".3f") -> str:
    """A figure of a metric, as ``compare`` gives them, with its interval."""
    low, high = value[f"{kind}_interval"]
    return f"{value[kind]:{shape}} [{low:{shape}}, {high:{shape}}]"


def check_gates(gates: dict[str, float]) -> None:
    """Refuse a gate that nothing measures, before training."""
    for name in gates:
        if name not in GATES:
            raise InputError(f"gates.{name}: there is no such gate; known: {', '.join(GATES)}")
