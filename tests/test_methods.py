"""The objectives on numbers worked by hand, the cutting of batches, the schedule, and a fit that is stopped and goes on."""

from __future__ import annotations

import io
from collections.abc import Callable
from math import exp, log
from typing import Any

import pytest
import torch
from families import FORMS, LAYERS, PAIRS, intervention, model, token_rows
from torch import Tensor

from spilt.data.batches import pad, position_mask
from spilt.data.chat import Encoded
from spilt.engine import activations, suffix
from spilt.engine import train as training
from spilt.engine.passes import recompute_activations
from spilt.methods import LOSS_TYPES, METHODS, Scored, scoring
from spilt.methods.caa import caa
from spilt.methods.reps import reps
from spilt.methods.scoring import AnswerLogProbs
from spilt.methods.sft import sft
from spilt.methods.spilt import spilt
from spilt.settings import FitSettings
from spilt.steering import hooks
from spilt.steering.interventions import INTERVENTIONS
from spilt.steering.steering import Steering

LAYER = LAYERS // 2


def settings(method: str = "spilt", form: str = "vector", **given: Any) -> FitSettings:
    return FitSettings(method=method, intervention_method=form, layers=(LAYER,), **{"substraction_type": "normal", **given})


def answers(*rows: tuple[float, int, int]) -> AnswerLogProbs:
    """(log p of the answer, its tokens, tokens of the whole sequence) of each row."""
    total, tokens, length = zip(*rows, strict=True)
    return AnswerLogProbs(torch.tensor(total, dtype=torch.float64, requires_grad=True), torch.tensor(tokens), torch.tensor(length))


def pair_of(loss: float, other: float) -> Scored:
    """One pair with these losses per token (answers of one token)."""
    return Scored(answers((-loss, 1, 5)), answers((-other, 1, 5)))


def sigmoid(x: float) -> float:
    return 1 / (1 + exp(-x))


# ---------------------------------------------------------------- scoring


def test_answer_logprobs_by_hand() -> None:
    """Two tokens {0, 1}, logits (log 3, 0): p(0) = 3/4, p(1) = 1/4; row 0 answers 0 1, row 1 answers 0."""
    logits = torch.tensor([[log(3.0), 0.0]] * 3)
    ids = torch.tensor([[9, 9, 0, 1], [9, 9, 0, 7]])
    answer = torch.tensor([[0, 0, 1, 1], [0, 0, 1, 0]], dtype=torch.bool)
    keep = scoring.scored_positions(answer)
    assert keep.tolist() == [[False, True, True, False], [False, True, False, False]]
    found = scoring.answer_logprobs(logits, ids, answer, torch.tensor([4, 3]))
    torch.testing.assert_close(found.total, torch.tensor([log(3 / 16), log(3 / 4)]), atol=1e-6, rtol=0)
    assert found.tokens.tolist() == [2, 1] and found.length.tolist() == [4, 3]
    assert found.mean_loss().item() == pytest.approx(-(log(3 / 16) + log(3 / 4)) / 3, rel=1e-6)  # a mean over tokens, not over rows
    torch.testing.assert_close(found.losses(), torch.tensor([-log(3 / 16) / 2, -log(3 / 4)]), atol=1e-6, rtol=0)


def test_token_logprobs_and_their_gradient_equal_the_library() -> None:
    """More rows than are held in float32 at once."""
    generator = torch.Generator().manual_seed(0)
    rows = 2 * scoring.CHUNK + 3
    logits = torch.randn(rows, 7, generator=generator).requires_grad_(True)
    targets, weights = torch.randint(0, 7, (rows,), generator=generator), torch.randn(rows, generator=generator)
    other = logits.detach().clone().requires_grad_(True)
    mine = scoring.token_logprobs(logits, targets)
    theirs = other.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=0)
    (mine * weights).sum().backward()
    (theirs * weights).sum().backward()
    torch.testing.assert_close(logits.grad, other.grad, atol=1e-6, rtol=0)


# ---------------------------------------------------------------- the methods


