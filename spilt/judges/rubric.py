"""A rubric: what a judge is asked about a text, and how its rating is read. A YAML file that may be copied and edited.

The text that is judged is somebody's: whatever stands in it, it stays between marks that it cannot write, and is never a template.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from spilt.errors import UserError, printable, unknown
from spilt.settings import load_yaml

FOLDER = Path(__file__).parent / "rubrics"
BUILT_IN = tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))
KEYS = ("name", "scale", "system", "prompt", "datasets", "parameters")
FIELDS = ("question", "answer", "concept", "reference")  # what may stand in {{...}}
PARAMETERS = ("temperature", "max_tokens", "max_completion_tokens", "top_p", "seed", "reasoning_effort")  # as the endpoint takes them
LONGEST, TAIL = 12_000, 3_000  # characters of a text that are shown; of them from its end
PLACE = re.compile(r"\{\{\s*(\w+)\s*\}\}")
RATING = re.compile(
    r"\brating\b[\s*_`\"']*[:=][\s*_`\"'\[(]*(-?\d{1,4})(?:\.0+)?(?:\s*/\s*(\d{1,4}))?(?![\w%]|[.,]\d|\s*[-–/]\s*\d)", re.IGNORECASE
)


class Rubric(NamedTuple):
    """name: of the measure that it gives; scale: the least and the largest rating, whole numbers; datasets: that it is meant for."""

    name: str
    scale: tuple[int, int]
    system: str
    prompt: str
    datasets: tuple[str, ...] = ()
    parameters: Mapping[str, Any] = {}

    @property
    def decides(self) -> dict[str, Any]:
        """What of it decides a rating, for manifests."""
        return {**self._asdict(), "datasets": None, "parameters": dict(self.parameters)}

    def messages(self, **values: str | None) -> list[dict[str, str]]:
        """The prompt about one text. values: of FIELDS; each in one pass, so that braces in it mean nothing."""
        shown = {name: _shown(value or "") for name, value in values.items()}
        mark = sha256("\0".join(shown.values()).encode()).hexdigest()[:16]  # a text cannot hold its own hash

        def filled(found: re.Match[str]) -> str:
            name = found[1]
            return f"<{name} {mark}>\n{shown.get(name, '')}\n</{name} {mark}>"

        said = (("system", self.system), ("user", PLACE.sub(filled, self.prompt)))
        return [{"role": role, "content": text} for role, text in said if text]

    def rating(self, reply: str) -> int | None:
        """The last well-formed 'Rating: N' (also N/{top}), None where there is none or it is not on the scale."""
        low, high = self.scale
        found = [int(value) for value, top in RATING.findall(reply) if not top or int(top) == high]
        return found[-1] if found and low <= found[-1] <= high else None


def _shown(text: str) -> str:
    """As the judge reads it: control characters as escapes, the middle of a very long text left out."""
    if (more := len(text) - LONGEST) > 0:
        text = f"{text[: LONGEST - TAIL]}\n[... {more} characters left out ...]\n{text[-TAIL:]}"
    return "\n".join(map(printable, text.split("\n")))


def read(path: Path) -> Rubric:
    """Raises UserError naming the file and what is wrong in it."""
    content = load_yaml(path)
    for key in content:
        if key not in KEYS:
            raise UserError(f"{path}: {unknown('key', key, KEYS)}")
    name, scale, prompt = content.get("name", path.stem), content.get("scale"), content.get("prompt")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z]\w{0,40}", name, re.ASCII):
        raise UserError(f"{path}: name is {name!r}; wanted a word, the name of the measure")
    if not (isinstance(scale, list) and len(scale) == 2 and all(type(end) is int for end in scale) and 0 <= scale[0] < scale[1] < 1000):
        raise UserError(f"{path}: scale is {scale!r}; wanted the least and the largest rating, such as [1, 4]")
    system = content.get("system") or ""
    if not isinstance(prompt, str) or not isinstance(system, str) or "answer" not in PLACE.findall(prompt):
        raise UserError(f"{path}: prompt (and system, if any) must be text, and the prompt must hold {{{{answer}}}}")
    for place in (*PLACE.findall(prompt), *PLACE.findall(system)):
        if place not in FIELDS or place in PLACE.findall(system):
            raise UserError(f"{path}: {{{{{place}}}}}: the prompt (not system) may hold {', '.join(f'{{{{{f}}}}}' for f in FIELDS)}")
    parameters, datasets = content.get("parameters") or {}, content.get("datasets") or []
    if not isinstance(parameters, dict) or not all(isinstance(value, str | int | float) for value in parameters.values()):
        raise UserError(f"{path}: parameters must be `name: value` lines of {', '.join(PARAMETERS)}")
    for key in parameters:
        if key not in PARAMETERS:
            raise UserError(f"{path}: {unknown('parameter', key, PARAMETERS)}")
    if not isinstance(datasets, list) or not all(isinstance(one, str) for one in datasets):
        raise UserError(f"{path}: datasets is {datasets!r}; wanted a list of names")
    return Rubric(name, (scale[0], scale[1]), system.strip(), prompt.strip(), tuple(datasets), parameters)


def rubrics_of(words: Iterable[str]) -> list[Rubric]:
    """Those that --rubric names: built in ones by name, others by their files. Raises UserError; two of one name too."""
    found: list[Rubric] = []
    for word in words:
        path = FOLDER / f"{word}.yaml" if word in BUILT_IN else Path(word)
        if path.suffix not in (".yaml", ".yml"):
            raise UserError(f"--rubric: {unknown('rubric', word, BUILT_IN)}, or a YAML file such as those in {FOLDER}")
        found.append(read(path))
        if found[-1].name in [other.name for other in found[:-1]]:
            raise UserError(f"--rubric {word}: there is another rubric with the name {found[-1].name!r}; give it its own `name`")
    return found


def of_dataset(dataset: str) -> list[Rubric]:
    """The built-in ones that are meant for it."""
    return [rubric for rubric in rubrics_of(BUILT_IN) if dataset in rubric.datasets]


def harmonic_mean(ratings: Sequence[float]) -> float:
    """n / sum 1/r, 0 if any is 0: AxBench's overall score (arXiv 2501.17148, section 4)."""
    return len(ratings) / sum(1 / rating for rating in ratings) if all(ratings) else 0.0
