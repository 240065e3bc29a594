"""Loading a model: every file that is read is in its hash, weights that are not the config's are refused by name, damage gets a message.

The library itself is the judge: what it opens, what it fills with random numbers, which files its tokenizers read.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from spilt import cli, verify
from spilt.errors import UserError
from spilt.model import checkpoint, identity
from spilt.model.host import load

FIT = ("--mode", "generate", "--quiet")


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    return families.make_base(tmp_path / "base", train=4)


def model(base: families.Base) -> Path:
    return base.path / "models" / base.model


def edit_weights(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> Path:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def edit_config(folder: Path, name: str = "config.json", **values: Any) -> Path:
    config = {**json.loads((folder / name).read_text()), **values}
    (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not Ellipsis}))
    return folder


def copy(model_type: str, to: Path) -> Path:
    return Path(shutil.copytree(families.checkpoint(model_type), to / model_type))


def refused(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        load(folder, "float32", "cpu")
    assert "weights_only" not in str(error.value) and "trust_remote_code" not in str(error.value)
    return str(error.value)


def run(base: families.Base, capsys: pytest.CaptureFixture[str], *words: str, form: str = "vector", method: str = "sft") -> tuple[int, str]:
    capsys.readouterr()
    code = cli.main(base.argv(method, form, *words))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out + err


# ---------------------------------------------------------------- config.json of either major

SCALED = {"rope_type": "linear", "factor": 4.0}


def first_logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return load(folder, "float32", "cpu").model(torch.arange(5, 25)[None]).logits


@pytest.mark.parametrize(
    ("model_type", "scaling"),
    [
        ("llama", None),
        ("llama", SCALED),
        ("qwen3", SCALED),
        ("gemma2", None),
        ("phi3", None),
        ("stablelm", SCALED | {"partial_rotary_factor": 0.5}),
    ],
)
def test_rotary_settings_of_transformers_5_are_read_by_4_too(model_type: str, scaling: dict[str, Any] | None, tmp_path: Path) -> None:
    """transformers 4.57 passes over `rope_parameters` without a word and takes a rope_theta of 10000: another model."""
    partial = {name: value for name, value in (scaling or {}).items() if name == "partial_rotary_factor"}
    plain = first_logits(families.checkpoint(model_type))
    of_4 = {name: value for name, value in (scaling or {}).items() if name not in partial} or None
    four = edit_config(copy(model_type, tmp_path / "4"), rope_parameters=..., rope_theta=3e5, rope_scaling=of_4, **partial)
    whole = {"rope_type": "default", "rope_theta": 3e5, **(scaling or {})}
    five = edit_config(copy(model_type, tmp_path / "5"), rope_parameters=whole, rope_theta=..., rope_scaling=..., partial_rotary_factor=...)
    wanted = first_logits(four)
    assert not torch.allclose(wanted, plain)
    torch.testing.assert_close(first_logits(five), wanted, rtol=0, atol=0)


@pytest.mark.skipif(transformers.__version__ >= "5", reason="transformers 5 reads them")
def test_rotary_settings_that_4_cannot_take_are_refused(tmp_path: Path) -> None:
    by_layer = {kind: {"rope_type": "default", "rope_theta": 3e5} for kind in ("full_attention", "sliding_attention")}
    said = refused(edit_config(copy("gemma3_text", tmp_path), rope_parameters=by_layer))
    assert "rope_parameters are not read by transformers 4" in said and "'transformers>=5'" in said


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize("model_type", families.FAMILY_NAMES)
@pytest.mark.few(3)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(model_type: str, tmp_path: Path) -> None:
    folder = copy(model_type, tmp_path)
    whole = load_file(folder / "model.safetensors")
    assert load(folder, "float32", "cpu").path == folder
    norm = next(name for name in whole if "layers.3." in name or "h.3." in name)
    edit_weights(folder, lambda t: t.pop(norm))
    assert "1 missing" in (said := refused(folder)) and norm.removeprefix("transformer.") in said
    edit_weights(folder, lambda t: t.update({norm: whole[norm], "model.layers.77.extra": torch.zeros(3)}))
    assert "1 unknown to the model: " in (said := refused(folder)) and "layers.77.extra" in said
    edit_weights(folder, lambda t: (t.pop("model.layers.77.extra"), t.update({norm: torch.zeros(7, 2)})))
    assert "1 of another size: " in (said := refused(folder)) and norm.removeprefix("transformer.") in said
    edit_weights(folder, lambda t: t.update({norm: whole[norm]}))
    load(folder, "float32", "cpu")


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gemma2", "gpt2"])
def test_what_the_library_computes_or_ties_may_be_left_out_or_be_there(model_type: str, tmp_path: Path) -> None:
    """Tied embeddings in both ways of writing them, buffers of older files, GPT-2's names without their first word."""
    folder = tmp_path / "tied"
    made = families.build(model_type, tie_word_embeddings=True)
    made.save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    wanted = load(folder, "float32", "cpu").model.state_dict()

    def older(tensors: dict[str, Tensor]) -> None:
        embedding = next(value for name, value in tensors.items() if name.endswith(("embed_tokens.weight", "wte.weight")))
        tensors["lm_head.weight"] = embedding.clone()
        if model_type == "gpt2":
            for name in [name for name in tensors if name.startswith("transformer.")]:
                tensors[name.removeprefix("transformer.")] = tensors.pop(name)
            tensors["h.0.attn.bias"], tensors["h.0.attn.masked_bias"] = torch.ones(1, 1, 4, 4), torch.tensor(-1e4)
            del tensors["lm_head.weight"]
        else:
            tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)

    edit_weights(folder, older)
    found = load(folder, "float32", "cpu").model.state_dict()
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_twelve_tensors_removed_is_a_wrong_request_told_once(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    gone = sorted(load_file(model(base) / "model.safetensors"))[:12]
    edit_weights(model(base), lambda tensors: [tensors.pop(name) for name in gone])
    before = families.listing(base.path)
    code, said = run(base, capsys, *FIT, form="all", method="all")
    assert code == 2 and said.count("error:") == 1 and "12 missing" in said
    assert all(name in said for name in gone) and families.listing(base.path) == before


# ---------------------------------------------------------------- the hash


def in_shards(folder: Path) -> Path:
    """The same model with its weights in shards that lie in a subfolder, as its index says."""
    made = load(folder, "float32", "cpu").model
    (folder / "model.safetensors").unlink()
    made.save_pretrained(folder, max_shard_size="40KB")  # type: ignore[operator]
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    (folder / "parts").mkdir()
    for name in set(content["weight_map"].values()):
        shutil.move(folder / name, folder / "parts" / name)
    content["weight_map"] = {key: f"parts/{name}" for key, name in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    return folder


def test_shards_in_a_subfolder_and_named_templates_are_in_the_hash(tmp_path: Path) -> None:
    folder = copy("qwen2", tmp_path)
    whole = load(folder, "float32", "cpu").model.state_dict()
    found = load(in_shards(folder), "float32", "cpu").model.state_dict()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    seen = {identity.model_hash(folder)}
    shards = sorted((folder / "parts").iterdir())
    assert len(shards) > 2
    for shard in shards:
        tensors = load_file(shard)
        save_file({name: value + 1 for name, value in tensors.items()}, shard, metadata={"format": "pt"})
        seen.add(identity.model_hash(folder))
    (folder / "additional_chat_templates").mkdir()
    for text in ("one", "two"):
        (folder / "additional_chat_templates" / "tool_use.jinja").write_text(text)
        seen.add(identity.model_hash(folder))
    assert len(seen) == 1 + len(shards) + 2
    (folder / "README.md").write_text("words")
    assert identity.model_hash(folder) in seen


def test_a_hub_cache_of_links_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    folder, snapshot = in_shards(copy("qwen2", tmp_path)), tmp_path / "snapshot"
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(path, link.parent))
    load(snapshot, "float32", "cpu")
    assert identity.model_hash(snapshot) == identity.model_hash(folder)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/tmp/model.safetensors", "parts/../../x.safetensors", "C:\\x.safetensors"])
@pytest.mark.parametrize("dry", [True, False])
def test_an_index_that_leaves_the_folder_is_refused(base: families.Base, capsys: pytest.CaptureFixture[str], name: str, dry: bool) -> None:
    weights = load_file(model(base) / "model.safetensors")
    shutil.move(model(base) / "model.safetensors", base.path / "x.safetensors")
    index = model(base) / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, name)}))
    before = families.listing(base.path)
    code, said = run(base, capsys, *FIT, *(["--dry_run"] if dry else []))
    assert code == 2 and str(index) in said and repr(name) in said and "inside the checkpoint's folder" in said
    assert families.listing(base.path) == before


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("config.json", "transformers_weights", "../x.safetensors"),
        ("tokenizer_config.json", "fast_tokenizer_files", ["../tokenizer.9.json"]),
    ],
)
def test_no_other_file_names_one_outside_either(base: families.Base, file: str, key: str, value: Any) -> None:
    edit_config(model(base), file, **{key: value})
    with pytest.raises(UserError, match="inside the checkpoint's folder"):
        identity.model_hash(model(base))


