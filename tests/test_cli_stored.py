"""What is stored already: missing, changed, forced, made by the released code, of one concept among several."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from command_line import put, read_json, released_state, results_path, vector_path
from families import CONCEPTS, FORMS, HIDDEN, PAIRS, Base, listing, pairs, write_jsonl, write_yaml

from spilt import cli
from spilt.artifacts import manifest

# ---------------------------------------------------------------- missing, changed, forced


def test_apply_without_vectors_is_skipped_and_1(base: Base, capsys: Any, caplog: Any) -> None:
    before = listing(base.path)
    with caplog.at_level(logging.WARNING):
        assert cli.main(base.argv("all", "all", "--mode", "apply")) == 1
    assert f"{len(PAIRS)} skipped" in capsys.readouterr().out
    assert all(any(str(vector_path(base, m, f)) in r.getMessage() for r in caplog.records) for m, f in PAIRS)
    assert listing(base.path) == before


def test_apply_skips_beside_what_can_run(base: Base, capsys: Any, caplog: Any) -> None:
    put(vector_path(base, "sft", "lora"), released_state("lora"))
    assert cli.main(base.argv("sft", "all", "--mode", "apply")) == 0
    out = capsys.readouterr().out
    assert "1 done" in out and "2 skipped" in out
    assert results_path(base, "sft", "lora", "m1.0").is_file() and not results_path(base, "sft", "vector", "m1.0").exists()


def test_a_failing_cell_does_not_stop_the_others(base: Base, capsys: Any) -> None:
    put(vector_path(base, "sft", "vector"), torch.ones(31))
    put(vector_path(base, "sft", "lora"), released_state("lora"))
    assert cli.main(base.argv("sft", "all", "--mode", "apply")) == 1
    captured = capsys.readouterr()
    assert "1 failed" in captured.out and "1 done" in captured.out and "[31]" in captured.err
    assert results_path(base, "sft", "lora", "m1.0").is_file()


@pytest.mark.long
def test_changed_settings_and_data_are_done_again(base: Base, capsys: Any) -> None:
    argv = base.argv("sft", "vector", "--mode", "generate")
    path = vector_path(base, "sft", "vector")

    def run(*more: str) -> tuple[str, bytes]:
        assert cli.main([*argv, *more]) == 0
        return ("already done" if "1 already done" in capsys.readouterr().out else "done"), path.read_bytes()

    first = run()
    assert first[0] == "done" and run() == ("already done", first[1])
    assert run("--force") == ("done", first[1])  # the same bytes again
    changed = run("--set", "lr=0.5")
    assert changed[0] == "done" and changed[1] != first[1]
    seeded = run("--seed", "9")
    assert seeded[0] == "done" and seeded[1] != changed[1]
    assert run("--seed", "9")[0] == "already done"
    assert run("--seed", "9", "--batch_size", "3")[0] == "already done"  # no part of the result
    limited = run("--seed", "9", "--limit", "5")
    assert limited[0] == "done" and limited[1] != seeded[1]
    write_jsonl(base.data(base.one, "train"), pairs(19))
    assert run("--seed", "9", "--limit", "5")[0] == "done"
    path.write_bytes(path.read_bytes()[:-1])  # damaged
    assert run("--seed", "9", "--limit", "5") == ("done", limited[1])


def test_texts_follow_their_vector(base: Base, capsys: Any) -> None:
    """A new vector makes the texts of the old one stale."""
    path, argv = vector_path(base, "sft", "vector"), base.argv("sft", "vector", "--mode", "apply", "--multipliers", "8")
    texts = []
    for seed in (1, 2):
        put(path, released_state("vector", seed))
        assert cli.main(argv) == 0
        texts.append(results_path(base, "sft", "vector", "m8.0").read_bytes())
    assert texts[0] != texts[1]
    assert "1 done" in capsys.readouterr().out


# ---------------------------------------------------------------- vectors of the released code


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.few(1)
def test_released_vectors_are_applied_and_kept(base: Base, form: str, capsys: Any, caplog: Any) -> None:
    """No manifest beside them: used by --mode apply, and not fitted over by --mode both."""
    path = vector_path(base, "sft", form)
    put(path, released_state(form, scale=1.0))
    stored_bytes = path.read_bytes()
    argv = base.argv("sft", form, "--multipliers", "0", "3", "-3")
    assert cli.main([*argv, "--mode", "apply"]) == 0
    texts = {m: [row["pred"] for row in read_json(results_path(base, "sft", form, m))] for m in ("m0.0", "m3.0", "m-3.0")}
    assert len({json.dumps(text) for text in texts.values()}) == 3
    assert cli.main([*argv, "--mode", "both"]) == 0
    assert path.read_bytes() == stored_bytes and not manifest.manifest_path(path).exists()
    assert cli.main([*argv, "--mode", "both", "--force"]) == 0
    assert path.read_bytes() != stored_bytes and manifest.manifest_path(path).exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.few(1)
def test_a_file_of_several_concepts_is_read_by_concept_id(base: Base, form: str) -> None:
    """[n, D], or a dict of dicts: the concept named in the YAML is taken, and equals a file of that concept alone."""
    states = [released_state(form, seed, scale=1.0) for seed in (1, 2, 3)]
    several = torch.stack(states) if form == "vector" else {i: {**state, "concept_id": i} for i, state in enumerate(states)}
    argv = base.argv("sft", form, "--mode", "apply", "--multipliers", "3")
    texts = []
    for state, more in ((several, ["--set", "concept_id=2"]), (states[2], []), (several, ["--set", "concept_id=0"])):
        put(vector_path(base, "sft", form), state)
        assert cli.main([*argv, *more]) == 0
        texts.append([row["pred"] for row in read_json(results_path(base, "sft", form, "m3.0"))])
    assert texts[0] == texts[1] != texts[2]


def test_a_concept_that_a_file_lacks_is_named(base: Base, capsys: Any) -> None:
    put(vector_path(base, "sft", "vector"), torch.ones(3, HIDDEN))
    before = listing(base.path)
    assert cli.main(base.argv("sft", "vector", "--mode", "apply", "--set", "concept_id=5")) == 2
    assert "3 concepts" in (error := capsys.readouterr().err) and "concept_id 5" in error
    assert listing(base.path) == before


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vector", "lora_attn", "local_weight_mlp_mid"])
@pytest.mark.few(1)
def test_released_texts_through_the_command_line(tmp_path: Path, name: str) -> None:
    """The released code's own files in, its greedy texts out."""
    want = golden.numbers("generations.json")
    form = next(form for form in FORMS if name.startswith(form))
    shutil.copytree(golden.GOLDEN / "tiny-gemma2", tmp_path / "models" / "tiny")
    base = Base(tmp_path, layer=golden.LAYER)
    write_jsonl(base.data(base.one, "valid"), [{"input": entry["input"]} for entry in want[f"psychopathy/{name}/m0.0"]])
    write_yaml(
        tmp_path / "hparams" / "Steer" / "dataset_format.yaml", {"generation": {base.one: {"file_path": f"data/{base.one}/valid.jsonl"}}}
    )
    params = {"max_new_tokens": 24, "do_sample": False}
    apply = {"layers": [3], "torch_dtype": "float32", "generation_params": params}
    write_yaml(base.hparams(base.one, "spilt", "apply_spilt.yaml"), apply)
    path = vector_path(base, "spilt", form, layer=3)
    path.parent.mkdir(parents=True)
    shutil.copy(golden.NUMBERS / "states" / name / "layer_3.pt", path)
    assert cli.main(base.argv("spilt", form, "--mode", "apply", "--multipliers", "0", "1", "4")) == 0
    for m in ("m0.0", "m1.0", "m4.0"):
        found = read_json(results_path(base, "spilt", form, m))
        assert [row["pred"] for row in found] == [[entry["text"]] for entry in want[f"psychopathy/{name}/{m}"]]
        assert [row["complete_output"] for row in found] == [[entry["complete"]] for entry in want[f"psychopathy/{name}/{m}"]]


