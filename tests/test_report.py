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
            losses = {}
            for sign in (1, -1):
                preference, utility = (value + shift for value, shift in zip(curves(np.array(sign * m / end), method), noise, strict=True))
                mass = sigmoid(utility)
                preference = preference + rng.normal() * 0.06 + rng.normal(size=n) * 0.2
                utility = utility + rng.normal() * 0.06 + rng.normal(size=n) * 0.1
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


def write_control(cell: Path, end: float, draws: int = 16) -> None:
    rng = np.random.default_rng(1)
    m = np.linspace(-end, end, 21)
    rows = []
    for draw in range(draws):
        slope = rng.normal() * 0.6
        utility = 3.5 - (2.2 + 0.4 * rng.normal()) * (m / end) ** 2
        rows += [("train", draw, x, 0.3 + slope * x / end, u, 40, 0) for x, u in zip(m, utility, strict=True)]
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
    """Ten cells of one model and dataset, with control, generations and a few undefined utilities."""
    base = tmp_path_factory.mktemp("stored")
    for form, end in FORMS.items():
        for method in ("caa", "sft", "reps", "spilt"):
            if method == "caa" and form != "vector":
                continue
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
