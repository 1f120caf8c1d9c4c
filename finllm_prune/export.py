"""A finished model in other formats, or as the delta to its base, without the run that made it."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
from transformers import AutoConfig, PreTrainedModel

from finllm_prune.checkpoints import (
    SERVED,
    delta,
    exported_in,
    find_format,
    prove_rows,
    refuse_no_graph,
    serve,
    verify,
)
from finllm_prune.checkpoints.manifest import MANIFEST, REPORT
from finllm_prune.checkpoints.proof import ROWS
from finllm_prune.errors import InputError, one_line
from finllm_prune.families import auto_class
from finllm_prune.hub.base_model import locate
from finllm_prune.loading import load_tokenizer, refuse_no_padding, without_load_report
from finllm_prune.recipe import Recipe
from finllm_prune.staging import recover, staged
from finllm_prune.tasks import Task, find_task
from finllm_prune.tasks.classification import to_serve

_WEIGHTS = (".safetensors", ".onnx", ".data")
_CARD = ("README.md", "recipe.yaml")


@dataclass(frozen=True)
class Written:
    """One exported folder.

    Args:
        folder: where it lies.
        format: the format's name.
        files: how many there are.
        bytes: of its weights.
        ratio: of these to the source's weights.
        loads_with: what opens it.
    """

    folder: Path
    format: str
    files: int
    bytes: int
    ratio: float
    loads_with: str


def export(model: Path, out: Path, formats: Sequence[str], *, overwrite: bool = False) -> list[Written]:
    """Write a saved model into ``out/<format>`` for each format; ``out`` appears when all are complete and proved.

    Args:
        model: a checkpoint in any format that loads as a whole model, or the output of a run, which means its ``masked``.
        overwrite: replace an ``out`` that holds exported checkpoints and nothing else.

    Raises:
        InputError: the model cannot be read, a format is unknown or cannot hold it, ``out`` is in the way, the disk is full.
        ProofError: the source is not what its manifest says, or what was written is not the source.
    """
    saves = {name: find_format(name) for name in dict.fromkeys(formats)}
    source = _source(model)
    _check_out(source, out, overwrite)
    loaded, tokenizer = _load(source), load_tokenizer(str(source))
    graphs = [name for name in saves if name in SERVED]
    for name in graphs[:1]:
        refuse_no_graph(loaded, "export", name, "name another format", finished=True)
        refuse_no_padding(str(source), loaded, tokenizer)
    texts = texts_for(source) if graphs else None
    with staged(out) as partial:
        for name, save in saves.items():
            save(loaded, tokenizer, partial / name)
            if texts is not None and name in graphs:
                _prove_texts(loaded, partial / name, *texts)
            _carry_card(source, partial / name)
    return [_written(out / name, name, _weights(source)) for name in saves]


def export_delta(base: str, model: Path, out: Path, *, overwrite: bool = False) -> tuple[Written, dict[str, int]]:
    """Write what a saved model changes in its base, a folder or Hub id; see ``finllm_prune.checkpoints.delta``.

    Returns:
        The folder, and how many tensors are "equal", have "zeros" alone, or have "values".

    Raises:
        InputError, ProofError: as ``export``; or the two models are not of one shape.
    """
    source = _source(model)
    location, _ = locate(base, "BASE")
    _check_out(source, out, overwrite)
    counts = delta.write(_load(location, whole=False), _load(source), out)
    return _written(out, "delta", _weights(source)), counts


def _source(model: Path) -> Path:
    """The folder that holds the model."""
    if not model.is_dir():
        raise InputError(f"there is no folder {model}; name a saved model or the output of a run")
    masked = model / "masked"
    source = masked if not (model / "config.json").is_file() and (masked / "config.json").is_file() else model
    locate(str(source))
    return source


def _load(location: str | Path, *, whole: bool = True) -> PreTrainedModel:
    """A finished model whose weights are all there, proved again where it can be; a base may lack the head (not ``whole``)."""
    if (Path(location) / MANIFEST).is_file():
        verify(Path(location))
    try:
        with without_load_report():
            kind = auto_class(AutoConfig.from_pretrained(location, trust_remote_code=False))
            model, told = kind.from_pretrained(location, output_loading_info=True, trust_remote_code=False)
    except Exception as error:  # transformers trips over a damaged file in many ways
        raise InputError(f"{location}: its weights cannot be loaded: {one_line(error)}") from error
    head = set() if whole else delta.head_names(model)
    if missing := sorted(told["missing_keys"] - head):
        raise InputError(
            f"{location} has no weights for {missing[0]} and {len(missing) - 1} more; name a finished classifier"
        )
    classifier: PreTrainedModel = model.eval()
    return classifier


def texts_for(source: Path) -> tuple[Task, datasets.Dataset, str]:
    """Real texts for a model: its task, some test rows of it, and where they come from, in words.

    Those of the recipe beside the model; where its data is not on this machine, the ones embedded for its task, and without a
    recipe of this version the embedded sentences. Nothing is downloaded.
    """
    task: Task = find_task("sentiment")()
    try:
        recipe = Recipe.load(source / "recipe.yaml")
        task, data = recipe.task, recipe.resolved["task"].get("dataset", "builtin")
        task = to_serve(task)
        if data != "builtin" and not Path(data).exists():
            raise InputError(f"task.dataset: {data} is not here")
        examples = task.load()
    except InputError:
        task = type(task)()
        examples = task.load()
    rows = examples.splits["test"]
    return task, rows.select(range(min(ROWS, len(rows)))), examples.source


def _prove_texts(model: PreTrainedModel, folder: Path, task: Task, rows: datasets.Dataset, origin: str) -> None:
    """Hold a graph against the model on texts that the tokenizer in the graph's folder reads."""
    tokenizer = load_tokenizer(str(folder))
    task.fit_tokenizer(tokenizer, model.config)
    longest = model.config.max_position_embeddings - 4  # RoBERTa counts from the padding token's id
    tokenizer.model_max_length = min(longest, tokenizer.model_max_length)
    try:
        tokens = task.tokenize(rows, tokenizer)
        prove_rows(serve(folder), model, tokens, task.collator(tokenizer), folder, origin)
    except IndexError as error:
        raise InputError(
            f"export: the tokenizer makes tokens that the model does not know ({one_line(error)}); save the model's own beside "
            "it"
        ) from error


