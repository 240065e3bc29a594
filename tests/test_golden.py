"""Parity with the released code on its own tiny Gemma-2 (tests/goldens), through the functions that the stages use.

Token ids and masks: test_chat.py. Null-it-out alone: test_interventions.py. Texts through the command line: test_cli_stored.py.
"""

from __future__ import annotations

import shutil
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import golden
import pytest
import torch
from families import write_jsonl, write_yaml
from golden import DATASETS, LAYER

from spilt.cell import FORMS
from spilt.data.chat import Chat, Encoded
from spilt.engine import activations, sampling, score
from spilt.engine import decode as generation
from spilt.engine import train as training
from spilt.methods import LOSS_TYPES, METHODS
from spilt.settings import FitSettings
from spilt.steering import hooks
from spilt.steering.anatomy import COMPONENTS
from spilt.steering.interventions import INTERVENTIONS, Intervention, Vector
from spilt.steering.steering import Steering

every_dataset = pytest.mark.parametrize("dataset", DATASETS)
STATES = tuple(sorted(p.parent.name for p in golden.NUMBERS.glob("states/*/layer_3.pt")))
LOSS_ATOL, RTOL = 1e-4, 1e-4


def form_of(state: str) -> str:
    return next(form for form in INTERVENTIONS if state.startswith(form))


def released(state: str, dataset: str = "") -> Intervention:
    """A stored intervention of the released code: states/, or the caa vector of a dataset."""
    if state.startswith("caa"):
        return Vector.from_state(golden.tensors(f"caa/{dataset}/layer_{LAYER}.pt")).eval()
    stored = golden.tensors(f"states/{state}/layer_{LAYER}.pt")
    read_point = stored["intervention_components"] if isinstance(stored, dict) else None
    return INTERVENTIONS[form_of(state)].from_state(stored, read_point=read_point).eval()


@cache
def chat() -> Chat:
    return Chat.of(golden.host()[1])


def sequences(rows: list[dict[str, str]]) -> list[Encoded]:
    """Matching and not-matching of each row, as the stages order them."""
    return [chat().encode(row["question"], row[which]) for row in rows for which in ("matching", "not_matching")]


@cache
def recorded(dataset: str, split: str, count: int | None = None) -> activations.Activations:
    return activations.record(golden.host()[0], LAYER, sequences(golden.rows(dataset, split)[:count]), COMPONENTS, 0, together=2)


def scorer(state: str, cache: activations.Activations) -> score.Recorded:
    where = "skip_prefix" if FORMS[form_of(state)].positional else "all"
    return score.Recorded(golden.host()[0], Steering.of({LAYER: released(state)}), cache, where, chat().prefix_length)


def test_the_released_numbers_are_all_there() -> None:
    assert len(STATES) == 8 and {form_of(s) for s in STATES} == {name for name, form in FORMS.items() if form.in_all}
    assert all(len(golden.rows(d, "train")) == 24 and len(golden.rows(d, "test")) == 8 for d in DATASETS)


# ---------------------------------------------------------------- losses


@every_dataset
def test_unsteered_losses(dataset: str) -> None:
    want = golden.numbers("losses.json")[f"{dataset}/unsteered"]
    found = score.losses(scorer("vector", recorded(dataset, "test")), [0.0])
    losses = torch.tensor(found.total[0] / found.tokens)
    for place, which in enumerate(("matching", "not_matching")):
        torch.testing.assert_close(losses[place::2], torch.tensor(want[which], dtype=torch.float64), atol=LOSS_ATOL, rtol=0)


