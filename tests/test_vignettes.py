"""Vignettes: what is read and refused, and the probabilities of true and false against a loop over the library's own forward."""

from __future__ import annotations

import json
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import families
import numpy as np
import pandas
import pytest
import torch
from torch import nn

import spilt
from spilt.data.sources import Record
from spilt.engine import whole
from spilt.errors import UserError
from spilt.steering.interventions import Vector
from spilt.steering.nonlinear import Angular
from spilt.steering.steering import Site, Steering
from spilt.vignettes import files
from spilt.vignettes.evaluate import evaluate, verdicts
from spilt.vignettes.files import CONDITIONS, FOUNDATIONS, Vignette, checked, local, read
from spilt.vignettes.questions import COLUMNS, FRAMES, WRONG, turns

WORDS = (" true", " false", "true", "False", '"1"', "0")
SCENES = [
    Vignette("a", "other_violate", "Care", "You see a man kicking a dog."),
    Vignette("a", "self_violate", "Care", "You kick a dog."),
    Vignette("b", "other_violate", "Authority", "You see a pupil shouting at the teacher."),
]


@cache
def tokenizer() -> Any:
    made = families.tokenizer()
    made.add_tokens(list(WORDS))
    return made


@cache
def model(family: str) -> nn.Module:
    return families.build(family, seed=4, vocab_size=families.VOCAB + len(WORDS))


def steering(layer: int = 2) -> Steering:
    made = Vector.from_direction(torch.randn(families.HIDDEN, generator=torch.Generator().manual_seed(1)))
    return Steering([(Site(layer), made.eval().requires_grad_(False))])


# ---------------------------------------------------------------- files


def test_those_that_come_with_the_package() -> None:
    """Seven foundations, four each, both conditions; the texts are all different, the numbers marked as invented."""
    scenes = read()
    assert len(scenes) == 56 == len({scene.text for scene in scenes})
    for condition in CONDITIONS:
        some = [scene for scene in scenes if scene.condition == condition]
        assert {name: sum(scene.foundation == name for scene in some) for name in FOUNDATIONS} == dict.fromkeys(FOUNDATIONS, 4)
        begins = "You see " if condition == "other_violate" else "You "
        assert all(scene.text.startswith(begins) and scene.text.endswith(".") and len(scene.text) < 120 for scene in some)
        rows = [json.loads(line) for line in (files.SHIPPED / f"{condition}.jsonl").read_text().splitlines()]
        assert all(row["synthetic"] is True for row in rows)
    assert all(1 <= scene.wrong <= 5 and max(scene.loadings) == scene.loadings[FOUNDATIONS.index(scene.foundation)] for scene in scenes)
    assert "**invented**" in (files.SHIPPED / "README.md").read_text()


def row(**changes: Any) -> dict[str, Any]:
    loadings = {f"calibrated_{name.replace(' ', '')}": 10.0 for name in FOUNDATIONS}
    values = {"id": "x", "foundation": "Care", "foundation_coarse": "Care", "wrong": 3.0, "text": "You see it.", **loadings, **changes}
    return {name: value for name, value in values.items() if value is not ...}


def of(*rows: dict[str, Any]) -> list[Vignette]:
    return checked([Record(n, f"line {n + 1}", values) for n, values in enumerate(rows)], CONDITIONS[0], "here")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(text="  ")], "line 1: text is '  '; wanted a text; columns found: id"),
        ([row(id=None)], "line 1: id is None"),
        ([row(), row()], "line 2: id 'x' is there twice"),
        ([row(foundation_coarse="Cares")], "unknown foundation 'Cares'; did you mean 'Care'"),
        ([row(wrong=7)], "line 1: wrong is 7; wanted a number from 1 to 5"),
        ([row(wrong=float("nan"))], "wrong is nan"),
        ([row(wrong=True)], "wrong is True"),
        ([row(calibrated_Care=None)], "calibrated_Care missing beside calibrated_Sanctity"),
        ([row(calibrated_Care=-1)], "calibrated_Care is -1; wanted a number from 0 to 100"),
        ([row(**{f"calibrated_{name.replace(' ', '')}": 0 for name in FOUNDATIONS})], "are all 0"),
        ([row(), row(id="y", **{f"calibrated_{name.replace(' ', '')}": None for name in FOUNDATIONS})], "some rows have calibrated_"),
        ([], "other_violate has no rows"),
    ],
)
def test_a_row_that_is_not_of_the_schema_is_refused(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message.replace("*", r"\*")):
        of(*rows)


