"""Data files: formats, rows, concepts. Attacked: broken files (the message must name file, line and columns)."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from refusal import message

from spilt.data import DatasetFormat, concepts, dataset_format, file_hash, load_formats, read_pairs, read_prompts
from spilt.data.readers import FORMATS_FILE
from spilt.data.sources import read_rows

REPO = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared"
real = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason="no ../shared/data here")

PAIR_NAMES = {"question": "q", "matching": "good", "not_matching": "bad"}
ROW = {"q": "Why?", "good": " Yes", "bad": " No"}


def fmt(path: Path, section: str = "train", names: dict[str, str] | None = None, multi: bool = False) -> DatasetFormat:
    names = (PAIR_NAMES if section != "generation" else {"input": "q", "reference_response": "good"}) if names is None else names
    return DatasetFormat("mine", section, path, names, multi)


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# ---- dataset_format.yaml ----


def formats(base: Path, text: str) -> Path:
    file = base / FORMATS_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    return base


def test_shipped_formats_name_the_three_datasets_in_every_section():
    found = load_formats(REPO)
    assert {section: set(entries) for section, entries in found.items()} == {
        **{section: {"axbench", "psychopathy", "powerseeking"} for section in ("train", "valid", "generation")},
        "neutral": set(),
    }
    assert [found[section]["axbench"].multi_concept for section in ("train", "valid", "generation")] == [True] * 3
    axbench = dataset_format(REPO, "axbench", "train")
    assert axbench == found["train"]["axbench"]
    assert axbench.path == REPO / "data/axbench/train.parquet"
    assert [axbench.column(field) for field in ("question", "matching", "not_matching")] == ["input", "winning_output", "losing_output"]
    for section in ("valid", "generation"):
        assert found[section]["psychopathy"].path != found["train"]["psychopathy"].path


def test_a_column_that_happens_to_be_called_system_is_none_unless_it_is_named(tmp_path):
    """The released code passes over it, and so do results that are stored."""
    write(tmp_path / "v.jsonl", jsonl({"question": "q", "matching": "m", "not_matching": "n", "system": "Be kind."}))
    for names, wanted in (({}, "q"), ({"system": "system"}, (("system", "Be kind."), ("user", "q")))):
        base = formats(tmp_path, json.dumps({"valid": {"mine": {"file_path": "v.jsonl", "field_names": names}}}))
        assert read_pairs(dataset_format(base, "mine", "valid"))[0].question == wanted


def test_missing_generation_entry_asks_the_valid_one(tmp_path):
    base = formats(
        tmp_path, "valid: {mine: {file_path: v.jsonl, field_names: {question: q, matching: good, concept_id: c}, multi_concept: true}}"
    )
    write(tmp_path / "v.jsonl", jsonl({**ROW, "not_matching": "n", "c": 3}))
    assert read_pairs(dataset_format(base, "mine", "valid"))[0].not_matching == "n"
    entry = dataset_format(base, "mine", "generation")
    assert entry == DatasetFormat(
        "mine", "generation", tmp_path / "v.jsonl", {"input": "q", "reference_response": "good", "concept_id": "c"}, True, named=True
    )
    assert read_prompts(entry)[0][:3] == ("Why?", " Yes", 3)


def test_paths_are_absolute_or_below_base_dir(tmp_path):
    base = formats(tmp_path, f"train: {{a: {{file_path: ./data/a.csv}}, b: {{file_path: '{tmp_path.parent}/b.csv'}}}}")
    assert dataset_format(base, "a", "train").path == tmp_path / "data/a.csv"
    assert dataset_format(base, "b", "train").path == tmp_path.parent / "b.csv"


@pytest.mark.parametrize("name", ["..", ".", "a/b", "/etc", "a\\b", "C:x", "a\nb", ""])
def test_dataset_names_that_would_leave_their_folder_are_refused(tmp_path, name):
    base = formats(tmp_path, json.dumps({"train": {name: {"file_path": "a.csv"}}}))
    assert "can't be a dataset's name" in message(dataset_format, base, name, "train")
    assert "can't be a dataset's name" in message(load_formats, base)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("train: {mine: {file_paht: a.csv}}", ["train: mine", "unknown key 'file_paht'; did you mean 'file_path'?"]),
        ("train: {mine: {field_names: {}}}", ["file_path is None"]),
        ("train: {mine: {file_path: 3}}", ["file_path is 3"]),
        ("train: {mine: a.csv}", ["'a.csv' is no entry", "file_path, field_names, multi_concept"]),
        ("train: {mine: {file_path: a.csv, multi_concept: 7}}", ["multi_concept is 7"]),
        ("train: {mine: {file_path: a.csv, field_names: [q]}}", ["field_names is ['q']"]),
        ("train: {mine: {file_path: a.csv, field_names: {matchin: q}}}", ["unknown field name 'matchin'; did you mean 'matching'?"]),
        ("train: {mine: {file_path: a.csv, field_names: {question: 3}}}", ["'question': 3"]),
        ("train: [mine]", ["section 'train' is ['mine']"]),
        ("trian: {mine: {file_path: a.csv}}", ["unknown section 'trian'; did you mean 'train'?"]),
        ("train: {other: {file_path: a.csv}}", ["unknown dataset 'mine'", "have: other", str(FORMATS_FILE)]),
        ("valid: {mine: {file_path: a.csv}}", ["'mine' has no 'train' entry", "it has: valid", "add under 'train:'", "matching: <column>"]),
    ],
)
def test_mistakes_in_dataset_format_yaml(tmp_path, text, wanted):
    said = message(dataset_format, formats(tmp_path, text), "mine", "train")
    assert all(part in said for part in wanted), said


def test_generation_of_a_dataset_with_train_only_says_what_to_add(tmp_path):
    said = message(dataset_format, formats(tmp_path, "train: {mine: {file_path: a.csv}}"), "mine", "generation")
    assert "no 'generation' entry" in said and "it has: train" in said and "input: <column>, reference_response: <column>" in said


def test_a_mistake_in_one_dataset_does_not_stop_another(tmp_path):
    base = formats(tmp_path, "train: {bad: {file_paht: a.csv}, good: {file_path: a.csv}}")
    assert dataset_format(base, "good", "train").path == tmp_path / "a.csv"
    message(load_formats, base)


def test_an_unknown_section_is_told_with_the_other_mistakes(tmp_path):
    text = "train: {mine: {file_paht: a.csv, multi_concept: maybe}, other: {file_path: 3}}\nbogus: {}\nvalid: [mine]"
    said = message(dataset_format, formats(tmp_path, text), "mine", "train")
    wanted = ("unknown section 'bogus'", "section 'valid' is ['mine']", "'file_paht'", "multi_concept is 'maybe'", "other: file_path is 3")
    assert all(part in said for part in wanted), said


def test_no_formats_file_and_unknown_section(tmp_path):
    assert "dataset_format.yaml" in message(dataset_format, tmp_path, "mine", "train")
    assert "did you mean 'valid'" in message(dataset_format, REPO, "axbench", "valdi")


def test_a_null_or_unnamed_column_is_the_standard_name(tmp_path):
    base = formats(tmp_path, "train: {mine: {file_path: a.jsonl, field_names: {question: q, matching: null}}}")
    write(tmp_path / "a.jsonl", jsonl({"q": "Q", "matching": "m", "not_matching": "n"}))
    assert read_pairs(dataset_format(base, "mine", "train")) == [("Q", "m", "n", None, None, 0)]


# ---- files ----


def as_csv(rows: list[dict]) -> str:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_parquet(rows: list[dict]) -> bytes:
    import pyarrow
    from pyarrow import parquet

    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


FORMS = {".jsonl": lambda rows: jsonl(*rows), ".json": lambda rows: json.dumps(rows, indent=1), ".csv": as_csv, ".parquet": as_parquet}
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)
answers = texts.filter(lambda text: text.strip())


@pytest.mark.parametrize("ending", FORMS)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(texts, answers, answers), min_size=1, max_size=4))
def test_what_is_written_is_read_back_exactly(tmp_path, ending, rows):
    path = write(tmp_path / f"rows{ending}", FORMS[ending]([dict(zip(("q", "good", "bad"), row, strict=True)) for row in rows]))
    assert [pair[:3] for pair in read_pairs(fmt(path))] == rows
    assert [pair.row for pair in read_pairs(fmt(path))] == list(range(len(rows)))
    assert [(prompt.input, prompt.reference_response) for prompt in read_prompts(fmt(path, "generation"))] == [row[:2] for row in rows]
    assert len(read_pairs(fmt(path), limit=1)) == 1


def test_text_is_kept_exactly(tmp_path):
    # leading spaces, a line break and a comma within quotes, U+2028 (a line break to str.splitlines), words that pandas takes for NaN
    rows = [{"q": 'a\nb,"c"', "good": "  Yes", "bad": " No "}, {"q": "a\u2028b", "good": "None", "bad": "NA"}]
    for ending, form in FORMS.items():
        path = write(tmp_path / f"rows{ending}", form(rows))
        assert [pair[:3] for pair in read_pairs(fmt(path))] == [tuple(row.values()) for row in rows], ending


def test_a_byte_order_mark_blank_lines_crlf_and_one_object_are_read(tmp_path):
    bom = b"\xef\xbb\xbf"
    path = write(tmp_path / "a.jsonl", bom + b"\r\n" + json.dumps(ROW).encode() + b"\r\n \n" + json.dumps(ROW).encode())
    assert [pair.row for pair in read_pairs(fmt(path))] == [0, 1]
    assert len(read_pairs(fmt(write(tmp_path / "a.csv", bom + b"q,good,bad\r\n\r\nWhy?, Yes, No\r\n")))) == 1
    assert read_pairs(fmt(write(tmp_path / "a.json", bom + json.dumps(ROW).encode() + b"\n"))) == [("Why?", " Yes", " No", None, None, 0)]


def test_an_empty_question_is_allowed(tmp_path):  # two of the released power-seeking rows have one
    assert read_pairs(fmt(write(tmp_path / "a.csv", "q,good,bad\n,yes,no\n")))[0].question == ""


good = json.dumps(ROW)


@pytest.mark.parametrize(
    ("name", "content", "line", "wanted"),
    [
        ("a.jsonl", f'{good}\n\n{good}\n{{"q": \n{good}', 4, ["not JSON", "columns found: q, good, bad"]),
        ("a.jsonl", f"{good}\n[1]\n", 2, ["list '[1]' where an object"]),
        ("a.jsonl", f"{good}\n" + "[" * 100_000, 2, ["not JSON"]),
        ("a.jsonl", f"{good}\n".encode() + b'{"q": "\xff"}', 2, ["byte 0xff is not UTF-8"]),
        ("a.jsonl", jsonl(ROW, {**ROW, "good": "  "}), 2, ["empty answer '  '", "'good' (matching)", "columns found: q, good, bad"]),
        ("a.jsonl", jsonl(ROW, {**ROW, "bad": ""}), 2, ["empty answer ''", "'bad' (not_matching)"]),
        ("a.jsonl", jsonl(ROW, {**ROW, "good": 3}), 2, ["matching is 3 (int) in column 'good'; wanted text"]),
        ("a.jsonl", jsonl(ROW, {**ROW, "q": None}), 2, ["question is None"]),
        (
            "a.jsonl",
            jsonl(ROW, {"q": "x", "good": "y"}),
            2,
            ["no column 'bad' for 'not_matching'", "columns found: q, good", "field_names"],
        ),
        ("a.jsonl", f'{good}\n{{"q": "\\ud83d", "good": "a", "bad": "b"}}', 2, ["surrogate"]),
        ("a.json", f'[\n{good},\n{good},\n{{"q": 1}}\n]', 4, ["question is 1", "columns found: q"]),
        ("a.json", f"[\n{good}\n{good}]", 3, ["wanted ',' or ']'"]),
        ("a.json", f"[\n{good},\n]", 3, ["a comma before ']'"]),
        ("a.json", f"[\n{good},\n{{,}}]", 3, ["not JSON"]),
        ("a.json", f"[\n{good}\n", 3, ["found 'the end'"]),
        ("a.json", f"[{good},\n7]", 2, ["int '7' where an object"]),
        ("a.json", f"{good}\n{good}", 2, ["text after the end", ".jsonl"]),
        ("a.json", b'[\n{"q": "\xe4"}]', 2, ["byte 0xe4"]),
        ("a.csv", 'q,good,bad\n"two\nlines",y,n\na,b\n', 4, ["2 fields where the header has 3", "columns found: q, good, bad"]),
        ("a.csv", "q,good,bad\na,b,c\na,b,c,d\n", 3, ["4 fields where the header has 3", "quote fields"]),
        ("a.csv", 'q,good,bad\na,b,c\n"a,b,c\nd,e,f\n', 3, ["not CSV", "quote"]),
        ("a.csv", "q,q,bad\na,b,c\n", 1, ["names a column twice", "columns found: q, q, bad"]),
        ("a.csv", b"q,good,bad\na,b,c\n\xff,b,c\n", 3, ["byte 0xff"]),
        ("a.csv", 'q,good,bad\n"x\ny",b,c\na, ,c\n', 4, ["empty answer ' '"]),
        ("a.csv", "question,good,bad\na,b,c\n", 2, ["no column 'q' for 'question'", "columns found: question, good, bad"]),
    ],
)
def test_a_broken_row_is_named_with_file_line_and_columns(tmp_path, name, content, line, wanted):
    path = write(tmp_path / name, content)
    said = message(read_pairs, fmt(path))
    assert said.startswith(f"{path} line {line}: "), said
    assert all(part in said for part in wanted), said


def test_parquet_rows_are_named_by_number(tmp_path):
    path = write(tmp_path / "a.parquet", as_parquet([ROW, {**ROW, "bad": None}]))
    said = message(read_pairs, fmt(path))
    assert said.startswith(f"{path} row 1 (0-based): not_matching is None") and "columns found: q, good, bad" in said
    assert "not readable as parquet" in message(read_pairs, fmt(write(tmp_path / "b.parquet", b"PAR1")))
    assert "not readable as parquet" in message(read_pairs, fmt(write(tmp_path / "c.parquet", b"")))


@pytest.mark.parametrize("content", ["", "\n\n", "[]", "q,good,bad\n"])
def test_no_rows_is_an_error(tmp_path, content):
    ending = {"[": ".json", "q": ".csv"}.get(content[:1], ".jsonl")
    said = message(read_pairs, fmt(write(tmp_path / f"a{ending}", content)))
    assert str(tmp_path) in said and "no rows" in said
    for other in (".json", ".csv"):
        assert "no rows" in message(read_pairs, fmt(write(tmp_path / f"empty{other}", "")))


def test_missing_file_folder_unknown_ending_and_limit(tmp_path):
    said = message(read_pairs, fmt(tmp_path / "a.jsonl"))
    assert f"data file {tmp_path / 'a.jsonl'} of dataset 'mine' (train) does not exist" in said and "spilt prepare" in said
    (tmp_path / "b.jsonl").mkdir()
    (tmp_path / "b.parquet").mkdir()
    assert "can't be read" in message(read_pairs, fmt(tmp_path / "b.jsonl"))
    assert "can't be read" in message(read_pairs, fmt(tmp_path / "b.parquet"))
    assert "have: .jsonl, .json, .csv, .tsv, .parquet, and those of text with .gz" in message(
        read_pairs, fmt(write(tmp_path / "a.txt", "x"))
    )
    assert "limit 0" in message(read_pairs, fmt(write(tmp_path / "c.jsonl", jsonl(ROW))), limit=0)


def test_prompts_keep_the_other_columns_as_json(tmp_path):
    import datetime

    rows = [{"q": "Q", "good": "g", "n": 3, "x": float("nan"), "day": datetime.date(2026, 1, 2), "list": [1, 2], "concept_genre": "text"}]
    prompt = read_prompts(fmt(write(tmp_path / "a.parquet", as_parquet(rows)), "generation"))[0]
    assert prompt.extra == {"n": 3, "x": None, "day": "2026-01-02", "list": [1, 2], "concept_genre": "text"}
    assert json.loads(json.dumps(prompt.extra, allow_nan=False)) == prompt.extra


def test_reference_response_may_be_absent_but_not_misnamed(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl({"q": "Q", "good": None}))
    assert read_prompts(fmt(path, "generation", {"input": "q"}))[0].reference_response is None
    assert read_prompts(fmt(path, "generation"))[0].reference_response is None
    assert "no column 'gut' for 'reference_response'" in message(
        read_prompts, fmt(path, "generation", {"input": "q", "reference_response": "gut"})
    )


def test_file_hash(tmp_path):
    assert file_hash(write(tmp_path / "a", b"abc")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert "can't be read" in message(file_hash, tmp_path / "none")


# ---- concepts ----


def concept_rows(ids: list[object]) -> list[dict]:
    return [
        {**ROW, "q": f"question {i}", "concept_id": c, "output_concept": "EEEEE" if str(c) == "-1" else f"about {c}"}
        for i, c in enumerate(ids)
    ]


@pytest.mark.parametrize("ending", FORMS)
def test_concepts_are_picked_and_negatives_left_out(tmp_path, ending):
    path = write(tmp_path / f"a{ending}", FORMS[ending](concept_rows([3, -1, 0, 3])))
    entry = fmt(path, multi=True)
    assert concepts(entry) == {0: "about 0", 3: "about 3"}
    assert list(concepts(entry)) == [0, 3]
    assert [(pair.row, pair.concept_id, pair.concept) for pair in read_pairs(entry, concept=3)] == [(0, 3, "about 3"), (3, 3, "about 3")]
    assert [pair.row for pair in read_pairs(entry)] == [0, 2, 3]
    assert [pair.row for pair in read_pairs(entry, concept=3, limit=1)] == [0]
    assert [prompt.row for prompt in read_prompts(fmt(path, "generation", multi=True), concept=0)] == [2]
    assert "no row of concept 5" in message(read_pairs, entry, concept=5) and "-1, 0, 3" in message(read_pairs, entry, concept=5)
    assert concepts(fmt(path)) == {}
    assert "multi_concept: true" in message(read_pairs, fmt(path), concept=0)


def test_concept_mistakes(tmp_path):
    for value in ("x", None, 1.5, True, float("nan")):
        path = write(tmp_path / "a.jsonl", jsonl(*concept_rows([1, value])))
        assert f"{path} line 2: concept_id is " in message(read_pairs, fmt(path, multi=True))
    assert read_pairs(fmt(write(tmp_path / "f.jsonl", jsonl(*concept_rows([2.0]))), multi=True))[0].concept_id == 2
    said = message(read_pairs, fmt(write(tmp_path / "b.jsonl", jsonl(ROW)), multi=True))
    assert "no column 'concept_id'" in said and "columns found: q, good, bad" in said
    twice = concept_rows([1, 1])
    twice[1]["output_concept"] = "other"
    path = write(tmp_path / "c.jsonl", jsonl(*twice))
    assert f"{path} line 2: concept_id 1 is 'other' here and 'about 1' above" in message(concepts, fmt(path, multi=True))
    assert "only negative examples" in message(concepts, fmt(write(tmp_path / "d.jsonl", jsonl(*concept_rows([-1]))), multi=True))


# ---- the real files ----


@real
def test_real_psychopathy_and_powerseeking_are_read():
    names = load_formats(REPO)["train"]
    pairs = read_pairs(names["psychopathy"]._replace(path=SHARED / "data/psychopathy/psychopathy.jsonl"))
    assert len(pairs) == 1000 and {pair.matching for pair in pairs} == {" Yes", " No"}
    for name, rows in (("train", 642), ("test", 200)):
        pairs = read_pairs(names["powerseeking"]._replace(path=SHARED / f"data/powerseeking/{name}.csv"))
        assert len(pairs) == rows and pairs[-1].row == rows - 1
    assert len(read_prompts(load_formats(REPO)["generation"]["powerseeking"]._replace(path=SHARED / "data/powerseeking/test.csv"))) == 200


@real
def test_real_axbench_has_ten_concepts_and_is_not_paired():
    path = SHARED / "data/axbench/train_data.parquet"
    entry = load_formats(REPO)["generation"]["axbench"]._replace(path=path)
    entry = entry._replace(field_names={**entry.field_names, "reference_response": "output"})
    assert list(concepts(entry)) == list(range(10))
    assert [len(read_prompts(entry, concept=concept)) for concept in range(10)] == [72] * 10
    assert len(read_prompts(entry)) == 720 and min(prompt.row for prompt in read_prompts(entry)) == 216
    prompt = read_prompts(entry, concept=3, limit=1)[0]
    assert prompt.concept == "terms related to online gambling and casinos" and prompt.extra["category"] == "positive"
    said = message(read_pairs, load_formats(REPO)["train"]["axbench"]._replace(path=path))
    assert "no column 'winning_output' for 'matching'" in said and "columns found: input, output, " in said


# ---- imports ----


def test_reading_data_imports_no_torch_transformers_pandas_or_pyarrow(tmp_path):
    path = write(tmp_path / "a.csv", as_csv([ROW]))
    code = (
        "import sys; from pathlib import Path; import spilt.data as d; import spilt.data.chat;"
        f"d.read_pairs(d.DatasetFormat('a', 'train', Path({str(path)!r}), {PAIR_NAMES!r}, False));"
        f"d.load_formats(Path({str(REPO)!r}));"
        "print([m for m in ('torch', 'transformers', 'pandas', 'pyarrow', 'numpy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_read_rows_needs_no_format(tmp_path):
    rows = read_rows(write(tmp_path / "a.jsonl", "\n" + jsonl({"x": 1})))
    assert rows == [(0, "line 2", {"x": 1})]
    assert re.fullmatch("[0-9a-f]{64}", file_hash(tmp_path / "a.jsonl"))
