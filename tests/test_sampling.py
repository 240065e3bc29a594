"""Draws are those of the library's own logits processors over the whole vocabulary, at the same uniform numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VOCAB, model, tokenizer
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import logits_process as lp

from spilt.engine import sampling

DRAWS = 24  # of each row of scores
PARAMS: list[dict[str, Any]] = [
    {},  # top_k = 50
    {"top_k": 1},
    {"top_k": 20, "temperature": 0.6, "top_p": 0.9},
    {"top_k": 10**6, "top_p": 0.5},
    {"top_k": 5, "top_p": 1e-9},
    {"top_k": 40, "top_p": 1.0, "temperature": 3.0},
    {"top_k": 30, "min_p": 0.05},
    {"top_k": 30, "top_p": 0.7, "min_p": 0.1, "temperature": 1.3, "repetition_penalty": 1.7},
    {"top_k": 0},
    {"top_k": 0, "top_p": 0.8, "no_repeat_ngram_size": 1},
]


def scores_of(kind: str, vocabulary: int) -> Tensor:
    drawn = 3 * torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    if kind == "ties":
        return drawn.round()
    if kind == "bfloat16":
        return drawn.bfloat16().float()
    if kind == "equal":
        return torch.full_like(drawn, -2.5)
    if kind == "few":  # all but four have no chance, another four in each row
        place = torch.rand(drawn.shape, generator=torch.Generator().manual_seed(1)).argsort(-1).argsort(-1)
        return drawn.masked_fill(place >= 4, -torch.inf)
    return drawn


def decoding(params: dict[str, Any]) -> sampling.Decoding:
    return sampling.decoding({"do_sample": True, **params}, model("qwen2"), tokenizer())


def library(params: dict[str, Any], ids: list[list[int]], scores: Tensor, uniform: Tensor) -> list[int]:
    """Row by row, as `generate` lists its processors, over all scores; the inverse of the cumulative distribution."""
    config = GenerationConfig(do_sample=True, **params)
    if config.top_k is None:  # newer versions put in what nobody gave when they generate
        config.top_k = 50
    processors: LogitsProcessorList = model(
        "qwen2"
    )._get_logits_processor(  # type: ignore[operator]
        generation_config=config, input_ids_seq_length=1, encoder_input_ids=torch.tensor(ids[:1]), logits_processor=LogitsProcessorList()
    )
    found = []
    for row, so_far, number in zip(scores.split(1), ids, uniform, strict=True):
        context = torch.tensor([so_far])
        cumulative = processors(context, row).double().softmax(-1).cumsum(-1)[0]
        found.append(int((cumulative <= number * cumulative[-1]).sum()))
    return found


@pytest.fixture
def stable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's top_p with an order of equal scores: its own sort leaves that open."""
    monkeypatch.setattr(torch, "sort", lambda t, descending=False, dim=-1: t.sort(dim=dim, descending=descending, stable=True))


@pytest.mark.usefixtures("stable")
@pytest.mark.parametrize("kind", ["normal", "ties", "bfloat16", "equal", "few"])
@pytest.mark.parametrize("params", PARAMS, ids=str)
@pytest.mark.few(12)
def test_draws_are_those_of_the_library(params: dict[str, Any], kind: str) -> None:
    """Also with fewer tokens than a block, with a vocabulary that ends within one, and where numbers are 0 and nearly 1."""
    draw = torch.Generator().manual_seed(3)
    for vocabulary in (7, 128, 300, 5000):
        scores = scores_of(kind, vocabulary).repeat_interleave(DRAWS, 0)
        uniform = torch.rand(len(scores), dtype=torch.float64, generator=draw)
        uniform[0], uniform[-1] = 0.0, 1 - 2**-53
        ids = [torch.randint(vocabulary, (2 + i % 3,), generator=draw).tolist() for i in range(len(scores))]
        how = decoding(params)
        if kind == "few" and "no_repeat_ngram_size" in params:  # else nothing may be left
            ids = [[int(row.argmin())] for row in scores]
        found = sampling.choose(scores, how, uniform, ids).tolist()
        assert found == library(params, ids, scores, uniform), vocabulary
        alone = [sampling.choose(scores[i : i + 1], how, uniform[i : i + 1], ids[i : i + 1]).item() for i in range(0, len(scores), 17)]
        assert alone == found[::17]  # whatever the company


