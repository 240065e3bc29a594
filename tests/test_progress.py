"""How far a run is: lines where nobody looks at a terminal, bars in one (a real pseudo-terminal), one voice of several processes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import families
import forked
import pytest
import test_team as team

from spilt import cli, plan, run
from spilt.progress import Progress, time_left

ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"\[(\d+)/(\d+)\] (done|failed|skipped|already done): (.+?) \([\d.]+ s\); [\d:]+ so far(, about [\d:]+ left)?")
# the same program with a line every .2 seconds
EVERY = "from spilt import cli, progress\nprogress.EVERY = 0.2\nraise SystemExit(cli.main())"


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    return families.make_base(tmp_path / "base", train=6)


def called(*words: str) -> subprocess.CompletedProcess[str]:
    return forked.run(words)


def test_the_time_left_is_that_of_the_measured_speed() -> None:
    """Of the same kind of work where some is done, else of all; nothing is said where nothing is known."""
    assert time_left([("fit", 10.0)], []) is None and time_left([("fit", 10.0)], [("report", 0.0, 5.0)]) is None
    assert time_left([], [("fit", 1.0, 1.0)]) == 0
    done = [("fit", 10.0, 20.0), ("fit", 30.0, 20.0), ("measure", 10.0, 5.0)]
    assert time_left([("fit", 8.0), ("fit", 2.0)], done) == 10.0
    assert time_left([("measure", 8.0)], done) == 4.0
    assert time_left([("generate", 10.0)], done) == pytest.approx(10 * 45 / 50)


def test_what_is_in_work_counts_by_its_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell a quarter through in the first seconds of a run: the rest is known from it."""
    work = {"a": ("fit", 4.0), "b": ("fit", 8.0), "report": ("report", 0.0)}
    told: list[str] = []
    with Progress(work, 0, told.append, quiet=False) as progress:
        progress.begin("a")
        assert progress._rest() is None
        with progress.bar(total=100, desc="fit a", unit="step") as bar:
            bar.update(25)
            monkeypatch.setattr(bar, "start_t", bar.start_t - 10)
            assert progress._rest() == pytest.approx(30 + 80, rel=0.02)
            line = r"\[1/3\] fit a: 25 of 100 steps, about 00:[23]\d left; in all 00:00 so far, about 01:[45]\d left"
            assert re.fullmatch(line, progress._line())
        assert progress._line() == "[1/3] a; in all 00:00 so far"
        progress.end("a", "done", "", 40.0)
        assert progress._rest() == pytest.approx(80)
        progress.begin("b")
        progress.since -= 30
        assert progress._rest() == pytest.approx(50, rel=0.1)
    assert told == ["[1/3] done: a (40.0 s); 00:00 so far, about 01:20 left"]


@pytest.mark.long
def test_a_line_for_each_finished_cell(base: families.Base) -> None:
    """On stderr, in order, with the time so far and, but for the last, the time left; stdout holds the table alone."""
    done = called("run_spilt.py", *base.argv("sft", "all", "--multipliers", "-1", "1"))
    assert done.returncode == 0, done.stderr
    said = LINE.findall(done.stderr)
    steps = [f"{mode} mine sft {form}" for mode in ("generate", "apply") for form in families.FORMS]
    assert [(int(k), int(n), name) for k, n, _, name, _ in said] == [(k, 6, name) for k, name in enumerate(steps, 1)]
    assert all(left for *_, left in said[:-1]) and not said[-1][-1]
    assert done.stdout.startswith("\ncell ") and "so far" not in done.stdout
    base.data(base.one, "valid").write_text("{")
    again = called("run_spilt.py", *base.argv("sft", "all", "--mode", "generate"))
    assert again.returncode == 0 and not LINE.search(again.stderr) and again.stdout.count("already done") == 4  # nothing to say
    quiet = called("run_spilt.py", *base.argv("sft", "vector", "--mode", "generate", "--force", "--quiet"))
    assert quiet.returncode == 0 and all(line.startswith("WARNING") for line in quiet.stderr.splitlines())


@pytest.mark.long
def test_a_line_a_minute_within_a_cell(base: families.Base) -> None:
    """What, how far, how long still; from the first seconds on, when the model is loaded."""
    done = called("-c", EVERY, *base.argv("sft", "vector", "--mode", "generate", "--set", "n_epochs=60"))
    assert done.returncode == 0, done.stderr
    ticks = re.findall(r"^\[1/1\] (.+)$", done.stderr, re.M)
    assert re.fullmatch(r"generate mine sft vector; in all \d\d:\d\d so far", ticks[0])
    form = re.compile(r"fit mine sft vector: (\d+) of (\d+) steps, about [\d:]+ left; in all [\d:]+ so far, about [\d:]+ left")
    within = [form.fullmatch(tick) for tick in ticks]
    far = [int(hit[1]) for hit in within if hit]
    assert len(far) >= 2 and far == sorted(far) and far[-1] > far[0]
    others = [line for line in done.stderr.splitlines() if not line.startswith("[1/1] ")]
    assert "\r" not in done.stderr and all(line.startswith(("WARNING: ", "generate mine sft vector layer 2: ")) for line in others)


