"""Pictures, tables and report.html of everything measured so far, rebuilt from stored results only: no model is needed.

Face: `update` (rebuild one dataset and model), `recommend` (the table of `spilt recommend`), `main` (spilt report).
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from spilt import __version__
from spilt.analysis import freshness, paper
from spilt.analysis.curves.fitting import GOOD_R2
from spilt.analysis.odds import Norm
from spilt.analysis.recommend import BUDGET
from spilt.artifacts.atomic import atomic_write
from spilt.artifacts.store import Store
from spilt.errors import UserError, unknown
from spilt.report import about, drawing, figures, page, places, tables, words
from spilt.report import cells as stored
from spilt.report.comparison import made, sets
from spilt.terminal import complain, program, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger("spilt")
SAMPLES = 3  # prompts per cell in the report


def update(
    base_dir: str | Path,
    model: str,
    dataset: str,
    *,
    norm: Norm = "mean",
    budget: float = BUDGET,
    split: str = "train",
    seed: int = 0,
    progress: Callable[[str], None] = lambda text: None,
) -> Path:
    """Rebuild preference_utility.csv, fit.json and curves.png of every cell, then the figures, tables and report.html; returns its path.

    A cell is fitted again only when its losses or a setting changed. A cell that cannot be read is named in the report and
    does not stop the others; when none can be read, its error is raised.
    """
    settings = {"norm": norm, "budget": budget, "split": split, "seed": seed}
    own = {name: value for name, value in settings.items() if value != (update.__kwdefaults__ or {})[name]}
    parts = freshness.made_from(Path(base_dir), model, dataset, own)  # before it is read: what changes meanwhile is drawn next time
    found, problems = places.comparable(places.find(base_dir, model, dataset))
    measured = []
    for place in found:
        try:
            for concept, folder in place.concepts.items():
                progress(f"{place.name} concept {concept}")
                one = dataclasses.replace(place, dataset=f"{dataset}_concept_{concept}", folder=folder, concepts={})
                _concept(one, norm, budget, split, seed)
            progress(place.name)
            measured.append(stored.analyse(place, norm, budget, seed))
        except (UserError, OSError) as error:
            problems.append(f"{place.name}: {error}")
    if not measured:
        raise UserError("; ".join(problems) or f"no losses of {dataset} with {model} below {base_dir}; run --mode loss first")
    progress("report")
    problems += [f"{cell.name}: {note}" for cell in measured for note in cell.fit["notes"] if "left out" in note]
    for problem in problems:
        log.warning("report: %s", problem)
    return _report(Path(base_dir), model, dataset, measured, problems, split, seed, parts)


def _concept(place: places.Place, norm: Norm, budget: float, split: str, seed: int) -> None:
    """One concept's own files; drawn again only when its losses or a setting changed: that takes the old picture away."""
    cell, path = stored.analyse(place, norm, budget, seed), place.folder / stored.CURVES_FILE
    if not path.is_file():
        atomic_write(path, drawing.png_of(figures.cell_figure(cell, split)))


def recommend(
    base_dir: str | Path, model: str, dataset: str, budget: float = BUDGET, *, norm: Norm = "mean", seed: int = 0
) -> pd.DataFrame:
    """The multiplier per cell by the utility budget [nats], from training items, with its test numbers. Reads only, writes nothing.

    `attrs["notes"]`: sentences on what could not be used, and on cells that could not be read.
    """
    measured, said = [], []
    found = places.find(base_dir, model, dataset)
    for place in found:
        try:
            measured.append(stored.judged(place, norm, budget, seed))
        except (UserError, OSError) as error:
            said.append(f"{place.name}: {error}")
    said += [f"{cell.name}: {note}" for cell in measured for note in cell.fit["notes"]]
    said += [sentence.replace("left out", "not comparable") for sentence in places.comparable(found)[1]]
    if not measured:
        raise UserError("; ".join(said))
    table = tables.recommendations(measured, seed)
    table.attrs["notes"] = said
    return table


