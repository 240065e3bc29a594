"""spilt export: a stored vector, LoRA or local weight for other programs, compared with ours before it is called done."""

from __future__ import annotations

import argparse
import math
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from spilt.artifacts.store import Store
from spilt.cell import Cell
from spilt.errors import UserError
from spilt.say import ready, which_flags
from spilt.settings.fields import STRONGEST
from spilt.terminal import program, say

if TYPE_CHECKING:
    from torch import Tensor

TEXTS = (  # that exported and own logits are compared on
    "The ship left the harbour early in the morning, and nobody on the quay knew when it would be back.",
    "Question: what would you do with a free day?\nAnswer: I would",
    "1, 2, 3, 5, 8, 13,",
)
CLOSE = 1e-4  # of the largest logit
VISIBLE = 10  # times the difference is what steering must change, or the comparison says nothing


class Format(NamedTuple):
    """A kind of export: a file of this room with `write(job, folder)`, which returns the card's words, and `reload(job, folder)`."""

    module: str
    does: str
    scopes: bool = False  # whether it can say that some tokens alone are steered


FORMATS: dict[str, Format] = {
    "safetensors": Format("stored", "the Steering itself with all that is known of it; exact for every form and family", scopes=True),
    "released": Format("released", "layer_{id}.pt, as fits are stored: put where a fit would lie, it is applied and measured"),
    "peft": Format("peft", "an adapter for PEFT: LoRA at linear maps, constants as its biases"),
    "merged": Format("merged", "a checkpoint in float32 with the update in its weights"),
    "gguf": Format("gguf", "control_vector.gguf and lora.gguf for llama.cpp"),
    "vllm": Format("vllm", "a LoRA for vLLM, with the line that serves it"),
    "vllm-hook": Format("vllm_hook", "a vector for vLLM-Hook, per request, with its configuration"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Write the folder; 0, or 2 for what cannot be exported."""
    parser = argparse.ArgumentParser(
        prog="spilt export",
        description=__doc__,
        epilog="\n".join(["formats:", *(f"  {name:12} {row.does}" for name, row in FORMATS.items())]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="a folder that is not there yet")
    parser.add_argument("--multiplier", type=float, metavar="M", help="the strength that is written; default: the recommended one")
    parser.add_argument("--base_model", metavar="NAME", help="how the files call the base model, such as a hub id; default: its path")
    which_flags(parser)
    return program(parser, argv, _export)


def _export(args: argparse.Namespace) -> int:
    if args.output.exists():
        raise UserError(f"--output {args.output}: is there already; give another name, or remove it")
    if args.multiplier is not None and not 0 < abs(args.multiplier) <= STRONGEST:  # nan is not
        raise UserError(f"--multiplier {args.multiplier:g}: wanted a finite number within +-{STRONGEST:g}, and not 0, which is no steering")
    host, steering, settings, cell = ready(args, dtype="float32")
    multiplier = args.multiplier if args.multiplier is not None else _recommended(args, steering, cell)
    from spilt.export.folding import Job
    from spilt.report.cells import CURVES_FILE
    from spilt.steering.steering import RECOMMENDED, Steering

    if args.multiplier is None:
        steering = Steering(steering, {**steering.about, RECOMMENDED: multiplier})

    base = args.base_model or str(Store(args.base_dir).model(args.model_name).resolve())
    job = Job(host.model, host.tokenizer, steering.to(host.model), multiplier, base, args.output.resolve(), host.path)
    facts = {
        "method": settings.method if cell or "method" in steering.about else None,
        "data": args.dataset if cell else None,
        "concept": args.concept,
        "positions of the fit": settings.steer_positions,
    }
    picture = Store(args.base_dir).loss_folder(cell) / CURVES_FILE if cell else None
    for line in export(job, args.format, facts, picture):
        say(line)
    return 0


def _recommended(args: argparse.Namespace, steering: Any, cell: Cell | None) -> float:
    """What the stored losses or the file itself recommend, or a UserError that asks for --multiplier."""
    from spilt.report import recommend
    from spilt.steering.steering import RECOMMENDED

    why = "nothing is known of its strength"
    if args.steering is not None:
        if known := steering.about.get(RECOMMENDED):
            return float(known)
    elif cell is not None:
        try:
            rows = recommend(args.base_dir, cell.model, cell.dataset).to_dict("records")
        except UserError as error:
            rows, why = [], str(error)
        for row in rows:
            if (row["method"], row["intervention"]) == (cell.method, cell.intervention):
                if row["multiplier"] is not None and math.isfinite(row["multiplier"]) and row["multiplier"]:
                    return float(row["multiplier"])
                why = str(row["reason"])
    raise UserError(f"no recommended multiplier ({why}); give --multiplier M")


def export(job: Any, kind: str, facts: dict[str, Any], picture: Path | None = None) -> list[str]:
    """The folder job.place, whole or not at all: written beside it, loaded again, compared, then renamed. Returns what to tell."""
    import torch

    from spilt.export import card
    from spilt.steering.steering import Steering

    module: Any = import_module(f"spilt.export.{FORMATS[kind].module}")
    scope = job.steering.scope
    if scope != "all" and not FORMATS[kind].scopes:
        raise UserError(
            f"--format {kind}: this Steering acts on the tokens of scope {scope!r} alone, which no file of this kind can say; "
            "--format safetensors holds any Steering"
        )
    plain = logits(job.model, job.tokenizer)
    ours = logits(job.model, job.tokenizer, job.steering, job.multiplier)
    job.place.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{job.place.name}.", dir=job.place.parent))
    try:
        loading = module.write(job, folder)
        with module.reload(job, folder) as found:
            ours_again = isinstance(found, Steering)
            theirs = logits(job.model, job.tokenizer, found, job.multiplier) if ours_again else logits(found, job.tokenizer)
        size = float(ours.abs().max())
        error, effect = (float((ours - other).abs().max()) / size for other in (theirs, plain))
        if not (error <= CLOSE and effect >= VISIBLE * error and effect > 0) or not torch.isfinite(theirs).all():
            raise UserError(
                f"--format {kind}: reloaded, it gives other logits: they differ by {error:.1e} of the largest, and steering changes them "
                f"by {effect:.1e} (wanted at most {CLOSE:g}, and less than a {VISIBLE}th of the change); nothing is written; "
                "--format safetensors is exact for every form and family"
            )
        checked = (
            f"Loaded again, its logits on {len(TEXTS)} texts differ from the steered original's by {error:.1e} of the largest at most "
            f"(float32); steering changes them by {effect:.1e}."
        )
        if picture is not None and picture.is_file():
            shutil.copyfile(picture, folder / picture.name)
        words = card.text(job, kind, loading, facts, checked, picture is not None and picture.is_file())
        (folder / "README.md").write_text(words, encoding="utf-8")
        folder.chmod(0o755)  # of a temporary one: 0700
        folder.rename(job.place)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return [f"{job.place}: multiplier {job.multiplier:g}, {card.steered(scope)}", checked, "README.md in it says how it is loaded"]


def logits(model: Any, tokenizer: Any, steering: Any = None, multiplier: float = 1.0) -> Tensor:
    """[tokens, vocabulary] of all TEXTS, one after the other, steered at the tokens of its scope; half of a text is its prompt."""
    import torch

    from spilt.engine import scopes, whole

    found = []
    with torch.no_grad(), whole.steer(model, steering, multiplier) if steering and steering.scope == "all" else nullcontext():
        for text in TEXTS:
            ids = torch.tensor([tokenizer(text)["input_ids"]], device=model.device)
            if steering is None or steering.scope == "all":
                made = model(input_ids=ids, use_cache=False).logits[0]
            else:
                every = torch.ones_like(ids, dtype=torch.bool)
                made = scopes.logits(model, steering, multiplier, ids, every, torch.tensor([ids.shape[1] // 2]), every)
            found.append(made.float().cpu())
    return torch.cat(found)
