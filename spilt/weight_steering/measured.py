"""Stage evaluate: each arm at -alpha, 0 and +alpha of equal KL, on what nothing was chosen on.

preference.csv: losses of both personas' answers to held-out questions, the question without a persona. vignettes.csv: how wrong moral
scenes are found. Unsteered once, for all arms.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spilt.artifacts import manifest
from spilt.artifacts.weights import SIDES, UNSTEERED
from spilt.errors import UserError
from spilt.weight_steering import data, personas, strengths
from spilt.weight_steering.flags import PROMPT
from spilt.weight_steering.stage import Context

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger("spilt")
STAGE = "evaluate"
PREFERENCE, VIGNETTES = "preference", "vignettes"
OWN, NONE = "own", "none"
PLAIN = ("device", "batch_size")


def make(run: Context) -> None:
    scenes, names = run.team.on_main(lambda: (_asked(run), strengths.names_of(run)))
    run.dealt((UNSTEERED, *names), lambda name: _one(run, name, scenes))


def _one(run: Context, name: str, scenes: list[Any] | None) -> None:
    arm = None if name == UNSTEERED else run.use(run.folder.prompt() if name == PROMPT else run.folder.arm(name))
    at = _multipliers(run, name)
    inputs = [] if arm is None else [arm, run.folder.strengths(name)]
    settings = {"dtype": run.words["dtype"], "multipliers": at}
    parts = run.parts(STAGE, [run.use(run.folder.answers), *inputs], settings)
    path = run.folder.measured(name, PREFERENCE)
    if run.wanted(path, parts):
        rows = data.read(run, personas.AUDIT)
        run.store(path, _csv(_preference(run, name, at, rows)), parts)
    if scenes is not None:
        own = {**settings, "vignettes": run.words["vignettes"], "limit": run.words["limit"]}
        parts = run.parts(STAGE, [run.folder.personas, run.folder.scenes, *inputs], own)
        path = run.folder.measured(name, VIGNETTES)
        if run.wanted(path, parts):
            try:
                found = _vignettes(run, name, at, scenes)
            except UserError as error:
                raise UserError(f"{error}; --vignettes none leaves them out") from None
            run.store(path, _csv(found), parts)


def _multipliers(run: Context, name: str) -> list[float]:
    """The strengths of an arm: those of equal KL on either side, or --coeffs. Of a prompt 1 and -1: the one persona and the other."""
    if name == UNSTEERED:
        return [0.0]
    if name == PROMPT:
        return [-1.0, 1.0]
    if run.words["coeffs"] is not None:
        return sorted({float(m) for m in run.words["coeffs"]} - {0.0})
    told = strengths.found(run, name)
    for row in told["sides"]:
        if row["status"] != "converged":
            log.warning("%s, %s side: %s (kl p95 %s at m = %.4g)", name, row["side"], row["status"], row["kl_p95"], row["multiplier"])
    plus, minus = strengths.alphas(told)
    return [-minus, plus]


def _csv(table: pd.DataFrame) -> str:
    return str(table.to_csv(index=False, float_format="%.10g", lineterminator="\n"))


def _preference(run: Context, name: str, at: Sequence[float], rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """A row for each pair of held-out answers and multiplier: -log p per token of either."""
    import pandas as pd

    from spilt.weight_steering import arms

    arm = arms.stored(run, name) if name not in (UNSTEERED, PROMPT) else None
    frames = []
    for m in at:
        pair = run.pairs[0]
        system = "" if name != PROMPT else pair.pos if m > 0 else pair.neg
        frame = pd.DataFrame([{key: row[key] for key in ("topic_idx", "persona_idx", "sample_idx")} for row in rows]).assign(multiplier=m)
        for side in SIDES:
            texts = data.sequences(run, rows, side, system=system)
            frame[f"loss_{side}"] = arms.unsteered_losses(run, texts) if arm is None else arm.losses(texts, m)
        if not frame[[f"loss_{side}" for side in SIDES]].abs().lt(float("inf")).all().all():
            raise UserError(f"{name} at m = {m:g}: the losses are NaN or infinite; a smaller --target-kl, or smaller --coeffs")
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


# ---------------------------------------------------------------- vignettes


def _asked(run: Context) -> list[Any] | None:
    """Both conditions of the first --limit vignettes, kept as they are now; None: none are wanted."""
    word, path = run.words["vignettes"], run.folder.scenes
    if word == NONE:
        return None
    from spilt.vignettes import files

    found = files.read() if word == OWN else files.read(**_source(word))
    names = list(dict.fromkeys(one.id for one in found))[: run.words["limit"]]
    kept = [one for one in found if one.id in names]
    content = json.dumps([[None if value != value else value for value in one] for one in kept], indent=1, ensure_ascii=False) + "\n"
    parts = run.parts(STAGE, [], {"vignettes": word, "limit": run.words["limit"]})
    parts["inputs"] = {"vignettes": manifest.digest(content.encode())}
    if run.wanted(path, parts):
        run.store(path, content, parts)
    return kept


def scenes(run: Context) -> list[Any]:
    """Those that were asked about, as they were then."""
    from spilt.vignettes.files import Vignette

    rows = [Vignette(*row) for row in json.loads(run.use(run.folder.scenes).read_text(encoding="utf-8"))]
    return [one._replace(wrong=math.nan if one.wrong is None else one.wrong, loadings=tuple(one.loadings)) for one in rows]


def _source(word: str) -> dict[str, Any]:
    """SOURCE or SOURCE:CONFIG."""
    source, _, config = word.partition(":") if not Path(word).exists() else (word, "", "")
    return {"source": source, **({"config": config} if config else {})}


def _vignettes(run: Context, name: str, at: Sequence[float], asked: Sequence[Any]) -> pd.DataFrame:
    import pandas as pd

    from spilt.vignettes import evaluate
    from spilt.weight_steering import arms

    host, frames = run.host, []
    how: dict[str, Any] = {"batch_size": run.words["batch_size"] or 16}
    if name in (UNSTEERED, PROMPT):
        for m in at:
            pair = run.pairs[0]
            system = "" if name != PROMPT else pair.pos if m > 0 else pair.neg
            frames.append(evaluate.evaluate(host.model, host.tokenizer, asked, system_prompt=system, **how).assign(multiplier=m))
        return pd.concat(frames, ignore_index=True)
    arm = arms.stored(run, name)
    if not arm.weights:
        return evaluate.evaluate(host.model, host.tokenizer, asked, arm.steering, list(at), **how)
    for m in at:
        with arm.applied(m):
            frames.append(evaluate.evaluate(host.model, host.tokenizer, asked, **how).assign(multiplier=m))
    return pd.concat(frames, ignore_index=True)
