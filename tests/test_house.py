"""The house as architecture.md draws it, read from the imports and the syntax of the package, and kept clean by ruff, vulture and mypy."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import spilt
from spilt import cli, plan, verbs
from spilt.cell import FORMS
from spilt.errors import UserError
from spilt.methods import LOSS_TYPES, METHODS, Method
from spilt.settings import fields as settings
from spilt.settings.fields import INTERVENTION_ALIASES, METHOD_ALIASES
from spilt.steering import anatomy
from spilt.steering.interventions import INTERVENTIONS

PACKAGE = Path(spilt.__file__).parent
REPO = PACKAGE.parent

# Lowest first. A room imports its own floor or a lower one, and there is no cycle. Programs of the package are at the top.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("cell", "errors", "in_step", "lean", "memory", "progress", "settings", "team", "terminal"),
    ("artifacts",),
    ("steering", "data"),
    ("methods", "model"),
    ("baselines", "engine", "verbs", "weights", "judges"),
    ("doubts", "plan", "reading", "analysis"),
    ("report", "tasks", "vignettes"),
    ("anatomy", "api", "audit", "contents", "flags", "inspect", "prepare", "look", "recommend", "say", "verify", "run", "summary"),
    (
        *("behaviour", "complete", "disturbance", "downstream", "export", "lm_eval", "oracle", "prompted", "receipt", "strength", "table"),
        "weight_steering",
    ),
    ("cli",),
    ("__main__",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
PATHS = tuple(sorted(PACKAGE.rglob("*.py")))
MODULES = {".".join(["spilt", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__"): path for path in PATHS}


@cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Every node of a file's syntax tree."""
    return tuple(ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))))


