"""The same work, done the way the released runner does it: the other side of the comparison. Written from its description.

One process is one cell, one multiplier and (loss) one preference type, with its own model load. In it: full forwards
through all layers; every layer computes its gate and up projections a second time to expose the MLP middle; the update
m dW (or m A B) is built per example, [B, F, D]; logits at every position; a training step takes four forwards, two of them
for a reference term of weight 0; loss mode is that loop with batches of one; texts are made one prompt at a time.
The equations, settings, rows and token ids are the package's own, so that both sides can be compared number by number.

    python benchmarks/naive.py fit   --base_dir DIR --model_name NAME --out FILE.pt
    python benchmarks/naive.py apply --base_dir DIR --model_name NAME --out FILE.json --multiplier 1.0
    python benchmarks/naive.py loss  --base_dir DIR --model_name NAME --out FILE.csv  --multiplier 1.0 --preference winning_only
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

from spilt import methods
from spilt import settings as hparams  # noqa: E402
from spilt.data import dataset_format, readers  # noqa: E402
from spilt.data.batches import Batch, pad, position_mask  # noqa: E402
from spilt.data.chat import Chat, Encoded  # noqa: E402
from spilt.engine.train import chunks, entries, epoch_order  # noqa: E402
from spilt.methods.scoring import AnswerLogProbs  # noqa: E402
from spilt.steering import anatomy


class Steering(nn.Module):
    """h' = h + m (x dW + db), x A B or v, with the update built per example as the released layers do."""

    def __init__(self, form: str, state: dict[str, Tensor], dropout: float) -> None:
        super().__init__()
        self.form = form
        self.parts = nn.ParameterDict(state)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor, x: Tensor, m: Tensor, where: Tensor | None) -> Tensor:
        p = self.parts
        if self.form == "vector":
            delta = m[:, None, None] * self.dropout(p["v"])
        elif self.form == "lora":
            update = m[:, None, None] * (p["lora_A"] @ p["lora_B"])  # [B, F, D]
            delta = self.dropout(torch.bmm(x.float(), update))
        else:
            update = m[:, None, None] * p["weight"]  # [B, F, D]
            delta = self.dropout(torch.bmm(x.float(), update) + m[:, None, None] * p["bias"])
        return h + (delta if where is None else delta * where[..., None]).to(h.dtype)


class Wrapped:
    """A model with hooks on every layer; `steer` is (m [B], where [B, T] or None), or None for a plain forward."""

    def __init__(self, model: nn.Module, layer: int, steering: Steering) -> None:
        self.model, self.steering = model, steering
        self.steer: tuple[Tensor, Tensor | None] | None = None
        self.middle: dict[int, Tensor] = {}
        for index, block in enumerate(anatomy.blocks(model)):
            block.mlp.register_forward_hook(self._expose(index))
        anatomy.block(model, layer).register_forward_hook(self._add(layer))

    def _expose(self, index: int) -> Any:
        def expose(mlp: Any, args: tuple[Tensor, ...], _: Any) -> None:
            self.middle[index] = mlp.act_fn(mlp.gate_proj(args[0])) * mlp.up_proj(args[0])

        return expose

    def _add(self, layer: int) -> Any:
        def add(_: nn.Module, __: Any, output: Any) -> Any:
            if self.steer is None:
                return output
            h = output[0] if isinstance(output, tuple) else output
            h = self.steering(h, self.middle[layer], *self.steer)
            return (h, *output[1:]) if isinstance(output, tuple) else h

        return add

    def score(self, batch: Batch, steer: tuple[Tensor, Tensor | None] | None) -> AnswerLogProbs:
        """One full forward, logits at every position."""
        self.steer = steer
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask.long(), use_cache=False).logits
        logp = logits[:, :-1].float().log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0] * batch.answer_mask[:, 1:]
        return AnswerLogProbs(logp.sum(1), batch.answer_mask.sum(1), batch.attention_mask.sum(1))


