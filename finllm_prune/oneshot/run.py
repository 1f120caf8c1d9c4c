"""One shot, top to bottom: measure the dense model, prune it block by block, prove what was written, measure that."""

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from finllm_prune.checkpoints import find_format
from finllm_prune.checkpoints.manifest import write_manifest
from finllm_prune.checkpoints.proof import compare_logits, probe_of, some_of, tolerance_of
from finllm_prune.errors import InputError, ProofError
from finllm_prune.evaluation import compare, weight_bytes
from finllm_prune.hub.base_model import locate
from finllm_prune.hub.card import license_of
from finllm_prune.loading import load_tokenizer
from finllm_prune.oneshot.blocks import Plan, prune, worth_of_blocks, zeros_of
from finllm_prune.oneshot.likelihood import Asked, Perplexity, windows_asked
from finllm_prune.oneshot.recipe import STREAMED, OneShotRecipe
from finllm_prune.oneshot.report import OneShotReport, write_card
from finllm_prune.oneshot.streamed import Streamed, open_model
from finllm_prune.oneshot.texts import Batch, batches
from finllm_prune.oneshot.writing import config_of, start, write_compact
from finllm_prune.provenance import surroundings
from finllm_prune.pruning import Activations, Calibrated
from finllm_prune.staging import staged
from finllm_prune.tasks import Examples
from finllm_prune.workfolder import REMEDY, refuse_foreign

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A recipe whose model and texts have all been found usable.

    Args:
        model: dense, without weights.
        plan: what is cut in it.
        windows: of the calibration texts.
        texts: whose perplexity is taken.
        examples: whose labels are guessed.
        prompts: these, with each label behind.
        origin: where the model came from, in words.
        license: of the model.
    """

    recipe: OneShotRecipe
    model: Streamed
    tokenizer: PreTrainedTokenizerBase
    plan: Plan
    windows: list[list[int]]
    texts: Asked | None
    examples: Examples | None
    prompts: Asked | None
    origin: str
    license: str | None

    @property
    def calibration(self) -> list[Batch]:
        return batches(self.windows, self.recipe.memory.tokens)


@dataclass(frozen=True)
class Measured:
    """What a model makes of the texts.

    Args:
        logits: (rows, labels).
        probe: its logits, see ``finllm_prune.checkpoints.proof``.
        zeros: path -> the exact zeros of each linear layer.
    """

    perplexity: Perplexity | None
    logits: Tensor | None
    probe: Tensor
    zeros: dict[str, int]


def oneshot(recipe: OneShotRecipe, *, overwrite: bool = False) -> OneShotReport:
    """Carry a recipe out; ``recipe.output`` appears when everything in it is complete and proved.

    Raises:
        InputError: before anything is pruned, with what is wrong and the remedy.
        ProofError: what was written is not what was pruned.
    """
    ready, started = prepare(recipe, overwrite=overwrite), time.time()
    clock: dict[str, float] = {}

    def lap(name: str) -> None:
        clock[name] = time.time() - started - sum(clock.values())

    dense = measure(ready, ready.model, "dense")
    lap("dense")
    with staged(recipe.output) as work:
        expected, zeros, dropped = write_masked(ready, work / "masked")
        lap("prune")
        masked = Streamed(work / "masked", recipe.memory)
        pruned = measure(ready, masked, "pruned, from its files")
        prove(masked, pruned, expected, zeros)
        lap("measure")
        for name in recipe.export[1:]:
            export(ready, masked, name, work / name, expected)
        lap("export")
        report = _report(ready, dense, pruned, work, dropped, clock)
        (work / "recipe.yaml").write_text(yaml.safe_dump(recipe.resolved, sort_keys=False))
        report.save(work / "report.json")
        write_card(report, work, recipe.output.name, recipe.export)
    return report


def prepare(recipe: OneShotRecipe, *, overwrite: bool) -> Prepared:
    """Read and check everything; raises InputError, and nothing has been written then."""
    output = recipe.output
    refuse_foreign(output)
    if output.exists() and not overwrite:
        raise InputError(f"output: {output} exists; {REMEDY}")
    location, origin = locate(recipe.model.name)
    model, tokenizer = open_model(location, recipe.memory), load_tokenizer(location)
    plan, evaluate = Plan(model, recipe.pruning.rules), recipe.evaluate
    asked = {
        "calibration": recipe.calibration,
        "evaluate.perplexity": evaluate.perplexity,
        "evaluate.labels": evaluate.labels,
    }
    longest = getattr(model.model.config, "max_position_embeddings", None)
    for key, texts in asked.items():
        if texts is not None and longest is not None and texts.tokens > longest:
            raise InputError(f"{key}.tokens: the model reads at most {longest} tokens, not {texts.tokens}; lower it")
    examples = None if evaluate.labels is None else evaluate.labels.load()
    ready = Prepared(
        recipe, model, tokenizer, plan,
        windows=[] if recipe.calibration is None else recipe.calibration.read(tokenizer, "calibration"),
        texts=windows_asked(evaluate.perplexity.read(tokenizer, "evaluate.perplexity")) if evaluate.perplexity else None,
        examples=examples,
        prompts=evaluate.labels.asked(examples, tokenizer) if evaluate.labels and examples else None,
        origin=origin,
        license=recipe.model.license or license_of(location),
    )  # fmt: skip
    words, rows = model.model.config.vocab_size, [*ready.windows]
    rows += [row for asked in (ready.texts, ready.prompts) if asked is not None for row in asked.rows]
    if (last := max((max(row) for row in rows), default=0)) >= words:
        raise InputError(
            f"model: the tokenizer of {recipe.model.name} has token {last}, and the model {words} of them; name a model with "
            "its own tokenizer"
        )
    return ready


def measure(ready: Prepared, model: Streamed, what: str) -> Measured:
    """All texts through the model in one pass over its blocks."""
    tokens = ready.recipe.memory.tokens
    asked = [each for each in (ready.texts, ready.prompts) if each is not None]
    passes = [model.begin(each.batches(tokens)) for each in asked]
    probe = model.begin([probe_of(model.model)])
    zeros: dict[str, int] = {}
    for index, layer in model.blocks(what):
        for step in [*probe, *(step for each in passes for step in each)]:
            step.hidden = step.run(index, layer)
        zeros |= zeros_of(model, index)
    sums = {id(each): each.log_likelihoods(model, of) for each, of in zip(asked, passes, strict=True)}
    texts, prompts, labels = ready.texts, ready.prompts, ready.recipe.evaluate.labels
    return Measured(
        texts.perplexity(sums[id(texts)]) if texts is not None else None,
        labels.logits(prompts, sums[id(prompts)]) if labels is not None and prompts is not None else None,
        _answers(model, probe[0].hidden),
        zeros,
    )


def write_masked(ready: Prepared, folder: Path) -> tuple[Tensor, dict[str, int], list[int]]:
    """Prune, and write each block when it is done; returns the probe's logits, the zeros, and the blocks that were dropped."""
    model, method, plan = ready.model, ready.recipe.pruning.oneshot, ready.plan
    dropped: set[int] = set()
    if plan.layers:
        assert isinstance(method, Activations)
        dropped = plan.dropped(worth_of_blocks(model, method, ready.windows, ready.calibration))
    writer = start(model, folder)
    probe = model.begin([probe_of(model.model)])
    calibration = model.begin(ready.calibration) if isinstance(method, Calibrated) else []
    zeros = prune(model, plan, method, calibration, dropped, probe, lambda _, tensors: writer.add(tensors))
    writer.finish(config_of(model), ready.tokenizer, model.folder)
    return _answers(model, probe[0].hidden), zeros, sorted(dropped)


