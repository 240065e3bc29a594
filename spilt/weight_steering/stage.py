"""What all stages share: a result is known by what decides it, nothing is made of inputs that do not belong together.

A stored result is `done` where settings, model and inputs are the same; made anew where its inputs are others now; and refused where the
settings or the model are others: a run with other flags must not replace hours of work unasked, nor stand beside results of another kind.
"""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from spilt.artifacts import manifest
from spilt.artifacts.atomic import sweep
from spilt.artifacts.journal import Journal
from spilt.artifacts.weights import Folder
from spilt.errors import UserError, checked_name
from spilt.model import checkpoint
from spilt.model.identity import model_hash
from spilt.model.locate import locate
from spilt.team import Team
from spilt.terminal import complain, say
from spilt.weight_steering import flags, personas

log = logging.getLogger("spilt")
Item = TypeVar("Item")
BEFORE = {
    "personas.json": "data",
    "answers.jsonl": "data",
    "adapters": "adapters",
    "arms": "dw",
    "kl": "calibrate",
    "evaluation": "evaluate",
}


class Context:
    """One run of the program: its words, checked, and the model, loaded when it is first needed; team: the processes that share it."""

    def __init__(self, words: Mapping[str, Any], team: Team | None = None) -> None:
        self.words, self.team = dict(words), team or Team()
        self.base = words["base_dir"]
        self.name, self.model_folder = locate(self.base, words["model"])
        if not checkpoint.there(self.model_folder):
            raise UserError(
                f"--model {words['model']}: no checkpoint {self.model_folder}; give a folder under models/, a path, or a hub id"
            )
        self.behaviour = checked_name("behavior", words["behavior"])
        self.folder = Folder.of(self.base, self.name, self.behaviour)

    @cached_property
    def model_hash(self) -> str:
        return model_hash(self.model_folder)

    @cached_property
    def host(self) -> Any:
        """The model and its tokenizer."""
        import torch

        from spilt.model import host
        from spilt.run import quiet_libraries

        quiet_libraries()
        device = self.words["device"] or ("cuda:0" if torch.cuda.is_available() else "cpu")
        return host.load(self.model_folder, self.words["dtype"], self.team.device if self.team.size > 1 else device)

    @cached_property
    def chat(self) -> Any:
        """Questions without a system prompt: the behaviour is to be learned without one."""
        return self.host.chat(True, "")

    # ---- results

    def parts(self, stage: str, inputs: Sequence[Path], settings: Mapping[str, Any]) -> dict[str, Any]:
        """What decides a result."""
        return {
            "stage": stage,
            "model": self.model_hash,
            "settings": json.loads(json.dumps(dict(settings), default=str)),
            "inputs": {self.relative(path): manifest.file_hash(path) for path in inputs},
        }

    def relative(self, path: Path) -> str:
        """Below this behaviour's folder; of another's file its name alone, so that moving a folder changes nothing."""
        return str(path.relative_to(self.folder.root)) if path.is_relative_to(self.folder.root) else path.name

    def wanted(self, path: Path, parts: dict[str, Any]) -> bool:
        """Whether a result has to be made. Raises UserError where another one lies in its place."""
        state = manifest.standing(path, parts)
        if state == "done" and not self.words["force"]:
            sweep(path.parent)  # a kill between the last rename and this left what an earlier one had left
            return False
        if self.words["force"] or state == "missing":
            return True
        if state == "foreign":
            raise UserError(f"{path}: has no manifest, so nobody can say what it was made of; move it away, or --force makes it anew")
        if state == "damaged":
            log.warning("%s: damaged, or changed by hand; it is made anew", path)
            return True
        then = (manifest.read(path) or {}).get("parts") or {}
        if then.get("model") != parts["model"]:
            raise UserError(f"{path}: was made with another model of this name; --force makes it anew, --base_dir keeps both")
        if said := manifest.differences(then.get("settings") or {}, parts["settings"]):
            raise UserError(
                f"{path}: was made with {said}; give the same flags to go on with it, --force to make it and what follows anew, or another "
                "--base_dir to keep both"
            )
        log.warning("%s: what it was made of has changed; it is made anew", path)
        return True

    def store(self, path: Path, content: bytes | str, parts: dict[str, Any], notes: Mapping[str, Any] | None = None) -> None:
        about = {"behavior": self.behaviour, "model_name": self.name, **(notes or {})}
        manifest.write(path, content, parts, about)
        say(f"{parts['stage']}: {path}")

    def use(self, path: Path) -> Path:
        """An input: there, whole, made with this model from what lies there now. Raises UserError with the stage that makes it."""
        known = BEFORE.get(self.relative(path).split("/")[0], "")
        run = f"spilt weights {known} --behavior {self.behaviour} --model {self.words['model']}"
        if not path.is_file():
            raise UserError(f"{path}: is not there; {run} makes it")
        record = manifest.read(path)
        if record is None or not manifest.matches(path, record):
            raise UserError(f"{path}: is damaged, or was changed by hand; {run} --force makes it anew")
        parts = record["parts"]
        if parts.get("model") != self.model_hash:
            raise UserError(
                f"{path}: was made with another model than {self.model_folder}; {run} --force makes it anew, --base_dir keeps both"
            )
        dtype = parts["settings"].get("dtype", self.words["dtype"])
        if dtype != self.words["dtype"]:
            raise UserError(f"{path}: was made in {dtype}, and this is {self.words['dtype']}; --dtype {dtype} goes on with it")
        for name, then in parts["inputs"].items():
            other = self.folder.root / name
            if other.is_file() and manifest.file_hash(other) != then:
                raise UserError(f"{path}: was made of another {other}; {run} makes it of the one that lies there now")
        return path

    def notes(self, path: Path) -> dict[str, Any]:
        return (manifest.read(path) or {}).get("notes") or {}

    # ---- work that is under way

    def dealt(self, items: Sequence[Item], work: Callable[[Item], None]) -> None:
        """work(item) of each, dealt out whole over the processes, so each result is that of one process.

        What another process says of its items, process 0 says once all are done; also what came before an error.
        """
        error: Exception | None = None

        def mine() -> None:
            for item in self.team.shard(items):
                work(item)

        out, err = io.StringIO(), io.StringIO()
        try:
            if self.team.main:
                mine()
            else:
                with redirect_stdout(out), redirect_stderr(err):
                    mine()
        except Exception as caught:  # raised below, in all
            error = caught
        for heard, warned in self.team.gather(lambda: (out.getvalue(), err.getvalue())):
            if self.team.main:
                for tell, text in ((say, heard), (complain, warned)):
                    for line in text.splitlines():
                        tell(line)

        def end() -> None:
            if error is not None:
                raise error

        self.team.each(end)

    def begin(self, name: str) -> None:
        """With --force the lines that are kept of some work are none of this run's."""
        if self.words["force"]:
            Journal(self.folder.journal(name)).remove()

    def journal(self, name: str) -> Journal:
        """This process's lines of some work; they are kept until `finished`."""
        return Journal(self.folder.journal(name, self.team.rank))

    def finished(self, name: str) -> None:
        """The result is stored: no line is needed any more, also none that a kill left."""
        found = Journal(self.folder.journal(name))
        found.remove()
        if found.path.parent.is_dir():
            found.path.parent.rmdir()

    # ---- what the data stage has stored

    @cached_property
    def asked(self) -> dict[str, Any]:
        return dict(json.loads(self.use(self.folder.personas).read_text(encoding="utf-8")))

    @property
    def pairs(self) -> list[personas.Pair]:
        return [personas.Pair(*pair) for pair in self.asked["pairs"]]

    def questions(self, split: str, most: int | None = None) -> list[personas.Question]:
        return personas.of_split([personas.Question(*one) for one in self.asked["questions"]], split, most)

    def settings(self, stage: str) -> dict[str, Any]:
        return flags.deciding(self.words, stage)


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Inside: no gradients anywhere, evaluation mode."""
    import torch

    from spilt import api

    with api.frozen(model), torch.no_grad():
        yield


def shown(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str], tell: Callable[[str], None] = say) -> None:
    """Rows as lines; columns: name -> format."""
    table = [list(columns)]
    for row in rows:
        table.append([_cell(row.get(name), spec) for name, spec in columns.items()])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for cells in table:
        tell("  ".join(text.ljust(width) for text, width in zip(cells, widths, strict=True)).rstrip())


def _cell(value: Any, spec: str) -> str:
    return "–" if value is None or value != value else f"{value:{spec}}"