def _check_out(source: Path, out: Path, overwrite: bool) -> None:
    """Refuse what would destroy something; a leftover of a killed export is put right first."""
    here, there = out.resolve(), source.resolve()
    if here == there or here in there.parents or there in here.parents:
        raise InputError(f"{out} and the model {source} lie in one another; name another folder to write to")
    if any(parent.is_file() for parent in here.parents):
        raise InputError(f"{out} lies below a file; name a folder that can be made")
    if (out.with_name(f"{out.name}.partial") / "recipe.yaml").is_file():
        raise InputError(
            f"{out}: an unfinished run lies in {out.name}.partial beside it; name another folder to write to"
        )
    recover(out)
    if out.is_file():
        raise InputError(f"{out} is a file; name a folder to write to")
    inside = set(out.iterdir()) if out.exists() else set()
    if not inside:
        return
    if not (out / MANIFEST).is_file() and inside - set(exported_in(out)):
        raise InputError(
            f"{out} holds more than exported checkpoints, so it is left alone; name another folder to write to"
        )
    if not overwrite:
        raise InputError(f"{out} exists; use --overwrite to replace it, or name another folder")


def _carry_card(source: Path, folder: Path) -> None:
    for name in _CARD:
        if (source / name).is_file():
            shutil.copy(source / name, folder / name)
    report = next((place / REPORT for place in (source, source.parent) if (place / REPORT).is_file()), None)
    if report is not None:
        shutil.copy(report, folder / REPORT)  # which tells a push whether gates passed
    if (source / "plots").is_dir():
        shutil.copytree(source / "plots", folder / "plots", dirs_exist_ok=True)


def _written(folder: Path, name: str, source_bytes: int) -> Written:
    size = _weights(folder)
    files = sum(path.is_file() for path in folder.iterdir())
    return Written(folder, name, files, size, size / source_bytes, _loads_with(folder))


def _weights(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir() if path.suffix in _WEIGHTS)


def _loads_with(folder: Path) -> str:
    """Told by what lies there, so that a new format need not be known here."""
    if (folder / delta.WEIGHTS).is_file():
        return "finllm_prune.checkpoints.delta.apply"
    if any(folder.glob("*.onnx")):
        return "onnxruntime"
    config = (folder / "config.json").read_text()
    if "auto_map" in config and "quantization_config" in config:
        return "from_pretrained with trust_remote_code=True, or after import finllm_prune"
    if "quantization_config" in config:
        return "import finllm_prune, then from_pretrained"
    return "from_pretrained"
