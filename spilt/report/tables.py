"""The report's tables, stored as CSV; templates/tables.html has how each is shown. Log-odds in nats."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from spilt.analysis import claims, paper
from spilt.analysis.curves.fitting import GOOD_R2
from spilt.analysis.questions import Questions
from spilt.analysis.recommend import choice
from spilt.analysis.scores import COLUMNS
from spilt.errors import printable
from spilt.report.cells import KINDS, RANGES, Measured
from spilt.report.places import anchor, label, name_of

Row = dict[str, Any]
OF_SPLITS = (
    *("preference_gain", "gain_low", "gain_high", "utility_drop", "drop_low", "drop_high"),
    *("preference", "utility", "accuracy_at_0", "accuracy", "n", "n_undefined"),
)
VERDICTS = (claims.HOLDS, claims.FAILS, claims.OPEN)
STATISTICS = ("slope", "gain", "behaviour")
CONTROL = [
    *("method", "intervention", "draws", "questions", "unit"),
    *(f"{name}_{what}" for name in STATISTICS for what in ("own", "random", "rank", "of", "p")),
    *("beyond", "utility_drop_at_ends", "ends"),
]


PARAMETERS = {
    f"{letter}_{end}": f"{name} (m {sign} 0)"
    for letter, name in {"m": "centre", "L": "width", "p": "power"}.items()
    for end, sign in {"plus": ">", "minus": "<"}.items()
}
SEEDS = [
    *("method", "intervention", "fits", "recommended", "on"),
    *(f"{name}{what}" for name in ("multiplier", "gain", "drop") for what in ("", "_least", "_most")),
]


def records(frame: pd.DataFrame, linked: Collection[str] = ()) -> list[Row]:
    """A table's rows with their cell, and its form, by the printed names; of the cells linked: with their place on the page."""
    out = []
    for row in frame.to_dict("records"):
        method, form = (row["method"], row["intervention"]) if "method" in row else row.get("cell", "all cells").split(" ", 1)
        shown = {"cell": label(method, form), "form": label("", form)}
        shown |= {"anchor": anchor(name)} if (name := printable(f"{method} {form}")) in linked else {}
        if "bound_hits" in row:  # in words; the CSV keeps the fit's own names
            shown |= {"at_bound": ", ".join(PARAMETERS.get(name, name) for name in row["bound_hits"].split())}
            shown |= {"warned": row["warnings"].replace(" ", ", ").replace("_", " ")}
        out.append({**row, **shown, **({"than": name_of(row["than"])} if "than" in row else {})})
    return out


def recommendations(cells: Sequence[Measured], seed: int = 0) -> pd.DataFrame:
    """One row per cell: the multiplier chosen on training items with its interval, its numbers there and on test items (columns end in
    _train / _test), its rank among random ones, and among cells how often the choice stands and which cannot be told from the best."""
    in_choice = {cell.name: cell.frame for cell in cells if cell.best["multiplier"]}
    budget = cells[0].best["budget"] if cells else 0.0
    among = choice(in_choice, budget, seed)
    rows = []
    for cell in cells:
        best, chance = cell.best, cell.best["chance"] or {"tests": {}}
        gain = chance["tests"].get("gain", {})
        row = cell.names | {"multiplier": best["multiplier"], "multiplier_low": best["low"], "multiplier_high": best["high"]}
        row |= dict(zip(("usable_from", "usable_to"), best["usable"] or (None, None), strict=True))
        for part, split in (("chosen", "train"), ("reported", "test")):
            row |= {f"{name}_{split}": (best[part] or {}).get(name) for name in OF_SPLITS}
        row |= {"solved": best["solved"], "chance_rank": gain.get("rank"), "chance_of": gain.get("of"), "chance_p": gain.get("p")}
        row |= among.loc[cell.name, ["share", "tied"]].to_dict() if cell.name in among.index else {"share": None, "tied": False}
        rows.append(row | {name: best[name] for name in ("chosen_on", "reported_on", "budget", "reason")})
    table = pd.DataFrame(rows).rename(columns={"share": "choice_stands"})
    return table.astype({"multiplier": float} if len(table) else {})  # nan, also where no cell has one


CHANGES = ("loss_matching", "loss_not_matching", "answer_mass", "neutral_loss")


def makeup(cells: Sequence[Measured]) -> pd.DataFrame:
    """One row per cell: what gain and drop are made of at its solved multiplier (nan: none), on the questions that they are reported on;
    CHANGES at m = 0 and there, between measured points by interpolation; the drop averaged per question, and of the mean losses."""
    rows = []
    for cell in cells:
        best = cell.best
        split, m = best["reported_on"] or best["chosen_on"], float("nan") if best["solved"] is None else best["solved"]
        part = cell.rows(split).sort_values("multiplier")

        def at(name: str, where: float, part: pd.DataFrame = part) -> float:
            return float(np.interp(where, part["multiplier"].astype(float), part[name].astype(float)))

        row: Row = {"split": split, "at": m} | {name: at(name, m) for name in ("dose", "moved_wrong")}
        row |= {f"{name}_{where}": at(name, x) for name in CHANGES for where, x in (("at_0", 0.0), ("at_m", m))}
        drops = {"utility_drop": "utility", "utility_drop_pooled": "utility_pooled"}
        rows.append(cell.names | row | {name: at(of, 0.0) - at(of, m) for name, of in drops.items()})
    return pd.DataFrame(rows)


