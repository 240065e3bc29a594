"""The words that may come first: `spilt fit | generate | measure | look | ...`, completion, and an installed package in an empty folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import families
import forked
import pytest

import spilt
from spilt import cli, plan, run, settings, verbs
from spilt.artifacts import manifest
from spilt.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (("-m", "spilt"), (str(ROOT / "run_spilt.py"),))


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    return families.make_base(tmp_path / "base", train=6)


def words(base: families.Base, *more: str) -> list[str]:
    """Of a cell, without a stage."""
    return [*base.argv("sft", "vector", *more), "--quiet"]


def called(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    given = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path]), **env}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, cwd=cwd, env=given)


# ---------------------------------------------------------------- the words


@pytest.mark.parametrize("command", COMMANDS, ids=["spilt", "run_spilt"])
def test_the_help_names_every_word_and_the_released_flags(command: tuple[str, ...]) -> None:
    """And imports no torch."""
    said = called("-X", "importtime", *command, "--help")
    assert said.returncode == 0 and not re.search(r"\| +(torch|transformers|pandas)$", said.stderr, re.M)
    listed = dict(re.findall(r"^  spilt (\w+) +(\S.*)$", said.stdout, re.M))
    assert list(listed) == [*verbs.VERBS, *cli.PROGRAMS] and all(listed.values())
    assert not set(cli.PROGRAMS) & set(spilt.__all__)  # an imported program would stand in place of the function
    assert (
        "run_spilt.py --dataset ... --mode ...`, works as before" in " ".join(said.stdout.split())
        and "--intervention_method" in said.stdout
    )
    assert said.stdout.startswith(f"usage: {'spilt' if '-m' in command else 'run_spilt.py'} ")


@pytest.mark.parametrize("word", [*verbs.VERBS, *cli.PROGRAMS])
def test_each_word_has_a_help_of_its_own(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([word, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: spilt {word} ")
    place = cli.ELSEWHERE.get(word, word)
    assert (ROOT / "spilt" / f"{place}.py").is_file() or (ROOT / "spilt" / place).is_dir() or word in verbs.VERBS
    assert cli.main([word, "--no_such_flag"]) == 2
    assert capsys.readouterr().err.startswith(f"usage: spilt {word} ")


@pytest.mark.long
@pytest.mark.parametrize("program", cli.PROGRAMS)
def test_each_program_runs_as_a_module_too(program: str, tmp_path: Path) -> None:
    said = forked.run(["-m", f"spilt.{cli.ELSEWHERE.get(program, program)}", "--help"], cwd=tmp_path)
    assert said.returncode == 0 and said.stdout.startswith(f"usage: spilt {program} ")


FLAGS = {
    "fit": {"--checkpoint_seconds", "--tensor_parallel"},
    "evaluate": {"--multipliers", "--judge", "--rubric", "--judge_limit", "--prompt_baseline"},
    "generate": {"--multipliers", "--batch_size", "--prompt_baseline", "--decode_step", "--tensor_parallel"},
    "measure": {
        "--multipliers",
        "--split",
        "--checkpoint_seconds",
        "--no_report",
        "--control_pairs",
        "--released_files",
        "--no-released_files",
        "--tensor_parallel",
    },
}


@pytest.mark.parametrize("verb", verbs.VERBS)
def test_a_verb_takes_the_flags_that_mean_something_to_it(verb: str, base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are not in its help, and refused; --mode is not read as --model_name."""
    released = {flag for action in cli.parser()._actions for flag in action.option_strings}
    own = {flag for action in cli.parser(verb=verb)._actions for flag in action.option_strings}
    every = set().union(*FLAGS.values())
    assert own == (released - every - {"--mode", "--verify", "--version"}) | FLAGS[verb]
    value = {
        "--rubric": ["power"],
        "--judge_limit": ["1", "--judge", "1"],
        "--prompt_baseline": [f"kind={__file__}"],
        "--decode_step": ["static"],
        "--mode": ["loss"],
        "--split": ["train"],
        "--no_report": [],
        "--released_files": [],
        "--no-released_files": [],
        "--tensor_parallel": [],
    }
    for flag in every - FLAGS[verb] | {"--mode"}:
        assert cli.main([verb, *words(base, "--dry_run", flag, *value.get(flag, ["1"]))]) == 2
        assert f"unrecognized arguments: {flag}" in capsys.readouterr().err
    for flag in FLAGS[verb]:
        assert cli.main([verb, *words(base, "--dry_run", flag, *value.get(flag, ["1"]))]) == 0


def test_a_verb_plans_what_its_mode_does(base: families.Base) -> None:
    """Request for request, of every method and form; what it does not take has the released default."""
    given = base.argv("all", "all", "--seed", "3", "--limit", "2")
    for name, verb in verbs.VERBS.items():
        asked = cli.request_of(cli.parser(verb=name).parse_args(given))
        assert asked == cli.request_of(cli.parser().parse_args([*given, "--mode", verb.mode]))
        assert {step.verb for step in plan.make(asked).steps} == {name}