def prove(model: Streamed, read: Measured, expected: Tensor, zeros: dict[str, int] | None = None) -> None:
    """Hold what was read from a folder against what was pruned, and write its manifest."""
    folder, tolerance = model.folder, tolerance_of(expected, model.model.dtype)
    if zeros is not None and read.zeros != zeros:
        raise ProofError(f"{folder}: its weights have other zeros than those that were pruned; nothing was kept")
    compare_logits(read.probe, expected, folder, tolerance)
    write_manifest(folder, folder.name, read.zeros, probe_of(model.model), read.probe, tolerance)


def export(ready: Prepared, masked: Streamed, name: str, folder: Path, expected: Tensor) -> None:
    """Another format of the pruned model; those that are not streamed take the whole of it into memory."""
    if name not in STREAMED:
        logger.info("%s: the whole model is read into memory for it.", name)
        whole = AutoModelForCausalLM.from_pretrained(masked.folder, dtype=masked.model.dtype)
        find_format(name)(whole, ready.tokenizer, folder)
        return
    write_compact(masked, folder, ready.tokenizer)
    small = Streamed(folder, ready.recipe.memory)
    probe = small.begin([probe_of(small.model)])
    zeros: dict[str, int] = {}
    for index, layer in small.blocks("compact: prove"):
        probe[0].hidden = probe[0].run(index, layer)
        zeros |= zeros_of(small, index)
    prove(small, Measured(None, None, _answers(small, probe[0].hidden), zeros), expected)


def _answers(model: Streamed, hidden: Tensor) -> Tensor:
    """What a proof compares: as ``finllm_prune.checkpoints.proof.logits_of`` of the whole model."""
    return torch.cat([some_of(logits[None]) for logits in model.logits(hidden)]).cpu()


def _report(
    ready: Prepared, dense: Measured, pruned: Measured, work: Path, dropped: list[int], clock: dict[str, float]
) -> OneShotReport:  # fmt: skip
    labels, examples, model = ready.recipe.evaluate.labels, ready.examples, ready.model
    quality = None
    if labels is not None and examples is not None and dense.logits is not None and pruned.logits is not None:
        quality = compare(labels.judge(examples), dense.logits, pruned.logits)
    return OneShotReport(
        perplexity=None
        if dense.perplexity is None or pruned.perplexity is None
        else (dense.perplexity, pruned.perplexity),
        quality=quality,
        sparsity=_sparsity(ready, pruned.zeros),
        bytes={"dense": model.bytes} | {name: weight_bytes(work / name) for name in ready.recipe.export},
        dropped=dropped,
        run={
            "base_model": {"name": ready.recipe.model.name, "origin": ready.origin},
            "license": ready.license,
            "recipe": ready.recipe.resolved,
            "label_data": None if examples is None else {"source": examples.source, "names": examples.labels},
            "calibration": {"windows": len(ready.windows), "tokens": sum(map(len, ready.windows))},
            "wall_seconds": clock,
            **surroundings(str(model.device)),
        },
    )


def _sparsity(ready: Prepared, zeros: dict[str, int]) -> dict[str, float]:
    """The part of zeros among the targeted weights, those of the blocks' linear layers, and all parameters."""
    model, plan = ready.model.model, ready.plan
    sizes = {path: model.get_parameter(f"{path}.weight").numel() for path in zeros}
    targeted = zeros if plan.layers else {slot.site.path for group in plan.groups for slot in group.slots}
    return {
        "targeted": sum(zeros[path] for path in targeted) / sum(sizes[path] for path in targeted),
        "encoder_linear": sum(zeros.values()) / sum(sizes.values()),
        "all_parameters": sum(zeros.values()) / ready.model.parameters,
    }
