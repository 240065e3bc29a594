"""Adding: a verb is a class in its own file; plan, dry run, command line, resume, verify and the page's neighbours take it as it is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import families
import pytest

from spilt import cli, verbs, verify
from spilt.artifacts import manifest
from spilt.artifacts.store import Store
from spilt.data import entries, readers
from spilt.settings import resolve_generate
from spilt.settings.resolve import Resolved
from spilt.tasks.recordings import Run, stored
from spilt.verbs.estimate import Cost, Shape, tokens


class Weigh(verbs.Verb):
    """Writes the norm of a stored Steering at each multiplier, and how many prompts it would meet: a toy."""

    name, mode = "weigh", "weigh"
    sections = {"prompts": "generation"}
    work = f"{__name__}:weigh"

    def settings(self, request: verbs.Request, method: str, form: str) -> Resolved:
        return resolve_generate(request.base_dir, request.model, request.dataset, method, form, request.overrides)

    def outputs(self, store: Store, step: verbs.Step) -> list[Path]:
        return [store.generation_folder(step.cells[0]) / f"m{m}" / "weight.json" for m in step.multipliers]

    def decided_by(self, step: verbs.Step) -> list[tuple[str, dict[str, Any]]]:
        return [("prompts", {"multiplier": m, "concept": step.cells[0].concept}) for m in step.multipliers]

    def cost(self, step: verbs.Step, shape: Shape, rows: Sequence[Any], request: verbs.Request) -> Cost:
        return Cost(sum(tokens(row.input) for row in rows), 0, 0, 0)


def weigh(step: verbs.Step, run: Run) -> str:
    (cell,) = step.cells
    outputs = verbs.output_parts(step, run.request.limit, run.seen)
    todo = {path: parts for path, parts in outputs.items() if run.request.force or manifest.standing(path, parts) != "done"}
    steering = stored(cell, step.settings, run)
    prompts = readers.read_prompts(
        entries.dataset_format(run.request.base_dir, cell.dataset, "generation"), cell.concept, run.request.limit
    )
    for path, parts in todo.items():
        weight = {"norm": parts["multiplier"] * steering.entries[0][1].norm(), "prompts": len(prompts)}
        run.store_result(step, path, json.dumps(weight), parts)
    return "done" if todo else "already done"


def looked_at(artifact: verify.Artifact) -> str:
    if set(json.loads(artifact.path.read_text())) != {"norm", "prompts"}:
        raise verify.Damaged("is no weight")
    return ""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(verbs.VERBS, "weigh", Weigh())
    monkeypatch.setitem(verbs.MODES, "weigh", ("weigh",))
    monkeypatch.setitem(verify.KINDS, "weight.json", looked_at)


@pytest.mark.long
def test_a_toy_verb_runs_through_everything(toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = families.make_base(tmp_path / "base", train=8)
    words = base.argv("sft", "vector", "--mode", "weigh", "--multipliers", "1", "3")
    assert cli.main([*base.argv("sft", "vector", "--mode", "generate"), "--quiet"]) == 0
    capsys.readouterr()
    assert cli.main([*words, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "1. weigh mine sft vector" in said and "m3.0/weight.json" in said and "--mode weigh" in said and "about " in said
    assert cli.main([*words, "--quiet"]) == 0
    found = {path.parent.name: json.loads(path.read_text()) for path in base.path.rglob("weight.json")}
    assert found["m3.0"]["norm"] == pytest.approx(3 * found["m1.0"]["norm"]) and found["m1.0"]["prompts"] == 3
    assert {one.state for one in verify.check(base.path)} == {verify.OK}
    capsys.readouterr()
    assert cli.main([*words, "--quiet"]) == 0 and "already done" in capsys.readouterr().out

    assert cli.main([*base.argv("sft", "vector", "--mode", "generate", "--set", "lr=0.5"), "--quiet"]) == 0  # another vector
    assert {one.state for one in verify.check(base.path) if one.path.name == "weight.json"} == {verify.STALE}
    assert cli.main([*words, "--quiet"]) == 0
    weight = next(base.path.rglob("m1.0/weight.json"))
    assert json.loads(weight.read_text()) != found["m1.0"]
    weight.write_text("{}")
    assert verify.DAMAGED in {one.state for one in verify.check(base.path)}
    assert cli.main([*base.argv("sft", "vector", "--mode", "loss"), "--quiet"]) == 0  # the page is made beside it


def test_a_toy_verb_needs_what_it_reads(toy: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = families.make_base(tmp_path / "base")
    assert cli.main([*base.argv("sft", "vector", "--mode", "weigh"), "--quiet"]) == 1
    assert "no vector file" in capsys.readouterr().out
