"""What a method is handed, and its row of the table."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, NamedTuple

from spilt.cell import FORMS

if TYPE_CHECKING:
    from torch import Tensor

    from spilt.methods.scoring import AnswerLogProbs
    from spilt.settings import FitSettings


class Scored(NamedTuple):
    """A minibatch of n pairs: the two answers steered, and (where the method needs it) unsteered. losing may be unused."""

    winning: AnswerLogProbs
    losing: AnswerLogProbs | None
    ref_winning: AnswerLogProbs | None = None
    ref_losing: AnswerLogProbs | None = None


DIRECTIONS = ("vector", "ablation")  # what a direction of the stream can be used as


def always(_: FitSettings) -> bool:
    return True


def never(_: FitSettings) -> bool:
    return False


class Method(NamedTuple):
    """A row of the table: what the method needs, and which forms it can find."""

    name: str
    summary: str
    loss: Callable[[Scored, Any], Tensor] | None = None  # trained: the objective of a minibatch
    estimate: Callable[[Tensor, Tensor], Tensor] | None = None  # closed form: [n, D] of both answers -> v [D]
    forms: Collection[str] = FORMS  # which it can find; all of them
    why: str = ""  # why the other forms are left out
    needs_losing: Callable[[FitSettings], bool] = always
    needs_reference: Callable[[FitSettings], bool] = never
    in_all: bool = True  # a word `all` means it too (the released methods)
    adapters: bool = False  # trained: two adapters of linear maps, one on each side's answers, whose difference it is
    one_side: bool = False  # trained: a pair is shown in one of `preference_pairs`, drawn each time, and not in all of them
    against_neutral: bool = False  # closed form: the second argument is of neutral text, not of the not-matching answers