def test_costs_that_are_not_known_count_the_same(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """A data file that goes away between plan and run is the step's to tell."""
    request = cli.request_of(cli.parser().parse_args(base.argv("sft", "all", "--mode", "generate")))
    made = plan.make(request)
    work = run._work(made.steps, request, quiet=False)
    assert [kind for kind, _ in work.values()] == ["fit"] * 3 and all(cost > 1e6 for _, cost in work.values())
    base.data(base.one, "train").unlink()
    assert set(run._work(made.steps, request, quiet=False).values()) == {("fit", 1.0)}
    told: list[str] = []
    outcomes = run.run_plan(made, request, told.append, quiet=False)
    assert {outcome.outcome for outcome in outcomes} == {run.FAILED}
    assert [line.partition(" ")[0] for line in told] == ["error:", "[1/3]", "error:", "[2/3]", "error:", "[3/3]"]
    assert capsys.readouterr() == ("", "")


# ---------------------------------------------------------------- a terminal


def of_a_terminal() -> None:
    """Standard input is the terminal that ^C comes from, which a test run in a shell's background would pass on as ignored."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def in_terminal(words: list[str], interrupt_at: bytes = b"", columns: int = 110) -> tuple[int, str]:
    """Exit code and all that is written to a terminal; ^C is typed as soon as something has appeared."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "run_spilt.py", *words], stdin=theirs, stdout=theirs, stderr=theirs, cwd=ROOT, env=env,
        start_new_session=True, preexec_fn=of_a_terminal,
    )  # fmt: skip
    os.close(theirs)
    written = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        written += part
        if interrupt_at and interrupt_at in written:
            os.write(ours, b"\x03")
            interrupt_at = b""
    os.close(ours)
    return child.wait(timeout=60), written.decode()


def screen(written: str) -> list[str]:
    """The lines that are left to be read: of what a terminal obeys, tqdm uses line feed, return and one line up; we erase what is below."""
    lines, row, column = [""], 0, 0
    for found in re.finditer(r"\x1b\[[AJ]|\r|\n|\^C|[^\r\n\x1b^]+", written):
        word = found[0]
        if word == "\x1b[A":
            row -= 1
        elif word == "\x1b[J":
            lines[row:] = [lines[row][:column]]
        elif word == "\r":
            column = 0
        elif word == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        else:
            line = lines[row].ljust(column)
            lines[row], column = line[:column] + word + line[column + len(word) :], column + len(word)
    return [line.rstrip() for line in lines]


@pytest.mark.long
def test_two_bars_in_a_terminal_and_nothing_of_them_afterwards(base: families.Base) -> None:
    """All cells above the one in work; warnings and lines stand whole."""
    code, written = in_terminal(base.argv("sft", "all", "--mode", "both", "--multipliers", "1", "--set", "n_epochs=12"))
    assert code == 0, written
    assert re.search(r"\rcells: 1/6 \|[^\r\n]*\| \d\d:\d\d, about [\d:]+ left", written)
    assert re.search(r"\n\rfit mine sft vector: +\d+%\|[^\r\n]*loss=[^\r\n]*\x1b\[A", written)  # a line below
    left = screen(written)
    assert not any(word in line for line in left for word in ("cells:", "step/s", "%|"))
    assert sum(bool(LINE.fullmatch(line)) for line in left) == 6
    assert sum(line.startswith("WARNING: ") and line.endswith("hold other rows out") for line in left) == 1
    assert "6 done in" in left[-2]


@pytest.mark.long
def test_interrupt_in_a_terminal(base: families.Base) -> None:
    code, written = in_terminal(base.argv("sft", "vector", "--mode", "generate", "--set", "n_epochs=900"), b"step/s, loss=")
    assert code == 130
    left = [line for line in screen(written) if line.strip()]
    assert left[-1] == "interrupted; what was finished is kept, the same command goes on from there"
    assert not any("cells:" in line or "step/s" in line for line in left) and "Traceback" not in written, repr(written[-1500:])


# ---------------------------------------------------------------- several processes


@pytest.mark.slow
@pytest.mark.long
def test_one_of_two_processes_speaks(base: families.Base) -> None:
    """A line for each cell, whichever process fitted it; in the log too."""
    log = base.path / "run.log"
    more = f"import sys; sys.argv += ['--log', {str(log)!r}]"  # torch's launcher takes --log for its own --log_dir
    code, said = team.ended(team.start(base.argv("sft", "all", "--mode", "both", "--multipliers", "1"), 2, more, base.path))
    assert code == 0, said
    names = [name for _, n, _, name, _ in LINE.findall(said) if n == "6"]
    assert sorted(names) == sorted(f"{mode} mine sft {form}" for mode in ("generate", "apply") for form in families.FORMS)
    assert [int(k) for k, *_ in LINE.findall(said)] == [1, 2, 3, 4, 5, 6]
    text = log.read_text(encoding="utf-8")
    assert [name for *_, name, _ in LINE.findall(text)] == names and text.count("INFO command: ") == text.count("exit code 0") == 1
