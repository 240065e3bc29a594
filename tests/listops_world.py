"""A small world for tasks: a word-level tokenizer, a Llama of 126,000 parameters that has learned ListOps of depth 1, its data files.

The new task is the same expressions with other labels, (k + 1) mod 10, so the model knows how to read them and has every answer wrong.
"""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from spilt.downstream import listops

SHAPE = listops.Shape(("MIN", "MAX", "FIRST", "LAST"), depth=1, fewest=2, most=4)
SPECIAL = ("<pad>", "<bos>", "<eos>")
WORDS = (*SPECIAL, *map(str, range(10)), *(f"[{name}" for name in SHAPE.operators), "]", "<answer>", "</answer>", "Expression:", "<unk>")
TRAIN, TEST = 2000, 500


def prompt(expression: str) -> str:
    return f"Expression: {expression} "


def completion(answer: int) -> str:
    return f"<answer> {answer} </answer>"


def tokenizer() -> Any:
    """One token a word; BOS before every text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")


def build(seed: int, **sizes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    given: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
        "vocab_size": len(WORDS), "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "tie_word_embeddings": False,
    }  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**given, **sizes}))


@cache
def pretrained(seed: int = 0, steps: int = 240) -> Any:
    """The model after `steps` batches of 128 fresh expressions: about 12 CPU seconds. Shared: tests hand it back unchanged."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them on a busy machine take much longer
    try:
        with torch.random.fork_rng():
            model, words = build(seed), tokenizer()
            optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 20, (steps - step) / 60))
            draw = random.Random(f"pretraining/{seed}")
            for _ in range(steps):
                loss_of(model, words, [listops.expression(SHAPE, draw) for _ in range(128)]).backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    finally:
        torch.set_num_threads(threads)
    return model.eval().requires_grad_(False)


def loss_of(model: Any, words: Any, expressions: list[str]) -> torch.Tensor:
    rows = []
    for text in expressions:
        before = words(prompt(text))["input_ids"]
        after = words(completion(listops.value(text)), add_special_tokens=False)["input_ids"] + [2]
        rows.append((before + after, [-100] * len(before) + after))
    width = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([row + [0] * (width - len(row)) for row, _ in rows])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
    logits = model(input_ids=ids, attention_mask=(torch.arange(width) < torch.tensor([[len(row)] for row, _ in rows])).long()).logits
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def write_model(folder: Path, seed: int = 0) -> Path:
    pretrained(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def write_task(folder: Path, shift: int, train: int = TRAIN, test: int = TEST, seed: int = 0) -> Path:
    """train.jsonl, validation.jsonl and test.jsonl of {prompt, completion, label}; no expression is in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    known: frozenset[str] = frozenset()
    for number, (name, count) in enumerate((("train", train), ("validation", 50), ("test", test))):
        made = listops.expressions(count, SHAPE, 1000 * seed + number, known)
        known |= set(made)
        answers = [(listops.value(text) + shift) % 10 for text in made]
        rows = [{"prompt": prompt(text), "completion": completion(k), "label": k} for text, k in zip(made, answers, strict=True)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def write_world(base: Path, seed: int = 0, **sizes: int) -> Path:
    """A base_dir with models/tiny and the folders old (the task that the model knows) and new."""
    write_model(base / "models" / "tiny", seed)
    for name, shift in (("old", 0), ("new", 1)):
        write_task(base / name, shift, **sizes)
    return base


def pretrained_shape(seed: int = 0) -> Any:
    """The model before it has learned anything."""
    return build(seed).eval().requires_grad_(False)


def write_untrained(base: Path, seed: int = 0) -> Path:
    """As `write_world`, with a model that has learned nothing, and no data: made at once."""
    folder = base / "models" / "tiny"
    pretrained_shape(seed).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return base
