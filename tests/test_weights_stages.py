"""Parts of `spilt weights` alone: masks under odd templates, a judge, own adapters, what dw makes, early stop, arms by weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest
import torch
import weights_base as small

from spilt import judges
from spilt.engine import train as training
from spilt.engine import whole
from spilt.errors import UserError
from spilt.settings import FitSettings
from spilt.steering.steering import Steering
from spilt.weight_steering import arms, data, flags, make_arms, measured, personas, strengths, train
from spilt.weight_steering.stage import Context
from spilt.weights import adapters, arithmetic
from spilt.weights import training as weights
from spilt.weights.validation import Validation

MOST_STEPS = ["--max-steps", "2", "--validation", "0"]


def context(base: families.Base, stage: str = "run", *more: str) -> Context:
    import argparse

    parser = argparse.ArgumentParser()
    flags.add_to(parser)
    return Context(flags.settings(parser.parse_args(small.words(base, stage, *more)[1:])))


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> families.Base:
    """Answers alone."""
    base = small.make(tmp_path_factory.mktemp("weights") / "base")
    assert small.run(base, "data") == 0
    return base


def copied(base: families.Base, to: Path) -> families.Base:
    import shutil

    return families.Base(Path(shutil.copytree(base.path, to / "copy")))


def test_a_template_that_rewrites_the_assistants_turn_has_no_say(answered: families.Base) -> None:
    """Its prompt is no token prefix of the whole conversation; what is scored are the drawn tokens all the same, and nothing else."""
    run = context(answered)
    rows = data.read(run, personas.TRAIN)
    tokenizer = copy.deepcopy(run.host.tokenizer)
    tokenizer.chat_template = (  # asks with an open thinking block, and writes no block into a turn that is there
        "{{ bos_token }}{% for m in messages %}{{ '<turn>' + m['role'] + m['content'] + '<end>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<turn>assistant<think>' }}{% endif %}"
    )
    run.__dict__["host"] = run.host._replace(tokenizer=tokenizer)
    turns = [{"role": "user", "content": rows[0]["prompt"]}]
    asked = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    both = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": "x"}], tokenize=False)
    assert not both.startswith(asked)
    for row, one in zip(rows, data.sequences(run, rows, "pos"), strict=True):
        assert list(one.input_ids[one.prompt_length :]) == row["tokens_pos"]
        text = asked.replace(rows[0]["prompt"], row["prompt"])
        assert list(one.input_ids[: one.prompt_length]) == tokenizer(text, add_special_tokens=False)["input_ids"]
    (cut,) = data.sequences(run, rows[:1], "pos", len(data.sequences(run, rows[:1], "pos")[0].input_ids) - 2)
    assert list(cut.input_ids[cut.prompt_length :]) == rows[0]["tokens_pos"][:-2]
    with pytest.raises(UserError, match="leaves no room for an answer: raise --max-length 3"):
        data.sequences(run, rows, "pos", 3)


class Said(judges.Judge):
    """Rates an answer by its length; of some nothing can be had."""

    def _ask(self, prompts: Mapping[str, Any], parameters: Mapping[str, Any]) -> Any:
        for number, key in enumerate(prompts):
            yield key, judges.Reply("no idea" if number == 0 else f"Rating: {2 if number % 3 else 1}")


def test_a_judge_keeps_the_pairs_that_show_their_persona(answered: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both answers need the rating; a pair without one is left out and counted."""
    run = context(answered)
    run.words |= {"judge": "stand-in"}
    monkeypatch.setattr(judges, "judge_of", lambda *_: Said("stand-in"))
    rows = [dict(row, response_pos=f"{row['response_pos']}{i}", response_neg=f"{row['response_neg']}{i}") for i, row in enumerate(
        json.loads(line) for line in (small.folder(answered) / "answers.jsonl").read_text().splitlines()
    )]  # fmt: skip
    kept, notes = data._judged(rows, run)
    wanted = [i for i in range(len(rows)) if i and (2 * i) % 3 and (2 * i + 1) % 3]
    assert [rows.index(row) for row in kept] == wanted
    assert notes["unrated"] == 1 and notes["off_behaviour"] == len(rows) - 1 - len(wanted) and notes["judge"] == "stand-in"


