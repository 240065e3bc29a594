"""Behaviours on a model: verdicts and KL against the library, spilt receipt, spilt strength, hostile words and files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import torch

import spilt
from spilt import cli
from spilt.analysis import behaviour as rules
from spilt.analysis.chosen import Chosen
from spilt.behaviour import files
from spilt.behaviour import receipt as r
from spilt.behaviour.probe import Probe
from spilt.data import entries, readers
from spilt.data.chat import Chat
from spilt.errors import UserError
from spilt.report import receipt as written
from spilt.steering.steering import Site, Steering

LAYER = 2
ASKED = ["abc", "a longer one?", "XYZ", "what now"]


def steering(form: str = "vector", scale: float = 0.3) -> Steering:
    return Steering([(Site(LAYER, "mlp_mid" if form != "vector" else None), families.intervention(form, scale=scale))])


def probe(**more: Any) -> Probe:
    return Probe(families.model("qwen2"), families.tokenizer(), steering(), do_sample=False, **more)


def behaviour(judge: dict[str, Any] | None = None, **more: Any) -> files.Behaviour:
    given = {"prompts": ASKED, "tune_on": ASKED[:2], "damage": ASKED[:3], "max_new_tokens": 6, "name": "mine"}
    return files.Behaviour(judge=judge or {"regex": "[a-m]"}, **{**given, **more})  # type: ignore[arg-type]


# ---------------------------------------------------------------- what is measured


def test_answers_and_numbers_are_those_of_the_library() -> None:
    model, tokenizer, asked = families.model("qwen2"), families.tokenizer(), probe()
    texts = spilt.generate(model, tokenizer, steering(), ASKED, 1.5, max_new_tokens=6, do_sample=False)["text"].tolist()
    found = asked.answers(ASKED, 1.5, 6, kl=True)
    assert [one.text for one in found] == texts and len(asked.kept) == len(ASKED)
    pooled = np.concatenate([one.kl for one in found if one.kl is not None])
    table = spilt.divergence(model, tokenizer, steering(), ASKED, 1.5, max_new_tokens=6).iloc[0]
    assert [pooled.mean(), np.quantile(pooled, 0.95)] == pytest.approx([table["kl_mean"], table["kl_p95"]], rel=1e-5)
    for without, one in zip(probe().answers(ASKED, 1.5, 6), found, strict=True):
        assert without.surprise == pytest.approx(one.surprise, rel=1e-5) and without.kl is None
    prompt = torch.tensor([asked.chat.prompt_ids(ASKED[0])])
    with spilt.steer(model, steering(), 1.5), torch.no_grad():
        made = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False, pad_token_id=families.PAD)
    with torch.no_grad():
        log_p = model(made).logits[0, prompt.shape[1] - 1 : -1].log_softmax(-1)
    mine = -log_p.gather(1, made[0, prompt.shape[1] :, None]).mean()
    assert found[0].surprise == pytest.approx(float(mine), rel=1e-4)


def test_first_tokens_are_the_next_ones_of_the_model() -> None:
    asked, b = probe(), behaviour({"first_token": {"shows": "yes", "otherwise": "no"}}, incoherent={"mass": 0})
    found = asked.log_probs(b, b.prompts, 2.0)
    for text, (shows, otherwise) in zip(ASKED, found, strict=True):
        ids = asked.chat.prompt_ids(text)
        with spilt.steer(families.model("qwen2"), steering(), 2.0), torch.no_grad():
            log_p = families.model("qwen2")(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        wanted = [float(log_p[asked.tokenizer.convert_tokens_to_ids(letter)]) for letter in "yn"]
        assert (shows, otherwise) == pytest.approx(wanted, rel=1e-4)
    assert asked.verdicts(b, b.prompts, 2.0) == [rules.SHOWS if x > y else rules.ABSENT for x, y in found]
    pairs = [(" yes", "no"), ("(A)", "(B)")]  # of a data file: with their spaces; of letters what differs
    rows = [files.Asked("abc", dict(zip(files.ANSWERS, pair, strict=True))) for pair in pairs]
    for pair, odds in zip(pairs, asked.log_probs(behaviour({"first_token": "columns"}, prompts=rows), rows, 0.0), strict=True):
        both = [asked.chat.encode("abc", answer, 99) for answer in pair]
        at = both[0].prompt_length
        with torch.no_grad():
            log_p = families.model("qwen2")(torch.tensor([both[0].input_ids[:at]])).logits[0, -1].log_softmax(-1)
        assert odds == pytest.approx([float(log_p[one.input_ids[at]]) for one in both], rel=1e-4)
    with pytest.raises(UserError, match="begin with the same token"):
        asked.log_probs(behaviour({"first_token": {"shows": "yes", "otherwise": "yet"}}), b.prompts, 0.0)


@pytest.mark.parametrize(
    ("judge", "text", "times", "verdict"),
    [
        ({"keywords": ["Sea"]}, "the sea.", 1.0, rules.SHOWS),
        ({"keywords": ["sea"]}, "season", 1.0, rules.ABSENT),
        ({"regex": "^no"}, "No!", 1.0, rules.SHOWS),
        ({"yes_no": True}, "Yes, I do", 1.0, rules.SHOWS),
        ({"yes_no": "yes"}, "no", 1.0, rules.ABSENT),
        ({"yes_no": "yes"}, "perhaps", 1.0, rules.INCOHERENT),
        ({"keywords": ["sea"]}, " ... ", 1.0, rules.INCOHERENT),
        ({"keywords": ["sea"]}, "sea " * 12, 1.0, rules.INCOHERENT),
        ({"keywords": ["sea"]}, "the sea", 21.0, rules.INCOHERENT),
        ({"keywords": ["sea"]}, "the sea", math.nan, rules.INCOHERENT),
        ({"keywords": ["sea"]}, "the sea \ufffd\ufffd", 1.0, rules.INCOHERENT),
    ],
)
def test_a_broken_answer_is_never_a_success(judge: dict[str, Any], text: str, times: float, verdict: str) -> None:
    for want in (rules.SHOWS, rules.ABSENT):
        assert probe().judged(behaviour(judge, want=want, incoherent={"regex": "\ufffd"}), ["?"], [text], [times]) == [verdict]


def test_a_model_that_is_steered_to_pieces_has_no_success() -> None:
    asked = probe()
    for want in (rules.SHOWS, rules.ABSENT):
        found = asked.point(behaviour(want=want, incoherent={"perplexity_times": 1.5, "repetition": 0.0}), 1e6)
        assert found.success == 0 and found.incoherent == 1
    assert asked.point(behaviour(), 0.0).damage == 0


def test_a_judge_is_held_against_a_person(tmp_path: Path) -> None:
    rows = [("abc", "abc", "shows"), ("abc", "XYZ", "absent"), ("abc", "ABM", "true"), ("abc", "zz", "shows"), ("abc", "", "incoherent")]
    families.write_jsonl(tmp_path / "labels.jsonl", [dict(zip(("prompt", "text", "label"), row, strict=True)) for row in rows])
    loose = {"perplexity_times": None, "repetition": None}
    found = r.validated(probe(), behaviour(incoherent=loose), tmp_path / "labels.jsonl")
    assert found.kappa.n == 5 and found.kappa.value == pytest.approx((0.8 - 0.36) / (1 - 0.36)) and "kappa 0.69" in str(found)
    (tmp_path / "odd.csv").write_text("prompt,text,label\na,b,maybe\n")
    with pytest.raises(UserError, match="odd.csv line 2: has the label 'maybe'"):
        r.validated(probe(), behaviour(), tmp_path / "odd.csv")
    assert str(r.validated(probe(), behaviour(), None)) == "not checked against a person's labels"


@pytest.mark.long
def test_every_failure_is_a_row_with_its_number_and_what_it_is_of() -> None:
    found = r.write_down(probe(), behaviour(), multiplier=2.0, prefix="before " * 5)
    assert [row.name for row, _ in found.failures] == [row.name for row in r.FAILURES] and set(found.rows) >= {0.0, 2.0, -2.0}
    for row, finding in found.failures:
        assert finding.after.n or row.name == "anti-steered items", row.name
    before = found.rows[0.0]
    assert before["wanted"].n == 4 and before["kl"].value == 0
    bare = r.write_down(probe(), behaviour(), multiplier=2.0)
    assert {row.name for row, finding in bare.failures if finding.bad is None and "--prefix" in finding.note} == {
        "damage on long contexts", "no effect on long contexts"
    }  # fmt: skip


def test_the_chosen_strength_is_in_the_table_whatever_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(r, "FAILURES", ())
    monkeypatch.setattr(r, "choose", lambda *_: Chosen(1.25, "chosen", (), ()))
    found = r.write_down(probe(), behaviour(), multiplier=2.0, more=[0.5])
    assert found.multiplier == 2.0 and list(found.rows) == [-2.0, 0.0, 0.5, 1.25, 2.0]


# ---------------------------------------------------------------- the commands


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    made = families.make_base(tmp_path_factory.mktemp("receipt") / "base", train=8, test=8)
    assert cli.main(made.argv("caa", "vector", "--mode", "generate", "--quiet")) == 0
    assert cli.main(made.argv("caa", "vector", "--mode", "generate", "--quiet", "--layers", "1")) == 0
    hostile = "a\x1b[31m|<script>b</script>"
    text = json.dumps({"prompts": ["b?", hostile, "c", "d"], "judge": {"regex": "[a-m]"}, "damage": ["x"], "max_new_tokens": 4})
    (made.path / "mine.yaml").write_text(text)
    return made


def words(base: families.Base, program: str, *more: str) -> list[str]:
    cell = ["--dataset", base.one, "--method", "caa", "--intervention_method", "vector"]
    return [program, "--base_dir", str(base.path), "--model_name", base.model, "--device", "cpu", *cell, *more]


def test_a_receipt_is_a_page_and_a_document(base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine, out = str(base.path / "mine.yaml"), tmp_path / "receipt.md"
    assert cli.main(words(base, "receipt", "--behaviour", mine, "--multiplier", "3", "--output", str(out))) == 0
    said, page, told = capsys.readouterr().out, out.read_text(), json.loads(out.with_suffix(".json").read_text())
    assert said == page and "\x1b" not in page and "<script>" not in page and "a\\\\x1b\\[31m\\|\\<script\\>" in page
    for row in r.FAILURES:
        assert f"| {row.name} |" in page
    for row in (*told["failures"], *told["strengths"]):
        for number in (value for value in row.values() if isinstance(value, dict)):
            assert set(number) == {"value", "low", "high", "n"}
    assert told["multiplier"] == 3 and told["dose"] > 0 and told["tried"] and told["texts"][0]["prompt"] == "a\x1b[31m|<script>b</script>"
    assert "not checked against a person's labels" in page and "ten own illustrations" in page
    drawn = out.with_suffix(".html").read_text()
    assert "<script>" not in drawn and "\x1b" not in drawn and "a\\x1b[31m|&lt;script&gt;b&lt;/script&gt;" in drawn
    assert drawn == written.html(told) and page == "\n".join(written.markdown(told)) + "\n"  # of what is stored alone
    assert all(f">{row['dose']:.3g}<" in drawn for row in told["strengths"])
    assert drawn.count("<tr>") == page.count("\n| ") - page.count("\n| ---")


@pytest.mark.parametrize("turns", [(("system", "be brief"),), (("user", "so"), ("assistant", "no"))])
def test_behind_a_prompt_numbers_are_those_of_plain_forwards(turns: Any) -> None:
    """Greedy answers, KL(behind the prompt || without it), the unsteered model's surprise without it, and first tokens behind it."""
    model, asked = families.model("qwen2"), probe()
    prompted = asked.behind(turns)
    b = behaviour({"first_token": {"shows": "yes", "otherwise": "no"}}, incoherent={"mass": 0})
    odds = prompted.log_probs(b, b.prompts, 0.0)

    def log_p(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)

    for text, answer, pair in zip(ASKED, prompted.answers(ASKED, 0.0, 4, kl=True), odds, strict=True):
        whole_one = (("user", f"be brief\n\n{text}"),) if turns[0][0] == "system" else (*turns, ("user", text))
        ids, bare = list(asked.chat.prompt_ids(whole_one)), list(asked.chat.prompt_ids(text))
        first = log_p(ids)
        assert pair == pytest.approx([float(first[asked.tokenizer.convert_tokens_to_ids(letter)]) for letter in "yn"], rel=1e-4)
        kl, loss, new = [], [], []
        while len(new) < 4 and not (new and new[-1] == families.EOS):
            p, q = log_p([*ids, *new]), log_p([*bare, *new])
            new.append(int(p.argmax()))
            kl.append(float((p.exp() * (p - q)).sum()))
            loss.append(-float(q[new[-1]]))
        assert answer.text == asked.tokenizer.decode(new, skip_special_tokens=True)
        assert answer.kl == pytest.approx(np.array(kl), rel=1e-3) and answer.surprise == pytest.approx(np.mean(loss), rel=1e-4)
    assert not asked.kept  # the answers without the prompt are others


