"""The end of a run: evaluate, export, write everything down, and put the complete folder in its place."""

import json
import time
from collections.abc import Callable
from typing import Any

import datasets
from torch import Tensor, nn
from transformers import PreTrainedModel

from finllm_prune.checkpoints import LOSSY, SERVED, find_format, prove_rows, serve
from finllm_prune.errors import warned
from finllm_prune.evaluation import (
    Quality,
    Report,
    check_target,
    compare,
    layer_table,
    measure,
    removed,
    weight_bytes,
)
from finllm_prune.evaluation.evidence import FLIPS, Evidence, collect
from finllm_prune.evaluation.kept import Kept, fingerprint
from finllm_prune.evaluation.latency_table import CACHE
from finllm_prune.evaluation.plots import draw, draw_record
from finllm_prune.hub.card import write_card
from finllm_prune.inference import logits_of
from finllm_prune.pages import write_page
from finllm_prune.prepare import Prepared, engine_of
from finllm_prune.provenance import provenance
from finllm_prune.pruning import Pruner
from finllm_prune.staging import publish
from finllm_prune.tasks import BAD_ROWS
from finllm_prune.training import RECORD_FILE, Recorder
from finllm_prune.workfolder import close_work

_FASTEST = (
    "ragged",
    "ragged-remote",
    "compact",
    "packed",
)  # the narrowest blocks first; packed ones are those of ragged
_LONG = 60.0  # seconds

Classifier = Callable[..., Any]


def conclude(
    ready: Prepared, dense: PreTrainedModel, student: PreTrainedModel, pruner: Pruner,
    recorder: Recorder | None, history: list[dict[str, Any]], clock: dict[str, float],
) -> Report:  # fmt: skip
    """On the first rank alone.

    Args:
        clock: when the run was ``started``, had its ``dense`` model, was ``pruned`` and ``trained``, in seconds.
    """
    recipe, work = ready.recipe, ready.work
    nn.Module.to(dense, device=student.device)
    of_dense, of_student = (_logits(ready, model) for model in (dense, student))
    quality = _judged(ready, of_dense, of_student)
    evidence = _evidence(ready, {"dense": dense, "pruned": student}, {"dense": of_dense, "pruned": of_student}, quality)
    # Proofs compare on the CPU, where the reloaded checkpoint is: a GPU may round its products otherwise.
    nn.Module.to(student, device="cpu")
    exported = _export(ready, student)
    report = Report(
        quality=quality,
        sparsity={"targeted": pruner.sparsity(), **removed(dense, student)},
        bytes={name: weight_bytes(work / name) for name in ("dense", *recipe.export)},
        latency=_latency(dense, student, exported),
        layers=layer_table(student),
        history=history,
        run=provenance(ready)
        | {"mask_hash": pruner.mask_hash(), "skipped_steps": int(pruner.skipped), "wall_seconds": _wall(clock)}
        | {"warnings": list(recorder.warnings.values()) if recorder else []},
        gates=recipe.gates,
        target=_target(ready, dense, student, pruner),
        exported={
            name: _judged(ready, of_dense, _logits(ready, model)) for name, model in exported.items() if name in LOSSY
        },
        evidence=evidence,
    )
    report.save(work / "report.json")
    if evidence is not None and evidence.changed is not None:
        (work / FLIPS).write_text(json.dumps(evidence.changed, indent=2) + "\n")
    if bad := ready.examples.left_out:
        (work / BAD_ROWS).write_text("".join(json.dumps(row) + "\n" for row in bad))
    draw(report.layers, report.history, work / "plots")
    if recorder is not None:
        recorder.save(work / RECORD_FILE)
        draw_record(work / RECORD_FILE, work / "plots")
    with warned("The card", f"write it with `finllm-prune card {recipe.output}`"):
        write_card(report.to_dict(), work, recipe.export)
    close_work(work, work)
    publish(work, recipe.output)
    with warned("The page", f"write it with `finllm-prune report {recipe.output}`"):
        write_page(recipe.output)
    return report


def _export(ready: Prepared, student: PreTrainedModel) -> dict[str, Classifier]:
    """Format -> what lies in its folder, behind the call of a model.

    A graph that is to be the model is held against it on test rows too; what is another model is judged on all of them.
    """
    exported: dict[str, Classifier] = {}
    for name in ready.recipe.export:
        folder = ready.work / name
        written = find_format(name)(student, ready.tokenizer, folder)
        exported[name] = serve(folder) if name in SERVED else written
        if name in SERVED:
            collator = ready.recipe.task.collator(ready.tokenizer)
            prove_rows(exported[name], student, ready.tokens["test"], collator, folder, ready.examples.source)
    return exported


def _logits(ready: Prepared, model: Classifier) -> Tensor:
    """Kept where they took long: a run that is killed now goes on, and a dense model that runs share answers once."""
    rows = ready.tokens["test"]

    def ask() -> Tensor:
        return logits_of(model, rows, ready.recipe.task.collator(ready.tokenizer))

    if not isinstance(model, PreTrainedModel):
        return ask()
    task = repr(ready.recipe.task)
    return Kept(CACHE / "answers", _LONG).logits(lambda: [fingerprint(model), model.device, task, rows.to_dict()], ask)


def _evidence(
    ready: Prepared, models: dict[str, PreTrainedModel], logits: dict[str, Tensor], quality: Quality
) -> Evidence | None:
    task, questions = ready.recipe.task, ready.recipe.evidence
    if questions is None:
        return None

    def ask(kind: str, rows: datasets.Dataset) -> Tensor:
        return logits_of(models[kind], task.tokenize(rows, ready.tokenizer), task.collator(ready.tokenizer))

    judge, rows = task.judge(ready.examples), ready.examples.splits["test"]
    return collect(judge, rows, logits, quality, ask, questions, seed=ready.arguments.seed)


def _judged(ready: Prepared, of_dense: Tensor, of_other: Tensor) -> Quality:
    return compare(ready.recipe.task.judge(ready.examples), of_dense, of_other, seed=ready.arguments.seed)


def _latency(dense: PreTrainedModel, student: PreTrainedModel, exported: dict[str, Classifier]) -> list[dict[str, Any]]:
    """Of the smallest model in PyTorch first, which the gate looks at, then of each graph."""
    smallest = next((name for name in _FASTEST if name in exported), "masked")
    models = {smallest: exported.get(smallest, student)}
    models |= {name: model for name, model in exported.items() if name in SERVED}
    return [
        {"model": name} | measure(dense, model, batch).to_dict() for name, model in models.items() for batch in (1, 16)
    ]


def _target(ready: Prepared, dense: PreTrainedModel, student: PreTrainedModel, pruner: Pruner) -> dict[str, Any] | None:
    """Against the costs that the Pruner chose by: a resumed run has those of its checkpoint."""
    target, share = ready.recipe.pruning.target, 1.0 if ready.vocabulary is None else ready.vocabulary[0].share
    if target is None or pruner.costs is None:
        return None
    return check_target(
        target,
        pruner.costs,
        dense,
        student,
        {g.name: int(g.mask.sum()) for g in pruner.groups},
        engine_of(target),
        share,
    )


def _wall(clock: dict[str, float]) -> dict[str, float]:
    now = time.time()
    spans = {
        "dense": clock["dense"] - clock["started"],
        "pruning": clock["pruned"] - clock["dense"],
        "recovery": clock["trained"] - clock["pruned"],
        "evaluation_and_export": now - clock["trained"],
        "total": now - clock["started"],
    }
    return {name: round(seconds, 1) for name, seconds in spans.items()}
