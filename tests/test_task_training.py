"""Training on tasks: what is supervised, windows, schedules, kinds of what is learned, going on after a kill. Plain loops beside."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import families
import listops_world as world
import pytest
import torch
from families import EOS, token_rows
from torch import nn
from torch.nn import functional
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from spilt.data.chat import Chat, Encoded
from spilt.downstream import answering, evaluation, load, training, variants, work
from spilt.downstream.encode import Encoding
from spilt.downstream.loreft import LoReFT
from spilt.downstream.places import summaries
from spilt.downstream.rows import Example
from spilt.downstream.words import KINDS, PROJECTIONS, TrainSettings, Variant
from spilt.engine import scopes, whole
from spilt.errors import NotFinite, UserError
from spilt.model.host import Host
from spilt.steering.steering import Steering

LEARNED = [kind for kind in KINDS if kind not in ("base", "full")]


def model() -> Any:
    return world.build(0, hidden_size=32, intermediate_size=48).eval().requires_grad_(False)


def encoded(count: int = 16, seed: int = 0) -> list[Encoded]:
    """Rows of different lengths, 1 to 5 of their tokens supervised."""
    ids, real = token_rows([6 + i % 7 for i in range(count)], seed)
    return [Encoded(tuple((row[m] % 22).tolist()), int(m.sum()) - 1 - i % 5, 1) for i, (row, m) in enumerate(zip(ids, real, strict=True))]


def moved(steering: Steering, seed: int = 0) -> Steering:
    """Away from the start, where all that follows from nothing is nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return steering


# ---------------------------------------------------------------- tokens


@pytest.mark.parametrize("template", [None, families.TEMPLATE], ids=["plain", "chat"])
def test_prompt_is_not_supervised_and_the_end_is(template: str | None) -> None:
    """One BOS, the prompt that decoding is fed, the completion, and the token at which decoding stops; nothing after it."""
    tokenizer = families.tokenizer(template)
    ends = (families.END,) if template else (EOS,)
    encoding = Encoding(Chat.of(tokenizer, True), ends, 100)
    (row,), truncated, dropped = encoding.training([Example("2+3?\n", "Answer: 5", 5)])
    assert encoding.prompts([Example("2+3?\n", "", 5)]).ids == [row.input_ids[: row.prompt_length]]
    assert row.input_ids.count(families.BOS) == 1 and row.input_ids[0] == families.BOS
    assert tokenizer.decode(row.input_ids[row.prompt_length : -1]) == "Answer: 5" and row.input_ids[-1] == ends[0]
    assert training.supervised([row]) == len("Answer: 5") + 1 and (truncated, dropped) == (0, 0)


def test_what_is_too_long_is_cut_on_the_left_or_left_out_and_counted() -> None:
    tokenizer = families.tokenizer()
    chat = Chat.of(tokenizer, True)
    examples = [Example("short?", "yes", ""), Example("x" * 80 + "the end?", "no", ""), Example("y?", "z" * 90, "")]
    rows, truncated, dropped = Encoding(chat, (families.END,), 60).training(examples)
    assert (len(rows), truncated, dropped) == (2, 1, 1) and len(rows[1].input_ids) == 60
    kept = rows[1].input_ids[: rows[1].prompt_length]
    whole_prompt = chat.prompt_ids(examples[1].prompt)
    assert kept[: chat.prefix_length] == tuple(whole_prompt[: chat.prefix_length])  # the template's beginning stays
    assert tokenizer.decode(kept[chat.prefix_length :]).startswith("x") and "the end?" in tokenizer.decode(kept)
    rows, truncated, dropped = Encoding(chat, (families.END,), 60, "drop").training(examples)
    assert (len(rows), truncated, dropped) == (1, 0, 2)
    asked = Encoding(chat, (families.END,), 60, "drop").prompts(examples)
    assert asked.rows == [0, 2] and asked.dropped == [1] and not asked.truncated
    with pytest.raises(UserError, match="no training row fits into 3 tokens"):
        Encoding(chat, (families.END,), 3).training(examples)


# ---------------------------------------------------------------- the loss


