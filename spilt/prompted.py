"""Prompts as baselines: losses of the unsteered model behind a system prompt or a few examples, on the questions of the methods.

prompt_{split}.csv of each beside the losses of the methods, of which they are at m = 0 what steering is at m.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from spilt import verbs
from spilt.artifacts import manifest
from spilt.artifacts.store import Store
from spilt.data import readers
from spilt.data.chat import Chat, Conversation, Encoded
from spilt.data.prompt_baseline import Prompt, behind
from spilt.disturbance import steps
from spilt.engine import score, whole
from spilt.errors import UserError
from spilt.model import host
from spilt.run import quiet_libraries
from spilt.tasks.context import check_context, lengths_of
from spilt.tasks.measure import table_rows
from spilt.tasks.recordings import Run
from spilt.verbs.base import parts_of

DECIDING = ("dtype", "use_chat_template", "system_prompt", "output_length", "max_num_of_examples", "anatomy")


def encoded(chat: Chat, turns: Conversation, pairs: Sequence[readers.Pair], output_length: int) -> list[Encoded]:
    """Both answers of each pair behind a prompt, cut where they are cut without it: the same answer tokens are scored."""
    out = []
    for pair in pairs:
        for question, text in pair.sides:
            whole_one = behind(turns, question, chat.system_prompt or "")
            longer = len(chat.prompt_ids(whole_one)) - len(chat.prompt_ids(question))
            out.append(chat.encode(whole_one, text, output_length + longer, pair.row))
    return out


def measure(
    base: Path,
    model: str,
    dataset: str,
    cell: tuple[str, str],
    split: str,
    prompts: Sequence[Prompt],
    device: str = "",
    tell: Callable[[str], None] = print,
) -> int:
    """Store the losses behind prompts that are not there yet, with the settings of a cell (method, form). Returns how many."""
    device = device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    step, request, seen = steps(base, model, dataset, [cell], device, "loss", split)[0]
    step, store, s = step._replace(vectors=()), Store(base), step.settings
    settings = {name: value for name, value in s.as_dict().items() if name in DECIDING}
    todo = []
    for prompt in prompts:
        own = {"settings": settings, "prompt": prompt.decides, "table": "all", "split": split}
        path, parts = store.prompt_table(model, dataset, prompt.name, split), parts_of(step, split, own, None, seen)
        if manifest.standing(path, parts) != "done":
            todo.append((prompt, path, parts))
    if not todo:
        return 0
    quiet_libraries()
    loaded = host.load(request.model_folder, s.dtype, device, s.anatomy)
    run = Run.alone(request, loaded, device, seen, tell)
    pairs = readers.read_pairs(verbs.entry_of("measure", split, base, dataset), None, s.max_num_of_examples)
    chat = loaded.chat(s.use_chat_template, s.system_prompt)
    for number, (prompt, path, parts) in enumerate(todo, 1):
        sequences = encoded(chat, prompt.turns, pairs, s.output_length)
        what = f"prompt {prompt.name}, answers with their questions"
        check_context(loaded.model, what, lengths_of(pairs, sequences), "shorten the prompt")
        found = score.losses(whole.Scorer(loaded.model, None, sequences, loaded.pad_id), [0.0])
        table: Any = table_rows(found, 0, 0.0, 0.0, "all", split)
        if not table["loss_sum"].map(abs).lt(float("inf")).all():
            raise UserError(f"losses behind prompt {prompt.name} are NaN or infinite; use another --dtype (bfloat16, float32)")
        run.store_result(step, path, table.to_csv(index=False, lineterminator="\n"), parts, {"multipliers": [0.0]})
        tell(f"[{number}/{len(todo)}] prompt {prompt.name}: {len(pairs)} {split} questions of {dataset}")
    return len(todo)
