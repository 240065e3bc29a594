"""How time and memory grow, and what ten cells cost against their arithmetic.

    python benchmarks/growth.py                      # all axes -> growth.csv and growth.png
    python benchmarks/growth.py --axes rows layer
    python benchmarks/growth.py --ten_cells          # ten cells x 21 multipliers of loss on Qwen2 12 x 512

Every point is a process of its own, with a model made in memory: its times hold no start-up, its peak memory is its own.
Times are of the processor (one thread): a machine shared with others does not blur them.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import flops, world  # noqa: E402

HERE = Path(__file__).parent
# Qwen2 12 x 256: of the proportions of 12 x 512, and a quarter of its work
BASE: dict[str, Any] = {"multipliers": 4, "cells": 1, "rows": 16, "length": 22, "depth": 12, "layer": 5, "stages": ["fit", "apply", "loss"]}
AXES: dict[str, tuple[list[int], list[str]]] = {
    "multipliers": ([1, 2, 5, 10, 20], ["loss", "apply"]),
    "cells": ([1, 3, 6, 10], ["loss"]),
    "rows": ([8, 16, 32, 64], ["fit", "loss", "apply"]),
    "length": ([22, 80, 160, 320], ["fit", "loss"]),
    "depth": ([6, 12, 24], ["fit", "loss", "apply"]),
    "layer": ([1, 4, 7, 10], ["fit", "loss"]),
}
CELLS = [("spilt", "local_weight"), ("spilt", "lora"), ("spilt", "vector"), ("sft", "local_weight"), ("sft", "lora"), ("sft", "vector"),
         ("reps", "local_weight"), ("reps", "lora"), ("reps", "vector"), ("caa", "vector")]  # fmt: skip


def shape_of(depth: int, layer: int, hidden: int = 256, inner: int = 704, heads: int = 4) -> world.Shape:
    fields = {"num_hidden_layers": depth, "hidden_size": hidden, "intermediate_size": inner}
    return world.Shape({**world.SHAPES["qwen2-12x512"].config, **fields, "num_attention_heads": heads, "num_key_value_heads": heads}, layer)


def point(p: dict[str, Any]) -> dict[str, Any]:
    """One point, in this process: seconds of each stage, peak memory above what model and libraries take."""
    from benchmarks.inprocess import NAME, Session, peak_mb

    shape = world.Shape(p["config"], p["layer"]) if "config" in p else shape_of(p["depth"], p["layer"])
    strengths = [str(round(0.1 * (k + 1), 6)) for k in range(p["multipliers"])] if isinstance(p["multipliers"], int) else p["multipliers"]
    out: dict[str, Any] = {}
    with Session(shape, train=p["rows"], test=p["rows"], length=p["length"]) as session:
        world.invent_vectors(session.base, NAME, shape, CELLS[: p["cells"]])
        session.run("--mode", "loss", "--split", "train", "--multipliers", "1.0", "--limit", "1")  # warms up
        before = peak_mb()
        for stage in p["stages"]:
            which = {"method": "all", "form": "all"} if p["cells"] > 1 else {}
            if stage == "fit":
                session.run("--mode", "generate", "--set", "n_epochs=1", "--set", "output_length=4096")
            elif stage == "apply":
                session.run("--mode", "apply", "--multipliers", *strengths, "--set", "generation_params.max_new_tokens=16")
            else:
                more = ["--set", "output_length=4096"] if p["length"] and p["length"] > 400 else []
                session.run("--mode", "loss", "--split", "train", "--multipliers", *strengths, *more, **which)
            out[stage] = session.cpu
            out[f"{stage}_mb"] = peak_mb() - before
    return out


def apart(p: dict[str, Any]) -> dict[str, Any]:
    """A point in a process of its own."""
    env = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ}
    done = subprocess.run([sys.executable, __file__, "--point", json.dumps(p)], capture_output=True, text=True, env=env)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def grow(axes: list[str]) -> list[dict[str, Any]]:
    """Rows (axis, value, stage, CPU seconds, peak MB above model and libraries)."""
    rows = []
    for axis in axes:
        values, stages = AXES[axis]
        for value in values:
            for stage in stages:
                found = apart({**BASE, axis: value, "stages": [stage]})
                figures = {"seconds": round(found[stage], 3), "mb": round(found[f"{stage}_mb"], 1)}
                row = {"axis": axis, "value": value, "stage": stage, **figures}
                rows.append(row)
                print(row, file=sys.stderr, flush=True)
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """One panel an axis: seconds (lines) of each stage, and memory (dotted, right)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    axes = list(dict.fromkeys(row["axis"] for row in rows))
    figure, panels = plt.subplots(2, (len(axes) + 1) // 2, figsize=(10, 5.2), squeeze=False)
    colours = {"fit": "#1b6ca8", "apply": "#c8553d", "loss": "#3a7d44"}
    for panel, axis in zip(panels.flat, axes, strict=False):
        right = panel.twinx()
        for stage, colour in colours.items():
            some = [row for row in rows if row["axis"] == axis and row["stage"] == stage]
            if some:
                x = [int(row["value"]) for row in some]
                panel.plot(x, [float(row["seconds"]) for row in some], "o-", color=colour, label=stage, markersize=3)
                right.plot(x, [float(row["mb"]) for row in some], ":", color=colour, linewidth=1)
        panel.set_xlabel({"length": "statement tokens", "depth": "blocks", "layer": "steered block"}.get(axis, axis))
        panel.set_ylabel("CPU s")
        right.set_ylabel("MB (dotted)")
        panel.set_ylim(bottom=0)
        right.set_ylim(bottom=0)
    for panel in panels.flat[len(axes) :]:
        panel.axis("off")
    handles = [plt.Line2D([], [], color=colour, marker="o", markersize=3, label=stage) for stage, colour in colours.items()]
    figure.legend(handles=handles, loc="upper center", ncol=3, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.95))
    figure.savefig(path, dpi=80)
    plt.close(figure)


