"""Stage table: what each method moved at equal KL, and what that did besides. From stored results alone; no model.

movement: preference P = L_neg - L_pos of held-out answers, in nats per token, P(m) - P(0); side effect: utility(m) - utility(0), the
log-odds of both answers together (spilt measure's). Paired over questions: each is resampled whole, with all its personas.
"""

from __future__ import annotations

import base64
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilt import __version__
from spilt.artifacts.atomic import atomic_write, sweep
from spilt.artifacts.weights import UNSTEERED
from spilt.terminal import say
from spilt.weight_steering import measured, strengths
from spilt.weight_steering.flags import PROMPT
from spilt.weight_steering.stage import Context, shown

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("spilt")
WAYS = {1: "+", -1: "−"}
MEASURES = ("movement", "side_effect")
TOLD = {"method": "", "m": ".4g", "kl_p95": ".3f", "kl": "", "movement": "", "side effect": "", "wins": ".0%", "n": ""}
NOTE = (
    "movement: preference of the + persona's answers over the − persona's on held-out questions, less the unsteered model's, nats per "
    "token; side effect: change of the log-odds of both answers together; 95% intervals over {n} questions, resampled {draws} times; wins: "
    "questions that moved the way that m says. {kl}"
)
WHERE = (
    "KL(steered || unsteered), p95 over tokens of its own answers, was set to {target:g} nat on other questions; prompts have no strength."
)


def make(run: Context) -> None:
    """movement.csv, tables.md, movement.svg, index.html; and the tables of the vignettes. Process 0 draws them."""
    run.team.on_main(lambda: _tables(run))


def _tables(run: Context) -> None:
    target = strengths.budget(run)
    table = movement(run)
    words = NOTE.format(n=int(table["n"].max()), draws=run.words["bootstrap_samples"], kl=WHERE.format(target=target))
    for row in table.to_dict("records"):
        if row["kl"] not in ("converged", "prompt"):
            words += f" {row['method']} {WAYS[row['way']]}: {row['kl']}, so it is not at equal KL."
    told = [_told(row) for row in table.to_dict("records")]
    shown(told, TOLD)
    say(verdict(table))
    from spilt.report.page import render

    picture = _svg(table)
    files: dict[str, str] = {"movement.csv": table.to_csv(index=False, float_format="%.10g", lineterminator="\n"), "movement.svg": picture}
    lines = _vignette_tables(run)
    files["tables.md"] = _markdown(told, words, verdict(table), lines)
    rows = [[_cell(row[name], spec) for name, spec in TOLD.items()] for row in told]
    pictures = [_address(picture), *[_address(path.read_text(encoding="utf-8")) for path in _pictures(run)]]
    title = f"{run.behaviour} on {run.name}"
    asked = run.asked
    known = {"title": title, "about": asked["about"], "columns": list(TOLD), "rows": rows, "note": words, "verdict": verdict(table)}
    files["index.html"] = render("weights.html", **known, pictures=pictures, more=lines, version=__version__)
    for name, text in files.items():
        path = run.folder.table(name)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            atomic_write(path, text)
    sweep(run.folder.table(""))
    say(f"table: {run.folder.table('index.html')}")


def movement(run: Context) -> pd.DataFrame:
    """A row for each arm and side: means over questions and their intervals."""
    import pandas as pd

    base = _by_question(run, UNSTEERED)
    rows = []
    for name in strengths.names_of(run):
        told, own = strengths.found(run, name), _by_question(run, name)
        sides = {strengths.SIGNS[side["side"]]: side for side in told["sides"]}
        for m, part in own.groupby("multiplier"):
            way = 1 if m > 0 else -1
            side = sides[way]
            at_alpha = name == PROMPT or abs(side["multiplier"] - m) <= 1e-6 * abs(m)
            row: dict[str, Any] = {"method": told["method"], "arm": name, "kind": told["kind"], "way": way, "multiplier": m}
            row["kl"] = "prompt" if name == PROMPT else side["status"] if at_alpha else "not the calibrated strength"
            row["kl_p95"] = side["kl_p95"] if at_alpha else float("nan")
            row["audit_kl_p95"] = side.get("audit_kl_p95") if at_alpha else float("nan")
            both = part.merge(base, on=["topic_idx", "persona_idx", "sample_idx"], suffixes=("", "_0"))
            for measure, of in zip(MEASURES, ("preference", "utility"), strict=True):
                found = _change(both[["topic_idx"]].assign(value=both[of] - both[f"{of}_0"]), run.words)
                row |= {measure: found.value, f"{measure}_low": found.low, f"{measure}_high": found.high}
                if of == "preference":
                    row["n"] = found.n
            means = both.assign(value=both["preference"] - both["preference_0"]).groupby("topic_idx")["value"].mean()
            row["wins"] = float((means * way > 0).mean())
            rows.append(row)
    return pd.DataFrame(rows).sort_values(["kind", "arm", "way"], key=_order, kind="stable", ignore_index=True)


def _order(column: pd.Series) -> pd.Series:
    """dW first, then vectors, then the prompt; + before -."""
    return column.map({"dW": 0, "vector": 1, PROMPT: 2}) if column.name == "kind" else -column if column.name == "way" else column