def test_later_columns_are_known_and_what_is_unknown_is_left_open() -> None:
    (one,) = of(row(foundation_coarse="social_norms"))
    assert one.foundation == "Social Norms" and one.loadings == (10.0,) * 7
    later = {name.replace("calibrated_", "human_"): value for name, value in row(foundation_coarse=..., wrong=..., id=7).items()}
    (two,) = of({**later, "human_wrong": 4.5})
    assert two == Vignette("7", CONDITIONS[0], "Care", "You see it.", 4.5, (10.0,) * 7)
    (bare,) = of({"id": "z", "foundation": "liberty", "text": "You see it."})
    assert bare.loadings == () and bare.wrong != bare.wrong


def folder(at: Path, header: str = "", other: list[dict[str, Any]] | None = None) -> Path:
    at.mkdir(exist_ok=True)
    both = [row(id="p"), row(id="q", foundation_coarse="Liberty")]
    families.write_jsonl(at / "o.jsonl", both)
    families.write_jsonl(at / "s.jsonl", both[::-1] if other is None else other)
    splits = "  - {split: other_violate, path: o.jsonl}\n  - {split: self_violate, path: [s.jsonl]}\n"
    header = header or f"configs:\n- config_name: c\n  data_files:\n{splits}"
    (at / "README.md").write_text(f"---\n{header}---\n\nwords\n")
    return at


@pytest.mark.long
def test_a_folder_is_joined_on_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    scenes = read(folder(tmp_path / "a"), "c")
    assert [(one.id, one.condition) for one in scenes] == [(n, c) for n in "pq" for c in CONDITIONS] and not caplog.text
    assert len(read(folder(tmp_path / "b", other=[row(id="q", foundation_coarse="Liberty"), row(id="r")]), "c")) == 2
    assert "2 are left out" in caplog.text
    about_another = [row(id="p", foundation_coarse="Loyalty")]
    for n, (other, message) in enumerate((([row(id="r")], "no id is in both"), (about_another, "is about Care and"))):
        with pytest.raises(UserError, match=message):
            read(folder(tmp_path / f"c{n}", other=other), "c")


