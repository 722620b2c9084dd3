"""Check that imports go down the house only: every module stands on a floor and imports from there or below."""

import ast
from collections.abc import Iterator
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]

# From the ground up. A room is a module or a package directly below graphopt; rooms of one floor may use each other
# as long as no cycle comes of it.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"checkpoint"}),
    frozenset({"graph"}),
    frozenset({"axes", "aliases", "moments", "sweep"}),
    frozenset({"dialects", "plan", "importance", "cost"}),
    frozenset({"capture", "report", "rewrite", "editing", "masking", "verify", "allocation"}),
    frozenset({"shrink"}),
    frozenset({"pipeline"}),
    frozenset({"passes"}),
    frozenset({"targets"}),
    frozenset({"optimize", "debugging"}),
    frozenset({"__init__"}),
    frozenset({"cli", "testing"}),
)


def source_files() -> dict[str, Path]:
    """Return the file of every module of the checkout, by dotted name; a package's name ends in `.__init__`."""
    folders = {"graphopt": ROOT / "graphopt", "graphopt.passes": ROOT / "passes", "graphopt.targets": ROOT / "targets"}
    files = {}
    for package, folder in folders.items():
        for path in sorted(folder.rglob("*.py")):
            relative = path.relative_to(folder).with_suffix("")
            if package != "graphopt" or relative.parts[0] not in ("passes", "targets"):
                files[".".join((package, *relative.parts))] = path
    return files


def imported_modules(module: str, source: str, known: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of each module of graphopt that `source` imports, wherever the import stands.

    Imports in functions and under `TYPE_CHECKING` count: they say what the module has to know.
    """

    def resolve(name: str) -> str:
        return f"{name}.__init__" if f"{name}.__init__" in known else name

    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "graphopt":
                    yield node.lineno, resolve(alias.name)
        elif isinstance(node, ast.ImportFrom):
            # `module` ends in `.__init__` for a package, so that one level up is the package itself either way.
            base = [*module.split(".")[: -node.level], *filter(None, [node.module])] if node.level else [node.module]
            package = ".".join(filter(None, base))
            if package.split(".")[0] == "graphopt":
                for alias in node.names:
                    member = resolve(f"{package}.{alias.name}")
                    yield node.lineno, member if member in known else resolve(package)


def room(module: str) -> str:
    """Return the room a module lies in, the part of its name below graphopt."""
    return module.split(".")[1]


def floor(module: str) -> int:
    """Return the number of the floor a module stands on, 0 being the ground."""
    for number, rooms in enumerate(FLOORS):
        if room(module) in rooms:
            return number
    raise AssertionError(f"{module}: the room '{room(module)}' stands on no floor; add it to FLOORS")


FILES = source_files()
IMPORTS = {
    module: list(imported_modules(module, path.read_text(encoding="utf-8"), frozenset(FILES)))
    for module, path in FILES.items()
}


@pytest.mark.parametrize("module", FILES)
def test_imports_go_down_only(module: str) -> None:
    upward = [
        f"{FILES[module]}:{line}: {module} (floor {floor(module)}) imports {target} (floor {floor(target)})"
        for line, target in IMPORTS[module]
        if floor(target) > floor(module)
    ]
    assert not upward, "\n".join(upward)


def test_no_cycles() -> None:
    graph = nx.DiGraph((module, target) for module, targets in IMPORTS.items() for _, target in targets)
    cycles = [sorted(c) for c in nx.strongly_connected_components(graph) if len(c) > 1 or graph.has_edge(*[*c, *c][:2])]
    assert not cycles


def test_every_room_on_a_floor_exists() -> None:
    """A table that names rooms which are gone would no longer be read as the plan of the house."""
    rooms = {room(module) for module in FILES}
    assert set().union(*FLOORS) - rooms == set()


@pytest.mark.parametrize(
    ("module", "source", "expected"),
    [
        ("graphopt.axes.infer", "from graphopt import errors", ["graphopt.errors"]),
        ("graphopt.axes.infer", "from graphopt import optimize", ["graphopt.optimize"]),
        ("graphopt.axes.infer", "from . import rules", ["graphopt.axes.rules"]),
        ("graphopt.axes.infer", "from .. import errors", ["graphopt.errors"]),
        ("graphopt.axes.infer", "def f():\n    from ..errors import GraphOptError", ["graphopt.errors"]),
        ("graphopt.axes.infer", "from graphopt.axes import Atom", ["graphopt.axes.__init__"]),
        ("graphopt.axes.__init__", "from .rules import unify", ["graphopt.axes.rules"]),
        ("graphopt.axes.infer", "import graphopt.axes.rules as r, torch", ["graphopt.axes.rules"]),
        ("graphopt.axes.infer", "import graphopt", ["graphopt.__init__"]),
        ("graphopt.axes.infer", "from torch import graphopt", []),
    ],
)
def test_imports_are_read_as_python_resolves_them(module: str, source: str, expected: list[str]) -> None:
    known = frozenset(
        f"graphopt.{name}" for name in ("__init__", "errors", "optimize", "axes.__init__", "axes.rules", "axes.infer")
    )
    assert [target for _, target in imported_modules(module, source, known)] == expected
