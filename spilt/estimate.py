"""What a step will cost, before anything is loaded: tokens, floating-point work, memory. Shown by --dry_run. No torch.

Counts follow design arithmetic: a block costs 2 FLOP per weight and token, plus attention; blocks up to `layer` run once
per sequence, the blocks after it once per multiplier (measure), per step forward and backward (fit). Token counts are
guessed from the text (4 bytes a token and a template of 20), since the tokenizer is not loaded: expect some 30%.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from spilt.data import readers
from spilt.errors import UserError
from spilt.memory import max_tokens
from spilt.methods import METHODS
from spilt.model import checkpoint
from spilt.plan import DATA_OF, Request, Step

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
BYTES_PER_TOKEN, TEMPLATE = 4, 20


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

    def kept(self, tokens: float, length: float, size: int) -> float:
        """Bytes that a block keeps of so many tokens for the backward pass: norms and attention, two middles of the MLP, scores."""
        scores = 8 * self.heads * length if self.eager else 0
        return tokens * ((10 * self.hidden + 2 * self.intermediate) * size + scores)

    def run(self, tokens: float, blocks: int, length: float) -> float:
        """FLOP of so many tokens in sequences of `length` through so many blocks: products with weights, and attention."""
        return tokens * blocks * (2 * self.block + 4 * self.heads * self.head_dim * length / 2)


class Cost(NamedTuple):
    """Estimates of one step."""

    tokens: float  # through any part of the model
    flops: float
    cache: float  # bytes of recorded activations
    peak: float  # bytes

    def __str__(self) -> str:
        memory = f"recorded activations {_bytes(self.cache)}, peak memory {_bytes(self.peak)}"
        return f"about {self.tokens:,.0f} tokens, {_si(self.flops)}FLOP, {memory} besides the libraries"


def shape_of(model: Path) -> Shape | None:
    """From config.json; None when it is not there or is of an unknown make."""
    try:
        config = checkpoint.text_config(checkpoint.read_json(model / checkpoint.CONFIG))
        hidden = config.get("hidden_size") or config["n_embd"]
        heads = config.get("num_attention_heads") or config["n_head"]
        layers = config.get("num_hidden_layers") or config["n_layer"]
        inner = config.get("intermediate_size") or config.get("n_inner") or 4 * hidden
        kv = config.get("num_key_value_heads") or heads
        dim = config.get("head_dim") or hidden // heads
        gated, eager = "intermediate_size" in config, bool(config.get("attn_logit_softcapping"))
        return Shape(layers, hidden, inner, heads, kv, dim, config["vocab_size"], gated, eager)
    except (UserError, OSError, KeyError, TypeError, ZeroDivisionError):
        return None


def cost(step: Step, request: Request) -> Cost | None:
    """None when the model or the data is not there to be counted."""
    shape = shape_of(step.model)
    if shape is None or not all(path.is_file() for path in step.data.values()):
        return None
    s: Any = step.settings
    size = BYTES.get(s.dtype, 4)
    weights = shape.weights * size
    layer = min(s.layers)
    below, above = layer + 1, shape.layers - layer - 1
    form = step.cells[0].intervention
    read = 0 if form == "vector" else (shape.intermediate if s.intervention_components == "mlp_mid" else shape.hidden)
    parts = []
    for cell in step.cells:
        for purpose in step.data:
            fmt = readers.dataset_format(request.base_dir, cell.dataset, DATA_OF[step.verb][purpose])
            parts.append(_one(step, shape, fmt, cell.concept, request, below, above, read, size))
    recorded = max(part.cache for part in parts)  # of one concept at a time
    peak = weights + recorded + max(part.peak for part in parts)
    return Cost(sum(part.tokens for part in parts), sum(part.flops for part in parts), recorded, peak)


def _one(
    step: Step,
    shape: Shape,
    fmt: readers.DatasetFormat,
    concept: int | None,
    request: Request,
    below: int,
    above: int,
    read: int,
    size: int,
) -> Cost:
    s: Any = step.settings
    own = s.generation_data_size if step.verb == "generate" else s.max_num_of_examples
    limit = min((rows for rows in (request.limit, own) if rows is not None), default=None)
    kind = request.device.split(":")[0]
    head = 2 * shape.vocab * shape.hidden  # FLOP of the output head, per scored token
    if step.verb == "generate":
        prompts = [_tokens(p.input) + TEMPLATE for p in readers.read_prompts(fmt, concept, limit)]
        texts = len(prompts) * s.num_responses * (len(step.multipliers) + s.generate_orig_output)
        length = sum(prompts) / len(prompts)
        new = texts * s.generation_params.max_new_tokens
        flops = shape.run(sum(prompts), below, length) + shape.run(texts * length, above, length) + texts * head
        flops += shape.run(new, shape.layers, length + s.generation_params.max_new_tokens) + new * head
        per_row = 2 * shape.layers * shape.kv_heads * shape.head_dim * (length + s.generation_params.max_new_tokens) * size
        return Cost(sum(prompts) + texts * length + new, flops, 0, s.batch_size * per_row)
    pairs = readers.read_pairs(fmt, concept, limit)
    questions = [_tokens(p.question) + TEMPLATE for p in pairs]
    answers = [_tokens(p.matching) + _tokens(p.not_matching) + 6 for p in pairs]
    recorded = sum(questions) + sum(answers)
    length = recorded / len(pairs)
    cache = recorded * (shape.hidden + read) * size
    flops = shape.run(recorded, below, length)
    batch = max_tokens(kind) * (12 * shape.hidden + 2 * shape.intermediate) * size + 64 * shape.vocab * 6
    if step.verb == "measure":
        strengths = len({abs(m) for m in step.multipliers}) * 2
        flops += strengths * (shape.run(recorded, above, length) + sum(answers) * head)
        return Cost(recorded * (1 + strengths), flops, cache, batch)
    method = METHODS[step.cells[0].method]
    if method.estimate is not None:
        return Cost(recorded, flops, 0, batch)
    sides = 2 if method.needs_losing(s) else 1
    shown = s.n_epochs * len(s.preference_pairs) * sides * (sum(questions) + sum(answers) / 2)
    flops += 2 * shape.run(shown, above, length) + 2 * head * s.n_epochs * len(s.preference_pairs) * sides * sum(answers) / 2
    parameters = {"vector": shape.hidden, "lora": s.rank * (read + shape.hidden), "local_weight": (read + 1) * shape.hidden}
    adam = 4 * 4 * parameters[step.cells[0].intervention]  # parameter, gradient, two moments, float32
    at_once = min(s.batch_size * sides * length, max(length, max_tokens(kind, backward=True)))
    kept = above * shape.kept(at_once, length, size)
    return Cost(recorded + shown, flops, cache, adam + kept)


def _tokens(text: str) -> float:
    return len(text.encode()) / BYTES_PER_TOKEN


def _si(value: float) -> str:
    for unit, name in ((1e15, "P"), (1e12, "T"), (1e9, "G")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e6:.3g} M"


def _bytes(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**29 else f"{value / 2**20:.1f} MiB"
