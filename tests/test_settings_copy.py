"""`spilt settings`: files like those of another dataset and model; the message on missing ones prints the command that makes them."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import families
import pytest

from spilt import cli
from spilt.settings import ROOT, load_yaml, resolve_fit, resolve_generate, resolve_measure

PACKAGED = Path(__file__).resolve().parents[1]


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    return families.make_base(tmp_path / "base", train=4)


def test_the_released_settings_for_a_model_of_ones_own(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """All verbs, methods and forms resolve to the same settings with other layers; a second run keeps what is there."""
    words = ["settings", "--like", "psychopathy/gemma-2-9b-it", "--for", "traits/my-model", "--layers", "3", "4"]
    words += ["--base_dir", str(base.path)]
    assert cli.main(words) == 0
    assert "15 files written" in capsys.readouterr().out
    for method, form in families.PAIRS:
        for resolve in (resolve_fit, resolve_measure, resolve_generate):
            ours = resolve(base.path, "my-model", "traits", method, form).settings.as_dict()
            given = {"layers": "3,4", "dtype": "float32"}
            theirs = resolve(PACKAGED, "gemma-2-9b-it", "psychopathy", method, form, given).settings.as_dict()
            assert {**ours, "generation_params": 0} == {**theirs, "generation_params": 0}
    edited = base.path / ROOT / "traits/my-model/sft/generate_sft_vector.yaml"
    edited.write_text("layers: [1]\n")
    assert cli.main(words) == 0
    assert "0 files written, 15 that were there kept" in capsys.readouterr().out and load_yaml(edited) == {"layers": [1]}


def test_other_values_where_a_file_has_them(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """--set goes into each file that has the key, in sections too, entry by entry in generation_params; it adds no key anywhere."""
    like = ["settings", "--like", "psychopathy/gemma-2-9b-it", "--layers", "3", "--base_dir", str(base.path)]
    assert cli.main([*like, "--for", "traits/plain"]) == 0
    for path in (base.path / ROOT / "traits/plain").rglob("apply_*.yaml"):
        path.write_text(path.read_text() + "generation_params: {temperature: 1.5, top_p: 0.5}\n")
    like[2] = "traits/plain"
    sets = ["lr=0.5", "rank=2", "multipliers=1,2", "generation_params.temperature=0.25"]
    assert cli.main([*like, "--for", "traits/mine", *(word for one in sets for word in ("--set", one))]) == 0
    for method, form in families.PAIRS:
        for resolve in (resolve_fit, resolve_measure, resolve_generate):
            plain, mine = (resolve(base.path, model, "traits", method, form).settings.as_dict() for model in ("plain", "mine"))
            other = {name for name in plain if plain[name] != mine[name]}
            assert other <= {"lr", "rank", "multipliers", "generation_params"}
    fitted = resolve_fit(base.path, "mine", "traits", "sft", "lora").settings
    made = resolve_generate(base.path, "mine", "traits", "sft", "vector").settings
    assert (fitted.lr, fitted.rank, made.multipliers, made.generation_params.temperature) == (0.5, 2, (1.0, 2.0), 0.25)
    assert made.generation_params.top_p == 0.5, "the file's other entries stay"
    capsys.readouterr()
    for word, wanted in {"lr=-1": "lr", "layers=2": "--layers says them", "burn_in=3": "burn_in", "lr": "key=value"}.items():
        before = families.listing(base.path)
        assert cli.main([*like, "--for", "traits/other", "--set", word]) == 2
        assert wanted in capsys.readouterr().err and families.listing(base.path) == before


def test_the_message_prints_the_command_and_the_command_helps(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(base.path / ROOT / base.one)
    words = base.argv("sft", "vector", "--mode", "generate", "--quiet")
    assert cli.main(words) == 2
    command = re.search(r"`spilt (settings .*?)` makes one", capsys.readouterr().err)
    assert command is not None and "--layers 2 " in command[1], "the middle block"
    assert cli.main(shlex.split(command[1])) == 0
    assert cli.main(words) == 0


@pytest.mark.parametrize(
    ("like", "target", "layers", "wanted"),
    [
        ("psychopathy/gema", "a/b", "1", "did you mean 'psychopathy/gemma-2-9b-it'?"),
        ("psychopathy", "a/b", "1", "wanted DATASET/MODEL"),
        ("psychopathy/gemma-2-9b-it", "../b", "1", "cannot be a folder name"),
        ("psychopathy/gemma-2-9b-it", "a/b", "x", "is not a whole number"),
        ("../x", "a/b", "1", "cannot be a folder name"),
    ],
)
def test_wrong_words(like: str, target: str, layers: str, wanted: str, base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    before = families.listing(base.path)
    assert cli.main(["settings", "--like", like, "--for", target, "--layers", layers, "--base_dir", str(base.path)]) == 2
    assert wanted in capsys.readouterr().err and families.listing(base.path) == before