def test_ratings_that_could_not_be_had_are_asked_for_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A judge that is away for a moment: nothing is stored of fewer pairs; the same command asks for what is missing alone."""
    base, asked, away = small.make(tmp_path / "base"), list[int](), [True]

    class Away(judges.Judge):
        def _ask(self, prompts: Mapping[str, Any], parameters: Mapping[str, Any]) -> Any:
            asked.append(len(prompts))
            for number, key in enumerate(prompts):
                lost = away[0] and number % 4 == 0
                yield (
                    key,
                    judges.Reply(None, "timed out", again=True)
                    if lost
                    else json.dumps({"choices": [{"message": {"content": f"Rating: {1 + (number > 1)}"}, "finish_reason": "stop"}]}),
                )

    monkeypatch.setattr(judges, "name_of", lambda *_: "stand-in")
    monkeypatch.setattr(judges, "judge_of", lambda word, base_dir, kept, *_: Away("stand-in", kept))
    assert small.run(base, "data", "--judge", "stand-in") == 2
    said = capsys.readouterr().err
    assert "ratings could not be had; the same command asks for these again" in said and "timed out" in said
    assert not (small.folder(base) / "answers.jsonl").exists()
    away[0] = False
    assert small.run(base, "data", "--judge", "stand-in") == 0
    assert asked[1] == -(-asked[0] // 4) and (small.folder(base) / "answers.jsonl").is_file()


@pytest.mark.parametrize("kind", ["ia3", "pissa", "dora"])
@pytest.mark.few(1)
def test_other_adapters_are_dense(answered: families.Base, kind: str, tmp_path: Path) -> None:
    """Trained, stored as PEFT folders that its own loader reads, and dW is the difference of what they merge to."""
    base = copied(answered, tmp_path)
    more = ["--adapter", kind, "--modules", "down_proj", *MOST_STEPS]
    assert small.run(base, "adapters", *more) == 0
    assert small.run(base, "dw", "--adapter", kind, "--methods") == 0
    dW = Steering.load(small.folder(base) / "arms" / f"{kind}.safetensors")
    assert set(dW.forms) == {"local_weight"} and dW.layers == (1, 3)
    from peft import PeftModel

    states = []
    for side in ("pos", "neg"):
        model = context(base).host.model
        folder = small.folder(base) / "adapters" / kind / side
        states.append(PeftModel.from_pretrained(model, folder).merge_and_unload().state_dict())
    for site, made in dW:
        name = f"model.layers.{site.layer}.mlp.down_proj.weight"
        assert torch.allclose(states[0][name] - states[1][name], made.update().T, atol=2e-6)


@pytest.mark.long
def test_own_adapters_and_what_is_made_of_them(answered: families.Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--pos and --neg; each option is the arithmetic of its name; one name, one result."""
    base = copied(answered, tmp_path)
    assert small.run(base, "adapters", *MOST_STEPS) == 0
    folder = small.folder(base)
    own = ["--methods", "--pos", str(folder / "adapters" / "lora" / "pos"), "--neg", str(folder / "adapters" / "lora" / "neg")]
    run = context(base)
    pos, neg = (adapters.read(run.host.model, folder / "adapters" / "lora" / side) for side in ("pos", "neg"))
    dW = arithmetic.difference(pos, neg)
    wanted = {
        "plain": ([], dW),
        "both": (["--mode", "bisector"], arithmetic.bisector(pos, neg)),
        "up": (["--mode", "tau_pos"], pos),
        "down": (["--mode", "tau_neg"], neg * -1.0),
        "turned": (["--scale", "-2"], dW * -2.0),
        "part": (["--keep-layers", "3", "--keep-modules", "q_proj"], arithmetic.part(dW, [3], ["q_proj"])),
        "twice": (["--add", str(folder / "arms" / "plain.safetensors")], dW * 2.0),
    }
    for name, (more, made) in wanted.items():
        assert small.run(base, "dw", *own, "--name", name, *more) == 0
        found = Steering.load(folder / "arms" / f"{name}.safetensors")
        assert arithmetic.norm(arithmetic.combined(found - made)) <= 1e-5 * arithmetic.norm(made)
        assert [site for site, _ in found] == [site for site, _ in made]
    capsys.readouterr()
    assert small.run(base, "dw", *own, "--name", "plain", "--mode", "bisector") == 2
    assert 'mode "dw" (now "bisector")' in capsys.readouterr().err
    assert small.run(base, "dw", *own, "--name", "caa") == 2 and "is that of a method" in capsys.readouterr().err
    assert small.run(base, "dw", *own, "--name", "none", "--bias-only") == 2
    assert small.run(base, "dw", *own[:-1], str(tmp_path), "--name", "other") == 2 and "is no PEFT adapter" in capsys.readouterr().err
    equal = [*own[:-1], own[2]]
    assert small.run(base, "dw", *equal, "--name", "zero") == 2 and "both adapters are the same" in capsys.readouterr().err


