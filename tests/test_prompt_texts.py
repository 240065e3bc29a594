"""Texts behind prompts (`--prompt_baseline` of apply and evaluate): made as plain transformers makes them, scored as slow ways score them,
beside the methods in `spilt table`; another prompt under the same name is made anew, a kill loses nothing."""

from __future__ import annotations

import io
import json
import shutil
import signal
from pathlib import Path
from typing import Any

import families
import forked
import numpy as np
import pandas as pd
import pytest
import torch
from test_evaluate import yes_no

import spilt
from spilt import cli, verify
from spilt.analysis import scores
from spilt.artifacts import manifest
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.data import prompt_baseline
from spilt.data.chat import Chat
from spilt.errors import UserError
from spilt.report import comparison

EXAMPLES = [{"question": "where to", "answer": "home"}, {"question": "and then", "answer": "away"}]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    """Losses and texts of two methods, and texts behind two prompts, all scored."""
    base = families.make_base(tmp_path_factory.mktemp("behind") / "base", train=4)
    yes_no(base, 6)
    (base.path / "kind.txt").write_text("be the matching one\n")
    (base.path / "shots.jsonl").write_text("".join(json.dumps(row) + "\n" for row in EXAMPLES))
    words = [*base.argv(), "--method", "sft", "caa", "--quiet"]
    assert cli.main([*words, "--mode", "generate"]) == 0
    assert cli.main([*words, "--mode", "loss", "--multipliers", "-4", "4", "--no-released_files", "--no_report"]) == 0
    for mode in ("apply", "evaluate"):
        assert cli.main([*words, "--mode", mode, "--multipliers", "0", "4", *baselines(base)]) == 0
    return base


@pytest.fixture
def base(made: families.Base, tmp_path: Path) -> families.Base:
    shutil.copytree(made.path, tmp_path / "base")
    return made._replace(path=tmp_path / "base")


def baselines(base: families.Base, *names: str) -> list[str]:
    files = {"kind": "kind.txt", "shots": "shots.jsonl"}
    return ["--prompt_baseline", *(f"{name}={base.path / files[name]}" for name in names or files)]


def run(base: families.Base, mode: str, *words: str, code: int = 0) -> None:
    assert cli.main([*base.argv(), "--quiet", "--mode", mode, "--multipliers", "4", *words]) == code


def behind(base: families.Base, name: str) -> Cell:
    return Cell(base.model, base.one, "prompt", name, ())


def texts(base: families.Base, name: str) -> Any:
    return json.loads(Store(base.path).results(behind(base, name), 0.0).read_text())


def table(base: families.Base, name: str) -> pd.DataFrame:
    return scores.read(Store(base.path).scores(behind(base, name), 0.0))


def turns_of(base: families.Base, name: str) -> list[dict[str, str]]:
    """As a chat has them; the tiny template has no system role, so that a system prompt begins the first turn."""
    if name == "kind":
        return []
    return [{"role": role, "content": row[key]} for row in EXAMPLES for role, key in (("user", "question"), ("assistant", "answer"))]


