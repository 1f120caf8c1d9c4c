"""The cells of a sweep: a recipe at each sparsity or target and each seed, and the dense model that all of them share."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import TrainingArguments

from finllm_prune.errors import InputError
from finllm_prune.recipe import Recipe, parse

TEACHER = "dense"


@dataclass(frozen=True)
class Grid:
    """What is varied; a value that is given twice counts once.

    Args:
        sparsities: each in the place of the sparsity of every rule.
        targets: each in the place of the part that ``pruning.target`` asks for. One of the two is given.
        seeds: of the training; none takes the recipe's own.
    """

    sparsities: Sequence[float] = ()
    targets: Sequence[float] = ()
    seeds: Sequence[int] = ()

    def __post_init__(self) -> None:
        if bool(self.sparsities) == bool(self.targets):
            raise InputError(
                "--sparsities, --targets: give one of the two, as --sparsities 0.5 0.75 0.9 (or --targets 0.5 0.33 for a "
                "recipe with pruning.target)"
            )
        option = "--sparsities" if self.sparsities else "--targets"
        for value in self.values:
            if not 0 < value < 1:
                raise InputError(f"{option}: {value:g} is no part of the whole; set it between 0 and 1")
        for seed in self.seeds:
            if not 0 <= seed < 2**32:
                raise InputError(f"--seeds: {seed} is no seed; set it between 0 and {2**32 - 1}")

    @property
    def values(self) -> list[float]:
        return list(dict.fromkeys(self.sparsities or self.targets))


@dataclass(frozen=True)
class Cell:
    """One run of a sweep; the name of its folder is its own.

    Args:
        axis: "sparsity" or "target".
        value: of the axis.
        seed: of the training.
        recipe: of the run.
    """

    axis: str
    value: float
    seed: int
    recipe: Recipe

    @property
    def name(self) -> str:
        return self.recipe.output.name


def cells_of(recipe: Recipe, grid: Grid) -> list[Cell]:
    """The recipe of each cell, setting by setting; they lie in the recipe's own output.

    A cell starts from the shared dense model (unless the recipe names a checkpoint itself), logs under its own name in a
    project of the sweep's, and is not pushed.

    Raises:
        InputError: the recipe cannot be varied so, or a cell is no recipe.
    """
    target = recipe.pruning.target
    if grid.targets and target is None:
        raise InputError("--targets: the recipe has no pruning.target whose value could vary; use --sparsities")
    if grid.sparsities and target is not None:
        raise InputError("--sparsities: in this recipe pruning.target decides what is cut; use --targets")
    seeds = list(dict.fromkeys(grid.seeds)) or [recipe.training.get("seed", TrainingArguments.seed)]
    axis, cells = "target" if target is not None else "sparsity", []
    for value in grid.values:
        for seed in seeds:
            name = f"{axis}-{value!r}_seed-{seed}"
            data = _placed(recipe, name)
            data["training"]["seed"] = seed
            data["dense"]["checkpoint"] = recipe.dense.checkpoint or str(recipe.output / TEACHER)
            if target is not None:
                data["pruning"]["target"][target.kind] = value
            else:
                for rule in data["pruning"]["rules"]:
                    rule["sparsity"] = value
            cells.append(Cell(axis, value, seed, _parsed(data, name)))
    return cells


def teacher_of(recipe: Recipe) -> Recipe | None:
    """The recipe whose dense part is the model that the cells share, of the recipe's own seed; None where one is named.

    Its vocabulary is whole: each cell trims it and counts what that changes. The rules and all else that follows the dense
    part are as simple as they can be, so that nothing is measured for them.
    """
    if recipe.dense.checkpoint is not None:
        return None
    data = _placed(recipe, TEACHER)
    data["pruning"]["target"] = None
    for rule in data["pruning"]["rules"]:
        rule["sparsity"] = rule["sparsity"] or 0.5
    data |= {"vocabulary": None, "distillation": None, "recovery": None, "export": ["masked"], "gates": {}}
    return _parsed(data, TEACHER)


def _placed(recipe: Recipe, name: str) -> dict[str, Any]:
    """The recipe as plain data, in a folder of that name within its output."""
    data = copy.deepcopy(recipe.resolved)
    data |= {"output": str(recipe.output / name), "hub": None}
    data["training"] = {"project": recipe.output.name} | data["training"] | {"run_name": name}
    return data


def _parsed(data: dict[str, Any], name: str) -> Recipe:
    try:
        return parse(data)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