@every_dataset
@pytest.mark.parametrize("state", STATES)
@pytest.mark.few(3)
def test_losses_of_loss_mode(dataset: str, state: str) -> None:
    """Trainer semantics: a vector acts from the template prefix on. m = 0 of a vector removes it there and is the identity here."""
    want = golden.numbers("losses.json")[f"{dataset}/{state}/trainer"]
    strengths = [m for m in want["matching"] if state != "vector" or float(m) != 0]
    assert len(strengths) == (6 if state == "vector" else 7)
    found = score.losses(scorer(state, recorded(dataset, "test")), [float(m) for m in strengths])
    losses = torch.tensor(found.total / found.tokens)
    assert losses.shape == (len(strengths), 16)
    for place, which in enumerate(("matching", "not_matching")):
        wanted = torch.tensor([want[which][m] for m in strengths], dtype=torch.float64)
        torch.testing.assert_close(losses[:, place::2], wanted, atol=LOSS_ATOL, rtol=0)
    assert (losses[0] - losses[-1]).abs().max() > 0.01  # the strengths do differ


@pytest.mark.matrix
@every_dataset
@pytest.mark.parametrize("state", [*STATES, "caa_vector"])
def test_losses_under_generation_hooks(dataset: str, state: str) -> None:
    """Apply semantics: hooks on the whole model, every position; Hugging Face's own loss."""
    model, _ = golden.host()
    want = golden.numbers("losses.json")[f"{dataset}/{state}/apply"]
    made, checked = released(state, dataset), 0
    rows = sequences(golden.rows(dataset, "test"))
    for place, which in enumerate(("matching", "not_matching")):
        strengths = list(want[which])
        for i, sequence in enumerate(rows[place::2]):
            ids = torch.tensor([sequence.input_ids]).expand(len(strengths), -1)
            factors = torch.tensor([float(m) for m in strengths])[:, None, None]
            with torch.no_grad(), hooks.attach(model, [hooks.Applied(LAYER, made, factors)]):
                logits = model(input_ids=ids, use_cache=False).logits
            answer = slice(sequence.prompt_length, None)
            token = -logits[:, sequence.prompt_length - 1 : -1].log_softmax(-1).gather(-1, ids[:, answer, None])[..., 0]
            torch.testing.assert_close(token.mean(1), torch.tensor([want[which][m][i] for m in strengths]), atol=LOSS_ATOL, rtol=0)
            checked += len(strengths)
    assert checked >= 2 * 8 * 6


# ---------------------------------------------------------------- texts


@pytest.mark.few(1)
@pytest.mark.matrix
@pytest.mark.slow
@every_dataset
@pytest.mark.parametrize(("batch_size", "rows_each"), [(1, 1), (8, 8)])
@pytest.mark.long
def test_greedy_texts(dataset: str, batch_size: int, rows_each: int) -> None:
    """New token ids, text and complete text of every name and strength; all strengths of a name share one stream.

    One by one only the first row of each, to save time: all 24 of a name go through one stream of eight.
    """
    model, tokenizer = golden.host()
    want = golden.numbers("generations.json")
    names = sorted({key.split("/")[1] for key in want if key.startswith(dataset)})
    assert len(names) == 7
    how = sampling.decoding({"do_sample": False, "max_new_tokens": 24}, model, tokenizer)
    for name in names:
        made = released(name, dataset)
        expected, rows = [], []
        for m in ("m0.0", "m1.0", "m4.0"):
            for entry in want[f"{dataset}/{name}/{m}"][:rows_each]:
                assert chat().prompt_ids(entry["input"]) == entry["prompt_ids"]
                rows.append(generation.Row(tuple(entry["prompt_ids"]), float(m[1:]), str(len(rows))))
                expected.append(entry)
        assert len(rows) == 3 * rows_each
        found = dict(generation.generate(model, Steering.of({LAYER: made}), rows, how, batch_size))
        assert len(found) == len(rows)
        for i, entry in enumerate(expected):
            assert found[i] == entry["new_ids"], (name, i)
            assert tokenizer.decode(found[i], skip_special_tokens=True) == entry["text"]
            assert tokenizer.decode([*entry["prompt_ids"], *found[i]], skip_special_tokens=False) == entry["complete"]


# ---------------------------------------------------------------- caa


