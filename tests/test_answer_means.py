"""Closed forms of several methods and layers of one request read their answers once."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from test_families import PAD, answer_pairs, model

import spilt
from spilt import cli
from spilt.engine import activations
from spilt.methods import METHODS
from spilt.steering import anatomy


@pytest.mark.parametrize("family", ["qwen2", "bamba"])  # by batches, and each sequence by itself
@pytest.mark.parametrize("multiple_choice", [False, True])
def test_several_blocks_in_one_pass(family: str, multiple_choice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "QUESTIONS", 2)  # not all at once
    tiny, sequences = model(family), answer_pairs()
    found = activations.answer_means(tiny, [0, 2, 1], sequences, multiple_choice, PAD)
    assert sorted(found) == [0, 1, 2]
    for layer, means in found.items():
        alone = activations.answer_means(tiny, [layer], sequences, multiple_choice, PAD)
        assert torch.equal(means, alone[layer]) and means.shape == (len(sequences), means.shape[1])


@pytest.mark.long
def test_one_pass_for_all_methods_and_layers_and_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = families.make_base(tmp_path / "base", train=8)
    apart = base._replace(path=tmp_path / "apart")
    shutil.copytree(base.path, apart.path)
    passes: list[Any] = []
    real = activations.answer_means

    def counted(network: Any, layers: Any, *rest: Any, **more: Any) -> Any:
        passes.append(sorted(layers))
        return real(network, layers, *rest, **more)

    monkeypatch.setattr(activations, "answer_means", counted)
    methods = [name for name in ("caa", "pca", "lda") if METHODS[name].estimate is not None]

    def fit(where: families.Base, names: list[str], *layers: str) -> None:
        words = where.argv("caa", "vector", "--mode", "generate", "--layers", *layers, "--quiet")
        at = words.index("caa")
        assert cli.main([*words[:at], *names, *words[at + 1 :]]) == 0

    fit(base, methods, "0", "2")
    assert passes == [[0, 2]]
    for layer in ("0", "2"):
        for name in methods:
            fit(apart, [name], layer)
    assert len(passes) == 1 + 2 * len(methods)
    made = sorted(path.relative_to(base.path) for path in base.path.glob("vectors/**/*.pt"))
    assert len(made) == 2 * len(methods)
    for path in made:
        assert (base.path / path).read_bytes() == (apart.path / path).read_bytes()


@pytest.mark.parametrize("method", ["caa", "mean_centred"])
def test_one_pass_for_all_layers_in_python(method: str) -> None:
    tiny, tokenizer = model("qwen2"), families.tokenizer()
    pairs = [(f"say {word}", word, f"not {word}") for word in ("one", "two", "three")]
    how: dict[str, Any] = {"method": method, "neutral": ["one two three"] if METHODS[method].against_neutral else ()}
    calls: list[int] = []
    counting = anatomy.block(tiny, 0).register_forward_hook(lambda *_: calls.append(1))
    alone = [spilt.fit(tiny, tokenizer, pairs, layer=layer, **how) for layer in (0, 2)]
    once = len(calls) // 2
    both = spilt.fit(tiny, tokenizer, pairs, layer=[0, 2], **how)
    counting.remove()
    assert once and len(calls) == 3 * once
    for single in alone:
        assert single == both.on(single.layers[0])
