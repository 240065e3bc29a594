"""Bad requests and bad files: exit 2, one message that names fact, value and way out, and nothing written."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from command_line import change, process, put, released_state, vector_path
from families import FORMS, Base, listing, pairs, write_jsonl

from spilt import cli, verbs
from spilt.methods import METHODS

Spoil = Callable[[Base], list[str]]
BAD: dict[str, tuple[Spoil, list[str]]] = {}


def bad(*needles: str) -> Callable[[Spoil], Spoil]:
    """A case: spoils a base and returns the command line; the message has every one of `needles`."""

    def add(spoil: Spoil) -> Spoil:
        BAD[spoil.__name__] = (spoil, list(needles))
        return spoil

    return add


@bad("dataset", "'mien'", "did you mean 'mine'", "axbench")
def unknown_dataset(base: Base) -> list[str]:
    return base.argv(dataset="mien")


@bad("method", "'sptl'", "did you mean 'spilt'", *METHODS)
def unknown_method(base: Base) -> list[str]:
    return base.argv("sptl")


@bad("model", "'tinny'", "did you mean 'tiny'", "models")
def unknown_model(base: Base) -> list[str]:
    return base.argv(model="tinny")


@bad("intervention_method", "'vectr'", "did you mean 'vector'", *FORMS)
def unknown_intervention(base: Base) -> list[str]:
    return base.argv("sft", "vectr")


@bad("mode", "'aply'", "did you mean 'apply'", *verbs.MODES)
def unknown_mode(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--mode", "aply")


@bad("split", "'tran'", "train", "test", "both")
def unknown_split(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--mode", "loss", "--split", "tran")


@bad("caa + lora", "does not exist", METHODS["caa"].why, "vector")
def impossible_pair(base: Base) -> list[str]:
    return base.argv("caa", "lora")


@bad("generate_sft_vector.yaml", "no hparam file", "`spilt settings --like axbench/tiny --for mine/tiny --layers 2 --base_dir ")
def missing_hparam_file(base: Base) -> list[str]:
    base.hparams(base.one, "sft", "generate_sft_vector.yaml").unlink()
    return base.argv()


@bad("no hparam file", "generate_sft_vector.yaml", "generate_sft_vector.yaml")
def no_hparams_for_the_model(base: Base) -> list[str]:
    (base.path / "models" / base.model).rename(base.path / "models" / "other")
    return base.argv(model="other")


@bad("generate_sft_vector.yaml", "'n_epoch'", "did you mean 'n_epochs'")
def unknown_yaml_key(base: Base) -> list[str]:
    change(base, n_epoch=3)
    return base.argv()


@bad("generate_sft_vector.yaml", "lr", "fast", "not a number")
def wrong_type(base: Base) -> list[str]:
    change(base, lr="fast")
    return base.argv()


@bad("layer 9", "5 blocks", "layers")
def layer_beyond_the_model(base: Base) -> list[str]:
    change(base, layers=[9])
    return base.argv("sft", "vector", "--mode", "generate")


@bad("--set", "'lrr'", "did you mean 'lr'")
def unknown_setting(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--set", "lrr=1")


@bad("train.jsonl", "does not exist", "file_path")
def missing_data_file(base: Base) -> list[str]:
    base.data(base.one, "train").unlink()
    return base.argv()


@bad("train.jsonl", "line 1", "'matching'", "question", "answer")
def missing_column(base: Base) -> list[str]:
    write_jsonl(base.data(base.one, "train"), [{"question": "a", "answer": "b", "not_matching": "c"}])
    return base.argv()


@bad("train.jsonl", "no rows")
def empty_file(base: Base) -> list[str]:
    base.data(base.one, "train").write_text("")
    return base.argv()


@bad("train.jsonl", "line 17", "question, matching, not_matching")
def broken_line_17(base: Base) -> list[str]:
    lines = base.data(base.one, "train").read_text().splitlines()
    lines[16] = lines[16][:-3]
    base.data(base.one, "train").write_text("\n".join(lines) + "\n")
    return base.argv()


@bad("valid.jsonl", "line 2", "question")
def broken_prompts_before_anything_is_fitted(base: Base) -> list[str]:
    path = base.data(base.one, "valid")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{", *lines[2:]]) + "\n")
    return base.argv()


@bad("line 3", "empty answer", "not_matching")
def empty_answer(base: Base) -> list[str]:
    rows = pairs(4)
    rows[2]["not_matching"] = " "
    write_jsonl(base.data(base.one, "train"), rows)
    return base.argv()


@bad("'../tiny'", "..")
def model_name_that_climbs(base: Base) -> list[str]:
    return base.argv(model="../tiny")


@bad("'../models/tiny'", "..")
def model_name_that_climbs_to_a_model(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--mode", "apply", model="../models/tiny")


@bad("--multipliers", "'much'", "not a number")
def multiplier_that_is_no_number(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--multipliers", "much")


@bad("--multipliers", "nan")
def multiplier_nan(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--multipliers", "nan")


@bad("--multipliers", "inf")
def multiplier_minus_infinity(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--multipliers", "-inf")


@bad("--base_dir", "nowhere", "no such folder")
def base_dir_that_is_not_there(base: Base) -> list[str]:
    return [*base.argv(), "--base_dir", str(base.path / "nowhere")]


@bad("--device", "cuda:77", "cpu")
def device_that_is_not_there(base: Base) -> list[str]:
    return [*base.argv(), "--device", "cuda:77"]


@bad("models", "cannot be loaded")
def broken_checkpoint(base: Base) -> list[str]:
    (base.path / "models" / base.model / "config.json").write_text("{")
    return base.argv()


@bad("--concepts", "mine", "no concepts")
def concepts_of_a_dataset_without(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--concepts", "1")


@bad("concept", "'7'", "0, 1, 3")
def unknown_concept(base: Base) -> list[str]:
    return base.argv("sft", "vector", "--concepts", "7", dataset=base.many)


def stored(base: Base, form: str, state: Any) -> list[str]:
    put(vector_path(base, "sft", form), state)
    return base.argv("sft", form, "--mode", "apply")


@bad("layer_2.pt", "[31]", "[32]")
def vector_of_a_wrong_shape(base: Base) -> list[str]:
    return stored(base, "vector", torch.ones(31))


@bad("layer_2.pt", "lora_B", "[4, 31]", "[4, 32]")
def lora_of_a_wrong_shape(base: Base) -> list[str]:
    return stored(base, "lora", {**released_state("lora"), "lora_B": torch.ones(4, 31)})


@bad("layer_2.pt", "r = 8", "[48, 4]")
def lora_of_a_wrong_rank(base: Base) -> list[str]:
    return stored(base, "lora", {**released_state("lora"), "r": 8})


@bad("layer_2.pt", "weight", "[32, 32]", "[48, 32]", "mlp_mid")
def local_weight_of_another_read_point(base: Base) -> list[str]:
    return stored(base, "local_weight", {**released_state("local_weight"), "weight": torch.ones(32, 32)})


@bad("layer_2.pt", "bias", "missing")
def local_weight_without_bias(base: Base) -> list[str]:
    return stored(base, "local_weight", {k: v for k, v in released_state("local_weight").items() if k != "bias"})


@bad("layer_2.pt", "lora", "tensor of shape [32]", "--intervention_method vector")
def vector_where_a_lora_is_wanted(base: Base) -> list[str]:
    return stored(base, "lora", torch.ones(32))


@bad("layer_2.pt", "NaN")
def vector_with_nan(base: Base) -> list[str]:
    return stored(base, "vector", torch.tensor([float("nan"), *[1.0] * 31]))


@bad("layer_2.pt", "infinite")
def local_weight_with_infinity(base: Base) -> list[str]:
    return stored(base, "local_weight", {**released_state("local_weight"), "bias": torch.full((32,), float("inf"))})


@bad("layer_2.pt", "dtype", "int64")
def vector_of_whole_numbers(base: Base) -> list[str]:
    return stored(base, "vector", torch.ones(32, dtype=torch.long))


class Malicious:
    def __reduce__(self) -> Any:
        return os.system, ("touch pwned",)


@bad("layer_2.pt", "refused", "not a plain tensor file", "posix.system")
def vector_that_is_a_malicious_pickle(base: Base) -> list[str]:
    path = vector_path(base, "sft", "vector")
    path.parent.mkdir(parents=True)
    torch.save({"weight": Malicious()}, path)
    return base.argv("sft", "vector", "--mode", "apply")


@bad("layer_2.pt")
def vector_that_is_a_bare_malicious_pickle(base: Base) -> list[str]:
    path = vector_path(base, "sft", "vector")
    path.parent.mkdir(parents=True)
    path.write_bytes(pickle.dumps(Malicious()))
    return base.argv("sft", "vector", "--mode", "apply")


@bad("layer_2.pt", "cannot be read")
def vector_cut_short(base: Base) -> list[str]:
    argv = stored(base, "local_weight", released_state("local_weight"))
    path = vector_path(base, "sft", "local_weight")
    path.write_bytes(path.read_bytes()[:-2000])
    return argv


@bad("layer_2.pt", "cannot be read")
def vector_of_no_bytes(base: Base) -> list[str]:
    argv = stored(base, "vector", torch.ones(32))
    vector_path(base, "sft", "vector").write_bytes(b"")
    return argv


@pytest.mark.parametrize("case", BAD)
def test_bad_input(base: Base, case: str, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit 2; the message names fact, value and way out; no traceback; the tree is as it was."""
    spoil, needles = BAD[case]
    argv = spoil(base)
    monkeypatch.chdir(base.path)  # where a malicious file would leave its mark
    before = listing(base.path)
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert "error: " in error and "Traceback" not in error
    assert [needle for needle in needles if needle not in error] == [], error
    assert listing(base.path) == before


@pytest.mark.parametrize("argv", [[], ["--dataset", "mine"], ["--nonsense"], ["--limit", "0"], ["--limit", "x"]])
def test_bad_flags_are_2(clean: Base, argv: list[str], capsys: Any) -> None:
    assert cli.main([*clean.argv(), *argv] if argv and argv[0] in ("--limit", "--nonsense") else argv) == 2
    error = capsys.readouterr().err
    assert "usage" in error and "Traceback" not in error


@pytest.mark.slow
def test_a_real_process_exits_with_the_code(clean: Base) -> None:
    before = listing(clean.path)
    for argv, code in ((clean.argv("sptl"), 2), (clean.argv("sft", "vector", "--mode", "apply"), 1), (["--version"], 0)):
        run = process(argv)
        assert run.returncode == code, run.stderr
        assert "Traceback" not in run.stderr
    assert listing(clean.path) == before
