"""One Steering on one model, or the unsteered model behind a prompt, asked: its answers, what the unsteered model makes of them, and by a
behaviour's rules what they show."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from spilt import api
from spilt.analysis import behaviour as rules
from spilt.analysis import texts as texts_alone
from spilt.analysis.chosen import Point
from spilt.behaviour.files import ANSWERS, COLUMNS, Asked, Behaviour, Incoherence, Rated
from spilt.data.chat import Chat, Conversation, Encoded, Question, readable
from spilt.data.prompt_baseline import behind
from spilt.engine import divergence, dose, sampling, whole
from spilt.engine.prompts import Row
from spilt.errors import NotFinite, UserError, printable
from spilt.judges import Judge
from spilt.model import host
from spilt.steering import anatomy, hooks
from spilt.steering.steering import Steering

Verdict = str | None  # of rules.VERDICTS; None: no judge could tell


class Answer(NamedTuple):
    """A text; the mean of -log p of its tokens by the unsteered model; KL(steered || unsteered) at each, where it was asked for. Nats."""

    text: str
    surprise: float
    kl: npt.NDArray[np.float64] | None = None

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.surprise, 700.0))


class Probe:
    """Everything that is asked of a Steering; what was answered once is kept.

    progress: hears how many answers have been made. judge: rates them, where a behaviour has a rubric.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        steering: Steering,
        *,
        seed: int = 42,
        batch_size: int | None = None,
        use_chat_template: bool = True,
        system_prompt: str = "",
        engine: str = "fast",
        judge: Judge | None = None,
        progress: Callable[[int], Any] = lambda count: None,
        **params: Any,
    ) -> None:
        self.model, self.tokenizer, self.steering = model, tokenizer, steering.to(model)
        self.seed, self.batch_size, self.engine, self.progress, self.params = seed, batch_size, engine, progress, params
        self.chat = Chat.of(tokenizer, use_chat_template, system_prompt)
        self.pad = host.pad_id(tokenizer)
        self.kept: dict[tuple[int, str, float, int], Answer] = {}
        self.turns: Conversation = ()  # of a prompt before all that is asked
        self.plain = self  # what is asked without them
        self.judge = judge
        self.ratings: dict[tuple[str, ...], int | None] = {}  # by what the judge was asked; None: missing

    def behind(self, turns: Conversation) -> Probe:
        """The unsteered model behind a prompt, at m = 0 alone: KL(behind it || without it), and losses without it."""
        found = copy.copy(self)
        found.turns, found.plain, found.kept, found.steering = turns, self, {}, Steering.nothing(self.model)
        return found

    def _asked(self, text: Question) -> Question:
        return behind(self.turns, text, self.chat.system_prompt or "") if self.turns else text

    def prompts(self, texts: Sequence[Question], new: int) -> list[tuple[int, ...]]:
        """Their tokens. Raises UserError for one that leaves no room for an answer in the model's context."""
        ids, context = [tuple(self.chat.prompt_ids(self._asked(text))) for text in texts], anatomy.context(self.model)
        for text, own in zip(texts, ids, strict=True):
            if context is not None and len(own) + new > context:
                raise UserError(
                    f"the prompt '{printable(readable(text)[:40])}' of {len(own)} tokens and an answer of {new} exceed the model's "
                    f"context of {context}; shorten the prompt, or lower max_new_tokens"
                )
        return ids

    def answers(self, texts: Sequence[str], m: float, new: int, kl: bool = False) -> list[Answer]:
        """An answer of at most `new` tokens to each prompt, by the decoding of `params`."""
        self.fetch([(texts, kl)], m, new)
        return [self.kept[i, text, m, new] for i, text in enumerate(texts)]

    def fetch(self, sets: Sequence[tuple[Sequence[str], bool]], m: float, new: int) -> None:
        """The answers to several sets of prompts side by side, those that are not there yet; and KL for the sets that want it."""
        wanted = {(i, text): False for texts, _ in sets for i, text in enumerate(texts)}
        wanted |= {(i, text): True for texts, kl in sets for i, text in enumerate(texts) if kl}
        known = {key: self.kept.get((*key, m, new)) for key in wanted}
        todo = [key for key, kl in wanted.items() if (there := known[key]) is None or kl and there.kl is None]
        if not todo:
            return
        prompts = self.prompts([text for _, text in todo], new)
        how = sampling.decoding(self.params | {"max_new_tokens": new}, self.model, self.tokenizer)
        rows = [Row(prompt, m, f"{self.seed}/{i}/0") for prompt, (i, _) in zip(prompts, todo, strict=True)]
        made = api.new_tokens(self.model, self.steering, rows, how, self.engine, self.batch_size)
        full = [Encoded((*prompt, *made[k]), len(prompt), 0) for k, prompt in enumerate(prompts)]
        if self.turns:  # the same answers, as the model without the prompt reads them
            bare = self.plain.prompts([text for _, text in todo], new)
            plain = [Encoded((*prompt, *made[k]), len(prompt), 0) for k, prompt in enumerate(bare)]
        else:
            plain = full
        losses: dict[int, float] = {}
        changes: dict[int, npt.NDArray[np.float64]] = {}
        with api.frozen(self.model), torch.no_grad():
            measured = [k for k, key in enumerate(todo) if wanted[key]]
            if measured:
                own, base = [full[k] for k in measured], [plain[k] for k in measured]
                if self.turns:
                    found = divergence.compared(self.model, lambda _: hooks.attach(self.model, []), own, base, self.pad)
                else:
                    found = divergence.told(self.model, self.steering, m, own, self.pad)
                for k, one in zip(measured, found, strict=True):
                    losses[k], changes[k] = float(one.loss.mean()), one.kl.numpy()
            rest = [k for k in range(len(todo)) if k not in losses]
            together = divergence.at_once(self.model, plain)
            for part in (rest[begin : begin + together] for begin in range(0, len(rest), together)):
                scored = whole.score(self.model, None, 0.0, [plain[k] for k in part], self.pad)
                losses |= dict(zip(part, (-scored.total.double() / scored.tokens).tolist(), strict=True))
        for k, key in enumerate(todo):
            text = self.tokenizer.decode(made[k], skip_special_tokens=True)
            self.kept[(*key, m, new)] = Answer(text, losses[k], changes.get(k))
        self.progress(len(todo))

    def kl(self, texts: Sequence[str], m: float, new: int) -> list[npt.NDArray[np.float64]]:
        """KL(steered || unsteered) at each token of each answer."""
        return [answer.kl for answer in self.answers(texts, m, new, kl=True) if answer.kl is not None]

    def doses_on(self, texts: Sequence[Question]) -> float:
        """The dose of multiplier 1 over the tokens of the first of these prompts."""
        tokens = [Encoded(ids, len(ids), 0) for ids in self.prompts(texts, 0)]
        with api.frozen(self.model):
            return dose.of(self.steering, dose.streams(self.model, self.steering, tokens, self.pad))

    # ---- a behaviour

    def verdicts(self, behaviour: Behaviour, asked: Sequence[Asked], m: float) -> list[Verdict]:
        """What each prompt's answer shows at a multiplier."""
        if behaviour.judge.kind == "first_token":
            odds = self.log_probs(behaviour, asked, m)
            return [
                rules.INCOHERENT if math.exp(a) + math.exp(b) < behaviour.incoherent.mass else rules.SHOWS if a > b else rules.ABSENT
                for a, b in odds
            ]
        texts = [one.text for one in asked]
        usual = float(np.median([answer.perplexity for answer in self.plain.answers(texts, 0.0, behaviour.max_new_tokens)]))
        answers = self.answers(texts, m, behaviour.max_new_tokens)
        return self.judged(behaviour, texts, [answer.text for answer in answers], [answer.perplexity / usual for answer in answers])

    def broken(self, limits: Incoherence, texts: Sequence[str], perplexity_times: Sequence[float]) -> list[bool]:
        """Which are no answers any more; perplexity_times: of each, beside what is usual."""
        return [
            len(rules.words(text)) < limits.least_words
            or (limits.repetition is not None and (texts_alone.repetition(text) or 0.0) > limits.repetition)
            or (limits.perplexity_times is not None and not times <= limits.perplexity_times)  # nan is not
            or (limits.regex is not None and rules.found(limits.regex, text))
            for text, times in zip(texts, perplexity_times, strict=True)
        ]

    def judged(
        self, behaviour: Behaviour, prompts: Sequence[str], texts: Sequence[str], perplexity_times: Sequence[float]
    ) -> list[Verdict]:
        """The rules of a behaviour on any answers. Of one that is broken nobody is asked what it shows."""
        broken = self.broken(behaviour.incoherent, texts, perplexity_times)
        there = [i for i, bad in enumerate(broken) if not bad]
        told = dict(zip(there, self._shown(behaviour, [prompts[i] for i in there], [texts[i] for i in there]), strict=True))
        found = [told.get(i, (False, False)) for i in range(len(texts))]
        return [
            rules.INCOHERENT if not answered else None if shows is None else rules.SHOWS if shows else rules.ABSENT
            for shows, answered in found
        ]

    def perplexity_times(self, behaviour: Behaviour, prompts: Sequence[str], texts: Sequence[str]) -> list[float]:
        """Of texts from elsewhere: their perplexity beside the median of the unsteered model's own answers."""
        there = [i for i, text in enumerate(texts) if text.strip()]
        both = [self.chat.encode(prompts[i], texts[i], 10**9) for i in there]
        bare = [Encoded(one.input_ids[: len(one.input_ids) - one.suffix_length], one.prompt_length, 0) for one in both]
        with api.frozen(self.model):
            told = divergence.told(self.model, self.steering, 0.0, bare, self.pad) if bare else ()
            found = {i: Answer(texts[i], float(one.loss.mean())).perplexity for i, one in zip(there, told, strict=True)}
        asked = [one.text for one in behaviour.reported_on]
        usual = float(np.median([answer.perplexity for answer in self.answers(asked, 0.0, behaviour.max_new_tokens)]))
        return [found[i] / usual if i in found else math.inf for i in range(len(texts))]

    def _shown(self, behaviour: Behaviour, prompts: Sequence[str], texts: Sequence[str]) -> list[tuple[bool | None, bool]]:
        """(whether it shows the behaviour, None: no rating; whether it is an answer of the kind that is asked for)."""
        kind, rule = behaviour.judge
        if kind == "rubric":
            return [(None if rating is None else rating >= rule.at_least, True) for rating in self._rated(rule, prompts, texts)]
        if kind == "yes_no":
            said = [texts_alone.begins_with(text, rule, "no" if rule == "yes" else "yes") for text in texts]
            return [(bool(one), one is not None) for one in said]
        by = {"keywords": lambda text: bool(rules.shows(text, None, rule)), "regex": lambda text: rules.found(rule, text)}[kind]
        return [(by(text), True) for text in texts]

    def _rated(self, rule: Rated, prompts: Sequence[str], texts: Sequence[str]) -> list[int | None]:
        if self.judge is None:
            raise UserError(f"the rubric {rule.rubric.name} is asked of a judge, and there is none")
        asked = [rule.rubric.messages(question=q, answer=a, concept=rule.concept) for q, a in zip(prompts, texts, strict=True)]
        keys = [tuple(turn["content"] for turn in turns) for turns in asked]
        todo = {key: turns for key, turns in zip(keys, asked, strict=True) if key not in self.ratings}
        for key, reply in zip(todo, self.judge.judge([*todo.values()], rule.rubric.parameters), strict=True):
            self.ratings[key] = None if reply is None else rule.rubric.rating(reply)
        return [self.ratings[key] for key in keys]

    @property
    def unrated(self) -> tuple[int, int]:
        """Answers without a rating, of how many."""
        return sum(rating is None for rating in self.ratings.values()), len(self.ratings)

    def log_probs(self, behaviour: Behaviour, asked: Sequence[Asked], m: float) -> list[tuple[float, float]]:
        """log p of the first token of the answer that shows the behaviour, and of the other one; of (A) and (B) of the letter."""
        rule = behaviour.judge.rule
        self.prompts([one.text for one in asked], 1)
        contexts, tokens = list[Encoded](), list[list[int]]()
        for one in asked:  # a data file's answers stand as they are fitted and measured, spaces too
            pair = [str(one.row[name]) for name in ANSWERS] if rule == COLUMNS else [answer.strip() for answer in rule]
            sides = [self.chat.encode(self._asked(one.text), answer, 10**9) for answer in pair]
            start = min(side.prompt_length for side in sides)
            contexts.append(Encoded(sides[0].input_ids[:start], start, 0))
            tokens.append([side.input_ids[start] for side in sides])
            if tokens[-1][0] == tokens[-1][1]:
                raise UserError(f"{behaviour.name}: {pair[0]!r} and {pair[1]!r} begin with the same token; first_token wants others")
        with api.frozen(self.model):
            scores = [*divergence.next_token(self.model, self.steering, m, contexts, self.pad)]
        return [(float(log_p[first]), float(log_p[other])) for (first, other), log_p in zip(tokens, scores, strict=True)]

    def point(self, behaviour: Behaviour, m: float) -> Point:
        """On the prompts on which strengths are chosen, and on benign ones. A model that breaks down has failed everywhere."""
        try:
            benign = [one.text for one in behaviour.benign]
            texts = [] if behaviour.judge.kind == "first_token" else [one.text for one in behaviour.chosen_on]
            self.fetch([(texts, False), (benign, True)], m, behaviour.max_new_tokens)
            verdicts = self.verdicts(behaviour, behaviour.chosen_on, m)
        except NotFinite:
            return Point(m, 0.0, 1.0, math.inf)
        told = [verdict for verdict in verdicts if verdict is not None]
        if not told:
            raise UserError(f"{behaviour.name}: no answer at multiplier {m:.4g} has a rating; judge {self.judge and self.judge.tally}")
        wanted, broken = (sum(one == word for one in told) / len(told) for word in (behaviour.want, rules.INCOHERENT))
        return Point(m, wanted, broken, float(np.concatenate(self.kl(benign, m, behaviour.max_new_tokens)).mean()))
