"""How many texts are made side by side: by what one takes and what is free; what is asked for wins; texts are the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from command_line import results_path

import spilt
from spilt import cli, memory
from spilt.data import entries, readers
from spilt.engine import decode
from spilt.settings import resolve_generate
from spilt.tasks import context
from spilt.verbs import estimate as costs

GEMMA_2_9B = costs.Shape(42, 3584, 14336, 16, 8, 256, 256000, True, True)
GIB = 2**30


def test_what_a_text_takes() -> None:
    """Counted by hand: keys and values of all blocks; the prompt's twice; a block's middle while it is read; 32 bytes a score."""
    small = costs.Shape(layers=2, hidden=4, intermediate=8, heads=2, kv_heads=1, head_dim=2, vocab=10, gated=True)
    per_token = 2 * 2 * 1 * 2 * 4
    assert small.of_text(5, 3, 4) == (5 + 5 + 3) * per_token + 5 * (12 * 4 + 2 * 8) * 4 + 32 * 10
    assert small._replace(eager=True).of_text(5, 3, 4) == small.of_text(5, 3, 4) + 8 * 2 * 5 * 5
    assert GEMMA_2_9B.of_text(0, 1, 2) - 32 * 256000 == 2 * 42 * 8 * 256 * 2


def test_by_free_memory() -> None:
    each = GEMMA_2_9B.of_text(100, 128, 2)
    few = ((4 * each, "cpu", 2), (7 * each, "cuda", 2), (8 * each, "cuda", 4), (0, "cuda", 1), (-5, "cpu", 1))
    for free, kind, texts in (*few, (1e15, "cpu", 64), (1e15, "cuda", 256)):
        found = costs.side_by_side(None, GEMMA_2_9B, 2, 100, 128, free, kind)
        assert found.texts == texts and ("50%" in found.why) == (texts < 64)
    small = GEMMA_2_9B._replace(layers=12, hidden=512, intermediate=1408, vocab=8000)
    assert costs.side_by_side(None, small, 4, 100, 128, 1e15, "cpu").texts == 32, "not more than half of what the model takes"
    assert costs.side_by_side(7, GEMMA_2_9B, 2, 100, 128, 0, "cpu") == (7, "as asked")
    assert costs.side_by_side(None, None, 2, 100, 128, 1e9, "cpu").texts == 64
    assert costs.side_by_side(None, GEMMA_2_9B, 2, 100, 128, 60 * GIB, "cuda").texts >= 64, "a card of 80 GiB with the model on it"
    longer = costs.side_by_side(None, GEMMA_2_9B, 2, 2000, 128, 60 * GIB, "cuda").texts
    assert 1 < longer < costs.side_by_side(None, GEMMA_2_9B, 2, 1000, 128, 60 * GIB, "cuda").texts


def test_no_more_than_what_a_control_group_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A container or a job may have less than the machine: nobody tells it so before it is killed."""
    job, own = tmp_path / "sys/slurm/job7", tmp_path / "own"
    job.mkdir(parents=True)
    for folder, most in ((job, "max"), (job.parent, "5000")):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text("3000\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 400\n")
    own.write_text("0::/slurm/job7\n")
    assert [*memory._of_groups(tmp_path / "sys", own)] == [(5000, 2400)]
    old = tmp_path / "sys/memory/box"
    old.mkdir(parents=True)
    for name, value in (("memory.limit_in_bytes", "900"), ("memory.usage_in_bytes", "100"), ("memory.stat", "cache 5")):
        (old / name).write_text(value)
    own.write_text("4:cpu,cpuacct:/box\n3:memory:/box\n")
    assert [*memory._of_groups(tmp_path / "sys", own)] == [(900, 800)]
    assert [*memory._of_groups(tmp_path / "sys", tmp_path / "none")] == []
    monkeypatch.setattr(memory, "_of_groups", lambda: iter([(200, 123), (10**18, 10**18)]))
    assert memory.free() == memory.free(torch.device("cpu")) == 123 and memory.total() == 200