@pytest.mark.parametrize("keep", [1, 3, 200])
@pytest.mark.parametrize("kind", ["normal", "equal", "few"])
@pytest.mark.usefixtures("stable")
def test_tokens_that_are_kept_in_any_case(keep: int, kind: str) -> None:
    """min_tokens_to_keep of each warper, beside the library's own."""
    scores = scores_of(kind, 1000).repeat_interleave(DRAWS, 0)
    uniform = torch.rand(len(scores), dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    cut = {"top_p": 1e-6, "min_tokens_to_keep": keep}
    theirs = [lp.TemperatureLogitsWarper(0.5), lp.TopKLogitsWarper(2, min_tokens_to_keep=keep), lp.TopPLogitsWarper(**cut)]
    theirs.append(lp.MinPLogitsWarper(0.99, min_tokens_to_keep=keep))
    ours = [*theirs[:2], sampling.StableTopPLogitsWarper(**cut), theirs[3]]
    how = decoding({})._replace(warpers=ours)
    left = scores
    for warp in theirs:
        left = warp(None, left)
    cumulative = left.double().softmax(-1).cumsum(-1)
    assert sampling.choose(scores, how, uniform, []).tolist() == (cumulative <= uniform[:, None] * cumulative[:, -1:]).sum(-1).tolist()


@pytest.mark.parametrize("kind", ["normal", "ties", "equal"])
def test_top_p_keeps_as_likely_tokens_as_the_library(kind: str) -> None:
    """With the library's own sort: the same scores, of equal ones perhaps other tokens."""
    for top_p in (0.0, 1e-9, 0.3, 0.9, 0.999):
        scores = scores_of(kind, 1000)
        ours, theirs = (warper(top_p)(None, scores) for warper in (sampling.StableTopPLogitsWarper, lp.TopPLogitsWarper))
        assert torch.equal(ours.sort(-1).values, theirs.sort(-1).values)


@pytest.mark.parametrize("sample", [True, False])
def test_a_penalty_of_rows_of_any_length(sample: bool) -> None:
    """Row by row by the library, bit for bit: contexts of several lengths, tokens that come twice, ids beyond the scores."""
    scores = scores_of("normal", VOCAB)
    ids = [[5], [5, 6, 5, 7, 7], [VOCAB + 3, 1]]
    seen: list[Tensor] = []
    penalty = lp.RepetitionPenaltyLogitsProcessor(2.5)
    how = decoding({})._replace(processors=[penalty, lambda _, row: seen.append(row) or row])
    sampling.choose(scores, how, torch.zeros(3, dtype=torch.float64) if sample else None, ids)
    ids[2].remove(VOCAB + 3)  # where older versions of the library raise
    theirs = [penalty(torch.tensor([row]), one) for row, one in zip(ids, scores.split(1), strict=True)]
    assert torch.equal(torch.cat(seen), torch.cat(theirs))


class Sizes(TorchDispatchMode):
    """(operator, device, scores a row) of what sorts or sums up."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[str, str, int]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("sort", "cumsum", "_softmax"):
            self.seen.add((name, args[0].device.type, args[0].shape[-1]))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["normal", "bfloat16"])
def test_after_top_k_only_a_few_scores_are_sorted(kind: str) -> None:
    how, uniform = decoding({"top_k": 50, "top_p": 0.9}), torch.full((3,), 0.5, dtype=torch.float64)
    with Sizes() as sizes:
        sampling.choose(scores_of(kind, 50_000), how, uniform, [])
    assert {name for name, *_ in sizes.seen} == {"sort", "cumsum", "_softmax"}
    assert max(size for *_, size in sizes.seen) <= 2 * (50 + sampling.SPARE)


@pytest.mark.parametrize("top_k", [0, 50])
def test_a_cards_cumsum_is_not_used_where_it_raises(top_k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.use_deterministic_algorithms: `cumsum` of a CUDA tensor of floating point raises. Here on tensors without content."""
    how = decoding({"top_k": top_k, "top_p": 0.9})
    with FakeTensorMode(), Sizes() as sizes:
        scores, uniform = torch.empty(2, 1000, device="cuda"), torch.empty(2, dtype=torch.float64)
        tokens = torch.empty(2, top_k + 1, dtype=torch.long, device="cuda") if top_k else None
        monkeypatch.setattr(sampling, "_candidates", lambda *_: tokens)
        monkeypatch.setattr(sampling, "_ascending", lambda scores: scores.sort(dim=-1).values)  # numpy wants content
        torch.use_deterministic_algorithms(True)
        try:
            assert sampling.choose(scores, how, uniform, []).device.type == "cuda"
        finally:
            torch.use_deterministic_algorithms(False)
    assert {device for name, device, _ in sizes.seen if name == "cumsum"} == {"cpu"}
