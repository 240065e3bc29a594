"""A receipt as text and as a page, from its stored document (`spilt receipt`, FILE.json) alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from spilt.analysis.chosen import CHOSEN
from spilt.errors import printable

WAYS = {"first_token": "which of two answers is the likelier beginning"}
BAD = {True: "yes", False: "not seen", None: "–"}
Row = tuple[str, ...]


class Section(NamedTuple):
    """before, after: sentences around the table, whose first row is its heading."""

    heading: str
    before: Sequence[str] = ()
    table: Sequence[Row] = ()
    after: Sequence[str] = ()


def _shown(found: dict[str, Any], signed: bool = False) -> str:
    if found["value"] is None:
        return "–"
    sign = "+" if signed else ""
    ends = f" [{found['low']:{sign}.2f}, {found['high']:{sign}.2f}]" if found["low"] is not None else ""
    return f"{found['value']:{sign}.2f}{ends}"


def _range(told: dict[str, Any]) -> list[str]:
    """Which strengths work, and what ends it on either side."""
    if told["status"] != CHOSEN:
        return [f"{told['status']}: no strength within the limits shows it more than the unsteered model."]
    (inner, outer), unit = told["range"], told["unit"]
    said = [f"Chosen: m = {told['chosen']:.4g}, dose {abs(told['chosen']) * unit:.3g}. It works from m = {inner['works']:.4g} "
            f"to {outer['works']:.4g} (dose {abs(inner['works']) * unit:.3g} to {abs(outer['works']) * unit:.3g})."]  # fmt: skip
    for name, edge in (("weaker", inner), ("stronger", outer)):
        what = "No {0} one was tried." if edge["fails"] is None else "The next {0} one that was tried, m = {1:.4g}, does not work ({2})."
        said.append(what.format(name, edge["fails"] or 0.0, edge["why"]))
    return said


def sections(told: dict[str, Any], quoted: Callable[[str], str]) -> tuple[str, list[Section]]:
    """Title and parts; quoted: what is done to every text that is not ours."""
    behaviour, limits, checked, judge = told["behaviour"], told["limits"], told["checked"]["said"], told["judge"]
    rubric, lost = told["rubric"], told["unrated"]
    way = WAYS.get(behaviour["judge"], behaviour["judge"])
    if judge is not None:
        way = (
            f"the rubric {quoted(rubric['name'])}, at least {rubric['at_least']} of {rubric['scale'][1]}, as {quoted(judge['name'])} "
            f"rates; {lost['missing']} of {lost['of']} answers have no rating and are left out ({quoted(judge['asked'])})"
        )
    about = [
        f"Behaviour: {quoted(behaviour['name'])}{behaviour['about'] and ': '}{quoted(behaviour['about'])} (wanted: {behaviour['want']}).",
        f"Judged by: {way}; {checked}.",
        f"Layers {'+'.join(map(str, told['layers']))}; parameters {told['parameters'][:12]}; spilt {told['spilt']}; {told['created']}.",
    ]
    works = (
        f"Works: at least half of the largest gain, at most {limits['incoherent']:.0%} more incoherent answers than unsteered, at most "
        f"{limits['damage']:g} nats of KL per token on benign prompts; found on {told['prompts']['chosen_on']} prompts of the behaviour."
    )
    strengths = [
        (f"{row['multiplier']:.4g}", f"{row['dose']:.3g}", *(_shown(row[name]) for name in ("wanted", "incoherent", "kl")),
         f"{row['wanted']['n']}, {row['kl']['n']}")
        for row in told["strengths"]
    ]  # fmt: skip
    strengths += [
        (f"prompt: {quoted(row['name'])}", "–", *(_shown(row[name]) for name in ("wanted", "incoherent", "kl")),
         f"{row['wanted']['n']}, {row['kl']['n']}")
        for row in told.get("prompt_baselines", ())
    ]  # fmt: skip
    failures = [
        (row["failure"], row["of"], *(_shown(row[name]) for name in ("unsteered", "steered")), _shown(row["change"], True),
         str(row["steered"]["n"] or ""), BAD[row["bad"]],
         "; ".join(quoted(part) for part in (row["note"], checked if row["checked"] else "") if part))
        for row in told["failures"]
    ]  # fmt: skip
    samples = [row for row in told["texts"] if row["multiplier"] in (0.0, told["multiplier"])]
    prompts = list(dict.fromkeys(row["prompt"] for row in samples))[:3]
    behind = [row | {"by": f"prompt: {one['name']}"} for one in told.get("prompt_baselines", ()) for row in one["texts"]]
    answers = [
        (
            quoted(row["prompt"]),
            quoted(row["by"]) if "by" in row else f"{row['multiplier']:.4g}",
            row["verdict"] or "–",
            quoted(row["text"][:300]),
        )
        for row in (*samples, *behind)
        if row["prompt"] in prompts
    ]
    intervals = "95% intervals: Wilson (shares), Newcombe (paired changes), resampled prompts (means). Not seen is not: not there."
    nothing = "Nothing was chosen, so there is no strength to measure at; --multiplier M takes one."
    reported = f"On {told['prompts']['reported_on']} other prompts; judge: {checked}. An incoherent answer is never as wanted."
    if told.get("prompt_baselines"):
        reported += " Behind a prompt the model is unsteered, and KL is from the model without it."
    return f"Receipt: {quoted(told['vector'])} on {quoted(told['model'])}", [
        Section("", about),
        Section("In which range", _range(told), (), [works]),
        Section(
            "What it does",
            (),
            [("m", "dose", "as wanted", "incoherent", "KL on benign prompts, nats per token", "n"), *strengths],
            [reported],
        ),
        Section(
            "What it costs" + (f", at m = {told['multiplier']:.4g}" if told["multiplier"] else ""),
            () if failures else [nothing],
            [("failure", "measured", "unsteered", "steered", "change", "n", "bad", "how"), *failures] if failures else (),
            [intervals] if failures else (),
        ),
        Section("Some answers", (), [("prompt", "m", "verdict", "answer"), *answers]),
    ]


def _flat(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _cell(text: str) -> str:
    """Any text as one cell of a markdown table: no markup of its own, nothing that steers a terminal."""
    return re.sub(r"([\\`*_{}\[\]()<>#|!&~])", r"\\\1", printable(_flat(text)))


def markdown(told: dict[str, Any]) -> list[str]:
    """Lines."""
    title, parts = sections(told, _cell)
    out = [f"# {title}"]
    for part in parts:
        out += ["", f"## {part.heading}"] if part.heading else []
        rows = [part.table[0], ("---",) * len(part.table[0]), *part.table[1:]] if part.table else []
        for lines in (part.before, [f"| {' | '.join(row)} |" for row in rows], part.after):
            out += ["", *lines] if lines else []
    return out


def html(told: dict[str, Any]) -> str:
    """One page; the template escapes every text."""
    from spilt.report import page

    title, parts = sections(told, _flat)
    return page.render("receipt.html", title=title, parts=parts, version=told["spilt"])