def ids_of(base: families.Base, tokenizer: Any, name: str, question: str) -> list[int]:
    asked = f"be the matching one\n\n{question}" if name == "kind" else question
    text = tokenizer.apply_chat_template(
        [*turns_of(base, name), {"role": "user", "content": asked}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@pytest.mark.parametrize("name", ["kind", "shots"])
@pytest.mark.few(1)
def test_texts_are_those_of_plain_transformers_behind_the_prompt(made: families.Base, name: str) -> None:
    model, tokenizer = spilt.load(made.path / "models" / made.model)
    rows = [json.loads(line) for line in made.data(made.one, "valid").read_text().splitlines()]
    found = texts(made, name)
    assert [row["input"] for row in found] == [row["question"] for row in rows]  # what was asked, without the prompt
    for row in found:
        ids = ids_of(made, tokenizer, name, row["input"])
        with torch.no_grad():
            new = model.generate(torch.tensor([ids]), max_new_tokens=5, do_sample=False, pad_token_id=families.PAD)[0, len(ids) :]
        assert row["pred"] == [tokenizer.decode(new, skip_special_tokens=True)]
        assert row["complete_output"] == [tokenizer.decode([*ids, *new])]
    plain = json.loads(Store(made.path).results(Cell(made.model, made.one, "sft", "vector", (made.layer,)), 0.0).read_text())
    assert [row["pred"] for row in found] != [row["pred"] for row in plain]


@pytest.mark.parametrize("name", ["kind", "shots"])
def test_scores_are_those_of_slow_ways(made: families.Base, name: str) -> None:
    """KL(behind the prompt || without it), perplexity without it, first tokens and neutral text behind it: a token at a time."""
    model, tokenizer = spilt.load(made.path / "models" / made.model)
    chat, found = Chat.of(tokenizer), table(made, name).set_index(["measure", "item"])

    def log_p(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    for i, row in enumerate(texts(made, name)):
        ids, bare = ids_of(made, tokenizer, name, row["input"]), list(chat.prompt_ids(row["input"]))
        kl, loss = [], []
        for token in tokenizer(row["pred"][0], add_special_tokens=False)["input_ids"]:
            p, q = log_p(ids), log_p(bare)
            kl.append(float((p.exp() * (p - q)).sum()))
            loss.append(-q[token].item())
            ids.append(token)
            bare.append(token)
        assert found.loc[("kl_mean", i), "value"] == pytest.approx(np.mean(kl), rel=1e-3) and np.mean(kl) > 0
        assert found.loc[("kl_p95", i), "value"] == pytest.approx(np.quantile(kl, 0.95), rel=1e-3)
        assert found.loc[("perplexity", i), "value"] == pytest.approx(np.exp(np.mean(loss)), rel=1e-3)
    pairs = [json.loads(line) for line in made.data(made.one, "valid").read_text().splitlines()]
    for i, pair in enumerate(pairs[:-1]):  # both answers of the last begin alike
        nats = log_p(ids_of(made, tokenizer, name, pair["question"]))
        first, other = (tokenizer(pair[side], add_special_tokens=False)["input_ids"][0] for side in ("matching", "not_matching"))
        assert found.loc[("log_odds", i), "value"] == pytest.approx(float(nats[first] - nats[other]), abs=1e-4)
    for i, line in enumerate((made.path / "data" / "neutral.jsonl").read_text().splitlines()):
        row, lost = json.loads(line), []
        ids = ids_of(made, tokenizer, name, row["input"])
        for token in tokenizer(row["reference_response"], add_special_tokens=False)["input_ids"]:
            lost.append(-log_p(ids)[token].item())
            ids.append(token)
        assert found.loc[("neutral_loss", i), "value"] == pytest.approx(np.mean(lost), rel=1e-4)


def test_what_is_stored_is_sound_and_a_rerun_has_nothing_to_do(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    before = families.listing(base.path)
    for mode in ("apply", "evaluate"):
        run(base, mode, *baselines(base))
        assert capsys.readouterr().out.count("already done") == 3 + 1  # a method, two prompts, and the line that counts
    assert families.listing(base.path) == before
    record = manifest.read(Store(base.path).results(behind(base, "shots"), 0.0)) or {}
    assert record["parts"]["prompt"][0] == ["user", "where to"] and record["parts"]["vectors"] == []
    assert not {"method", "layers"} & record["parts"]["settings"].keys()  # the same beside whichever method
    run(base, "apply", *baselines(base), "--dry_run")
    said = capsys.readouterr().out
    assert "apply mine prompt kind   [already done]" in said and f"--prompt_baseline kind={base.path / 'kind.txt'}" in said
    assert cli.main(["look", "--base_dir", str(base.path), "--model_name", base.model, "--dataset", base.one]) == 0
    assert "== mine, prompt, kind" in capsys.readouterr().out


@pytest.mark.long
def test_another_prompt_under_the_name_is_made_anew_and_never_mixed(
    base: families.Base, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    words = ["table", "--base_dir", str(base.path), "--tables", "main", "--device", "cpu"]
    assert cli.main([*words, *baselines(base)]) == 0
    old = texts(base, "kind")
    (base.path / "kind.txt").write_text("be something else altogether\n")
    run(base, "evaluate", *baselines(base, "kind"), code=1)  # the method's are there
    said = capsys.readouterr().err
    assert "was made with prompt" in said and "--mode apply" in said
    run(base, "apply", *baselines(base, "kind"))
    assert "replaces generation/tiny/prompt/mine/prompt_kind" in caplog.text and texts(base, "kind") != old
    capsys.readouterr()
    assert cli.main(words) == 0  # scores of the old texts
    said = capsys.readouterr().out
    assert "of other texts than those that lie there now" in said
    run(base, "evaluate", *baselines(base, "kind"))
    capsys.readouterr()
    assert cli.main(words) == 0  # scores of the new prompt, losses of the old one
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("| prompt: kind"))
    assert row.rstrip("| ").endswith("–") and "prompt kind: its scores are of another prompt under that name than its losses" in said
    assert cli.main([*words, *baselines(base, "kind")]) == 0
    said = capsys.readouterr().out
    row = next(line for line in said.splitlines() if line.startswith("| prompt: kind"))
    assert not row.rstrip("| ").endswith("–") and "another prompt" not in said


@pytest.mark.long
def test_the_main_table_has_them_beside_the_methods(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["table", "--base_dir", str(base.path), "--tables", "main"]
    assert cli.main([*words, "--format", "csv"]) == 0
    found = pd.read_csv(io.StringIO(capsys.readouterr().out)).set_index(["method", "intervention", "measure"])
    for name in ("kind", "shots"):
        own = table(base, name).query("measure == 'accuracy'")["value"].mean()
        row = found.loc[("prompt", name, "score: accuracy")]
        assert row["value"] == pytest.approx(own) and row["low"] <= row["value"] <= row["high"]
    assert ("prompt", "kind", "utility drop, nats") not in found.index  # no losses were measured behind it
    # made with other settings: not shown, and why
    run(base, "apply", *baselines(base, "kind"), "--set", "generation_params.max_new_tokens=3")
    run(base, "evaluate", *baselines(base, "kind"))
    capsys.readouterr()
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert "| prompt: shots" in said and "| prompt: kind" not in said
    assert "Not shown, since of texts that were made or scored otherwise" in said and "prompt kind (max_new_tokens 3 (there 5))" in said


# words of apply, of evaluate; what is said of it
CHANGED: list[tuple[list[str], list[str], str]] = [
    (["--set", "generation_params.max_new_tokens=3"], [], "max_new_tokens 3 (there 5)"),
    (["--limit", "2"], [], "limit 2 (there null)"),
    ([], ["--limit", "2"], "evaluate --limit 2 (there null)"),
    (["--set", "generation_params.do_sample=true"], [], "do_sample true (there false)"),
]


@pytest.mark.parametrize("whole_one", [False, True])
@pytest.mark.long
def test_scores_of_texts_made_otherwise_are_flagged(base: families.Base, capsys: pytest.CaptureFixture[str], whole_one: bool) -> None:
    """Two methods at their strengths; then one's texts are shorter, of fewer prompts, or scored of fewer."""
    words = ["table", "--base_dir", str(base.path), "--tables", "main", "--budget", "50"]
    (one,) = comparison.collect(base.path, [], [], ["main"], 50.0, 0)
    at = {cell.place.method: repr(cell.best["solved"]) for group in one.groups for cell in group.cells}

    def scored(method: str, made: list[str], judged: list[str]) -> str:
        given = [*base.argv(method), "--quiet", "--multipliers", at[method]]
        for mode, more in (("apply", made), ("evaluate", judged)):
            assert cli.main([*given, "--mode", mode, *more]) == 0
        capsys.readouterr()
        assert cli.main(words) == 0
        return capsys.readouterr().out

    scored("sft", [], [])
    if not whole_one:
        assert "Not to be compared" not in scored("caa", [], [])
    for made_with, judged_with, why in CHANGED[1:] if whole_one else CHANGED[:1]:
        said = scored("caa", made_with, judged_with)
        assert f"made or scored otherwise: scores of caa vector ({why})" in said and "| prompt: kind" in said


def test_unsteered_answers_beside_are_without_the_prompt(base: families.Base) -> None:
    run(base, "apply", *baselines(base), "--set", "generate_orig_output=true", "--force")
    plain = json.loads(Store(base.path).results(Cell(base.model, base.one, "sft", "vector", (base.layer,)), 4.0).read_text())
    for name in ("kind", "shots"):
        assert [row["orig_pred"] for row in texts(base, name)] == [row["orig_pred"] for row in plain]


def test_the_plain_engine_makes_the_same_texts(base: families.Base) -> None:
    before = [texts(base, name) for name in ("kind", "shots")]
    run(base, "apply", *baselines(base), "--engine", "plain", "--force")
    assert [texts(base, name) for name in ("kind", "shots")] == before


DIES = """
import os, signal, sys
from spilt import cli
from spilt.tasks import generate
add, made = generate.Unfinished.add, []

def dying(self, text, tokens):
    add(self, text, tokens)
    made.append(text)
    if len(made) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

generate.Unfinished.add = dying
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.long
def test_a_kill_loses_nothing(base: families.Base) -> None:
    """SIGKILL at the second text behind a prompt: the rerun does the rest, to the same bytes."""
    path = Store(base.path).results(behind(base, "shots"), 0.0)
    wanted = path.read_bytes()
    path.unlink()
    words = [*base.argv(), "--quiet", "--mode", "apply", "--multipliers", "4", *baselines(base), "--batch_size", "1"]
    assert forked.run(["-c", DIES, *words]).returncode == -signal.SIGKILL
    left = Store(base.path).unfinished(behind(base, "shots"), 0)
    assert len(left.read_text().splitlines()) == 2 and not path.exists()
    assert cli.main(words) == 0
    assert path.read_bytes() == wanted and not left.exists()


def test_where_it_cannot_be_meant_it_is_refused(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    for mode in ("loss", "generate"):
        run(base, mode, *baselines(base), code=2)
        assert "--prompt_baseline goes with --mode apply, evaluate, both, all" in capsys.readouterr().err
    assert cli.main([*base.argv(dataset=base.many), "--mode", "apply", *baselines(base)]) == 2
    assert "prompts are baselines of data sets without" in capsys.readouterr().err
    run(base, "apply", "--prompt_baseline", "kind", code=2)
    assert "wanted NAME=FILE" in capsys.readouterr().err
    shutil.rmtree(Store(base.path).generation_folder(behind(base, "kind")))
    run(base, "evaluate", *baselines(base), code=0)  # the others are there; what is not is named
    assert "no texts" in capsys.readouterr().out
    assert cli.main(["fit", *base.argv(), *baselines(base)]) == 2  # a fit has no prompts


def test_its_name_is_no_path() -> None:
    for name in ("../x", "a/b", ".hidden", "a b", ""):
        with pytest.raises(UserError):
            prompt_baseline.read([f"{name}=kind.txt"])
