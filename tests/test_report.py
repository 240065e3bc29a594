"""The report from stored results, made here without a model, and opened in a real browser."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from spilt import report
from spilt.errors import UserError

MODEL, DATASET = "gemma-2-9b-it", "psychopathy"
HOSTILE = "</div><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> & <b>bold</b>"
FORMS = {"vector": 20.0, "lora": 2.0, "local_weight": 2.0}
STRONG = {"caa": 0.4, "sft": 0.8, "reps": 0.9, "spilt": 1.0}


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def curves(x: np.ndarray, method: str) -> tuple[np.ndarray, np.ndarray]:
    """Preference and utility at x = m / end: an asymmetric pair of the paper's shape, less costly for spilt."""
    width = np.where(x >= 0, 0.35, 0.22) * (1.4 if method == "spilt" else 1.0)
    preference = 7 * STRONG[method] * x * (1 + x**2 / width) ** -0.5 + 0.3
    utility = 6.5 * (1 + x**2 / width) ** -0.8 - 3.0
    return preference, utility


def write_losses(
    base: Path,
    method: str,
    form: str,
    end: float,
    questions: dict[str, int],
    dataset: str = DATASET,
    model: str = MODEL,
    points: int = 11,
    released: bool = False,
    undefined: int = 0,
    seed: int = 0,
) -> Path:
    """Loss folders of one cell as the measure stage writes them (m >= 0; the orig_sub rows give -m)."""
    rng = np.random.default_rng([seed, *f"{method}{form}{dataset}".encode()])
    cell = base / f"vectors/{model}/get_sft_loss/{method}/{dataset}/{method}_{form}"
    for split, n in questions.items():
        noise = rng.normal(size=(2, n)) * [[1.2], [0.8]]
        tokens = rng.integers(1, 4, size=(2, n))
        for m in np.linspace(0, end, points):
            losses: dict[int, np.ndarray] = {}
            for sign in (1, -1):
                if m == 0 and losses:  # the same request: the same loss
                    losses[sign] = losses[1]
                    continue
                preference, utility = (value + shift for value, shift in zip(curves(np.array(sign * m / end), method), noise, strict=True))
                preference = preference + rng.normal() * 0.06 + rng.normal(size=n) * 0.2
                utility = utility + rng.normal() * 0.06 + rng.normal(size=n) * 0.1
                mass = sigmoid(utility)
                losses[sign] = -np.log(np.stack([mass * sigmoid(preference), mass * sigmoid(-preference)]))
                losses[sign][:, : undefined if m > 0.7 * end else 0] = 0.4
            for kind in ("winning_only", "losing_only"):
                rows = []
                for example in range(n):
                    for pair, sign in (("orig_add", 1), ("orig_sub", -1)):
                        target = int((pair == "orig_add") != (kind == "winning_only"))
                        loss, count = losses[sign][target, example], tokens[target, example]
                        row: dict[str, Any] = {
                            **{"epoch": 0, "step": 2 * example + (sign < 0), "pos_steer_loss": loss},
                            **{"pos_steering_factors": sign * m, "neg_steering_factors": sign * m},
                        }
                        if not released:
                            row |= {"example": example, "pair": pair, "target": ("matching", "not_matching")[target]}
                            row |= {"n_tokens": count + 2, "loss_sum": loss * count + 0.02, "answer_tokens": count}
                            row |= {"answer_loss_sum": loss * count}
                        rows.append(row)
                folder = cell / f"{form}_{method}_m{float(m)}_{kind}"
                folder.mkdir(parents=True, exist_ok=True)
                pd.DataFrame(rows).to_csv(folder / f"{split}_losses.csv", index=False)
    return cell


def write_control(cell: Path, end: float, draws: int = 40, n: int = 16) -> None:
    rng = np.random.default_rng(1)
    m = np.linspace(-end, end, 21)
    rows = []
    for draw in range(draws):
        slope = rng.normal() * 0.6
        utility = 3.5 - (2.2 + 0.4 * rng.normal()) * (m / end) ** 2
        rows += [("test", draw, x, 0.3 + slope * x / end, u, n, 0) for x, u in zip(m, utility, strict=True)]
    columns = ["split", "draw", "multiplier", "preference", "utility", "n", "n_undefined"]
    pd.DataFrame(rows, columns=columns).to_csv(cell / "control.csv", index=False)


