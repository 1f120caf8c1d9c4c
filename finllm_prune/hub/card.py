"""The model card, written from the report: measured values only."""

import html
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from finllm_prune.checkpoints import LOSSY, PLUGGED, SERVED
from finllm_prune.evaluation import Report

_TEMPLATE = Path(__file__).with_name("card_template.md")


def base_license(name: str) -> str | None:
    """The license that a base model's own card declares, where the card can be read."""
    local = Path(name)
    try:
        declared = ModelCard.load(local / "README.md" if local.is_dir() else name).data.get("license")
    except (ValueError, OSError, HfHubHTTPError):
        return None
    return declared if isinstance(declared, str) else None


def write_card(report: Report, folder: Path, exported: list[str]) -> None:
    """``README.md`` of a run, with copies in the folders of its formats, and the figures that it shows."""
    run = report.run
    card = ModelCard.from_template(
        _metadata(report, folder.name),
        template_path=str(_TEMPLATE),
        title=inert(folder.name.removesuffix(".partial")),
        rows=inert(report.rows()),
        report=inert(report.to_dict()),
        verdict=_verdict(report),
        base_model=_linked(inert(run["base_model"]["name"])),
        keep_layers=run["recipe"]["model"]["keep_layers"],
        rules=inert(run["recipe"]["pruning"]["rules"]),
        schedule=run["recipe"]["pruning"]["schedule"],
        oneshot=run["recipe"]["pruning"]["oneshot"],
        distillation=run["recipe"]["distillation"],
        recovery=run["recipe"]["recovery"],
        recorded=run["recipe"]["recording"] is not None,
        template=run["data"].get("template"),  # as JSON in a line of code, which makes it inert and keeps it as it is
        chats=(folder / "dense" / "chat_template.jinja").is_file(),
        exported=exported,
        served=[name for name in exported if name in SERVED],
        plugged=[name for name in exported if name in PLUGGED],
        plain=[name for name in exported if name not in (*PLUGGED, *SERVED)],
        shown=next((name for name in reversed(exported) if name not in (*LOSSY, *SERVED)), "dense"),
    )
    card.save(folder / "README.md")
    for name in exported:
        shutil.copy(folder / "README.md", folder / name / "README.md")
        shutil.copy(folder / "recipe.yaml", folder / name / "recipe.yaml")
        shutil.copytree(folder / "plots", folder / name / "plots", dirs_exist_ok=True)


def inert(value: Any) -> Any:
    """Plain data whose texts are shown as they are, in a table too: labels and names of files come from others."""
    if isinstance(value, dict):
        return {inert(key): inert(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [inert(item) for item in value]
    return " ".join(html.escape(value).replace("|", "&#124;").splitlines()) if isinstance(value, str) else value


def _metadata(report: Report, name: str) -> ModelCardData:
    run = report.run
    data = run["data"]["source"]
    results = [
        EvalResult(
            task_type=run["pipeline_tag"], dataset_type=run["task"], dataset_name=data, dataset_split="test",
            metric_type=metric, metric_value=round(value["pruned"], 4),
        )
        for metric, value in report.quality.metrics.items()
    ]  # fmt: skip
    pruning, base = run["recipe"]["pruning"], run["base_model"]["name"]
    methods = [pruning["oneshot"]] if pruning["oneshot"] else [rule["criterion"] for rule in pruning["rules"]]
    tags = ["finance", "pruning", "finllm-prune", *sorted({f"{m['name'].replace('_', '-')}-pruning" for m in methods})]
    extra: dict[str, Any] = {"license": run["license"]} if run.get("license") else {}
    return ModelCardData(
        model_name=name.removesuffix(".partial"), language="en", library_name="transformers", pipeline_tag=run["pipeline_tag"],
        base_model=None if Path(base).is_dir() else base, tags=tags,
        eval_results=results, **extra,
    )  # fmt: skip


def _linked(name: str) -> str:
    """A base model on the Hub as a link; a local folder by its name alone."""
    return Path(name).name if Path(name).is_dir() else f"[{name}](https://huggingface.co/{name})"


def _verdict(report: Report) -> str:
    if report.quality.collapsed:
        return f"**COLLAPSED: this model {report.quality.collapse}. Do not use it.**"
    if collapsed := [name for name, quality in report.exported.items() if quality.collapsed]:
        return f"**COLLAPSED: {', '.join(collapsed)} {report.quality.collapse}. Do not use it.**"
    missed = ""
    if report.target is not None and not report.target["met"]:
        missed = f" **MISSED the target: {report.target['kind']} {report.target['asked']:g} of the dense model's was asked.**"
    if not report.gates:
        return "No gates were set for this run." + missed
    failed = [name for name, verdict in report.verdicts().items() if not verdict["passed"]]
    return (f"**FAILED gates: {', '.join(failed)}.**" if failed else "All gates of this run passed.") + missed
