"""Data files that are odd or hostile: refused with one message, without a hang, without much memory, and nothing of theirs steers the
terminal."""

from __future__ import annotations

import csv
import io
import json
import logging
import os
import resource
import stat
import subprocess
import sys
import unicodedata
from functools import partial
from pathlib import Path

import families
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from spilt import cli, summary, terminal, verify
from spilt import run as runner
from spilt.data import readers, sources
from spilt.data.readers import FORMATS_FILE
from spilt.errors import UserError, printable

ROOT = Path(__file__).resolve().parents[1]


@given(st.text(st.characters()))
def test_printable_text_has_no_character_that_steers_a_terminal(text):
    for shown in (printable(text), printable(text, lines=True).replace("\n", "")):
        # control, surrogate, line and paragraph separator: Unicode's own classes
        assert not [c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
        assert not [c for c in shown if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")]
    assert printable(printable(text)) == printable(text)


def test_printable_keeps_text_and_shows_escapes():
    assert printable("wörter, 日本 👩‍👩‍👧 \\x1b") == "wörter, 日本 👩‍👩‍👧 \\x1b"
    assert printable("a\x1b[2J\nb\tc\x9b\u202e\x7f\ud83d") == r"a\x1b[2J\nb\tc\x9b\u202e\x7f\ud83d"
    assert printable("a\nerror: b\n  c\r\n", lines=True) == "a\n  error: b\n  c\\r\n"


# ---------------------------------------------------------------- what is printed


HOSTILE = "a\x1b]0;gone\x07\x9b2J\nerror: all is well\u202e"


def steers(text):
    """What a terminal would obey, our own line breaks aside."""
    return [c for c in text if c != "\n" and printable(c) != c]


def test_a_header_that_steers_the_terminal_is_shown_as_text(tmp_path, capsys):
    base = families.make_base(tmp_path / "base", train=4)
    formats = yaml.safe_load((base.path / FORMATS_FILE).read_text())
    formats["train"]["mine"] = {"file_path": "data/mine/train.csv", "field_names": {"matching": HOSTILE}}
    families.write_yaml(base.path / FORMATS_FILE, formats)
    table = io.StringIO(newline="")
    csv.writer(table).writerows([["question", f"{HOSTILE} b", "not_matching"], ["q", "x", "y"]])
    base.data("mine", "train").with_suffix(".csv").write_text(table.getvalue(), encoding="utf-8", newline="")
    capsys.readouterr()
    assert cli.main(base.argv()) == 2
    said = capsys.readouterr().err
    assert not steers(said) and "\nerror: all is well" not in said and said.count("\n") == 1
    assert r"columns found: question, a\x1b]0;gone\x07\x9b2J\nerror: all is well\u202e b, not_matching" in said


@pytest.mark.parametrize("word", ["--base_dir", "--model_name", "--dataset", "--method"])
def test_words_and_names_of_files_are_shown_as_text(tmp_path, capsys, word):
    base = families.make_base(tmp_path / "base\x1b[31m\u202e", train=4)
    argv = base.argv()
    if word != "--base_dir":
        argv[argv.index(word) + 1] = HOSTILE
    assert cli.main(argv if word != "--base_dir" else [*argv, "--dry_run"]) == (2 if word != "--base_dir" else 0)
    out, err = capsys.readouterr()
    assert out + err and not steers(out + err) and "\nerror: all is well" not in out + err


def test_verify_the_table_and_warnings_show_it_as_text(tmp_path, capsys):
    path = tmp_path / "vectors/tiny/sft/\x1b[31mred/sft_vector/layer_2.pt"
    path.parent.mkdir(parents=True)
    path.write_text("?")
    assert verify.main(["--base_dir", str(tmp_path)]) == 1
    summary.print_table([runner.Outcome("cell", runner.FAILED, f"file {HOSTILE}", 0.0, "")])
    out = capsys.readouterr().out
    assert not steers(out) and "\nerror" not in out and r"\x1b[31mred" in out and r"file a\x1b]0;gone" in out
    record = logging.LogRecord("spilt", logging.WARNING, "", 0, "%s: kept", (HOSTILE,), None)
    assert not steers(shown := terminal.Formatter("%(levelname)s: %(message)s").format(record)) and "\n  error" in shown


def test_the_command_of_a_dry_run_is_one_line_that_the_shell_reads_back(tmp_path, capsys):
    base = families.make_base(tmp_path / "base", train=4)
    prompt = "one\ntwo's \\n \x1b[0m"
    assert cli.main(base.argv("sft", "vector", "--set", f"system_prompt={json.dumps(prompt)}\n", "--mode", "generate", "--dry_run")) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.strip().startswith("python run_spilt.py")]
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True).stdout.split("\0")
    assert f"system_prompt={json.dumps(prompt)}\n" in words


def test_a_terminal_that_lacks_a_character_gets_an_escape(tmp_path):
    source = tmp_path / "日本.jsonl"
    source.write_text('{"question": "q"}\n')
    words = [sys.executable, "-m", "spilt.prepare", "--source", "psychopathy", "--input", str(source), "--name", "x"]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "\\u65e5" in done.stderr