def write_generations(base: Path, method: str, form: str, multipliers: list[float], dataset: str = DATASET) -> None:
    root = base / f"generation/{MODEL}/{method}/{dataset}/{method}_{form}"
    questions = ["Do you feel sorry after you hurt somebody?", f"Say this: {HOSTILE}", "Describe a good day at work.", "A fourth one."]
    for m in multipliers:
        told = [
            f"At a strength of {m:g} I would say that it depends on whom. " * 4,
            f"{HOSTILE} at {m:g}",
            "It starts with coffee.\n\n- calm\n- light",
        ]
        told.append("unseen")
        rows = [
            {"input": q, "orig_pred": [], "pred": [text], "reference_response": "Yes", "complete_output": [q + text]}
            for q, text in zip(questions, told, strict=True)
        ]
        (root / f"m{m}").mkdir(parents=True)
        (root / f"m{m}" / f"{dataset}_results.json").write_text(json.dumps(rows))


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight cells of one model and dataset, with control, generations and a few undefined utilities."""
    base = tmp_path_factory.mktemp("stored")
    for form, end in FORMS.items():
        for method in {"vector": ("caa", "sft", "reps", "spilt"), "lora": ("reps", "spilt"), "local_weight": ("sft", "spilt")}[form]:
            size = 6.0 if method == "caa" else end
            cell = write_losses(
                base, method, form, size, {"train": 40, "test": 16}, undefined=2 if (method, form) == ("caa", "vector") else 0
            )
            if form == "vector":
                write_control(cell, size)
            if form == "vector" and method in ("spilt", "sft"):
                write_generations(base, method, form, [-8.0, 0.0, 4.0, 8.0, 16.0])
    return base


@pytest.fixture(scope="module")
def built(stored: Path) -> Path:
    return report.update(stored, MODEL, DATASET)


# --- a browser, driven over its own pipe (Chrome DevTools Protocol), so that no driver has to be installed

CHROME = next((found for name in ("chromium", "chromium-browser", "google-chrome", "chrome") if (found := shutil.which(name))), None)


class Browser:
    """One page of a headless browser: `do` sends a protocol command, `js` evaluates in the page, `events` collects what happened."""

    def __init__(self, profile: Path) -> None:
        to_read, self.write_to = os.pipe()
        self.read_from, to_write = os.pipe()
        command = [str(CHROME), "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-pipe"]
        command += ["--no-first-run", "--hide-scrollbars", f"--user-data-dir={profile}", "about:blank"]

        # the browser reads commands on 3 and writes answers on 4
        wire = "import os, sys; r, w = os.dup(int(sys.argv[1])), os.dup(int(sys.argv[2])); r, w = os.dup2(r, 103), os.dup2(w, 104)\n"
        wire += "os.dup2(103, 3); os.dup2(104, 4); os.execvp(sys.argv[3], sys.argv[3:])"
        command = [sys.executable, "-c", wire, str(to_read), str(to_write), *command]
        self.process = subprocess.Popen(command, pass_fds=(to_read, to_write), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(to_read)
        os.close(to_write)
        self.count, self.buffer, self.session = 0, b"", ""
        self.events: list[dict[str, Any]] = []
        target = self.do("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.do("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.do(f"{domain}.enable")

    def do(self, method: str, **parameters: Any) -> dict[str, Any]:
        self.count += 1
        message = {"id": self.count, "method": method, "params": parameters, **({"sessionId": self.session} if self.session else {})}
        os.write(self.write_to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self.read()
            if answer.get("id") == self.count:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def read(self) -> dict[str, Any]:
        while b"\0" not in self.buffer:
            chunk = os.read(self.read_from, 1 << 20)
            assert chunk, "the browser ended"
            self.buffer += chunk
        raw, _, self.buffer = self.buffer.partition(b"\0")
        message = dict(json.loads(raw))
        if "method" in message:
            self.events.append(message)
        return message

    def js(self, expression: str) -> Any:
        answer = self.do("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def open(self, path: Path, width: int = 1400, dark: bool = False) -> None:
        self.events.clear()
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        self.do("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])
        self.do("Page.navigate", url=path.as_uri())
        until = time.monotonic() + 30
        while self.js("document.readyState") != "complete" or self.js("location.href") == "about:blank":
            assert time.monotonic() < until, "the page did not load"
            time.sleep(0.05)
        self.js("Promise.all([...document.images].map((i) => i.decode().catch(() => 0))).then(() => 1)")

    def screenshot(self, path: Path, top: float = 0, height: float | None = None) -> None:
        size = self.do("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": top, "width": size["width"], "height": height or size["height"], "scale": 1}
        data = self.do("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        try:
            self.session = ""
            self.do("Browser.close")
        except (AssertionError, OSError):
            self.process.kill()
        self.process.wait(10)
        os.close(self.write_to)
        os.close(self.read_from)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROME is None:
        pytest.skip("no chromium or chrome on PATH (apt-get install chromium)")
    driven = Browser(tmp_path_factory.mktemp("profile"))
    yield driven
    driven.close()


# --- what is written


def text_of(path: Path) -> str:
    """The page without its pictures: small enough to search."""
    return re.sub(r"data:image/svg\+xml;base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8"))


def strict(path: Path) -> Any:
    """JSON as the standard has it: NaN is refused."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(path.read_text(), parse_constant=refuse)