def imports_of(path: Path) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of every import, at the head, in functions and for type checking alike."""
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield (full if full in MODULES else str(node.module)), node.lineno


def room(module: str) -> str:
    if module.endswith(".__main__"):  # only starts a program, which may be of a room above the one that has its word
        return "__main__"
    return module.split(".")[1] if "." in module else module


def strings_of(path: Path) -> Iterator[ast.Constant]:
    """String constants that are no docstrings."""
    docs = {id(node.value) for node in nodes_of(path) if isinstance(node, ast.Expr)}
    yield from (n for n in nodes_of(path) if isinstance(n, ast.Constant) and isinstance(n.value, str) and id(n) not in docs)


def test_every_room_has_a_floor() -> None:
    rooms = {room(name) for name in MODULES} - {"spilt"}
    assert len(rooms) > 20
    assert rooms <= FLOOR_OF.keys(), f"not in the drawing (FLOORS, architecture.md): {sorted(rooms - FLOOR_OF.keys())}"


def test_imports_go_down_only() -> None:
    wrong, seen = [], 0
    for name, path in MODULES.items():
        for imported, line in imports_of(path):
            if not imported.startswith("spilt.") or room(name) == "spilt":
                continue
            seen += 1
            if FLOOR_OF.get(room(imported), 99) > FLOOR_OF.get(room(name), 99):
                wrong.append(f"{path.relative_to(REPO)}:{line}: {room(name)} imports {room(imported)}, which is above it")
    assert seen > 100 and not wrong, "\n".join(wrong)


def test_no_import_cycle() -> None:
    """Not at run time, not in functions, not for type checking. Found by taking away what imports nothing that is left."""
    graph = {
        name: {imported for imported, _ in imports_of(path) if imported in MODULES and imported not in (name, "spilt")}
        for name, path in MODULES.items()
    }
    assert sum(map(len, graph.values())) > 100
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, f"in or above a cycle: { ({name: sorted(needs & graph.keys()) for name, needs in graph.items()}) }"


@pytest.mark.parametrize(
    ("module", "allowed"),
    [
        ("methods/base", {"torch"}),
        ("steering/interventions", {"torch"}),
        ("methods/scoring", {"torch"}),
        ("plan", set()),
        ("verbs/base", set()),
        ("cell", set()),
        ("errors", set()),
    ]
    + [(f"methods/{name}", {"torch"}) for name in METHODS],
)
def test_what_the_inner_rooms_import_from_outside(module: str, allowed: set[str]) -> None:
    outside = {name.split(".")[0] for name, _ in imports_of(PACKAGE / f"{module}.py")}
    assert outside - set(sys.stdlib_module_names) - {"spilt"} <= allowed
    if module == "steering/interventions":
        assert {name for name, _ in imports_of(PACKAGE / "steering/interventions.py") if name.startswith("spilt")} == {
            "spilt.cell",
            "spilt.errors",
        }


def test_only_hooks_and_suffix_touch_a_module() -> None:
    """Registering a hook, or setting `forward` on an instance."""
    found: dict[str, int] = {}
    for path in PATHS:
        for node in nodes_of(path):
            registers = isinstance(node, ast.Attribute) and node.attr.startswith("register_") and "hook" in node.attr
            replaces = isinstance(node, ast.Assign) and any(isinstance(t, ast.Attribute) and t.attr == "forward" for t in node.targets)
            if registers or replaces:
                found[path.name] = found.get(path.name, 0) + 1
    assert set(found) == {"hooks.py", "suffix.py"}


def test_only_the_store_knows_where_artifacts_lie() -> None:
    """No other file builds a path from 'vectors' or 'generation' (`/ "vectors"`, joinpath, Path("vectors/..."), globs)."""
    found = []
    for path in PATHS:
        for node in strings_of(path):
            text = str(node.value)
            if text.startswith(("vectors/", "generation/")) or "/vectors/" in text or "/generation/" in text:
                found.append((path.name, node.lineno))
        for node in nodes_of(path):
            parts: list[ast.expr] = []
            if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
                parts = [node.left, node.right]
            elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("joinpath", "Path", "join"):
                parts = node.args
            if any(isinstance(part, ast.Constant) and part.value in ("vectors", "generation", "get_sft_loss") for part in parts):
                found.append((path.name, node.lineno))
    assert any(name == "store.py" for name, _ in found)  # the search sees them
    assert [place for place in found if place[0] != "store.py"] == []


def test_torch_load_is_always_weights_only() -> None:
    seen = 0
    for path in PATHS:
        for node in nodes_of(path):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load", "pickle.loads"):
                seen += 1
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert ast.unparse(node.func) == "torch.load" and given.get("weights_only") == "True", f"{path.name}:{node.lineno}"
    assert seen


# ---------------------------------------------------------------- names come from the tables


def test_a_new_method_is_a_row_in_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    """Added to METHODS alone it is in `all`, in the choices, in the help and in the reasons of what is left out."""
    before, left = plan.pairs_of("all", "all")
    monkeypatch.setitem(METHODS, "gauge", Method("gauge", lambda *_: None, "a gauge", forms=("lora",), why="it only does lora"))  # type: ignore[arg-type, return-value]
    after, left_after = plan.pairs_of("all", "all")
    assert [pair for pair in after if pair not in before] == [("gauge", "lora")]
    assert [item for item in left_after if item not in left] == [
        (f"gauge {form}", "it only does lora") for form in FORMS if form != "lora" and FORMS[form].in_all
    ]
    assert "gauge" in cli.parser().format_help()
    with pytest.raises(UserError, match="it only does lora"):
        plan.pairs_of("gauge", "vector")
    with pytest.raises(UserError, match="have: .*gauge"):
        plan.pairs_of("gaug", "vector")


def test_all_is_every_row_that_fits() -> None:
    """The released ones: caa, reps, sft, spilt; vector, lora, local_weight. What came later is chosen by name."""
    methods, forms = ([name for name, row in table.items() if row.in_all] for table in (METHODS, FORMS))
    assert set(methods) == {"caa", "reps", "sft", "spilt"} and forms == ["vector", "lora", "local_weight"]
    valid, left_out = plan.pairs_of("all", "all")
    assert valid == [(name, form) for name in methods for form in forms if form in METHODS[name].forms]
    assert len(valid) + len(left_out) == len(methods) * len(forms) and all(item.why for item in left_out)
    for name, row in METHODS.items():
        assert plan.pairs_of(name, "all")[0] == [(name, form) for form in forms if form in row.forms]
    for alias, name in METHOD_ALIASES.items():
        assert plan.pairs_of(alias.upper(), "ALL") == plan.pairs_of(name, "all")
    for alias, name in INTERVENTION_ALIASES.items():
        assert plan.pairs_of("Split", alias.title()) == plan.pairs_of("spilt", name)


def test_the_tables_agree_with_the_settings() -> None:
    """Settings are below the tables: lists that both need stand there."""
    assert settings.LOSSES == LOSS_TYPES
    assert settings.POINTS == anatomy.COMPONENTS
    assert tuple(INTERVENTIONS) == tuple(FORMS) and set(settings.INTERVENTION_ALIASES.values()) <= set(FORMS)
    assert {row.name for row in METHODS.values()} == set(METHODS)
    for form, kind in INTERVENTIONS.items():
        assert kind.factors == settings.FitSettings(method="sft", intervention_method=form, layers=(0,)).steering_factors


def test_modes_are_translated_once() -> None:
    assert {name for names in verbs.MODES.values() for name in names} == set(verbs.VERBS)
    assert all(verbs.MODES[verb.mode] == (name,) for name, verb in verbs.VERBS.items())


# ---------------------------------------------------------------- the tools


def tool(*argv: str) -> None:
    if importlib.util.find_spec(argv[0]) is None:
        pytest.skip(f"{argv[0]} is not installed (pip install -e .[test])")
    run = subprocess.run([sys.executable, "-m", *argv], cwd=REPO, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("folder", ["spilt", "tests"])
def test_ruff_is_clean(folder: str) -> None:
    tool("ruff", "check", folder)


@pytest.mark.long
def test_no_code_is_unused() -> None:
    """What only a library calls is listed in pyproject.toml."""
    tool("vulture")


@pytest.mark.slow
@pytest.mark.long
def test_mypy_is_clean() -> None:
    tool("mypy", "spilt")
