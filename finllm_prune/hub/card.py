"""The model card, written from the report of a run: measured values, and what people have said."""

import html
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
import yaml
from huggingface_hub import DatasetCard, EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError

from finllm_prune.checkpoints import LOSSY, PLUGGED, SERVED
from finllm_prune.checkpoints.manifest import MANIFEST, REPORT, of_oneshot
from finllm_prune.errors import InputError
from finllm_prune.evaluation import GATES, TITLES, first_stage_rows
from finllm_prune.evaluation.non_inferiority import p_value
from finllm_prune.hub.governance import Governance, license_conflict, license_notes
from finllm_prune.metrics import ERRORS
from finllm_prune.settings import build, read_yaml, refuse_unknown, set_override, typed
from finllm_prune.staging import save_text

_TEMPLATE = Path(__file__).with_name("card_template.md")
SAID = "governance.yaml"  # what people said after the run


def license_of(name: str, card: type[ModelCard] | type[DatasetCard] = ModelCard) -> str | None:
    """The license that the card of a base model or of a data set declares, where that can be read; folders have theirs too."""
    local = Path(name)
    try:
        declared = card.load(local / "README.md" if local.is_dir() else name).data.get("license")
    except (ValueError, OSError, HfHubHTTPError):
        return None
    return declared if isinstance(declared, str) else None


def rewrite_card(folder: Path, overrides: Sequence[str] = ()) -> list[Path]:
    """Write the cards of a finished run again, with what people say of it now; what was measured stays as it was.

    Args:
        folder: the output of a run.
        overrides: ``governance.<field>=value`` and ``model.license=value``, kept in ``governance.yaml`` beside the report.

    Returns:
        The cards.

    Raises:
        InputError: there is no report, it is damaged, or an override is of something else.
    """
    if (folder / MANIFEST).is_file():
        raise InputError(f"{folder} is one format of a run; name the folder above it, whose cards are all written")
    said = read_yaml(folder / SAID, overrides, "file") if (folder / SAID).is_file() else _said(overrides)
    _check(said)
    try:
        figures: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
        if of_oneshot(figures):
            raise InputError(
                f"{folder} is the output of finllm-prune oneshot, whose card is written once; edit its README.md"
            )
        exported = [name for name in figures["recipe"]["export"] if (folder / name / MANIFEST).is_file()]
        written = write_card(figures, folder, exported, said)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"there is no {folder / REPORT}; name the output of a run") from None
    except (ValueError, KeyError, TypeError, AttributeError, jinja2.UndefinedError) as error:
        raise InputError(
            f"{folder / REPORT} is damaged, or of another version ({error!r}); bring back the report of the run"
        ) from error
    if said:
        save_text(yaml.safe_dump(said, sort_keys=False, allow_unicode=True), folder / SAID)
    return written


def write_card(
    figures: dict[str, Any], folder: Path, exported: Sequence[str], said: dict[str, Any] | None = None
) -> list[Path]:
    """``README.md`` of a run and of the folders of its formats, beside which recipe and plots come to lie.

    Args:
        figures: of ``Report.to_dict``.
        said: after the run, which goes before what the recipe says.
    """
    chats = (folder / "dense" / "chat_template.jinja").is_file()
    card = _card(figures, folder.name.removesuffix(".partial"), exported, said or {}, chats)
    for name in exported:
        if not (folder / name / "recipe.yaml").exists():
            shutil.copy(folder / "recipe.yaml", folder / name / "recipe.yaml")
            shutil.copytree(folder / "plots", folder / name / "plots", dirs_exist_ok=True)
    written = [folder / name / "README.md" for name in ("", *exported)]
    for path in written:
        save_text(card, path)
    return written


