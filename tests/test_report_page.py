"""The page's story, header, links, seeds and lists of pages, from stored results made here; looked at in a real browser where one is."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest
from test_report import DATASET, HOSTILE, Browser, browser, contrast, curves, sigmoid, text_of

from spilt import report
from spilt.analysis import freshness
from spilt.artifacts import losses, manifest
from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.report.places import anchor

__all__ = ["browser"]  # the fixture
MODEL = "toy"
METHODS = {"spilt": 1.0, "sft": 0.8, "caa": 0.0}  # method -> how strong; caa does nothing
SETTINGS = {"layers": [3], "dtype": "float32", "seed": 42, "intervention_positions": "all"}


def write_cell(base: Path, method: str, form: str, dataset: str = DATASET, seed: int = 0, **settings: Any) -> Path:
    """Tables of a sweep with their manifests, a control of 40 random directions without slope, and neutral text."""
    rng = np.random.default_rng([seed, *f"{method}{form}".encode()])
    cell = base / f"vectors/{MODEL}/get_sft_loss/{method}/{dataset}/{method}_{form}"
    grid, n = np.linspace(-20, 20, 21), 24
    for split, name in losses.TABLES.items():
        rows = []
        noise = rng.normal(size=(2, n)) * 0.4
        for m in grid:
            preference, utility = curves(np.array(m / 20), "spilt")
            mass, odds = sigmoid(utility + noise[0]), METHODS[method] * preference + noise[1] + rng.normal(size=n) * 0.1
            loss = -np.log(np.stack([mass * sigmoid(odds), mass * sigmoid(-odds)]))
            for example in range(n):
                for target, value in zip(losses.TARGETS, loss[:, example], strict=True):
                    target, value = (losses.NEUTRAL_TARGET, 2 + abs(m) / 40) if split == losses.NEUTRAL else (target, value)
                    rows.append((m, abs(m) * 0.05, "all", example, target, 3, value + 0.1, 1, value))
        table = pd.DataFrame(rows, columns=losses.TABLE).drop_duplicates(["multiplier", "example", "target"])
        told = {**SETTINGS, **settings}
        parts = {"verb": "measure", "split": split, "settings": told, "concept": None}
        manifest.write(cell / name, table.to_csv(index=False), parts)
    rows = []
    for draw in range(40):
        slope = rng.normal() * 0.1
        rows += [("train", draw, m, abs(m) * 0.05, 0.3 + slope * m / 20, 3.4 - 2 * (m / 20) ** 2, 1.0, 1.0, n, 0) for m in grid]
    (cell / "control.csv").write_text(pd.DataFrame(rows, columns=losses.CONTROL).to_csv(index=False))
    return cell


def write_texts(base: Path, method: str, form: str, multipliers: list[float]) -> None:
    for m in multipliers:
        told = [{"input": q, "orig_pred": [], "pred": [f"{method} at {m:g}: {HOSTILE}"]} for q in ("One?", "Two?", "Three?", "Four?")]
        path = base / f"generation/{MODEL}/{method}/{DATASET}/{method}_{form}/m{m}/{DATASET}_results.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps([{**row, "reference_response": None, "complete_output": []} for row in told]))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("page")
    for method in METHODS:
        write_cell(base, method, "vector", **({"dtype": "bfloat16"} if method == "sft" else {}))
    for seed in (2, 3):
        write_cell(base, "spilt", f"vector@seed{seed}", seed=seed)
    card = base / "models" / MODEL / "README.md"
    card.parent.mkdir(parents=True)
    card.write_text("---\ntags: [synthetic, tiny]\n---\n# toy\n")
    table = report.recommend(base, MODEL, DATASET).set_index(["method", "intervention"])["multiplier"]
    for (method, form), m in table[table > 0].items():
        write_texts(base, method, form, [0.0, 10.0, float(m)])
    return base


@pytest.fixture(scope="module")
def built(base: Path) -> Path:
    return report.update(base, MODEL, DATASET)


def sections(page: str) -> dict[str, str]:
    return {name: part for name, part in re.findall(r'<section id="([\w-]+)"(.*?)</section>', page, re.DOTALL)}


@pytest.mark.long
def test_the_story_of_one_cell_comes_first(built: Path) -> None:
    found = sections(text_of(built))
    assert list(found)[:3] == ["story", "across", "found"]
    table = pd.read_csv(built.parent / "recommendations.csv")
    best = table.loc[table["preference_gain_train"].where(table["multiplier"] > 0).idxmax()]
    story = found["story"]
    for value in (best["gain_low_test"], best["gain_high_test"], best["drop_low_test"], best["drop_high_test"]):
        assert f"{value:.2f}".replace("-", "−") in story
    assert f"m = {best['multiplier']:.4g}" in story and f"p = {best['chance_p']:.3f}" in story and "Usable range" in story
    assert "<img" in story and story.count('class="pair"') == 3


@pytest.mark.long
def test_texts_stand_beside_the_unsteered_ones(base: Path, built: Path) -> None:
    found = sections(text_of(built))
    assert found["across"].count('class="pair"') == 3 and "Four?" not in found["across"]
    table = pd.read_csv(built.parent / "recommendations.csv").set_index(["method", "intervention"])
    for method in ("spilt", "sft"):
        assert f"{method} at {table.loc[(method, 'vector'), 'multiplier']:g}: &lt;/div&gt;" in found["across"]
    assert found["across"].count("not steered") == 3 and "at 10:" not in found["across"] and "<script>doc" not in found["across"]


def behind_a_prompt(base: Path, name: str, gain: float, drop: float, **settings: Any) -> None:
    """Losses behind a prompt as those of caa's vector at m = 0, with odds moved by gain and drop."""
    cell = base / f"vectors/{MODEL}/get_sft_loss/caa/{DATASET}/caa_vector"  # the first: the real ones agree where nothing steers
    for split in losses.PROMPTS:
        plain = pd.read_csv(cell / losses.TABLES[split]).query("multiplier == 0")
        p, n = (np.exp(-plain[plain["target"] == target].set_index("example")["answer_loss_sum"]) for target in losses.TARGETS)
        mass, odds = sigmoid(np.log((p + n) / (1 - p - n)) - drop), np.log(p / n) + gain
        moved = {losses.TARGETS[0]: -np.log(mass * sigmoid(odds)), losses.TARGETS[1]: -np.log(mass * sigmoid(-odds))}
        plain["answer_loss_sum"] = [moved[row["target"]][row["example"]] for row in plain.to_dict("records")]
        parts = {
            "verb": "measure",
            "split": split,
            "settings": {**SETTINGS, **settings},
            "model": "toy",
            "data": "rows",
            "prompt": [["user", name]],
        }
        path = Store(base).prompt_table(MODEL, DATASET, name, split)
        manifest.write(path, plain.to_csv(index=False), parts)


