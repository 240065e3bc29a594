"""Questions and answers as token ids: the chat template, its prefix and suffix, and where the answer begins.

    | BOS user turn ... | question | end of turn, model turn | answer | end of turn |
    |<- prefix_length ->|                                    |        |<- suffix ->|
    |<----------------- prompt_length ---------------------->|<- scored tokens --->|

The released code's way (methods.md, section 3): prompt and answer are tokenised as one string, and the scored tokens are
those after the prompt's own token count. No torch and no transformers here: a tokenizer is handed in.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import combinations
from typing import Any, NamedTuple

from spilt.errors import UserError, first_line

Conversation = tuple[tuple[str, str], ...]  # (role, text) of each turn: perhaps a system turn, then user and assistant, the user's last
Question = str | Conversation
SYSTEM = "system"
LETTER = re.compile(r"\s*\((\w)\)\s*")  # an answer of one choice


def readable(question: Question) -> str:
    """A question as a person reads it: its text, or a conversation's turns by their roles."""
    if isinstance(question, str):
        return question
    return question[0][1] if len(question) == 1 else "\n\n".join(f"{role}: {text}" for role, text in question)


def bare(question: Question) -> Question:
    """A question without its system prompt."""
    turns = (("user", question),) if isinstance(question, str) else question[question[0][0] == SYSTEM :]
    return turns[0][1] if len(turns) == 1 else turns


class Encoded(NamedTuple):
    """Prompt and answer as tokens, unpadded."""

    input_ids: tuple[int, ...]
    prompt_length: int  # the labels are the tokens from this index on
    suffix_length: int  # how many of the last tokens are the template's suffix; 0 when truncated away
    prefix_length: int | None = None  # of a question with a system prompt of its own; None: the chat's

    def prefix(self, shared: int) -> int:
        """Leading tokens that are the template's; shared: those of the chat."""
        return shared if self.prefix_length is None else self.prefix_length