def by_hand(net: nn.Module, rows: list[Encoded]) -> torch.Tensor:
    """Cross-entropy of supervised tokens one row at a time, summed, / their number, by the library's own forward."""
    total, count = torch.zeros(()), 0
    for row in rows:
        ids = torch.tensor([row.input_ids])
        labels = ids.clone()
        labels[0, : row.prompt_length] = -100
        total = total + functional.cross_entropy(net(input_ids=ids).logits[0, :-1], labels[0, 1:], reduction="sum")
        count += int((labels != -100).sum())
    return total / count


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", LEARNED)
def test_the_gradient_of_a_window_is_that_of_all_its_tokens(kind: str) -> None:
    """1 x 16 rows, 2 x 8 and 16 x 1, padded, are the mean over tokens of single unpadded rows."""
    net, rows = model(), encoded()
    found = {}
    for size in (16, 8, 1):
        learner = training.Steered(net, moved(variants.make(net, Variant(kind, rank=3), 0)), 0)
        with learner.ready():
            loss = training.accumulate(learner, training.chunks(rows, size))
        found[size] = (loss, [parameter.grad.clone() for parameter in learner.module.parameters()])
    steering = moved(variants.make(net, Variant(kind, rank=3), 0))
    parameters = list(steering.parameters())
    with whole.steer(net, steering, 1.0):
        loss = by_hand(net, rows)
        wanted = torch.autograd.grad(loss, parameters)
    for size, (value, grads) in found.items():
        assert value == pytest.approx(loss.item(), rel=1e-5), size
        for grad, own in zip(grads, wanted, strict=True):
            assert own.abs().max() > 0 and (grad - own).abs().max() <= 1e-4 * own.abs().max() + 1e-7
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in net.parameters())


def test_full_fine_tuning_has_the_library_s_gradient_and_gives_the_model_back() -> None:
    net, rows = model(), encoded(6)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    with work.restored(net):
        learner = training.Full(net, 0)
        with learner.ready():
            training.accumulate(learner, [rows[:4], rows[4:]])
            found = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
            net.zero_grad()
            by_hand(net, rows).backward()
            for name, parameter in net.named_parameters():
                assert (parameter.grad - found[name]).abs().max() <= 1e-4 * parameter.grad.abs().max() + 1e-7
            net.zero_grad()
        training.train(learner, rows, TrainSettings(lr=1e-2, epochs=1, bs=2))
        assert any(not torch.equal(parameter, before[name]) for name, parameter in net.named_parameters())
    assert all(torch.equal(parameter, before[name]) and not parameter.requires_grad for name, parameter in net.named_parameters())
    with pytest.raises(UserError, match="small updates are lost"):
        training.Full(model().to(torch.bfloat16), 0)
    with pytest.raises(UserError, match="weights of another model"):
        work.put(net, {"a": torch.zeros(1)})


@pytest.mark.parametrize(("name", "theirs"), [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup)])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.25])
def test_the_rate_is_the_library_s(name: str, theirs: Any, ratio: float) -> None:
    steps, s = 37, TrainSettings(scheduler=name, warmup_ratio=ratio)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = theirs(optimizer, math.ceil(ratio * steps), steps)
    for step in range(steps):
        assert training.rate(step, steps, s) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


# ---------------------------------------------------------------- what is learned


@pytest.mark.parametrize("kind", LEARNED)
def test_each_kind_begins_at_the_base_model_and_counts_its_parameters(kind: str) -> None:
    net, rank, hidden, layers = model(), 3, 32, 3
    steering = variants.make(net, Variant(kind, rank=rank), 0)
    ids, _ = token_rows([9, 9])
    plain = net(input_ids=ids % 22).logits
    with whole.steer(net, steering, 1.0):
        assert (net(input_ids=ids % 22).logits - plain).abs().max() <= 1e-5
    linears = [module for module in net.model.layers.modules() if isinstance(module, nn.Linear)]
    count = {
        "post_block": 2 * layers * hidden * rank,
        "vector": layers * hidden,
        "loreft": layers * (2 * hidden * rank + rank),
        "lora": sum(rank * (module.in_features + module.out_features) for module in linears),
        "joint": 2 * layers * hidden * rank + sum(8 * (module.in_features + module.out_features) for module in linears),
    }[kind]
    assert sum(parameter.numel() for parameter in steering.parameters()) == count
    again, other = variants.make(net, Variant(kind, rank=rank), 0), variants.make(net, Variant(kind, rank=rank), 1)
    assert all(torch.equal(a, b) for a, b in zip(steering.parameters(), again.parameters(), strict=True))
    assert kind == "vector" or any(not torch.equal(a, b) for a, b in zip(steering.parameters(), other.parameters(), strict=True))
    assert steering.layers == (0, 1, 2) and variants.make(net, Variant(kind, layers=(1,)), 0).layers == (1,)


