"""What a step will cost, before anything is loaded: tokens, floating-point work, memory. Shown by --dry_run. No torch.

Counts follow design arithmetic: a block costs 2 FLOP per weight and token, plus attention; blocks up to `layer` run once
per sequence, the blocks after it once per multiplier (measure), per step forward and backward (fit). Token counts are
guessed from the text (4 bytes a token and a template of 20), since the tokenizer is not loaded: expect some 30%.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from spilt.cell import FORMS
from spilt.data.chat import readable
from spilt.errors import UserError
from spilt.memory import max_tokens
from spilt.model import checkpoint

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BYTES_PER_TOKEN, TEMPLATE = 4, 20
SHARE = 0.5  # of the free memory, for the texts that are made side by side
LEAST_ON_CPU = 32  # of them, as far as they fit
MOST, MOST_ON_CPU = 256, 64  # CPU s of 130 texts of SmolLM2-135M: 46 with 16 at once, 30 with 32, 27 with 64


class Shape(NamedTuple):
    """What config.json says of a model."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    gated: bool  # three MLP matrices instead of two
    eager: bool = False  # attention whose scores are kept for the backward pass (Gemma-2)

    @property
    def block(self) -> int:
        """Weights of one block."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def weights(self) -> int:
        return self.layers * self.block + self.vocab * self.hidden

    @property
    def head(self) -> int:
        """FLOP of the output head, per scored token."""
        return 2 * self.vocab * self.hidden

    def below(self, layers: Sequence[int]) -> int:
        """Blocks up to the lowest layer."""
        return min(layers) + 1

    def above(self, layers: Sequence[int]) -> int:
        return self.layers - self.below(layers)

    def size(self, settings: Any) -> int:
        """Bytes of a number."""
        return BYTES.get(settings.dtype, 4)

    def read(self, step: Any) -> int:
        """Width of what is recorded beside the stream."""
        if not FORMS[step.cells[0].intervention].reads:
            return 0
        return self.intermediate if step.settings.intervention_components == "mlp_mid" else self.hidden

    def kept(self, tokens: float, length: float, size: int) -> float:
        """Bytes that a block keeps of so many tokens for the backward pass: norms and attention, two middles of the MLP, scores."""
        scores = 8 * self.heads * length if self.eager else 0
        return tokens * ((10 * self.hidden + 2 * self.intermediate) * size + scores)

    def of_text(self, prompt: float, new: int, size: int) -> float:
        """Bytes of a text that is being made: keys and values (those of the prompt twice, while they come in), what a block holds while
        the prompt is read, and scores of the next token as they are drawn from."""
        held = (2 * prompt + new) * 2 * self.layers * self.kv_heads * self.head_dim * size
        read = prompt * ((12 * self.hidden + 2 * self.intermediate) * size + (8 * self.heads * prompt if self.eager else 0))
        return held + read + 32 * self.vocab

    def run(self, tokens: float, blocks: int, length: float) -> float:
        """FLOP of so many tokens in sequences of `length` through so many blocks: products with weights, and attention."""
        return tokens * blocks * (2 * self.block + 4 * self.heads * self.head_dim * length / 2)


class Cost(NamedTuple):
    """Estimates of one step."""

    tokens: float  # through any part of the model
    flops: float
    cache: float  # bytes of recorded activations
    peak: float  # bytes
    batch: str = ""  # of texts, and why

    def __str__(self) -> str:
        memory = f"recorded activations {_bytes(self.cache)}, peak memory {_bytes(self.peak)}"
        return f"about {self.tokens:,.0f} tokens, {_si(self.flops)}FLOP, {memory} besides the libraries{self.batch and '; '}{self.batch}"


class Batch(NamedTuple):
    """How many texts are made side by side, and why so many."""

    texts: int
    why: str

    def __str__(self) -> str:
        return f"{self.texts} texts side by side ({self.why})"


def side_by_side(given: int | None, shape: Shape | None, size: int, longest: float, new: int, free: float | None, kind: str) -> Batch:
    """`given`, else so many as fit in SHARE of the memory that is free beside the weights. longest: tokens of a prompt; new: after it;
    free: None, where it is not known yet; kind: of device.

    On a CPU LEAST_ON_CPU take hardly more time than more: so many, or as many as take SHARE of what the weights do."""
    if given:
        return Batch(given, "as asked")
    most = MOST_ON_CPU if kind == "cpu" else MOST
    if shape is None or free is None:
        return Batch(most, "or fewer, as memory allows" if shape else "config.json does not say how much memory each takes")
    each = shape.of_text(longest, new, size)
    if kind == "cpu":
        most = min(most, _power(max(LEAST_ON_CPU, int(SHARE * shape.weights * size // each))))
    fit = _power(min(most, max(1, int(SHARE * free // each))))
    return Batch(fit, f"{_bytes(each)} each{'' if fit == most else f', in {SHARE:.0%} of the {_bytes(max(free, 0))} that are free'}")


def _power(number: int) -> int:
    """The largest power of two up to it: the next run decides the same."""
    return 2 ** (number.bit_length() - 1)


def shape_of(model: Path) -> Shape | None:
    """From config.json; None when it is not there or is of an unknown make."""
    try:
        return shape_from(checkpoint.config(model))
    except (UserError, OSError):
        return None


def shape_from(content: Any) -> Shape | None:
    """From what config.json holds."""
    try:
        config = checkpoint.text_config(content)
        hidden = config.get("hidden_size") or config["n_embd"]
        heads = config.get("num_attention_heads") or config["n_head"]
        layers = config.get("num_hidden_layers") or config["n_layer"]
        inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
        kv = config.get("num_key_value_heads") or heads
        dim = config.get("head_dim") or hidden // heads
        gated, eager = "intermediate_size" in config, bool(config.get("attn_logit_softcapping"))
        return Shape(layers, hidden, inner, heads, kv, dim, config["vocab_size"], gated, eager)
    except (UserError, KeyError, TypeError, ZeroDivisionError):
        return None


def recording(step: Any, shape: Shape, pairs: Sequence[Any], kind: str, blocks: int | None = None) -> tuple[Cost, float, float]:
    """Of so many blocks (those up to the lowest layer), once per sequence; and the tokens of all questions, and of all answers."""
    s = step.settings
    questions = sum(tokens(readable(question)) + TEMPLATE for pair in pairs for question in set(pair.questions))
    answers = sum(tokens(text) + 3 for pair in pairs for _, text in pair.sides)
    recorded, size = questions + answers, shape.size(s)
    batch = max_tokens(kind) * (12 * shape.hidden + 2 * shape.intermediate) * size + 64 * shape.vocab * 6
    flops = shape.run(recorded, blocks or shape.below(s.layers), recorded / len(pairs))
    return Cost(recorded, flops, recorded * (shape.hidden + shape.read(step)) * size, batch), questions, answers


def tokens(text: str) -> float:
    return len(text.encode()) / BYTES_PER_TOKEN


def _si(value: float) -> str:
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e6:.3g} M"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**29 else f"{value / 2**20:.1f} MiB"
