"""Fixtures that several files ask for by name, and what is left out of a matrix of cases where CI=true is not set."""

from __future__ import annotations

import gc
from collections import Counter
from itertools import groupby

import pytest
from counts import CI

FIXTURES = ("command_line", "faults", "hparams_tree")  # the files whose fixtures every test may ask for


def pytest_configure(config: pytest.Config) -> None:
    """The process that only deals tests out to others (`-n 2`) needs none of the libraries that the fixtures import."""
    gc.disable()  # until all is imported, which stays
    if config.getoption("dist", "no") == "no":
        for name in FIXTURES:
            config.pluginmanager.import_plugin(name)


def pytest_collection_finish() -> None:
    """What is there by now is not looked through at each collection of garbage."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With CI=true all. Else none marked `long`, of a test marked `few(n)` the first n cases, and of one marked `matrix` as few as show
    every value of every parameter."""
    if CI:
        return
    left_out = {item for item in items if item.get_closest_marker("long")}
    cases_of: Counter[str] = Counter()
    for item in items:
        cases_of[_function(item)] += 1
        if (few := item.get_closest_marker("few")) and cases_of[_function(item)] > few.args[0]:
            left_out.add(item)
    marked = sorted((item for item in items if item.get_closest_marker("matrix")), key=_function)
    for _, same in groupby(marked, key=_function):
        cases = {item: _values(item) for item in same}
        shown: Counter[tuple[tuple[str, int], ...]] = Counter()
        while any(not shown[value] for values in cases.values() for value in values):  # most that is new, else what was shown least
            case = max(cases, key=lambda item: (sum(not shown[v] for v in cases[item]), -sum(shown[v] for v in cases[item])))
            shown.update(cases.pop(case))
        left_out |= cases.keys()
    config.hook.pytest_deselected(items=[item for item in items if item in left_out])
    items[:] = [item for item in items if item not in left_out]


def _function(item: pytest.Item) -> str:
    return item.nodeid.split("[")[0]


def _values(item: pytest.Item) -> set[tuple[tuple[str, int], ...]]:
    """What each `parametrize` gives this case (names given together stay together), and each parameter of a fixture."""
    params = item.callspec.params
    names = [n.replace(",", " ").split() if isinstance(n, str) else list(n) for n in (m.args[0] for m in item.iter_markers("parametrize"))]
    names += [[name] for name in params if name not in sum(names, [])]
    return {tuple((name, id(params[name])) for name in group) for group in names}