def job(model: Any, held: Any, settings: FitSettings, texts: Sequence[Any]) -> weights.Fit:
    return weights.Fit(model, held, [text for text in texts for _ in (0, 1)], settings, families.PAD)


def test_early_stop_gives_the_best_and_goes_on_the_same(answered: families.Base) -> None:
    """Against a loop that looks after each step; a fit that is resumed from any state ends as the whole one."""
    import peft

    run = context(answered, "run", "--lr", "0.3", "--epochs", "3")
    texts = data.sequences(run, data.read(run, personas.TRAIN), "pos")
    s, model = train.settings_of(run, "lora"), run.host.model
    places = adapters.maps(model, s.layers, s.modules or (), "lora")

    def fitted(resume: Any = None, most: int | None = None, watched: bool = True) -> tuple[list[Any], Any, list[Any], float]:
        states: list[Any] = []
        made = adapters.config(model, "lora", places, adapters.Sizes(2, 4.0))
        with weights.adapter_in(model, lambda: peft.get_peft_model(model, made), 0) as held:
            own = job(model, held, s, texts[:8])
            watch = Validation(model, own.intervention, texts[8:], families.PAD, 1, 2) if watched else None
            keep = {"checkpoint": lambda state: states.append(copy.deepcopy(state()))}
            rows = training.fit(own, resume=copy.deepcopy(resume), watch=watch, most=most, **keep)
            if watch is not None:
                watch.best()
            with torch.no_grad():
                scored = [whole.score(model, None, 0.0, [text], families.PAD) for text in texts[8:]]
            loss = float(np.mean([-float(one.total / one.tokens) for one in scored]))
            return rows, {k: v.clone() for k, v in own.intervention.state_dict().items()}, states, loss

    rows, best, states, loss = fitted()
    looked = [row["validation"] for row in rows]
    at = int(np.argmin(looked))
    assert len(rows) == at + 3 < 6 and loss == pytest.approx(min(looked), rel=1e-4)  # two looks later
    for state in states:
        again = fitted(resume=state)
        assert again[0] == rows and all(torch.equal(again[1][name], best[name]) for name in best)
    short, *_ = fitted(most=4, watched=False)  # lr rises over half of them at most, and falls over the rest
    assert [row["lr"] / s.lr for row in short] == pytest.approx([0.5, 1, 1, 0.5])