def test_loreft_is_the_linear_adapter_and_the_vector_that_are_stored() -> None:
    """h + R^T (W h + b - R h), R R^T = 1."""
    net = model()
    steering = moved(variants.make(net, Variant("loreft", rank=4), 0))
    h, one = torch.randn(2, 5, 32), steering.entries[0][1]
    assert isinstance(one, LoReFT)
    R, W, b = one.rotation(), one.weight, one.bias
    assert (R @ R.T - torch.eye(4)).abs().max() <= 1e-5
    wanted = h + torch.einsum("rd,btr->btd", R, h @ W.T + b - h @ R.T)
    assert (one(h, None, 1.0) - wanted).abs().max() <= 1e-5
    stored = variants.stored(steering, {})
    assert stored.forms == ("post_block", "vector") * 3
    ids, _ = token_rows([9, 7])
    with whole.steer(net, steering, 0.7):
        ours = net(input_ids=ids % 22).logits
    with whole.steer(net, stored, 0.7):
        assert (net(input_ids=ids % 22).logits - ours).abs().max() <= 1e-4


@pytest.mark.parametrize("scope", ["last", "last_cached", "prompt", "generated"])
def test_a_scope_is_trained_as_it_is_decoded(scope: str) -> None:
    """Of all tokens that could come last in a decoded text, the one that was chosen has the largest log p, as training scores it."""
    net = world.pretrained_shape()
    steering = moved(variants.make(net, Variant(rank=3, scope=scope), 0), 3)
    how = evaluation.greedy(5, (), 0)
    prompts = [tuple(row.input_ids[: row.prompt_length]) for row in encoded(6)]
    rows = [evaluation.Row(prompt, 1.0, "") for prompt in prompts]
    made = dict(scopes.generate(net, steering, rows, how, 3))
    learner = training.Steered(net, steering, 0)
    for number, new in made.items():
        ids, length = (*prompts[number], *new[:4]), len(prompts[number])
        with torch.no_grad():  # what comes before the last token is the same in each
            scores = learner.score([Encoded((*ids, token), length, 1) for token in range(len(world.WORDS))])
        assert int(scores.argmax()) == new[4]


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_joint_training_keeps_the_adapters_off_the_lora(projection: str) -> None:
    """The overlap is in the log: 0 of what is projected after every step, and not of the rest."""
    net, v = model(), Variant("joint", rank=2, lora_rank=3, projection=projection)
    learner = training.Joint(net, moved(variants.make(net, v, 0)), 0, projection)
    log = training.train(learner, encoded(), TrainSettings(lr=1e-2, bs=4, warmup_ratio=0.0))
    for row in log:
        assert {"input": row["overlap_read"], "output": row["overlap_write"]}.get(projection, 0.0) <= 1e-5
        assert (row["overlap_read"] > 1e-2) == (projection != "input") and (row["overlap_write"] > 1e-2) == (projection != "output")


def test_variants_that_differ_have_names_that_differ() -> None:
    every = [
        Variant(kind, rank, act, sites, layers, scope)
        for kind in LEARNED for rank in (1, 8) for act in ("silu", "linear") for sites in (("block",), ("mlp", "attn"))
        for layers in (None, (0, 2)) for scope in (("all",) if kind in ("lora", "joint") else ("all", "last"))
    ]  # fmt: skip
    plain = {variant.plain() for variant in every}
    assert len({variant.name for variant in plain}) == len(plain) == 32 + 8 + 16 + 4 + 8
    for words, match in (
        ({"kind": "lra"}, "did you mean 'lora'"),
        ({"rank": 0}, "adapter-rank 0"),
        ({"kind": "full", "layers": (1,)}, "acts everywhere"),
    ):
        with pytest.raises(UserError, match=match):
            Variant(**words)
    with pytest.raises(UserError, match="layer 9 does not exist"):
        variants.make(model(), Variant(layers=(9,)), 0)


# ---------------------------------------------------------------- the loop


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_training_ends_bit_for_bit_where_the_whole_one_does(stop: int) -> None:
    net, rows, s = model(), encoded(20), TrainSettings(lr=1e-2, bs=3, epochs=2, weight_decay=0.1)
    whole_one = training.Steered(net, variants.make(net, Variant(), 0), 0)
    log = training.train(whole_one, rows, s)
    kept: list[dict[str, Any]] = []

    def checkpoint(state: Any) -> None:
        kept.append(json_and_back(state()))
        if len(kept) == stop:
            raise KeyboardInterrupt

    cut_off = training.Steered(net, variants.make(net, Variant(), 0), 0)
    with pytest.raises(KeyboardInterrupt):
        training.train(cut_off, rows, s, checkpoint=checkpoint)
    again = training.Steered(net, variants.make(net, Variant(), 0), 0)
    assert training.train(again, rows, s, resume=kept[-1]) == log and len(log) == 8
    for a, b in zip(whole_one.module.parameters(), again.module.parameters(), strict=True):
        assert torch.equal(a, b) and a.abs().max() > 0
    assert [row["tokens"] for row in log[:4]] != [row["tokens"] for row in log[4:]]  # each epoch in its own order


def json_and_back(state: dict[str, Any]) -> dict[str, Any]:
    """As a file gives it back."""
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return dict(torch.load(buffer, weights_only=True))