def _report(
    base: Path,
    model: str,
    dataset: str,
    measured: list[stored.Measured],
    problems: list[str],
    split: str,
    seed: int,
    parts: dict[str, Any],
) -> Path:
    here = freshness.page(base, model, dataset)
    scored = {cell.name: stored.scored(cell.place) for cell in measured}
    claimed, fits = tables.claimed(measured, split, seed), tables.fits(measured, model, dataset)
    one = sets.Set(base, model, dataset, sets.grouped(measured), ())
    against = made.against_prompts(one, seed)
    paired = pd.DataFrame(columns=made.AGAINST) if against is None else against.values[made.AGAINST]
    frames = {
        "recommendations": (recommendations := tables.recommendations(measured, seed)),
        "makeup": tables.makeup(measured),
        "seeds": tables.seeds(measured, recommendations),
        "layers": tables.layers(measured),
        "fits": fits,
        "fit_averages": tables.fit_averages(fits),
        "readings": tables.readings(measured, split),
        "equal_preference": tables.trade_off(claimed),
        "control": tables.control(measured),
        "prompts": made.prompts(one, seed),
        "against_prompts": paired.rename(columns={"than": "prompt"}),
        "scores": tables.scores(measured, {name: table for name, (table, _) in scored.items()}),
        "claims": claimed,
    }
    for name, frame in frames.items():
        atomic_write(here.with_name(f"{name}.csv"), frame.to_csv(index=False, float_format="%.10g", lineterminator="\n"))

    pictures = {}
    drawn = tables.foremost(measured)
    for name, draw, of in [
        *((name, draw, drawn) for name, draw in figures.OVER_CELLS.items()),
        ("layers", figures.layers_figure, measured),
    ]:
        wide, narrow = draw(of, split), draw(of, split, narrow=True)
        if wide is not None and narrow is not None:
            pictures[name] = page.picture(wide, narrow)
            atomic_write(here.with_name(f"{name}.svg"), pictures[name].drawn)
    for cell in measured:
        wide, narrow = figures.cell_figure(cell, split), figures.cell_figure(cell, split, narrow=True)
        pictures[cell.name] = page.picture(wide, narrow)
        atomic_write(cell.place.folder / stored.CURVES_FILE, drawing.png_of(wide))

    behind = stored.behind_prompts(base, model, dataset)
    with_texts = [*(cell.place for cell in measured), *behind]
    for unread in filter(None, [*map(stored.left_out_texts, with_texts), *(said for _, said in scored.values())]):
        problems = [*problems, unread]
        log.warning("report: %s", unread)
    for name in sets.behind(one)[1]:
        why = "damaged, or of other questions, settings or model; --prompt_baseline measures it again"
        problems = [*problems, f"prompt {name} left out: {why}"]
    told = {cell.name: about.facts(cell) for cell in measured}
    common = about.shared(told)
    first = words.winner(measured, recommendations)
    headline = words.recommended(measured, recommendations)
    numbers = words.numbers(*first, frames["makeup"].loc[first[1].name]) if first else []
    texts = [(cell, samples) for cell in measured if (samples := stored.samples(cell.place, SAMPLES))]
    rows = {name: tables.records(frame, {cell.name for cell in measured}) for name, frame in frames.items() if name != "claims"}
    remarks = [f"{cell.name}: {note}" for cell in measured for note in cell.fit["notes"]]
    html = page.render(
        "report.html",
        model=model,
        dataset=dataset,
        split=split,
        norm=measured[0].fit["norm"],
        budget=measured[0].best["budget"],
        good_r2=f"{GOOD_R2:g}",
        header={"model": model, **common, "page": f"by spilt {__version__}"},
        synthetic=about.synthetic(base, model),
        up=about.address(Store(base).index(model), here),
        coverage=words.coverage(measured),
        first=first[0] if first else None,
        headline=headline,
        numbers=numbers,
        findings=words.findings(measured, split, frames),
        claims=tables.judged(claimed),
        rows=rows,
        main_results=tables.records(pd.DataFrame(paper.main_results(model, dataset))),
        pictures=pictures,
        drawn=len(drawn),
        cells=measured,
        own={name: {k: v for k, v in facts.items() if k not in common} for name, facts in told.items()},
        files={cell.name: about.files(cell, here) for cell in measured},
        sheets={name: page.score_sheet(table) for name, (table, _) in scored.items() if len(table)},
        texts=texts,
        asked=about.side_by_side(
            texts, first[0] if first else None, {place.intervention: stored.samples(place, SAMPLES) for place in behind}
        ),
        shortfalls=tables.shortfalls(measured, split),
        problems=problems,
        remarks=[remark for remark in remarks if remark not in problems],
    )
    best = {"cell": headline.figure, "gain": next((f"{n.value} ({n.beside})" for n in numbers if n.name == words.GAIN), "")}
    out = freshness.write(base, model, dataset, html, parts, problems, best)
    about.write_indexes(base, model)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="spilt report", description="rebuild pictures and report.html from stored losses; no model needed"
    )
    parser.add_argument("--base_dir", default=".", help="folder that holds vectors/ and generation/ (default: here)")
    parser.add_argument("--model_name", help="one model (default: every model with stored losses)")
    parser.add_argument("--dataset", help="one dataset (default: every dataset with stored losses)")
    parser.add_argument("--norm", choices=("mean", "sum"), default="mean", help="loss per answer token, or summed over the answer")
    parser.add_argument(
        "--budget", type=float, default=BUDGET, help="nats of utility that a recommended multiplier may cost (default: 0.5)"
    )
    parser.add_argument("--split", choices=("train", "test"), default="train", help="questions shown in figures (default: train)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap and of the fits' starts")
    return program(parser, argv, _rebuild)


def _rebuild(options: argparse.Namespace) -> int:
    base = Path(options.base_dir)
    if not options.budget >= 0:
        raise UserError(f"--budget {options.budget:g}: nats of utility to spend, 0 or more")
    have = places.models(base)
    if options.model_name and have and options.model_name not in have:
        raise unknown("model with stored losses", options.model_name, have)
    names = [name for name in have if options.model_name in (None, name)]
    jobs = [(m, d) for m in names for d in ([options.dataset] if options.dataset else places.datasets(base, m))]
    if not options.model_name and options.dataset:
        jobs = [(m, d) for m, d in jobs if d in places.datasets(base, m)]
    if not jobs:
        raise UserError(f"no stored losses below {base}; run --mode loss first, or check --base_dir")
    for model, dataset in jobs:
        settings = {"norm": options.norm, "budget": options.budget, "split": options.split, "seed": options.seed}
        say(str(update(base, model, dataset, **settings, progress=_say)))
    return 0


def _say(text: str) -> None:
    if sys.stderr.isatty():
        complain(f"  {text}")