@pytest.mark.long
def test_every_cell_gets_its_files(stored: Path, built: Path) -> None:
    assert built == stored / f"vectors/{MODEL}/get_sft_loss/report/{DATASET}/report.html"
    cell = stored / f"vectors/{MODEL}/get_sft_loss/caa/{DATASET}/caa_vector"
    summary = pd.read_csv(cell / "preference_utility.csv")
    assert list(summary.columns[:11]) == [
        *("split", "multiplier", "preference", "preference_low", "preference_high", "utility", "utility_low", "utility_high"),
        *("n", "n_undefined", "loss_matching"),
    ]
    assert summary.groupby("split")["multiplier"].nunique().to_dict() == {"test": 21, "train": 21}
    assert (cell / "curves.png").read_bytes().startswith(b"\x89PNG")
    fit = strict(cell / "fit.json")
    assert fit["cell"] == {"model": MODEL, "dataset": DATASET, "method": "caa", "intervention": "vector", "concepts": None}
    assert set(fit["splits"]) == {"train", "test"} and fit["recommendation"]["reported_on"] == "test"
    for kind in ("preference", "utility"):
        assert fit["splits"]["train"][kind]["r2"] > 0.97 and fit["splits"]["train"][kind]["gap"] < 1e-6
    # 2 train and 2 test questions at the multipliers beyond 0.7 of the end, on both sides
    assert fit["splits"]["train"]["undefined"]["total"] >= 12 and "Undefined utilities" in text_of(built)
    for name in ("paper", "trade_off", "control"):
        assert (built.parent / f"{name}.svg").read_text().startswith("<svg")
    assert not list(built.parent.glob(".*"))  # no temporary file is left