@pytest.mark.usefixtures("no_pictures")
@pytest.mark.long
def test_prompts_stand_beside_the_cells(tmp_path: Path) -> None:
    for method in ("spilt", "caa"):
        write_cell(tmp_path, method, "vector")
    m = float(report.recommend(tmp_path, MODEL, DATASET).set_index("method")["multiplier"]["spilt"])
    write_texts(tmp_path, "spilt", "vector", [0.0, m])
    page = report.update(tmp_path, MODEL, DATASET)
    assert "Prompts as baselines" not in text_of(page)
    behind_a_prompt(tmp_path, "asked", gain=0.5, drop=0.25)
    for name in ("asked", "broken"):
        write_texts(tmp_path, "prompt", name, [0.0])
    Store(tmp_path).results(Cell(MODEL, DATASET, "prompt", "broken", ()), 0.0).write_text("[")
    behind_a_prompt(tmp_path, "other", gain=9.0, drop=9.0, dtype="float64")
    behind_a_prompt(tmp_path, "damaged", gain=9.0, drop=9.0)
    Store(tmp_path).prompt_table(MODEL, DATASET, "damaged", "test").write_bytes(b"\x00hello")
    assert freshness.problems_of_current(tmp_path, MODEL, DATASET) is None  # to be drawn again
    found = sections(text_of(report.update(tmp_path, MODEL, DATASET)))
    assert (
        "Prompts as baselines" in found["recommended"]
        and "prompt broken: texts left out" in found["found"]
        and "prompt damaged left out: damaged, or of other questions" in found["found"]
        and "prompt other left out: damaged, or of other questions, settings or model" in found["found"]
    )
    (row,) = pd.read_csv(page.parent / "prompts.csv").to_dict("records")
    assert (row["prompt"], row["on"]) == ("asked", "test") and {"0.50", "0.25"} <= {*re.findall(r">(\d\.\d\d)", found["recommended"])}
    for name in ("preference_gain", "gain_low", "gain_high"):
        assert row[name] == pytest.approx(0.5)
    for name in ("utility_drop", "drop_low", "drop_high"):
        assert row[name] == pytest.approx(0.25)
    best = pd.read_csv(page.parent / "recommendations.csv").set_index("method").loc["spilt"]
    paired = pd.read_csv(page.parent / "against_prompts.csv").set_index(["method", "of"])
    assert paired.loc[("spilt", "preference"), "difference"] == pytest.approx(best["preference_gain_test"] - 0.5)
    assert paired.loc[("spilt", "utility"), "difference"] == pytest.approx(0.25 - best["utility_drop_test"])
    assert found["across"].count("prompt at 0: ") == 3 and found["across"].count("prompt: asked") == 3  # its answers, beside the cell's


