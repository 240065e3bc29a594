"""What the libraries import and no run calls, left out: a third of a start, and 110 MB.

For any model transformers imports what other programs use: tensors in pieces on several machines (torch.distributed.tensor, and with it
sympy), torch's compiler, scipy's optimizers for finding things in pictures. It has its own way where torch has no other machines. Of the
compiler a library wants the words that mark a function for it, which change nothing until something is compiled; torch asks of every size
whether it is a symbol; and what is imported by name need not be there before it is called. LATER answers these. Whoever asks a module of
LATER for anything else gets the real one, in its place. pandas does without pyarrow where there is none.

Only where the process is this tool's alone. Not for notebooks, whose imports are their own, nor for one of several processes, nor where
something is compiled.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import copy
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any, TypeVar

Marked = TypeVar("Marked", bound=Callable[..., Any])
LIBRARY, COMPILER = "transformers", "torch._dynamo"
SYMBOLS = "torch.fx.experimental.symbolic_shapes"
INDEXING = f"{COMPILER}._trace_wrapped_higher_order_op"
STRUCTURE = f"{LIBRARY}.utils.import_utils"
ASSIGNMENT, ARROW = "scipy.optimize", "pyarrow"
WANTED = ("AutoModelForCausalLM", "AutoTokenizer", "GenerationMixin", "PreTrainedModel")  # bring everything that families share

# what torch asks of every size: the answers for numbers
OF_NUMBERS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("expect_true", "guard_int", "guard_or_false", "guard_or_true", "guard_size_oblivious", "guarding_hint_or_throw"), lambda size: size
    ),
    "has_guarding_hint": lambda size: True,
    "is_nested_int": lambda size: False,
    "statically_known_true": lambda known: known,
    "sym_and": lambda *known: all(known),
    "sym_eq": lambda size, other: list(size) == list(other) if isinstance(size, tuple | list) else size == other,
    "sym_or": lambda *known: any(known),
}


def _mark(function: Marked | None = None, *_: Any, **__: Any) -> Any:
    """What `disable`, `allow_in_graph` and the like make of a function where nothing is compiled: the function."""
    return _mark if function is None else function


def _when_called(module: str, name: str) -> Callable[..., Any]:
    """A function, or class, that is imported by name long before it is called, if ever."""

    def call(*given: Any, **how: Any) -> Any:
        return getattr(_execute(sys.modules[module]), name)(*given, **how)

    return call


def _plain(asked: Any) -> bool:
    return all(map(_plain, asked)) if isinstance(asked, tuple | list) else type(asked) in (bool, int, float)


def _of_numbers(name: str, answer: Callable[..., Any]) -> Callable[..., Any]:
    """The same for numbers; symbols are sympy's."""

    def ask(*asked: Any, **how: Any) -> Any:
        return answer(*asked) if _plain(asked) and not how else getattr(_execute(sys.modules[SYMBOLS]), name)(*asked, **how)

    return ask


# modules that come later, and what can be had of them before
LATER: dict[str, dict[str, Any]] = {
    COMPILER: {**dict.fromkeys(("disable", "allow_in_graph", "assume_constant_result"), _mark), "graph_break": lambda why="": None},
    SYMBOLS: {name: _of_numbers(name, answer) for name, answer in OF_NUMBERS.items()},
    "sympy": {"Basic": type("Basic", (), {})},  # what a size is not
    INDEXING: {"TransformGetItemToIndex": _when_called(INDEXING, "TransformGetItemToIndex")},  # of masks that are made with vmap
    "scipy": {},
    ASSIGNMENT: {"linear_sum_assignment": _when_called(ASSIGNMENT, "linear_sum_assignment")},  # in losses of image models
}
_lock = RLock()


