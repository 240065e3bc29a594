"""What lean.py leaves out is not missed: same numbers, and whoever needs it gets the real thing."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from command_line import process, results_path, vector_path
from families import Base, checkpoint, known, make_base

from spilt import lean
from spilt.steering.anatomy import FAMILIES

REPO = Path(__file__).parents[1]
LEFT_OUT = (
    "torch._dynamo.eval_frame",
    "torch._inductor",
    "torch.distributed.tensor",
    "sympy.core",
    "scipy.special",
    "scipy.optimize._optimize",
    "pyarrow",
)
SAID = """
import json, sys
from spilt import lean
{arm}
import torch
from pathlib import Path
from spilt.model.host import load
{body}
print(json.dumps(said))
"""


def said(body: str, arm: str = "lean.arm()", *words: str, **env: str) -> Any:
    """What a process of its own says, which has armed as the program does."""
    done = subprocess.run(
        [sys.executable, "-c", SAID.format(arm=arm, body=body), *words],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{REPO}{os.pathsep}{REPO / 'tests'}", "OMP_NUM_THREADS": "1", **env},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


LATER_NOW = "said = sorted(name for name in lean.LATER if type(sys.modules[name]) is not lean._Later)"
THERE = f"[name for name in {LEFT_OUT!r} if name in sys.modules]"


@pytest.mark.parametrize(("module", "name"), [(module, name) for module, words in lean.LATER.items() for name in words])
def test_the_words_that_come_early_are_the_modules_own(module: str, name: str) -> None:
    """As names; what they answer is below."""
    real = getattr(import_module(module), name)
    early = lean.LATER[module][name]
    assert callable(real) and callable(early) and inspect.isclass(real) >= inspect.isclass(early)


SIZES: dict[str, list[tuple[Any, ...]]] = {
    **dict.fromkeys(("guard_int", "guarding_hint_or_throw"), [(0,), (7,)]),
    **dict.fromkeys(
        ("expect_true", "guard_or_false", "guard_or_true", "guard_size_oblivious", "statically_known_true"), [(True,), (False,)]
    ),
    **dict.fromkeys(("has_guarding_hint", "is_nested_int"), [(3,), (True,)]),
    **dict.fromkeys(("sym_and", "sym_or"), [(True, False), (True, True), (False, False, True), (False,)]),
    "sym_eq": [(3, 3), (3, 4), ((1, 2), (1, 2)), ((1, 2), (1, 3)), ((), ())],
}


@pytest.mark.filterwarnings("ignore:guard_size_oblivious")
@pytest.mark.parametrize("name", lean.OF_NUMBERS)
def test_sizes_that_are_numbers_are_answered_as_torch_does(name: str) -> None:
    real = getattr(import_module(lean.SYMBOLS), name)
    for asked in SIZES[name]:
        got, want = lean.OF_NUMBERS[name](*asked), real(*asked)
        assert got == want and type(got) is type(want), asked


def test_a_mark_leaves_a_function_as_it_is() -> None:
    import torch._dynamo

    def f(x: int) -> int:
        return x + 1

    for name in ("disable", "allow_in_graph", "assume_constant_result"):
        mark, real = lean.LATER[lean.COMPILER][name], getattr(torch._dynamo, name)
        assert mark(f) is f and real(f)(2) == 3
    assert lean.LATER[lean.COMPILER]["disable"](recursive=False)(f) is f


LOGITS = """
model = load(Path(sys.argv[1]), "float32", "cpu").model
with torch.no_grad():
    out = model(torch.arange(8)[None] + 6).logits
import hashlib
said = [hashlib.sha256(out.float().numpy().tobytes()).hexdigest(), %s]
"""


def test_a_loaded_model_says_the_same_with_a_third_less_imported() -> None:
    host = str(checkpoint())
    (lean_sum, left), (whole_sum, there) = (said(LOGITS % THERE, arm, host) for arm in ("lean.arm()", ""))
    assert lean_sum == whole_sum
    assert not left and "torch._dynamo.eval_frame" in there


def test_no_family_asks_for_what_comes_later() -> None:
    """Where one comes to, it is there; this says that the saving is gone for it."""
    body = "import families\nfor family in sys.argv[1:]:\n    families.build(family)\n"
    assert said(body + LATER_NOW, "lean.arm()", *filter(known, FAMILIES)) == []


@pytest.mark.parametrize(
    ("body", "want"),
    [
        pytest.param(
            "said = torch.compile(lambda x: x.sin() + 1, backend='eager')(torch.zeros(2)).tolist()", [1.0, 1.0], id="torch.compile"
        ),
        pytest.param("from scipy import optimize, special\nsaid = float(special.ndtri(0.5))", 0.0, id="scipy"),
        pytest.param(
            "from scipy.optimize import linear_sum_assignment as a\nsaid = a([[2, 1], [1, 3]])[1].tolist()", [1, 0], id="what came by name"
        ),
        pytest.param("import scipy\nsaid = [scipy.__version__ > '1', scipy.special.ndtri(0.5)]", [True, 0.0], id="scipy's version"),
        pytest.param("import sympy\nsaid = str(sympy.Symbol('x') + 1)", "x + 1", id="sympy"),
        pytest.param("import sympy.core.expr as e\nimport sympy\nsaid = e.Expr is sympy.Expr", True, id="a part of sympy"),
        pytest.param("import torch._dynamo.utils as u\nsaid = u is torch._dynamo.utils", True, id="a part of the compiler"),
        pytest.param("from torch.fx.experimental import symbolic_shapes as s\nsaid = s.ShapeEnv.__name__", "ShapeEnv", id="symbols"),
        pytest.param("said = torch.distributed.is_available()", True, id="torch.distributed"),
        pytest.param("import torch.distributed.tensor\nsaid = torch.distributed.tensor.DTensor.__name__", "DTensor", id="DTensor"),
        pytest.param(
            "o = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])\no.param_groups[0]['params'][0].grad = torch.ones(2)\no.step()\n"
            "said = bool(o.param_groups[0]['params'][0].sum() < 2)",
            True,
            id="an optimizer",
        ),
        pytest.param("said = torch.vmap(lambda x: x * 2)(torch.ones(2)).tolist()", [2.0, 2.0], id="vmap"),
        pytest.param("import pandas, pyarrow\nsaid = pandas.__spec__.name + pyarrow.__name__", "pandaspyarrow", id="pyarrow"),
    ],
)
def test_whoever_asks_for_it_later_gets_it(body: str, want: object) -> None:
    pytest.importorskip("pyarrow" if "pyarrow" in body else "sys")
    assert said("import transformers, pandas\nassert transformers.AutoModelForCausalLM\n" + body) == want


def test_what_a_library_brings_may_ask_for_it_meanwhile() -> None:
    """scikit-learn and librosa, which transformers imports where they are installed, want scipy."""
    body = """
