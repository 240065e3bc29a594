"""A task of our own for `spilt tasks`: of a word its kind, in a fixed format. `hammer -> tool`

    python examples/tasks/kinds.py kinds        train.jsonl, validation.jsonl, test.jsonl of prompt, completion, label in the folder kinds/

The words of a split are in no other one: the format has to be learned, and the kinds have to be known. A model that was never told the
format has every answer wrong; one that learns the format alone has a quarter right.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

KINDS = {
    "animal": "cat dog horse cow sheep goat pig rabbit fox wolf bear lion tiger zebra giraffe elephant mouse rat squirrel deer moose "
    "otter seal whale dolphin shark salmon trout eagle hawk owl crow sparrow duck goose swan frog toad snake lizard turtle "
    "bee ant spider beetle moth",
    "food": "bread cheese butter rice pasta soup salad apple pear banana grape lemon peach plum cherry carrot potato onion garlic "
    "tomato pepper spinach lettuce bean pea corn egg bacon ham steak pie cake cookie pudding honey jam yogurt noodle pizza "
    "burger sausage waffle pancake muffin bagel cereal",
    "tool": "hammer saw drill wrench screwdriver pliers chisel axe shovel rake hoe spade ladder crowbar clamp file level vise mallet "
    "trowel sickle scythe pickaxe hatchet sander grinder lathe anvil tongs tweezers scissors knife stapler broom mop bucket "
    "wheelbarrow jack hacksaw awl plane ruler caliper soldering-iron paintbrush chainsaw",
    "clothing": "shirt trousers jeans skirt dress coat jacket sweater hoodie vest sock shoe boot sandal slipper hat cap scarf glove "
    "mitten belt tie suit blouse cardigan shorts leggings pajamas robe apron tuxedo raincoat parka poncho kimono sari kilt "
    "beanie beret stocking tights bra underwear swimsuit bikini uniform",
}
SIZES = {"train": 96, "validation": 8, "test": 80}


def rows(seed: int = 0) -> dict[str, list[dict[str, str]]]:
    """split -> rows, each kind equally often, in an order drawn by the seed."""
    draw, parts = random.Random(f"kinds/{seed}"), {name: list[dict[str, str]]() for name in SIZES}
    for kind, text in KINDS.items():
        words = text.split()
        draw.shuffle(words)
        for name, size in SIZES.items():
            for word in (words.pop() for _ in range(size // len(KINDS))):
                said = f"{word} -> {kind}"
                prompt = f"Which kind of thing is this word: {', '.join(KINDS)}?\nWord: {word}\n"
                parts[name].append({"prompt": prompt, "completion": said, "label": said})
    for part in parts.values():
        draw.shuffle(part)
    return parts


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in rows().items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
