"""Little memory: smaller batches, the same results, and a message with the way out where one row does not fit."""

from __future__ import annotations

import gc
import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from faults import APPLY, FIT, LOSS, Here

from spilt import run as runner
from spilt.engine import decode as generation
from spilt.engine import prompts, suffix
from spilt.engine import train as training
from spilt.methods import METHODS

fit_stage = importlib.import_module("spilt.tasks.fit")


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB")
CPU = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes. "
    "Error code 12 (Cannot allocate memory)"
)
ERRORS = {"cuda": CUDA, "cpu": CPU, "host": MemoryError()}


@contextmanager
def little_memory(error: Exception, most: int, *, only: str = "") -> Iterator[list[int]]:
    """More than `most` rows at once raise `error`, in recording, in the suffix and in decoding; yields the sizes that were refused."""
    record, logits, forward = suffix.record, suffix.logits, prompts.forward
    refused: list[int] = []

    def check(rows: int) -> None:
        if rows > most:
            refused.append(rows)
            raise type(error)(*error.args)

    def small_record(model: Any, layer: int, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        check(len(input_ids) if only in ("", "record") else 0)
        return record(model, layer, input_ids, *args, **kwargs)

    def small_logits(model: Any, layer: int, stream: Any, keep: Any, **kwargs: Any) -> Any:
        check(len(stream) if only in ("", "logits") else 0)
        return logits(model, layer, stream, keep, **kwargs)

    def small_forward(model: Any, sites: Any, ids: Any, *args: Any) -> Any:
        check(len(ids) if only in ("", "forward") else 0)
        return forward(model, sites, ids, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix, "record", small_record)
        patch.setattr(suffix, "logits", small_logits)
        for module in (prompts, generation):
            patch.setattr(module, "forward", small_forward)
        with collected_fast():
            yield refused


@contextmanager
def collected_fast() -> Iterator[None]:
    """A collection follows each refusal: it passes by what all tests before have left."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@pytest.mark.long
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.few(1)
def test_texts_with_little_memory(here: Here, caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    """The same texts in smaller batches."""
    before = here.listing()
    shutil.rmtree(here.path("generation"))
    with little_memory(error, 1) as refused:
        assert here.run(*APPLY, form="all")[0] == 0
    assert refused and here.listing() == before
    assert "--batch_size" in caplog.text and "out of memory" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
@pytest.mark.few(1)
def test_losses_with_little_memory(here: Here, caplog: pytest.LogCaptureFixture, error: Exception) -> None:
    """The same losses up to the rounding of smaller batches."""
    import numpy as np
    import pandas as pd

    before = {m: pd.read_csv(here.losses(m)) for m in (-1.0, 1.0)}
    with little_memory(error, 2) as refused:
        assert here.run(*LOSS, "--force")[0] == 0
    assert refused and "out of memory" in caplog.text
    for m, table in before.items():
        again = pd.read_csv(here.losses(m))
        assert list(again) == list(table) and len(again) == len(table)
        assert np.allclose(again["loss_sum"], table["loss_sum"], atol=1e-4)


@pytest.mark.parametrize("stage", ["generate", "loss"])
@pytest.mark.few(1)
def test_the_message_names_batch_length_layer_and_flag(here: Here, caplog: pytest.LogCaptureFixture, stage: str) -> None:
    with little_memory(CUDA, 2):
        assert here.run(*(APPLY if stage == "generate" else LOSS), "--force")[0] == 0
    warnings = [record.getMessage() for record in caplog.records if "out of memory" in record.getMessage()]
    assert warnings
    for message in warnings:
        for wanted in ("tokens", "layer 2", "--"):  # length, layer, and the flag that makes it unnecessary; the batch is a number
            assert wanted in message, f"no {wanted!r} in: {message}"
        assert any(word.strip(",;").isdigit() for word in message.split())


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.loss and row.in_all])
@pytest.mark.long
def test_a_fit_with_little_memory_goes_on_in_parts(bare: Here, caplog: pytest.LogCaptureFixture, method: str) -> None:
    """The rows of a minibatch are scored a few at a time, the loss is still over all of them: the same vectors up to rounding."""
    words = (*FIT, "--set", "dropout=0")
    assert bare.run(*words, form="all", method=method)[0] == 0
    paths = {form: bare.path(f"vectors/tiny/{method}/mine/{method}_{form}/layer_2.pt") for form in ("vector", "lora", "local_weight")}
    want = {form: torch.load(path, weights_only=True) for form, path in paths.items()}
    with little_memory(CUDA, 2, only="logits") as refused:
        exit_code, said = bare.run(*words, "--force", form="all", method=method)
    assert refused and exit_code == 0, said
    assert "parts" in caplog.text and "layer 2" in caplog.text and "batch_size" in caplog.text
    for form, path in paths.items():
        made = torch.load(path, weights_only=True)
        pairs = [(made, want[form])] if form == "vector" else [(made[k], want[form][k]) for k in made if isinstance(made[k], torch.Tensor)]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in pairs)


@pytest.mark.long
def test_a_fit_of_one_row_that_is_too_large_runs_its_blocks_twice(bare: Here, caplog: pytest.LogCaptureFixture) -> None:
    """The last way out before an error: the backward pass keeps the blocks' inputs alone."""
    words = (*FIT, "--set", "dropout=0")
    path = bare.path("vectors/tiny/sft/mine/sft_lora/layer_2.pt")
    assert bare.run(*words, form="lora")[0] == 0
    want, plain, inside = torch.load(path, weights_only=True), (suffix.logits, suffix.checkpointed), [False]

    @contextmanager
    def checkpointed(*args: Any) -> Iterator[None]:
        inside[0] = True
        with plain[1](*args):
            yield
        inside[0] = False

    def logits(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled() and not inside[0]:
            raise type(CUDA)(*CUDA.args)
        return plain[0](*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch, collected_fast():
        patch.setattr(suffix, "logits", logits)
        patch.setattr(suffix, "checkpointed", checkpointed)
        exit_code, said = bare.run(*words, "--force", form="lora")
    assert exit_code == 0, said
    assert "in parts of 1 " in caplog.text and "running each block twice" in caplog.text
    made = torch.load(path, weights_only=True)
    assert all(torch.allclose(made[name], want[name], atol=1e-5) for name in ("lora_A", "lora_B"))


@pytest.mark.long
@pytest.mark.parametrize("method", ["caa", "reps"])
def test_caa_and_the_reference_of_reps_with_little_memory(here: Here, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both go over all answers, in batches of their own: halved like any other."""
    assert here.run(*FIT, method=method)[0] == 0
    path = here.path(f"vectors/tiny/{method}/mine/{method}_vector/layer_2.pt")
    before, under_way, refused = torch.load(path, weights_only=True), [False], list[int]()

    def inside(call: Any) -> Any:
        def flagged(*args: Any, **kwargs: Any) -> Any:
            under_way[0] = True
            try:
                return call(*args, **kwargs)
            finally:
                under_way[0] = False

        return flagged

    def small(call: Any, place: int) -> Any:
        def limited(*args: Any, **kwargs: Any) -> Any:
            if under_way[0] and len(args[place]) > 2:
                refused.append(len(args[place]))
                raise torch.OutOfMemoryError(*CUDA.args)
            return call(*args, **kwargs)

        return limited

    monkeypatch.setattr(fit_stage, "_closed_form", inside(fit_stage._closed_form))
    monkeypatch.setattr(training.Fit, "_reference", inside(training.Fit._reference))
    monkeypatch.setattr(suffix, "record", small(suffix.record, 2))
    monkeypatch.setattr(suffix, "logits", small(suffix.logits, 2))
    with collected_fast():
        exit_code, said = here.run(*FIT, "--force", method=method)
    assert refused and exit_code == 0, said
    assert torch.allclose(torch.load(path, weights_only=True), before, atol=1e-5)


@pytest.mark.few(1)
@pytest.mark.parametrize("words", [FIT, APPLY, LOSS], ids=["fit", "generate", "loss"])
def test_one_sequence_that_does_not_fit_fails_its_cell_only(here: Here, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    """The message names length, layer and the way out; the other cells are done; nothing that was stored is lost."""
    before, under_way = here.listing(), [""]
    real = runner._run_step

    def run_step(step: Any, run: Any) -> Any:
        under_way[0] = step.cells[0].intervention
        run.recordings.clear()  # each cell records for itself
        return real(step, run)

    monkeypatch.setattr(runner, "_run_step", run_step)

    def never(call: Any) -> Any:
        def instead(*args: Any, **kwargs: Any) -> Any:
            if under_way[0] == "lora":
                raise type(CPU)(*CPU.args)
            return call(*args, **kwargs)

        return instead

    for module, name in ((suffix, "record"), (suffix, "logits"), (prompts, "forward"), (generation, "forward")):
        monkeypatch.setattr(module, name, never(getattr(module, name)))
    with collected_fast():
        exit_code, said = here.run(*words, "--force", form="all")
    assert exit_code == 1 and said.count("  done  ") >= 2 and "Traceback" not in said, said
    message = next(line for line in said.splitlines() if line.startswith("error:") and "lora" in line)
    assert "does not fit in memory" in message and "tokens" in message
    assert any(way in message for way in ("--device auto", "--dtype", "--set", "output_length", "max_new_tokens"))
    assert "layer 2" in message, message
    assert {name: value for name, value in here.listing().items() if "unfinished" not in name} == before
