"""Chat templates come with the checkpoint: one that never ends gets a message, and one that writes the date makes another result each day.

`transformers` is the judge of what a template writes and which one a folder has.
"""

from __future__ import annotations

import json
import logging
import subprocess
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import families
import pytest

from spilt import cli, plan, verbs, verify
from spilt.artifacts import manifest
from spilt.errors import UserError
from spilt.model import identity, template

TURNS = families.TEMPLATE
DATED = "{{ 'Today: ' + strftime_now('%d %b %Y') + '\\n' }}" + TURNS
EVERY_MOMENT = DATED.replace("%d %b %Y", "%Y %f")  # a day that is over at once
FIT, APPLY = ("--mode", "generate", "--quiet"), ("--mode", "apply", "--multipliers", "1", "--quiet")


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    return families.make_base(tmp_path / "base", train=4)


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("spilt"), "propagate", True)


@pytest.fixture(autouse=True)
def stopped_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 2)


def write(base: families.Base, text: str) -> None:
    (base.path / "models" / base.model / "chat_template.jinja").write_text(text)


def run(base: families.Base, capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    template._look.cache_clear()  # as a new process
    capsys.readouterr()
    code = cli.main(words if "--verify" in words else base.argv("sft", "vector", *words))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out + err


def verified(base: families.Base) -> list[tuple[str, str]]:
    template._look.cache_clear()
    return [(found.state, found.reason) for found in verify.check(base.path)]


# ---------------------------------------------------------------- templates that do not end

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}"
BAD = {
    "nested loops": (LOOP, "was stopped"),
    "a number without end": ("{% set x = 10 ** (10 ** 10) %}" + TURNS, "was stopped"),
    "recursion": ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "calls itself without end"),
    "much memory": ("{{ 'x' * 10 ** 10 }}", "takes more than 1024 MiB"),
    "much text": ("{% for a in range(99999) %}{{ 'long ' * 9 }}{% endfor %}", "more than 100,000 characters"),
    "1/0": ("{{ 1 / 0 }}", "ZeroDivisionError"),
    "no such method": ("{{ messages[0].content.nope() }}", "nope"),
    "an attribute of Python": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "a type": ("{{ messages + 1 }}", "TypeError"),
    "no Jinja": ("{% for %}", "chat template"),
    "refuses": ("{{ raise_exception('closed') }}", "closed"),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("case", BAD)
def test_a_template_that_cannot_be_used_is_one_message(base: families.Base, capsys: pytest.CaptureFixture[str], case: str) -> None:
    text, needle = BAD[case]
    write(base, text)
    start = time.monotonic()
    code, said = run(base, capsys, *FIT)
    assert code == 2 and said.count("error:") == 1 and needle in said and "use_chat_template: false" in said, said
    assert time.monotonic() - start < 60
    code, said = run(base, capsys, *FIT, "--set", "use_chat_template=false")  # the way out is one
    assert code == 0, said


@pytest.mark.long
def test_a_template_is_tried_once_for_all_cells(base: families.Base, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    write(base, LOOP)
    tried: list[Any] = []
    real = subprocess.run
    monkeypatch.setattr(template.subprocess, "run", lambda *args, **more: tried.append(args) or real(*args, **more))
    template._look.cache_clear()
    assert cli.main(base.argv("sft", "all", *FIT)) == 2
    assert len(tried) == 1 and capsys.readouterr().err.count("was stopped") == 3


@pytest.mark.long
def test_a_dated_template_without_end_stops_a_dry_run_too(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    write(base, "{{ strftime_now('%d') }}" + LOOP)
    code, said = run(base, capsys, *FIT, "--dry_run")
    assert code == 2 and "was stopped" in said


# ---------------------------------------------------------------- as the library renders

OTHERS = (
    TURNS,
    "{{ bos_token }}{% for m in messages %}{% if loop.index > 5 %}{% break %}{% endif %}{{ m | tojson }}{{ m.content | trim }}{% endfor %}",
    "{% for m in messages %}\n  {% generation %}{{ m['content'] }}{{ eos_token }}{% endgeneration %}\n{% endfor %}{{ unk_token }}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{{ ns.n }}{{ m.role.title() }}{% endfor %}"
    "{% if tools is none and documents is none and add_generation_prompt %}ask{% endif %}{{ strftime_now is defined }}",
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ strftime_now('%Y') }}{{ messages[-1]['content'] }}",
)


@pytest.mark.parametrize("text", OTHERS)
def test_the_texts_are_those_of_the_library(text: str) -> None:
    tokenizer = families.tokenizer(text)
    found = template.look(text, tokenizer.special_tokens_map)
    assert len(found.texts) == 4 and not found.trouble
    compared = 0
    for (turns, ask), mine in zip(template.CASES, found.texts, strict=True):
        try:
            theirs = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=ask)
        except Exception as error:
            theirs = f"{type(error).__name__}: {error}"
        assert mine == theirs
        compared += 1
    assert compared == 4 and found.dated == ("strftime_now(" in text)


