"""The README's tables, made from the tables of the code: python tools/readme_tables.py --write (or --check: exit 1 on drift)."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from spilt.baselines import BASELINES  # noqa: E402
from spilt.behaviour.files import JUDGES  # noqa: E402
from spilt.cell import FORMS  # noqa: E402
from spilt.cli import first_words, parser  # noqa: E402
from spilt.downstream.rows import TASKS, Part  # noqa: E402
from spilt.downstream.words import KINDS as VARIANTS  # noqa: E402
from spilt.export import FORMATS  # noqa: E402
from spilt.methods import METHODS  # noqa: E402
from spilt.steering.anatomy import COMPONENTS, FAMILIES  # noqa: E402
from spilt.steering.steering import KINDS  # noqa: E402
from spilt.weight_steering.flags import rows as weights_flags  # noqa: E402

EQUATIONS = {
    "vector": "m v", "lora": "m (x A) B", "local_weight": "m (x dW + db)", "ablation": r"-m (h . r) r, \|r\| = 1",
    "post_block": "m alpha U act(D h)",
}  # fmt: skip


def arguments() -> str:
    """One row per flag of the command line."""
    rows = ["| flag | meaning |", "|---|---|"]
    for action in parser()._actions:
        if action.option_strings and action.dest not in ("help", "version"):
            rows.append(f"| `{action.option_strings[0]}`{' (required)' if action.required else ''} | {action.help} |")
    return "\n".join(rows)


def words() -> str:
    """One row per word that may come first."""
    return "\n".join(["| word | what it does |", "|---|---|", *(f"| `spilt {name}` | {line} |" for name, line in first_words().items())])


def methods() -> str:
    """Which method finds which form."""
    rows = [f"| method | what it does | {' | '.join(FORMS)} |", f"|---|---|{'---|' * len(FORMS)}"]
    for row in METHODS.values():
        rows.append(f"| `{row.name}` | {row.summary} | {' | '.join('yes' if form in row.forms else '-' for form in FORMS)} |")
    return "\n".join(rows)


def forms() -> str:
    """What each form adds to the stream."""
    rows = [f"| `{name}` | {EQUATIONS[name]} |" for name in FORMS]
    return "\n".join(["| form | adds at the output of block `layer` |", "|---|---|", *rows])


def families() -> str:
    """Model families and read points."""
    kinds = [", ".join(f"`{name}`" for name, row in FAMILIES.items() if bool(row.plain) == plain) for plain in (False, True)]
    points = ", ".join(f"`{c}`" for c in COMPONENTS)
    return (
        f"Model families that are tested (`model_type` in config.json): {kinds[0]};\nwith linear attention or state-space blocks, by the "
        f"plain engine: {kinds[1]}.\nOther decoders are found by their structure. Read points: {points}."
    )


def formats() -> str:
    """One row per kind of export."""
    return "\n".join(["| `--format` | what it writes |", "|---|---|", *(f"| `{name}` | {row.does} |" for name, row in FORMATS.items())])


def judges() -> str:
    """One row per way to judge an answer."""
    rows = [f"| `{name}: {way.written}` | {way.shows} |" for name, way in JUDGES.items()]
    return "\n".join(["| `judge` | an answer shows the behaviour where |", "|---|---|", *rows])


def weights() -> str:
    """One row per flag of spilt weights."""
    rows = (f"| `{name}` | {stage} | {meaning.replace('|', chr(92) + '|')} |" for name, stage, meaning in weights_flags())
    return "\n".join(["| flag | stage | meaning |", "|---|---|---|", *rows])


def baselines() -> str:
    """One row per baseline of weight steering."""
    rows = []
    for row in BASELINES.values():
        kind = KINDS.get(row.form)
        at_0 = "-" if kind is None else "no" if kind.identity else "yes"
        rows.append(f"| `{row.name}` | {row.summary} | {f'`{row.form}`' if row.form else 'system prompt'} | {at_0} |")
    return "\n".join(["| baseline | what it is | form | acts at c = 0 |", "|---|---|---|---|", *rows])


def tasks() -> str:
    """One row per task."""

    def part(one: Part) -> str:
        return one.official if (one.start, one.end) == (0, 1) else f"{one.official} {100 * one.start:g}-{100 * one.end:g}%"

    head = "| `--dataset-name` | at the hub | train | validation | test | an answer is | `--max-length` | `--max-new-tokens` | `--epochs` |"
    rows = [head, "|---|---|---|---|---|---|---|---|---|"]
    for row in TASKS.values():
        source = f"`{row.source}`" if row.source else "made here"
        cells = [f"`{row.name}`", source, *(part(one) for one in row.splits.values()), f"`{row.extract}`"]
        rows.append("| " + " | ".join([*cells, str(row.max_length), str(row.max_new_tokens), str(row.epochs)]) + " |")
    return "\n".join(rows)


def variants() -> str:
    """One row per kind of what is learned on a task."""
    return "\n".join(
        ["| `--variant` | what is learned |", "|---|---|", *(f"| `{name}` | {kind.says} |" for name, kind in VARIANTS.items())]
    )


TABLES = {
    "arguments": arguments, "words": words, "methods": methods, "forms": forms, "families": families, "formats": formats, "judges": judges,
    "weights": weights,
    "baselines": baselines,
    "tasks": tasks, "variants": variants,
}  # fmt: skip


def rendered(text: str) -> str:
    """The README with every table between its two markers made new."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.S)
        if not pattern.search(text):
            raise SystemExit(f"README.md: no markers for the table {name!r}")
        text = pattern.sub(lambda hit, make=make: hit[1] + make() + "\n" + hit[2], text)  # type: ignore[misc]
    return text


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--write", action="store_true")
    options.add_argument("--check", action="store_true")
    chosen = options.parse_args()
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    new = rendered(text)
    if chosen.write:
        path.write_text(new, encoding="utf-8")
    return int(chosen.check and new != text)


if __name__ == "__main__":
    sys.exit(main())