@pytest.mark.long
def test_a_receipt_has_prompts_beside(base: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "kind.txt").write_text("be <b>kind</b>\n")
    mine = str(base.path / "mine.yaml")
    more = ["--prompt_baseline", f"kind={tmp_path / 'kind.txt'}", "--output", str(tmp_path / "r.md")]
    assert cli.main(words(base, "receipt", "--behaviour", mine, *more)) == 0
    told = json.loads((tmp_path / "r.json").read_text())
    (row,) = told["prompt_baselines"]
    shown = [text["verdict"] == told["behaviour"]["want"] for text in row["texts"]]
    assert (
        row["name"] == "kind" and row["turns"] == [["system", "be <b>kind</b>"]] and row["wanted"]["value"] == pytest.approx(np.mean(shown))
    )
    assert row["wanted"]["n"] == len(shown) == told["prompts"]["reported_on"] and row["kl"]["value"] > 0
    assert [one["prompt"] for one in row["texts"]] == [one["prompt"] for one in told["texts"] if one["multiplier"] == 0]
    said = capsys.readouterr().out
    assert "| prompt: kind | – |" in said and "KL is from the model without it" in said
    assert cli.main(words(base, "receipt", "--behaviour", mine, "--prompt_baseline", "kind")) == 2
    assert "wanted NAME=FILE" in capsys.readouterr().err


