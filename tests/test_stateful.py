"""Random sequences of edits, exchanges, damage, kills and runs: what is called done is what a fresh base dir gives for the same request.

A kill is simulated in the process: from a drawn moment on every change of a file raises, as if the process were gone, so that no
clean-up can happen either (test_kill.py kills real processes). An exchange in the middle of a run happens at such a moment too.
4 sequences, 20 with CI=true; `SPILT_SEQUENCES=3000 python -m pytest tests/test_stateful.py` runs more.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
import yaml
from counts import count
from families import Base, build, intervention, make_base, pairs, write_jsonl, write_yaml
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from spilt import cli, report, verify
from spilt.artifacts import manifest

SEQUENCES = int(os.environ.get("SPILT_SEQUENCES", count(20, 4)))
STEPS = 8
CELLS = (("sft", "vector"), ("spilt", "lora"), ("caa", "vector"))
# what changes files, and where work is done between the changes: the moments at which a run can be killed
CHANGES = ((os, "replace"), (os, "unlink"), (os, "write"), (os, "fsync"))
WORK = ((torch.optim.AdamW, "step"),)

requests = st.fixed_dictionaries(
    {
        "cell": st.sampled_from(CELLS),
        "mode": st.sampled_from(["generate", "apply", "both", "loss"]),
        "multipliers": st.sampled_from([("1",), ("0", "2"), ("-1", "2")]),
        "limit": st.sampled_from([None, None, "2"]),
        "force": st.sampled_from([False, False, False, True]),
        "layers": st.sampled_from([None, None, None, "1"]),
    }
)
moments = st.integers(1, 60)


class Killed(BaseException):
    """The process is gone."""


@contextlib.contextmanager
def at_moment(number: int, deed: Callable[[], None]) -> Iterator[None]:
    """`deed` before the number-th change of a file or step of work."""
    count = 0

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                deed()
            return real(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for where, name in (*CHANGES, *WORK):
            patch.setattr(where, name, counted(getattr(where, name)))
        yield


@contextlib.contextmanager
def killed_at(number: int) -> Iterator[None]:
    """Every change of a file from that moment on raises: nothing is written, renamed or removed any more."""

    def die() -> None:
        for where, name in (*CHANGES, *WORK):
            setattr(where, name, dead)
        raise Killed

    def dead(*_: Any, **__: Any) -> None:
        raise Killed

    with at_moment(number, die), contextlib.suppress(Killed):
        yield


def words(base: Path, request: dict[str, Any]) -> list[str]:
    method, form = request["cell"]
    more = ["--mode", request["mode"], "--quiet", "--checkpoint_seconds", "0"]
    if request["mode"] != "generate":
        more += ["--multipliers", *request["multipliers"]]
    more += ["--limit", request["limit"]] if request["limit"] else []
    more += ["--set", f"layers={request['layers']}"] if request["layers"] else []
    return Base(base).argv(method, form, *more)


def run(argv: list[str]) -> tuple[int, str]:
    """Exit code and everything that was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.main(argv)
    return code, said.getvalue()


