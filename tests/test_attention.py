"""Attention by products against its equation written out, and a long shared beginning that is read where it is."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILY_NAMES, LAYERS, VOCAB, intervention, model
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import eager_attention_forward

from spilt.engine import attention, decode, whole
from spilt.engine.decode import Row
from spilt.engine.sampling import Decoding
from spilt.steering.steering import Steering

HEADS, GROUP, WIDTH, OWN, BEGUN = 2, 3, 8, 5, 7  # keys/values, queries of each, their width; tokens of a row, and before it
GROUPS = [0, 2, 0, 0, 2]  # of five rows; nobody is of group 1


def written_out(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, softcap: float | None, sinks: Tensor | None) -> Tensor:
    """Row by row, token by token and head by head, in float64: [B, Q, H G, d]."""
    out = torch.zeros(len(q), q.shape[2], q.shape[1], WIDTH, dtype=torch.float64)
    for b, t, h in np.ndindex(*out.shape[:3]):
        scores = k[b, h // GROUP].double() @ q[b, h, t].double() * WIDTH**-0.5
        scores = (scores if softcap is None else softcap * torch.tanh(scores / softcap)) + mask[b, 0, t].double()
        weights = scores if sinks is None else torch.cat([scores, sinks[h : h + 1].double()])
        out[b, t, h] = weights.softmax(0)[: len(scores)] @ v[b, h // GROUP].double()
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("queries", "begun"), [(1, False), (1, True), (4, False)])
@pytest.mark.parametrize(("softcap", "sinks"), [(None, False), (0.7, False), (None, True)])
def test_the_equation(queries: int, begun: bool, softcap: float | None, sinks: bool, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    rows, length = len(GROUPS), OWN + (BEGUN if begun else 0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    q = normal(rows, HEADS * GROUP, queries, WIDTH)
    k, v = (normal(rows, HEADS, OWN, WIDTH) for _ in range(2))
    hidden = torch.rand(rows, 1, queries, length, generator=draw) < 0.2
    mask = torch.zeros(rows, 1, queries, length, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    aux = normal(HEADS * GROUP) if sinks else None
    for alike in (False, True) if begun else (False,):
        pair = tuple(normal(1 if alike else 3, HEADS, BEGUN, WIDTH) for _ in range(2))
        groups = [attention.Groups.of(group, n, q.device) for group, n in ((GROUPS, 3), ([0] * rows, 1))]
        given = attention.Begun({4: pair}, *groups) if begun else None  # type: ignore[dict-item]
        which = [0] * rows if alike else GROUPS
        whole_k, whole_v = (torch.cat([p[which], own], 2) if begun else own for p, own in zip(pair, (k, v), strict=True))
        found, _ = attention.attend(given, SimpleNamespace(layer_idx=4), q, k, v, mask, None, softcap, aux)  # type: ignore[arg-type]
        assert found.dtype == dtype
        wanted = written_out(q, whole_k, whole_v, mask, softcap, aux)
        torch.testing.assert_close(found.double(), wanted, atol=2e-6 if dtype == torch.float32 else 0.03, rtol=0)


@pytest.mark.parametrize("keys", [attention.LONGEST, attention.LONGEST + 1])
def test_whole_sequences_in_bfloat16(keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs and gradients are as near float64's as those of the library's own products (eager); above so many keys it is sdpa."""
    monkeypatch.setattr(attention, "has_bfloat16", lambda: True)
    draw = torch.Generator().manual_seed(3)
    made = [torch.randn(2, n, keys, WIDTH, generator=draw).bfloat16() for n in (HEADS * GROUP, HEADS, HEADS)]
    seen = torch.ones(keys, keys, dtype=torch.bool).tril().expand(2, 1, -1, -1).clone()
    seen[1] &= torch.ones(keys, keys, dtype=torch.bool).triu(-20)  # a window
    mask = torch.zeros(seen.shape, dtype=torch.bfloat16).masked_fill(~seen, torch.finfo(torch.bfloat16).min)
    pull = torch.randn(2, keys, HEADS * GROUP, WIDTH, generator=draw).bfloat16()
    module: Any = SimpleNamespace(num_key_value_groups=GROUP, training=False)

    def through(attend: Callable[..., Tensor], dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
        given = [one.to(dtype).requires_grad_() for one in made]
        out = attend(*given, mask.to(dtype))
        return [out.detach(), *torch.autograd.grad(out, given, pull.to(dtype))]

    def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)

    exact, ours = through(sdpa, torch.float64), through(lambda *given: attention.attend(None, module, *given)[0])
    eager, fused = through(lambda *given: eager_attention_forward(module, *given, WIDTH**-0.5)[0]), through(sdpa)
    for true, a, b, c in zip(exact, ours, eager, fused, strict=True):
        off = [float((one.double() - true).norm() / true.norm()) for one in (a, b)]
        assert off[0] < 0.01 and off[0] < 1.05 * off[1]
        assert torch.equal(a, c) == (keys > attention.LONGEST)


@pytest.mark.parametrize("able", [True, False])
def test_whole_sequences_are_the_librarys_but_in_bfloat16_with_a_mask(able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "has_bfloat16", lambda: able)
    for dtype in (torch.float32, torch.bfloat16):
        tiny = copy.deepcopy(model("llama")).to(dtype)
        for mask in (None, torch.zeros(1, 1, 3, 3)):
            with attention.sequences(tiny, {"attention_mask": mask}):
                name = tiny.config._attn_implementation  # type: ignore[union-attr]
                assert (name == attention.NAME) == (able and dtype == torch.bfloat16 and mask is not None)
            assert tiny.config._attn_implementation == "sdpa"  # type: ignore[union-attr]


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