def test_verify_names_an_index_that_leaves_the_folder(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, capsys, *FIT)[0] == 0
    (model(base) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../x"}}))
    (found,) = [found for found in verify.check(base.path) if found.path.suffix == ".pt"]
    assert found.state == "stale" and "'../x'" in found.reason


OPENED = """
import json, sys
from pathlib import Path
opened = set()
sys.addaudithook(lambda event, args: opened.add(str(args[0])) if event == "open" else None)
from spilt.model.host import load
folder = Path(sys.argv[1])
load(folder, "float32", "cpu")
from spilt.model import checkpoint
print(json.dumps([sorted(n for n in opened if n.startswith(str(folder))), [str(p) for p in checkpoint.loaded_files(folder)]]))
"""


@pytest.mark.long
def test_every_file_that_the_library_opens_is_in_the_hash(tmp_path: Path) -> None:
    folder = in_shards(copy("qwen2", tmp_path))
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    edit_config(folder, "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json", "tokenizer.4.0.0.json"])
    shutil.copy(folder / "tokenizer.json", folder / "tokenizer.4.0.0.json")
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", OPENED, str(folder)], capture_output=True, text=True, env=env, timeout=240, check=True)
    opened, hashed = json.loads(done.stdout.splitlines()[-1])
    assert len(opened) >= 6 and any("additional_chat_templates" in name for name in opened)
    assert {name for name in opened if Path(name).is_file()} <= set(hashed)