@pytest.mark.long
def test_a_cell_that_is_not_beyond_chance_is_not_the_story(tmp_path: Path) -> None:
    write_cell(tmp_path, "caa", "vector")
    page = sections(text_of(report.update(tmp_path, MODEL, DATASET)))
    assert "No cell is recommended" in page["story"] and "No multiplier can be recommended: caa vector: " in page["story"]
    assert "<img" not in page["story"] and "None" not in page["story"]


@pytest.mark.long
def test_the_header_says_how_it_was_measured(base: Path, built: Path) -> None:
    page = text_of(built)
    header, cells = page[: page.index("</header>")], sections(page)["cells"]
    measured = ("<dd>toy</dd>", "<dd>3</dd>", "<dd>42</dd>", "every token, as text is made", "24 train, 24 test")
    for fact in (*measured, "A synthetic model made for trying this tool"):
        assert fact in header
    assert re.search(r"<dt>measured</dt><dd>20\d\d-\d\d-\d\d</dd>", header) and "<dd>spilt 0" in header
    assert "float32" not in header and cells.count("<dd>bfloat16</dd>") == 1 and cells.count("<dd>float32</dd>") == 4  # of a cell: with it


@pytest.mark.parametrize("card", ["", "# toy, synthetic", "---\ntags: synthetic\n---\n", "---\n[[[\n---\n", "---\n- synthetic\n---\n"])
def test_a_card_of_another_kind_says_nothing(tmp_path: Path, card: str) -> None:
    path = tmp_path / "models" / MODEL / "README.md"
    path.parent.mkdir(parents=True)
    path.write_text(card)
    assert not report.about.synthetic(tmp_path, MODEL) and not report.about.synthetic(tmp_path, "another")


@pytest.mark.long
def test_what_gain_and_drop_are_made_of(base: Path, built: Path) -> None:
    made = pd.read_csv(built.parent / "makeup.csv").set_index(["method", "intervention"]).loc[("spilt", "vector")]
    rows = pd.read_csv(base / f"vectors/{MODEL}/get_sft_loss/spilt/{DATASET}/spilt_vector/losses_test.csv")
    wide = rows.pivot(index="multiplier", columns=["target", "example"], values="answer_loss_sum")

    def at(name: str, m: float) -> float:
        return float(np.interp(m, wide.index, wide[name].mean(axis=1)))

    assert made["split"] == "test" and made["dose"] == pytest.approx(0.05 * abs(made["at"]))
    assert made["loss_matching_at_0"] == pytest.approx(at("matching", 0)) and made["neutral_loss_at_0"] == pytest.approx(2)
    assert made["loss_not_matching_at_m"] == pytest.approx(at("not_matching", made["at"]))
    assert made["neutral_loss_at_m"] == pytest.approx(2 + made["at"] / 40)
    preference = wide["not_matching"] - wide["matching"]
    wrong = ((preference - preference.loc[0.0]).mul(np.sign(wide.index), axis=0) < 0).mean(axis=1)
    assert made["moved_wrong"] == pytest.approx(float(np.interp(made["at"], wide.index, wrong)))


@pytest.mark.long
def test_seeds_of_a_method_stand_in_one_row(built: Path) -> None:
    table, every = pd.read_csv(built.parent / "seeds.csv"), pd.read_csv(built.parent / "recommendations.csv")
    assert table[["method", "intervention", "fits"]].to_numpy().tolist() == [["spilt", "vector", 3]]
    own = every[every["method"] == "spilt"]["preference_gain_test"]
    np.testing.assert_allclose(table.loc[0, ["gain", "gain_least", "gain_most"]].astype(float), [own.mean(), own.min(), own.max()])
    assert "spilt vector, seed 2" in text_of(built) and "@seed" not in re.sub(r'href="[^"]*"', "", text_of(built))


@pytest.mark.long
def test_no_names_of_the_code_on_the_page(built: Path) -> None:
    words = re.sub(r"<(style|script)>.*?</\1>|<[^>]+>|[\w/]+\.(csv|json|jsonl)\b", " ", text_of(built), flags=re.DOTALL)
    assert not re.search(r"\b\w+_(plus|minus|train|test|u|r2)\b|\bnan\b|\bNone\b", words)


@pytest.mark.long
def test_links_lead_to_what_is_there(base: Path, built: Path) -> None:
    store = Store(base)
    for page in (built, store.index(MODEL), store.index()):
        html = text_of(page)
        ids = set(re.findall(r' id="([^"]+)"', html))
        links = re.findall(r'href="([^"]*)"', html)
        for link in links:
            if link.startswith("#"):
                assert link[1:] in ids, link
            elif link and not link.startswith("data:"):
                assert not link.startswith("/") and (page.parent / unquote(link)).is_file(), (page, link)
    page = text_of(built)
    assert page.count('href="#cell-') > 20 and "losses_test.csv" in page and "recommendations.csv" in page


