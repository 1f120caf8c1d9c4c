"""The dense model that all cells of a sweep share, trained alone."""

import shutil

from huggingface_hub import ModelCard, ModelCardData

from finllm_prune.hub.card import license_of
from finllm_prune.prepare import prepare
from finllm_prune.recipe import Recipe
from finllm_prune.run import dense
from finllm_prune.staging import publish
from finllm_prune.workfolder import close_work


def train_teacher(recipe: Recipe, *, resume: bool = False, overwrite: bool = False) -> None:
    """The dense part of a run, as ``recipe.output``: a plain checkpoint with its recipe, and the base model's licence.

    Args:
        resume, overwrite: as of ``run``.

    Raises:
        InputError: before any training, with what is wrong and the remedy.
    """
    ready = prepare(recipe, resume=resume, overwrite=overwrite)
    dense(ready)
    folder = ready.work / "dense"
    shutil.copy(ready.work / "recipe.yaml", folder)
    facts = ModelCardData(license=recipe.model.license or license_of(ready.location))
    ModelCard(f"---\n{facts}\n---\n# {recipe.model.name}, fine-tuned\n\nThe dense model of a sweep.\n").save(
        folder / "README.md"
    )
    close_work(ready.work, folder)
    publish(folder, recipe.output)
    shutil.rmtree(ready.work)
