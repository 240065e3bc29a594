"""One call of at most ten minutes on a GPU: is it right, how fast is it, and against which bound.

    python benchmarks/gpu.py --out DIR                    # Gemma-2-9B and Qwen2.5-7B shapes in bf16
    python benchmarks/gpu.py --out DIR --shapes gemma-2-9b --rows 200
    python benchmarks/gpu.py --out DIR --tiny             # the same steps on the CPU, small: does it run

Random weights, made on the device; nothing is downloaded. Correctness first: losses of the command line (recorded,
suffix only, packed, batched) against plain forwards with hooks; texts of a full batch against one at a time. Then fit and
loss against the card's measured matrix rate, generation against streaming the weights once per token, a decoding step in each way of
--decode_step (plain, captured, compiled), peak memory.
Writes gpu.json after every step (a call that is cut short keeps what it has), gpu.md, and a profile where a target is missed.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spilt.steering import layer_file

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch  # noqa: E402

from benchmarks import decoding, flops, growth, world  # noqa: E402
from benchmarks.inprocess import NAME, Session  # noqa: E402
from spilt.data.chat import Chat  # noqa: E402
from spilt.engine import choice  # noqa: E402
from spilt.errors import UserError  # noqa: E402
from spilt.steering import hooks  # noqa: E402
from spilt.steering.steering import Steering  # noqa: E402

TARGETS = {"fit utilisation": 0.45, "loss utilisation": 0.45, "generation / floor": 0.5}
STRENGTHS = (0.5, 1.0, 1.5, 2.0)
PEAK_GB = 6.0  # of fit at batch 4, length 512, above the weights


def seconds(work: Callable[[], Any], device: str, repeats: int = 5) -> float:
    """Median time of a piece of work; CUDA events on a GPU."""
    work()
    taken = []
    for _ in range(repeats):
        if device == "cpu":
            start = time.perf_counter()
            work()
            taken.append(time.perf_counter() - start)
        else:
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            work()
            last.record()
            torch.cuda.synchronize()
            taken.append(first.elapsed_time(last) / 1000)
    return sorted(taken)[repeats // 2]


def card(device: str, dtype: torch.dtype, side: int, gigabytes: float) -> dict[str, float]:
    """What the device does at its best: FLOP/s of a square matrix product, bytes/s of a copy (read and written)."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    rate = 2 * side**3 / seconds(lambda: a @ b, device, 9)
    source = torch.zeros(int(gigabytes * 1e9), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * len(source) / seconds(lambda: target.copy_(source), device, 9)
    return {"matrix FLOP/s": rate, "copy bytes/s": bandwidth}


class Bench:
    """One shape: a session and what it found so far."""

    def __init__(self, session: Session, name: str, rates: dict[str, float], found: dict[str, Any], out: Path) -> None:
        self.session, self.name, self.rates, self.found, self.out = session, name, rates, found, out
        self.config, self.layer, self.model = session.shape.config, session.shape.layer, session.model
        self.cuda = session.device.startswith("cuda")
        self.weights = sum(p.numel() * p.element_size() for p in self.model.parameters())

    def stored(self) -> Any:
        """The intervention that loss and apply read."""
        d, f = self.config["hidden_size"], self.config["intermediate_size"]
        path = self.session.base / "vectors" / NAME / "spilt/psychopathy/spilt_local_weight" / f"layer_{self.layer}.pt"
        made = layer_file.load(path, "local_weight", None, d, {"mlp_mid": f}, "mlp_mid", "block")
        return made.to(self.session.device)

    def losses(self, m: float, preference: str = "winning_only") -> list[float]:
        root = self.session.base / "vectors" / NAME / "get_sft_loss/spilt/psychopathy/spilt_local_weight"
        with open(root / f"local_weight_spilt_m{m}_{preference}" / "train_losses.csv", encoding="utf-8", newline="") as file:
            return [float(row["pos_steer_loss"]) for row in csv.DictReader(file)]

    def texts(self, m: float) -> list[str]:
        path = self.session.base / "generation" / NAME / f"spilt/psychopathy/spilt_local_weight/m{m}/psychopathy_results.json"
        return [row["pred"][0] for row in json.loads(path.read_text())]

    # ---- correctness

    @torch.no_grad()
    def hook_losses(self, rows: int, m: float) -> list[float]:
        """Matching answers at +m, the others at -m, by plain forwards with hooks, one sequence at a time."""
        chat, made = Chat.of(self.session.tokenizer), self.stored()
        out = []
        for question in world.questions(rows, self.config["vocab_size"], 0):
            right, wrong = (" Yes", " No") if len(out) // 2 % 2 == 0 else (" No", " Yes")
            for text, strength in ((right, m), (wrong, -m)):
                s = chat.encode(question, text)
                ids = torch.tensor([s.input_ids], device=self.session.device)
                with hooks.attach(self.model, [hooks.Applied(self.layer, made, strength)]):
                    logits = self.model(input_ids=ids, use_cache=False).logits[0, s.prompt_length - 1 : -1].float()
                picked = logits.log_softmax(-1).gather(-1, ids[0, s.prompt_length :, None])
                out.append(-picked.mean().item())
        return out

    def correct(self, rows: int, new_tokens: int) -> dict[str, Any]:
        few = ["--limit", str(rows)]
        self.session.run("--mode", "loss", "--split", "train", "--multipliers", "1.0", *few)
        ours, plain = self.losses(1.0), self.hook_losses(rows, 1.0)
        far = [abs(a - b) for a, b in zip(ours, plain, strict=True)]
        texts = {}
        for size in (rows, 1):
            words = ["--mode", "apply", "--multipliers", "1.0", "--batch_size", str(size), *few]
            self.session.run(*words, "--set", f"generation_params.max_new_tokens={new_tokens}")
            texts[size] = [text.split() for text in self.texts(1.0)]
        same = []  # how much of each text is the same up to the first difference
        for a, b in zip(texts[rows], texts[1], strict=True):
            until = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
            same.append(until / max(1, len(a), len(b)))
        tolerance = 0.05 if self.session.dtype == "bfloat16" else 1e-4
        right = max(far) <= tolerance and (self.session.dtype == "bfloat16" or min(same) == 1.0)
        return {
            "suffix against hooks: largest difference of a loss": max(far),
            "mean": sum(far) / len(far),
            "tolerance": tolerance,
            "batch against single: equal share of each text, mean": sum(same) / len(same),
            "least": min(same),
            "right": right,
        }

    # ---- times

    def _pairs(self, rows: int) -> tuple[list[int], int, int]:
        """(lengths, scored positions, tokens when nothing is computed twice) of the training rows."""
        chat = Chat.of(self.session.tokenizer)
        pairs = [[chat.encode(q, a) for a in (" Yes", " No")] for q in world.questions(rows, self.config["vocab_size"], 0)]
        lengths = [len(s.input_ids) for pair in pairs for s in pair]
        scored = sum(len(s.input_ids) - s.prompt_length for pair in pairs for s in pair)
        shared = chat.prefix_length + sum(sum(map(len, (s.input_ids for s in p))) - p[0].prompt_length - chat.prefix_length for p in pairs)
        return lengths, scored, shared

    def fit(self, rows: int) -> dict[str, Any]:
        self.session.run("--mode", "generate", "--set", "n_epochs=1", "--limit", "8")  # warms up
        took = self.session.run("--mode", "generate", "--set", "n_epochs=1", "--limit", str(rows))
        lengths, scored, shared = self._pairs(rows)
        record = flops.blocks(self.config, self.layer + 1, shared, flops.causal_pairs(80) * rows)
        work = record + flops.fit(self.config, self.layer, lengths, scored, "local_weight")
        return self._bounded(took, work, "fit utilisation")

    def loss(self, rows: int) -> dict[str, Any]:
        words = ["--mode", "loss", "--split", "train", "--multipliers", *map(str, STRENGTHS)]
        self.session.run(*words, "--limit", "8")
        took = self.session.run(*words, "--limit", str(rows))
        count = growth.counted(self.config, self.layer, rows, None, 2 * len(STRENGTHS) + 1, ["local_weight"])  # both signs, and 0
        found = self._bounded(took, count["shared"], "loss utilisation")
        return found | {"as if nothing were shared": count["whole"] / took / self.rates["matrix FLOP/s"]}

    def _bounded(self, took: float, work: float, name: str) -> dict[str, Any]:
        return {"seconds": took, "useful TFLOP": work / 1e12, name: work / took / self.rates["matrix FLOP/s"]}

    def generation(self, rows: int, new_tokens: int) -> dict[str, Any]:
        """Decoding alone: the difference between long and short texts, against reading every weight once a step."""
        took = {}
        for n in (new_tokens // 8, new_tokens):
            words = ["--mode", "apply", "--multipliers", "1.0", "--batch_size", str(rows), "--limit", str(rows)]
            took[n] = self.session.run(*words, "--set", f"generation_params.max_new_tokens={n}")
        steps = new_tokens - new_tokens // 8
        rate = rows * steps / max(1e-9, took[new_tokens] - took[new_tokens // 8])
        embedding = self.model.get_input_embeddings().weight
        tied = embedding is self.model.get_output_embeddings().weight
        streamed = self.weights - (0 if tied else embedding.numel() * embedding.element_size())
        floor = rows / (streamed / self.rates["copy bytes/s"])
        whole = rows * new_tokens / took[new_tokens]
        return {"tokens/s decoding": rate, "tokens/s with prompts": whole, "floor tokens/s": floor, "generation / floor": rate / floor}

    def steps(self, rows: int, new_tokens: int) -> dict[str, Any]:
        """A decoding step in each way, with the choice of tokens; the first one of a way, which captures or compiles; equal tokens."""
        steering = Steering.of({self.layer: self.stored()})
        asked = decoding.rows_of(self.session.shape, rows)
        decoding.timed(self.model, steering, asked[:2], 4, choice.PLAIN_STEP)  # warms up
        found: dict[str, Any] = {}
        plain: list[list[int]] = []
        for how in (choice.PLAIN_STEP, choice.STATIC, choice.CAPTURED, choice.COMPILED):  # what may take long comes last
            try:
                took = decoding.timed(self.model, steering, asked, new_tokens, how)
            except UserError as error:
                found[how] = f"refused: {error}"
                continue
            plain = plain or took.tokens
            same = [a == b for one, other in zip(took.tokens, plain, strict=True) for a, b in zip(one, other, strict=True)]
            found |= {f"{how} ms a step": 1000 * took.step, f"{how} first step s": took.first, f"{how} equal tokens": sum(same) / len(same)}
        return found

    def memory(self, length: int) -> dict[str, Any]:
        """Peak of fit above the weights, batch 4, sequences of about `length` tokens."""
        if not self.cuda:
            return {"skipped": "no CUDA device"}
        path = self.session.base / "data/psychopathy/train.jsonl"
        before = path.read_text()
        rows = []
        for question in world.questions(8, self.config["vocab_size"], 5, length - 62):
            rows.append(json.dumps({"question": question, "answer_matching_behavior": " Yes", "answer_not_matching_behavior": " No"}))
        path.write_text("\n".join(rows) + "\n")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        self.session.run("--mode", "generate", "--set", "n_epochs=1", "--set", "batch_size=4")
        peak = torch.cuda.max_memory_allocated() - self.weights
        path.write_text(before)
        return {"weights GB": self.weights / 1e9, "peak above weights GB": peak / 1e9, "target GB": PEAK_GB}

    def profile(self, what: str, rows: int) -> str:
        """Where the time of a stage goes, by operator."""
        words = {
            "fit": ["--mode", "generate", "--set", "n_epochs=1", "--limit", str(rows)],
            "loss": ["--mode", "loss", "--split", "train", "--multipliers", *map(str, STRENGTHS), "--limit", str(rows)],
            "generation": ["--mode", "apply", "--multipliers", "1.0", "--limit", str(rows), "--set", "generation_params.max_new_tokens=16"],
        }[what]
        kinds = [torch.profiler.ProfilerActivity.CPU] + ([torch.profiler.ProfilerActivity.CUDA] if self.cuda else [])
        with torch.profiler.profile(activities=kinds) as seen:
            self.session.run(*words)
        by = "self_cuda_time_total" if self.cuda else "self_cpu_time_total"
        path = self.out / f"profile_{self.name}_{what}.txt"
        path.write_text(seen.key_averages().table(sort_by=by, row_limit=30), encoding="utf-8")
        return path.name


def measure(shape: str, args: argparse.Namespace, device: str, rates: dict[str, float], report: dict[str, Any]) -> None:
    """Every step of one shape; a step that fails is written down and the next begins."""
    found: dict[str, Any] = report["shapes"].setdefault(shape, {})
    dtype = "float32" if args.tiny else "bfloat16"
    start = time.perf_counter()
    with Session(world.SHAPES[shape], train=args.rows, test=args.batch, dtype=dtype, device=device, new_tokens=args.new_tokens) as session:
        world.invent_vectors(session.base, NAME, world.SHAPES[shape], [("spilt", "local_weight")], scale=0.0005)
        found["made in s"] = time.perf_counter() - start
        bench = Bench(session, shape, rates, found, args.out)
        steps: dict[str, Callable[[], Any]] = {
            "correct": lambda: bench.correct(min(8, args.rows), args.new_tokens // 4),
            "loss": lambda: bench.loss(args.rows),
            "generation": lambda: bench.generation(args.batch, args.new_tokens),
            "memory": lambda: bench.memory(512),
            "fit": lambda: bench.fit(args.rows),
            "steps": lambda: bench.steps(args.batch, args.new_tokens),
        }
        for name, step in steps.items():
            if time.perf_counter() - report["started"] > args.limit:
                found[name] = "left out: the time is over"
                continue
            start = time.perf_counter()
            try:
                found[name] = step()
                short = [key for key, least in TARGETS.items() if isinstance(found[name], dict) and found[name].get(key, least) < least]
                if short and not args.tiny or args.profile and name in ("fit", "loss", "generation"):
                    found[name]["profile"] = bench.profile(name, min(32, args.rows))
            except (RuntimeError, OSError, ValueError, AssertionError) as error:  # out of memory among them
                traceback.print_exc()
                found[name] = f"failed: {type(error).__name__}: {str(error)[:500]}"
            print(f"{shape} {name} ({time.perf_counter() - start:.1f} s): {json.dumps(found[name], default=str)}", flush=True)
            write(report, args.out)


def write(report: dict[str, Any], out: Path) -> None:
    """gpu.json, and gpu.md with ratios first."""
    (out / "gpu.json").write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    lines = [f"{report['device']}, torch {report['torch']}, transformers {report['transformers']}", ""]
    lines += ["| shape | step | figure | value | target |", "|---|---|---|---|---|"]
    for shape, steps in report["shapes"].items():
        for step, figures in steps.items():
            if not isinstance(figures, dict):
                lines.append(f"| {shape} | {step} | | {figures if isinstance(figures, str) else f'{figures:.3g}'} | |")
                continue
            for key, value in sorted(figures.items(), key=lambda item: item[0] not in TARGETS):
                shown = f"{value:.3g}" if isinstance(value, float) else value
                lines.append(f"| {shape} | {step} | {key} | {shown} | {TARGETS.get(key, '')} |")
    (out / "gpu.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(world.SHAPES))
    parser.add_argument("--rows", type=int, help="pairs of fit and loss; default 500")
    parser.add_argument("--batch", type=int, help="texts side by side; default 64")
    parser.add_argument("--new_tokens", type=int, help="default 128")
    parser.add_argument("--limit", type=float, default=480, help="seconds after which no step is begun")
    parser.add_argument("--profile", action="store_true", help="profile fit, loss and generation also when on target")
    parser.add_argument("--tiny", action="store_true", help="on the CPU, float32, small")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.tiny and not torch.cuda.is_available():
        print("error: no CUDA device here; --tiny runs the same steps on the CPU", file=sys.stderr)
        return 2
    device, small = ("cpu", 1) if args.tiny else ("cuda:0", 0)
    args.shapes = args.shapes or (["tiny", "tiny-gemma-2"] if small else ["gemma-2-9b", "qwen2.5-7b"])
    args.rows, args.batch = args.rows or (6 if small else 500), args.batch or (4 if small else 64)
    args.new_tokens = args.new_tokens or (8 if small else 128)
    import transformers

    name = "cpu" if small else torch.cuda.get_device_name(0)
    rates = card(device, torch.float32, 256, 0.01) if small else card(device, torch.bfloat16, 8192, 4.0)
    report: dict[str, Any] = {"device": name, "torch": torch.__version__, "transformers": transformers.__version__, "card": rates}
    report |= {"started": time.perf_counter(), "rows": args.rows, "batch": args.batch, "shapes": {}}
    print(json.dumps({k: v for k, v in report.items() if k != "shapes"}), flush=True)
    for shape in args.shapes:
        if time.perf_counter() - report["started"] < args.limit:
            measure(shape, args, device, rates, report)
            if not small:
                torch.cuda.empty_cache()
    write(report, args.out)
    steps = [step for shape in report["shapes"].values() for step in shape.values()]
    failed = any(isinstance(step, str) and step.startswith("failed") for step in steps)
    wrong = any(isinstance(step, dict) and step.get("right") is False for step in steps)
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
