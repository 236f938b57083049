"""The house rules as numbers: imports go down or back, files stay short, rooms on one floor do not know each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "puna"
FLOORS = [
    ["base"],
    ["ops"],
    ["model", "text"],
    ["weights", "data", "parallel", "quant"],
    ["corpus"],
    ["train", "engine"],
    ["serve"],
    ["cli"],
]
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# Rooms on one floor that may meet: a batch of data feeds no weights, and so on. None today.
FILES = sorted(p for p in SRC.rglob("*.py") if p.name not in ("__init__.py", "__main__.py"))


def room(path: Path) -> str:
    return path.relative_to(SRC).parts[0].removesuffix(".py")


def imports(path: Path) -> list[str]:
    """Dotted puna modules a file imports, at the top or late."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("puna."):
            found.append(node.module or "")
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names if name.name.startswith("puna.")]
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_down(path: Path) -> None:
    here = FLOOR_OF[room(path)]
    for module in imports(path):
        target = module.split(".")[1]
        assert target == room(path) or FLOOR_OF[target] < here, f"{path.name} imports {module}"


def test_no_cycles_inside_a_room() -> None:
    graph = {}
    for path in FILES:
        name = "puna." + ".".join(path.relative_to(SRC).with_suffix("").parts)
        graph[name] = [m for m in imports(path) if m.split(".")[1] == room(path)]
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join([*trail, name])}"
        if name not in done:
            for other in graph.get(name, []):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_are_short_and_documented(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 400
    assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"


def test_no_attics() -> None:
    assert not [p for p in FILES if p.stem in ("utils", "helpers", "common", "misc")]


def test_front_door_imports_no_torch() -> None:
    """Help, version, recipe help and cards are instant: torch alone costs over a second."""
    code = (
        "import sys, puna, puna.cli.front, puna.train.recipe, puna.serve.card, puna.text.chat\n"
        "puna.Spec.preset('llama3_405b').num_params()\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
