"""spilt tasks: the command line, SIGKILL and again, and a task that is learned: ListOps with other labels, on a model trained here."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

import forked
import listops_world as world
import pandas as pd
import pytest
import torch

from spilt import cli
from spilt.downstream import answering, load, table, work
from spilt.downstream.places import Place, runs, summaries
from spilt.downstream.words import PARTS, PROJECTIONS, TrainSettings, Variant, acting
from spilt.engine import whole
from spilt.errors import UserError
from spilt.model import host as hosts
from spilt.steering import joint
from spilt.steering.steering import Steering

ROOT = Path(__file__).resolve().parents[1]
Said = pytest.CaptureFixture[str]


def words(base: Path, verb: str, *more: str, task: str = "new") -> list[str]:
    own = ["--dataset-name", task, "--data", str(base / task), "--extractor", "tag", "--max-new-tokens", "6", "--max-length", "64"]
    return ["tasks", verb, "--model-name", "tiny", "--base_dir", str(base), *own, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base_dir with an untrained model and the new task, 48 and 24 rows."""
    base = world.write_untrained(tmp_path_factory.mktemp("small"))
    world.write_task(base / "new", 1, train=48, test=24)
    return base


def test_train_evaluate_table(small: Path, capsys: Said) -> None:
    """Several variants and ranks in one command; the base beside them; the table of all, in every format."""
    quick = ["--lr", "1e-2", "--bs", "4", "--quiet"]
    trained = words(small, "train", "--variant", "post_block", "loreft", "--adapter-rank", "1", "2", *quick, "--do-eval", "--json")
    assert cli.main(trained) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["train"] for run in told["runs"]] == ["done"] * 4 and {"validation", "test"} <= told["runs"][0].keys()
    assert cli.main(trained) == 0
    assert [run["train"] for run in json.loads(capsys.readouterr().out)["runs"]] == ["already done"] * 4
    assert cli.main(words(small, "evaluate", "--variant", "base", "--split", "test", "validation")) == 0
    assert cli.main(words(small, "train", "--variant", "vector", *quick)) == 0
    assert cli.main(words(small, "evaluate", "--no-adapter", *quick)) == 0
    said = capsys.readouterr().out
    assert "new test vector_block: 0." in said and "192 learned (0.1522%)" in said
    assert cli.main(["tasks", "table", "--base_dir", str(small)]) == 0
    said = capsys.readouterr().out
    assert said.startswith("## new, tiny, test\n") and "| variant | accuracy | n | learned | of the model | less base |" in said
    assert "McNemar's exact test, Holm over 15 pairs." in said and said.count("\n| post_block_block_silu_r2 |") >= 1
    assert cli.main(["tasks", "table", "--base_dir", str(small), "--output", str(small / "out"), "--dataset-name", "NEW", "new"]) == 2
    assert cli.main(["tasks", "table", "--base_dir", str(small), "--output", str(small / "out"), "--dataset-name", "new"]) == 0
    found = pd.read_csv(small / "out" / "tasks_accuracy.csv")
    assert len(found) == 6 and found["variant"][0] == "base" and found["n"].eq(24).all()
    assert "\\begin{tabular}" in (small / "out" / "tasks.tex").read_text() and "<table" in (small / "out" / "tasks.html").read_text()
    assert len(pd.read_csv(small / "out" / "tasks_pairs.csv")) == 15