def test_the_adapters_are_float32_on_a_bfloat16_model() -> None:
    """At lr 1e-4 nothing would move bfloat16 parameters of size 1."""
    net = model().to(torch.bfloat16)
    learner = training.Steered(net, variants.make(net, Variant("loreft", rank=2), 0), 0)
    before = [parameter.clone() for parameter in learner.module.parameters()]
    training.train(learner, encoded(8), TrainSettings(lr=1e-4, bs=2, warmup_ratio=0.0))
    after = list(learner.module.parameters())
    assert all(p.dtype == torch.float32 for p in after) and {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert all(0 < (a - b).abs().max() < 1e-3 for a, b in zip(after, before, strict=True))


def test_a_training_that_breaks_down_stores_nothing(tmp_path: Path) -> None:
    net = model()
    with torch.no_grad():
        net.lm_head.weight.fill_(float("nan"))
    learner = training.Steered(net, variants.make(net, Variant(), 0), 0)
    with pytest.raises(NotFinite, match="the gradient is nan at step 0"):
        training.train(learner, encoded(), TrainSettings(bs=4))
    for words in ({"lr": 0.0}, {"bs": 0}, {"warmup_ratio": 1.0}, {"scheduler": "linar"}):
        with pytest.raises(UserError):
            TrainSettings(**words)  # type: ignore[arg-type]


def test_a_stored_adapter_is_never_read_as_another(tmp_path: Path) -> None:
    """The public code rebuilds every checkpoint with silu; here linear read as silu is refused, also where its folder is renamed."""
    base = tmp_path
    world.write_untrained(base)
    host = work_host(base)
    source = load.source("new", str(world.write_task(base / "new", 1, train=40, test=8)), extract="tag", max_new_tokens=4)
    settings = TrainSettings(lr=1e-2, epochs=1)
    linear, silu = (work.Request(source, "tiny", Variant(nonlinearity=act), settings, base) for act in ("linear", "silu"))
    assert work.train(linear, host, print, quiet=True) == "done"
    assert work.train(linear, host, print, quiet=True) == "already done"
    with pytest.raises(UserError, match="nothing was learned there yet"):
        answering.evaluate(silu, host, "test")
    linear.place.folder.parent.rename(silu.place.folder.parent)
    with pytest.raises(UserError, match='was trained with nonlinearity "linear" \\(now "silu"\\)'):
        answering.evaluate(silu, host, "test")
    vector = work.Request(source, "tiny", Variant("vector"), settings, base)
    silu.place.folder.parent.rename(vector.place.folder.parent)
    with pytest.raises(UserError, match="was trained with"):
        answering.evaluate(vector, host, "test")
    vector.place.steering.write_bytes(vector.place.steering.read_bytes()[:-4] + b"\0\0\0\1")
    with pytest.raises(UserError, match="is not what its manifest speaks of"):
        answering.evaluate(vector, host, "test")


def work_host(base: Path) -> Host:
    from spilt.model import host

    return host.load(base / "models" / "tiny", "float32", "cpu", "")


def test_rows_and_log_of_a_run(tmp_path: Path) -> None:
    world.write_untrained(tmp_path)
    host = work_host(tmp_path)
    source = load.source("new", str(world.write_task(tmp_path / "new", 1, train=33, test=20)), extract="tag", max_new_tokens=4)
    request = work.Request(source, "tiny", Variant(rank=2), TrainSettings(lr=1e-2, bs=4), tmp_path)
    work.train(request, host, print, quiet=True)
    summary = answering.evaluate(request, host, "test")
    log = [json.loads(line) for line in request.place.log.read_text().splitlines()]
    assert [row["step"] for row in log] == list(range(5)) and log[0]["lr"] == 0 and sum(row["tokens"] for row in log) == 33 * 4
    rows = [json.loads(line) for line in request.place.results("test").read_text().splitlines()]
    assert [set(row) for row in rows] == [{"prompt", "output", "label", "eval"}] * 20
    assert summary["n"] == 20 and summary["accuracy"] == sum(row["eval"] for row in rows) / 20 and summary["parameters"] == 2 * 3 * 64 * 2
    assert 0 <= summary["low"] <= summary["accuracy"] <= summary["high"] <= 1
    assert summaries(request.place)["test"] == summary == answering.evaluate(request, host, "test")
    assert not list(request.place.folder.glob("unfinished*"))
    at_0 = answering.evaluate(request, host, "test", multiplier=0.0)
    base = answering.evaluate(request._replace(variant=Variant("base")), host, "test")
    assert at_0["accuracy"] == base["accuracy"] and set(summaries(request.place)) == {"test", "test_m0"}
