"""Stage calibrate: for each arm the multipliers at which KL(steered || base) along its own greedy answers meets the budget, on either side.

Found on the calibration questions, checked on audit questions; both without duplicates among what the model is really shown, and
disjoint. A prompt has no strength: its KL is measured and told.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from spilt.artifacts import manifest
from spilt.artifacts.atomic import atomic_write, sweep
from spilt.artifacts.journal import Journal
from spilt.errors import NotFinite, UserError
from spilt.terminal import say
from spilt.weight_steering import personas
from spilt.weight_steering.flags import PROMPT
from spilt.weight_steering.stage import Context, shown

log = logging.getLogger("spilt")
STAGE = "calibrate"
KL = ("kl_mean", "kl_p95", "kl_max")
SIGNS = {"positive": 1.0, "negative": -1.0}


def make(run: Context) -> None:
    names = run.team.on_main(lambda: names_of(run))
    # of all, before any: none is found by another budget than those that stay
    wanted = run.team.on_main(lambda: [_wanted(run, name) for name in names])
    run.dealt([name for name, todo in zip(names, wanted, strict=True) if todo], lambda name: _one(run, name))

    def end() -> None:
        for name in names:
            run.finished(f"{STAGE}_{name}")
        tables(run)

    run.team.on_main(end)


def names_of(run: Context) -> list[str]:
    """The arms that are stored. Raises UserError where there is none."""
    found = run.folder.arms()
    if not found:
        raise UserError(
            f"{run.folder.root / 'arms'}: no method is stored; spilt weights dw --behavior {run.behaviour} makes dW and the others"
        )
    return found


def _inputs(run: Context, name: str) -> tuple[Path, dict[str, Any]]:
    """The file of an arm, and what decides its strengths."""
    arm = run.use(run.folder.prompt() if name == PROMPT else run.folder.arm(name))
    return arm, run.parts(STAGE, [run.folder.personas, arm], run.settings(STAGE))


def _wanted(run: Context, name: str) -> bool:
    return run.wanted(run.folder.strengths(name), _inputs(run, name)[1])


def _one(run: Context, name: str) -> None:
    from spilt.weight_steering import arms

    path, (arm, parts) = run.folder.strengths(name), _inputs(run, name)
    asked = questions(run)
    run.begin(f"{STAGE}_{name}")
    journal = run.journal(f"{STAGE}_{name}")
    if name == PROMPT:
        rows, probes = _of_prompt(run, asked), list[dict[str, Any]]()
    else:
        rows, probes = _of_arm(run, arms.stored(run, name), asked, manifest.identity(parts), journal)
    journal.close()
    kind = run.notes(arm).get("kind", "vector")
    told = {"method": arms.label(name, {"kind": kind}), "arm": name, "kind": kind, "target_p95": run.words["target_kl"], **asked["counts"]}
    run.store(path, json.dumps({**told, "sides": rows, "probes": probes}, indent=1) + "\n", parts)


def questions(run: Context) -> dict[str, Any]:
    """Prompts as the model is shown them, each once: of calibration, and of audit those that are not among them."""
    from spilt.weight_steering import arms

    both = [run.questions(split) for split in (personas.CALIBRATION, personas.AUDIT)]
    if not both[0]:
        raise UserError(
            f"no question of the split {personas.CALIBRATION}: no strength can be found; give some in --questions of the data stage"
        )
    rendered = [dict(zip(arms.rendered(run, [one.text for one in part]), part, strict=True)) for part in both]
    audit = {ids: one for ids, one in rendered[1].items() if ids not in rendered[0]}
    dropped = sum(map(len, both)) - len(rendered[0]) - len(audit)
    if dropped:
        log.warning("%d questions are shown to the model as others are, and are left out", dropped)
    used, others = list(rendered[0])[: run.words["n_calibration"]], list(audit)[: run.words["n_kl_audit"]]
    return {"calibration": used, "audit": others, "counts": {"prompts": len(used), "audit_prompts": len(others), "duplicates": dropped}}


def _of_arm(
    run: Context, arm: Any, asked: Mapping[str, Any], own: str, journal: Journal
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Both sides, and all that was tried. What an earlier run has measured is taken from the journal."""
    import pandas as pd

    from spilt import api

    known = {(line[1], line[2]): line[3] for line in journal.whole() if isinstance(line, list) and len(line) == 4 and line[0] == own}
    new = run.words["n_tokens"]

    def row(m: float, which: str) -> dict[str, Any]:
        if (m, which) not in known:
            try:
                known[m, which] = arm.divergence(asked[which], m, new).to_dict("records")[0]
            except NotFinite:
                known[m, which] = None
            journal.append([[own, m, which, known[m, which]]])
        if known[m, which] is None:
            raise NotFinite(f"the model's numbers break down at {m:g}")
        return dict(known[m, which])

    def at(which: str, strengths: Sequence[float]) -> pd.DataFrame:
        return pd.DataFrame([row(m, which) for m in strengths])

    start, high = api.reach(arm.steering)
    audit = partial(at, "audit") if asked["audit"] else None
    table = api.both_sides(partial(at, "calibration"), audit, run.words["target_kl"], 1.0 if arm.inside else start, high)
    return [*map(_plain, table.to_dict("records"))], [*map(_plain, table.attrs["probes"].to_dict("records"))]