def test_caa_is_the_mean_difference() -> None:
    """rows (1, 2) - (0, 1) = (1, 1) and (3, 0) - (0, 4) = (3, -4); mean (2, -1.5), not normalised."""
    found = caa(torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 4.0]]))
    assert found.tolist() == [2.0, -1.5]


def test_sft_is_the_weighted_winning_loss() -> None:
    """log p -6 over 3 tokens and -2 over 1: L_p = 8/4 = 2; lambda_p = 3 gives 6. The losing side is not looked at."""
    scored = Scored(answers((-6, 3, 9), (-2, 1, 9)), None)
    assert sft(scored, settings("sft", pos_loss_weight=3.0)).item() == pytest.approx(6.0)


def test_spilt_batch_hinge() -> None:
    """L_p = (6 + 2)/4 = 2, L_n = (2 + 7)/4 = 2.25; gap .25, theta .5: 1*2 + .5*2.25 + 4*relu(.5 - .25) = 4.125."""
    scored = Scored(answers((-6, 3, 9), (-2, 1, 9)), answers((-2, 1, 9), (-7, 3, 9)))
    s = settings(pos_loss_weight=1.0, neg_loss_weight=0.5, margin_penalty_weight=4.0, margin_threshold=0.5)
    assert spilt(scored, s).item() == pytest.approx(4.125)


def test_spilt_pair_hinge() -> None:
    """The same pairs one by one: losses 2, 2 and 2, 7/3; gaps 0 and 1/3; hinges .5 and 1/6, mean 1/3: 3.125 + 4/3."""
    scored = Scored(answers((-6, 3, 9), (-2, 1, 9)), answers((-2, 1, 9), (-7, 3, 9)))
    s = settings(pos_loss_weight=1.0, neg_loss_weight=0.5, margin_penalty_weight=4.0, margin_threshold=0.5, hinge="pair")
    assert spilt(scored, s).item() == pytest.approx(3.125 + 4 / 3)


@pytest.mark.parametrize(("gap", "hinge"), [(1.0, 0.0), (0.5, 0.0), (0.2, 0.3), (-1.0, 1.5)])
def test_spilt_hinge_is_closed_beyond_the_threshold(gap: float, hinge: float) -> None:
    """theta = .5, gamma = 2, L_p = 1, lambda_n = 0: 1 + 2 relu(.5 - gap)."""
    s = settings(neg_loss_weight=0.0, margin_penalty_weight=2.0, margin_threshold=0.5)
    assert spilt(pair_of(1.0, 1.0 + gap), s).item() == pytest.approx(1 + 2 * hinge)


def test_spilt_reference_term() -> None:
    """L_p = 2 against 1.5 before: worse by .5; L_n = 3 against 4: better, 0. Weight .3: + .15."""
    scored = pair_of(2.0, 3.0)._replace(ref_winning=answers((-1.5, 1, 5)), ref_losing=answers((-4, 1, 5)))
    without, with_term = (settings(margin_threshold=0.0, ref_loss_weight=w) for w in (0.0, 0.3))
    assert spilt(scored, with_term).item() - spilt(scored, without).item() == pytest.approx(0.15)
    assert METHODS["spilt"].needs_reference(with_term) and not METHODS["spilt"].needs_reference(without)


# log p(w) = -4 over a sequence of 8 tokens, log p(l) = -6 over 10; before steering -5 and -3
REPS_PAIR = Scored(answers((-4, 2, 8)), answers((-6, 3, 10)), answers((-5, 2, 8)), answers((-3, 3, 10)))
REPS_CASES: dict[str, tuple[dict[str, float], float]] = {
    # R = .7 * (-3 + 5) = 1.4; D = 1.4 * -4/8 + 6/10 = -.1
    "scaled_simpo": ({"simpo_scaler": 0.7, "beta": 9.0, "gemma": 9.0}, -log(sigmoid(-0.1))),
    # beta (-4/8 + 6/10) - gemma = .5 * .1 - .2
    "simpo": ({"beta": 0.5, "gemma": 0.2}, -log(sigmoid(-0.15))),
    # r_w = 1, r_l = -3; D = .5 * 4 = 2, one in ten the wrong way round
    "dpo": ({"beta": 0.5, "label_smoothing": 0.1}, -0.9 * log(sigmoid(2.0)) - 0.1 * log(sigmoid(-2.0))),
    # (4 - 1/(2 * .5))^2
    "ipo": ({"beta": 0.5, "label_smoothing": 0.1}, 9.0),
    # log sigmoid(.5 * -3) - log sigmoid(.5 * 1)
    "apo_zero": ({"beta": 0.5}, log(sigmoid(-1.5)) - log(sigmoid(0.5))),
}


