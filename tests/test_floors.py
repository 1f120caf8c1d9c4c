"""The floors of the package: imports go down only, and neighbours on one floor do not know each other."""

import ast
from pathlib import Path

import finllm_prune

ROOT = Path(finllm_prune.__file__).parent
FLOORS = [
    {"errors"},
    {"settings", "staging", "inference"},
    {"pruning"},
    {"families", "metrics", "vocabulary"},
    {"judges"},
    {"training", "tasks", "checkpoints"},
    {"evaluation"},
    {"hub", "pages"},
    {"recipe", "registration", "loading"},
    {"workfolder"},
    {"prepare"},
    {"provenance"},
    {"conclusion"},
    {"run", "saved", "export", "plan", "trim", "oneshot"},
    {"suite", "comparison", "sweep"},
    {"cli"},
]
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """The rooms that a file imports, at its top or inside a function; the bare package registers its checkpoints."""
    modules: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    return {module.split(".")[1] for module in modules if module.startswith("finllm_prune.")}


def test_imports_go_down_only() -> None:
    rooms = {room_of(path) for path in ROOT.rglob("*.py")} - {"__init__"}
    assert rooms == set(FLOOR_OF), "each room has its floor, and each floor its rooms"
    upward = [
        f"{path.relative_to(ROOT)} imports {other}"
        for path in ROOT.rglob("*.py")
        if (room := room_of(path)) != "__init__"
        for other in imported(path) - {room}
        if FLOOR_OF[other] >= FLOOR_OF[room]
    ]
    assert upward == []
    assert imported(ROOT / "__init__.py") == {"registration"}