def _of_prompt(run: Context, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """KL(behind the persona || without) along the greedy answers behind it, of the first pair of personas."""
    from contextlib import nullcontext

    from spilt.data.chat import Encoded
    from spilt.engine import sampling
    from spilt.engine.prompts import Row
    from spilt.weight_steering import arms

    host, pair = run.host, run.pairs[0]
    texts = {
        tuple(run.chat.prompt_ids(one.text)): one.text for split in (personas.CALIBRATION, personas.AUDIT) for one in run.questions(split)
    }
    how = sampling.decoding({"do_sample": False, "max_new_tokens": run.words["n_tokens"]}, host.model, host.tokenizer)
    rows = []
    for side, system, m in (("positive", pair.pos, 1.0), ("negative", pair.neg, -1.0)):
        row: dict[str, Any] = {"side": side, "status": "a prompt has no strength"}
        for which, prefix in (("calibration", ""), ("audit", "audit_")):
            bare = asked[which]
            if not bare:
                continue
            behind = [tuple(run.chat.prompt_ids((("system", system), ("user", texts[ids])))) for ids in bare]
            made = dict(arms.tokens(host, [Row(ids, 0.0, "") for ids in behind], how, run.words["batch_size"]))
            steered, base = ([Encoded((*ids, *made[i]), len(ids), 0) for i, ids in enumerate(some)] for some in (behind, bare))
            found = arms.kl_row(host, lambda _: nullcontext(), steered, base, m).to_dict("records")[0]
            row |= {f"{prefix}{key}": value for key, value in found.items() if not prefix or key in KL}
        rows.append(_plain(row))
    return rows


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and value - value != 0 else value for name, value in row.items()}


def found(run: Context, name: str) -> dict[str, Any]:
    """The stored strengths of an arm."""
    return dict(json.loads(run.use(run.folder.strengths(name)).read_text(encoding="utf-8")))


def budget(run: Context) -> float:
    """Of all arms, nats. Raises UserError where they were not all calibrated alike: then nothing is at equal KL."""
    names = names_of(run)
    how = {name: (manifest.read(run.use(run.folder.strengths(name))) or {})["parts"]["settings"] for name in names}
    for name in names[1:]:
        if other := manifest.differences(how[names[0]], how[name]):
            raise UserError(
                f"{run.folder.strengths(names[0])}: was found with {other.replace('(now', f'({name}:')}, so they are not at equal KL; "
                f"spilt weights {STAGE} --behavior {run.behaviour} --force with the flags that are meant finds all alike"
            )
    return float(found(run, names[0])["target_p95"])


def alphas(told: Mapping[str, Any]) -> tuple[float, float]:
    """(alpha of +, alpha of -), magnitudes; of a prompt 1 and 1."""
    by_side = {row["side"]: row for row in told["sides"]}
    return tuple(abs(by_side[side]["multiplier"]) for side in SIGNS)  # type: ignore[return-value]


def tables(run: Context) -> None:
    """summary.csv, audit.csv and history.csv of all arms, as the original names their columns; made of the arms' own files."""
    import pandas as pd

    summary, audit, history = [], [], []
    for name in names_of(run):
        told = found(run, name)
        by_side = {row["side"]: row for row in told["sides"]}
        row: dict[str, Any] = {"method": told["method"], "target_p95": told["target_p95"]}
        for side, short in (("positive", "pos"), ("negative", "neg")):
            at = by_side[side]
            row |= {
                f"alpha_{short}": abs(at["multiplier"]),
                f"status_{short}": at["status"],
                f"converged_{short}": at["status"] == "converged",
            }
            row |= {f"{key.removeprefix('kl_')}_at_{short}": at[key] for key in KL}
            row |= {f"probes_{short}": sum(probe["side"] == side for probe in told["probes"])}
            audit.append(
                {"method": told["method"], "side": side, "multiplier": at["multiplier"], **{key: at.get(f"audit_{key}") for key in KL}}
            )
            audit[-1] |= {"prompts": told["audit_prompts"]}
        summary.append(row)
        history += [{"method": told["method"], "probe": i, **probe} for i, probe in enumerate(told["probes"])]
    for what, rows in (("summary", summary), ("audit", audit), ("history", history)):
        content = pd.DataFrame(rows).to_csv(index=False, float_format="%.10g", lineterminator="\n")
        path = run.folder.kl(what)
        if not path.is_file() or path.read_text(encoding="utf-8") != content:
            atomic_write(path, content)
    sweep(run.folder.kl("summary").parent)
    columns = {
        "method": "",
        "alpha_pos": ".4g",
        "p95_at_pos": ".3f",
        "status_pos": "",
        "alpha_neg": ".4g",
        "p95_at_neg": ".3f",
        "status_neg": "",
    }
    shown(summary, columns)
    say(f"{STAGE}: KL(steered || base) in nats at the 95th percentile of tokens; budget {budget(run):g}; {run.folder.kl('summary')}")
