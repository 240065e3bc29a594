"""A post-block adapter through every verb of the command line: fit, texts, losses, control, verdicts, the page, verify, export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import families
import pandas as pd
import pytest
import torch

import spilt
from spilt import cli, verify
from spilt.cell import Cell
from spilt.export import main as export
from spilt.steering.interventions import PostBlock
from spilt.tasks import control

HOW = ("lr=0.05", "n_epochs=2", "rank=3", "nonlinearity=gelu")


def words(base: families.Base, method: str, *more: str, sets: tuple[str, ...] = HOW) -> list[str]:
    return [*base.argv(method, "post_block", "--layers", "1+3", "--quiet"), *(word for key in sets for word in ("--set", key)), *more]


@pytest.mark.long
def test_post_block_runs_through_everything(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """sft, spilt and reps: curves of preference and utility, a recommended strength, and exports of what is exact."""
    monkeypatch.setattr(control, "DRAWS", 4)
    base = families.make_base(tmp_path / "base", train=4)
    for method in ("sft", "spilt", "reps"):
        assert cli.main(words(base, method, "--mode", "both", "--dry_run")) == 0
        said = capsys.readouterr().out
        assert f"{method} post_block has no settings of its own" in said and "several layers are fitted jointly" in said
        few = ["--no-released_files", *(["--control_pairs", "0", "--no_report"] if method != "sft" else [])]
        for mode in (["both", "--multipliers", "-1", "1"], ["loss", "--multipliers", "sweep", *few]):
            assert cli.main(words(base, method, "--mode", *mode)) == 0
        cell = Cell(base.model, base.one, method, "post_block", (1, 3), apart=True)
        folder = base.path / "vectors" / base.model / method / base.one / cell.leaf
        stored = spilt.Steering.load(folder)
        made = stored.entries[0][1]
        assert stored.layers == (1, 3) and isinstance(made, PostBlock) and made.options() == {"alpha": 1.0, "nonlinearity": "gelu"}
        (losses,) = base.path.glob(f"vectors/*/get_sft_loss/{method}/*/{cell.leaf}/losses_train.csv")
        table = pd.read_csv(losses)
        assert table.groupby("multiplier")["answer_loss_sum"].mean().nunique() > 10
        drawn = {name: (losses.parent / name).is_file() for name in ("preference_utility.csv", "curves.png", "control.csv")}
        assert set(drawn.values()) == {method == "sft"}
        assert cli.main(words(base, method, "--mode", "both", "--multipliers", "-1", "1")) == 0  # already done
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    (page,) = base.path.glob("vectors/*/get_sft_loss/report/*/report.html")
    assert "post-block" in page.read_text()
    capsys.readouterr()
    at = [*base.argv("sft", "post_block")[:8], "--base_dir", str(base.path), "--layers", "1+3", "--multiplier", "1"]
    for kind in ("safetensors", "released"):
        assert export([*at, "--format", kind, "--output", str(tmp_path / kind)]) == 0, capsys.readouterr()
    for kind in ("peft", "merged", "gguf", "vllm", "vllm-hook"):
        assert export([*at, "--format", kind, "--output", str(tmp_path / kind)]) == 2
        assert "is not linear (gelu), and weights are; --format safetensors" in capsys.readouterr().err
        assert not (tmp_path / kind).exists()


@pytest.mark.long
@pytest.mark.parametrize("scope", ("last", "last_cached"))
def test_a_scope_on_the_command_line(scope: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fitted, applied and measured with the last token steered, and stored so: the file says it."""
    base = families.make_base(tmp_path / "base", train=4)
    sets = (*HOW, f"steer_positions={scope}")
    assert cli.main(words(base, "sft", "--mode", "both", "--dry_run", sets=sets)) == 0
    assert ("steer_positions = last: each logit" if scope == "last" else "several layers are fitted jointly") in capsys.readouterr().out
    for mode in ("both", "loss"):
        assert cli.main(words(base, "sft", "--mode", mode, "--no-released_files", "--multipliers", "1", sets=sets)) == 0
    (path,) = base.path.glob("vectors/*/sft/*/*/layer_3.pt")
    assert spilt.Steering.load(path).scope == scope and spilt.Steering.load(path.parent).scope == scope
    assert {found.state for found in verify.check(base.path)} == {verify.OK}


def test_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = families.make_base(tmp_path / "base", train=4)
    for argv, said in (
        (words(base, "sft", "--mode", "generate", sets=("nonlinearity=cube",)), "unknown nonlinearity 'cube'"),
        (words(base, "caa", "--mode", "generate", sets=()), "caa"),
        ([*base.argv("sft", "lora"), "--set", "nonlinearity=relu", "--mode", "generate"], "nonlinearity = relu is of post_block"),
        ([*base.argv("sft", "lora"), "--set", "site=attn", "--mode", "generate"], "comes after what is written at 'attn'"),
    ):
        assert cli.main(argv) == 2
        assert said in capsys.readouterr().err


@pytest.mark.long
def test_a_killed_fit_goes_on_to_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped after two steps with its state stored, the fit of several layers ends as one that was never stopped."""
    from spilt.engine import train

    base = families.make_base(tmp_path / "base", train=8)
    argv = words(base, "sft", "--mode", "generate", "--checkpoint_seconds", "0", sets=(*HOW, "steer_positions=last"))
    assert cli.main(argv) == 0
    folder = next(base.path.glob("vectors/*/sft/*/*/layer_3.pt")).parent
    wanted = {path.name: path.read_bytes() for path in folder.glob("layer_*.pt")}
    for path in folder.iterdir():
        path.unlink()
    steps, own = [], torch.optim.AdamW.step

    def dies(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.append(1)
        if len(steps) == 3:
            raise KeyboardInterrupt
        return own(self, *args, **kwargs)

    monkeypatch.setattr(train.torch.optim.AdamW, "step", dies)
    assert cli.main(argv) not in (0, 1, 2)
    monkeypatch.undo()
    assert list(folder.glob("*unfinished*")) or list(folder.glob(".*"))
    assert cli.main(argv) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("layer_*.pt")} == wanted