@every_dataset
def test_caa_vectors_through_the_command_line(dataset: str, tmp_path: Path) -> None:
    """Layers 1, 3 and 5 (the last: before the final norm) at once, fitted by a run on the released rows."""
    from spilt import cli

    shutil.copytree(golden.GOLDEN / "tiny-gemma2", tmp_path / "models" / "tiny-gemma2")
    write_jsonl(tmp_path / "data" / "train.jsonl", [dict(row) for row in golden.rows(dataset, "train")])
    write_yaml(tmp_path / "hparams" / "Steer" / "dataset_format.yaml", {"train": {dataset: {"file_path": "data/train.jsonl"}}})
    experiment = tmp_path / "hparams" / "Steer" / "experiment_hparams" / "spilt_experiment"
    hparams = {"alg_name": "caa", "layers": [1, 3, 5], "multiple_choice": False, "torch_dtype": "float32"}
    write_yaml(experiment / dataset / "tiny-gemma2" / "caa" / "generate_caa.yaml", hparams)
    argv = ["--dataset", dataset, "--method", "caa", "--model_name", "tiny-gemma2", "--intervention_method", "vector", "--mode", "generate"]
    assert cli.main([*argv, "--device", "cpu", "--base_dir", str(tmp_path), "--quiet"]) == 0
    for layer in (1, 3, 5):
        found = torch.load(tmp_path / "vectors" / "tiny-gemma2" / "caa" / dataset / "caa_vector" / f"layer_{layer}.pt", weights_only=True)
        want = golden.tensors(f"caa/{dataset}/layer_{layer}.pt")
        assert want.abs().max() > 0.01
        torch.testing.assert_close(found, want, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- objectives and gradients

GRADS = {"v": "proj.weight", "weight": "delta_weight", "bias": "delta_bias"}  # our parameter names -> the released ones
KNOWN = {key.name for key in fields(FitSettings)}


def objective_names() -> list[str]:
    return [key for key in golden.tensors("objectives.pt") if not key.endswith("/batch")] if golden.NUMBERS.is_dir() else []


def test_every_objective_is_covered() -> None:
    jobs = {key.split("/")[2] for key in objective_names()}
    assert {f"reps_{kind}{more}" for kind in LOSS_TYPES for more in ("", "_variant")} | {"sft", "spilt", "spilt_ref0.3"} == jobs
    assert len(objective_names()) == 2 * len(jobs) * (2 + 1 + 1)  # vector twice: normal and null_it_out


@every_dataset
@pytest.mark.parametrize("state", ["vector", "lora_mlp_mid", "local_weight_mlp_mid"])
@pytest.mark.few(1)
def test_objectives_and_gradients(dataset: str, state: str) -> None:
    """Minibatch losses, their accumulated value, and the gradient before and after clipping, of every method and loss type."""
    stored, checked = golden.tensors("objectives.pt"), 0
    for key in objective_names():
        of, name, job, substraction = key.split("/")
        if (of, name) != (dataset, state):
            continue
        want, made = stored[key], released(state)
        knobs = {key: value for key, value in want["hparams"].items() if key in KNOWN}
        settings = FitSettings(
            method=job.split("_")[0], intervention_method=form_of(state), layers=(LAYER,), dropout=0.0, batch_size=4,
            steering_factors=(1.0,), substraction_type=substraction, preference_pairs=("orig_add", "orig_sub"), **knobs,
        )  # fmt: skip
        kept, method = recorded(dataset, "train", 4), METHODS[settings.method]
        fit = training.Fit(golden.host()[0], Steering.of({LAYER: made}), kept, settings, method, chat().prefix_length)
        shown = [entry for row in want["order"] for entry in training.entries(row, settings)]
        minibatches = training.chunks(shown, 4)
        assert len(minibatches) == len(want["minibatch_losses"]) == 2
        losses = []
        for minibatch in minibatches:
            half, grads = fit.gradients(minibatch, 2)
            losses.append(2 * half)
            for parameter, grad in zip(made.parameters(), grads, strict=True):
                parameter.grad = grad if parameter.grad is None else parameter.grad + grad
        assert losses == pytest.approx(want["minibatch_losses"], rel=RTOL, abs=0), key
        # the two may have opposite signs: their mean is as exact as they are
        assert sum(losses) / 2 == pytest.approx(want["total_loss"], rel=0, abs=RTOL * sum(map(abs, losses)) / 2), key
        for parameter, value in made.named_parameters():
            expected = want["grads"][GRADS.get(parameter, parameter)].reshape(value.shape)
            assert value.grad is not None and expected.norm() > 1e-4, key
            error = (value.grad - expected).norm() / expected.norm()
            assert error < RTOL, (key, parameter, float(error))
        # the released total norm also counts the gradient of a bias that it never stores, so only the other forms compare
        if state != "vector":
            torch.nn.utils.clip_grad_norm_(made.parameters(), settings.max_grad_norm)
            for parameter, value in made.named_parameters():
                expected = want["grads_after_clip"][GRADS.get(parameter, parameter)].reshape(value.shape)
                assert value.grad is not None and (value.grad - expected).norm() < RTOL * expected.norm(), key
        checked += 1
    assert checked == (26 if state == "vector" else 13)


# ---------------------------------------------------------------- training


@pytest.mark.slow
@every_dataset
@pytest.mark.parametrize("job", ["spilt/add", "spilt/add_sub", "sft/add", "sft/add_sub"])
@pytest.mark.few(1)
def test_training_end_to_end(dataset: str, job: str) -> None:
    """local_weight from zero, 24 rows in one batch, 5 epochs, in the released order: losses, first gradient and weights."""
    want = golden.tensors("train_e2e.pt")[f"{dataset}/{job}"]
    given = {key: value for key, value in want["hparams"].items() if key in KNOWN and key not in ("method", "intervention_method")}
    settings = FitSettings(method=job.split("/")[0], intervention_method="local_weight", **given)
    assert (settings.batch_size, settings.n_epochs, settings.lr, settings.dropout) == (24, 5, 0.01, 0.0)
    made = INTERVENTIONS["local_weight"](64, 128, read_point="mlp_mid")
    job_ = training.Fit(
        golden.host()[0], Steering.of({LAYER: made}), recorded(dataset, "train"), settings, METHODS[settings.method], chat().prefix_length
    )
    minibatch_losses: list[float] = []
    plain = job_.loss

    def loss(minibatch: list[training.Entry], scored: Any) -> Any:
        value = plain(minibatch, scored)
        minibatch_losses.append(value.item() / want["num_minibatches"])
        return value

    job_.loss = loss  # type: ignore[method-assign]
    log = training.fit(job_, order=lambda rows, seed, epoch: want["orders"][epoch][0])
    assert minibatch_losses == pytest.approx(want["minibatch_losses_already_divided_by_num_minibatches"], rel=RTOL, abs=0)
    per_step = [sum(minibatch_losses[i : i + want["num_minibatches"]]) for i in range(0, len(minibatch_losses), want["num_minibatches"])]
    assert [row["loss"] for row in log] == pytest.approx(per_step)
    assert [row["lr"] for row in log] == pytest.approx([0.01 * (1 - k / 5) for k in range(5)])
    first = torch.cat([g.flatten() for g in want["grad_before_clip_first_step"]]).norm().item()
    assert log[0]["grad_norm"] == pytest.approx(first, rel=RTOL)
    # AdamW turns a gradient near zero into a step of +-lr: weights agree to the README's 1e-3, nearly all far closer
    assert want["weight"].abs().max() > 0.01
    for mine, theirs in ((made.weight, want["weight"]), (made.bias, want["bias"])):
        difference = (mine.detach() - theirs).abs()
        assert difference.max() < 1e-3 and difference.median() < 1e-5