def results(base: Path) -> dict[str, bytes]:
    """Every artifact under its path, with its manifest less the time of day."""
    found = {}
    for top in ("vectors", "generation"):
        for path in sorted((base / top).rglob("*")):
            if not path.is_file() or path.suffix not in (".pt", ".json", ".csv") or "unfinished" in path.name or ".tmp-" in path.name:
                continue
            data = path.read_bytes()
            if path.name.endswith(".manifest.json"):
                with contextlib.suppress(ValueError):
                    data = json.dumps({k: v for k, v in json.loads(data).items() if k != "created"}, sort_keys=True).encode()
            found[str(path.relative_to(base))] = data
    return found


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What can be exchanged: two models, two data files of each kind; and the results of fresh base dirs, by input and request."""
    folder = tmp_path_factory.mktemp("worlds")
    base = make_base(folder / "base", train=5, test=2)
    for path in base.path.rglob("generate_*.yaml"):  # a fit of few steps
        values = yaml.safe_load(path.read_text())
        write_yaml(path, {**values, "batch_size": 2, "n_epochs": 1} if "lr" in values else values)
    write_yaml(base.experiment / "apply_config.yaml", {**_texts(3), "torch_dtype": "float32", "seed": 42})
    models = [base.path / "models" / base.model, folder / "other"]
    shutil.copytree(models[0], models[1])
    build("qwen2", seed=5).save_pretrained(models[1])
    return {"base": base, "models": models, "fresh": {}, "counts": {}}


def _texts(tokens: int) -> dict[str, Any]:
    return {"generation_params": {"max_new_tokens": tokens, "do_sample": False}, "num_responses": 1, "generate_orig_output": False}


class Runs(RuleBasedStateMachine):
    """One base dir, what a user and misfortune do to it, and what it then says of itself."""

    worlds: dict[str, Any] = {}

    @initialize()
    def begin(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="spilt-state-"))
        made: Base = self.worlds["base"]
        self.base = Base(self.root / "base")
        shutil.copytree(made.path, self.base.path)
        self.last: list[dict[str, Any]] = []

    def teardown(self) -> None:
        if hasattr(self, "root"):
            for request in self.last[-2:]:
                self._compare(request)
            shutil.rmtree(self.root, ignore_errors=True)

    # ---- what the user does

    @rule(lr=st.sampled_from([0.01, 0.3]), tokens=st.sampled_from([2, 3]))
    def edit_settings(self, lr: float, tokens: int) -> None:
        for method, form in CELLS:
            path = self.base.hparams(self.base.one, method, f"generate_{method}_{form}.yaml")
            values = yaml.safe_load(path.read_text())
            write_yaml(path, {**values, "lr": lr} if "lr" in values else values)
        write_yaml(self.base.experiment / "apply_config.yaml", {**_texts(tokens), "torch_dtype": "float32", "seed": 42})

    @rule(section=st.sampled_from(["train", "valid"]), word=st.sampled_from(["", "now "]))
    def edit_data(self, section: str, word: str) -> None:
        write_jsonl(self.base.data(self.base.one, section), pairs(5 if section == "train" else 2, word))

    @rule(number=st.sampled_from([0, 1]))
    def exchange_model(self, number: int) -> None:
        target = self.base.path / "models" / self.base.model
        shutil.rmtree(target)
        shutil.copytree(self.worlds["models"][number], target)

    @rule(cell=st.sampled_from(CELLS), kind=st.sampled_from(["foreign", "moved", "gone"]))
    def exchange_vector(self, cell: tuple[str, str], kind: str) -> None:
        leaf = "caa_vector" if cell[0] == "caa" else "_".join(cell)
        path = self.base.path / "vectors" / self.base.model / cell[0] / self.base.one / leaf / "layer_2.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        other = path.parents[3] / "caa" / self.base.one / "caa_vector" / "layer_2.pt"
        if kind == "gone":
            path.unlink(missing_ok=True)
        elif kind == "foreign":
            with torch.random.fork_rng():  # another process would not draw from the numbers of a fit under way
                torch.save(intervention(cell[1], seed=3).state(), path)
            manifest.manifest_path(path).unlink(missing_ok=True)
        elif cell == ("sft", "vector") and other.is_file() and manifest.manifest_path(other).is_file():
            for source, target in ((other, path), (manifest.manifest_path(other), manifest.manifest_path(path))):
                shutil.copy(source, target)

    @rule(place=st.integers(0, 10**6), how=st.sampled_from(["cut", "flip", "empty"]))
    def damage(self, place: int, how: str) -> None:
        there = [path for top in ("vectors", "generation") for path in sorted((self.base.path / top).rglob("*")) if path.is_file()]
        if not there:
            return
        path = there[place % len(there)]
        data = bytearray(path.read_bytes())
        if how == "flip" and data:
            data[place % len(data)] ^= 1 << (place % 8)
        path.write_bytes({"cut": data[: len(data) // 2], "flip": data, "empty": b""}[how])

    # ---- runs

    @rule(request=requests, moment=moments)
    def run_killed(self, request: dict[str, Any], moment: int) -> None:
        self.last.append(request)
        with killed_at(moment):
            run([*words(self.base.path, request), *(["--force"] if request["force"] else [])])

    @rule(request=requests, moment=moments, what=st.sampled_from(["model", "data", "vector", "settings"]), number=st.sampled_from([0, 1]))
    def run_with_an_exchange(self, request: dict[str, Any], moment: int, what: str, number: int) -> None:
        deeds: dict[str, Callable[[], None]] = {
            "model": lambda: self.exchange_model(number),
            "data": lambda: self.edit_data("train", ("", "now ")[number]),
            "vector": lambda: self.exchange_vector(request["cell"], ("foreign", "gone")[number]),
            "settings": lambda: self.edit_settings((0.01, 0.3)[number], 3),
        }
        self.last.append(request)
        with at_moment(moment, deeds[what]):
            run(words(self.base.path, request))

    @rule(request=requests)
    def run_and_compare(self, request: dict[str, Any]) -> None:
        self.last.append(request)
        self._compare(request)

    @rule(request=requests)
    def fit_and_compare_then_use(self, request: dict[str, Any]) -> None:
        self.last.append(request)
        self._compare({**request, "mode": "generate", "force": False})
        self._compare(request)

    @precondition(lambda self: self.last)
    @rule(back=st.integers(1, 3))
    def the_same_again(self, back: int) -> None:
        self._compare({**self.last[-min(back, len(self.last))], "force": False})

    def _compare(self, request: dict[str, Any]) -> None:
        before = self._vectors(foreign_only=request["mode"] in ("generate", "both"))
        code, said = run([*words(self.base.path, request), *(["--force"] if request["force"] else [])])
        expected = self._fresh(request, {} if request["force"] and request["mode"] in ("generate", "both") else before)
        assert code == expected["code"], f"{request}: {code} where a fresh base dir gives {expected['code']}\n{said}\n{expected['said']}"
        self.worlds["counts"][code] = self.worlds["counts"].get(code, 0) + 1
        if code != 0:
            return
        have = results(self.base.path)
        states = {str(found.path.relative_to(self.base.path)): found.state for found in verify.check(self.base.path)}
        for name, data in expected["results"].items():
            assert have.get(name) == data, f"{name} is not what a fresh base dir gives for {request}\n{said}"
            if not name.endswith(".manifest.json") and name in states and before.get(name) != data:  # not what lies there unasked
                assert states[name] in (verify.OK, verify.FOREIGN), f"{name}: done, but verify says {states[name]}"

    def _vectors(self, foreign_only: bool) -> dict[str, bytes]:
        """The vectors that a request may read, with their manifests: those of the released code are kept by a fit, too."""
        found = {}
        for path in sorted((self.base.path / "vectors").rglob("layer_*.pt")):
            if "unfinished" in path.name or foreign_only and manifest.manifest_path(path).exists():
                continue
            for one in (path, manifest.manifest_path(path)):
                if one.exists():
                    found[str(one.relative_to(self.base.path))] = one.read_bytes()
        return found

    def _fresh(self, request: dict[str, Any], vectors: dict[str, bytes]) -> dict[str, Any]:
        """What the request gives in a base dir that holds its inputs and nothing else."""
        inputs = [path for top in ("models", "data", "hparams") for path in sorted((self.base.path / top).rglob("*")) if path.is_file()]
        read = {name: manifest.digest(data) for name, data in vectors.items()}
        given = {str(path.relative_to(self.base.path)): manifest.file_hash(path) for path in inputs}
        key = json.dumps([{k: v for k, v in request.items() if k != "force"}, given, read], sort_keys=True)
        if key not in self.worlds["fresh"]:
            with tempfile.TemporaryDirectory(prefix="spilt-fresh-") as folder:
                base = Path(folder)
                for top in ("models", "data", "hparams"):
                    shutil.copytree(self.base.path / top, base / top)
                for name, data in vectors.items():
                    (base / name).parent.mkdir(parents=True, exist_ok=True)
                    (base / name).write_bytes(data)
                code, said = run(words(base, request))
                fits = request["mode"] in ("generate", "both")
                made = {name: data for name, data in results(base).items() if fits or name not in vectors}
                self.worlds["fresh"][key] = {"code": code, "said": said, "results": made}
        return dict(self.worlds["fresh"][key])


def test_what_is_called_done_is_what_a_fresh_base_dir_gives(worlds: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    # pictures and page are rebuilt from the tables at every run, and cost a hundred times the work of this model
    monkeypatch.setattr(report, "update", lambda base_dir, *_, **__: Path(base_dir))
    monkeypatch.setattr(Runs, "worlds", worlds)
    run_state_machine_as_test(
        Runs,
        settings=settings(
            max_examples=SEQUENCES,
            stateful_step_count=STEPS + 1,  # the initialisation counts
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            derandomize=SEQUENCES <= 200,
            print_blob=True,
        ),
    )
    counts = worlds["counts"]  # exit code -> runs: the sequences must not be refused all the time
    print(f"{SEQUENCES} sequences: runs by exit code {counts}, {len(worlds['fresh'])} different requests and inputs")
    assert counts.get(0, 0) > SEQUENCES / 2  # hypothesis draws constants from spilt's source, so four sequences change with it