# ---------------------------------------------------------------- concepts (axbench)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.few(1)
def test_concepts(base: Base, form: str, capsys: Any) -> None:
    """One folder of vectors per concept, one file of texts for all; negative examples (id < 0) left out."""
    argv = base.argv("sft", form, "--multipliers", "1", dataset=base.many)
    assert cli.main(argv) == 0
    for concept, text in CONCEPTS.items():
        path = vector_path(base, "sft", form, f"{base.many}_concept_{concept}")
        state = torch.load(path, weights_only=True)
        assert form == "vector" or state["concept_id"] == concept
        metadata = json.loads(path.with_name("metadata_layer_2.jsonl").read_text())
        assert (metadata["concept_id"], metadata["concept"]) == (concept, text)
    folder = base.path / "vectors" / base.model / "sft"
    assert sorted(p.name for p in folder.iterdir()) == sorted(f"{base.many}_concept_{c}" for c in CONCEPTS)
    told = base.path / "generation" / base.model / "sft" / base.many / f"sft_{form}"
    found = read_json(told / "all_generation_results_m1.0.json")
    assert [list(part) for part in found] == [["concept_id", "concept_name", "generated_results", "eval_data", "multiplier"]] * 3
    assert [(part["concept_id"], part["concept_name"], part["multiplier"]) for part in found] == [(c, t, 1.0) for c, t in CONCEPTS.items()]
    for part, text in zip(found, CONCEPTS.values(), strict=True):
        assert [row["input"] for row in part["generated_results"]] == [row["question"] for row in pairs(2, f"{text} ")]
        assert len(part["eval_data"]) == 2 and all(extra["category"] == "positive" for extra in part["eval_data"])
    capsys.readouterr()
    before = listing(base.path)
    assert cli.main([*argv, "--concepts", "1", "3"]) == 0  # fitted before; the file holds the concepts of the request
    out = capsys.readouterr().out
    assert "2 already done" in out and "1 done" in out
    assert [part["concept_id"] for part in read_json(told / "all_generation_results_m1.0.json")] == [1, 3]
    vectors = {name: value for name, value in listing(base.path).items() if name.startswith("vectors")}
    assert vectors == {name: value for name, value in before.items() if name.startswith("vectors")}


def test_released_files_of_several_concepts_serve_each_concept(base: Base) -> None:
    """Per-concept folders that hold the released all-concepts file: each concept takes its own row."""
    states = torch.stack([released_state("vector", seed, scale=1.0) for seed in range(4)])
    for concept in CONCEPTS:
        put(vector_path(base, "sft", "vector", f"{base.many}_concept_{concept}"), states)
    assert cli.main(base.argv("sft", "vector", "--mode", "apply", "--multipliers", "3", dataset=base.many)) == 0
    told = base.path / "generation" / base.model / "sft" / base.many / "sft_vector" / "all_generation_results_m3.0.json"
    together = [[row["pred"] for row in part["generated_results"]] for part in read_json(told)]
    for concept in CONCEPTS:
        put(vector_path(base, "sft", "vector", f"{base.many}_concept_{concept}"), states[concept])
    assert cli.main(base.argv("sft", "vector", "--mode", "apply", "--multipliers", "3", dataset=base.many)) == 0
    assert together == [[row["pred"] for row in part["generated_results"]] for part in read_json(told)]