@dataclass(frozen=True)
class Chat:
    """How one tokenizer turns questions into prompts. Make it with `Chat.of`."""

    tokenizer: Any = field(repr=False)
    use_template: bool
    system_prompt: str | None
    bos_ids: tuple[int, ...]  # what the tokenizer itself puts before a text (BOS); never added to one that has it
    prefix_length: int = 0  # leading tokens shared by two different one-letter user turns; no template: len(bos_ids)
    suffix: str = ""  # what the template puts after a turn's text (end of turn), as text and as tokens
    suffix_ids: tuple[int, ...] = ()
    vocabulary: int | None = None  # token ids that the model knows, where a model is at hand: others are refused
    prefixes: dict[str, int] = field(default_factory=dict, repr=False, compare=False)  # those found, by system prompt

    @classmethod
    def of(cls, tokenizer: Any, use_chat_template: bool = True, system_prompt: str | None = None) -> Chat:
        """Look at the tokenizer's template. A tokenizer without one, or `use_chat_template` False, means raw text.

        Raises UserError when the template refuses a single user turn, or all letters are one token to the tokenizer.
        """
        chat = cls(tokenizer, use_chat_template and bool(tokenizer.chat_template), system_prompt or None, _bos_ids(tokenizer))
        if not chat.use_template:
            return replace(chat, prefix_length=len(chat.bos_ids))
        prefix, letters = chat._prefix(())
        turns = [chat._ids(chat._render(letter, ask=False))[::-1] for letter in letters]
        suffix_ids = _shared(turns)[::-1]
        suffix = tokenizer.decode(list(suffix_ids), skip_special_tokens=False) if suffix_ids else ""
        return replace(chat, prefix_length=prefix, suffix=suffix, suffix_ids=suffix_ids)

    @cached_property
    def folds_system(self) -> bool:
        """The template has no system role: the system prompt begins the first user turn."""
        return not (self.use_template and _takes_system(self.tokenizer, self.system_prompt or "b"))

    def prefix_of(self, question: Question) -> int | None:
        """Leading tokens that two one-letter questions share under this one's own system prompt; None where it has none."""
        if isinstance(question, str) or question[0][0] != SYSTEM or not self.use_template:
            return None
        if question[0][1] not in self.prefixes:
            self.prefixes[question[0][1]] = self._prefix(question[:1])[0]
        return self.prefixes[question[0][1]]

    def prefixes_of(self, questions: Iterable[Question]) -> list[int]:
        """Of each question, the chat's own where it has no system prompt."""
        return [self.prefix_length if (own := self.prefix_of(question)) is None else own for question in questions]

    def _prefix(self, before: Conversation) -> tuple[int, tuple[str, str]]:
        """Its length, and the first two letters that differ to this tokenizer; nearly always a and b."""
        for letters in combinations(string.ascii_lowercase, 2):
            prompts = [self._ids(self._render((*before, ("user", letter)), ask=True)) for letter in letters]
            if prompts[0] != prompts[1]:
                return len(_shared(prompts)), letters
        raise UserError("every letter is the same token to this tokenizer (all unknown?); take the tokenizer that belongs to the model")

    def prompt_text(self, question: Question) -> str:
        """The prompt as text, generation prompt included, without a leading BOS (tokenising adds it)."""
        text, bos = self._render(question, ask=True), self.tokenizer.bos_token
        return text[len(bos) :] if self.use_template and bos and text.startswith(bos) else text

    def prompt_ids(self, question: Question) -> list[int]:
        """The tokens that generation feeds; the same as the first `prompt_length` of `encode` on ordinary tokenizers.

        Raises UserError when there is none (an empty question without template and BOS).
        """
        ids = self._ids(self._render(question, ask=True))
        if not ids:
            raise UserError(
                f"question {_short(question)} gives no token without a chat template; write a question or use the chat template"
            )
        return ids

    def encode(self, question: Question, answer: str, max_length: int = 512, row: int | None = None) -> Encoded:
        """prompt + answer + template suffix, cut to the first `max_length` tokens. `row` only serves the message.

        Of an answer such as (A) the letter's token is the answer: what stands around it is in every answer.

        Raises UserError when no answer token is left.
        """
        ids, prompt_length = self._joined(question, answer + self.suffix, row)
        suffix_length = len(_shared([ids[::-1], self.suffix_ids[::-1]]))
        if (letter := self._letter(ids, prompt_length, answer)) is not None:
            prompt_length, suffix_length = letter, len(ids) - letter - 1
        cut = max(0, len(ids) - max_length)
        if prompt_length >= max_length:
            raise UserError(
                f"{_name(question, row)}: its prompt of {prompt_length} tokens leaves no room for the answer in "
                f"output_length {max_length}; raise output_length above {prompt_length} or shorten the question"
            )
        return Encoded(tuple(ids[:max_length]), prompt_length, max(0, suffix_length - cut), self.prefix_of(question))

    def encode_caa(self, question: Question, answer: str, row: int | None = None, letter: bool = True) -> Encoded:
        """prompt + one space + answer, no suffix, not cut: the released tokenisation of caa (an answer with a leading space gets two).

        Without an answer the prompt's last token stands for it; of (A) its letter (released, `letter` off: all of it).
        """
        if not answer:
            prompt = tuple(self.prompt_ids(question))
            return Encoded(prompt, len(prompt) - 1, 0, self.prefix_of(question))
        ids, prompt_length = self._joined(question, " " + answer, row)
        if letter and (at := self._letter(ids, prompt_length, answer)) is not None:
            ids, prompt_length = ids[: at + 1], at
        return Encoded(tuple(ids), prompt_length, 0, self.prefix_of(question))

    def begun(self, question: Question, beginning: str) -> list[int]:
        """prompt + the beginning of an answer, which the model is to go on with: no suffix, not cut, without a thinking block where the
        template lets one be left out.

        Raises UserError where the beginning is not among the tokens (a tokenizer that cuts texts on its own account).
        """
        ids = self._ids(self._render(question, ask=True, thinking=False) + beginning)
        if not self.tokenizer.decode(ids).endswith(beginning):
            raise UserError(
                f"question {_short(question)}: its {len(ids)} tokens do not end in {beginning!r}; does the tokenizer cut texts (truncation "
                "in tokenizer.json), or change them?"
            )
        return ids

    def _letter(self, ids: Sequence[int], start: int, answer: str) -> int | None:
        """Which token holds the letter of an answer such as (A); None of any other answer."""
        found = LETTER.fullmatch(answer)
        return found and next((at for at in range(start, len(ids)) if found[1] in self.tokenizer.decode([ids[at]])), None)

    def _joined(self, question: Question, answer: str, row: int | None) -> tuple[list[int], int]:
        """(tokens of prompt + answer tokenised as one string, the prompt's own token count)."""
        ids, prompt_length = self._ids(self._render(question, ask=True) + answer), len(self.prompt_ids(question))
        if prompt_length >= len(ids):  # raw text only: a token reaches across the border
            raise UserError(
                f"{_name(question, row)}: the answer {answer!r} adds no token to its prompt; begin it with a space or use the chat template"
            )
        return ids, prompt_length

    def _render(self, question: Question, ask: bool, thinking: bool = True) -> str:
        """The text of a conversation; `ask` adds the generation prompt. Raw text without template. Its own system turn goes before
        the chat's system prompt."""
        turns = [("user", question)] if isinstance(question, str) else [*question]
        system = turns.pop(0)[1] if turns[0][0] == SYSTEM else self.system_prompt
        if system is not None and self.folds_system:
            turns[0] = (turns[0][0], f"{system}\n\n{turns[0][1]}")
        elif system is not None:
            turns.insert(0, (SYSTEM, system))
        if self.use_template:
            return _apply(self.tokenizer, [{"role": role, "content": text} for role, text in turns], ask, thinking)
        if len(turns) > 1:
            raise UserError(
                f"question {_short(question)}: a conversation of {len(turns)} turns needs a chat template; it has none, or not in use"
            )
        return turns[0][1]

    def _ids(self, text: str) -> list[int]:
        """Tokens of a text with exactly one BOS, if the template or the tokenizer has one, and no EOS of the tokenizer's own."""
        ids = _encode(self.tokenizer, text)
        if self.vocabulary is not None and ids and max(ids) >= self.vocabulary:
            name = self.tokenizer.convert_ids_to_tokens(max(ids))
            raise UserError(
                f"token {max(ids)} ({name!r}) is beyond the model's vocabulary of {self.vocabulary}: "
                "take the tokenizer that belongs to the model, or the text without that special token"
            )
        has_bos = tuple(ids[: len(self.bos_ids)]) == self.bos_ids
        return ids if has_bos else [*self.bos_ids, *ids]