def test_of_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver gives, and what torch holds without using it."""
    card = SimpleNamespace(mem_get_info=lambda _: (50, 80), memory_reserved=lambda _: 20, memory_allocated=lambda _: 5)
    monkeypatch.setattr(torch, "cuda", card)
    assert memory.free(SimpleNamespace(type="cuda")) == 65


def plan_of(base: families.Base, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(base.argv("sft", "vector", "--mode", "apply", "--dry_run", *words)) == 0
    return capsys.readouterr().out.split("cost     ")[1].splitlines()[0]


def test_the_plan_says_it(base: families.Base, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert "; 32 texts side by side (" in plan_of(base, capsys)
    assert "; 3 texts side by side (as asked)" in plan_of(base, capsys, "--batch_size", "3")
    assert "; 5 texts side by side (as asked)" in plan_of(base, capsys, "--set", "batch_size=5")
    monkeypatch.setattr(memory, "free", lambda *_: 0)
    assert "; 1 texts side by side (" in (short := plan_of(base, capsys)) and "in 50% of the" in short
    assert cli.main(base.argv("sft", "vector", "--mode", "apply", "--dry_run", "--json")) == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    assert step["cost"]["batch"] in step["cost_in_words"]
    assert cli.main(base.argv("sft", "vector", "--mode", "generate", "--dry_run", "--json")) == 0
    (step,) = json.loads(capsys.readouterr().out)["steps"]
    assert step["cost"]["batch"] == ""
    cuda = [word if word != "cpu" else "cuda:0" for word in base.argv("sft", "vector", "--mode", "apply", "--dry_run")]
    assert cli.main(cuda) == 0 and "; 256 texts side by side (or fewer, as memory allows)" in capsys.readouterr().out


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes that texts are made with."""
    seen: list[int] = []
    monkeypatch.setattr(decode, "generate", lambda *given, real=decode.generate, **more: (seen.append(given[-1]), real(*given, **more))[1])
    return seen


@pytest.mark.long
def test_texts_are_the_same(base: families.Base, sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Byte by byte, and without being made again: the batch size is no setting that decides."""
    many = [str(0.25 * k) for k in range(23)]
    words = base.argv("sft", "vector", "--quiet", "--multipliers", *many)
    assert cli.main([*words, "--mode", "both"]) == 0
    made = {m: results_path(base, "sft", "vector", f"m{float(m)}").read_bytes() for m in many}
    assert sizes == [32] and len(many) * len(readers.read_prompts(entries.dataset_format(base.path, base.one, "generation"), None)) > 64
    assert cli.main([*words, "--mode", "apply", "--batch_size", "2"]) == 0 and sizes == [32], "nothing to do"
    each = context.texts_at_once(families.build("qwen2"), None, [(1,) * 20], 5)
    assert each.texts == 32
    for more, size in ((["--batch_size", "2"], 2), (["--set", "batch_size=7"], 7), ([], 1)):
        if not more:
            monkeypatch.setattr(memory, "free", lambda *_: 0)
        assert cli.main([*words, "--mode", "apply", "--force", *more]) == 0 and sizes[-1] == size
        assert {m: results_path(base, "sft", "vector", f"m{float(m)}").read_bytes() for m in many} == made


@pytest.mark.long
def test_fits_and_losses_do_not_depend_on_free_memory(base: families.Base, monkeypatch: pytest.MonkeyPatch) -> None:
    words = base.argv("sft", "all", "--quiet", "--no_report", "--mode", "all", "--multipliers", "2")
    assert cli.main(words) == 0

    def stored() -> dict[str, bytes]:
        found = [*(base.path / "vectors").rglob("*.pt"), *(base.path / "vectors").rglob("*.csv")]
        return {str(path): path.read_bytes() for path in found}

    before = stored()
    monkeypatch.setattr(memory, "free", lambda *_: 10**5)
    assert len(before) > 6 and cli.main([*words, "--force"]) == 0 and stored() == before


def test_in_python(sizes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = families.build("qwen2"), families.tokenizer()
    steering = spilt.fit(model, tokenizer, [("is 1 odd?", " yes", " not")], layer=2, method="caa")
    how: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    texts = [spilt.generate(model, tokenizer, steering, ["is 2 odd?"], [0.0, 4.0], batch_size=size, **how) for size in (None, 1)]
    assert sizes == [32, 1] and texts[0].equals(texts[1])
    monkeypatch.setattr(memory, "free", lambda *_: 0)
    assert texts[0].equals(spilt.generate(model, tokenizer, steering, ["is 2 odd?"], [0.0, 4.0], **how)) and sizes[-1] == 1


@pytest.mark.parametrize("dataset", ["psychopathy", "axbench"])
def test_no_released_settings_of_texts_name_one(dataset: str) -> None:
    """Those of fits do, where it decides; those of texts leave it to the memory."""
    repo = Path(__file__).parents[1]
    found = resolve_generate(repo, "gemma-2-9b-it", dataset, "spilt", "vector").settings
    assert found.batch_size is None and found.as_dict()["batch_size"] is None