@pytest.mark.few(1)
@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.long
def test_both_parts_of_joint_and_their_sum(projection: str, small: Path, capsys: Said) -> None:
    """Each is evaluated under its own name, with the numbers that are its own, as the Steering of that part alone answers."""
    shape = ["--variant", "joint", "--projection", projection, "--adapter-rank", "2", "--lora-rank", "3", "--lr", "3e-2", "--bs", "4"]
    assert cli.main(words(small, "train", *shape)) == 0
    capsys.readouterr()
    assert cli.main(words(small, "evaluate", *shape, "--part", *PARTS, "--json")) == 0
    found = {run["test"]["part"]: run["test"] for run in json.loads(capsys.readouterr().out)["runs"]}
    lora, adapter = 3 * 3 * (4 * (64 + 64) + 3 * (64 + 128)), 3 * 2 * 64 * 2  # of 3 layers: 7 maps of rank 3, adapters of rank 2
    assert {part: one["parameters"] for part, one in found.items()} == dict(zip(PARTS, (lora + adapter, lora, adapter), strict=True))
    (path,) = small.glob(f"tasks/new/tiny/joint_silu_r2_lora3_{projection}/*/steering.safetensors")
    host, stored = hosts.load(small / "models" / "tiny", "float32", "cpu", ""), Steering.load(path)
    rows = [json.loads(text) for text in (small / "new" / "test.jsonl").read_text().splitlines()]
    for part in PARTS:
        with whole.steer(host.model, joint.part(stored, part), 1.0):
            for row, told in zip(rows[:6], path.with_name(f"test{acting(1.0, part)}.json").read_text().splitlines(), strict=False):
                ids = torch.tensor([host.tokenizer(row["prompt"])["input_ids"]])
                made = host.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
                assert json.loads(told)["output"] == host.tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True)
    assert cli.main(words(small, "evaluate", *shape, "--multiplier", "0.5")) == 0
    name = f"joint_silu_r2_lora3_{projection}"
    assert f"new test {name}_m0.5: 0." in capsys.readouterr().out
    assert cli.main(["tasks", "table", "--base_dir", str(small)]) == 0
    said = capsys.readouterr().out
    assert all(f"| {name}{end} |" in said for end in ("", "_m0.5", "_lora_only", "_adapter_only"))
    assert cli.main(words(small, "evaluate", "--variant", "base", "joint", "--part", "lora_only")) == 2
    assert "--part lora_only is of --variant joint, which has two; base is one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--variant", "base"], "learns nothing"),
        (["--no-adapter", "--variant", "lora"], "--no-adapter contradicts"),
        (["--linear", "--nonlinearity", "relu"], "--linear contradicts"),
        (["--variant", "lora", "--linear"], "nonlinearity mean nothing to it"),
        (["--test-only"], "give --do-eval too"),
        (["--layers", "7"], "layer 7 does not exist"),
        (["--lr", "0"], "--lr 0"),
        (["--limit", "0"], "--limit 0: wanted 1 or more"),
        (["--limit", "4"], "4 rows are 1 optimizer step, and the first is at rate 0"),
        (["--model-name", "none"], "none"),
        (["--max-length", "2"], "no training row fits"),
        (["--extractor", "letter"], "is no letter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_message(small: Path, more: list[str], match: str, capsys: Said) -> None:
    before = sorted(small.rglob("*"))
    assert cli.main(words(small, "train", *more)) == 2
    said = capsys.readouterr().err
    assert match in said and "Traceback" not in said and sorted(small.rglob("*")) == before


def test_what_is_learned_anew_takes_no_result_of_before(tmp_path: Path, capsys: Said, caplog: pytest.LogCaptureFixture) -> None:
    """The same folder, learned behind another prompt: neither the summary nor the table has the accuracy of what lay there before."""
    base = world.write_untrained(tmp_path)
    world.write_task(base / "new", 1, train=16, test=6)
    quick = ["--variant", "vector", "--lr", "1e-2", "--bs", "4", "--quiet"]
    assert cli.main(words(base, "train", *quick, "--do-eval", "--test-only")) == 0
    (place,) = runs(base)
    assert summaries(place).keys() == {"test"} and table.read(place, "test") is not None
    earlier = place.summary.read_bytes()
    other = [*quick, "--system-prompt", "Say less."]
    assert cli.main(words(base, "train", *other)) == 0
    assert summaries(place) == {} and "test left out: of what was learned before" in caplog.text
    assert cli.main(["tasks", "table", "--base_dir", str(base)]) == 2
    place.summary.write_bytes(earlier)  # as a kill between the two leaves it
    capsys.readouterr()
    assert cli.main(["tasks", "table", "--base_dir", str(base)]) == 2
    assert "is of what was learned there before" in capsys.readouterr().err
    assert cli.main(words(base, "evaluate", *other)) == 0 and "was learned with" not in caplog.text
    (base / "new" / "train.jsonl").write_text("".join((base / "new" / "train.jsonl").read_text().splitlines(True)[4:]))
    assert cli.main(words(base, "evaluate", *quick)) == 0  # other data, no system prompt: told
    assert 'was learned with another data, system_prompt "Say less." (now "")' in caplog.text


def test_runs_that_were_asked_otherwise_are_told(small: Path, capsys: Said) -> None:
    """Paired with a base model that could say one token."""
    quick = ["--variant", "vector", "--lr", "2e-2", "--bs", "4", "--quiet", "--do-eval", "--test-only"]
    assert cli.main(words(small, "train", *quick)) == 0
    assert cli.main(words(small, "evaluate", "--variant", "base", "--max-new-tokens", "1")) == 0
    capsys.readouterr()
    assert cli.main(["tasks", "table", "--base_dir", str(small)]) == 0
    assert "Not asked alike: base with max_new_tokens 1 (vector_block" in capsys.readouterr().out
    assert cli.main(words(small, "evaluate", "--variant", "base")) == 0
    capsys.readouterr()
    assert cli.main(["tasks", "table", "--base_dir", str(small)]) == 0
    assert "Not asked alike" not in capsys.readouterr().out


def test_nothing_evaluated_is_no_table(tmp_path: Path, capsys: Said) -> None:
    assert cli.main(["tasks", "table", "--base_dir", str(tmp_path)]) == 2
    assert "nothing was evaluated on test" in capsys.readouterr().err


def test_mcnemar_is_the_binomial_test_on_what_differs() -> None:
    one, other = [True] * 9 + [False] * 11, [False] * 8 + [True] + [True] * 2 + [False] * 9
    assert table.mcnemar(one, other) == pytest.approx(2 * sum(pd.Series([1, 10, 45])) / 2**10)  # 8 against 2 of 10
    assert table.mcnemar(one, one) == 1.0


@pytest.mark.long
@pytest.mark.parametrize(("verb", "kind"), [("train", "post_block"), ("evaluate", "post_block"), ("train", "joint")])
def test_killed_and_started_again_it_gives_the_same_bytes(verb: str, kind: str, tmp_path: Path) -> None:
    """SIGKILL of the really started command, in the middle of training and of answering."""
    base = world.write_untrained(tmp_path)
    world.write_task(base / "new", 1, train=200, test=150)
    shape = ["--variant", kind, "--bs", "2", "--lr", "1e-2", "--quiet", "--engine", "plain", "--batch-size", "4"]
    request = work.Request(load.source("new", str(base / "new"), extract="tag"), "tiny", Variant(kind), TrainSettings(lr=1e-2, bs=2), base)
    here = request.place
    train = words(base, "train", *shape, "--checkpoint-seconds", "0")
    started = train if verb == "train" else words(base, "evaluate", *shape)
    if verb == "evaluate":
        assert cli.main(train) == 0
    cut = here.unfinished if verb == "train" else here.outputs("test")
    wanted = [here.steering, here.log] if verb == "train" else [here.results("test"), here.summary]
    run = forked.Run(["-m", "spilt", *started])
    while run.poll() is None and not (cut.exists() and cut.stat().st_size > 100):
        time.sleep(0.01)
    run.kill()
    assert run.wait() == -signal.SIGKILL and cut.exists() and not wanted[0].exists()
    begun = cut.read_bytes()
    assert cli.main(started) == 0 and not cut.exists()
    found = [path.read_bytes() for path in wanted]
    for path in here.folder.iterdir():
        if verb == "train" or path.name.startswith(("test", "summary")):
            path.unlink()
    assert len(begun) > 100 and cli.main(started) == 0
    assert [path.read_bytes() for path in wanted] == found


# ---------------------------------------------------------------- a task that is learned

QUICK = ["--lr", "1e-2", "--bs", "16", "--grad-accum", "1", "--epochs", "2", "--quiet"]
BOUNDS: dict[str, Callable[[float], bool]] = {
    "base": lambda accuracy: accuracy <= 0.02,
    "post_block_block_silu_r8": lambda accuracy: accuracy >= 0.99,
    "post_block_block_linear_r8": lambda accuracy: accuracy >= 0.98,
    "post_block_block_silu_r1": lambda accuracy: 0.03 <= accuracy <= 0.9,  # 28 runs: .07 to .76 (benchmarks/RESULTS.md)
    "vector_block": lambda accuracy: accuracy <= 0.2,
}


@pytest.mark.long
@pytest.mark.slow
def test_the_relabelled_listops(tmp_path: Path) -> None:
    """Every answer of the base model is wrong; rank 8 after every block sets that right, a vector does not; without it the base is back."""
    base = world.write_world(tmp_path / "base", 0)  # with the base model, whose pretraining is most of the time
    fits = [*QUICK, "--seed", "0"]
    assert cli.main(words(base, "evaluate", "--variant", "base")) == 0
    fitted = words(base, "train", *fits, "--do-eval", "--test-only")
    assert cli.main([*fitted, "--variant", "post_block", "vector", "--adapter-rank", "8", "1"]) == 0
    assert cli.main([*fitted, "--linear"]) == 0
    places = [place for place in runs(base) if place.folder.parents[2].name == "new"]
    found = {place.folder.parent.name: summaries(place)["test"] for place in places}
    print({name: one["accuracy"] for name, one in found.items()})
    assert [name for name, one in found.items() if not BOUNDS[name](one["accuracy"])] == []
    assert found.keys() == BOUNDS.keys()
    assert all(one["seen_in_train"] == 0 and one["no_answer"] == 0 for one in found.values())
    assert found["post_block_block_silu_r8"]["accuracy"] - found["vector_block"]["accuracy"] >= 0.6
    # off: the base model to the bit, and its old task
    host = hosts.load(base / "models" / "tiny", "float32", "cpu", "")
    source = load.source("old", str(base / "old"), extract="tag", max_new_tokens=6, max_length=64)
    request = work.Request(source, "tiny", Variant("base"), TrainSettings(), base)
    ids = torch.tensor([host.tokenizer("Expression: [MAX 1 2 ]")["input_ids"]])
    plain = host.model(input_ids=ids).logits
    (path,) = base.glob("tasks/new/tiny/post_block_block_silu_r8/*/steering.safetensors")
    with whole.steer(host.model, Steering.load(path), 1.0):
        assert (host.model(input_ids=ids).logits - plain).abs().max() > 0.1
    assert torch.equal(host.model(input_ids=ids).logits, plain)
    assert answering.evaluate(request, host, "test")["accuracy"] >= 0.98
    # loaded again by the plain engine, in rows: the same answers
    results = path.with_name("test.json")
    before = results.read_bytes()
    assert cli.main(words(base, "evaluate", *fits, "--engine", "plain", "--force")) == 0
    assert results.read_bytes() == before
    assert cli.main(words(base, "evaluate", *fits, "--multiplier", "0")) == 0
    assert summaries(Place(path.parent))["test_m0"]["accuracy"] <= 0.02


def test_a_wrong_summary_is_told(small: Path, tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.summary.write_text("[1]")
    with pytest.raises(UserError, match="is no summary"):
        summaries(place)
    assert summaries(Place(tmp_path / "none")) == {}