class Job:
    """What all three modes load, each time anew."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.tokenizer = AutoTokenizer.from_pretrained(args.base_dir / "models" / args.model_name)
        resolve = {"fit": hparams.resolve_fit, "apply": hparams.resolve_generate, "loss": hparams.resolve_measure}[args.mode]
        cell = (args.base_dir, args.model_name, "psychopathy", args.method, args.intervention_method)
        self.settings: Any = resolve(*cell, hparams.parse_overrides(args.set)).settings
        (self.layer,) = self.settings.layers
        dtype = getattr(torch, self.settings.dtype)
        folder = args.base_dir / "models" / args.model_name
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval().requires_grad_(False)
        if getattr(self.model.config, "attn_logit_softcapping", None):
            self.model.set_attn_implementation("eager")
        self.chat = Chat.of(self.tokenizer, self.settings.use_chat_template, self.settings.system_prompt or None)
        d, f = anatomy.hidden_size(self.model), anatomy.read_width(self.model, self.layer, "mlp_mid")
        self.steering = Steering(args.intervention_method, self._state(d, f), getattr(self.settings, "dropout", 0.0)).eval()
        self.wrapped = Wrapped(self.model, self.layer, self.steering)

    def _state(self, d: int, f: int) -> dict[str, Tensor]:
        if self.args.mode != "fit":
            leaf = "caa_vector" if self.args.method == "caa" else f"{self.args.method}_{self.args.intervention_method}"
            folder = self.args.base_dir / "vectors" / self.args.model_name / self.args.method / "psychopathy" / leaf
            stored = torch.load(folder / f"layer_{self.layer}.pt", weights_only=True)
            return {"v": stored} if isinstance(stored, Tensor) else {k: v for k, v in stored.items() if isinstance(v, Tensor)}
        if self.args.intervention_method != "local_weight":
            raise SystemExit("fit: only local_weight, whose start is 0 and needs no random numbers")
        return {"weight": torch.zeros(f, d), "bias": torch.zeros(d)}

    def sequences(self) -> list[Encoded]:
        """matching and not_matching of row 0, of row 1, ..."""
        pairs = readers.read_pairs(dataset_format(self.args.base_dir, "psychopathy", "train"), None, self.args.limit)
        length = self.settings.output_length
        return [self.chat.encode(p.question, text, length) for p in pairs for text in (p.matching, p.not_matching)]

    def four_forwards(self, sequences: list[Encoded], pairs: list[tuple[int, int]], factors: list[float]) -> methods.Scored:
        """Winning and losing answers steered, then both again without: the reference, which weight 0 makes useless."""
        n = len(pairs)
        scored = []
        for steered in (True, False):
            for side in (0, 1):
                rows = [sequences[pair[side]] for pair in pairs]
                batch = pad(rows, self.tokenizer.pad_token_id)
                m = torch.tensor(factors[side * n : side * n + n])
                vector = self.steering.form == "vector"
                where = position_mask(rows, self.settings.fitted_positions, self.chat.prefix_length).float() if vector else None
                with ExitStack() as off:
                    if not steered:
                        off.enter_context(torch.no_grad())
                    scored.append(self.wrapped.score(batch, (m, where) if steered else None))
        return methods.Scored(*scored)


def fit(job: Job) -> None:
    """The training loop; writes {loss: [per step], weight, bias}."""
    s, sequences = job.settings, job.sequences()
    optimizer = torch.optim.AdamW(job.steering.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    batches = [chunks(epoch_order(len(sequences) // 2, s.seed, epoch), s.batch_size) for epoch in range(s.n_epochs)]
    steps = sum(-(-len(b) // s.gradient_accumulation_steps) for b in batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: max(0.0, 1 - k / steps))
    draw, log = random.Random(s.seed), []
    loss_of = methods.METHODS[job.args.method].loss
    assert loss_of is not None
    torch.manual_seed(s.seed)
    job.steering.train()
    for epoch in batches:
        for group in chunks(epoch, s.gradient_accumulation_steps):
            total = 0.0
            for rows in group:
                minibatches = chunks([entry for row in rows for entry in entries(row, s)], s.batch_size)
                for minibatch in minibatches:
                    signs = [e.sign for e in minibatch] * 2
                    factors = [draw.choice(s.steering_factors) * sign for sign in signs]
                    scored = job.four_forwards(sequences, [(e.winning, e.losing) for e in minibatch], factors)
                    loss = loss_of(scored, s) / (len(minibatches) * len(group))
                    loss.backward()
                    total += loss.item()
            nn.utils.clip_grad_norm_(job.steering.parameters(), s.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            log.append(total)
    torch.save({"loss": log, **{k: v.detach() for k, v in job.steering.parts.items()}}, job.args.out)


def apply(job: Job) -> None:
    """One prompt at a time through the library's own generate."""
    params = {k: v for k, v in job.settings.generation_params.as_kwargs().items() if v is not None}
    prompts = readers.read_prompts(dataset_format(job.args.base_dir, "psychopathy", "generation"), None, job.args.limit)
    job.wrapped.steer = (torch.tensor([job.args.multiplier]), None)
    rows = []
    if job.model.generation_config.eos_token_id is None:  # a text ends where the tokenizer says, as ours does
        job.model.generation_config.eos_token_id = job.tokenizer.eos_token_id
    for prompt in prompts:
        ids = torch.tensor([job.chat.prompt_ids(prompt.input)])
        with torch.no_grad():
            out = job.model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=job.tokenizer.pad_token_id, **params)
        rows.append({"input": prompt.input, "pred": [job.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)]})
    job.args.out.write_text(json.dumps(rows), encoding="utf-8")


def loss(job: Job) -> None:
    """The training loop without its update: batches of one, autograd on, four forwards for the one loss that is kept."""
    s, sequences, m = job.settings, job.sequences(), job.args.multiplier
    rows = []
    for example in range(len(sequences) // 2):
        for pair in s.preference_pairs:
            matching, not_matching = 2 * example, 2 * example + 1
            winning, losing, applied = (matching, not_matching, m) if pair == "orig_add" else (not_matching, matching, -m)
            if job.args.preference == "losing_only":
                winning, losing = losing, winning
            scored = job.four_forwards(sequences, [(winning, losing)], [applied, applied])
            rows.append({"example": example, "pair": pair, "pos_steer_loss": scored.winning.losses().item()})
    with open(job.args.out, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mode", choices=["fit", "apply", "loss"])
    parser.add_argument("--base_dir", type=Path, required=True)
    parser.add_argument("--model_name", required=True)
    parser.add_argument("--method", default="spilt")
    parser.add_argument("--intervention_method", default="local_weight")
    parser.add_argument("--multiplier", type=float, default=1.0)
    parser.add_argument("--preference", default="winning_only")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    {"fit": fit, "apply": apply, "loss": loss}[args.mode](Job(args))


if __name__ == "__main__":
    main()