def layers(cells: Sequence[Measured]) -> pd.DataFrame:
    """One row per cell whose layer is known: the gain in preference where utility has fallen by the budget (nan: nowhere), beyond chance or
    not, on the questions that it is reported on. Several layers that act together: '10+14'."""
    rows = []
    for cell in (cell for cell in cells if cell.place.layers):
        best, at = cell.best, cell.best["reported"] or cell.best["chosen"] or {}
        row: Row = {"method": cell.place.method, "intervention": cell.place.form, "layer": "+".join(map(str, cell.place.layers))}
        row |= {"at": best["solved"], "gain": at.get("preference_gain"), "gain_low": at.get("gain_low"), "gain_high": at.get("gain_high")}
        rows.append(row | {"on": best["reported_on"] or best["chosen_on"], "recommended": bool(best["multiplier"]), "cell": cell.name})
    columns = ["method", "intervention", "layer", "at", "gain", "gain_low", "gain_high", "on", "recommended", "cell"]
    return pd.DataFrame(rows, columns=columns)


def foremost(cells: Sequence[Measured]) -> list[Measured]:
    """Of a method and form at several layers those at the layer with the largest gain at the budget (recommended ones first): what pictures
    of all cells have room for."""
    table = layers(cells).sort_values(["recommended", "gain"], ascending=False, kind="stable", key=lambda column: column.astype(float))
    best = {(row["method"], row["intervention"]): row["layer"] for row in table.iloc[::-1].to_dict("records")}
    own = {name: (method, form, layer) for name, method, form, layer in table[["cell", "method", "intervention", "layer"]].to_numpy()}
    return [cell for cell in cells if cell.name not in own or best[own[cell.name][:2]] == own[cell.name][2]]