def _apply(tokenizer: Any, turns: list[dict[str, str]], ask: bool, thinking: bool = True) -> str:
    """The template's text (with tokenize=True transformers 4 returns a list and 5 a BatchEncoding).

    thinking False: asks for none, which a template that knows nothing of it ignores.
    """
    from jinja2.exceptions import TemplateError

    roles = ", ".join(turn["role"] for turn in turns)
    try:
        more = {} if thinking else {"enable_thinking": False}
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=ask, **more)
    except TemplateError as error:
        raise UserError(
            f"the tokenizer's chat template refuses turns of {roles}: {error}; correct it or set use_chat_template: false"
        ) from error
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, MemoryError) as error:  # of its own code
        raise UserError(
            f"the tokenizer's chat template fails on turns of {roles}: {type(error).__name__}: {first_line(error)}; "
            "correct it or set use_chat_template: false"
        ) from error


def _takes_system(tokenizer: Any, system_prompt: str) -> bool:
    """Whether the template has a system role: some refuse it, some drop it in silence."""
    turns = [{"role": "system", "content": system_prompt}, {"role": "user", "content": "a"}]
    try:
        text = _apply(tokenizer, turns, ask=True)
    except UserError:  # refused: not an error but the answer to the question; a template that refuses all fails at once on the user turn
        return False
    return system_prompt.strip() in text


def _encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Token ids; `special` adds the tokenizer's own BOS and EOS. Ids only: token_type_ids and the like are left."""
    return list(tokenizer(text, add_special_tokens=special)["input_ids"])


def _bos_ids(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before every text: BOS for most, nothing for Qwen."""
    plain, special = _encode(tokenizer, "a"), _encode(tokenizer, "a", special=True)
    start = next((i for i in range(len(special)) if special[i : i + len(plain)] == plain), 0)
    return tuple(special[:start])


def _shared(lists: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest common beginning."""
    shared = []
    for items in zip(*lists, strict=False):
        if len(set(items)) > 1:
            break
        shared.append(items[0])
    return tuple(shared)


def _name(question: Question, row: int | None) -> str:
    """How a message names a question."""
    return f"question {_short(question)}" if row is None else f"row {row} (0-based), question {_short(question)}"


def _short(question: Question) -> str:
    text = readable(question)
    return repr(text if len(text) <= 60 else text[:57] + "...")