def test_the_files_of_every_tokenizer_that_the_library_has_are_known_by_their_ending() -> None:
    import transformers.models as theirs

    names = {"tokenizer.json", "tekken.json", "tiktoken.model"}
    for path in Path(theirs.__path__[0]).glob("*/tokenization_*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "VOCAB_FILES_NAMES" and isinstance(node.value, ast.Dict):
                names |= {value.value for value in node.value.values if isinstance(value, ast.Constant)}
    assert len(names) > 8
    assert {name for name in names if not name.endswith(checkpoint.SUFFIXES)} == set()


def test_a_tensor_that_is_replaced_whole_is_seen_wherever_it_lies(tmp_path: Path) -> None:
    """Even samples of this file leave gaps of 0.6 MB, the tensors have 0.1 MB: most lie between two samples."""
    tensors = {f"t{i:03}": torch.full((25_000,), float(i)) for i in range(400)}
    (tmp_path / "config.json").write_text("{}")
    save_file(tensors, tmp_path / "model.safetensors")
    seen = {identity.model_hash(tmp_path)}
    for i in range(3, 400, 40):
        save_file({**tensors, f"t{i:03}": torch.zeros(25_000)}, tmp_path / "model.safetensors")
        seen.add(identity.model_hash(tmp_path))
    assert len(seen) == 11


# ---------------------------------------------------------------- broken files


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("EVIL_RAN",)


def as_bin(folder: Path, content: Any) -> Path:
    (folder / "model.safetensors").unlink()
    if isinstance(content, bytes):
        (folder / "pytorch_model.bin").write_bytes(content)
    else:
        torch.save(content, folder / "pytorch_model.bin")
    return folder


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def shard_gone(folder: Path) -> None:
    sorted((in_shards(folder) / "parts").iterdir())[0].unlink()


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


BROKEN: dict[str, tuple[Callable[[Path], Any], tuple[str, ...]]] = {
    "cut off in its header": (lambda f: cut(f / "model.safetensors", 0.01), ("model.safetensors", "cut off", "download")),
    "cut off in its tensors": (lambda f: cut(f / "model.safetensors", 0.9), ("model.safetensors", "cut off", "download")),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), ("model.safetensors", "0 bytes")),
    "garbage": (lambda f: (f / "model.safetensors").write_bytes(b"garbage " * 999), ("model.safetensors", "is no safetensors file")),
    "header of brackets": (lambda f: (f / "model.safetensors").write_bytes((9000).to_bytes(8, "little") + b"[" * 9000), ("header",)),
    "no weights": (lambda f: (f / "model.safetensors").rename(f / "model.gguf"), ("no weights", "model.safetensors", "'model.gguf'")),
    "a shard is gone": (shard_gone, ("parts/", "is not there", "download")),
    "a pickle that runs code": (lambda f: as_bin(f, {"a": Evil()}), ("pytorch_model.bin", "safetensors", "not opened")),
    "a bare pickle that runs code": (lambda f: as_bin(f, pickle.dumps({"a": Evil()})), ("pytorch_model.bin", "safetensors", "not opened")),
    "junk of a pickle": (lambda f: as_bin(f, b"junk" * 99), ("pytorch_model.bin", "damaged", "safetensors")),
    "tokenizer.json": (lambda f: (f / "tokenizer.json").write_text("{"), ("models/tiny", "cannot be loaded")),
    "generation_config.json": (lambda f: (f / "generation_config.json").write_text("{"), ("generation_config.json", "JSON")),
    "an adapter": (lambda f: (f / "adapter_config.json").write_text("{}"), ("adapter_config.json", "merge")),
    "other vocabulary": (lambda f: edit_config(f, vocab_size=299), ("model.embed_tokens.weight", "wanted [299, 32]")),
    "other width": (lambda f: edit_config(f, hidden_size=40), ("of another size", "wanted [40]")),
    "more blocks than weights": (lambda f: edit_config(f, num_hidden_layers=6, layer_types=...), ("missing", "model.layers.5.")),
    "fewer blocks than weights": (lambda f: edit_config(f, num_hidden_layers=4, layer_types=...), ("unknown", "model.layers.4.")),
    "activation": (lambda f: edit_config(f, hidden_act="nope"), ("'nope'", "config.json")),
    "padding": (lambda f: edit_config(f, pad_token_id=10**6), ("cannot be loaded", "config.json")),
    "heads": (lambda f: edit_config(f, num_attention_heads=5), ("config.json",)),
    "quantised": (lambda f: edit_config(f, quantization_config={"quant_method": "gptq", "bits": 4}), ("cannot be loaded",)),
    "code of its own": (
        lambda f: edit_config(f, "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Mine", None]}) and
        [path.unlink() for path in (f / "tokenizer.json",)], ("models/tiny",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_checkpoint_is_one_message(
    base: families.Base, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    spoil, needles = BROKEN[case]
    spoil(model(base))
    monkeypatch.chdir(base.path)  # where a malicious file would leave its mark
    before = families.listing(base.path)
    code, said = run(base, capsys, *FIT, form="all")
    assert code == 2 and said.count("error:") == 1, said
    assert [needle for needle in needles if needle not in said] == [], said
    assert not any(advice in said for advice in ("weights_only", "Weights only", "trust_remote_code", "arbitrary code", "from_tf"))
    assert families.listing(base.path) == before


def test_pickled_tensors_alone_and_unused_code_load(base: families.Base) -> None:
    wanted = load(model(base), "float32", "cpu").model.state_dict()
    as_bin(model(base), weights_of(model(base)))
    (model(base) / "mine.py").write_text("raise SystemExit('ran')")
    edit_config(model(base), auto_map={"AutoModelForCausalLM": "mine.Mine", "AutoConfig": "mine.Config"})
    found = load(model(base), "float32", "cpu").model.state_dict()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8589934592 bytes."),
        RuntimeError("unable to mmap 999 bytes from file <x>: Cannot allocate memory (12)"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "mmap", "python"],
)
def test_no_memory_for_the_model_is_told_once(
    base: families.Base, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    from transformers import AutoModelForCausalLM

    def full(*args: Any, **kwargs: Any) -> Any:
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", full)
    code, said = run(base, capsys, *FIT, form="all")
    assert code == 2 and said.count("error:") == 1 and "not enough memory" in said and "--dtype bfloat16" in said and "GiB" in said


def test_a_tokenizer_with_more_tokens_than_the_model(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    families.build("qwen2", vocab_size=200).save_pretrained(model(base))
    code, said = run(base, capsys, *FIT, form="all")
    assert code == 2 and said.count("error:") == 1 and "300 tokens" in said and "the model 200" in said


def test_a_token_beyond_the_vocabulary_is_named(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """A token that was added and that no text uses is none of our business (Gemma-3 has one); one that a text uses is told."""
    tokenizer = families.tokenizer()
    tokenizer.add_tokens(["<image>"])
    tokenizer.save_pretrained(model(base))
    assert run(base, capsys, *FIT)[0] == 0
    rows = families.pairs(4)
    families.write_jsonl(base.data(base.one, "train"), [*rows, {**rows[0], "question": "what is on <image>?"}])
    code, said = run(base, capsys, *FIT)
    assert code == 2 and "token 300 ('<image>')" in said and "vocabulary of 300" in said


# ---------------------------------------------------------------- libraries and seeds


def test_verify_names_other_versions_of_the_libraries(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, capsys, *FIT)[0] == 0
    (about,) = base.path.glob("vectors/**/layer_2.manifest.json")
    record = json.loads(about.read_text())
    del record["record_sha256"]  # as an older version wrote it
    now = record["versions"]["transformers"]
    about.write_text(json.dumps({**record, "versions": {**record["versions"], "transformers": "4.99.1"}}))
    capsys.readouterr()
    code, said = cli.main(["--verify", "--base_dir", str(base.path)]), capsys.readouterr().out
    (line,) = [line for line in said.splitlines() if f"made with transformers 4.99.1 (here {now})" in line]
    assert code == 0 and line.startswith("ok ")
    assert "already done" in run(base, capsys, *FIT)[1]


@pytest.mark.parametrize("seed", [2**70, 10**15 + 1, -1])
def test_a_seed_out_of_range_is_refused_with_the_range(base: families.Base, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    with_yaml = base.hparams(base.one, "sft", "generate_sft_vector.yaml")
    limit = "at least 0" if seed < 0 else "beyond 1,000,000,000,000,000"
    for dry in ([], ["--dry_run"]):
        code, said = run(base, capsys, *FIT, "--seed", str(seed), *dry)
        assert code == 2 and "seed" in said and str(seed) in said and limit in said
    with_yaml.write_text(with_yaml.read_text() + f"seed: {seed}\n")
    code, said = run(base, capsys, *FIT)
    assert code == 2 and with_yaml.name in said and "seed" in said and str(seed) in said and limit in said


@pytest.mark.parametrize("method", ["sft", "caa"])
def test_the_largest_seed_works(base: families.Base, capsys: pytest.CaptureFixture[str], method: str) -> None:
    """Of the seed of an epoch's order, 100,003 times as large, torch takes what is left modulo 2^64."""
    words = (
        ("--mode", "both", "--seed", str(10**15), "--set", "n_epochs=3") if method == "sft" else ("--mode", "both", "--seed", str(10**15))
    )
    code, said = run(base, capsys, *words, method=method)
    assert code == 0, said


def test_the_families_are_those_of_the_library(tmp_path: Path) -> None:
    """A config that this package admits is one that the library can build."""
    from transformers import AutoConfig

    for name in families.EVERY:
        config = AutoConfig.for_model(name)
        config.save_pretrained(tmp_path / name)
        checkpoint.check(tmp_path / name, [0])
        assert checkpoint.blocks(json.loads((tmp_path / name / "config.json").read_text())) == config.get_text_config().num_hidden_layers
