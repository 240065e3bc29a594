"""Which tokens are steered: `last` exactly, by two streams and in decoding, its cached approximation, prompt, generated; padding."""

from __future__ import annotations

import random
from typing import Any

import families
import pytest
import torch
from counts import count
from test_post_block import PAIRS, filled
from torch import Tensor, nn

import spilt
from spilt.data.batches import position_mask
from spilt.data.chat import Chat, Encoded
from spilt.engine import choice, sampling, scopes, whole
from spilt.engine.prompts import Row
from spilt.engine.sampling import Decoding
from spilt.errors import UserError
from spilt.settings.values import SCOPES
from spilt.steering import hooks, post_block
from spilt.steering.steering import Steering

FEW = count(families.EVERY, ("mistral", "gemma2", "gpt2", "mixtral", "bamba"))
LENGTHS, PROMPTS = [9, 6, families.WINDOW + 6], [5, 3, families.WINDOW - 4]  # one is longer than the window of those that have one
IDS, REAL = families.token_rows(LENGTHS)
KEEP = REAL & (scopes.places(REAL) >= torch.tensor(PROMPTS)[:, None] - 1)
SITES = (("block",), ("mlp", "attn"), ("mlp_input",))


def built(model: nn.Module, sites: tuple[str, ...] = ("block",), scope: str = "last", **how: Any) -> Steering:
    return filled(post_block.build(model, sites=sites, scope=scope, **how))


def prefix_logits(model: nn.Module, steering: Steering, text: list[int], m: float = 1.0) -> Tensor:
    """The definition: the text alone, without a cache, its last token steered. [V]"""
    where = torch.zeros(1, len(text), dtype=torch.bool)
    where[0, -1] = True
    with torch.no_grad(), hooks.attach(model, steering.at(m, where)):
        return model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]