# ---------------------------------------------------------------- what is no plain file


def bound(*words, timeout=60, memory=6 * 2**30):
    """A command with a limit on time and address space: a reader that waits or swallows all is an error, not a hang."""
    limit = partial(resource.setrlimit, resource.RLIMIT_AS, (memory, memory))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=env, preexec_fn=limit)


@pytest.mark.few(3)
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize(
    ("kind", "made"), [("a pipe", os.mkfifo), ("a device", lambda p: p.symlink_to("/dev/zero")), ("a folder", Path.mkdir)]
)
def test_a_data_file_that_is_no_plain_file_is_refused_at_once(tmp_path, kind, made, ending):
    path = tmp_path / f"rows{ending}"
    made(path)
    code = f"from pathlib import Path; from spilt.data.sources import read_rows; read_rows(Path({str(path)!r}))"
    done = bound("-c", code)
    assert f"UserError: data file {path} can't be read: it is {kind}; wanted a plain file" in done.stderr


@pytest.mark.long
def test_the_command_line_on_a_pipe_a_device_and_a_socket(tmp_path):
    base = families.make_base(tmp_path / "b", train=4)
    for kind in ("pipe", "device", "socket"):
        base.data("mine", "train").unlink()
        if kind == "pipe":
            os.mkfifo(base.data("mine", "train"))
        elif kind == "device":
            base.data("mine", "train").symlink_to("/dev/zero")
        else:
            os.mknod(base.data("mine", "train"), stat.S_IFSOCK | 0o600)  # binding one takes at most 107 letters of path
        for mode in ("generate", "loss"):
            done = bound("run_spilt.py", *base.argv("all", "all", "--mode", mode), memory=20 * 2**30)
            assert done.returncode == 2 and f"it is a {kind}; wanted a plain file" in done.stderr and "Traceback" not in done.stderr
        assert bound("run_spilt.py", *base.argv("sft", "vector", "--dry_run"), memory=20 * 2**30).returncode in (0, 2)
        words = ["-m", "spilt.prepare", "--source", "psychopathy", "--input", str(base.data("mine", "train")), "--base_dir", str(tmp_path)]
        done = bound(*words, "--name", "x")
        assert done.returncode == 2 and f"it is a {kind}" in done.stderr


def test_settings_and_formats_that_are_pipes_are_refused_at_once(tmp_path):
    base = families.make_base(tmp_path / "b", train=4)
    for path in (base.experiment / "config.yaml", base.path / FORMATS_FILE):
        text = path.read_text()
        path.unlink()
        os.mkfifo(path)
        done = bound("run_spilt.py", *base.argv("sft", "vector", "--dry_run"), memory=20 * 2**30)
        assert done.returncode == 2 and f"error: {path}: is no plain file; wanted a YAML file" in done.stderr
        path.unlink()
        path.write_text(text)


def test_a_file_of_proc_is_refused(tmp_path):
    (tmp_path / "rows.csv").symlink_to("/proc/self/environ")
    with pytest.raises(UserError, match="0 bytes by its size and others on reading"):
        sources.read_rows(tmp_path / "rows.csv")


def test_a_file_above_the_limit_is_not_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(sources.LARGEST + 1)  # a hole: takes no room
    with pytest.raises(UserError, match="has 1,073,741,825 bytes; at most 1,073,741,824 are read"):
        sources.read_rows(path)


# ---------------------------------------------------------------- parquet that unpacks to more than it seems


def parquet_of(path, columns, **more):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(columns), path, compression="zstd", store_schema=False, **more)
    return path


def repeated(text, rows):
    import pyarrow

    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * rows, pyarrow.int32()), pyarrow.array([text]))


