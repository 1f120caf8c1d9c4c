"""What the texts tell users to type: commands and options that there are, recipes and keys that are read."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from finllm_prune.cli import app
from finllm_prune.oneshot.recipe import OneShotRecipe
from finllm_prune.recipe import Recipe
from finllm_prune.suite.suite import Suite

HOME = Path(__file__).parents[1]
TEXTS = [HOME / "README.md", HOME / "CONTRIBUTING.md", *sorted((HOME / "recipes").rglob("README.md"))]


def commands(text: Path) -> list[list[str]]:
    """The words of each command of the blocks of shell in a text; what stands for something else is left out."""
    blocks = re.findall(r"^ *```bash\n(.*?)```", text.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.split(line, comments=True) for line in lines if "..." not in line]
    return [words for words in found if words]


COMMANDS = [
    pytest.param(words, id=f"{text.relative_to(HOME)}: {shlex.join(words)[:70]}")
    for text in TEXTS
    for words in commands(text)
]


def test_the_texts_hold_commands() -> None:
    assert len(COMMANDS) > 60


@pytest.mark.parametrize("words", [each for each in COMMANDS if each.values[0][0] == "finllm-prune"])
def test_a_command_and_its_options_exist(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HOME)
    group = typer.main.get_command(app)
    context = group.make_context("finllm-prune", words[1:])
    while hasattr(group, "commands"):
        name, *rest = [*context._protected_args, *context.args]
        group = group.commands[name]
        context = group.make_context(name, rest, parent=context)
    recipe, overrides = context.params.get("recipe"), context.params.get("overrides") or ()
    if recipe is not None and Path(recipe).is_relative_to("recipes"):
        (OneShotRecipe if words[1] == "oneshot" else Recipe).load(Path(recipe), overrides)
    if context.params.get("suite") is not None:
        Suite.load(Path(context.params["suite"]), overrides)


@pytest.mark.parametrize("words", [each for each in COMMANDS if any("scripts/" in word for word in each.values[0])])
def test_a_script_and_its_options_exist(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HOME)
    place = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    source = Path(words[place]).read_text()
    for word in words[place + 1 :]:
        assert not word.startswith("--") or f'"{word.split("=")[0]}"' in source, f"{words[place]} has no {word}"
    if words[place] == "scripts/run.py":
        Recipe.load(Path(words[place + 1]), [word for word in words[place + 2 :] if not word.startswith("--")])
