"""Data that read well and mean nothing are told before the fit; a split is replaced whole or refused; a dataset has its own name."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
import signal
from pathlib import Path

import families
import pytest
import yaml

from spilt import cli, prepare
from spilt.data import dataset_format, read_pairs, read_prompts
from spilt.data.readers import FORMATS_FILE
from spilt.errors import UserError

REPO = Path(__file__).parents[1]
REAL = REPO.parent / "shared" / "data"
real = pytest.mark.skipif(not REAL.is_dir(), reason="no ../shared/data here")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return families.make_base(tmp_path_factory.mktemp("sense") / "base", train=6)


@pytest.fixture
def base(made, tmp_path):
    shutil.copytree(made.path, tmp_path / "base")
    return made._replace(path=tmp_path / "base")


def run(base, capsys, caplog, *words, method="sft", form="vector", dataset=""):
    """Exit code, and all that was printed or warned of."""
    capsys.readouterr()
    caplog.clear()
    code = cli.main([*base.argv(method, form, *words, dataset=dataset), "--quiet"])
    out, err = capsys.readouterr()
    return code, out + err + "\n".join(record.getMessage() for record in caplog.records)


def stored(base):
    return [path.name for path in base.path.rglob("layer_*.pt")]


def rows(n, **same):
    return [{"question": f"is {i} so?", "matching": f" yes {i}", "not_matching": f" no {i}", **same} for i in range(n)]


# ---------------------------------------------------------------- before the fit


@pytest.mark.parametrize("mode", ["generate", "loss"])
@pytest.mark.parametrize("method", ["caa", "sft"])
def test_the_same_answer_in_every_pair_is_an_error(base, capsys, caplog, method, mode):
    families.write_jsonl(base.data("mine", "train"), [{**row, "not_matching": row["matching"]} for row in rows(5)])
    code, said = run(base, capsys, caplog, "--mode", mode, method=method)
    assert code == 2 and stored(base) == []
    assert (
        f"error: {base.data('mine', 'train')} (dataset 'mine', train): columns 'matching' and 'not_matching' hold the same answer" in said
    )
    assert "every one of 5 pairs" in said and "field_names" in said


def test_two_names_of_one_column_is_that_error_too(base, capsys, caplog):
    formats = yaml.safe_load((base.path / FORMATS_FILE).read_text())
    formats["train"]["mine"]["field_names"]["not_matching"] = "matching"
    families.write_yaml(base.path / FORMATS_FILE, formats)
    code, said = run(base, capsys, caplog, "--mode", "both")
    assert code == 2 and "columns 'matching' and 'matching' hold the same answer in every one of 6 pairs" in said


def test_equal_rows_are_an_error_and_one_row_is_none(base, capsys, caplog):
    families.write_jsonl(base.data("mine", "train"), [rows(1)[0]] * 4)
    code, said = run(base, capsys, caplog, "--mode", "generate")
    assert code == 2 and "all 4 rows are equal" in said and "--limit 1" in said and stored(base) == []
    assert run(base, capsys, caplog, "--mode", "generate", "--limit", "1")[0] == 0


def test_one_concept_of_equal_rows_is_named(base, capsys, caplog):
    path = base.data("axbench", "train")
    found = [json.loads(line) for line in path.read_text().splitlines()]
    same = next(row for row in found if row["concept_id"] == 1)
    families.write_jsonl(path, [same if row["concept_id"] == 1 else row for row in found])
    code, said = run(base, capsys, caplog, "--mode", "generate", dataset="axbench")
    assert code == 2 and "(dataset 'axbench', train, concept 1): all 4 rows are equal" in said


def test_some_equal_answers_are_a_warning_with_their_rows(base, capsys, caplog):
    some = rows(9)
    for i in (1, 4):
        some[i]["not_matching"] = some[i]["matching"].strip()  # equal but for the space
    families.write_jsonl(base.data("mine", "train"), some)
    code, said = run(base, capsys, caplog, "--mode", "generate")
    assert code == 0 and stored(base) == ["layer_2.pt"]
    assert "2 of 9 pairs have the same answer twice" in said and "0-based rows 1, 4)" in said


@pytest.mark.parametrize(("mode", "section"), [("generate", "valid"), ("both", "generation"), ("loss", "valid")])
def test_questions_of_the_fit_among_those_measured_on_are_counted(base, capsys, caplog, mode, section):
    train = rows(6)
    families.write_jsonl(base.data("mine", "train"), train)
    other = [{**row, "question": f"another {i}"} for i, row in enumerate(train)]
    families.write_jsonl(base.data("mine", "valid"), [*train[:2], *other, {**other[0], "question": ""}])
    code, said = run(base, capsys, caplog, "--mode", mode)
    assert code == (0 if mode != "loss" else 1)  # no vector to measure yet
    assert f"overlaps with the training file {base.data('mine', 'train')}: 2 of 9 questions are in both (dataset 'mine', {section})" in said
    families.write_jsonl(base.data("mine", "valid"), other)
    assert "in both" not in run(base, capsys, caplog, "--mode", mode)[1]


def test_the_training_file_as_test_file_is_told_by_whatever_name(base, capsys, caplog):
    base.data("mine", "valid").unlink()
    base.data("mine", "valid").symlink_to("train.jsonl")
    code, said = run(base, capsys, caplog, "--mode", "generate")
    assert code == 0 and f"{base.data('mine', 'valid')} is the training file too: 6 of 6 questions are in both" in said


def test_the_same_question_of_another_concept_is_no_overlap(base, capsys, caplog):
    for section in ("train", "valid"):
        moved = [{**row, "concept_id": i % 2 if section == "train" else 1 - i % 2} for i, row in enumerate(rows(6))]
        families.write_jsonl(base.data("axbench", section), [{**row, "input": row["question"], "output_concept": "c"} for row in moved])
    code, said = run(base, capsys, caplog, "--mode", "generate", dataset="axbench")
    assert code == 0 and "in both" not in said


def test_a_broken_test_file_does_not_stop_a_fit(base, capsys, caplog):
    base.data("mine", "valid").write_text("{")
    assert run(base, capsys, caplog, "--mode", "generate")[0] == 0
    assert run(base, capsys, caplog, "--mode", "apply")[0] == 2


@pytest.mark.parametrize("form", ["lora", "local_weight"])
def test_a_fit_that_learnt_nothing_fails_by_name_and_stores_nothing(base, capsys, caplog, form):
    code, said = run(base, capsys, caplog, "--mode", "generate", "--set", "lr=1e-30", form=form)
    assert code == 2 and f"sft {form}" in said and f"the fitted {form} is zero (norm" in said
    assert stored(base) == [] and not list(base.path.rglob("metadata_*")) and not list(base.path.rglob("train.log"))
    code, said = run(base, capsys, caplog, "--mode", "both", "--set", "lr=1e-30", form="all")  # the others go on
    assert code == 1 and stored(base) == ["layer_2.pt"] and "done" in said


@pytest.mark.parametrize("form", ["vector", "lora", "local_weight"])
def test_norm_is_that_of_the_whole_update(form):
    """Against the update itself: what one step of every input axis adds, at multiplier 1."""
    import torch

    made = families.intervention(form, width=7)
    h = torch.zeros(1, 1, families.HIDDEN)
    axes = torch.cat([torch.zeros(1, 7), torch.eye(7)])[:, None]
    with torch.no_grad():
        added = torch.cat([made.delta(h, x[None], 1.0).reshape(1, -1) for x in axes]) if made.reads else made.delta(h, None, 1.0)[None]
    whole = torch.cat([added[:1], added[1:] - added[:1]]) if made.reads else added
    assert made.norm() == pytest.approx(whole.norm().item(), rel=1e-5)


# ---------------------------------------------------------------- prepare: a pair of files


def questions(path, n, word):
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "matching", "not_matching"])
        writer.writerows([f"{word} {i}", f"yes {i}", f"no {i}"] for i in range(n))
    return path


def prepared(base, source, *more):
    return [
        "--source",
        "powerseeking",
        "--input",
        str(source),
        "--base_dir",
        str(base),
        "--train",
        "6",
        "--test",
        "3",
        "--name",
        "quiz",
        *more,
    ]


def killed_at(number, when, words):
    """`prepare` in a child that is killed before or after its number-th call that changes the disk; False when it came to its end."""
    if child := os.fork():
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        return os.WIFSIGNALED(status)
    try:
        made = [0]

        def counting(call):
            def counted(*args, **kwargs):
                made[0] += 1
                if when == "before" and made[0] == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                try:
                    return call(*args, **kwargs)
                finally:
                    if when == "after" and made[0] == number:
                        os.kill(os.getpid(), signal.SIGKILL)

            return counted

        for name in ("replace", "fsync", "unlink", "mkdir"):
            setattr(os, name, counting(getattr(os, name)))
        with open(os.devnull, "w") as null:
            os.dup2(null.fileno(), 1)
        os._exit(prepare.main(words))
    finally:
        os._exit(99)


def pair_of(base):
    """What a reader gets of both files, or the messages."""
    found = []
    for section in ("train", "valid"):
        try:
            found.append(tuple(pair.question for pair in read_pairs(dataset_format(base, "quiz", section))))
        except UserError as error:
            found.append(str(error))
    return tuple(found)


def cut_off(base, folder, words, word):
    """A copy of `base` in which prepare was killed with one of its two files replaced."""
    for number in range(1, 99):
        copy = folder / f"cut{number}"
        shutil.copytree(base, copy)
        assert killed_at(number, "after", [word.format(base=copy) for word in words])
        if "cut off" in pair_of(copy)[0] and sum(word in path.read_text() for path in copy.rglob("*.csv")) == 1:
            return copy
    raise AssertionError("never cut off")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("start", ["nothing", "a pair", "a pair that was cut off"])
@pytest.mark.few(2)
def test_prepare_killed_anywhere_leaves_the_old_pair_the_new_one_or_a_refusal(tmp_path, capsys, start, when):
    old, new = questions(tmp_path / "old.csv", 12, "old"), questions(tmp_path / "new.csv", 12, "new")
    template = tmp_path / "template"
    (template / FORMATS_FILE).parent.mkdir(parents=True)
    (template / FORMATS_FILE).write_text(prepare.format_lines("powerseeking", "quiz"))
    force = () if start == "nothing" else ("--force",)
    if start != "nothing":
        assert prepare.main(prepared(template, old)) == 0
    before = pair_of(template)
    reference = tmp_path / "reference"
    shutil.copytree(template, reference)
    assert prepare.main(prepared(reference, new, *force)) == 0
    after, clean = pair_of(reference), families.listing(reference)
    assert before != after and all(isinstance(side, tuple) for side in after)
    if start == "a pair that was cut off":
        template = cut_off(template, tmp_path, prepared("{base}", questions(tmp_path / "third.csv", 12, "third"), "--force"), "third")
        before, force = None, ()  # neither pair is there any more, and what was to be replaced needs no second leave
    refused = 0
    for number in range(1, 99):
        base = tmp_path / "killed"
        shutil.rmtree(base, ignore_errors=True)
        shutil.copytree(template, base)
        if not killed_at(number, when, prepared(base, new, *force)):
            assert pair_of(base) == after and families.listing(base) == clean
            break
        seen = pair_of(base)
        if seen not in (before, after):
            refused += 1
            none = "does not exist" if start == "nothing" else "?"
            told = "not to be used: spilt.prepare was cut off while it replaced train.csv, test.csv"
            assert all(isinstance(side, str) and (told in side or none in side) for side in seen), number
            assert all("run the same prepare command again" in side for side in seen if told in side)
        assert prepare.main(prepared(base, new, *force)) in ((0,) if seen != after else (0, 2))  # 2: is there already
        assert pair_of(base) == after
        if "is there already" not in capsys.readouterr().err:
            assert families.listing(base) == clean
    assert number > 7 and refused >= 2


def test_the_command_line_refuses_a_pair_that_was_cut_off_and_goes_on_when_it_is_whole(base, tmp_path, capsys, caplog):
    """The lines that prepare prints are all that dataset_format.yaml needs."""
    words = ["--source", "powerseeking", "--base_dir", str(base.path), "--train", "6", "--test", "3"]
    source = questions(tmp_path / "wealth-questions.csv", 12, "is it")
    assert prepare.main([*words, "--input", str(source)]) == 0
    said = capsys.readouterr().out
    printed = yaml.safe_load(said[said.index("train:\n") : said.index("and hparams/")])
    formats = yaml.safe_load((base.path / FORMATS_FILE).read_text())
    families.write_yaml(base.path / FORMATS_FILE, {section: {**formats[section], **printed[section]} for section in formats})
    shutil.copytree(base.experiment / "mine", base.experiment / "wealth-questions")
    for number in range(1, 99):
        assert killed_at(number, "after", [*words, "--input", str(source), "--force", "--seed", "7"])
        code, said = run(base, capsys, caplog, "--mode", "generate", dataset="wealth-questions")
        if code:
            break
    assert code == 2 and "was cut off while it replaced train.csv, test.csv" in said
    dry = run(base, capsys, caplog, "--mode", "generate", "--dry_run", dataset="wealth-questions")
    assert dry[0] == 2 and "was cut off" in dry[1]
    assert prepare.main([*words, "--input", str(source), "--force", "--seed", "7"]) == 0
    code, said = run(base, capsys, caplog, "--mode", "both", dataset="wealth-questions")
    assert code == 0 and "in both" not in said


def test_two_prepares_at_once_do_not_mix(tmp_path, capsys):
    source = questions(tmp_path / "in.csv", 12, "is it")
    assert prepare.main(prepared(tmp_path, source)) == 0
    before = families.listing(tmp_path)
    handle = os.open(tmp_path / "data/quiz", os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    assert prepare.main(prepared(tmp_path, source, "--force", "--seed", "7")) == 2
    assert "another process is writing there" in capsys.readouterr().err and families.listing(tmp_path) == before
    os.close(handle)
    assert prepare.main(prepared(tmp_path, source, "--force", "--seed", "7")) == 0


def test_other_files_of_the_folder_are_not_refused(tmp_path):
    families.write_jsonl(tmp_path / "train.jsonl", rows(3))
    (tmp_path / "half-replaced.json").write_text('["train.csv", "test.csv"]\n')
    fmt = prepare_format(tmp_path / "train.jsonl")
    assert len(read_pairs(fmt)) == 3
    (tmp_path / "half-replaced.json").write_text("?")
    with pytest.raises(UserError, match="cut off"):
        read_pairs(fmt)


def prepare_format(path):
    from spilt.data import DatasetFormat

    return DatasetFormat("mine", "train", path, {}, False)


# ---------------------------------------------------------------- prepare: names


def statements(path, n=12):
    path.parent.mkdir(parents=True, exist_ok=True)
    answers = [(" Yes", " No"), (" No", " Yes")]
    made = [
        {"question": f"q{i}", "answer_matching_behavior": y, "answer_not_matching_behavior": x}
        for i in range(n)
        for y, x in [answers[i % 2]]
    ]
    families.write_jsonl(path, made)
    return path


@pytest.mark.parametrize(
    ("file", "more", "name"),
    [
        ("psychopathy.jsonl", (), "psychopathy"),
        ("machiavellianism.jsonl", (), "machiavellianism"),
        ("machiavellianism.jsonl", ("--name", "my-data"), "my-data"),
        ("machiavellianism.jsonl", ("--name", "psychopathy"), "psychopathy"),  # asked for by name
        ("psychopathy/train.jsonl", (), "psychopathy"),
    ],
)
def test_a_file_of_another_source_keeps_its_own_name(tmp_path, capsys, file, more, name):
    source = statements(tmp_path / "in" / file)
    words = ["--source", "psychopathy", "--input", str(source), "--base_dir", str(tmp_path / "out"), "--train", "4", "--test", "2"]
    assert prepare.main([*words, *more]) == 0
    said = capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out/data").iterdir()] == [name]
    assert (f"this is dataset '{name}', not 'psychopathy'" in said) == (name != "psychopathy")
    assert (f"file_path: data/{name}/train.jsonl" in said) == (name != "psychopathy")


@pytest.mark.parametrize(
    ("file", "more", "wanted"),
    [
        ("train.jsonl", (), "doesn't say what data it is"),
        ("my data.jsonl", (), "cannot be a folder name"),
        ("..hidden.jsonl", (), "cannot be a folder name"),
        ("a.jsonl", ("--name", "../../etc"), "--name '../../etc' cannot be a folder name"),
        ("a.jsonl", ("--name", ""), "cannot be a folder name"),
        ("a\x1b[2J.jsonl", (), "cannot be a folder name"),
    ],
)
def test_a_name_that_cannot_be_told_or_used_is_refused(tmp_path, capsys, file, more, wanted):
    source = statements(tmp_path / "in" / file)
    words = ["--source", "psychopathy", "--input", str(source), "--base_dir", str(tmp_path / "out"), "--train", "4", "--test", "2", *more]
    assert prepare.main(words) == 2
    said = capsys.readouterr().err
    assert wanted in said and "\x1b" not in said and not (tmp_path / "out").exists()


def test_the_sources_are_read_as_the_shipped_dataset_format_says(tmp_path):
    """prepare's lines for a dataset are the shipped ones, the name aside; a name that YAML takes for something else stays text."""
    shipped = yaml.safe_load((REPO / FORMATS_FILE).read_text())
    for source in prepare.SOURCES:
        printed = yaml.safe_load(prepare.format_lines(source, source))
        assert printed == {section: {source: entries[source]} for section, entries in shipped.items()}
    for name in ("yes", "1e5", "null", "0x1"):
        assert set(yaml.safe_load(prepare.format_lines("psychopathy", name))["train"]) == {name}