BOMB = """
import resource, sys, time
from pathlib import Path
from spilt.data import readers, sources
import pyarrow.parquet
sources.LARGEST = 2**26
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
try:
    sources.read_rows(Path(sys.argv[1]))
except sources.UserError as error:
    print(error)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10, time.monotonic() - start)
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", ["texts", "lists of texts", "lists of numbers", "rows"])
def test_a_small_parquet_file_that_unpacks_to_gigabytes_is_refused_in_bounds(tmp_path, kind):
    import pyarrow

    path = tmp_path / "bomb.parquet"
    if kind == "texts":
        parquet_of(path, {name: repeated("x" * 10**6, 130_000) for name in ("question", "matching", "not_matching")})  # 390 GB
    elif kind == "lists of texts":
        lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 100_000], pyarrow.int32()), repeated("x" * 10**6, 100_000))
        parquet_of(path, {"question": ["q"], "more": lists})  # 100 GB in one row
    elif kind == "lists of numbers":
        lists = pyarrow.ListArray.from_arrays(pyarrow.array([0, 10**7], pyarrow.int32()), pyarrow.array([0] * 10**7, pyarrow.int8()))
        parquet_of(path, {"question": ["q"], "more": lists})  # 10 MB, and 640 MB as Python's values
    else:
        parquet_of(path, {"question": repeated("x", 10**7)})
    assert path.stat().st_size < 100_000
    done = bound("-c", BOMB, str(path), timeout=120)
    assert done.returncode == 0, done.stderr
    said, figures = done.stdout.splitlines()
    mebibytes, seconds = map(float, figures.split())
    assert "unpacks to" in said and "at most 67,108,864 are read" in said and "keep fewer rows" in said
    assert mebibytes < 600 and seconds < 30


def test_ordinary_parquet_is_read_as_before_in_any_row_groups(tmp_path):
    import pandas

    rows = [{"q": f"q{i}", "n": i, "kind": "ab"[i % 2], "list": [f"l{i}", "x"], "pairs": {"a": i}} for i in range(5000)]
    frame = pandas.DataFrame(rows)
    frame["kind"] = frame["kind"].astype("category")
    frame["level"] = pandas.Categorical([i % 3 for i in range(5000)])
    frame.to_parquet(tmp_path / "a.parquet", row_group_size=700)
    found = sources.read_rows(tmp_path / "a.parquet")
    assert [record.values for record in found] == [{**row, "level": i % 3} for i, row in enumerate(rows)]
    assert [record.row for record in found] == list(range(5000))


def test_a_column_named_twice_is_refused(tmp_path):
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_arrays([pyarrow.array([x]) for x in "abc"], names=["question", "matching", "matching"])
    parquet.write_table(table, tmp_path / "a.parquet")
    for name, text in (("a.jsonl", '{"q": "a", "q": "b"}\n'), ("a.json", '[{"q": "a",\n "q": "b"}]'), ("a.csv", "q,q\na,b\n")):
        (tmp_path / name).write_text(text)
    for name in ("a.parquet", "a.jsonl", "a.json", "a.csv"):
        with pytest.raises(UserError, match="twice"):
            sources.read_rows(tmp_path / name)


# ---------------------------------------------------------------- odd values


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ('{"question": "a\\u0000b", "matching": "y", "not_matching": "n"}', "question has a NUL character"),
        ('{"question": ["a", ["b"]], "matching": "y", "not_matching": "n"}', "question is ['a', ['b']] (list)"),
        ('{"question": "q", "matching": 7, "not_matching": "n"}', "matching is 7 (int)"),
        ('{"question": "q", "matching": NaN, "not_matching": "n"}', "matching is nan (float)"),
        ('{"question": "q", "matching": "y"}', "no column 'not_matching'"),
        ('{"question": {"a": "' + "x" * 10**6 + '"}, "matching": "y", "not_matching": "n"}', "(dict) in column 'question'"),
        ('{"question": "q", "matching": "y", "' + "x" * 10**6 + '": "n"}', "no column 'not_matching'"),
    ],
)
def test_values_that_are_no_text_are_named_in_a_short_message(tmp_path, text, wanted):
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        readers.read_pairs(readers.DatasetFormat("mine", "train", path, {}, False))
    assert wanted in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize("value", ["NaN", "Infinity", '"1e3"', '"²"', "[0]", "true", "1.5", "null"])
def test_concept_ids_that_are_no_whole_numbers_are_named(tmp_path, value):
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"question": "q", "matching": "y", "not_matching": "n", "concept_id": {value}}}')
    with pytest.raises(UserError, match="concept_id is .*wanted a whole number"):
        readers.read_pairs(readers.DatasetFormat("mine", "train", path, {}, True))


@pytest.mark.parametrize("depth", [200, 900, 5000, 100_000])
def test_nesting_without_end_beside_the_prompt_is_a_message_or_kept(tmp_path, depth):
    path = tmp_path / "a.jsonl"
    path.write_text('{"input": "q", "more": ' + "[" * depth + "]" * depth + "}")
    try:
        (prompt,) = readers.read_prompts(readers.DatasetFormat("mine", "generation", path, {}, False))
    except UserError as error:
        assert depth > 500 and len(str(error)) < 1000
    else:
        json.dumps(prompt.extra)


@pytest.mark.parametrize("ending", [".jsonl", ".csv", ".json"])
def test_other_encodings_and_endings_of_lines(tmp_path, ending):
    """UTF-16 is refused, not read as text with NULs; \\r\\n and \\r end the lines of a table."""
    rows = {".jsonl": '{"q": "a"}\n{"q": "b"}\n', ".json": '[{"q": "a"},\n{"q": "b"}]', ".csv": "q\na\nb\n"}[ending]
    path = tmp_path / f"a{ending}"
    for encoding in ("utf-16", "utf-16-le"):
        path.write_bytes(rows.encode(encoding))
        with pytest.raises(UserError):
            readers.read_pairs(readers.DatasetFormat("mine", "train", path, {"question": "q", "matching": "q", "not_matching": "q"}, False))
    for newline in ("\r\n", "\r") if ending == ".csv" else ("\r\n",):
        path.write_text(rows, newline=newline)
        assert [record.values for record in sources.read_rows(path)] == [{"q": "a"}, {"q": "b"}]