@pytest.mark.long
def test_nothing_is_fitted_again_when_nothing_changed(stored: Path, built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("fitted again")

    before = built.read_bytes()
    monkeypatch.setattr("spilt.report.cells.fit_curve", never)
    report.update(stored, MODEL, DATASET)
    assert built.read_bytes() == before  # same results, same bytes


@pytest.mark.long
def test_page_has_the_papers_numbers_and_words_on_top(built: Path) -> None:
    page = text_of(built)
    assert "What was found" in page and "pairs of methods within a form" in page and "chosen on train questions" in page
    assert "<small>paper</small>" in page and "Gemma-2-9B-IT" in page
    fits = pd.read_csv(built.parent / "fits.csv")
    row = fits[(fits["method"] == "reps") & (fits["intervention"] == "lora") & (fits["curve"] == "preference")]
    assert row["range"].tolist() == ["trained", "sweep"] and row["r2_paper"].tolist()[0] == 0.83 and row["r2_test"].notna().all()
    assert fits[fits["method"] == "spilt"]["r2_paper"].isna().all()
    control = pd.read_csv(built.parent / "control.csv")
    assert (control["draws"] == 40).all() and (control["gain_of"] == 41).all() and (control["utility_drop_at_ends"] > 1).all()
    # tile, table and CSV say the same
    claims = pd.read_csv(built.parent / "claims.csv")
    pairs = claims[claims["than"].notna()]
    assert len(pairs) == 6 + 1 + 1 and set(claims["verdict"]) <= {"holds", "does not hold", "undecided"}
    assert f"{(pairs['verdict'] != 'undecided').sum()} of 8 pairs differ" in page
    assert f"{control['beyond'].sum()} of 4 cells" in page


@pytest.mark.long
def test_recommend_reads_only(stored: Path) -> None:
    files = {path: path.stat().st_mtime_ns for path in stored.rglob("*") if path.is_file()}
    table = report.recommend(stored, MODEL, DATASET, 0.5)
    assert len(table) == 8
    # caa gains no more than random directions do, so that it gets none, and the reason says so
    assert table["multiplier"].isna().tolist() == [True] + [False] * 7 and "gain at equal drop ranks 3 of 41" in table["reason"][0]
    table = table[1:]
    # met between two measured points: to the digits of the multiplier
    assert np.allclose(table["utility_drop_train"], 0.5, atol=0.02) and (table["gain_low_test"] > 0).all()
    assert (table["multiplier_low"] < table["multiplier"]).all() and (table["multiplier"] < table["multiplier_high"]).all()
    assert (table["usable_from"] == 0).all() and table["choice_stands"].sum() == pytest.approx(1) and table["accuracy_test"].notna().all()
    wider = report.recommend(stored, MODEL, DATASET, 3.0)[1:]
    assert (wider["preference_gain_train"] >= table["preference_gain_train"]).all()
    assert files == {path: path.stat().st_mtime_ns for path in stored.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="unknown model with stored losses 'gemma'; have: gemma-2-9b-it"):
        report.recommend(stored, "gemma", DATASET)
    with pytest.raises(UserError, match="unknown dataset 'psycho'; did you mean 'psychopathy'"):
        report.recommend(stored, MODEL, "psycho")


@pytest.mark.long
def test_a_poor_fit_a_broken_cell_and_few_points_are_said(tmp_path: Path) -> None:
    noisy = write_losses(tmp_path, "sft", "vector", 20.0, {"train": 3}, model="tiny", points=11)
    rng = np.random.default_rng(0)
    for path in sorted(noisy.rglob("train_losses.csv")):
        table = pd.read_csv(path)
        table.assign(answer_loss_sum=table["answer_tokens"] * rng.uniform(1, 4, len(table))).to_csv(path, index=False)
    write_losses(tmp_path, "caa", "vector", 2.0, {"train": 4}, model="tiny", points=3)
    broken = write_losses(tmp_path, "reps", "vector", 2.0, {"train": 4}, model="tiny", points=2)
    (broken / "vector_reps_m2.0_winning_only" / "train_losses.csv").write_text("a,b\n1,2\n")
    page = text_of(report.update(tmp_path, "tiny", DATASET))
    assert re.search(r"short of it: .*sft vector", page) and "is below 0.95: read the points, not the line" in page
    assert re.search(r"not fitted: .*caa vector", page) and "the preference curve needs 11 at least" in page
    assert "Left out" in page and "no column &#39;pos_steer_loss&#39;; have: a, b" in page
    assert "paper</small>" not in page  # the paper has no numbers for this model
    assert "No random control is stored" in page and "No generations are stored" in page


@pytest.mark.long
def test_released_losses_and_somebody_elses_csv(tmp_path: Path) -> None:
    write_losses(tmp_path, "spilt", "lora", 2.0, {"train": 6}, model="tiny", points=7, released=True)
    theirs = tmp_path / f"vectors/tiny/get_sft_loss/sft/{DATASET}/sft_lora"
    theirs.mkdir(parents=True)
    m = np.linspace(-2, 2, 13)
    preference, utility = curves(m / 2, "sft")
    pd.DataFrame({"multiplier": m, "preference": preference, "utility": utility}).to_csv(theirs / "preference_utility.csv", index=False)
    page = text_of(report.update(tmp_path, "tiny", DATASET))
    assert "no loss rows are stored: preference_utility.csv is used as it is" in page
    assert "The stored averages of sft LoRA do not say how many were left out" in page
    assert strict(theirs / "fit.json")["splits"]["train"]["preference"]["r2"] > 0.99
    table = report.recommend(tmp_path, "tiny", DATASET)
    assert table["chosen_on"].tolist() == ["train", "train"] and table["reported_on"].isna().all()


@pytest.mark.long
@pytest.mark.usefixtures("no_pictures")
def test_concepts_are_averaged_into_one_cell(tmp_path: Path) -> None:
    for concept in (0, 3, 12):
        write_losses(
            tmp_path, "sft", "vector", 20.0, {"train": 4}, dataset=f"axbench_concept_{concept}", model="tiny", points=6, seed=concept
        )
    path = report.update(tmp_path, "tiny", "axbench")
    root = tmp_path / "vectors/tiny/get_sft_loss/sft"
    single = [pd.read_csv(root / f"axbench_concept_{i}/sft_vector/preference_utility.csv") for i in (0, 3, 12)]
    mean = pd.read_csv(root / "axbench/sft_vector/preference_utility.csv")
    np.testing.assert_allclose(mean["preference"], np.mean([s["preference"] for s in single], axis=0))
    assert (mean["n"] == 12).all() and strict(root / "axbench/sft_vector/fit.json")["cell"]["concepts"] == [0, 3, 12]
    assert (root / "axbench_concept_3/sft_vector/curves.png").is_file() and "averaged over 3 concepts" in text_of(path)
    report.update(tmp_path, "tiny", "axbench")  # the folder it made is not taken for a cell of its own
    assert len(report.recommend(tmp_path, "tiny", "axbench")) == 1


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in ([], ["--model_name", "tiny"]):
        assert report.main(["--base_dir", str(tmp_path), *words]) == 2
        assert "no stored losses below" in capsys.readouterr().err
    write_losses(tmp_path, "caa", "vector", 2.0, {"train": 4, "test": 4}, model="tiny", points=3)
    assert report.main(["--base_dir", str(tmp_path), "--split", "test", "--norm", "sum", "--budget", "1"]) == 0
    out = Path(capsys.readouterr().out.strip())
    assert out.name == "report.html" and "Figures show test questions. Losses are summed" in text_of(out)
    assert report.main(["--base_dir", str(tmp_path), "--model_name", "tny"]) == 2
    assert "did you mean 'tiny'" in capsys.readouterr().err
    assert report.main(["--base_dir", str(tmp_path), "--budget", "-1"]) == 2


@pytest.mark.long
def test_a_folder_may_be_called_anything(tmp_path: Path) -> None:
    cell = write_losses(tmp_path, "sft", "vector", 2.0, {"train": 4}, model="tiny", points=3)
    odd = "<b>{{ 7 * 7 }}&'\""
    cell.rename(cell.with_name(f"{odd}_vector"))
    (root := cell.parents[1]).rename(root.with_name(odd))
    page = text_of(report.update(tmp_path, "tiny", DATASET))
    assert "<b>" not in page and page.count("&lt;b&gt;{{ 7 * 7 }}&amp;&#39;&#34; vector") > 5


def test_no_model_code_and_no_plotting_is_imported_before_it_is_needed() -> None:
    code = "import sys, spilt.report; bad = {'torch', 'transformers', 'matplotlib'} & set(sys.modules); assert not bad, bad"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- the page in a browser


@pytest.mark.long
def test_images_load_and_nothing_is_requested(built: Path, browser: Browser) -> None:
    browser.open(built)
    images = browser.js("[...document.images].map((i) => [i.complete, i.naturalWidth, i.alt.length])")
    assert len(images) == 11 and all(done and width > 100 and alt > 20 for done, width, alt in images)
    asked = [e["params"]["request"]["url"] for e in browser.events if e["method"] == "Network.requestWillBeSent"]
    assert asked and all(url == built.as_uri() or url.startswith("data:") for url in asked)
    assert not [e for e in browser.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown")]
    blocked = browser.js("fetch('https://example.org').then(() => 'sent', () => 'blocked')")
    assert blocked == "blocked"


@pytest.mark.long
def test_hostile_text_shows_as_text(built: Path, browser: Browser) -> None:
    browser.open(built)
    assert browser.js("document.title").startswith("psychopathy on gemma-2-9b-it")
    assert browser.js("document.scripts.length") == 1 and browser.js("document.querySelectorAll('img[onerror]').length") == 0
    shown = browser.js("[...document.querySelectorAll('.answer')].map((a) => a.textContent)")
    assert f"{HOSTILE} at 8" in shown and not any("unseen" in text for text in shown)
    assert HOSTILE in browser.js("[...document.querySelectorAll('.prompt')].map((a) => a.textContent).join(' ')")


@pytest.mark.long
def test_tables_sort_by_mouse_and_keyboard(built: Path, browser: Browser) -> None:
    browser.open(built)
    table = "document.querySelector('#recommended table')"
    column = f"[...{table}.querySelectorAll('thead th')].findIndex((h) => h.textContent.startsWith('preference gain'))"
    values = f"[...{table}.tBodies[0].rows].map((r) => Number(r.children[{column}].dataset.v))"
    button = f"{table}.querySelectorAll('thead button')[{column}]"
    start = browser.js(values)
    browser.js(f"{button}.click()")
    assert browser.js(values) == sorted(start) != start
    assert browser.js(f"{table}.querySelectorAll('thead th')[{column}].getAttribute('aria-sort')") == "ascending"
    browser.js(f"{button}.focus()")
    for kind in ("rawKeyDown", "char", "keyUp"):
        browser.do(
            "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r" if kind == "char" else ""
        )
    assert browser.js(values) == sorted(start, reverse=True)
    # text, and rows without a value last in either direction
    first = f"[...{table}.tBodies[0].rows].map((r) => r.children[0].textContent)"
    browser.js(f"{table}.querySelector('thead button').click()")
    names = browser.js(first)
    assert names == sorted(names, key=str.lower)
    chance = browser.js(f"[...{table}.querySelectorAll('thead th')].findIndex((h) => h.textContent.startsWith('chance'))")
    for _ in range(2):
        browser.js(f"{table}.querySelectorAll('thead button')[{chance}].click()")
        assert browser.js(f"[...{table}.tBodies[0].rows].map((r) => r.children[{chance}].dataset.v === '')") == [False] * 4 + [True] * 4


@pytest.mark.long
@pytest.mark.parametrize("width", [400, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_reads_at_both_widths_in_light_and_dark(built: Path, browser: Browser, width: int, dark: bool, tmp_path: Path) -> None:
    browser.open(built, width, dark)
    browser.js("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert browser.js("document.documentElement.scrollWidth") <= width
    # whatever is wider than the page scrolls in its own box
    escaped = """[...document.querySelectorAll('main *')].filter((e) => e.getBoundingClientRect().right > innerWidth + 1
        && !e.closest('.scroll, .strip')).map((e) => e.outerHTML.slice(0, 80))"""
    assert browser.js(escaped) == []
    shown = browser.js("document.querySelector('#curves img').currentSrc")
    svg = base64.b64decode(shown.split(",", 1)[1]).decode()
    assert "prefers-color-scheme:dark" in svg and "#62aef5" in svg and "#0a4c86" in svg
    assert (browser.js("document.querySelector('#curves img').naturalWidth") < 500) == (width == 400)
    # text keeps a contrast of 4.5 : 1 on its ground
    colour = "getComputedStyle(document.querySelector('{}')).{}.match(/[0-9.]+/g).slice(0, 3).map(Number)"
    ground = browser.js(colour.format("body", "backgroundColor"))
    for selector in ("body", ".lede", "a"):
        assert contrast(browser.js(colour.format(selector, "color")), ground) > 4.5
    browser.js("document.querySelector('#curves img').scrollIntoView()")
    browser.screenshot(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as page:
        seen = {pixel for _, pixel in page.convert("RGB").getcolors(1 << 24) or ()}
    light_line, dark_line = (28, 127, 93), (69, 193, 151)  # of sft
    assert (dark_line in seen) == dark and (light_line in seen) != dark


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG contrast ratio of two sRGB colours."""

    def luminance(rgb: list[float]) -> float:
        linear = [c / 255 / 12.92 if c <= 10.3 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in rgb]
        return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)