def scores(cells: Sequence[Measured], of: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Of each cell (by its name) what analysis.scores.summarise says of its stored texts: a row per measure and multiplier."""
    parts = [of[cell.name].assign(**cell.names)[[*cell.names, *COLUMNS]] for cell in cells if len(of[cell.name])]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["method", "intervention", *COLUMNS])


def seeds(cells: Sequence[Measured], table: pd.DataFrame) -> pd.DataFrame:
    """Of `recommendations`: mean and range over the fits of a method, form and layer of which there are several, whatever their seeds."""
    table = table.assign(intervention=[cell.place.fitted_as for cell in cells])
    rows = []
    for (method, form), part in table.groupby(["method", "intervention"], sort=False):
        on = "test" if (part["reported_on"] == "test").all() else "train"
        names = {"multiplier": "multiplier", "gain": f"preference_gain_{on}", "drop": f"utility_drop_{on}"}
        row: Row = {"method": method, "intervention": form, "fits": len(part), "on": on}
        row |= {"recommended": part["multiplier"].fillna(0).ne(0).sum()}
        for name, column in names.items():
            of = part[column].astype(float)
            row |= {name: of.mean(), f"{name}_least": of.min(), f"{name}_most": of.max()}
        rows += [row] if len(part) > 1 else []
    return pd.DataFrame(rows, columns=SEEDS)


def fits(cells: Sequence[Measured], model: str, dataset: str) -> pd.DataFrame:
    """One row per cell, range and curve: R^2, held out, on the test questions' points, the paper's; bound hits, warnings, parameters."""
    rows = []
    for cell in cells:
        reference = paper.r2(model, dataset, cell.place.method, cell.place.form) or (None, None)
        for extent in RANGES:
            for kind, theirs in zip(KINDS, reference, strict=True):
                fit, on_test = cell.fitted(extent, kind)
                row: Row = {"range": extent, "curve": kind, "r2": fit.r2, "r2_held_out": fit.r2_held_out, "r2_test": on_test}
                row |= {"r2_paper": theirs if extent == "trained" else None, "to": max(map(abs, fit.extent)), "n_points": fit.n_points}
                row |= {"bound_hits": " ".join(fit.bound_hits), "warnings": " ".join(warned.name for warned in fit.warnings)}
                rows.append(cell.names | row | {name.removesuffix("_u"): value for name, value in (fit.parameters or {}).items()})
    return pd.DataFrame(rows)


def fit_averages(table: pd.DataFrame) -> pd.DataFrame:
    """Of `fits`: averages over cells per range and curve (paper tables 2, 6 and 7), and how many reach GOOD_R2."""
    groups = table.assign(good=table["r2"] >= GOOD_R2, fitted=table["r2"].notna()).groupby(["range", "curve"], sort=False)
    numbers = table.columns.intersection(["r2", "r2_held_out", "r2_test", "r2_paper"])
    means = table.assign(**{name: table[name].astype(float) for name in numbers}).groupby(["range", "curve"], sort=False)[[*numbers]].mean()
    return means.join(groups[["fitted", "good"]].sum()).reset_index()


def shortfalls(cells: Sequence[Measured], split: str) -> list[str]:
    """Curves of one split that were not fitted, or fell short, in words."""
    fitted = [(cell, kind, cell.curve(split, kind)) for cell in cells for kind in KINDS]
    minor = ("few_points", "no_held_out")
    return [f"{cell.label}, {kind}: {warned.text}" for cell, kind, fit in fitted for warned in fit.warnings if warned.name not in minor]


def readings(cells: Sequence[Measured], split: str) -> pd.DataFrame:
    """One row per cell: what is read off the curves of one split."""
    rows = []
    for cell in cells:
        stored = cell.stored(split)
        found, peak, drops, undefined = stored["regions"] or {}, stored["utility_peak"] or {}, stored["utility_drops"], stored["undefined"]
        linear, converged = found.get("linear", [None, None]), found.get("convergence", [])
        inner = [edge for span in [linear, *found.get("transitional", [])] for edge in span]
        row = {"split": cell.split_for(split), "linear_from": linear[0], "linear_to": linear[1]}
        row |= {"slope": found.get("slope"), "r2_linear": found.get("r2_linear")}
        # converged from where the inner regions end, unless the sweep ends there too
        row |= {"converged_below": next((b for _, b in converged if b == min(inner)), None)}
        row |= {"converged_above": next((a for a, _ in converged if a == max(inner)), None)}
        row |= {"utility_peak_at": peak.get("multiplier"), "utility_peak": peak.get("utility")}
        row |= {"drop": drops["drop"], "drop_at_minus": drops["minus"], "drop_at_plus": drops["plus"], "read_from": drops["source"]}
        rows.append(cell.names | row | {"n_undefined": undefined["total"], "n_scored": undefined["scored"]})
    return pd.DataFrame(rows)


def control(cells: Sequence[Measured]) -> pd.DataFrame:
    """One row per cell with random interventions beside it: each statistic, its rank among them and p (analysis/chance.py)."""
    rows = []
    for cell in cells:
        chance = cell.best["chance"]
        if chance is None or cell.control is None:
            continue
        row = cell.names | {name: chance[name] for name in ("draws", "questions", "unit", "beyond")}
        row |= {f"{name}_{what}": value for name, found in chance["tests"].items() for what, value in found.items()}
        utility = cell.control.groupby("multiplier")["utility"].mean().dropna()
        drop = float(utility.loc[0.0] - utility.iloc[[0, -1]].mean()) if 0.0 in utility.index else None
        rows.append(row | {"utility_drop_at_ends": drop, "ends": float(cell.control["multiplier"].abs().max())})
    return pd.DataFrame(rows, columns=CONTROL)


def claimed(cells: Sequence[Measured], split: str, seed: int = 0) -> pd.DataFrame:
    """One row per claim and cell (analysis/claims.py): everything that the page says of claims is read from here."""
    fits: dict[tuple[str, str], list[Measured]] = {}  # those that differ by their seed alone
    for cell in cells:
        same = fits.setdefault((cell.place.method, cell.place.fitted_as), [])
        if not any(cell.frame.equals(other.frame) for other in same):  # a seed given twice
            same.append(cell)
    cases = {}
    for (method, form), same in fits.items():
        r2 = tuple((fit.r2, fit.r2_held_out) for cell in same for fit in (cell.fitted("trained", kind)[0] for kind in KINDS))
        questions = tuple(Questions.of(cell.frame[cell.frame["split"] == cell.split_for(split)]) for cell in same)
        random = next((curves for cell in same if (curves := cell.random_curves) is not None), None)
        name = same[0].name if len(same) == 1 else printable(f"{method} {form}")
        cases[name] = claims.Case(method, form, questions, random, r2)
    return claims.judge(cases, seed)


def trade_off(table: pd.DataFrame) -> pd.DataFrame:
    """Of `claimed`: the pairs of methods within a form at equal preference, each over the range that both reach."""
    pairs = table[table["than"].notna()]
    return pairs[["among", "cell", "than", "verdict", "estimate", "low", "high", "p", "from", "to", "fits", "random_pass", "random_draws"]]


def judged(table: pd.DataFrame) -> list[Row]:
    """Of `claimed`: a row per claim (of pairs, of spilt), verdicts counted, cells against it and undecided by their printed names."""
    out = []
    for claim, part in table[table["than"].isna() | table["cell"].str.startswith("spilt ")].groupby("claim", sort=False):
        cells = {verdict: [name_of(name) for name in part.loc[part["verdict"] == verdict, "cell"]] for verdict in VERDICTS}
        row: Row = {"claim": claim, "judged": len(part)} | {verdict: len(names) for verdict, names in cells.items()}
        random = part[["random_pass", "random_draws"]].sum(min_count=1)
        passed = f"{random.iloc[0]:.0f} of {random.iloc[1]:.0f}" if random.notna().all() else None
        out.append(row | {"random": passed, "against": ", ".join(cells[claims.FAILS]), "open": ", ".join(cells[claims.OPEN])})
    return out
