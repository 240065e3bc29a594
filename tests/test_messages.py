"""A failing cell is a line in the table and one message; the others go on, and nothing of it is stored."""

from __future__ import annotations

import io
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from faults import FIT, Here, fresh, no_report, outcomes
from safetensors.torch import load_file, save_file

from spilt import cli
from spilt import run as runner
from spilt.artifacts import manifest
from spilt.artifacts.journal import Journal
from spilt.engine import train as training
from spilt.methods import METHODS
from spilt.steering.interventions import INTERVENTIONS
from spilt.tasks import fit as _fit  # noqa: F401 - loads the module

ROOT = Path(__file__).resolve().parents[1]
fit_stage = sys.modules["spilt.tasks.fit"]


def error_lines(said: str) -> list[str]:
    return [line for line in said.splitlines() if line.startswith("error: ")]


# ---------------------------------------------------------------- a damaged checkpoint


@pytest.fixture(scope="module")
def checkpoint(prepared: families.Base, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The state in the middle of a fit, and the vector that the whole fit gives."""
    base = families.make_base(tmp_path_factory.mktemp("kept") / "base", train=24)
    path = base.path / "vectors/tiny/sft/mine/sft_vector/layer_2.unfinished.pt"
    seen: list[bytes] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_report", no_report)
        real = fit_stage.atomic_write
        patch.setattr(fit_stage, "atomic_write", lambda to, data: (seen.append(data) if to == path else None, real(to, data))[1])
        assert cli.main([*base.argv("sft", "vector", *FIT, "--checkpoint_seconds", "0"), "--quiet"]) == 0
    assert len(seen) >= 2
    return {"state": seen[0], "vector": path.with_name("layer_2.pt").read_bytes()}


@pytest.fixture
def cut_off(tmp_path: Path, checkpoint: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Here:
    """A base folder in which that fit was killed."""
    base = families.make_base(tmp_path / "base", train=24)
    monkeypatch.setattr(runner, "_report", no_report)
    here = Here(base, capsys)
    here.vector().parent.mkdir(parents=True)
    here.vector().with_name("layer_2.unfinished.pt").write_bytes(checkpoint["state"])
    return here


def steps_run(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many minibatches are fitted from now on: fewer when the fit goes on."""
    seen: list[int] = []
    real = training.Fit.gradients
    monkeypatch.setattr(training.Fit, "gradients", lambda *a: (seen.append(1), real(*a))[1])
    return seen


@pytest.mark.long
def test_a_sound_checkpoint_is_gone_on_from(
    cut_off: Here, checkpoint: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = steps_run(monkeypatch)
    assert cut_off.run(*FIT, "--force")[0] == 0
    everything = len(whole)
    cut_off.vector().unlink()
    cut_off.vector().with_name("layer_2.unfinished.pt").write_bytes(checkpoint["state"])
    whole.clear()
    assert cut_off.run(*FIT)[0] == 0 and 0 < len(whole) < everything
    assert cut_off.vector().read_bytes() == checkpoint["vector"] and "begins again" not in caplog.text


@pytest.mark.long
def test_any_damage_of_a_checkpoint_begins_again(
    cut_off: Here, checkpoint: dict[str, bytes], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 kinds at random: bits, cuts, additions, other contents with the right identity. Always the bytes of an undamaged run."""
    rng, path = random.Random(0), cut_off.vector().with_name("layer_2.unfinished.pt")
    good = checkpoint["state"]
    state = torch.load(io.BytesIO(good[:-32]), weights_only=True)

    def resaved(**changes: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save({k: v for k, v in {**state, **changes}.items() if v is not None}, buffer)
        return buffer.getvalue()

    damages: list[bytes] = [b"", b"hello", b"\x00" * 40, good[:-1], good[:-32], good + b"x", good[: len(good) // 2], good[-32:]]
    damages += [resaved(), resaved(optimizer=None), resaved(intervention={"v": torch.zeros(3)}), resaved(log=None) + bytes(32)]
    for _ in range(18):
        flipped = bytearray(good)
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        damages.append(bytes(flipped))
    # all the rest of the machinery is the same for each: the vector itself is fitted for some of them
    identity = state["identity"]
    for damage in damages:
        caplog.clear()
        path.write_bytes(damage)
        assert fit_stage.unsealed(path, identity) is None
        assert "the fit begins again" in caplog.text and "weights_only" not in caplog.text
    for damage in rng.sample(damages, 5):
        cut_off.vector().unlink(missing_ok=True)
        path.write_bytes(damage)
        code, said = cut_off.run(*FIT)
        assert code == 0 and "Traceback" not in said
        assert cut_off.vector().read_bytes() == checkpoint["vector"] and not path.exists()
    path.write_bytes(good)
    assert fit_stage.unsealed(path, identity) is not None


def test_a_checkpoint_that_is_no_file(cut_off: Here, checkpoint: dict[str, bytes], caplog: pytest.LogCaptureFixture) -> None:
    path = cut_off.vector().with_name("layer_2.unfinished.pt")
    path.unlink()
    path.symlink_to("/dev/zero")
    assert cut_off.run(*FIT)[0] == 0 and "no plain file" in caplog.text
    assert cut_off.vector().read_bytes() == checkpoint["vector"]


# ---------------------------------------------------------------- numbers that are none


def broken_model(base: families.Base, value: float) -> None:
    """The model's head holds `value` at one place: scores are NaN or infinite."""
    path = base.path / "models/tiny/model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "norm" in name and "layers" not in name)
    weights[name] = weights[name].clone()
    weights[name][0] = value
    save_file(weights, path, metadata={"format": "pt"})


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.few(1)
def test_a_model_of_nan_fails_by_name(here: Here, value: float) -> None:
    for path in (*here.path("generation").rglob("*.json"), *here.path("vectors/tiny/get_sft_loss").rglob("*.csv")):
        path.unlink()
    broken_model(here.base, value)
    for words in (("--mode", "apply", "--multipliers", "0", "1"), ("--mode", "loss", "--multipliers", "0", "1")):
        code, said = here.run(*words)
        assert code == 1 and "Traceback" not in said, said
        (line,) = error_lines(said)
        assert "NaN or infinite" in line and "--dtype" in line and "1 failed" in said
    assert not list(here.path("generation").rglob("*.json")) and not list(here.path("vectors/tiny/get_sft_loss").rglob("*.csv"))
    code, said = here.run("--mode", "generate", "--force")
    assert code == 1 and "Traceback" not in said and "--dtype" in error_lines(said)[0]
    assert here.run("--mode", "generate", "--force", method="caa")[0] in (0, 1)  # its blocks are sound: the last norm is behind them


@pytest.mark.long
def test_losses_that_overflow_at_one_multiplier(here: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sound multipliers are stored, the other is named; the command and --verify agree that nothing is damaged."""
    assert here.run("--mode", "loss", "--multipliers", "3", "1e6", "--dtype", "float16")[0] in (0, 1)
    state = torch.load(here.vector(), weights_only=True)
    torch.save(state * 3e4, here.vector())  # a strong one, made elsewhere
    manifest.manifest_path(here.vector()).unlink()
    code, said = here.run("--mode", "loss", "--multipliers", "0.001", "1e6", "--dtype", "float16")
    assert code == 1, said
    (line,) = error_lines(said)
    assert "m = -1e+06, 1e+06" in line and "smaller multipliers or another --dtype" in line
    assert here.losses(0.001).exists() and not here.losses(1e6).exists()
    assert here.states()[str(here.losses(0.001).relative_to(here.base.path))] == "ok"
    code, said = here.run("--mode", "apply", "--multipliers", "1e6", "--dtype", "float16")
    assert code == 1 and "smaller multiplier" in error_lines(said)[0] and not here.texts(1e6).exists()


def test_a_vector_of_nan_is_never_used(here: Here) -> None:
    torch.save(torch.full((32,), float("nan")), here.vector())
    manifest.manifest_path(here.vector()).unlink()
    before = here.listing()
    for words in (("--mode", "apply", "--multipliers", "5"), ("--mode", "loss", "--multipliers", "5")):
        code, said = here.run(*words)
        assert code in (1, 2) and "holds NaN or infinite values" in error_lines(said)[0] and "Traceback" not in said
    assert here.listing() == before
    assert here.states()["vectors/tiny/sft/mine/sft_vector/layer_2.pt"] == "damaged"


def test_a_fit_that_gives_nan_stores_nothing(bare: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    infinite = METHODS["caa"]._replace(estimate=lambda a, b: torch.full_like(a[0], float("inf")))
    monkeypatch.setitem(METHODS, "caa", infinite)
    code, said = bare.run(*FIT, method="caa")
    assert code == 1 and "NaN or infinite values; use another --dtype" in error_lines(said)[0]
    assert not list(bare.base.path.rglob("layer_2.pt"))


# ---------------------------------------------------------------- one cell's error


@pytest.mark.parametrize("error", [ValueError("odd"), KeyError("k"), RuntimeError("no memory matter"), ZeroDivisionError("z")])
@pytest.mark.few(1)
def test_an_error_in_one_fit_is_its_own(bare: Here, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    real = training.Fit.gradients

    def gradients(self: Any, *args: Any) -> Any:
        if isinstance(self.intervention, INTERVENTIONS["lora"]):
            raise error
        return real(self, *args)

    monkeypatch.setattr(training.Fit, "gradients", gradients)
    code, said = bare.run(*FIT, form="all")
    assert code == 1 and "2 done, 1 failed" in said, said
    assert bare.vector("vector").exists() and bare.vector("local_weight").exists() and not bare.vector("lora").exists()
    assert [line for line in said.splitlines() if "failed" in line and "lora" in line and type(error).__name__ in line]


# ---------------------------------------------------------------- the environment


LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture
def with_environment(here: Here, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], tuple[int, str]]:
    """A fit under these variables: exit code and everything said."""

    def run(values: dict[str, str]) -> tuple[int, str]:
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)
        return here.run(*FIT, method="caa")

    return run


@pytest.mark.parametrize("values", [{"RANK": "1"}, {"RANK": "3", "WORLD_SIZE": "1"}, {"WORLD_SIZE": "", "RANK": ""}])
def test_a_rank_without_a_launcher_is_one_process(with_environment: Any, values: dict[str, str]) -> None:
    code, said = with_environment(values)
    assert code == 0 and "1 done" in said and "layer_2.pt" in said, said


@pytest.mark.long
def test_a_really_started_process_with_a_rank_and_without_a_launcher(here: Here) -> None:
    env = {k: v for k, v in os.environ.items() if k not in LAUNCHERS}
    words = [sys.executable, str(ROOT / "run_spilt.py"), *here.base.argv("caa", "vector", *FIT), "--quiet"]
    env |= {"OMP_NUM_THREADS": "1", "RANK": "3", "WORLD_SIZE": "1"}
    ended = subprocess.run(words, env=env, cwd=ROOT, text=True, capture_output=True, timeout=200, check=False)
    assert ended.returncode == 0 and "1 done" in ended.stdout and "layer_2.pt" in ended.stdout, ended


@pytest.mark.parametrize(
    "values, word",
    [
        ({"RANK": "one"}, "RANK='one'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2'"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2"}, "without RANK and LOCAL_RANK and MASTER_ADDR and MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK=2 with WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "without LOCAL_RANK"),
        ({"WORLD_SIZE": "2.5"}, "WORLD_SIZE='2.5'"),
    ],
)
def test_odd_values_are_one_message(with_environment: Any, values: dict[str, str], word: str) -> None:
    code, said = with_environment(values)
    assert code == 2 and word in said and "unset RANK WORLD_SIZE" in said, said
    assert len(error_lines(said)) == 1 and "Traceback" not in said


# ---------------------------------------------------------------- links


def test_unfinished_lines_are_not_followed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text('["theirs"]\n')
    link = tmp_path / "here" / "unfinished_0.jsonl"
    link.parent.mkdir()
    link.symlink_to(outside)
    lines = Journal(link)
    assert list(lines.whole()) == [] and "its lines are not used" in caplog.text
    lines.append([["ours"]])
    lines.close()
    assert outside.read_text() == '["theirs"]\n' and "not written to" in caplog.text
    assert not link.is_symlink() and list(lines.whole()) == [["ours"]]
    lines.remove()
    assert outside.exists() and not link.exists()


def test_a_run_does_not_write_through_a_link(here: Here, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Texts, losses, and the other files beside them: each is replaced, what the link points to stays."""
    outside = tmp_path / "outside"
    outside.write_text("mine")
    places = [
        here.texts(7.0).parents[1] / "unfinished_0.jsonl",
        here.losses(7.0).parents[1] / "unfinished_0.jsonl",
        here.losses(7.0),
        here.losses(7.0).with_name("train.log"),
        here.texts(7.0),
        here.vector().with_name("train.log"),
        here.vector().with_name("layer_2.unfinished.pt"),
        manifest.manifest_path(here.texts(7.0)),
    ]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.unlink(missing_ok=True)
        place.symlink_to(outside)
    assert here.run(*FIT, "--force", "--checkpoint_seconds", "0")[0] == 0
    for mode in ("apply", "loss"):
        code, said = here.run("--mode", mode, "--multipliers", "7", "--checkpoint_seconds", "0")
        assert code == 0, said
    assert outside.read_text() == "mine" and not [place for place in places if place.is_symlink()]


@pytest.fixture(autouse=True)
def forget() -> Iterator[None]:
    yield
    fresh()


def test_the_table_has_a_line_for_each(bare: Here, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that nobody foresaw in the report too: table and exit code are there."""
    from spilt import report

    assert bare.run(*FIT)[0] == 0
    monkeypatch.setattr(runner, "_report", REPORT)

    def odd(*_: Any, **__: Any) -> None:
        raise TypeError("odd")

    monkeypatch.setattr(report, "update", odd)
    code, said = bare.run("--mode", "loss", "--multipliers", "1")
    assert code == 1 and "1 done, 1 failed" in said and "TypeError: odd" in said and outcomes(said)


REPORT = runner._report


@pytest.mark.parametrize("words", [["tasks", "table"], ["report", "--dataset", "one", "--model_name", "tiny"], ["verify"]])
@pytest.mark.parametrize("rank", [0, 1])
def test_other_programs_are_one_process(
    words: list[str], rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two processes would do the same work and write the same files: both end, and the first says why."""
    for name, value in zip(LAUNCHERS, (str(rank), "2", str(rank), "127.0.0.1", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert cli.main([*words, "--base_dir", str(tmp_path)]) == 2
    told = f"error: spilt {words[0]} is one process, and a launcher has started 2; start it without the launcher\n"
    assert capsys.readouterr().err == ("" if rank else told) and not list(tmp_path.iterdir())