with lean._alone():
    import transformers
    from scipy import sparse
    from scipy.optimize import minimize
    import sympy
said = [sparse.eye(2).sum(), bool(minimize(lambda x: (x - 1) ** 2, 0.0).x > 0.99), str(sympy.Integer(3))]
"""
    assert said(body) == [2.0, True, "3"]


def test_each_module_is_executed_once() -> None:
    """Also those that a module of LATER brings with it while one of its parts is looked for."""
    body = """
from collections import Counter
from importlib.machinery import SourceFileLoader
executed, before = Counter(), SourceFileLoader.exec_module
def counted(self, module):
    executed[module.__name__] += 1
    before(self, module)
SourceFileLoader.exec_module = counted
import pandas, transformers, torch._dynamo.utils, sympy.core.expr
said = [executed[name] for name in ("pandas", "transformers", "torch._dynamo", "torch._dynamo.utils", "sympy", "sympy.core.expr")]
said.append([pandas.__loader__ is pandas.__spec__.loader, type(pandas.__loader__).__name__, type(transformers.__spec__.loader).__name__])
"""
    assert said(body) == [1] * 6 + [[True, "SourceFileLoader", "SourceFileLoader"]]


def test_no_folder_of_models_is_read_twice() -> None:
    body = """
import transformers, transformers.models
seen = sys.modules[lean.STRUCTURE].create_import_structure_from_path.cache_info()
inside = Path(transformers.models.__path__[0])
folders = [path for path in inside.rglob("*") if path.is_dir() and path.name != "__pycache__"]
said = [seen.misses <= len(folders) + 9, seen.hits >= len([path for path in folders if path.parent == inside]) > 128]
"""
    assert said(body) == [True, True]


TABLE = """
import io, pandas as pd
made = pd.read_csv(io.StringIO("a,b\\nx,1\\n,2.5\\nü,3"), encoding="utf-8")
rows = made.groupby("a", dropna=False).sum().reset_index().sort_values("b").merge(made, on="b")
said = [rows.to_csv(index=False), rows.to_json(orient="records", double_precision=15), str(rows.dtypes), made.a.str.upper().tolist()[0]]
"""


def test_tables_are_the_same_without_pyarrow() -> None:
    assert said(TABLE) == said(TABLE, "")


@pytest.mark.parametrize("env", [{"WORLD_SIZE": "2"}, {}])
def test_one_of_several_processes_and_a_notebook_import_what_they_import(env: dict[str, str]) -> None:
    body = "import transformers\nassert transformers.GenerationMixin\nsaid = 'torch._dynamo.eval_frame' in sys.modules"
    assert said(body, "lean.arm()" if env else "import spilt.api", **env) is True


def imported(base: Base, *words: str) -> set[str]:
    """What the program imports for a fit, or for texts."""
    done = process(base.argv("sft", "lora", *words), "-X", "importtime")
    assert done.returncode == 0, done.stderr[-3000:]
    return {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_a_run_imports_none_of_it(base: Base, tmp_path: Path) -> None:
    """And writes the bytes of one that has it all: as from Python, where main is given its words."""
    whole = make_base(tmp_path / "whole")
    for mode in ("generate", "apply"):
        words = ("--mode", mode, "--multipliers", "1")
        names = imported(base, *words)
        assert "transformers" in names and not names & set(LEFT_OUT)
        said("from spilt import cli\nsaid = cli.main(sys.argv[1:])", "", *whole.argv("sft", "lora", *words))
    for path in (vector_path, results_path):
        ours, theirs = (path(b, "sft", "lora", *(["m1.0"] if path is results_path else [])) for b in (base, whole))
        assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.parametrize("words", [("--decode_step", "static"), ("--engine", "vllm"), ("--tensor_parallel",)])
def test_what_compiles_or_deals_a_model_out_has_the_whole_library(clean: Base, words: tuple[str, ...]) -> None:
    body = "from spilt import cli\ncode = cli.main(sys.argv[1:])\nsaid = [code, sorted(lean._finder.lean)]"
    argv = clean.argv("caa", "vector", "--mode", "generate" if "--tensor_parallel" in words else "both", "--dry_run", *words)
    assert said(body, "lean.arm()", *argv)[1] == ["pandas"]
    assert said(body, "lean.arm()", *clean.argv("caa", "vector", "--dry_run"))[1] == sorted(lean.LEAN)