# ---------------------------------------------------------------- ten cells


def counted(config: dict[str, Any], layer: int, rows: int, length: int | None, multipliers: int, forms: list[str]) -> dict[str, float]:
    """FLOPs of loss for cells of these forms: recording once, and a suffix pass at every strength."""
    from spilt.data.chat import Chat

    chat = Chat.of(world.tokenizer(config["vocab_size"]))
    pairs = [[chat.encode(q, a) for a in (" Yes", " No")] for q in world.questions(rows, config["vocab_size"], 0, length)]
    lengths = [len(s.input_ids) for pair in pairs for s in pair]
    scored = sum(len(s.input_ids) - s.prompt_length for pair in pairs for s in pair)
    prompts = [pair[0].prompt_length for pair in pairs]
    answers = [[len(s.input_ids) - s.prompt_length for s in pair] for pair in pairs]
    template = chat.prefix_length
    packed = template + sum(p - template + sum(a) for p, a in zip(prompts, answers, strict=True))
    steering = {form: flops.form_per_token(config, form) for form in forms}
    whole = shared = 0.0
    for form in forms:
        whole += multipliers * (flops.suffix(config, layer, lengths, scored) + steering[form] * sum(lengths))
        shared += multipliers * (flops.shared_suffix(config, layer, template, prompts, answers, scored) + steering[form] * packed)
    record = flops.blocks(config, layer + 1, packed, flops.causal_pairs(packed // max(1, rows)) * rows)
    return {"whole": whole + flops.prefix(config, layer, lengths), "shared": shared + record}


def ten_cells(rows: int) -> dict[str, Any]:
    """Ten cells x 21 multipliers, against their arithmetic at the measured matrix rate; the price of one multiplier more."""
    import torch

    shape = world.SHAPES["qwen2-12x512"]
    torch.set_num_threads(1)
    rates = [flops.matrix_rate(shape.config, tokens) for tokens in (512, 1024, 2048)]
    sweep = [str(round(0.2 * k, 6)) for k in range(-10, 11)]
    base = {**BASE, "config": shape.config, "layer": shape.layer, "rows": rows, "length": None, "stages": ["loss"]}
    found: dict[str, Any] = {"rows": rows, "matrix GFLOP/s": round(max(rates) / 1e9, 1)}
    took = apart({**base, "cells": 10, "multipliers": sweep})["loss"]
    work = counted(shape.config, shape.layer, rows, None, len(sweep), [form for _, form in CELLS])
    found["seconds"] = round(took, 2)
    for name, count in work.items():
        found[f"{name}: GFLOP"], found[f"{name}: seconds at that rate"] = round(count / 1e9), round(count / max(rates), 2)
        found[f"{name}: times over"] = round(took / (count / max(rates)), 2)
    # one multiplier more: symmetric strengths, so that each adds one pass (both signs are measured)
    seconds = {n: min(apart({**base, "cells": 1, "multipliers": n})["loss"] for _ in range(2)) for n in (1, 2, 20, 21)}
    found["seconds of the 2nd multiplier"] = round(seconds[2] - seconds[1], 3)
    found["seconds of the 21st multiplier"] = round(seconds[21] - seconds[20], 3)
    found["mean seconds of multipliers 3 to 21"] = round((seconds[21] - seconds[2]) / 19, 3)
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--ten_cells", action="store_true")
    parser.add_argument("--rows", type=int, default=16, help="of ten_cells")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of growth.csv and growth.png")
    args = parser.parse_args(argv)
    if args.point:
        print(json.dumps(point(json.loads(args.point))))
    elif args.ten_cells:
        print(json.dumps(ten_cells(args.rows), indent=1))
    else:
        rows = grow(args.axes)
        with open(args.out / "growth.csv", "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        plot(rows, args.out / "growth.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
