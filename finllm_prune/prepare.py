"""Everything that can be found wrong before training: output, data, model, rules, arguments."""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate import PartialState
from transformers import (
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from finllm_prune.checkpoints import SERVED, find_engine, refuse_no_graph
from finllm_prune.errors import InputError, one_line
from finllm_prune.evaluation import Engine, Target, on_cpu, price, refuse_one_unit
from finllm_prune.evaluation.perturbations import refuse_unusable
from finllm_prune.families import Architecture, Family, find_architecture, is_causal
from finllm_prune.hub.base_model import locate
from finllm_prune.hub.push import refuse_no_token
from finllm_prune.loading import (
    class_names,
    label_order,
    load_config,
    load_model,
    load_tokenizer,
    refuse_no_padding,
    refuse_too_long,
    tell_limit,
)
from finllm_prune.pruning import (
    Calibrated,
    Costs,
    Group,
    Rule,
    SecondOrder,
    refuse_overlap,
    refuse_unreachable,
    refuse_unsplittable,
)
from finllm_prune.recipe import Recipe
from finllm_prune.tasks import Examples, read_texts
from finllm_prune.tasks.yes_no import asks_pairs, question
from finllm_prune.training import Lora, adapt, refuse_no_chain, refuse_no_room, sentence_transformers, smoothed
from finllm_prune.training.trainer import asks_for_fsdp, refuse_unsupported
from finllm_prune.vocabulary import Change, Trim, Trimmed, held_out, trim
from finllm_prune.workfolder import CHECKPOINTS, check_batch, check_output, check_vocabulary, open_work

logger = logging.getLogger(__name__)

_MUCH = 10**9  # bytes of a criterion's state that are told before training


@dataclass(frozen=True)
class Prepared:
    """A run whose inputs have all been read and found usable.

    Args:
        recipe: what is asked for.
        work: where files lie until the run is complete.
        arguments: of the pruning phase.
        examples: the data, label order as in ``model``.
        tokens: split -> tokenized rows.
        tokenizer: of the base model, trimmed if the recipe says so.
        model: the base model with a head for the task, not yet trained on it.
        location: what ``from_pretrained`` takes for the base model.
        origin: where the base model came from, in words.
        teacher: what ``from_pretrained`` takes for a teacher that is not the dense baseline.
        vocabulary: of a trimmed model, with what it changes in validation and test texts.
        costs: of heads and neurons, where the recipe has a target.
        encoder: what sentence-transformers takes for the encoder of ``recipe.cosines``.
        kept_bytes: of the hidden states that ``distillation.cache`` is to keep on disk; 0 where it keeps none.
        unlabelled: tokenized rows whose labels the teacher is yet to give; None without.
    """

    recipe: Recipe
    work: Path
    arguments: TrainingArguments
    examples: Examples
    tokens: dict[str, datasets.Dataset]
    tokenizer: PreTrainedTokenizerBase
    model: PreTrainedModel
    location: str
    origin: str
    teacher: str | None
    vocabulary: tuple[Trimmed, Change] | None
    costs: Costs | None
    encoder: str | None = None
    kept_bytes: int = 0
    unlabelled: datasets.Dataset | None = None

    @property
    def taught(self) -> datasets.Dataset:
        """What the pruned model learns from: the training rows, then those without labels."""
        train = self.tokens["train"]
        return train if self.unlabelled is None else datasets.concatenate_datasets([train, self.unlabelled])


def prepare(recipe: Recipe, *, resume: bool, overwrite: bool) -> Prepared:
    """Read and check everything, then make the work folder.

    Raises:
        InputError: with what is wrong and the remedy; nothing has been written or deleted then.
    """
    ready = read(recipe, resume=resume, overwrite=overwrite)
    PartialState().wait_for_everyone()
    if PartialState().is_main_process:
        trimmed = ready.vocabulary[0] if ready.vocabulary is not None else None
        open_work(recipe, ready.work, ready.arguments, trimmed, resume)
    PartialState().wait_for_everyone()
    return ready


def read(recipe: Recipe, *, resume: bool = False, overwrite: bool = True) -> Prepared:
    """Read and check everything; nothing is written."""
    work = recipe.output.with_name(f"{recipe.output.name}.partial")
    arguments = training_arguments(recipe, work, "prune", {})
    phases = {"training": arguments, "dense.training": training_arguments(recipe, work, "dense", recipe.dense.training)}
    if recipe.recovery is not None:
        phases["recovery"] = training_arguments(recipe, work, "recover", recipe.recovery.training)
    refuse_unsupported(arguments)
    if asks_for_fsdp(arguments):
        _refuse_unsplittable(recipe)
    check_output(recipe, work, resume, overwrite)
    if recipe.hub is not None:
        refuse_no_token(recipe.hub)
    if resume:
        check_batch(work, arguments)
    examples = recipe.task.load()
    location, origin = (
        locate(recipe.dense.checkpoint, "dense.checkpoint") if recipe.dense.checkpoint else locate(recipe.model.name)
    )
    config = load_config(location)
    architecture = find_architecture(config.model_type)
    _check_gates(recipe, examples)
    if recipe.evidence is not None:
        refuse_unusable(recipe.evidence.perturbations, examples.splits["test"])
    examples = examples.reordered(label_order(config, examples.labels, must_match=recipe.dense.checkpoint))
    set_seed(arguments.seed)
    model = load_model(recipe.task, location, examples.labels)
    tokenizer = load_tokenizer(location)
    tell_limit(recipe.task, tokenizer)
    recipe.task.fit_tokenizer(tokenizer, config)
    refuse_no_padding(location, model, tokenizer)
    vocabulary = None if recipe.vocabulary is None else _trim(recipe.vocabulary, model, tokenizer, examples)
    tokenizer = tokenizer if vocabulary is None else vocabulary[0].tokenizer
    small = model
    if recipe.model.keep_layers is not None:
        small = copy.deepcopy(model)
        architecture.keep_layers(small, recipe.model.keep_layers)
    groups = _check_rules(recipe, architecture, small)
    if resume and vocabulary is not None:
        check_vocabulary(work, vocabulary[0])
    loss = recipe.task.loss(examples)  # class weights that do not fit are told now
    for key, phase in phases.items():
        smoothed(loss, phase.label_smoothing_factor, key)
    tokens = {name: recipe.task.tokenize(rows, tokenizer) for name, rows in examples.splits.items()}
    refuse_too_long(model, tokens.values())
    unlabelled = _unlabelled(recipe, examples, tokenizer)
    teacher = _teacher(recipe, examples, tokens["train"])
    kept = sum(_kept_bytes(recipe, config, teacher, rows) for rows in (tokens["train"], unlabelled) if rows is not None)
    if kept > 0 and not resume:
        refuse_no_room(kept, work)
    encoder = _encoder(recipe)
    logger.info("Base model: %s. Data: %s.", origin, examples.source)
    costs = None
    if (target := recipe.pruning.target) is not None:
        _refuse_too_long(target, config)
        share = 1.0 if vocabulary is None else vocabulary[0].share
        costs = price(target, model, small, groups, engine_of(target), share)
    return Prepared(
        recipe, work, arguments, examples, tokens, tokenizer, model, location, origin, teacher, vocabulary, costs, encoder,
        kept, unlabelled,
    )  # fmt: skip


def _unlabelled(recipe: Recipe, examples: Examples, tokenizer: PreTrainedTokenizerBase) -> datasets.Dataset | None:
    if examples.unlabelled is None:
        return None
    if recipe.distillation is None:
        raise InputError(
            "task.unlabelled: without a teacher nobody labels these texts; remove it, or distillation: null"
        )
    return recipe.task.tokenize(examples.unlabelled, tokenizer)


def _check_gates(recipe: Recipe, examples: Examples) -> None:
    """A gate on what another task measures, or a test split on which nothing can be measured."""
    judge = recipe.task.judge(examples)
    refuse_one_unit(judge)
    metrics = judge.metrics
    for name in recipe.gates:
        if name.removesuffix("_retention") not in (*metrics, "agreement", "latency_ratio"):
            raise InputError(f"gates.{name}: this task does not measure it but {', '.join(metrics)}; name one of these")


def _refuse_unsplittable(recipe: Recipe) -> None:
    """What a recipe cannot ask for where FSDP splits the model among ranks."""
    refuse_unsplittable(recipe.pruning.rules)
    if recipe.peft is not None:
        raise InputError("peft: adapters are not split among ranks with what they stand beside; launch with DDP")
    if recipe.recovery is not None:
        raise InputError(
            "recovery: FSDP splits the optimizer's moments among ranks, and the small model cannot take them over; remove the "
            "key, or launch with DDP"
        )


def _check_rules(recipe: Recipe, architecture: Architecture, model: PreTrainedModel) -> list[Group]:
    """What is to be cut, found in the model; and that it goes with the rest of the recipe."""
    rules = recipe.pruning.rules
    groups = architecture.groups(model, rules)
    refuse_overlap(groups)
    refuse_unreachable(groups)
    _tell_size(groups)
    whole = architecture.whole_units(model, rules) if recipe.pruning.fill else []
    _check_graph(recipe, model)
    if recipe.peft is not None:
        _check_adapters(recipe.peft, architecture, model, rules)
    _check_fit(recipe, architecture, model.config, [*rules, *(group.rule for group in whole)])
    if isinstance(recipe.pruning.oneshot, Calibrated):
        if not isinstance(architecture, Family):
            raise InputError(
                f"pruning.oneshot: {model.config.model_type} models have no family, so their blocks are not known; "
                "use oneshot: magnitude"
            )
        refuse_no_chain(model, architecture, groups)
    return groups


def _check_adapters(lora: Lora, architecture: Architecture, model: PreTrainedModel, rules: list[Rule]) -> None:
    """That there are adapters where they are needed, on a model of the same shapes without values."""
    if getattr(model.config, "quantization_config", None) is not None:
        raise InputError(
            "peft: adapters beside a quantized or packed base are not done here; name a plain base model, as `finllm-prune "
            "export --format masked` makes of ours"
        )
    with torch.device("meta"):
        shape: PreTrainedModel = type(model)(copy.deepcopy(model.config))
    adapt(shape, lora, 0, architecture.groups(shape, rules))


def engine_of(target: Target) -> Engine:
    """What makes of a model what the target's runtime runs; raises InputError where a package is missing."""
    return on_cpu if target.runtime == "torch" else find_engine(target.runtime)


def _refuse_too_long(target: Target, config: PreTrainedConfig) -> None:
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and target.kind != "size" and target.tokens > longest:
        raise InputError(
            f"pruning.target.tokens: the model reads at most {longest} tokens, not {target.tokens}; lower it"
        )


def _check_fit(recipe: Recipe, architecture: Architecture, config: PreTrainedConfig, rules: list[Rule]) -> None:
    """What a recipe asks for beyond the rules, and not every architecture can give."""
    for name, ragged in (("compact", False), ("ragged", True), ("ragged-remote", True)):
        shrinks = recipe.model.keep_layers or any(architecture.can_shrink(rule, ragged) for rule in rules)
        if name in recipe.export and not shrinks:
            raise InputError(
                f"export: {name} can leave out nothing of what these rules cut in a {config.model_type} model; drop {name} "
                "from export, or add a rule with structure: neuron"
            )
    absent = {"kl": "classes"} if config.num_labels == 1 else {}
    absent |= {} if recipe.task.pipeline_tag == "text-ranking" else {"margin_mse": "passages"}
    if recipe.distillation is not None and (what := absent.get(recipe.distillation.logits)) is not None:
        raise InputError(
            f"distillation.logits: {recipe.distillation.logits} compares {what}, which the outputs for this task are not; "
            "use auto"
        )
    if recipe.distillation is not None and recipe.distillation.cache and recipe.task.pipeline_tag == "text-generation":
        raise InputError(
            "distillation.cache: what a language model says at each token is too much to keep on disk; set cache: false"
        )
    if recipe.distillation is not None and recipe.distillation.compares_layers and architecture.depth_of(config) == 0:
        raise InputError(
            f"distillation.hidden: the hidden states of {config.model_type} models are not known; set distillation.hidden: 0 "
            "and relations: 0"
        )


def _tell_size(groups: list[Group]) -> None:
    """Second order alone holds more than a few values per weight."""
    parts = [group.rule.criterion.bytes(group) for group in groups if isinstance(group.rule.criterion, SecondOrder)]
    if sum(parts) > _MUCH:
        logger.warning(
            "criterion second_order: its state takes %.1f GB, in memory and in each checkpoint of the pruning phase; a smaller "
            "block takes less, and training.save_total_limit: 1 keeps one checkpoint.", sum(parts) / 1e9,
        )  # fmt: skip


def _trim(
    asked: Trim, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, examples: Examples
) -> tuple[Trimmed, Change]:
    """The model is cut in place; what that changes is counted on the splits that training does not see."""
    texts = {name: examples.texts(name) for name in examples.splits}
    used = texts["train"] if asked.texts == "train" else [text for split in texts.values() for text in split]
    used += examples.unlabelled["text"] if examples.unlabelled is not None else []
    if asked.extra is not None:
        used += read_texts(asked.extra, "vocabulary.extra")
    used += [question(tokenizer, "", "")] * asked.min_count if asks_pairs(tokenizer) else []
    trimmed = trim(model, tokenizer, used, asked.min_count)
    change = held_out(tokenizer, trimmed, texts["validation"] + texts["test"])
    logger.info("Vocabulary: %d of %d tokens stay; %s.", len(trimmed.old), trimmed.whole, change)
    return trimmed, change


def _check_graph(recipe: Recipe, model: PreTrainedModel) -> None:
    """What no ONNX graph can be made of, or none was tried on."""
    target = recipe.pruning.target
    asked = [("export", name, f"drop {name} from export") for name in recipe.export if name in SERVED]
    if target is not None and target.runtime in SERVED:
        asked.append(("pruning.target.runtime", target.runtime, "use torch"))
    for key, name, remedy in asked[:1]:
        refuse_no_graph(model, key, name, remedy)


def training_arguments(recipe: Recipe, work: Path, phase: str, changes: dict[str, Any]) -> TrainingArguments:
    """The recipe's TrainingArguments for one phase: "dense", "prune" or "recover".

    Raises:
        InputError: transformers refuses them.
    """
    given = recipe.training | changes
    ours: dict[str, Any] = {
        "output_dir": str(work / CHECKPOINTS / phase),
        "logging_steps": 0.02,
        # Five checkpoints a phase, from which a killed run resumes, unless the recipe says otherwise.
        **({} if given.keys() & {"save_strategy", "save_steps", "load_best_model_at_end"} else {"save_steps": 0.2}),
        "save_total_limit": 2,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    try:
        return TrainingArguments(**(ours | given))
    except (ValueError, TypeError, ImportError, OSError, OverflowError) as error:
        raise InputError(f"training: transformers refuses these arguments: {one_line(error)}") from error


def _teacher(recipe: Recipe, examples: Examples, tokens: datasets.Dataset) -> str | None:
    """What ``from_pretrained`` takes for a teacher that is not the dense baseline: it knows the labels and the tokens."""
    if recipe.distillation is None or recipe.distillation.teacher == "dense":
        return None
    key, name = "distillation.teacher", recipe.distillation.teacher
    location, _ = locate(name, key)
    config = load_config(location, key)
    known, speaks = class_names(config), is_causal(config) and len(examples.labels) == 1
    if not speaks and known != examples.labels and max(len(known), len(examples.labels)) > 1:
        raise InputError(
            f"{key}: {name} predicts {', '.join(known)}, not {', '.join(examples.labels)} in this order; "
            "name a teacher that was fine-tuned on the same labels"
        )
    tokenizer = load_tokenizer(location, key)
    recipe.task.fit_tokenizer(tokenizer, config)
    theirs = recipe.task.tokenize(examples.splits["train"], tokenizer)
    if any(own != other for own, other in zip(tokens["input_ids"], theirs["input_ids"], strict=True)):
        raise InputError(
            f"{key}: {name} reads the texts as other tokens than the model; name a teacher with the model's own tokenizer"
            + (", or remove vocabulary, which gives the model's tokens new ids" if recipe.vocabulary else "")
        )
    return location


def _kept_bytes(recipe: Recipe, config: PreTrainedConfig, teacher: str | None, tokens: datasets.Dataset) -> int:
    if recipe.distillation is None or not recipe.distillation.cache:
        return 0
    theirs = config if teacher is None else load_config(teacher)
    return recipe.distillation.kept_bytes(tokens, config, theirs, recipe.model.keep_layers)


def _encoder(recipe: Recipe) -> str | None:
    """What sentence-transformers takes for the encoder whose cosines are learned."""
    cosines = recipe.cosines
    if cosines is None:
        return None
    if recipe.task.pipeline_tag != "text-ranking":
        raise InputError("cosines: they compare a query with passages, which this task has none of; remove the key")
    sentence_transformers()
    return locate(cosines.encoder, "cosines.encoder")[0]