@pytest.mark.usefixtures("no_pictures")
def test_the_verbs_run(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """fit, generate and measure one after the other, and all programs that read; a rerun with the released flags finds all done."""
    assert cli.main(["fit", *words(base)]) == 0
    assert cli.main(["generate", *words(base, "--multipliers", "-1", "0", "1")]) == 0
    assert cli.main(["measure", *words(base, "--multipliers", "-2", "-1", "0", "1", "2", "--split", "train", "--no_report")]) == 0
    capsys.readouterr()
    names = ["--base_dir", str(base.path), "--model_name", base.model, "--dataset", base.one]
    for word in ("look", "recommend", "report"):
        assert cli.main([word, *names]) == 0, word
    assert cli.main(["verify", "--base_dir", str(base.path)]) == 0
    capsys.readouterr()
    assert cli.main(words(base, "--multipliers", "-1", "0", "1")) == 0
    assert "2 already done" in capsys.readouterr().out


def test_the_commands_of_a_dry_run_are_of_what_was_called(base: families.Base) -> None:
    for command, shown in zip(COMMANDS, ("python -m spilt", "python run_spilt.py"), strict=True):
        said = called(*command, *words(base, "--dry_run")).stdout
        assert re.findall(r"^   (python \S+(?: spilt)?) --dataset", said, re.M) == [shown, shown]


def test_an_unknown_word_has_a_way_out(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["mesure", "--dataset", "x"]) == 2
    said = capsys.readouterr().err
    assert "unknown word 'mesure'; did you mean 'measure'? have: " in said and "recommend" in said


def test_a_run_prints_nothing_by_itself(base: families.Base, capfd: pytest.CaptureFixture[str]) -> None:
    """It gives outcomes, and tells what fails to whoever listens."""
    request = cli.request_of(cli.parser().parse_args(words(base, "--mode", "both")))
    path = base.data(base.one, "valid")
    made = plan.make(request)
    path.write_text("{")
    told: list[str] = []
    outcomes = run.run_plan(made, request, told.append)
    assert [outcome.outcome for outcome in outcomes] == [run.DONE, run.FAILED] and cli.exit_code(outcomes) == 1
    assert len(told) == 1 and told[0].startswith("error: apply ") and str(path) in told[0]
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- completion


def completed(line: str, cwd: Path = ROOT) -> set[str]:
    """What argcomplete's shell function reads from file descriptor 8 (here, as it also offers, from a file)."""
    out = cwd / "completions"
    command = line.split()[: 3 if line.startswith("python -m") else 2]
    env = {"_ARGCOMPLETE": str(len(command)), "_ARGCOMPLETE_STDOUT_FILENAME": str(out), "_ARGCOMPLETE_IFS": "\n"}
    called(*command[1:], cwd=cwd, COMP_LINE=line, COMP_POINT=str(len(line)), **env)
    found = out.read_text()
    return {word.strip() for word in found.split("\n")}


@pytest.mark.long
def test_a_shell_completes_words_flags_and_names(tmp_path: Path) -> None:
    import argcomplete  # noqa: F401 - in requirements-test.txt

    assert completed("python -m spilt me", tmp_path) == {"measure"}
    assert completed("python -m spilt --me", tmp_path) == {"--method"}
    assert completed("python -m spilt --method s", tmp_path) == {"sft", "spilt"}
    assert completed("python -m spilt --mode ", tmp_path) == set(verbs.MODES)
    assert completed("python -m spilt fit --method re", tmp_path) == {"reps"}
    assert completed("python -m spilt fit --m", tmp_path) == {"--method", "--model_name"}
    assert completed("python -m spilt generate --m", tmp_path) == {"--method", "--model_name", "--multipliers"}
    assert completed("python -m spilt verify --ba", tmp_path) == {"--base_dir"}
    assert completed("python -m spilt say --method re", tmp_path) == {"reps"}
    assert completed("python -m spilt prepare --source p", tmp_path) == {"powerseeking", "psychopathy"}
    shutil.copy(ROOT / "run_spilt.py", tmp_path)
    assert completed("python run_spilt.py --intervention_method lo", tmp_path) == {"local_weight", "lora"}


# ---------------------------------------------------------------- an empty folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed the package, from a copy of what a wheel is made of. No network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("spilt", "hparams"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    flags = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    done = called("-m", "pip", "install", *flags, "--target", str(target), str(source))
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.long
def test_an_installed_package_has_all_settings(installed: Path) -> None:
    there = {str(path.relative_to(ROOT)): path.read_bytes() for path in (ROOT / "hparams").rglob("*.yaml")}
    packed = installed / "spilt"
    assert len(there) > 90 and there == {str(path.relative_to(packed)): path.read_bytes() for path in (packed / "hparams").rglob("*.yaml")}
    modules = {str(path.relative_to(ROOT / "spilt")) for path in (ROOT / "spilt").rglob("*.py")}
    assert modules == {str(path.relative_to(packed)) for path in packed.rglob("*.py")}


@pytest.mark.long
def test_it_works_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    """Own data in three columns, a model folder, nothing else: fit, texts and losses, by the command and by the module."""
    site = {"PYTHONPATH": str(installed)}
    for command in (("-m", "spilt"), (str(installed / "bin" / "spilt"),)):
        assert called(*command, "--help", cwd=tmp_path, **site).returncode == 0
    cell = ["--dataset", "mine", "--model_name", "tiny", "--intervention_method", "vector", "--device", "cpu", "--quiet"]
    nothing = called("-m", "spilt", "fit", "--method", "sft", *cell, cwd=tmp_path, **site)
    assert nothing.returncode == 2 and "With a checkpoint folder models/tiny it does without one" in nothing.stderr
    shutil.copytree(families.checkpoint("qwen2"), tmp_path / "models" / "tiny")
    nothing = called("-m", "spilt", "fit", "--method", "sft", *cell, cwd=tmp_path, **site)
    assert (
        nothing.returncode == 2 and "or put data/mine/train.csv and test.csv there, with the columns question, matching" in nothing.stderr
    )
    for name, count in (("train", 6), ("test", 2)):
        families.write_jsonl(tmp_path / "data" / "mine" / f"{name}.jsonl", families.pairs(count))
    for word in ("fit", "generate", "measure"):
        done = called("-m", "spilt", word, "--method", "sft", *cell, "--set", "n_epochs=1", cwd=tmp_path, **site)
        assert done.returncode == 0, done.stderr
        assert done.stderr.count("so the released defaults") == 1 and f"(layer {families.LAYERS // 2})" in done.stderr
    fitted = tmp_path / "vectors/tiny/sft/mine/sft_vector" / f"layer_{families.LAYERS // 2}.pt"
    used = (manifest.read(fitted) or {})["parts"]["settings"]
    assert used["n_epochs"] == 1 and used["steering_factors"][-1] == 20
    assert (tmp_path / "generation/tiny/sft/mine/sft_vector/m1.0/mine_results.json").is_file()
    assert list(tmp_path.rglob("train_losses.csv")) and (tmp_path / "vectors/tiny/get_sft_loss/report/mine/report.html").is_file()
    assert not (tmp_path / "hparams").exists()


@pytest.mark.long
def test_prepare_works_there(installed: Path, tmp_path: Path) -> None:
    """And what it writes is found without an entry of one's own."""
    rows = [{"question": f"Do you like thing {i}?", "answer_matching_behavior": (" Yes", " No")[i % 2],
             "answer_not_matching_behavior": (" No", " Yes")[i % 2]} for i in range(12)]  # fmt: skip
    families.write_jsonl(tmp_path / "psychopathy.jsonl", rows)
    flags = ["--source", "psychopathy", "--input", "psychopathy.jsonl", "--train", "8", "--test", "4", "--name", "psychopathy"]
    done = called("-m", "spilt", "prepare", *flags, cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    shutil.copytree(families.checkpoint("gemma2"), tmp_path / "models" / "gemma-2-9b-it")
    cell = ["--dataset", "psychopathy", "--method", "caa", "--model_name", "gemma-2-9b-it", "--intervention_method", "vector"]
    shown = called("-m", "spilt", "fit", *cell, "--set", "layers=1", "--dry_run", cwd=tmp_path, PYTHONPATH=str(installed))
    assert shown.returncode == 0 and "does not exist, so the settings that come with spilt (layer 1)" in shown.stdout
    assert "generate_caa_vector.yaml" in shown.stdout and "missing" not in shown.stdout


def test_a_tree_of_ones_own_wins(base: families.Base) -> None:
    """Also where it lacks the cell: then the message is the one of always."""
    asked = (base.path, base.model, base.one, "sft", "vector")
    own = settings.resolve_fit(*asked)
    assert own.origin == "" and all(str(path).startswith(str(base.path)) for path in own.files)
    base.hparams(base.one, "sft", "generate_sft_vector.yaml").unlink()
    with pytest.raises(UserError, match="no hparam file"):
        settings.resolve_fit(*asked, layers=(2,))
    shutil.rmtree(base.experiment)
    found = settings.resolve_fit(*asked, layers=(2,))
    assert found.settings.layers == (2,) and "released defaults" in found.origin
    with pytest.raises(UserError, match="layers is missing"):
        settings.resolve_fit(*asked)


def test_two_files_for_one_purpose_are_not_chosen_between(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """And other datasets are not stopped by it."""
    shutil.rmtree(base.path / "hparams")
    for name in ("two/train.jsonl", "two/train.json", "plain/train.jsonl"):
        families.write_jsonl(base.path / "data" / name, families.pairs(4))
    assert cli.main(["fit", *base.argv("sft", "vector", "--dry_run", dataset="two")]) == 2
    assert "one of data/two/train.json, data/two/train.jsonl" in capsys.readouterr().err
    assert cli.main(["fit", *base.argv("sft", "vector", "--dry_run", dataset="plain")]) == 0
