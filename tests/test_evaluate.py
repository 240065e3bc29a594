"""--mode evaluate: stored texts to scores, without a judge and with one that a local server plays; kills, dry runs, verify."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import forked
import numpy as np
import pandas as pd
import pytest
import torch
from command_line import vector_path
from judge_server import KEY, Said, Server, answer_in, completion, serving

import spilt
from spilt import cli, look, verify
from spilt.analysis import scores as analysis
from spilt.analysis.provenance import made_otherwise
from spilt.artifacts.scores import MEASURES
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.data.chat import Chat
from spilt.engine import whole
from spilt.steering.steering import Site, Steering

WORDS = ["Yes", "No"]


def yes_no(base: families.Base, count: int) -> None:
    """Held-out questions whose answers are one word, and some neutral texts."""
    rows = [
        {"question": f"is {i} {'very ' * (i % 3)}odd?", "matching": WORDS[i % 2], "not_matching": WORDS[1 - i % 2]} for i in range(count)
    ]
    rows[-1] |= {"matching": "Yes", "not_matching": "Yep"}  # the same first token: one character to this tokenizer
    families.write_jsonl(base.data(base.one, "valid"), rows)
    families.write_jsonl(
        base.path / "data" / "neutral.jsonl", [{"input": f"name {i}", "reference_response": f"it is {i}"} for i in range(3)]
    )
    file = base.path / "hparams" / "Steer" / "dataset_format.yaml"
    import yaml

    formats = yaml.safe_load(file.read_text())
    formats["neutral"] = {base.one: {"file_path": "data/neutral.jsonl"}}
    families.write_yaml(file, formats)


def run(base: families.Base, *words: str, dataset: str = "", code: int = 0) -> None:
    assert cli.main([*base.argv("sft", "vector", *words, dataset=dataset), "--quiet"]) == code


def evaluated(base: families.Base, *words: str, dataset: str = "", code: int = 0) -> None:
    run(base, "--mode", "evaluate", *words, dataset=dataset, code=code)


def table(base: families.Base, m: float, dataset: str = "", concept: int | None = None) -> pd.DataFrame:
    cell = Cell(base.model, dataset or base.one, "sft", "vector", (base.layer,), concept)
    return analysis.read(Store(base.path).scores(cell, m))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    """Fits and texts of both datasets."""
    base = families.make_base(tmp_path_factory.mktemp("made") / "base", train=8)
    yes_no(base, 7)
    for dataset in ("", base.many):
        run(base, "--mode", "both", "--multipliers", "0", "4", dataset=dataset)
    return base


@pytest.fixture
def base(made: families.Base, tmp_path: Path) -> families.Base:
    shutil.copytree(made.path, tmp_path / "base")
    return made._replace(path=tmp_path / "base")


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """Rates by the length of the text; every fifth text gets a reply without a rating."""

    def say(prompt: str, before: int) -> Said:
        length = len(answer_in(prompt))
        return Said(completion("I cannot say." if length % 5 == 4 else f"It has {length}.\nRating: {length % 3}"))

    with serving(say) as server:
        environment(monkeypatch, server)
        yield server


def environment(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    pytest.importorskip("openai", reason="pip install 'spilt[judge]'")
    for name, value in (("SPILT_JUDGE_MODEL", "stand-in"), ("OPENAI_API_KEY", KEY), ("OPENAI_BASE_URL", server.url)):
        monkeypatch.setenv(name, value)


# ---------------------------------------------------------------- without a judge


def test_everything_that_needs_no_judge_against_slow_ways(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(base)
    said = capsys.readouterr()
    assert "evaluate mine sft vector" in said.out and "perplexity" in said.out and "m = 4" in said.out and "judge" not in said.err
    model, tokenizer = spilt.load(base.path / "models" / base.model)
    chat = Chat.of(tokenizer)
    rows = [json.loads(line) for line in base.data(base.one, "valid").read_text().splitlines()]
    neutral = [json.loads(line) for line in (base.path / "data" / "neutral.jsonl").read_text().splitlines()]
    state = torch.load(vector_path(base, "sft", "vector"), weights_only=True)
    steering = Steering([(Site(base.layer), families.intervention("vector"))])
    with torch.no_grad():
        next(steering.parameters()).copy_(state)

    def log_p(prompt: list[int], m: float) -> torch.Tensor:
        with torch.no_grad(), whole.steer(model, steering, m):
            return model(torch.tensor([prompt])).logits[0, -1].double().log_softmax(-1)

    def nats(prompt: list[int], text: str, m: float) -> float:
        """Mean -log p of a text, a token at a time."""
        ids, losses = list(prompt), []
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]:
            losses.append(-log_p(ids, m)[token].item())
            ids.append(token)
        return float(np.mean(losses))

    for m in (0.0, 4.0):
        found = table(base, m).set_index(["measure", "item"])
        assert {*found.index.get_level_values(0)} == {*MEASURES} - {"harmonic"}
        texts = json.loads(Store(base.path).results(Cell(base.model, base.one, "sft", "vector", (2,)), m).read_text())
        for i, row in enumerate(rows):
            prompt, text = chat.prompt_ids(row["question"]), texts[i]["pred"][0]
            first, other = (tokenizer(row[name], add_special_tokens=False)["input_ids"][0] for name in ("matching", "not_matching"))
            odds, score = (log_p(prompt, m)[first] - log_p(prompt, m)[other]).item(), found.loc[("log_odds", i)]
            if first == other:
                assert np.isnan(score["value"]) and score["reason"] == "both answers have the same first token"
            else:
                assert score["value"] == pytest.approx(odds, abs=1e-4) and found.loc[("accuracy", i), "value"] == float(odds > 0)
            perplexity = found.loc[("perplexity", i), "value"]
            assert np.isnan(perplexity) if not text.strip() else perplexity == pytest.approx(np.exp(nats(prompt, text, 0.0)), rel=1e-4)
        for i, row in enumerate(neutral):
            wanted = nats(chat.prompt_ids(row["input"]), row["reference_response"], m)
            assert found.loc[("neutral_loss", i), "value"] == pytest.approx(wanted, rel=1e-4)
        kl = found.loc[["kl_mean", "kl_p95"], "value"].dropna()
        assert len(kl) and ((kl == 0) if m == 0 else (kl > 0)).all()


def test_without_a_judge_what_is_missing_is_told(base: families.Base, caplog: pytest.LogCaptureFixture) -> None:
    evaluated(base, dataset=base.many)
    said = caplog.text
    assert "no judge: concept, fluency, instruction of the texts left out; --judge endpoint asks" in said and "SPILT_JUDGE_MODEL" in said
    found = table(base, 4.0, base.many, 0)
    assert {"perplexity", "distinct_1"} <= set(found["measure"]) and "concept" not in set(found["measure"])
    assert sorted(set(found["concept"])) == [0, 1, 3] and "accuracy" not in set(found["measure"])


def test_a_limit_scores_the_first_of_texts_that_were_made_without(base: families.Base) -> None:
    evaluated(base, "--multipliers", "4")
    whole_one = table(base, 4.0).query("measure == 'length'").set_index("item")["value"].to_dict()
    evaluated(base, "--multipliers", "4", "--limit", "2")
    first = table(base, 4.0).query("measure == 'length'").set_index("item")["value"].to_dict()
    assert first == {item: whole_one[item] for item in (0, 1)} and len(whole_one) == 7
    data = base.data(base.one, "valid")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    families.write_jsonl(data, [rows[0], rows[1] | {"question": "another"}, *rows[2:]])
    evaluated(base, "--multipliers", "4", "--limit", "2", code=2)  # others within the limit are refused as ever


# ---------------------------------------------------------------- with one


@pytest.mark.long
def test_axbench_ratings_and_their_harmonic_mean(base: families.Base, judge: Server, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated(base, "--judge", "endpoint", "--multipliers", "4", dataset=base.many)
    found = table(base, 4.0, base.many, 0)
    cell = Cell(base.model, base.many, "sft", "vector", (base.layer,), 0)
    blocks = json.loads(Store(base.path).results(cell, 4.0).read_text())
    texts = {(block["concept_id"], i): row["pred"][0] for block in blocks for i, row in enumerate(block["generated_results"])}
    wanted = {key: None if len(text) % 5 == 4 else len(text) % 3 for key, text in texts.items()}
    for name in ("concept", "instruction", "fluency", "harmonic"):
        rows = found[found["measure"] == name].set_index(["concept", "item"])
        assert {key: None if np.isnan(value) else value for key, value in rows["value"].items()} == wanted, name
        assert {bool(why) for why in rows["reason"]} == {value is None for value in wanted.values()}
    assert f"{3 * sum(value is None for value in wanted.values())}" and "rivers" in json.dumps(judge.seen)
    asked = sum(judge.asked.values())
    assert asked == len({json.dumps(body) for body in judge.seen})  # each prompt once

    # a rerun has nothing to do; done again, the judge is not asked
    stored = Store(base.path).scores(cell, 4.0)
    before = stored.read_bytes()
    evaluated(base, "--judge", "endpoint", "--multipliers", "4", dataset=base.many)
    assert "already done" in capsys.readouterr().out
    evaluated(base, "--judge", "endpoint", "--multipliers", "4", "--force", dataset=base.many)
    assert stored.read_bytes() == before and sum(judge.asked.values()) == asked
    everything = "".join(
        path.read_text(errors="replace") for path in base.path.rglob("*") if path.is_file() and path.suffix in (".json", ".csv", ".log")
    )
    assert KEY not in everything


@pytest.mark.long
def test_a_rubric_of_ones_own_and_a_limit(base: families.Base, judge: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rubric = tmp_path / "oddness.yaml"
    rubric.write_text("scale: [0, 2]\nprompt: |\n  How odd?\n  {{answer}}\nparameters: {max_tokens: 9}\n")
    evaluated(base, "--judge", "endpoint", "--rubric", str(rubric), "--judge_limit", "2")
    rated = table(base, 4.0).query("measure == 'oddness'")
    assert rated["item"].tolist() == [0, 1] and {body["max_tokens"] for body in judge.seen} == {9}
    evaluated(base, "--judge", "endpoint", "--rubric", str(rubric), "--judge_limit", "3", "--multipliers", "4")
    assert len(table(base, 4.0).query("measure == 'oddness'")) == 3
    evaluated(base, "--judge", "endpoint", "--rubric", "pover", code=2)
    evaluated(base, "--judge", "endpoint", "--multipliers", "0")
    assert "mine has no rubric of its own, so the judge is not asked" in caplog.text


@pytest.mark.long
def test_what_failed_is_asked_for_again(
    base: families.Base, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    well = False

    def say(prompt: str, before: int) -> Said:
        return Said(completion("Rating: 2")) if well or len(answer_in(prompt)) % 2 else Said({}, 400)

    with serving(say) as server:
        environment(monkeypatch, server)
        words = ("--judge", "endpoint", "--rubric", "fluency", "--multipliers", "0")
        evaluated(base, *words)
        rated = table(base, 0.0).query("measure == 'fluency'")
        lost = rated["value"].isna().sum()
        said = capsys.readouterr()
        assert 0 < lost < len(rated) and set(rated["reason"]) == {"", "HTTP 400"}
        assert f"missing: fluency at m = 0: {lost} of {len(rated)} (HTTP 400: {lost})" in said.out and f"HTTP 400: {lost}" in caplog.text
        well = True
        asked = sum(server.asked.values())
        evaluated(base, *words)
        assert table(base, 0.0).query("measure == 'fluency'")["value"].tolist() == [2.0] * len(rated)
        assert sum(server.asked.values()) <= asked + lost
        capsys.readouterr()
        evaluated(base, *words)
        assert "already done" in capsys.readouterr().out


# ---------------------------------------------------------------- one thousand, and a kill


def many_texts(base: families.Base, count: int) -> None:
    """Texts to so many prompts, as another tool would have left them."""
    rows = [{"question": f"say {i}", "matching": "a b", "not_matching": "c d"} for i in range(count)]
    families.write_jsonl(base.data(base.one, "valid"), rows)
    texts = [
        {
            "input": f"say {i}",
            "orig_pred": [],
            "pred": [f"well {i} {'so ' * (i % 4)}"],
            "reference_response": "a b",
            "complete_output": [""],
        }
        for i in range(count)
    ]
    shutil.rmtree(base.path / "generation")
    path = Store(base.path).results(Cell(base.model, base.one, "sft", "vector", (base.layer,)), 4.0)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(texts))


@pytest.mark.long
def test_a_kill_among_a_thousand_prompts(base: families.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL while the judge is asked; the rerun asks for the rest alone and comes to the table of a run without a kill."""
    many_texts(base, 1000)
    whole_one = base._replace(path=tmp_path / "whole")
    shutil.copytree(base.path, whole_one.path)
    words = ["--mode", "evaluate", "--judge", "endpoint", "--rubric", "fluency", "--multipliers", "4", "--quiet"]
    child: list[forked.Run] = []
    kill_at = 400

    def say(prompt: str, before: int) -> Said:
        if child and sum(server.asked.values()) == kill_at:
            child[0].kill()
        return Said(completion(f"Rating: {len(answer_in(prompt)) % 3}"))

    with serving(say) as server:
        environment(monkeypatch, server)
        child.append(forked.Run(["run_spilt.py", *base.argv("sft", "vector", *words)]))
        assert child[0].wait(timeout=200) == -signal.SIGKILL
        first = sum(server.asked.values())
        assert first < 500 and not list(base.path.rglob("scores_m4.0.csv"))
        child.clear()
        assert cli.main(base.argv("sft", "vector", *words)) == 0
        assert sum(server.asked.values()) <= 1000 + 2 * 8  # those under way when it was killed are asked twice
        assert cli.main(whole_one.argv("sft", "vector", *words)) == 0
    name = "scores_m4.0.csv"
    one, other = (next(b.path.rglob(name)).read_bytes() for b in (base, whole_one))
    assert one == other and one.count(b"fluency") == 1000
    assert not list(base.path.rglob("unfinished*")) and not list(base.path.rglob("*.tmp-*"))