def _said(overrides: Sequence[str]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for override in overrides:
        set_override(data, override)
    return data


def _check(said: dict[str, Any]) -> None:
    refuse_unknown(said, ["governance", "model"], "")
    build(Governance, said.get("governance", {}), "governance")
    model = typed(dict[str, str], said.get("model", {}), "model")
    refuse_unknown(model, ["license"], "model")


def _card(figures: dict[str, Any], title: str, exported: Sequence[str], said: dict[str, Any], chats: bool) -> str:
    recipe, base = figures["recipe"], figures["base_model"]
    people = asdict(Governance()) | recipe.get("governance", {}) | said.get("governance", {})
    declared = said.get("model", {}).get("license") or figures["license"]
    data_license = people["data_license"] or figures["data"].get("license")
    sources = {"the base model": base.get("license"), "the data": data_license}
    metrics = {name: value for name, value in figures.items() if isinstance(value, dict) and "dense_interval" in value}
    card = ModelCard.from_template(
        _metadata(figures, title, list(metrics), declared, people["language"]),
        template_path=str(_TEMPLATE),
        title=inert(title),
        report=inert(figures),
        verdict=_verdict(figures),
        conflict=inert(license_conflict(declared, sources)),
        licenses=inert({"this model": declared} | sources),
        license_notes=inert(license_notes(sources)),
        people=inert(people),
        base_model=_linked(base),
        metrics=metrics,
        titles=TITLES,
        errors=ERRORS,
        first_stage=inert(first_stage_rows(metrics, figures["data"])),
        gates=[{"name": name, "sign": "≥" if GATES[name] == "min" else "≤", **gate} for name, gate in figures["gates"].items()],
        p_value=p_value,
        keep_layers=recipe["model"]["keep_layers"],
        rules=inert(recipe["pruning"]["rules"]),
        schedule=recipe["pruning"]["schedule"],
        oneshot=recipe["pruning"]["oneshot"],
        distillation=_distilled(recipe, figures["pipeline_tag"]),
        cosines=(taught := recipe.get("cosines")) and inert(taught) | {"encoder": _named(taught["encoder"])},
        recovery=recipe["recovery"],
        trained=_trained(recipe),
        recorded=recipe["recording"] is not None,
        template=figures["data"].get("template"),  # as JSON in a line of code, which makes it inert and keeps it as it is
        chats=chats,
        exported=exported,
        served=[name for name in exported if name in SERVED],
        plugged=[name for name in exported if name in PLUGGED],
        plain=[name for name in exported if name not in (*PLUGGED, *SERVED)],
        shown=next((name for name in reversed(exported) if name not in (*LOSSY, *SERVED)), "dense"),
    )  # fmt: skip
    return str(card)


def _trained(recipe: dict[str, Any]) -> str:
    """How long either model was trained, in words: the pruned one begins where the dense one ends."""
    training, dense, recovery = recipe["training"], recipe["dense"], recipe["recovery"] or {}
    first = "was taken as it is" if dense["checkpoint"] else f"was trained for {_length(training | dense['training'])}"
    own = recovery.keys() & {"num_train_epochs", "max_steps"}
    more = f"{_length(training)} more" + (f" and {_length(recovery)} of recovery" if own else "")
    return (
        f"The dense model {first}; the pruned one began as its copy and was trained for {more}. What longer training "
        "gives is a part of the difference."
    )


def _distilled(recipe: dict[str, Any], tag: str) -> dict[str, Any] | None:
    """Its settings with the loss that ``auto`` stands for, and a local teacher by its name alone."""
    settings: dict[str, Any] | None = recipe["distillation"]
    if settings is None:
        return None
    auto = "margin_mse" if tag == "text-ranking" else "mse" if recipe["task"].get("scores") else "kl"
    loss = auto if settings["logits"] == "auto" else settings["logits"]
    return settings | {"logits": loss, "teacher": _named(settings["teacher"])}


def _named(location: str) -> Any:
    """An id of the Hub as it is; of a local folder its last two parts, which say nothing of a machine."""
    parts = Path(location).parts
    return inert("/".join(parts[-2:]) if len(parts) > 2 or Path(location).is_absolute() else location)


def _length(training: dict[str, Any]) -> str:
    steps, epochs = training.get("max_steps", -1), training.get("num_train_epochs", 3)
    return f"{steps} step{'s' if steps != 1 else ''}" if steps > 0 else f"{epochs:g} epoch{'s' if epochs != 1 else ''}"


def inert(value: Any) -> Any:
    """Plain data whose texts are shown as they are, in a table too: labels and names of files come from others."""
    if isinstance(value, dict):
        return {inert(key): inert(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [inert(item) for item in value]
    return " ".join(html.escape(value).replace("|", "&#124;").splitlines()) if isinstance(value, str) else value


def _metadata(
    figures: dict[str, Any], name: str, metrics: Sequence[str], declared: str | None, language: str | None
) -> ModelCardData:
    data = figures["data"]
    language = language or ("en" if figures["recipe"]["task"]["dataset"] == "builtin" else None)
    results = [
        EvalResult(
            task_type=figures["pipeline_tag"], dataset_type=data.get("hub_id") or figures["task"], dataset_name=data["source"],
            dataset_split="test", metric_type=metric, metric_value=round(figures[metric]["pruned"], 4),
        )
        for metric in metrics
    ]  # fmt: skip
    pruning, base = figures["recipe"]["pruning"], figures["base_model"].get("hub_id")
    methods = [pruning["oneshot"]] if pruning["oneshot"] else [rule["criterion"] for rule in pruning["rules"]]
    tags = ["finance", "pruning", "finllm-prune", *sorted({f"{m['name'].replace('_', '-')}-pruning" for m in methods})]
    known: dict[str, Any] = {
        "license": declared,
        "language": language,
        "datasets": data.get("hub_id"),
        "base_model": base,
    }
    known |= {"base_model_relation": "finetune"} if base else {}
    return ModelCardData(
        model_name=name, library_name="transformers", pipeline_tag=figures["pipeline_tag"], tags=tags,
        eval_results=results, **{key: value for key, value in known.items() if value},
    )  # fmt: skip


def _linked(base: dict[str, Any]) -> str:
    """A base model on the Hub as a link; a local folder by its name alone."""
    name = inert(base["name"])
    return f"[{name}](https://huggingface.co/{name})" if base.get("hub_id") else Path(name).name


def _verdict(figures: dict[str, Any]) -> str:
    same = "scores all passages of a query alike" if figures["unit"] == "query" else "gives every text the same answer"
    if figures["collapsed"]:
        return f"**COLLAPSED: this model {same}. Do not use it.**"
    if collapsed := [name for name, quality in figures["exported"].items() if quality["collapsed"]]:
        return f"**COLLAPSED: {', '.join(collapsed)} {same}. Do not use it.**"
    missed, target = "", figures["target"]
    if target is not None and not target["met"]:
        missed = f" **MISSED the target: {target['kind']} {target['asked']:g} of the dense model's was asked.**"
    if not figures["gates"]:
        return "No gates were set for this run." + missed
    failed = [name for name, gate in figures["gates"].items() if not gate["passed"]]
    return (f"**FAILED gates: {', '.join(failed)}.**" if failed else "All gates of this run passed.") + missed
