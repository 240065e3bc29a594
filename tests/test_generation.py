"""Texts of rows that share a batch are those of the rows alone: any mix of prompts, multipliers and lengths, cached or not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from families import EOS, FAMILY_NAMES, FORMS, LAYERS, PAD, READS, SPECIAL, VOCAB, build, has_down_proj, intervention, model, tokenizer
from torch import Tensor, nn

from spilt.engine import decode as generation
from spilt.engine import sampling
from spilt.engine.decode import Row
from spilt.engine.sampling import Decoding
from spilt.steering import hooks
from spilt.steering.interventions import Intervention
from spilt.steering.steering import Steering

LAYER = LAYERS // 2
NEW = 10
LENGTHS = (3, 31, 12, 7, 20, 5, 26, 9, 15)  # some wider than the sliding window
MULTIPLIERS = (1.0, -1.0, 0.0, 2.5, -0.5, 0.0, 1.5, 0.3, -2.0)


def rows(seed: int = 0) -> list[Row]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [tuple(torch.randint(len(SPECIAL), VOCAB, (n,), generator=generator).tolist()) for n in LENGTHS]
    return [Row(prompt, m, f"{seed}/{i}") for i, (prompt, m) in enumerate(zip(prompts, MULTIPLIERS, strict=True))]


def how(sample: bool = False, eos: tuple[int, ...] = (EOS,), new: int = NEW, **params: Any) -> Decoding:
    """What the stages make of generation_params, with the end tokens of the test."""
    made = sampling.decoding({"do_sample": sample, "max_new_tokens": new, **params}, model("qwen2"), tokenizer())
    return made._replace(eos=eos)


def sites(made: Intervention, layer: int = LAYER) -> Steering:
    return Steering.of({layer: made})


def texts(tiny: nn.Module, made: Intervention, wanted: list[Row], decoding: Decoding, batch_size: int) -> list[list[int]]:
    found = list(generation.generate(tiny, sites(made), wanted, decoding, batch_size))
    assert sorted(i for i, _ in found) == list(range(len(wanted)))  # each row once
    return [new for _, new in sorted(found)]


@torch.no_grad()
def slowly(tiny: nn.Module, made: Intervention, row: Row, decoding: Decoding, guess: Sequence[int] = ()) -> list[int]:
    """The row alone, no cache, no padding, at m = 0 no intervention at all: each token is the likeliest after all before it.

    A whole forward for each token; one over a guess of the text serves all its tokens up to the first that is not the likeliest.
    """
    new: list[int] = []
    while True:
        ids = [*row.prompt, *new, *guess[len(new) :]]
        with hooks.attach(tiny, [hooks.Applied(LAYER, made, row.multiplier)] if row.multiplier else []):
            after = tiny(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
        while len(ids) >= (known := len(row.prompt) + len(new)) and ids[len(row.prompt) : known] == new:
            scores = after[known - 1 : known]
            for process in decoding.processors:
                scores = process(torch.tensor([ids[:known]]), scores)
            new.append(int(scores.argmax()))
            if new[-1] in decoding.eos or len(new) == decoding.max_new_tokens:
                return new


def slow_texts(tiny: nn.Module, made: Intervention, wanted: list[Row], decoding: Decoding | None = None) -> list[list[int]]:
    """All NEW tokens of each row: no token ends a text."""
    decoding = decoding or how(eos=())
    guesses = texts(tiny, made, wanted, decoding, len(wanted))
    return [slowly(tiny, made, row, decoding, guess) for row, guess in zip(wanted, guesses, strict=True)]


@cache
def unsteered(family: str) -> list[list[int]]:
    return slow_texts(model(family), intervention("vector"), [row._replace(multiplier=0.0) for row in rows()])


def common_end(full: list[list[int]]) -> int:
    """A token that ends some of the texts early and not others, so that rows leave and others take their places."""
    inside = Counter(token for new in full for token in set(new[1:-2]))
    return next(token for token, count in inside.most_common() if 0 < count < len(full))


def until(end: int, full: list[list[int]]) -> list[list[int]]:
    """The same texts with the first `end` as their last token."""
    return [new[: new.index(end) + 1] if end in new else new for new in full]


def test_a_guess_only_saves_forwards() -> None:
    """Right in part or nowhere, the text is the one that is worked out token by token."""
    tiny, made, row = model("qwen2"), intervention("vector"), rows()[3]
    wanted = slowly(tiny, made, row, how(eos=()))
    for guess in ([*wanted[:4], PAD, *wanted[5:]], [PAD] * NEW, wanted[:3], [*wanted, PAD]):
        assert slowly(tiny, made, row, how(eos=()), guess) == wanted


@pytest.mark.matrix
@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_a_batch_equals_the_rows_alone(family: str, form: str) -> None:
    """A multiplier of its own in every row; with the cache in batches of 9, 4 (with refill) and 1, and without it one by one."""
    tiny, wanted = model(family), rows()
    read_point = None if form == "vector" else "mlp_mid" if has_down_proj(family) else "mlp"
    made = intervention(form, read_point, scale=0.5)
    full = slow_texts(tiny, made, wanted)
    end = common_end(full)
    decoding, alone = how(eos=(end,)), until(end, full)
    lengths = {len(new) for new in alone}
    assert len(lengths) > 1 and any(new[-1] == end and len(new) < NEW for new in alone)
    for batch_size in (len(wanted), 4, 1):
        assert texts(tiny, made, wanted, decoding, batch_size) == alone, batch_size
    base = until(end, unsteered(family))
    assert base != alone  # the intervention matters
    assert [a == b for a, b, row in zip(alone, base, wanted, strict=True) if row.multiplier == 0] == [True, True]


@pytest.mark.parametrize(("form", "read_point"), READS)
@pytest.mark.few(1)
def test_every_read_point_in_a_refilled_batch(form: str, read_point: str | None) -> None:
    tiny, wanted, made = model("gemma2"), rows(1), intervention(form, read_point, scale=0.5)
    full = slow_texts(tiny, made, wanted)
    end = common_end(full)
    assert texts(tiny, made, wanted, how(eos=(end,)), 3) == until(end, full)


def test_the_scores_agree_and_not_only_their_order() -> None:
    """Log-probabilities of the chosen tokens in a padded, refilled batch against whole forwards."""
    tiny, wanted, made = model("qwen2"), rows(), intervention("lora", scale=0.5)
    seen: list[Tensor] = []

    def keep(_: Any, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    batched = how(eos=())._replace(processors=[keep])
    found = texts(tiny, made, wanted, batched, 4)
    together = torch.cat(seen)
    seen.clear()
    assert [slowly(tiny, made, row, batched, guess) for row, guess in zip(wanted, found, strict=True)] == found
    alone = torch.cat(seen)
    assert together.shape == alone.shape == (len(wanted) * NEW, VOCAB)
    index = torch.cdist(together.double(), alone.double()).min(1)
    assert sorted(index.indices.tolist()) == list(range(len(alone)))  # one to one
    torch.testing.assert_close(together, alone[index.indices], atol=2e-5, rtol=0)


def test_several_layers_act_together() -> None:
    tiny, wanted = model("llama"), rows()
    one, other = intervention("vector", seed=1), intervention("local_weight", "block", seed=2)
    both = Steering.of({1: one, 3: other})
    decoding = how(eos=())
    together, alone = dict(generation.generate(tiny, both, wanted, decoding, 4)), {}
    for i, row in enumerate(wanted):
        alone[i] = dict(generation.generate(tiny, both, [row], decoding, 1))[0]
    assert together == alone
    assert together != dict(generation.generate(tiny, sites(one, 1), wanted, decoding, 4))


# ---------------------------------------------------------------- ends


def test_the_end_token_is_kept_and_nothing_follows_it() -> None:
    tiny, wanted, made = model("qwen2"), rows(), intervention("vector")
    plain = texts(tiny, made, wanted, how(eos=()), 4)
    assert all(len(new) == NEW for new in plain)
    end = common_end(plain)
    assert texts(tiny, made, wanted, how(eos=(end,)), 4) == until(end, plain)


def test_any_of_several_end_tokens_ends() -> None:
    tiny, wanted, made = model("qwen2"), rows(), intervention("vector")
    plain = texts(tiny, made, wanted, how(eos=()), 4)
    ends = (plain[0][3], plain[1][5])
    for full, new in zip(plain, texts(tiny, made, wanted, how(eos=ends), 4), strict=True):
        first = min((full.index(end) for end in ends if end in full), default=NEW - 1)
        assert new == full[: first + 1]


@pytest.mark.parametrize(("own", "of_tokenizer", "expected"), [(7, 2, (7,)), ([7, 8, 9], 2, (7, 8, 9)), (None, 2, (2,)), (None, None, ())])
def test_end_tokens_come_from_the_checkpoint(own: Any, of_tokenizer: int | None, expected: tuple[int, ...]) -> None:
    """generation_config (one id or several) before the tokenizer; a model without any goes on to max_new_tokens."""
    tiny, words = build("qwen2"), tokenizer()
    tiny.generation_config.eos_token_id = own  # type: ignore[union-attr]
    words.eos_token = None if of_tokenizer is None else words.convert_ids_to_tokens(of_tokenizer)
    assert sampling.decoding({}, tiny, words).eos == expected


@pytest.mark.parametrize("new", [1, 2, 7])
def test_max_new_tokens(new: int) -> None:
    found = texts(model("qwen2"), intervention("vector"), rows(), how(eos=(), new=new), 4)
    assert [len(text) for text in found] == [new] * len(LENGTHS)


def test_no_rows_no_text() -> None:
    assert list(generation.generate(model("qwen2"), sites(intervention("vector")), [], how(), 4)) == []


# ---------------------------------------------------------------- sampling


@pytest.mark.parametrize("params", [{}, {"top_p": 0.7, "temperature": 0.8}, {"top_k": 5}, {"min_p": 0.05, "top_k": 0}])
@pytest.mark.few(2)
def test_a_sampled_row_is_the_same_in_any_batch(params: dict[str, Any]) -> None:
    """Its seed decides: neither batch size, nor order, nor company."""
    tiny, wanted, made = model("qwen2"), rows(), intervention("lora", scale=0.5)
    decoding = how(sample=True, eos=(EOS,), **params)
    first = texts(tiny, made, wanted, decoding, len(wanted))
    for batch_size in (4, 1):
        assert texts(tiny, made, wanted, decoding, batch_size) == first
    backwards = texts(tiny, made, wanted[::-1], decoding, 3)[::-1]
    assert backwards == first
    assert texts(tiny, made, [wanted[3]], decoding, 1) == [first[3]]


def test_seeds_differ_and_repeat() -> None:
    tiny, made = model("qwen2"), intervention("vector")
    prompt = rows()[2].prompt
    wanted = [Row(prompt, 1.0, f"42/{k}") for k in range(6)] + [Row(prompt, 1.0, "42/0")]
    found = texts(tiny, made, wanted, how(sample=True), 7)
    assert found[0] == found[6] and len({tuple(text) for text in found}) > 3


def test_sampling_follows_the_distribution() -> None:
    """4000 draws of one token against softmax(scores / temperature) cut to the five likeliest; chi-square with 4 degrees of freedom."""
    tiny, made = model("qwen2"), intervention("vector")
    prompt, count = rows()[0].prompt, 4000
    decoding = how(sample=True, eos=(), new=1, top_k=5, temperature=1.5)
    found = Counter(text[0] for text in texts(tiny, made, [Row(prompt, 1.0, str(k)) for k in range(count)], decoding, 500))
    with torch.no_grad(), hooks.attach(tiny, [hooks.Applied(LAYER, made, 1.0)]):
        scores = tiny(input_ids=torch.tensor([prompt])).logits[0, -1] / 1.5
    top = scores.topk(5)
    expected = dict(zip(top.indices.tolist(), (count * top.values.softmax(-1)).tolist(), strict=True))
    assert set(found) <= set(expected) and min(expected.values()) > 5
    assert sum((found[token] - wanted) ** 2 / wanted for token, wanted in expected.items()) < 23.5  # p = 1e-4


def test_sampling_leaves_the_global_generators_alone() -> None:
    tiny, made = model("qwen2"), intervention("vector")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    texts(tiny, made, rows(), how(sample=True), 4)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- penalties see the text, not the padding


@pytest.mark.parametrize("params", [{"repetition_penalty": 3.0}, {"no_repeat_ngram_size": 1}, {"no_repeat_ngram_size": 2}])
@pytest.mark.few(1)
def test_penalties_count_no_padding(params: dict[str, Any]) -> None:
    """The padding id is made the likeliest token, so that a penalty on padding would change the text."""
    tiny, made = build("qwen2"), intervention("vector", scale=0.3)
    wanted = rows()
    first = Counter(slowly(tiny, made, row, how(eos=(), new=1))[0] for row in wanted).most_common(1)[0][0]
    decoding = how(eos=(), **params)._replace(pad=first)
    assert decoding.processors
    alone = slow_texts(tiny, made, wanted, decoding)
    assert any(first in new and first not in row.prompt for new, row in zip(alone, wanted, strict=True))
    assert texts(tiny, made, wanted, decoding, 9) == alone
    assert texts(tiny, made, wanted, decoding, 4) == alone
    assert alone != slow_texts(tiny, made, wanted)  # the penalty matters


# ---------------------------------------------------------------- against the library's own `generate`


@pytest.mark.parametrize("family", FAMILY_NAMES)
@pytest.mark.few(1)
def test_unsteered_texts_are_those_of_the_library(family: str) -> None:
    tiny, wanted = model(family), [row._replace(multiplier=0.0) for row in rows()]
    found = texts(tiny, intervention("vector"), wanted, how(), 4)
    for row, new in zip(wanted, found, strict=True):
        ids = torch.tensor([row.prompt])
        theirs = tiny.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, pad_token_id=PAD, eos_token_id=EOS
        )
        assert theirs[0, len(row.prompt) :].tolist() == new


def test_settings_default_to_the_checkpoint_then_the_library() -> None:
    tiny, words = build("qwen2"), tokenizer()
    tiny.generation_config.top_k, tiny.generation_config.repetition_penalty = 7, 1.3  # type: ignore[union-attr]
    names = [type(w).__name__ for w in sampling.decoding({"do_sample": True}, tiny, words).warpers]
    assert names == ["TopKLogitsWarper"]
    made = sampling.decoding({"do_sample": True, "top_k": 3, "top_p": 0.5, "min_p": 0.1, "temperature": 0.5}, tiny, words)
    assert [type(w).__name__[: -len("LogitsWarper")] for w in made.warpers] == ["Temperature", "TopK", "StableTopP", "MinP"]
    assert made.warpers[1].top_k == 3 and [type(p).__name__ for p in made.processors] == ["RepetitionPenaltyLogitsProcessor"]
    greedy = sampling.decoding({"do_sample": False, "top_k": 3}, tiny, words)
    assert greedy.warpers == [] and not greedy.sample and greedy.max_new_tokens == 128