@pytest.mark.long
def test_lists_of_pages_are_written_with_each_page(base: Path, built: Path, tmp_path: Path) -> None:
    there = tmp_path / "base"
    shutil.copytree(base, there)
    odd = Store(there).pages(MODEL) / "a <b>&'{{ 7 }}" / "report.html"  # of somebody's own
    manifest.write(odd, "", {}, {"best": {"cell": HOSTILE, "gain": [1]}})
    report.about.write_indexes(there, MODEL)
    for path in (Store(there).index(MODEL), Store(there).index()):
        html = path.read_text(encoding="utf-8")
        assert "<b>" not in html and "<img" not in html and "a &lt;b&gt;&amp;&#39;{{ 7 }}" in html
        best = sections(text_of(built))["story"]
        figure = re.findall(r'<p class="figure">(.*?)</p>', best)[0]
        assert DATASET in html and figure in html and "nats (95%: " in html and re.search(r"20\d\d-\d\d-\d\d", html)
    broken = manifest.manifest_path(there / built.relative_to(base))
    broken.write_text("[" * 100_000)
    report.about.write_indexes(there, MODEL)
    assert DATASET in Store(there).index().read_text(encoding="utf-8")


def test_anchors_tell_all_names_apart() -> None:
    names = ["sft vector", "sft-vector", "sft vector@seed2", "sft 20 vector", "<b>", "é", ""]
    made = [anchor(name) for name in names]
    assert len(set(made)) == len(names) and all(re.fullmatch(r"cell-[A-Za-z0-9-]*", one) for one in made)


# --- in a browser


@pytest.mark.long
@pytest.mark.parametrize("dark", [False, True])
def test_every_table_fits_1400_pixels(built: Path, browser: Browser, dark: bool) -> None:
    browser.open(built, 1400, dark)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    too_wide = "[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth).map((e) => e.ariaLabel)"
    assert browser.js(too_wide) == [] and browser.js("document.documentElement.scrollWidth") <= 1400
    assert browser.js("document.querySelectorAll('.scroll').length") > 8
    # every text keeps a contrast of 4.5 : 1 on what it stands on
    pairs = browser.js(
        """[...document.querySelectorAll('p, dt, dd, small, th, td, a, li, figcaption, caption span, summary')].map((e) => {
        let at = e; while (at && /, 0\\)|transparent/.test(getComputedStyle(at).backgroundColor)) at = at.parentElement;
        const rgb = (c) => c.match(/[0-9.]+/g).slice(0, 3).join(' ');
        return rgb(getComputedStyle(e).color) + '|' + rgb(getComputedStyle(at || document.body).backgroundColor); })"""
    )
    for pair in set(pairs):
        one, other = ([float(c) for c in colour.split()] for colour in pair.split("|"))
        assert contrast(one, other) > 4.5, pair


@pytest.mark.long
def test_the_first_column_stays_at_400_pixels(built: Path, browser: Browser) -> None:
    browser.open(built, 400)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.js("document.documentElement.scrollWidth") <= 400
    moved = """[...document.querySelectorAll('.scroll')].filter((e) => e.scrollWidth > e.clientWidth + 40).map((e) => {
        e.scrollLeft = 1e4;
        const left = e.getBoundingClientRect().left, heads = [...e.querySelectorAll('tr > th:first-child')];
        return heads.length > 1 && e.scrollLeft > 0 && heads.every((h) => { const b = h.getBoundingClientRect();
            return Math.abs(b.left - left) < 3 && b.width < 180; }); })"""
    seen = browser.js(moved)
    assert len(seen) > 6 and all(seen)


@pytest.mark.long
def test_a_link_opens_its_cell(built: Path, browser: Browser) -> None:
    browser.open(built)
    browser.js("document.querySelector('#recommended tbody a').click()")
    browser.js("new Promise((done) => setTimeout(done, 200))")
    assert browser.js("document.getElementById(location.hash.slice(1)).open")
    assert browser.js("document.title").startswith(DATASET) and browser.js("document.querySelectorAll('img[onerror]').length") == 0


@pytest.mark.long
def test_the_list_of_pages_in_a_browser(base: Path, built: Path, browser: Browser) -> None:
    for width in (400, 1400):
        browser.open(Store(base).index(), width)
        assert (
            browser.js("document.documentElement.scrollWidth") <= width and browser.js("document.querySelectorAll('tbody tr').length") == 1
        )
        assert not [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