def test_a_folder_that_is_not_one(tmp_path: Path) -> None:
    at = folder(tmp_path / "a")
    with pytest.raises(UserError, match="unknown config.*'d'.*have: c"):
        local(at, "d", "other_violate")
    with pytest.raises(UserError, match="unknown split.*'test'.*other_violate"):
        local(at, "c", "test")
    for header, message in (
        ("configs: [", "cannot be read"), ("a: b\n", "has no `configs`"), ("configs: [1]\n", "has no `configs`"),
        ("configs:\n- config_name: c\n  data_files:\n  - {split: s, path: ../x.jsonl}\n", "not in the folder"),
        ("configs:\n- config_name: c\n  data_files:\n  - {split: s, path: 3}\n", "has the path 3"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            local(folder(tmp_path / "b", header), "c", "s")
    with pytest.raises(UserError, match="cannot be read"):
        local(tmp_path, "c", "s")
    with pytest.raises(UserError, match="no such folder"):
        read(tmp_path / "nowhere", "c")
    if find_spec("datasets") is None:
        with pytest.raises(UserError, match="pip install datasets"):
            read("somebody/vignettes", "c")


@pytest.mark.skipif(find_spec("datasets") is None, reason="the datasets library is not installed here: pip install datasets")
@pytest.mark.long
def test_the_library_reads_the_same(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    for source, config in ((files.SHIPPED, files.CONFIG), (folder(tmp_path / "a"), "c")):
        theirs = read(source, config)
        with monkeypatch.context() as patched:
            patched.setattr(files, "find_spec", lambda name: None)
            assert read(source, config) == theirs
    with pytest.raises(UserError, match="synthetic"):
        read(files.SHIPPED, "other")


# ---------------------------------------------------------------- asking


def by_hand(net: nn.Module, scene: Vignette, frame: str, system: str = "") -> tuple[float, float]:
    """p_true and mass of one text, by the library's own template, tokenizer and forward."""
    (_, asked) = turns(scene, frame)[-1]
    words = f"{system}\n\n{asked}" if system else asked  # this template has no system role
    text = tokenizer().apply_chat_template([{"role": "user", "content": words}], tokenize=False, add_generation_prompt=True)
    ids = tokenizer()(text + f'{{"{frame}":', add_special_tokens=False, return_tensors="pt").input_ids
    with torch.no_grad():
        p = net(ids).logits[0, -1].double().softmax(-1)
    said = [tokenizer().decode([i]).strip(" \"'").lower() for i in range(len(p))]
    true, false = (sum(float(p[i]) for i, word in enumerate(said) if word in some) for some in (("true", "1"), ("false", "0")))
    return true / (true + false), true + false


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_probabilities_are_those_of_a_loop_over_the_library(family: str) -> None:
    net = model(family)
    found = evaluate(net, tokenizer(), SCENES, batch_size=4)
    assert list(found.columns) == COLUMNS and len(found) == len(SCENES) * len(FRAMES)
    for _, one in found.iterrows():
        scene = next(s for s in SCENES if (s.id, s.condition) == (one["id"], one["condition"]))
        want = by_hand(net, scene, one["frame"])
        assert (one["p_true"], one["mass"]) == pytest.approx(want, rel=1e-4) and one["foundation"] == scene.foundation
    assert found["p_true"].nunique() == len(found)
    behind = evaluate(net, tokenizer(), SCENES[:1], system_prompt="Be kind.")
    assert behind["p_true"][0] == pytest.approx(by_hand(net, SCENES[0], WRONG, "Be kind.")[0], rel=1e-4)
    assert behind["p_true"][0] != pytest.approx(found["p_true"][0], rel=1e-3)


@pytest.mark.parametrize("engine", ["fast", "plain"])
def test_each_row_has_its_own_multiplier(engine: str) -> None:
    """Several at once, in small batches, is one after the other by hooks alone."""
    net, value = model("llama"), steering()
    found = evaluate(net, tokenizer(), SCENES, value, [-2.0, 0.0, 1.5], batch_size=5, engine=engine)
    for m, rows in found.groupby("multiplier"):
        for _, one in rows.iterrows():
            scene = next(s for s in SCENES if (s.id, s.condition) == (one["id"], one["condition"]))
            with whole.steer(net, value.to(net), float(m)):  # type: ignore[arg-type]
                assert (one["p_true"], one["mass"]) == pytest.approx(by_hand(net, scene, one["frame"]), rel=1e-3)
    alone = evaluate(net, tokenizer(), SCENES, value, np.float32(1.5), batch_size=5, engine=engine)  # type: ignore[arg-type]
    pandas.testing.assert_frame_equal(alone, found[found["multiplier"] == 1.5].reset_index(drop=True), rtol=1e-3)
    base = evaluate(net, tokenizer(), SCENES)
    assert found[found["multiplier"] == 0]["p_true"].to_numpy() == pytest.approx(base["p_true"].to_numpy(), rel=1e-4)


def test_at_zero_a_steering_acts_and_none_does_not() -> None:
    made = Angular({"first": torch.randn(families.HIDDEN), "second": torch.randn(families.HIDDEN)}).eval().requires_grad_(False)
    net, value = model("llama"), Steering([(Site(2), made)])
    base, zero = evaluate(net, tokenizer(), SCENES), evaluate(net, tokenizer(), SCENES, value, 0.0)
    plain = evaluate(net, tokenizer(), SCENES, value, 0.0, engine="plain")
    assert abs(zero["p_true"] - base["p_true"]).max() > 1e-4 > abs(zero["p_true"] - plain["p_true"]).max()


def test_words_are_all_tokens_that_say_them() -> None:
    said = verdicts(tokenizer(), families.VOCAB + len(WORDS))
    told = [{tokenizer().decode([i]) for i in some} for some in said]
    assert told == [{" true", "true", '"1"', "1"}, {" false", "False", "0"}]
    assert max(map(int, [*verdicts(tokenizer(), 300).true, 0])) < 300


def test_what_cannot_be_asked_is_refused() -> None:
    net = model("llama")
    with pytest.raises(UserError, match="writes 'true' as ' ' 't' 'r' 'u' 'e': no single token"):
        evaluate(net, families.tokenizer(), SCENES)
    cut = families.tokenizer()
    cut.add_tokens(list(WORDS))
    original = cut._encode_plus
    cut._encode_plus = lambda *args, **kwargs: {name: value[:40] for name, value in original(*args, **kwargs).items()}
    with pytest.raises(UserError, match="do not end in '{\"is_wrong\":'; does the tokenizer cut texts"):
        evaluate(net, cut, SCENES)
    with pytest.raises(UserError, match="beyond the model's context of 512; leave it out"):
        evaluate(net, tokenizer(), [SCENES[0]._replace(text="You see " + "a dog " * 90 + ".")])
    for scenes, value, m, message in (
        ([], None, 0.0, "0 vignettes"), (SCENES, steering(), [], "0 multipliers"), (SCENES, steering(), [1.0, 1.0], "each once"),
        (SCENES, None, [0.0, 1.0], "of the unsteered model one"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            evaluate(net, tokenizer(), scenes, value, m)
    net.train()
    try:
        with pytest.raises(UserError, match="training mode"):
            evaluate(net, tokenizer(), SCENES)
    finally:
        net.eval()


def test_a_template_that_thinks_is_asked_not_to() -> None:
    asked = "{{ '<turn>model\\n' }}"
    think = "{% if enable_thinking is not defined or enable_thinking %}{{ '<think>' }}{% endif %}"
    thinking = families.TEMPLATE.replace(asked, asked + think)
    other = families.tokenizer(thinking)
    other.add_tokens(list(WORDS))
    found = evaluate(model("llama"), other, SCENES[:1])
    assert found["p_true"].tolist() == pytest.approx(evaluate(model("llama"), tokenizer(), SCENES[:1])["p_true"].tolist())
    assert "<think>" in other.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False, add_generation_prompt=True)


@pytest.mark.long
def test_the_readme_s_lines_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a tiny model, whose scores are near random: most cells are below the floor, and the tables say so."""
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    section = text[text.index("## Moral vignettes") : text.index("## Your own model")]
    block = section[section.index("```\n") + 4 :].split("```")[0]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "read", lambda whole=files.read: whole()[:28])  # half of them
    pairs = [(row["question"], row["matching"], row["not_matching"]) for row in families.pairs(4)]
    names = {"spilt": spilt, "pandas": pandas, "Path": Path, "model": model("llama"), "tokenizer": tokenizer(), "answers": pairs}
    exec(compile(block, "README", "exec"), {**names, "prompts": ["abc"], "layer": 2})
    assert "| spherical |" in (tmp_path / "out" / "tables.md").read_text() and "(0/8)" in (tmp_path / "out" / "tables.md").read_text()
