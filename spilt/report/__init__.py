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
from typing import TYPE_CHECKING

import pandas as pd

from spilt.analysis.curves import BUDGET, recommendation
from spilt.analysis.odds import Norm
from spilt.artifacts.atomic import atomic_write
from spilt.errors import UserError, printable, unknown
from spilt.report import cells as stored
from spilt.report import figures, page, tables, words
from spilt.terminal import complain, program, say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["main", "recommend", "update"]

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
    measured, problems = [], []
    for place in stored.find(base_dir, model, dataset):
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
    return _report(Path(base_dir), model, dataset, measured, problems, split)


def _concept(place: stored.Place, norm: Norm, budget: float, split: str, seed: int) -> None:
    """One concept's own files; drawn again only when its losses or a setting changed."""
    before = stored.stored_source(place)
    cell = stored.analyse(place, norm, budget, seed)
    path = place.folder / stored.CURVES_FILE
    if cell.fit["source"] != before or not path.is_file():
        atomic_write(path, figures.png_of(figures.cell_figure(cell, split)))


def recommend(
    base_dir: str | Path, model: str, dataset: str, budget: float = BUDGET, *, norm: Norm = "mean", seed: int = 0
) -> pd.DataFrame:
    """The multiplier per cell by the utility budget [nats], from training items, with its test numbers. Reads only, writes nothing.

    `attrs["notes"]`: sentences on what could not be used, and on cells that could not be read.
    """
    measured, said = [], []
    for place in stored.find(base_dir, model, dataset):
        try:
            summary, notes = stored.summary_of(place, norm, seed)
        except (UserError, OSError) as error:
            said.append(f"{place.name}: {error}")
            continue
        said += [f"{place.name}: {note}" for note in notes]
        fit = stored.plain({"recommendation": recommendation(summary, budget), "notes": notes})
        measured.append(stored.Measured(place, summary, fit))
    if not measured:
        raise UserError("; ".join(said))
    table = tables.recommendations(measured)
    table.attrs["notes"] = said
    return table


def _report(base: Path, model: str, dataset: str, measured: list[stored.Measured], problems: list[str], split: str) -> Path:
    folder = stored.losses_root(base, model) / "report" / dataset
    trade, control = tables.trade_off(measured, split), tables.control(measured, split)
    claims = tables.claims(measured, split, trade)
    for name, frame in {
        "recommendations": tables.recommendations(measured),
        "fits": tables.fits(measured, model, dataset),
        "readings": tables.readings(measured, split),
        "equal_preference": trade,
        "control": control,
        "claims": claims,
    }.items():
        atomic_write(folder / f"{name}.csv", frame.to_csv(index=False, float_format="%.10g", lineterminator="\n"))
    pictures = {}
    for name, draw in {"paper": figures.paper_figure, "trade_off": figures.trade_off_figure, "control": figures.control_figure}.items():
        wide, narrow = draw(measured, split), draw(measured, split, narrow=True)
        if wide is None or narrow is None:
            continue
        atomic_write(folder / f"{name}.png", figures.png_of(wide))
        pictures[name] = _picture(wide, narrow, *_CAPTIONS[name])
        atomic_write(folder / f"{name}.svg", pictures[name].wide)
    for cell in measured:
        alt = f"Preference and utility log-odds against the multiplier, {words.name_of(cell.name)}."
        caption = f"{words.name_of(cell.name)}: points measured with 95% intervals, lines fitted, this cell's own regions shaded."
        wide = figures.cell_figure(cell, split)
        atomic_write(cell.place.folder / stored.CURVES_FILE, figures.png_of(wide))
        pictures[cell.name] = _picture(wide, figures.cell_figure(cell, split, narrow=True), alt, caption)
    findings = words.findings(measured, split, trade, control)
    samples = {cell.name: stored.samples(cell.place, SAMPLES) for cell in measured}
    for unread in filter(None, (stored.left_out_texts(cell.place) for cell in measured)):
        problems = [*problems, unread]
        log.warning("report: %s", unread)
    html = page.page(model, dataset, split, measured, pictures, findings, trade, control, claims, samples, problems)
    atomic_write(folder / "report.html", "\n".join(map(printable, html.split("\n"))))
    return folder / "report.html"


def _picture(wide: Figure, narrow: Figure, alt: str, caption: str) -> page.Picture:
    return page.Picture(figures.svg_of(wide), figures.svg_of(narrow), alt, caption)


_CAPTIONS = {
    "paper": (
        "Preference and utility log-odds against the multiplier, a line per method, vector forms above, LoRA and local weight below.",
        "Points are measured, lines fitted; solid with filled points is preference, dashed with open points utility. Shading: "
        "median over the "
        "panel's cells of the linear and the transitional region; unshaded outside, the curve has converged.",
    ),
    "trade_off": (
        "Utility log-odds against preference log-odds along the multiplier, a line per method, a panel per form.",
        "Each line follows one method from m = 0 (star) outwards. Further right at the same height is more preference for the "
        "same utility. "
        "Rings: the recommended multiplier.",
    ),
    "control": (
        "Preference and utility against the multiplier for the stored vector and for random directions of the same norm.",
        "Coloured points: the stored vector. Dashed: mean over random directions of the same norm; band: the middle 90% of them. Random "
        "directions should cost utility and leave mean preference without a slope.",
    ),
}


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
    if options.model_name and options.model_name not in stored.models(base):
        raise unknown("model", options.model_name, stored.models(base))
    names = [options.model_name] if options.model_name else stored.models(base)
    jobs = [(m, d) for m in names for d in ([options.dataset] if options.dataset else stored.datasets(base, m))]
    if not options.model_name and options.dataset:
        jobs = [(m, d) for m, d in jobs if d in stored.datasets(base, m)]
    if not jobs:
        raise UserError(f"no stored losses below {base}; run --mode loss first, or check --base_dir")
    for model, dataset in jobs:
        settings = {"norm": options.norm, "budget": options.budget, "split": options.split, "seed": options.seed}
        say(str(update(base, model, dataset, **settings, progress=_say)))
    return 0


def _say(text: str) -> None:
    if sys.stderr.isatty():
        complain(f"  {text}")