@real
def test_real_files_go_where_they_belong_and_make_sense(tmp_path, capsys, made, caplog):
    """The published files in full, under other names too, then a dry run and a fit's checks of them."""
    shutil.copytree(made.path, tmp_path / "base")
    base = made._replace(path=tmp_path / "base")
    renamed = shutil.copy(REAL / "psychopathy/psychopathy.jsonl", tmp_path / "download-1.jsonl")
    assert prepare.main(["--source", "psychopathy", "--input", str(renamed), "--base_dir", str(base.path)]) == 0
    files = [str(shutil.copy(REAL / "powerseeking" / f"{name}.csv", tmp_path / f"{name}.csv")) for name in ("train", "test")]
    assert prepare.main(["--source", "powerseeking", "--input", *files, "--base_dir", str(base.path)]) == 0
    assert sorted(path.name for path in (base.path / "data").iterdir()) == ["axbench", "mine", "powerseeking", "psychopathy"]
    shutil.copy(REPO / FORMATS_FILE, base.path / FORMATS_FILE)
    for dataset in ("psychopathy", "powerseeking"):
        shutil.copytree(base.experiment / "mine", base.experiment / dataset)
        for mode in ("both", "loss"):
            code, said = run(base, capsys, caplog, "--mode", mode, "--dry_run", dataset=dataset)
            assert code == 0 and not [line for line in said.splitlines() if "/data/" in line and "missing" in line]
        code, said = run(base, capsys, caplog, "--mode", "loss", dataset=dataset)  # no vector there: the data are checked all the same
        assert code == 1 and not [word for word in ("in both", "same answer", "are equal") if word in said]
    rows = read_prompts(dataset_format(base.path, "powerseeking", "generation")._replace(path=REAL / "powerseeking/train.csv"))
    assert len(rows) == 642