def test_an_arm_by_weights_is_the_arm_by_hooks(answered: families.Base, tmp_path: Path) -> None:
    """Answers, divergence and losses; the model's weights are as before, bit by bit."""
    base = copied(answered, tmp_path)
    assert small.run(base, "adapters", *MOST_STEPS) == 0 and small.run(base, "dw") == 0
    run = context(base)
    before = {name: value.clone() for name, value in run.host.model.state_dict().items()}
    arm = arms.stored(run, "lora")
    assert arm.weights and not arms.stored(run, "caa").weights
    asked = strengths.questions(run)
    rows = data.read(run, personas.AUDIT)
    texts = data.sequences(run, rows, "pos")
    by_weights = arm.divergence(asked["calibration"], 0.7, 4), arm.losses(texts, 0.7)
    arm.inside = False  # then it goes by hooks
    assert not arm.weights
    by_hooks = arm.divergence(asked["calibration"], 0.7, 4), arm.losses(texts, 0.7)
    pd.testing.assert_frame_equal(by_weights[0], by_hooks[0], atol=1e-4)
    assert np.allclose(by_weights[1], by_hooks[1], atol=1e-4) and not np.allclose(by_weights[1], arm.losses(texts, 0.0), atol=1e-3)
    assert all(torch.equal(value, before[name]) for name, value in run.host.model.state_dict().items())


@pytest.mark.long
def test_questions_that_look_alike_to_the_model_are_one(answered: families.Base, tmp_path: Path) -> None:
    """Distinct texts that a template renders alike; none of calibration is in the audit."""
    words = {"train": "ab", "calibration": "cde", "audit": "fg"}
    rows = [{"cat": "a", "split": split, "user_msg": f"{word}?"} for split, some in words.items() for word in some]
    twins = [{"cat": "a", "split": "audit", "user_msg": "c?\u200b"}, {"cat": "a", "split": "calibration", "user_msg": "d?\u200b"}]
    file = tmp_path / "q.json"
    file.write_text(json.dumps([*rows, *twins]))
    base = small.make(tmp_path / "base")
    assert small.run(base, "data", "--questions", str(file)) == 0
    run = context(base)
    template = run.host.tokenizer.chat_template
    run.host.tokenizer.chat_template = template.replace("message['content']", "(message['content'] | replace('\u200b', ''))")
    found = strengths.questions(run)
    assert found["counts"] == {"prompts": 3, "audit_prompts": 2, "duplicates": 2}
    assert not set(found["calibration"]) & set(found["audit"])
    assert run.questions("audit")[-1].text == "c?\u200b"