def test_every_loss_type_is_worked() -> None:
    assert set(REPS_CASES) == set(LOSS_TYPES)


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_reps_by_hand(loss_type: str) -> None:
    knobs, expected = REPS_CASES[loss_type]
    s = settings("reps", loss_type=loss_type, **knobs)
    assert reps(REPS_PAIR, s).item() == pytest.approx(expected, rel=1e-6)
    assert METHODS["reps"].needs_reference(s) == (loss_type != "simpo")
    # two pairs: the mean
    both = Scored(*(AnswerLogProbs(*(torch.cat([column, column]) for column in part)) for part in REPS_PAIR if part is not None))
    assert reps(both, s).item() == pytest.approx(expected, rel=1e-6)


def test_scaled_simpo_is_never_scaled_down() -> None:
    """R = 1 * (-5 + 3) = -2 is raised to 1: D = -4/8 + 6/10 = .1."""
    scored = REPS_PAIR._replace(ref_winning=REPS_PAIR.ref_losing, ref_losing=REPS_PAIR.ref_winning)
    assert reps(scored, settings("reps")).item() == pytest.approx(-log(sigmoid(0.1)), rel=1e-6)


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.loss and not row.adapters])
def test_no_gradient_reaches_the_reference(method: str) -> None:
    for given in [{"loss_type": kind} for kind in LOSS_TYPES] if method == "reps" else [{"ref_loss_weight": 0.5}]:
        parts = [answers((-4, 2, 8)), answers((-6, 3, 10))]
        reference = [answers((-5.0, 2, 8)), answers((-3.0, 3, 10))]
        detached = [AnswerLogProbs(*(c.detach() for c in part)) for part in reference]
        loss = METHODS[method].loss
        assert loss is not None
        loss(Scored(*parts, *detached), settings(method, **given)).backward()
        assert parts[0].total.grad is not None


# ---------------------------------------------------------------- batches and schedule


@pytest.mark.parametrize(
    ("pairs", "away", "expected"),
    [
        (("orig_add",), "normal", [(6, 7, 1)]),
        (("orig_add", "orig_sub"), "normal", [(6, 7, 1), (7, 6, -1)]),
        (("orig_sub", "orig_add"), "normal", [(7, 6, -1), (6, 7, 1)]),
        (("orig_add", "orig_sub"), "null_it_out", [(6, 7, 1), (7, 6, 0)]),
    ],
)
def test_entries_of_a_row(pairs: tuple[str, ...], away: str, expected: list[tuple[int, int, int]]) -> None:
    """Row 3: sequence 6 is its matching answer, 7 the other. orig_sub swaps the roles at -s, or removes the component."""
    assert [tuple(e) for e in training.entries(3, settings(preference_pairs=pairs, substraction_type=away))] == expected