def left(ids: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    """The same rows padded on the left."""
    lengths = real.sum(1).tolist()
    rows = [torch.cat([row.new_full((ids.shape[1] - n,), families.PAD), row[:n]]) for row, n in zip(ids, lengths, strict=True)]
    return torch.stack(rows), real.flip(1)


# ---------------------------------------------------------------- one forward


@pytest.mark.parametrize("family", FEW)
def test_last_is_every_prefix_alone(family: str) -> None:
    """Several layers and sites, both paddings, windows: the logits are those of prefixes; with a strength for each row."""
    model, m = families.model(family), torch.tensor([1.0, -0.6, 0.0])
    prompts = torch.tensor(PROMPTS)
    for sites in count(SITES, SITES[1:2]):
        steering = built(model, sites)
        found = scopes.logits(model, steering, m, IDS, REAL, prompts, KEEP)
        wanted = [prefix_logits(model, steering, IDS[r, : c + 1].tolist(), float(m[r])) for r, c in KEEP.nonzero().tolist()]
        torch.testing.assert_close(found.detach(), torch.stack(wanted), atol=1e-4, rtol=1e-4)
    if not scopes.why_prefixes(model):  # recurrent blocks read padding before a text unless the library masks it
        ids, real = left(IDS, REAL)
        keep = real & (scopes.places(real) >= prompts[:, None] - 1)
        torch.testing.assert_close(scopes.logits(model, steering, m, ids, real, prompts, keep), found, atol=1e-4, rtol=1e-4)
        assert torch.equal(scopes.last_attended(real), torch.full((3,), real.shape[1] - 1))
    assert torch.equal(scopes.last_attended(REAL), torch.tensor(LENGTHS) - 1)


def test_last_is_trained_as_it_is_defined() -> None:
    """Gradients of the one pass are those of the prefixes, one after the other."""
    model, steering = families.model("qwen2"), built(families.model("qwen2"))
    targets = torch.randint(5, families.VOCAB, (int(KEEP.sum()),), generator=torch.Generator().manual_seed(1))

    def gradients(logits: Tensor) -> list[Tensor]:
        loss = nn.functional.cross_entropy(logits, targets)
        return list(torch.autograd.grad(loss, list(steering.parameters())))

    ours = gradients(scopes.logits(model, steering, 1.0, IDS, REAL, torch.tensor(PROMPTS), KEEP))
    rows = []
    for r, c in KEEP.nonzero().tolist():
        where = torch.arange(c + 1)[None] == c
        with hooks.attach(model, steering.at(1.0, where)):
            rows.append(model(input_ids=IDS[r : r + 1, : c + 1], use_cache=False).logits[0, -1])
    for a, b in zip(ours, gradients(torch.stack(rows)), strict=True):
        assert b.abs().max() > 1e-6
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("scope", [word for word in SCOPES if word != "last"])
def test_the_other_scopes_are_masks_on_either_padding(scope: str) -> None:
    """Against the words of steer_positions, which are of right-padded sequences, and a mask written out."""
    model, prompts = families.model("llama"), torch.tensor(PROMPTS)
    places = {"all": range(99), "prompt": range(PROMPTS[0]), "generated": range(PROMPTS[0], 99), "last_cached": range(PROMPTS[0] - 1, 99)}
    right = scopes.positions(scope, REAL, prompts)
    assert right[0].nonzero()[:, 0].tolist() == [t for t in range(LENGTHS[0]) if t in places[scope]]
    texts = [Encoded(tuple(row[:n].tolist()), p, 0) for row, n, p in zip(IDS, LENGTHS, PROMPTS, strict=True)]
    assert torch.equal(right, position_mask(texts, scope, 2))
    steering = built(model, scope=scope)
    ids, real = left(IDS, REAL)
    keep = real & (scopes.places(real) >= prompts[:, None] - 1)
    found = scopes.logits(model, steering, 1.0, IDS, REAL, prompts, KEEP)
    torch.testing.assert_close(scopes.logits(model, steering, 1.0, ids, real, prompts, keep), found, atol=1e-5, rtol=1e-4)
    with hooks.attach(model, steering.at(1.0, right)):
        wanted = model(input_ids=IDS, attention_mask=REAL.long()).logits[KEEP]
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


# ---------------------------------------------------------------- texts


def by_hand(model: nn.Module, steering: Steering, row: Row, how: Decoding) -> list[int]:
    """Without a cache, one token after the other from the whole text so far, its last token steered."""
    draw, new = random.Random(row.seed), list[int]()
    while len(new) < how.max_new_tokens and not (new and new[-1] in how.eos):
        scores = prefix_logits(model, steering, [*row.prompt, *new], row.multiplier)[None].float()
        new += sampling.choose(scores, how, torch.tensor([draw.random()]) if how.sample else None, [[*row.prompt, *new]]).tolist()
    return new


def rows_of(*lengths: int) -> list[Row]:
    strengths = (1.0, -0.8, 1.0, 0.0)
    return [Row(tuple(IDS[i % 3][:n].tolist()), strengths[i % 4], f"7/{i}") for i, n in enumerate(lengths)]


@pytest.mark.few(4)
@pytest.mark.parametrize("sample", (False, True))
@pytest.mark.parametrize("family", FEW)
def test_exact_decoding_is_the_uncached_result(family: str, sample: bool) -> None:
    """Rows of unlike lengths and strengths side by side, in one batch and in several; some end earlier."""
    model = families.model(family)
    steering, rows = built(model), rows_of(9, 6, families.WINDOW + 3, 4)
    how = Decoding(6, sample, (families.EOS, *range(5, 30)), families.PAD, [], [])
    wanted = {i: by_hand(model, steering, row, how) for i, row in enumerate(rows)}
    for together in count((4, 3), (4,)):
        assert dict(scopes.generate(model, steering, rows, how, together)) == wanted


def test_the_cached_way_is_another_text_and_says_so() -> None:
    """Steered keys and values stay in the cache: the same first token, then other ones; it is its own scope, equal to itself uncached."""
    model, rows = families.model("qwen2"), rows_of(9, 6, 20, 5)[:3]
    how = Decoding(12, False, (), families.PAD, [], [])
    exact, cached = (dict(scopes.generate(model, built(model, scope=scope), rows, how, 3)) for scope in ("last", "last_cached"))
    assert [exact[i][0] for i in exact] == [cached[i][0] for i in exact] and exact != cached
    steering = built(model, scope="last_cached")
    text = [*rows[0].prompt, *exact[0][:5]]
    where = torch.arange(len(text))[None] >= len(rows[0].prompt) - 1
    with torch.no_grad(), hooks.attach(model, steering.at(1.0, where)):
        steered = model(input_ids=torch.tensor([text])).logits[0, -1]
    assert (steered - prefix_logits(model, built(model), text)).abs().max() > 1e-3
    assert dict(enumerate(scopes._uncached(model, steering, rows, how, "last_cached"))) == cached


@pytest.mark.parametrize("scope", ("prompt", "generated", "all"))
def test_other_scopes_in_texts(scope: str) -> None:
    """Cached, side by side, as uncached and alone; those of the plain engine."""
    model, rows, how = families.model("gemma2"), rows_of(9, 6, 20, 5), Decoding(5, True, (), families.PAD, [], [])
    steering = built(model, scope=scope)
    found = dict(scopes.generate(model, steering, rows, how, 4))
    assert found == dict(enumerate(scopes._uncached(model, steering, rows, how, scope)))
    if scope != "prompt":  # the plain engine's caching of a prompt's steered tokens is the same, its words are not
        assert found == dict(whole.texts(model, steering, rows, how, "all_generation")) or scope == "all"


def test_out_of_memory_halves_a_batch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model, rows, how = families.model("llama"), rows_of(6, 5, 4), Decoding(3, False, (), families.PAD, [], [])
    steering, cached = built(model), scopes._cached
    wanted = dict(scopes.generate(model, steering, rows, how, 3))

    def short(model: nn.Module, steering: Steering, rows: list[Row], *more: Any) -> list[list[int]]:
        if len(rows) > 1:
            raise MemoryError
        return cached(model, steering, rows, *more)

    monkeypatch.setattr(scopes, "_cached", short)
    assert dict(scopes.generate(model, steering, rows, how, 3)) == wanted
    assert "out of memory: text from 3 prompts at once; going on with 1" in caplog.text


# ---------------------------------------------------------------- what does not obey it says so


def test_nothing_steers_every_token_in_silence() -> None:
    model, tokenizer = families.model("llama"), families.tokenizer()
    steering = built(model)
    with pytest.raises(UserError, match="scope 'last' alone.*scopes"), spilt.steer(model, steering):
        pass
    with pytest.raises(UserError, match="scope 'last' alone"), spilt.in_place(families.build("llama"), steering):
        pass
    everywhere = Steering(steering.entries)
    for sum_of in (lambda: steering + everywhere, lambda: everywhere - steering, lambda: sum([steering, everywhere])):
        with pytest.raises(UserError, match="'last' and 'all'|'all' and 'last'"):
            sum_of()
    assert (steering + steering).scope == "last" and (steering * 2).scope == "last"
    with pytest.raises(UserError, match="scope 'last' alone"):
        spilt.measure(model, tokenizer, steering, PAIRS, [1.0], positions="all", engine="plain")
    with pytest.raises(UserError, match="no mask says it"):
        position_mask([Encoded((1, 2), 1, 0)], "last", 0)
    with pytest.raises(ValueError, match="no mask"):
        scopes.positions("last", REAL, torch.tensor(PROMPTS))
    with pytest.raises(UserError, match="unknown scope 'lost'; did you mean 'last'"):
        list(scopes.generate(model, steering, [], Decoding(1, False, (), 0, [], []), 1, "lost"))
    with pytest.raises(UserError, match="unknown scope"):
        _ = Steering(steering.entries, {"scope": "x"}).scope
    for verb in ("fit", "generate", "measure"):
        assert "last" in choice.why_plain([(2, "block")], verb, family="llama", positions="last")


@pytest.mark.parametrize("scope", ("last", "last_cached"))
def test_fitted_measured_and_decoded_in_its_scope(scope: str) -> None:
    """The measured losses are those of prefixes (or of the mask), and the texts those of the scope."""
    model, tokenizer = families.model("qwen2"), families.tokenizer()
    how: dict[str, Any] = {"layer": [1, 3], "method": "sft", "intervention": "post_block", "n_epochs": 4, "lr": 0.05, "rank": 3}
    steering = spilt.fit(model, tokenizer, PAIRS, **how, steer_positions=scope)
    assert steering.scope == scope
    table = spilt.measure(model, tokenizer, steering, PAIRS[:2], [4.0]).set_index("multiplier")
    chat = Chat.of(tokenizer, True, "")
    losses = []
    for question, answer, _ in PAIRS[:2]:
        made = chat.encode(question, answer, 512, 0)
        end = len(made.input_ids) - made.suffix_length
        at = range(made.prompt_length, end)
        ids = torch.tensor([made.input_ids])
        mask = torch.arange(ids.shape[1])[None] >= made.prompt_length - 1
        with torch.no_grad(), hooks.attach(model, steering.at(4.0, mask)):
            cached = model(input_ids=ids).logits[0]
        told = [prefix_logits(model, steering, list(made.input_ids[:t]), 4.0) if scope == "last" else cached[t - 1] for t in at]
        losses.append(-sum(float(row.log_softmax(-1)[made.input_ids[t]]) for t, row in zip(at, told, strict=True)) / len(at))
    assert table["loss_matching"][4.0] == pytest.approx(sum(losses) / 2, rel=1e-4)
    assert abs(table["loss_matching"][4.0] - table["loss_matching"][0.0]) > 0.01
    kl = spilt.divergence(model, tokenizer, steering, ["abc"], 4.0, max_new_tokens=4)
    assert kl["kl_mean"][0] > 1e-4
