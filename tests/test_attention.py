"""Attention of the next token against its equation written out, and a long shared beginning that is read where it is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import FAMILY_NAMES, LAYERS, VOCAB, intervention, model
from torch import Tensor

from spilt.engine import attention, decode, whole
from spilt.engine.decode import Row
from spilt.engine.sampling import Decoding
from spilt.steering.steering import Steering

HEADS, GROUP, WIDTH, OWN, BEGUN = 2, 3, 8, 5, 7  # keys/values, queries of each, their width; tokens of a row, and before it
GROUPS = [0, 2, 0, 0, 2]  # of five rows; nobody is of group 1


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Row by row and head by head, in float64: [B, 1, H G, d]."""
    out = torch.zeros(len(q), 1, q.shape[1], WIDTH, dtype=torch.float64)
    for b in range(len(q)):
        for h in range(q.shape[1]):
            scores = k[b, h // GROUP].double() @ q[b, h, 0].double() * WIDTH**-0.5
            scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) + mask[b, 0, 0].double()
            weights = scores if sinks is None else torch.cat([scores, sinks[h : h + 1].double()])
            out[b, 0, h] = weights.softmax(0)[: len(scores)] @ v[b, h // GROUP].double()
    return out


@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (0.7, False), (None, True)])
def test_the_equation(begun: bool, softcap: float | None, sinks: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, length = len(GROUPS), OWN + (BEGUN if begun else 0)
    q = torch.randn(rows, HEADS * GROUP, 1, WIDTH, generator=draw)
    k, v = (torch.randn(rows, HEADS, OWN, WIDTH, generator=draw) for _ in range(2))
    mask = torch.zeros(rows, 1, 1, length).masked_fill(torch.rand(rows, 1, 1, length, generator=draw) < 0.2, torch.finfo(torch.float32).min)
    aux = torch.randn(HEADS * GROUP, generator=draw) if sinks else None
    for alike in (False, True) if begun else (False,):
        pair = tuple(torch.randn(1 if alike else 3, HEADS, BEGUN, WIDTH, generator=draw) for _ in range(2))
        groups = [attention.Groups.of(group, n, q.device) for group, n in ((GROUPS, 3), ([0] * rows, 1))]
        given = attention.Begun({4: pair}, *groups) if begun else None  # type: ignore[dict-item]
        which = [0] * rows if alike else GROUPS
        whole_k, whole_v = (torch.cat([p[which], own], 2) if begun else own for p, own in zip(pair, (k, v), strict=True))
        found, _ = attention.attend(given, SimpleNamespace(layer_idx=4), q, k, v, mask, None, softcap, aux)  # type: ignore[arg-type]
        torch.testing.assert_close(found.double(), written_out(q, whole_k, whole_v, mask, softcap, aux), atol=2e-6, rtol=0)


def tokens(draw: torch.Generator, count: int) -> tuple[int, ...]:
    return tuple(torch.randint(8, VOCAB, (count,), generator=draw).tolist())


@pytest.mark.few(1)
@pytest.mark.parametrize("family", sorted((*FAMILY_NAMES, "gpt_oss"), key=lambda name: name not in ("qwen2", "gemma2", "gpt_oss")))
def test_a_long_beginning_is_read_where_it_is(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same texts as one row after the other by the plain engine; batches with refill; no row holds the beginning."""
    tiny = model(family, "eager" if family in attention.ARGUMENTS else None)
    draw, held = torch.Generator().manual_seed(1), set[int]()
    monkeypatch.setattr(attention, "MANY", 3 * 64)
    begin = tokens(draw, 64)
    strengths = (1.0, -1.0, 0.0, 2.5, -0.5, 0.0, 1.0)
    rows = [Row(begin + tokens(draw, n), m, "") for n, m in zip((3, 31, 12, 7, 20, 5, 9), strengths, strict=True)]
    steering = Steering.of({LAYERS // 2: intervention("lora", "mlp", scale=0.5)})
    how = Decoding(8, False, (), 0, [], [])
    own = decode.Active.__init__

    def seen(self: Any, capacity: int, columns: int) -> None:
        held.add(columns)
        own(self, capacity, columns)

    monkeypatch.setattr(decode.Active, "__init__", seen)
    alone = dict(whole.texts(tiny, steering, rows, how))
    implementation = tiny.config.get_text_config()._attn_implementation  # type: ignore[union-attr,operator]
    for batch_size in (len(rows), 3):
        assert dict(decode.generate(tiny, steering, rows, how, batch_size)) == alone
    assert attention.replaceable(tiny) and held == {31 + 8}
    assert tiny.config.get_text_config()._attn_implementation == implementation  # type: ignore[union-attr,operator]
    assert alone != dict(decode.generate(tiny, steering, [row._replace(multiplier=0.0) for row in rows], how, len(rows)))


@pytest.mark.parametrize("place", [0, LAYERS // 2], ids=["inside the first block", "between"])
def test_prompts_are_read_few_at_a_time(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their tokens, whatever the batch, and the texts are those of one row after the other."""
    tiny, draw, read = model("llama"), torch.Generator().manual_seed(2), list[int]()
    begin = tokens(draw, 5)
    rows = [Row(begin + tokens(draw, n), m, "") for n in (3, 30, 12, 7, 20, 5) for m in (1.0, 0.0, -1.5)]
    steering = Steering.of({place: intervention("lora", "mlp")})
    how = Decoding(6, False, (), 0, [], [])
    alone = dict(whole.texts(tiny, steering, rows, how))
    own = decode.Prompts.start

    def seen(self: Any, rows: Any, numbers: list[int]) -> Any:
        read.append(len(numbers) * max(len(rows[i].prompt) - self.prefix for i in numbers))
        return own(self, rows, numbers)

    monkeypatch.setattr(decode.Prompts, "start", seen)
    monkeypatch.setattr("spilt.memory.max_tokens", lambda _: 128)
    assert dict(decode.generate(tiny, steering, rows, how, len(rows))) == alone
    assert len(read) > 4 and 32 < max(read) <= 64


def test_the_attention_is_given_back_after_an_exception() -> None:
    tiny = model("gemma2", "eager")
    with pytest.raises(RuntimeError), attention.next_token(tiny, None):
        assert tiny.config._attn_implementation == attention.NAME  # type: ignore[union-attr]
        raise RuntimeError
    assert tiny.config._attn_implementation == "eager" and attention.NAME not in attention.ALL_ATTENTION_FUNCTIONS  # type: ignore[union-attr]


def test_an_attention_of_its_own_stays() -> None:
    """GPT-2 in eager attention may weigh its scores by the layer, which nobody hands over."""
    assert attention.replaceable(model("gpt2", "sdpa")) and not attention.replaceable(model("gpt2", "eager"))
    assert not attention.replaceable(model("llama", "eager"))
    if type(model("gemma2", "eager"))._supports_sdpa:  # that of transformers 4 leaves the soft cap out
        assert not attention.replaceable(model("gemma2", "sdpa"))