@pytest.mark.long
def test_vignettes_are_those_that_were_asked_about(answered: families.Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a folder that was edited they are asked again; the stage table, which takes no --vignettes, has those of the evaluation."""
    import shutil

    from spilt.vignettes import files

    base, own = copied(answered, tmp_path), tmp_path / "scenes"
    shutil.copytree(files.SHIPPED, own)
    asked: list[list[str]] = []

    def told(run: Context, name: str, at: Sequence[float], scenes: Sequence[files.Vignette]) -> pd.DataFrame:
        asked.append([one.text for one in scenes])
        return pd.DataFrame({"id": [one.id for one in scenes], "multiplier": 0.0})

    monkeypatch.setattr(measured, "_vignettes", told)
    monkeypatch.setattr(strengths, "names_of", lambda run: [])  # unsteered alone
    flags_of = ["--vignettes", str(own), "--limit", "3"]

    def evaluate() -> Context:
        run = context(base, "evaluate", *flags_of)
        measured.make(run)
        return run

    first = evaluate()
    evaluate()
    assert len(asked) == 1 and len(asked[0]) == 6
    table = context(base, "table")
    assert measured.scenes(table) == files.read(own)[:6]
    for file in own.glob("*.jsonl"):
        file.write_text(file.read_text().replace("stray dog", "tin can").replace('"wrong": 4.', '"wrong": 1.'))
    assert [one.text for one in measured.scenes(table)] == asked[0] != [one.text for one in files.read(own)[:6]]
    path = first.folder.measured("unsteered", "vignettes")
    measured._asked(context(base, "evaluate", *flags_of))
    with pytest.raises(UserError, match="was made of another .*scenes.json"):  # killed between the two
        table.use(path)
    evaluate()
    assert len(asked) == 2 and asked[1] == [one.text for one in files.read(own)[:6]]
    assert measured.scenes(table) == files.read(own)[:6] and table.use(path) == path


def test_arms_of_different_budgets_are_in_no_table(answered: families.Base, tmp_path: Path) -> None:
    """Also not after a kill of calibrate --force: `equal KL` is of one budget."""
    from spilt.weight_steering import tables

    base = copied(answered, tmp_path)
    for name, kl in (("caa", 0.3), ("pca", 0.1)):
        run = context(base, "calibrate", "--target-kl", str(kl))
        run.folder.arm(name).parent.mkdir(exist_ok=True)
        run.store(run.folder.arm(name), b"an arm", run.parts("dw", [], {}), {"kind": "vector"})
        _, parts = strengths._inputs(run, name)
        run.store(run.folder.strengths(name), json.dumps({"target_p95": kl, "sides": []}), parts)
    with pytest.raises(UserError, match=r"caa.json: was found with target_kl 0.3 \(pca: 0.1\), so they are not at equal KL"):
        tables.make(context(base, "table"))
    run = context(base, "calibrate", "--target-kl", "0.1")  # caa comes first; nothing of pca is touched either
    before = small.contents(base)
    with pytest.raises(UserError, match=r"caa.json: was made with target_kl 0.3 \(now 0.1\)"):
        strengths.make(run)
    with pytest.raises(UserError, match=r"pca.json: was made with target_kl 0.1 \(now 0.3\)"):
        strengths.make(context(base, "calibrate", "--target-kl", "0.3"))
    assert small.contents(base) == before
    run.folder.strengths("caa").unlink()
    with pytest.raises(UserError, match=r"pca.json: was made with target_kl 0.1 \(now 0.2\)"):  # not: after caa has got one of its own
        strengths.make(context(base, "calibrate", "--target-kl", "0.2"))
    assert not run.folder.strengths("caa").exists()


@pytest.mark.long
def test_vignettes_are_asked_of_every_arm(tmp_path: Path) -> None:
    """With a tokenizer that has true and false: each arm's rows are those of its own steering; tables of all; baselines of all kinds."""
    from test_vignettes import model, tokenizer

    from spilt.vignettes import evaluate, files

    base = small.make(tmp_path / "base")
    folder = base.path / "models" / base.model
    for old in folder.iterdir():
        old.unlink()
    model("qwen2").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    more = ["--vignettes", "own", "--limit", "3", "--max-steps", "2", "--methods", "caa", "directional_ablation", "sspace", "prompt"]
    assert small.run(base, "run", *more) == 0
    run, scenes = context(base, "run", *more), files.read()[:6]
    assert measured.scenes(run) == scenes
    told = {name: strengths.found(run, name) for name in strengths.names_of(run)}
    assert set(told) == {"caa", "directional_ablation", "lora", "prompt", "sspace"}
    assert {side["status"] for side in told["directional_ablation"]["sides"]} == {"not the identity at 0"}
    dW = Steering.load(run.folder.arm("lora"))
    plus, minus = strengths.alphas(told["lora"])
    found = pd.read_csv(run.folder.measured("lora", "vignettes"))
    wanted = evaluate.evaluate(run.host.model, run.host.tokenizer, scenes, dW, [-minus, plus], engine="plain")
    both = ["multiplier", "id", "condition", "frame"]
    pd.testing.assert_frame_equal(found.sort_values(both, ignore_index=True), wanted.sort_values(both, ignore_index=True), atol=1e-4)
    page = (run.folder.table("index.html")).read_text()
    assert "Surgical Informedness" in page and page.count("<img ") == 2
    told_of = pd.read_csv(run.folder.table("vignettes") / "delta.csv").groupby(["method", "arm"])["n_total"].sum()
    assert set(told_of) == {len(scenes)} and len(told_of) == 2 * len(told)


def test_bias_only_wants_constants() -> None:
    model = families.model("gpt2")
    from test_in_place import everywhere

    both = everywhere(model)
    words = {"mode": "tau_pos", "bias_only": True, "keep_layers": None, "keep_modules": None, "scale": 1.0, "add": None}
    made = make_arms._made(both, both * 2.0, words, None)  # type: ignore[arg-type]
    assert set(made.forms) == {"vector"} and arithmetic.norm(made) < arithmetic.norm(both)