def test_epoch_order_depends_on_seed_and_epoch_alone() -> None:
    orders = [training.epoch_order(50, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    torch.manual_seed(7)
    assert orders == [training.epoch_order(50, seed, epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4 and list(range(50)) not in orders


def cache(rows: int, layer: int = LAYER, read_point: str | None = None) -> activations.Activations:
    """Random pairs of differing lengths on a tiny model."""
    lengths = [6 + (5 * i) % 7 for i in range(2 * rows)]
    ids, _ = token_rows(lengths, seed=rows)
    sequences = [Encoded(tuple(ids[i, :n].tolist()), 3 + i % 2, 1) for i, n in enumerate(lengths)]
    return activations.record(model("qwen2"), layer, sequences, (read_point,) if read_point else (), 0, together=2)


def job(s: FitSettings, rows: int, seed: int = 1) -> training.Fit:
    read_point = s.intervention_components if INTERVENTIONS[s.intervention_method].reads else None
    made = intervention(s.intervention_method, read_point, dropout=s.dropout, seed=seed)
    return training.Fit(model("qwen2"), Steering.of({LAYER: made}), cache(rows, read_point=read_point), s, METHODS[s.method], 1)


def watch(fit: training.Fit) -> list[tuple[list[training.Entry], float]]:
    """Every minibatch that `fit` scores, with its loss."""
    seen: list[tuple[list[training.Entry], float]] = []
    plain: Callable[[list[training.Entry], AnswerLogProbs], Tensor] = fit.loss

    def loss(minibatch: list[training.Entry], scored: AnswerLogProbs) -> Tensor:
        value = plain(minibatch, scored)
        seen.append((minibatch, value.item()))
        return value

    fit.loss = loss  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize(
    ("rows", "batch", "accumulation", "epochs", "steps_each"),
    [(8, 4, 1, 2, 2), (7, 3, 2, 2, 2), (1, 4, 6, 3, 1), (9, 2, 6, 2, 1), (5, 4, 1, 1, 2), (5, 2, 2, 4, 2)],
)
def test_every_row_is_shown_and_the_schedule_covers_the_steps_taken(
    rows: int, batch: int, accumulation: int, epochs: int, steps_each: int
) -> None:
    """ceil(ceil(rows / batch) / accumulation) steps an epoch: a short batch and a short group are used, not dropped.

    (7, 3, 2): batches 3 3 1, groups [3 3] [1]; (9, 2, 6): five batches, fewer than accumulated, still one step.
    """
    s = settings(batch_size=batch, gradient_accumulation_steps=accumulation, n_epochs=epochs, lr=0.01, dropout=0.0)
    fit = job(s, rows)
    seen = watch(fit)
    log_rows = training.fit(fit)
    steps = steps_each * epochs
    assert len(log_rows) == steps
    assert [row["lr"] for row in log_rows] == pytest.approx([0.01 * (1 - k / steps) for k in range(steps)])
    assert [row["step"] for row in log_rows] == list(range(steps))
    assert [row["epoch"] for row in log_rows] == [k // steps_each for k in range(steps)]
    shown = [entry for minibatch, _ in seen for entry in minibatch]
    assert len(shown) == 2 * rows * epochs and all(len(minibatch) <= batch for minibatch, _ in seen)
    for epoch in range(epochs):  # every pair once in each direction, in the order of the epoch
        part = shown[2 * rows * epoch : 2 * rows * (epoch + 1)]
        order = training.epoch_order(rows, s.seed, epoch)
        assert part == [entry for row in order for entry in training.entries(row, s)]


def test_minibatch_losses_are_divided_by_what_is_there() -> None:
    """7 rows, batch 3, accumulation 2, both directions: batch 3 -> 6 entries -> 2 minibatches; batch 1 -> 2 entries -> 1.

    Step 0 = sum over its 4 minibatches / (2 * 2); step 1 = the one minibatch / (1 * 1), not / 2.
    """
    s = settings(batch_size=3, gradient_accumulation_steps=2, n_epochs=1, dropout=0.0)
    fit = job(s, 7)
    seen = watch(fit)
    log_rows = training.fit(fit)
    assert [len(minibatch) for minibatch, _ in seen] == [3, 3, 3, 3, 2]
    losses = [value for _, value in seen]
    assert log_rows[0]["loss"] == pytest.approx(sum(losses[:4]) / 4)
    assert log_rows[1]["loss"] == pytest.approx(losses[4])


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if row.loss and not row.adapters])
def test_one_step_is_adamw_on_the_clipped_gradient(method: str) -> None:
    """A single row, one step of AdamW by hand: m / sqrt(v) = sign-like g / (|g| + eps), weight decay 0."""
    s = settings(method, batch_size=4, n_epochs=1, lr=0.05, dropout=0.0, steering_factors=(1.0,), preference_pairs=("orig_add",))
    fit = job(s, 1)
    before = fit.intervention.v.detach().clone()  # type: ignore[union-attr]
    loss, (gradient,) = fit.gradients(training.entries(0, s), 1)
    norm = gradient.norm()
    clipped = gradient * min(1.0, float(1.0 / (norm + 1e-6)))
    expected = before - 0.05 * clipped / (clipped.abs() + 1e-8)
    again = job(s, 1)
    (row,) = training.fit(again)
    assert row["loss"] == pytest.approx(loss, rel=1e-6) and row["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
    torch.testing.assert_close(again.intervention.v.detach(), expected, atol=1e-5, rtol=0)  # type: ignore[union-attr]


@pytest.mark.parametrize(("method", "form"), [(m, f) for m, f in PAIRS if METHODS[m].loss])
def test_fitting_lowers_the_loss(method: str, form: str) -> None:
    s = settings(method, form, batch_size=6, n_epochs=8, lr=0.05, dropout=0.0, steering_factors=(1.0,), preference_pairs=("orig_add",))
    log_rows = training.fit(job(s, 6))
    assert len(log_rows) == 8
    assert log_rows[-1]["loss"] < log_rows[0]["loss"] - 0.05


def test_factors_are_drawn_for_each_side_unless_shared() -> None:
    for shared in (False, True):
        s = settings(shared_factor=shared, batch_size=40, n_epochs=1, dropout=0.0, preference_pairs=("orig_add", "orig_sub"))
        fit = job(s, 20)
        multipliers = fit.draw_rows([e for row in range(20) for e in training.entries(row, s)]).multiplier.tolist()
        winning, losing = multipliers[:40], multipliers[40:]
        assert (winning == losing) == shared
        assert {abs(m) for m in winning + losing} == set(s.steering_factors)
        assert all((m > 0) == (i % 2 == 0) for i, m in enumerate(winning)) and all((m > 0) == (i % 2 == 0) for i, m in enumerate(losing))


@pytest.mark.parametrize(
    ("method", "form", "dropout"),
    [(m, f, p) for m, f in PAIRS if METHODS[m].loss for p in ((0.0, 0.3) if f == "vector" else (0.0,))],  # the others' masks are [B, T, D]
)
@pytest.mark.few(4)
def test_gradients_do_not_depend_on_how_many_rows_are_scored_together(method: str, form: str, dropout: float) -> None:
    """Rows a few at a time, blocks run once or twice: autograd's gradient of the whole minibatch (a vector's dropout mask is one)."""
    s = settings(method, form, dropout=dropout, preference_pairs=("orig_add", "orig_sub"))
    minibatch = [entry for row in range(3) for entry in training.entries(row, s)]
    found = []
    for at_once, twice in ((1 << 30, False), (5, False), (2, False), (1, False), (1, True), (4, True)):
        fit = job(s, 3)
        fit.intervention.train()
        fit.at_once, fit.checkpointed = at_once, twice
        torch.manual_seed(3)
        found.append((*fit.gradients(minibatch, 2), torch.rand(1)))
    fit = job(s, 3)
    fit.intervention.train()
    torch.manual_seed(3)
    drawn, tiny = fit.draw_rows(minibatch), model("qwen2")
    sequences = [fit.cache.sequences[i] for i in drawn.indices]
    tokens, positions = pad(sequences, 0), position_mask(sequences, "skip_prefix", 1) if form == "vector" else None
    shown = training.Mixed(fit.intervention, drawn.removed)
    with hooks.attach(tiny, [hooks.Applied(LAYER, shown, drawn.multiplier[:, None, None], positions)]):
        logits = tiny(input_ids=tokens.input_ids, use_cache=False).logits[scoring.scored_positions(tokens.answer_mask)]
    length = torch.tensor([len(s.input_ids) for s in sequences])
    loss = fit.loss(minibatch, scoring.answer_logprobs(logits, tokens.input_ids, tokens.answer_mask, length)) / 2
    whole = torch.autograd.grad(loss, list(fit.intervention.parameters()))
    for value, grads, after in found:
        assert value == pytest.approx(loss.item(), rel=1e-6)
        assert torch.equal(after, found[0][2])  # the same random numbers were used up
        for a, b in zip(grads, whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * max(1.0, float(b.abs().max())))


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_the_graph_is_lean(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the MLP's activation returned is not kept; the gradient is the same, bit for bit."""
    tiny, hooks_of = model(family), torch.autograd.graph.saved_tensors_hooks
    sequences = [Encoded(tuple(range(3, 13)), 5, 0), Encoded(tuple(range(3, 15)), 5, 0)]
    kept = activations.record(tiny, LAYER, sequences, (), 0)
    tokens, seen = kept.batch([0, 1], None, torch.device("cpu"))

    def gradient(graph: Any) -> Tensor:
        leaf = seen.h.clone().requires_grad_()
        with graph:
            logits = suffix.logits(tiny, LAYER, leaf, scoring.scored_positions(tokens.answer_mask))
        return torch.autograd.grad(logits.logsumexp(-1).sum(), [leaf])[0]

    counts = []

    def counting(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        held = dict[int, int]()
        counts.append(held)

        def note(t: Tensor) -> Any:
            found = pack(t)
            if isinstance(found, Tensor):
                held[found.untyped_storage().data_ptr()] = found.untyped_storage().nbytes()
            return found

        return hooks_of(note, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", counting)
    plain, spare = gradient(counting(lambda t: t, lambda t: t)), gradient(recompute_activations())
    assert torch.equal(plain, spare) and plain.abs().max() > 0
    inner = tiny.config.intermediate_size  # type: ignore[union-attr]
    blocks = LAYERS - LAYER - 2  # the last block's MLP sees fewer tokens
    spared = sum(counts[0].values()) - sum(counts[1].values())
    assert spared >= blocks * tokens.input_ids.numel() * inner * 4


def test_a_gradient_that_is_no_number_stops_the_fit() -> None:
    s = settings(batch_size=2, n_epochs=1, dropout=0.0)
    fit = job(s, 2)
    with torch.no_grad():
        fit.intervention.v.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(FloatingPointError, match="lower lr"):
        training.fit(fit)


# ---------------------------------------------------------------- reproducible, and going on after a stop


def bytes_of(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.few(2)
def test_a_resumed_fit_ends_bit_for_bit_where_the_whole_one_does(form: str, dropout: float) -> None:
    """From the state after each step, stored and read with weights_only; dropout and factors go on where they were."""
    s = settings("spilt", form, batch_size=2, n_epochs=4, lr=0.02, dropout=dropout, gradient_accumulation_steps=2)
    whole, states = job(s, 5), []
    log_rows = training.fit(whole, checkpoint=lambda state: states.append(bytes_of(state())))
    final = {name: value.clone() for name, value in whole.intervention.state_dict().items()}
    assert len(states) == 7 and len(log_rows) == 8
    for state in states:
        again = job(s, 5, seed=77)  # another start, which the state replaces
        torch.manual_seed(123)
        kept = training.fit(again, resume=torch.load(io.BytesIO(state), weights_only=True))
        assert kept == log_rows
        assert all(torch.equal(value, final[name]) for name, value in again.intervention.state_dict().items())


@pytest.mark.parametrize("form", FORMS)
def test_equal_seeds_give_equal_results_whatever_came_before(form: str) -> None:
    results = []
    for noise, seed in ((1, 42), (2, 42), (1, 43)):
        fit = job(settings("sft", form, batch_size=2, n_epochs=2, dropout=0.2, seed=seed), 5)
        torch.manual_seed(noise)
        before = torch.get_rng_state()
        training.fit(fit)
        assert torch.equal(torch.get_rng_state(), before)  # the global generator is given back as it was
        assert not fit.intervention.training
        results.append([p.detach().clone() for p in fit.intervention.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(results[0], results[2], strict=True))