@pytest.fixture
def of_letters(base: families.Base) -> Iterator[families.Base]:
    """Its answers begin with letters, which are tokens here, not with spaces."""
    before = {path: path.read_text() for path in (base.path / "data" / base.one).glob("*.jsonl")}
    for path, text in before.items():
        path.write_text(text.replace('": " ', '": "'))
    yield base
    for path, text in before.items():
        path.write_text(text)


@pytest.mark.long
def test_strength_by_accuracy_is_chosen_on_training_questions(of_letters: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """The share at the strength that is told, by the library's own forward on the held-out questions."""
    base, own = of_letters, ["strength", "--by", "accuracy", "--max_damage", "5", "--max_incoherent", "1"]
    assert cli.main(words(base, *own, "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    (row,) = told["sides"]
    assert told["by"] == "accuracy" and told["chosen_on"] == told["reported_on"] == 8 and row["status"] in ("chosen", "no effect")
    model, tokenizer = spilt.load(base.path / "models" / base.model)
    value = Steering.load(next((base.path / "vectors" / base.model / "caa").rglob(f"caa_vector/layer_{LAYER}.pt")))
    right = []
    for pair in readers.read_pairs(entries.dataset_format(base.path, base.one, "valid")):
        ids = [Chat.of(tokenizer).encode(pair.question, answer, 10**9) for answer in (pair.matching, pair.not_matching)]
        start = ids[0].prompt_length
        with spilt.steer(model, value, row["multiplier"]), torch.no_grad():
            log_p = model(torch.tensor([ids[0].input_ids[:start]])).logits[0, -1].log_softmax(-1)
        one, other = (float(log_p[each.input_ids[start]]) for each in ids)
        right.append(one > other)
    assert row["unsteered" if row["status"] == "no effect" else "wanted"][0] == pytest.approx(np.mean(right))
    for more, said in ((["--behaviour", "sea"], "--by accuracy looks at none"), (["--prompts", "0"], "wanted 1 or more")):
        assert cli.main(words(base, *own, *more)) == 2 and said in capsys.readouterr().err


@pytest.mark.long
def test_strength_by_behaviour_of_all_stored_layers(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    mine = str(base.path / "mine.yaml")
    assert cli.main(words(base, "strength", "--by", "behaviour", "--behaviour", mine, "--layers", "all", "--json")) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["layers"] for row in told["sides"]] == ["1", "2"] and all(row["status"] for row in told["sides"])
    assert told["chosen_on"] == told["reported_on"] == 2 and {row["layers"] for row in told["probes"]} == {"1", "2"}
    assert cli.main(words(base, "strength", "--layers", "1", "2", "--prompts", "2", "--max_new_tokens", "3", "--budget", "0.3")) == 0
    said = capsys.readouterr().out
    assert said.count("positive") == 2 and "layers" in said and "dose" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--max_new_tokens", "0"], "--max_new_tokens 0: wanted 1 or more"),
        (["--max_new_tokens", "100000"], "exceed the model's context of 512"),
        (["--prompts", "0"], "--prompts 0: wanted 1 or more"),
        (["--budget", "inf"], "wanted nats above 0"),
        (["--prompts_file", "gone.txt"], "gone.txt can't be read: No such file"),
        (["--prompts_file", "latin.txt"], "latin.txt line 2: byte 0xe9 is not UTF-8"),
        (["--prompts_file", "empty.txt"], "has no prompt"),
        (["--prompts_file", "long.txt"], "of 9020 tokens and an answer of 50 exceed"),
        (["--prompts_file", "."], "it is a folder"),
        (["--by", "behaviour"], "which? give --behaviour"),
        (["--by", "behaviour", "--behaviour", "sea", "--max_incoherent", "nan"], "wanted a share between 0 and 1"),
        (["--by", "behaviour", "--behaviour", "sea", "--max_damage", "inf"], "wanted nats above 0"),
        (["--layers", "4"], "no vector file"),
        (["--layers", "1", "2", "3"], "no vector file"),
        (["--set", "steer_positions=l5"], "every token is steered here"),
    ],
)
def test_wrong_words_are_one_message(
    base: families.Base, tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin.txt").write_bytes(b"one\ncaf\xe9\n")
    Path("empty.txt").write_text(" \n\n")
    Path("long.txt").write_text("\x1b[2J" + "a" * 9000)
    assert cli.main(words(base, "strength", *more)) == 2
    told = capsys.readouterr()
    assert said in told.err and "Traceback" not in told.err and "\x1b" not in told.err and not told.out


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--multiplier", "nan"], "wanted finite numbers"),
        (["--multiplier", "0"], "is the unsteered model"),
        (["--output", "receipt.txt"], "ends in .md"),
        (["--output", "folder.md"], "no folder"),
        (["--prefix", "empty.txt"], "is empty"),
        (["--advbench", "rows.csv"], "has none of the columns goal; columns found: prompt, type"),
        (["--xstest", "rows.csv"], "has no row of the kind"),
        (["--behaviour", "se"], "unknown behaviour 'se'; did you mean 'sea'"),
    ],
)
def test_wrong_words_of_a_receipt_are_told_before_anything_is_loaded(
    base: families.Base, tmp_path: Path, more: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder.md").mkdir()
    Path("empty.txt").write_text("\n")
    Path("rows.csv").write_text("prompt,type\na,contrast_homonyms\n")
    assert cli.main(words(base, "receipt", "--behaviour", "sea", *more)) == 2
    assert said in (told := capsys.readouterr()).err and "Traceback" not in told.err and not told.out


@pytest.mark.parametrize("how", ["truncated", "wrong shape"])
def test_a_vector_file_that_is_none_is_named(base: families.Base, tmp_path: Path, how: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "layer_2.pt"
    torch.save(torch.ones(families.HIDDEN + (how == "wrong shape")), path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:100])
    given = ["--base_dir", str(base.path), "--model_name", base.model, "--device", "cpu", "--steering", str(path)]
    Path(tmp_path / "p.txt").write_text("one\n")
    assert cli.main(["strength", *given, "--prompts_file", str(tmp_path / "p.txt")]) == 2
    assert "Traceback" not in (said := capsys.readouterr().err) and ("layer_2.pt" in said or "has shape [33]" in said)


def test_a_fit_says_whether_the_pairs_agree(base: families.Base, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    record = json.loads(next((base.path / "vectors" / base.model / "caa").rglob("layer_2.manifest.json")).read_text())
    assert record["notes"]["direction"]["n"] == 8 and set(record["notes"]["direction"]) == {"n", "cosine", "held_out", "auc", "p"}
    mixed = [{"question": f"is {i} odd?", "matching": (" yes", " no")[i % 2], "not_matching": (" no", " yes")[i % 2]} for i in range(16)]
    families.write_jsonl(tmp_path / "mixed.jsonl", mixed)
    train = ["--train", str(tmp_path / "mixed.jsonl"), "--model_name", base.model, "--base_dir", str(base.path), "--device", "cpu"]
    fit = ["--method", "sft", "--intervention_method", "vector", "--layers", "2", "--mode", "generate", "--dtype", "float32", "--quiet"]
    assert cli.main([*train, *fit]) == 0
    assert "no direction to be seen: the differences of 16 pairs" in caplog.text


def test_a_strength_at_which_the_model_breaks_down_is_told_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other prompts may break down where those that were calibrated on did not."""
    from spilt import api
    from spilt.api import measuring
    from spilt.errors import NotFinite

    measured = api.divergences

    def broken(strengths: Any) -> Any:
        raise NotFinite("scores are not finite")

    def breaks(model: Any, tokenizer: Any, value: Any, prompts: Any, **how: Any) -> Any:
        return broken if prompts == ["other"] else measured(model, tokenizer, value, prompts, **how)

    monkeypatch.setattr(measuring, "divergences", breaks)
    table = api.calibrate(families.model("qwen2"), families.tokenizer(), steering(), ["abc"], 0.3, audit=["other"], max_new_tokens=2)
    assert np.isinf(table["audit_kl_p95"]).all() and np.isfinite(table["kl_p95"]).all()
