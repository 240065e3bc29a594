"""--complete_losing: not_matching answers that are missing are written by the unsteered model, and kept with the rows of data/{name}/.

Greedy, so that the same model writes the same; what was written once is reused for as long as files, model and settings are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spilt import plan
from spilt.artifacts.store import Store
from spilt.data.chat import Question
from spilt.data.own import Own
from spilt.model import checkpoint
from spilt.model.identity import model_hash
from spilt.verbs import Request, Step

LONGEST = 128  # tokens of an answer
KEYS = ("dtype", "use_chat_template", "system_prompt")


def writer(request: Request, step: Step) -> dict[str, Any]:
    """What decides the answers, for source.json. Raises UserError for a model that is not there."""
    if not checkpoint.there(step.model):
        plan.check_model(Store(request.base_dir), request.model)
    known = {key: getattr(step.settings, key) for key in KEYS}
    return {"model": request.model, "sha256": model_hash(step.model), **known, "max_new_tokens": LONGEST}


def write(request: Request, step: Step, own: Own, questions: Sequence[Question]) -> list[str]:
    """An answer to each. Raises UserError as loading does."""
    from spilt import api
    from spilt.run import quiet_libraries
    from spilt.steering.steering import Steering

    quiet_libraries()
    model, tokenizer = api.load(step.model, dtype=own.writer["dtype"], device=request.device, anatomy=step.settings.anatomy)
    how = {"max_new_tokens": LONGEST, "do_sample": False, "use_chat_template": own.writer["use_chat_template"]}
    table = api.generate(
        model, tokenizer, Steering.nothing(model), list(questions), 0.0, system_prompt=own.writer["system_prompt"] or "", **how
    )  # type: ignore[arg-type]
    return [str(text).strip() for text in table["text"]]
