"""The released code's numbers on a tiny Gemma-2 (tests/goldens)."""

from __future__ import annotations

import csv
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch

GOLDEN = Path(__file__).parent / "goldens"
NUMBERS = GOLDEN / "tiny-gemma2-numbers"
LAYER = 3
DATASETS = ("psychopathy", "powerseeking")


def tensors(name: str) -> Any:
    return torch.load(NUMBERS / name, weights_only=True)


@cache
def numbers(name: str) -> Any:
    return json.loads((NUMBERS / name).read_text(encoding="utf-8"))


@cache
def host() -> Any:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "tiny-gemma2", dtype=torch.float32, attn_implementation="eager").eval()
    return model.requires_grad_(False), AutoTokenizer.from_pretrained(GOLDEN / "tiny-gemma2")


@cache
def rows(dataset: str, split: str) -> list[dict[str, str]]:
    """question, matching, not_matching of the rows that the numbers were computed on."""
    if dataset == "psychopathy":
        lines = (GOLDEN / f"data-{dataset}" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        read = [json.loads(line) for line in lines]
        names = {"question": "question", "matching": "answer_matching_behavior", "not_matching": "answer_not_matching_behavior"}
        return [{ours: row[theirs] for ours, theirs in names.items()} for row in read]
    with open(GOLDEN / f"data-{dataset}" / f"{split}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