def _change(rows: pd.DataFrame, words: Mapping[str, Any]) -> Any:
    """The mean over questions of each one's mean; questions are resampled."""
    from spilt.analysis.intervals import pooled

    means = rows.dropna().groupby("topic_idx")["value"].mean()
    return pooled([[value] for value in means], seed=words["bootstrap_seed"], draws=words["bootstrap_samples"])


def _by_question(run: Context, name: str) -> pd.DataFrame:
    """Preference and utility of each pair of held-out answers."""
    import pandas as pd

    from spilt.analysis import odds

    table = pd.read_csv(run.use(run.folder.measured(name, measured.PREFERENCE)))
    table["preference"] = odds.preference_log_odds(table["loss_pos"], table["loss_neg"])
    table["utility"] = odds.utility_log_odds(table["loss_pos"], table["loss_neg"])
    return table


def verdict(table: pd.DataFrame) -> str:
    """Whether dW moves both ways, in a sentence for each of it."""
    said = []
    for method, part in table[table["kind"] == "dW"].groupby("method", sort=False):
        by_way = part.drop_duplicates("way").set_index("way")
        if {1, -1} <= set(by_way.index):
            up, down = by_way.loc[1, "movement_low"] > 0, by_way.loc[-1, "movement_high"] < 0
            if up and down:
                said.append(f"{method} moves held-out answers up at +alpha and down at -alpha: both intervals are off 0.")
            else:
                which = " and ".join(word for word, good in (("+alpha", up), ("-alpha", down)) if not good)
                said.append(
                    f"{method} does not move held-out answers both ways: at {which} the interval holds 0 or lies on the other side."
                )
    return " ".join(said) or "There is no dW measured on both sides."


def _told(row: Mapping[str, Any]) -> dict[str, Any]:
    def interval(name: str) -> str:
        value, low, high = (row[f"{name}{end}"] for end in ("", "_low", "_high"))
        return f"{value:+.3f} [{low:+.3f}, {high:+.3f}]".replace("-", "−")

    kl = row["kl"] if row["kl"] != "converged" else "met"
    known = {"method": f"{row['method']} {WAYS[row['way']]}", "m": row["multiplier"], "kl_p95": row["kl_p95"], "kl": kl}
    return {**known, "movement": interval("movement"), "side effect": interval("side_effect"), "wins": row["wins"], "n": row["n"]}


def _cell(value: Any, spec: str) -> str:
    return "–" if value is None or value != value else f"{value:{spec}}"


def _markdown(told: Sequence[Mapping[str, Any]], note: str, said: str, more: Sequence[str]) -> str:
    lines = ["## Movement and side effects at equal KL", "", f"| {' | '.join(TOLD)} |", "|---" * len(TOLD) + "|"]
    lines += ["| " + " | ".join(_cell(row[name], spec) for name, spec in TOLD.items()) + " |" for row in told]
    return "\n".join([*lines, "", note, "", said, "", *more]) + "\n"


def _svg(table: pd.DataFrame) -> str:
    """Side effect against movement, a point for each method and side: filled at +alpha, empty at -alpha; 95% intervals."""
    from spilt.report.drawing import svg_of
    from spilt.report.figures import movement_figure

    return svg_of(movement_figure(table))


def _address(svg: str) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}"


# ---------------------------------------------------------------- vignettes


def _vignette_rows(run: Context) -> pd.DataFrame | None:
    """All arms' rows as the tables of the vignettes take them; None where none were asked about."""
    import pandas as pd

    frames = []
    for name in (UNSTEERED, *strengths.names_of(run)):
        path = run.folder.measured(name, measured.VIGNETTES)
        if not path.is_file():
            return None
        frame = pd.read_csv(run.use(path), dtype={"id": str})
        if name == UNSTEERED:
            frames.append(frame.assign(method=UNSTEERED, arm="none", kl_p95=float("nan")))
            continue
        told = strengths.found(run, name)
        kl = {strengths.SIGNS[side["side"]]: side["kl_p95"] for side in told["sides"]}
        way = frame["multiplier"].map(lambda m: 1.0 if m > 0 else -1.0)
        frames.append(frame.assign(method=told["method"], arm=way.map({1.0: "plus", -1.0: "minus"}), kl_p95=way.map(kl)))
    return pd.concat(frames, ignore_index=True)


def _vignette_tables(run: Context) -> list[str]:
    """The tables of the vignettes as markdown lines; written beside the others too."""
    frame = _vignette_rows(run)
    if frame is None:
        return ["No vignettes were asked about (spilt weights evaluate --vignettes)."]
    from spilt.vignettes import summary, tables

    intent, folder = dict(run.asked["intent"]), run.folder.table("vignettes")
    headline = next(iter(intent), "Authority")
    plan = summary.Plan(headline=headline, intent=intent or {headline: 1}, chosen="before", seed=run.words["bootstrap_seed"])
    tables.write(frame, measured.scenes(run), folder, plan, strengths.budget(run))
    return (folder / "tables.md").read_text(encoding="utf-8").splitlines()


def _pictures(run: Context) -> list[Path]:
    return sorted(run.folder.table("vignettes").glob("*.svg"))
