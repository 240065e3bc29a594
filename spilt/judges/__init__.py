"""Judges of texts: chat messages in, replies out. A reply that cannot be had is missing, with the reason, and never a 0.

`judge_of` makes one: any OpenAI-compatible endpoint, or a local model. rubric.py: what it is asked, and the rating in its reply.
"""

from __future__ import annotations

from pathlib import Path

from spilt.errors import UserError
from spilt.judges.base import NEEDED, Judge, Messages, Reply, Tally
from spilt.judges.rubric import BUILT_IN, Rubric, of_dataset, rubrics_of
from spilt.model import checkpoint
from spilt.model.identity import model_hash
from spilt.model.locate import locate

ENDPOINT = "endpoint"  # a word for --judge; any other is a checkpoint
HOW = (
    f"--judge {ENDPOINT} asks an OpenAI-compatible one ({', '.join(NEEDED)} in the environment), --judge MODEL a local model "
    "(a folder under models/, a path, or a hub id)"
)


def name_of(word: str, base_dir: Path) -> str:
    """How a judge is known, in results and in what it has answered before. Raises UserError for one that cannot be asked."""
    if word == ENDPOINT:
        from spilt.judges import endpoint  # brings threads, for --help nothing

        return endpoint.name()
    try:
        name, folder = locate(base_dir, word)
    except UserError as error:
        said = str(error).replace("--model_name", "--judge").replace("--download fetches it", f"`hf download {word}` fetches it")
        raise UserError(said) from None
    if not checkpoint.there(folder):
        raise UserError(f"--judge {word}: no checkpoint {folder}; {HOW}")
    return f"{name} {model_hash(folder)[:16]}"


def judge_of(word: str, base_dir: Path, kept: Path | None, device: str = "cpu", dtype: str = "float32") -> Judge:
    """The judge that --judge names. kept: the folder of its replies. dtype: of a local model. Raises UserError as `name_of`."""
    name = name_of(word, base_dir)
    if word == ENDPOINT:
        from spilt.judges import endpoint

        return endpoint.from_environment(kept)
    from spilt.judges.local import Local  # brings torch

    return Local(f"{name} {dtype}", locate(base_dir, word)[1], device, kept, dtype)


__all__ = [
    "BUILT_IN",
    "ENDPOINT",
    "HOW",
    "Judge",
    "Messages",
    "Reply",
    "Rubric",
    "Tally",
    "judge_of",
    "name_of",
    "of_dataset",
    "rubrics_of",
]