@pytest.mark.parametrize("layout", ["jinja", "config", "list", "named", "jinja over config", "none"])
def test_the_template_of_a_folder_is_the_one_that_the_library_takes(tmp_path: Path, layout: str) -> None:
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    families.tokenizer(None).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    if layout in ("config", "jinja over config"):
        config["chat_template"] = "from the config"
    if layout == "list":
        config["chat_template"] = [{"name": "default", "template": "from the list"}, {"name": "tool_use", "template": "tools"}]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    if layout in ("jinja", "named", "jinja over config"):
        (folder / "chat_template.jinja").write_text("from the file")
    if layout == "named":
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    mine, special = template.of_folder(folder)
    if tokenizer.chat_template:
        text = tokenizer.get_chat_template()
        assert (mine["default"] if isinstance(mine, dict) else mine) == text == {"none": None}.get(layout, text)
    else:
        assert layout == "none" and not mine
    assert {name: special[name] for name in ("bos_token", "eos_token", "pad_token")} == {
        name: tokenizer.special_tokens_map[name] for name in ("bos_token", "eos_token", "pad_token")
    }


# ---------------------------------------------------------------- the date


def test_what_a_dated_template_writes_is_part_of_the_identity(base: families.Base) -> None:
    def parts(**overrides: Any) -> dict[str, Any]:
        request = verbs.Request(
            base.one, "sft", base.model, "vector", mode="generate", base_dir=base.path, device="cpu", overrides=overrides
        )
        (step,) = plan.make(request).steps
        (found,) = verbs.output_parts(step, None, identity.Seen()).values()
        return found

    plain = parts()
    assert "template" not in plain
    write(base, DATED)
    assert [datetime.now().strftime("Today: %d %b %Y\n") in text for text in parts()["template"][:2]] == [True, True]
    assert "template" not in parts(use_chat_template=False)
    write(base, "{% if strftime_now is defined %}{% endif %}" + TURNS)  # the word alone is no date
    assert parts() == {**plain, "model": parts()["model"]}


def test_a_template_without_a_date_costs_a_plan_nothing(base: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template.subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    template._look.cache_clear()
    assert cli.main(base.argv("all", "all", "--mode", "both", "--dry_run")) == 0


@pytest.mark.long
def test_yesterdays_results_are_stale_and_made_again(
    base: families.Base, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write(base, EVERY_MOMENT)
    assert run(base, capsys, *FIT)[0] == 0
    assert [text for text in caplog.messages if "today's date" in text and "fixed date" in text and "strftime_now" in text]
    ((state, reason),) = verified(base)
    year = datetime.now().year
    assert (
        state == "stale"
        and "the chat template writes the date" in reason
        and f"('Today: {year} " in reason
        and f"now 'Today: {year}" in reason
    )
    assert "1 stale" in run(base, capsys, *FIT, "--dry_run")[1]
    code, said = run(base, capsys, *FIT)
    assert code == 0 and "already done" not in said
    caplog.clear()
    assert run(base, capsys, *APPLY)[0] == 0
    assert [text for text in caplog.messages if "today's date" in text]
    assert [state for state, _ in verified(base)] == ["stale", "stale"]


@pytest.mark.long
def test_on_the_same_day_and_with_a_fixed_date_it_is_already_done(
    base: families.Base, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write(base, DATED.replace("%d %b %Y", "%Y"))  # of this year: no midnight in the middle of this test
    assert run(base, capsys, *FIT)[0] == 0
    assert "already done" in run(base, capsys, *FIT)[1] and [state for state, _ in verified(base)] == ["ok"]
    caplog.clear()
    write(base, DATED.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'"))
    assert [reason for _, reason in verified(base)] == ["model tiny has changed"]
    assert run(base, capsys, *FIT)[0] == 0 and "already done" in run(base, capsys, *FIT)[1]
    assert not [text for text in caplog.messages if "date" in text]


@pytest.mark.long
def test_a_result_of_a_dated_template_without_its_text_is_stale(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """As versions before this one stored it: which day it was is not known."""
    write(base, DATED)
    assert run(base, capsys, *FIT)[0] == 0
    (about,) = base.path.glob("vectors/**/layer_2.manifest.json")
    record = json.loads(about.read_text())
    del record["parts"]["template"], record["record_sha256"]
    about.write_text(json.dumps({**record, "identity": manifest.identity(record["parts"])}))
    assert [(state, "writes the date" in reason) for state, reason in verified(base)] == [("stale", True)]


@pytest.mark.long
def test_check_names_the_way_out() -> None:
    with pytest.raises(UserError, match="use_chat_template: false"):
        template.check({"default": LOOP.replace("c in", "d in")}, {})
    assert template.check({"tool_use": LOOP}, {}) is False  # never rendered: no default, which the library tells