@pytest.mark.long
def test_a_run_that_is_stopped_goes_on(base: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same without a process of its own: the endpoint refuses the key in the middle. What the model said of the texts is kept too."""
    many_texts(base, 100)
    open_at = [40]

    def say(prompt: str, before: int) -> Said:
        if sum(server.asked.values()) > open_at[0]:
            return Said({}, 401)
        return Said(completion(f"Rating: {len(answer_in(prompt)) % 3}"))

    with serving(say) as server:
        environment(monkeypatch, server)
        words = ("--judge", "endpoint", "--rubric", "fluency", "--multipliers", "4")
        evaluated(base, *words, code=2)
        (left,) = base.path.rglob("unfinished_0.jsonl")
        assert len(left.read_text().splitlines()) == 100 and verify.LEFTOVER in {found.state for found in verify.check(base.path)}
        kept = sum(1 for _ in (base.path / "judged").rglob("*.json"))
        assert 0 < kept <= 40
        open_at[0] = 10**6
        before = sum(server.asked.values())
        evaluated(base, *words)
        assert sum(server.asked.values()) - before == 100 - kept and not left.exists()
    assert table(base, 4.0).query("measure == 'fluency'")["value"].notna().sum() == 100


# ---------------------------------------------------------------- plan, verify, refusals


def test_the_plan_says_what_it_reads_writes_and_costs(
    base: families.Base, judge: Server, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = families.listing(base.path)
    words = ("--mode", "evaluate", "--dry_run", "--judge", "endpoint", "--judge_limit", "1")
    run(base, *words, dataset=base.many)
    said = capsys.readouterr().out
    assert "1. evaluate axbench concepts 0,1,3 sft vector   [to do]" in said and "scores/scores_m4.0.csv" in said
    assert "all_generation_results_m0.0.json" in said and "18 ratings by stand-in" in said
    assert "--judge endpoint --judge_limit 1" in said and "--multipliers 0.0 4.0" in said
    assert families.listing(base.path) == before and not judge.asked and KEY not in said
    run(base, *words[:-4], dataset=base.many)
    assert "no judge: concept, fluency" in capsys.readouterr().out
    monkeypatch.delenv("SPILT_JUDGE_MODEL")
    run(base, *words, dataset=base.many, code=2)
    assert "SPILT_JUDGE_MODEL is not set" in capsys.readouterr().err


@pytest.mark.long
def test_scores_of_other_texts_or_judges_stand_in_no_table(base: families.Base, judge: Server, caplog: pytest.LogCaptureFixture) -> None:
    """The page and the tables read what `collect` gives: of the texts that lie there now, and each rating by who rated last."""
    store, cell = Store(base.path), Cell(base.model, base.one, "sft", "vector", ())
    rubric = base.path / "mine.yaml"
    rubric.write_text("name: power\nscale: [0, 2]\nprompt: 'Rate it. {{answer}}'\n")
    words = ["--judge", "endpoint", "--rubric", str(rubric)]
    evaluated(base, *words)
    found, left = analysis.collect(store, cell)
    assert set(found[found["measure"] == "power"]["multiplier"]) == {0.0, 4.0} and not left
    one_by_one = dataclasses.replace(cell, intervention="lora")
    assert analysis.several_judges(store, [cell, one_by_one], ["power"]) == ""
    time.sleep(1.1)  # manifests tell seconds
    rubric.write_text(rubric.read_text().replace("Rate it.", "How much power?"))
    evaluated(base, *words, "--multipliers", "4")
    found, left = analysis.collect(store, cell)
    assert set(found[found["measure"] == "power"]["multiplier"]) == {4.0} and set(found["multiplier"]) == {0.0, 4.0}
    assert left == {"(their ratings) by another judge or rubric than the last": [store.scores(cell, 0.0)]}
    shutil.copytree(store.generation_folder(cell), store.generation_folder(one_by_one))
    store.scores(one_by_one, 4.0).unlink()
    said = analysis.several_judges(store, [cell, one_by_one], ["power"])
    assert "sft vector by stand-in" in said and "sft lora by stand-in" in said and "not to be compared" in said
    shutil.rmtree(store.generation_folder(one_by_one))
    run(base, "--mode", "apply", "--multipliers", "4", "--set", "generation_params.max_new_tokens=3")
    found, left = analysis.collect(store, cell)
    assert set(found["multiplier"]) == {0.0} and left == {"of other texts than those that lie there now": [store.scores(cell, 4.0)]}
    assert set(found[found["measure"] == "power"]["multiplier"]) == {0.0}
    told = made_otherwise(store, cell)
    assert len(told) == 1 and "texts at m = 0 were made otherwise than the last" in told[0]
    assert "max_new_tokens 5 (now 3)" in told[0] and look.results(store, cell).keys() == {0.0, 4.0}
    caplog.clear()
    evaluated(base, "--multipliers", "0")
    assert "texts at m = 0 were made otherwise" in caplog.text


@pytest.mark.long
def test_verify_checks_its_files(base: families.Base) -> None:
    evaluated(base)
    assert {found.state for found in verify.check(base.path)} == {verify.OK}
    cell = Cell(base.model, base.one, "sft", "vector", (base.layer,))
    path, texts = Store(base.path).scores(cell, 4.0), Store(base.path).results(cell, 4.0)

    def state() -> tuple[str, str]:
        return next((found.state, found.reason) for found in verify.check(base.path) if found.path == path)

    before = path.read_text()
    path.write_text(before.replace("length", "lengtj"))
    assert state()[0] == verify.DAMAGED
    path.write_text(before)
    run(base, "--mode", "apply", "--multipliers", "4", "--set", "generation_params.max_new_tokens=3")
    assert state()[0] == verify.STALE and re.search("texts .*m4.0.* have changed", state()[1])
    evaluated(base)
    assert state()[0] == verify.OK
    texts.unlink()
    assert "are gone" in state()[1]


def test_texts_of_another_vector_or_of_other_prompts_are_refused(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    run(base, "--mode", "generate", "--set", "lr=0.3")
    evaluated(base, code=2)
    assert "was made with another vector; --mode apply makes it again" in capsys.readouterr().err
    path = Store(base.path).results(Cell(base.model, base.one, "sft", "vector", (base.layer,)), 0.0)
    path.with_name(path.stem + ".manifest.json").unlink()  # as the released code's
    evaluated(base, "--multipliers", "0")
    content: list[dict[str, Any]] = json.loads(path.read_text())
    path.write_text(json.dumps([*content[1:], content[0]]))
    evaluated(base, "--multipliers", "0", code=2)
    assert "row 0 answers another prompt" in capsys.readouterr().err
    evaluated(base, "--multipliers", "3", code=1)
    assert "no texts" in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.usefixtures("no_pictures")
def test_the_page_has_a_table_of_the_scores(base: families.Base) -> None:
    evaluated(base)
    run(base, "--mode", "loss", "--multipliers", "0", "4", "--no-released_files", "--split", "train")
    page = next(base.path.rglob(f"report/{base.one}/report.html"))
    html = page.read_text()
    assert "Scores of the stored texts" in html and "perplexity" in html and "KL(steered || unsteered)" in html
    stored = pd.read_csv(page.with_name("scores.csv"))
    assert {"perplexity", "accuracy", "neutral_loss"} <= set(stored["measure"]) and set(stored["multiplier"]) == {0.0, 4.0}
    path = next(base.path.rglob("scores_m4.0.csv"))
    path.write_text("damaged")
    run(base, "--mode", "loss", "--multipliers", "0", "4", "--no-released_files", "--split", "train")
    assert "scores left out" in page.read_text()