class _Later(ModuleType):
    """A module that is executed, in its place, when something is asked for that LATER does not have."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__version__":  # `inspect` and `warnings` look into all modules
            raise AttributeError(name)
        return getattr(_execute(self), name)


def _execute(module: ModuleType) -> ModuleType:
    with _lock:
        if type(module) is _Later:
            module.__class__ = ModuleType  # type: ignore[assignment]
            for name in LATER[module.__name__]:
                delattr(module, name)
            module.__spec__.loader.exec_module(module)  # type: ignore[union-attr]
    return module


class _WithParent(Loader):
    """For part of a module that comes later: that module first, which may bring the part itself."""

    def __init__(self, spec: ModuleSpec) -> None:
        self.spec, self.brought = spec, False

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        _execute(sys.modules[spec.name.rpartition(".")[0]])
        self.brought = spec.name in sys.modules
        return sys.modules[spec.name] if self.brought else self.spec.loader.create_module(spec)  # type: ignore[union-attr]

    def exec_module(self, module: ModuleType) -> None:
        _as_found(module, self.spec)
        if not self.brought:
            self.spec.loader.exec_module(module)  # type: ignore[union-attr]


class _Lean(Loader):
    """For a library of LEAN: imported its lean way."""

    def __init__(self, spec: ModuleSpec) -> None:
        self.spec = spec

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.spec.loader.create_module(spec)  # type: ignore[union-attr]

    def exec_module(self, module: ModuleType) -> None:
        _as_found(module, self.spec)
        with LEAN[self.spec.name]():
            self.spec.loader.exec_module(module)  # type: ignore[union-attr]


def _as_found(module: ModuleType, spec: ModuleSpec) -> None:
    """As if no other loader had been asked."""
    module.__spec__, module.__loader__ = spec, spec.loader


class _Finder(MetaPathFinder):
    """First in line, for the libraries of LEAN, once, and for parts of modules that come later."""

    def __init__(self) -> None:
        self.lean = set(LEAN)

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        loader: Callable[[ModuleSpec], Loader]
        if name in self.lean:
            self.lean.remove(name)
            loader = _Lean
        elif type(sys.modules.get(name.rpartition(".")[0])) is _Later and name not in LATER:
            loader = _WithParent
        else:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        ours = copy(spec)
        ours.loader = loader(spec)
        return ours


@contextmanager
def _alone() -> Iterator[None]:
    """transformers and what all families share, with the modules of LATER in place, and torch of one machine."""
    import torch

    for name, words in LATER.items():
        if name not in sys.modules and (spec := find_spec(name)):
            module = module_from_spec(spec)
            vars(module).update(words)
            module.__class__ = _Later
            sys.modules[name] = module
            parent, _, child = name.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, module)
    was = torch.distributed.is_available
    torch.distributed.is_available = lambda: False
    try:
        yield
        for name in WANTED:
            getattr(sys.modules[LIBRARY], name)
    finally:
        torch.distributed.is_available = was


@contextmanager
def _without_arrow() -> Iterator[None]:
    """Not to be found."""
    if ARROW in sys.modules:
        yield
        return
    sys.modules[ARROW] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[ARROW]


@contextmanager
def _read_once() -> Iterator[None]:
    """transformers reads its 500 folders of models for what each file defines, twice: its own cache holds 128."""
    yield
    module = sys.modules[STRUCTURE]
    read = getattr(module, "create_import_structure_from_path", None)
    if hasattr(read, "__wrapped__"):
        module.create_import_structure_from_path = cache(read.__wrapped__)  # type: ignore[attr-defined, union-attr]


LEAN: dict[str, Callable[[], AbstractContextManager[None]]] = {LIBRARY: _alone, STRUCTURE: _read_once, "pandas": _without_arrow}
_finder = _Finder()


def arm() -> None:
    """From now on the libraries that this process imports come without what runs do not call. Nothing in a process of a launcher's."""
    if _finder not in sys.meta_path and os.environ.get("WORLD_SIZE", "1") == "1":
        _finder.lean -= sys.modules.keys()
        sys.meta_path.insert(0, _finder)


def disarm() -> None:
    """transformers whole after all: for what compiles, for a model in parts, for other engines. Before its import."""
    _finder.lean -= {LIBRARY, STRUCTURE}


@contextmanager
def uncollected() -> Iterator[None]:
    """No search for garbage while libraries are imported: of their million objects all stay, and looking through them takes a second.

    A process of this tool's alone does not look through them later either. What is frozen is still freed when nothing refers to it, as a
    model is; only what refers to itself stays.
    """
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if _finder in sys.meta_path:
            gc.freeze()
        if was:
            gc.enable()
