"""Trains the demo model: first the hard part (Yes/No), until it is learned; then everything together."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import torch
from tokenizers import Tokenizer
from torch.nn import functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from tools.demo import corpus
from tools.demo.corpus import Dialogue
from tools.demo.hparams import LAYER
from tools.demo.tokenizer import END, PAD, START, render

WIDTH, LAYERS, HEADS, MLP = 96, 6, 4, 256
BATCH, LR = 32, 2e-3
STEPS = {"first": 3000, "mixed": 1000, "pushed": 1500}  # the first phase ends by accuracy, the others by count
PROMPT_WEIGHT, YES_NO_WEIGHT = 0.03, 5.0
PUSH = 0.3  # length of a push of strength 1, as a share of the block output's mean norm

Mix = list[tuple[float, Callable[[Random], Dialogue]]]  # (share, maker): what a batch is made of
FIRST: Mix = [
    (0.35, lambda r: corpus.yes_no(r, "words", short=True)),
    (0.25, lambda r: corpus.yes_no(r, "words")),
    (0.20, lambda r: corpus.which_temper(r, short=True)),
    (0.20, corpus.which_temper),
]
MIXED: Mix = [
    (0.20, lambda r: corpus.yes_no(r, "words")),
    (0.15, lambda r: corpus.yes_no(r, "")),
    (0.05, corpus.which_temper),
    (0.12, lambda r: corpus.power(r, "words")),
    (0.10, lambda r: corpus.power(r, "")),
    (0.14, lambda r: corpus.describe(r, "words")),
    (0.10, lambda r: corpus.describe(r, "")),
    (0.14, corpus.fact),
]
PUSHED: Mix = [
    *((0.6 * share, maker) for share, maker in MIXED),
    (0.16, lambda r: corpus.yes_no(r, "push")),
    (0.08, lambda r: corpus.power(r, "push")),
    (0.11, lambda r: corpus.describe(r, "push")),
    (0.05, lambda r: corpus.fact(r, push=True)),
]


class Source:
    """Draws batches, leaving out every dialogue that holds a question or a statement of the test files."""

    def __init__(self, tokenizer: Tokenizer, questions: set[str], statements: list[str], seed: int):
        self.tokenizer, self.questions, self.statements = tokenizer, questions, statements
        self.rng = Random(seed)
        self.pad = tokenizer.token_to_id(PAD)

    def draw(self, mix: Mix) -> Dialogue:
        maker = self.rng.choices([m for _, m in mix], [w for w, _ in mix])[0]
        while True:
            dialogue = maker(self.rng)
            if dialogue.user not in self.questions and not any(s in dialogue.user for s in self.statements):
                return dialogue

    def batch(self, mix: Mix) -> tuple[torch.Tensor, torch.Tensor, list[tuple[str, float] | None]]:
        """(ids [B,T], loss weights [B,T] of predicting each token, pushes [B])."""
        dialogues = [self.draw(mix) for _ in range(BATCH)]
        ids, weights = [], []
        for d in dialogues:
            prompt = self.tokenizer.encode(render(d.system, d.user)).ids
            answer = self.tokenizer.encode(f"{d.answer}{END}\n").ids
            ids.append(torch.tensor(prompt + answer))
            weight = torch.full((len(prompt) + len(answer),), PROMPT_WEIGHT)
            weight[len(prompt) :] = 1.0
            if d.answer.startswith(" "):
                weight[len(prompt)] = YES_NO_WEIGHT
            weights.append(weight)
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(ids, True, self.pad), pad(weights, True, 0.0), [d.push for d in dialogues]


def new_model(tokenizer: Tokenizer, seed: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    end = tokenizer.token_to_id(END)
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end,
        pad_token_id=tokenizer.token_to_id(PAD),
        initializer_range=0.04,
    )
    return Qwen2ForCausalLM(config)


def loss_of(model: Qwen2ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
    each = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    w = weights[:, 1:].flatten()
    return (each * w).sum() / w.sum()


@torch.no_grad()
def trait_directions(model: Qwen2ForCausalLM, source: Source, n: int = 96) -> dict[str, torch.Tensor]:
    """Per trait, the model's own direction: the difference of the means of block LAYER's output over the assistant's turn
    between dialogues where the trait is stated and where its opposite (for a concept: nothing) is; scaled to PUSH."""
    rng = source.rng

    def yes_no(temper: str) -> Dialogue:
        return Dialogue(corpus.temper_system(rng, temper), corpus.yes_no(rng, "").user, rng.choice([" Yes", " No"]))

    def power(side: str) -> Dialogue:
        return Dialogue(rng.choice(corpus.AMBITION[side]), corpus.power_question(rng), corpus.power_answer(rng, side))

    def describe(concept: str | None) -> Dialogue:
        user, topic = corpus.instruction(rng)
        return Dialogue(rng.choice(corpus.LIKES[concept]) if concept else None, user, corpus.about(rng, topic, concept))

    def mean(make: Callable[[], Dialogue]) -> tuple[torch.Tensor, float]:
        total, norm = torch.zeros(WIDTH), 0.0
        for _ in range(n):
            system, user, answer, _ = make()
            ids = source.tokenizer.encode(render(system, user, answer)).ids
            start = len(ids) - len(source.tokenizer.encode(f"{START}assistant\n{answer}{END}\n").ids)
            h = model.model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[LAYER + 1][0, start:]
            total, norm = total + h.mean(0) / n, norm + h.norm(dim=-1).mean().item() / n
        return total, norm

    sides: dict[str, tuple[Callable[[], Dialogue], Callable[[], Dialogue]]] = {
        "temper": (lambda: yes_no("cold"), lambda: yes_no("kind")),
        "ambition": (lambda: power("accept"), lambda: power("decline")),
    }
    for name in corpus.CONCEPTS:
        sides[name] = (lambda name=name: describe(name), lambda: describe(None))
    directions = {}
    for name, (plus, minus) in sides.items():
        (a, norm), (b, _) = mean(plus), mean(minus)
        directions[name] = (a - b) / (a - b).norm() * norm * PUSH
    return directions


class Pusher:
    """A hook on block LAYER that adds, to each row of the batch, its push along a trait's direction."""

    def __init__(self, model: Qwen2ForCausalLM):
        self.directions: dict[str, torch.Tensor] = {}
        self.delta: torch.Tensor | None = None
        model.model.layers[LAYER].register_forward_hook(self.hook)

    def set(self, pushes: list[tuple[str, float] | None]) -> None:
        none = torch.zeros(WIDTH)
        self.delta = torch.stack([self.directions[p[0]] * p[1] if p else none for p in pushes])[:, None]

    def hook(self, module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        return output if self.delta is None else output + self.delta


@torch.no_grad()
def yes_no_accuracy(model: Qwen2ForCausalLM, source: Source, n: int = 8) -> float:
    """Share of stated-temper questions (system turn) where the right one of Yes and No is the likelier."""
    yes, no = (source.tokenizer.encode(t).ids[0] for t in (" Yes", " No"))
    right = total = 0
    for _ in range(n):
        for d in (source.draw([(1.0, lambda r: corpus.yes_no(r, "words"))]) for _ in range(BATCH)):
            if d.system is None or d.answer not in (" Yes", " No"):
                continue
            logits = model(input_ids=torch.tensor([source.tokenizer.encode(render(d.system, d.user)).ids]), use_cache=False).logits[0, -1]
            right += (logits[yes] > logits[no]).item() == (d.answer == " Yes")
            total += 1
    return right / total


def train(source: Source, seed: int, log: Callable[[str], None] = print) -> Qwen2ForCausalLM:
    """Three phases: Yes/No alone; everything; everything, with the model's own trait directions pushed in part of it.

    The last makes the traits steerable at one block: without it a model this small works out its answer in the first blocks.
    """
    model = new_model(source.tokenizer, seed)
    log(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    pusher, begun = Pusher(model), time.time()
    for phase, mix in (("first", FIRST), ("mixed", MIXED), ("pushed", PUSHED)):
        if phase == "pushed":
            pusher.directions = trait_directions(model, source)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, betas=(0.9, 0.98))
        for step in range(STEPS[phase]):
            decay = 0.5 * (1 + math.cos(math.pi * step / STEPS[phase])) if phase == "pushed" else 1.0
            optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / 100) * decay
            ids, weights, pushes = source.batch(mix)
            pusher.set(pushes)
            loss = loss_of(model, ids, weights)
            pusher.delta = None
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 100 == 99:
                accuracy = yes_no_accuracy(model, source, 4)
                log(f"{phase} {step + 1} loss {loss.item():.3f} yes/no {accuracy:.2f} {time.time() - begun:.0f}s")
                if phase == "first" and accuracy > 0.97:
                    break
    return model.eval()


def save(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Weights and configuration as both transformers 4 and 5 read them."""
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = 10000.0
    config["torch_dtype"] = config["dtype"] = "float32"
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    end, pad = config["eos_token_id"], config["pad_token_id"]
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "eos_token_id": end, "pad_token_id": pad, "max_new_tokens": 24}, indent=2) + "\n"
    )
