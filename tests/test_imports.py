"""Steering.load of what other programs wrote: each layout as its own library writes it; wrong files are told what they are."""

from __future__ import annotations

import json
import pickle
import sys
from pathlib import Path
from random import Random
from typing import Any

import families
import numpy as np
import pandas as pd
import pytest
import torch
from counts import CI
from families import HIDDEN, LAYERS, MIDDLE, checkpoint, token_rows
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

import spilt
from spilt import cli
from spilt.engine import whole
from spilt.errors import UserError
from spilt.steering.steering import Site, Steering

V = {layer: torch.randn(HIDDEN, generator=torch.Generator().manual_seed(layer)) for layer in (1, 3)}
ROWS = torch.stack([torch.full((HIDDEN,), float(layer)) for layer in range(LAYERS)])


def gguf_file(path: Path, tensors: dict[str, torch.Tensor], architecture: str = "controlvector", **words: Any) -> Path:
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in words.items():
        name = name.replace("__", ".")
        writer.add_float32(name, value) if isinstance(value, float) else writer.add_string(name, value)
    for name, value in tensors.items():
        writer.add_tensor(name, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def torch_file(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


def npz(path: Path) -> Path:
    np.savez(path, **{str(layer): value.numpy() for layer, value in V.items()})
    return path


LAYERED = {
    "repeng, llama.cpp": lambda to: gguf_file(to / "v.gguf", {f"direction.{n}": v for n, v in V.items()}, controlvector__model_hint="m"),
    "a dict by layer": lambda to: torch_file(to / "v.pt", V),
    "named layers": lambda to: torch_file(to / "v.pth", {f"layer_{n}": v[None, None].half() for n, v in V.items()}),
    "the fields of steering-vectors": lambda to: torch_file(to / "v.bin", {"layer_activations": V, "layer_type": "decoder_block"}),
    "the fields of repeng": lambda to: torch_file(to / "v.pt", {"model_type": "qwen2", "directions": V}),
    "npz": lambda to: npz(to / "v.npz"),
    "safetensors": lambda to: save_file({f"layers.{n}": v for n, v in V.items()}, to / "v.safetensors") or to / "v.safetensors",
    "json": lambda to: (to / "v.json").write_text(json.dumps({n: v.tolist() for n, v in V.items()})) and to / "v.json",
}


@pytest.mark.parametrize("kind", LAYERED)
def test_files_that_say_their_layers(tmp_path: Path, kind: str) -> None:
    """All of them, or one that is asked for; at the output of that block, at strength 1."""
    path = LAYERED[kind](tmp_path)
    value = Steering.load(path)
    assert [site for site, _ in value] == [Site(1), Site(3)] and value.forms == ("vector", "vector")
    exact = 1e-3 if kind == "named layers" else 0  # stored in half precision
    for site, made in value:
        assert (made.get_parameter("v") - V[site.layer]).abs().max() <= exact
    assert Steering.load(path, 3) == value.on(3)
    with pytest.raises(UserError, match=r"has the layers 1, 3, not 2"):
        Steering.load(path, 2)


BARE = {
    "pt": lambda to: torch_file(to / "v.pt", V[1]),
    "pt [1, D]": lambda to: torch_file(to / "v.pt", V[1][None]),
    "npy": lambda to: np.save(to / "v.npy", V[1].numpy()) or to / "v.npy",
    "safetensors": lambda to: save_file({"vector": V[1]}, to / "v.safetensors") or to / "v.safetensors",
    "vLLM-Hook": lambda to: torch_file(to / "v.pt", {"dir": V[1], "avg_proj": torch.tensor(2.0)}),
    "json": lambda to: (to / "v.json").write_text(json.dumps(V[1].tolist())) and to / "v.json",
}


@pytest.mark.parametrize("kind", BARE)
def test_a_vector_alone_wants_the_layer(tmp_path: Path, kind: str) -> None:
    path = BARE[kind](tmp_path)
    ((site, made),) = Steering.load(path, 4)
    assert site == Site(4) and torch.equal(made.get_parameter("v"), V[1])
    with pytest.raises(UserError, match="does not say where it acts; give the layer"):
        Steering.load(path)


def test_rotalabs_says_the_layer_beside(tmp_path: Path) -> None:
    """SteeringVector.save: the tensor in .pt, the rest in a .json of the same name; a set of them is a folder of layer_{n}.pt."""
    path = torch_file(tmp_path / "refusal.pt", V[1])
    path.with_suffix(".json").write_text(json.dumps({"behavior": "refusal", "layer_index": 3, "model_name": "m", "vector_shape": [HIDDEN]}))
    assert [site for site, _ in Steering.load(path)] == [Site(3)]
    folder = tmp_path / "set"
    folder.mkdir()
    for layer, value in V.items():
        torch_file(folder / f"layer_{layer}.pt", value)
    (folder / "metadata.json").write_text(json.dumps({"behavior": "refusal", "layers": [1, 3]}))
    assert Steering.load(folder).layers == (1, 3)


def test_a_row_for_each_layer(tmp_path: Path) -> None:
    """hidden-directions and others: [n_layers, D]."""
    path = torch_file(tmp_path / "v.pt", ROWS)
    ((site, made),) = Steering.load(path, 3)
    assert site == Site(3) and torch.equal(made.get_parameter("v"), ROWS[3])
    with pytest.raises(UserError, match=r"a tensor \[5, 32\], one row for each layer; give the layer"):
        Steering.load(path)
    with pytest.raises(UserError, match="rows 0 to 4, not 5"):
        Steering.load(path, 5)


# ---------------------------------------------------------------- LoRA


def adapter(folder: Path, **words: Any) -> tuple[Path, Any]:
    """What PEFT writes of LoRA on two down projections, and its model."""
    from peft import LoraConfig, get_peft_model

    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2"), dtype=torch.float32)
    asked = {"r": 3, "lora_alpha": 5, "target_modules": ["down_proj"], "layers_to_transform": [1, 3], "init_lora_weights": False, **words}
    torch.manual_seed(0)
    made = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **asked)).eval()
    made.save_pretrained(folder)
    return folder, made


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=token_rows([9, 9])[0], use_cache=False).logits)


ADAPTERS: tuple[dict[str, Any], ...] = (
    {},
    {"use_rslora": True},
    {"lora_bias": True},
    {"alpha_pattern": {"layers.3.mlp.down_proj": 40}},
    {"target_modules": "all-linear", "layers_to_transform": None},
    {"target_modules": ["k_proj", "gate_proj", "o_proj"], "rank_pattern": {"layers.1.mlp.gate_proj": 5}, "lora_bias": True},
)


@pytest.mark.parametrize("words", ADAPTERS, ids=str)
def test_a_peft_folder(tmp_path: Path, words: dict[str, Any]) -> None:
    """LoRA on any linear map, with the scale that PEFT gives it; it is stored and attached as every Steering."""
    folder, theirs = adapter(tmp_path / "adapter", **words)
    value = Steering.load(folder)
    assert value.layers == ((1, 3) if words.get("layers_to_transform", True) else tuple(range(LAYERS)))
    assert Steering.load(value.save(tmp_path / "mine.safetensors")) == value
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2"), dtype=torch.float32).eval()
    with whole.steer(model, value, 1.0):
        ours = logits(model)
    assert (ours - logits(theirs)).abs().max() <= 1e-4 * ours.abs().max() < (ours - logits(model)).abs().max()


def test_text_from_an_adapter(tmp_path: Path) -> None:
    """Each row of a batch at a strength of its own, by the plain engine: that of the library at 1, the base model's at 0."""
    folder, theirs = adapter(tmp_path / "adapter", target_modules=["q_proj", "v_proj"], layers_to_transform=None)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2"), dtype=torch.float32).eval()
    tokenizer = families.tokenizer()
    table = spilt.generate(model, tokenizer, Steering.load(folder), ["is 0 odd?"], [0, 1], max_new_tokens=6, do_sample=False)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "is 0 odd?"}], add_generation_prompt=True, tokenize=False)
    ids = torch.tensor([tokenizer(chat, add_special_tokens=False)["input_ids"]])
    for one, text in zip((model, theirs), table["text"], strict=True):
        made = one.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True) == text
    assert table["text"].nunique() == 2
    with pytest.raises(UserError, match="shape"):
        Steering.load(folder).check(families.build("qwen2", num_key_value_heads=4))
    with pytest.raises(UserError, match="unknown place in a block 'self_attn.q_proj'"):
        Steering.load(folder).check(families.model("gpt2"))


def test_a_gguf_lora(tmp_path: Path) -> None:
    a, b = torch.randn(3, MIDDLE), torch.randn(HIDDEN, 3)
    tensors = {"blk.2.ffn_down.weight.lora_a": a, "blk.2.ffn_down.weight.lora_b": b}
    path = gguf_file(tmp_path / "l.gguf", tensors, "qwen2", adapter__type="lora", adapter__lora__alpha=6.0)
    ((site, made),) = Steering.load(path)
    assert site == Site(2, "mlp_mid", "down_proj")
    assert torch.equal(made.get_parameter("lora_A"), a.T) and torch.equal(made.get_parameter("lora_B"), 2 * b.T)


def test_adapters_that_are_none_of_these(tmp_path: Path) -> None:
    for number, (words, said) in enumerate(
        [
            ({"target_modules": ["lm_head"], "layers_to_transform": None}, "adapts places that a Steering can't.*lm_head"),
            ({"use_dora": True}, "of another kind .DoRA."),
            ({"modules_to_save": ["lm_head"]}, "with whole modules"),
            ({"alora_invocation_tokens": [5, 6]}, "acts after its invocation tokens alone"),
            ({"layers_to_transform": None, "layer_replication": [[0, 3], [2, 5]]}, "other blocks than the model has"),
        ]
    ):
        folder, _ = adapter(tmp_path / str(number), **words)
        with pytest.raises(UserError, match=said):
            Steering.load(folder)
        with pytest.raises(UserError):  # and not read as something else with its model
            read = spilt.read_adapter(AutoModelForCausalLM.from_pretrained(checkpoint("qwen2"), dtype=torch.float32), folder)
            assert words == {"use_dora": True}
            raise UserError(f"read as {read}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds neither layer_{id}.pt nor adapter_config.json"):
        Steering.load(tmp_path / "empty")


def test_no_adapter_of_a_newer_kind_is_read_as_lora(tmp_path: Path) -> None:
    """What this file does not know of a configuration changes the sum, or may: it is refused by its name, unless it is off."""
    folder, _ = adapter(tmp_path / "adapter")
    words = json.loads((folder / "adapter_config.json").read_text())
    own = Steering.load(folder)
    for name, value in {"kasa_config": {"a": 1}, "use_bdlora": {"nblocks": 2}, "of_next_year": True}.items():
        (folder / "adapter_config.json").write_text(json.dumps({**words, name: value}))
        with pytest.raises(UserError, match=f"{name}.*read_adapter"):
            Steering.load(folder)
        (folder / "adapter_config.json").write_text(json.dumps({**words, name: None}))
        assert Steering.load(folder) == own


def test_a_towers_layers_are_no_blocks(tmp_path: Path) -> None:
    """An adapter of a model of images and text has layers 1 of both: one of them is in the decoder."""
    text, tower = "base_model.model.model.language_model.layers.1.", "base_model.model.model.vision_tower.vision_model.encoder.layers.1."
    both = {f"{place}self_attn.q_proj.lora_{x}.weight": torch.ones(2, 2) for place in (text, tower) for x in "AB"}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    for name, tensors, said in (
        ("both", both, "vision_tower"),
        ("tower", {key: value for key, value in both.items() if key.startswith(tower)}, "vision_tower"),
        ("twice", {key.replace("vision_tower.vision_model.encoder", "other"): value for key, value in both.items()}, "two places"),
    ):
        (folder := tmp_path / name).mkdir()
        (folder / "adapter_config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(UserError, match=said):
            Steering.load(folder)


STORED = {
    "safetensors": lambda to: Steering.load(LAYERED["a dict by layer"](to)).save(to / "mine.safetensors"),
    "PEFT": lambda to: adapter(to / "adapter")[0],
    "released": lambda to: [torch_file(to / f"layer_{n}.pt", v) for n, v in V.items()][0].parent,
    "GGUF": lambda to: gguf_file(
        to / "l.gguf",
        {f"blk.{n}.ffn_down.weight.lora_{x}": torch.ones(*s) for n in (1, 3) for x, s in (("a", (2, MIDDLE)), ("b", (HIDDEN, 2)))},
        "qwen2",
        adapter__type="lora",
    ),
}  # each with layers 1 and 3


@pytest.mark.parametrize("kind", STORED)
def test_one_layer_of_what_says_its_layers(tmp_path: Path, kind: str) -> None:
    path = STORED[kind](tmp_path)
    value = Steering.load(path)
    assert value.layers == (1, 3) and Steering.load(path, 3) == value.on(3)
    with pytest.raises(UserError, match="has the layers 1, 3, not 2"):
        Steering.load(path, 2)


# ---------------------------------------------------------------- wrong ones


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("run",))


WRONG = {
    "a model": ({"a.weight": torch.ones(3), "b.weight": torch.ones(3)}, "the parameters of a whole model"),
    "a lora": ({"lora_A": torch.ones(3, 2), "lora_B": torch.ones(2, 3)}, "a dict with lora_A and lora_B"),
    "NaN": (torch.tensor([1.0, float("nan")]), "NaN or infinite"),
    "three axes": (torch.ones(2, 3, 4), r"wanted a vector \[D\]"),
    "words": ({"1": "text"}, "wanted a vector"),
    "complex": (torch.ones(3, dtype=torch.complex64), "wanted a vector"),
    "None": (None, "holds a NoneType"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_ones_are_told(tmp_path: Path, kind: str) -> None:
    value, said = WRONG[kind]
    with pytest.raises(UserError, match=said):
        Steering.load(torch_file(tmp_path / "v.pt", value), 1)


def test_nothing_that_could_run_code_is_opened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickled object, as steering-vectors and repeng have no file of their own; an object array."""
    torch.save(Harmful(), tmp_path / "a.pt")
    (tmp_path / "b.pkl").write_bytes(pickle.dumps(Harmful()))
    np.save(tmp_path / "c.npy", np.array([Harmful()], dtype=object), allow_pickle=True)
    for name in ("a.pt", "b.pkl", "c.npy"):
        with pytest.raises(UserError):
            Steering.load(tmp_path / name, 1)
    assert "run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["v.gguf", "v.npy", "v.npz", "v.json", "v.safetensors", "v.pt", "noname"])
def test_junk_is_one_message(tmp_path: Path, name: str) -> None:
    heads = {"v.gguf": b"GGUF", "v.npy": b"\x93NUMPY", "v.safetensors": b"\x10\0\0\0\0\0\0\0{"}
    (tmp_path / name).write_bytes(heads.get(name, b"") + b"junk" * 10)
    with pytest.raises(UserError):
        Steering.load(tmp_path / name, 1)


@pytest.mark.parametrize("kind", ["repeng, llama.cpp", "npz", "safetensors", "json", "a dict by layer"])
def test_damaged_files_are_one_message(tmp_path: Path, kind: str) -> None:
    """Bytes changed or cut off at random: vectors of finite numbers, or a UserError."""
    path = LAYERED[kind](tmp_path)
    whole_file, random = path.read_bytes(), Random(kind)
    for _ in range(60 if CI else 20):
        data = bytearray(whole_file[: random.choice([len(whole_file), random.randrange(len(whole_file))])])
        for _ in range(random.choice([0, 1, 8])):
            if data:
                data[random.randrange(min(len(data), random.choice([400, 10**6])))] = random.randrange(256)
        path.write_bytes(data)
        try:
            value = Steering.load(path)
        except UserError:
            continue
        assert all(torch.isfinite(parameter).all() for parameter in value.parameters())


def test_damaged_adapters(tmp_path: Path) -> None:
    folder, _ = adapter(tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    for change, said in (
        ({"lora_alpha": None}, "no PEFT configuration"),
        ({"lora_alpha": "much"}, "no PEFT configuration"),
        ({"alpha_pattern": [1]}, "no PEFT configuration"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "regular expressions"),
        ({"peft_type": "IA3"}, "of another kind .IA3."),
    ):
        (folder / "adapter_config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(UserError, match=said):
            Steering.load(folder)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match="no adapter_model.safetensors"):
        Steering.load(folder)


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "v.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install gguf"):
        Steering.load(tmp_path / "v.gguf")


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`say --steering FILE --layers N`, and an export of what another program wrote."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "tiny").symlink_to(checkpoint("qwen2"))
    path = torch_file(tmp_path / "v.pt", 5 * V[1])
    words = ["--base_dir", str(tmp_path), "--model_name", "tiny", "--device", "cpu", "--steering", str(path)]
    assert cli.main(["say", "is 0 odd?", *words, "--layers", "2", "--multipliers", "0", "1", "--max_new_tokens", "5", "--json"]) == 0
    texts = json.loads(capsys.readouterr().out)["texts"]
    assert texts[0]["text"] != texts[1]["text"]
    assert cli.main(["say", "is 0 odd?", *words]) == 2 and "--layers" in capsys.readouterr().err
    assert cli.main(["say", "is 0 odd?", *words, "--layers", "1", "2"]) == 2 and "one layer" in capsys.readouterr().err
    out = tmp_path / "out"
    assert cli.main(["export", *words, "--layers", "2", "--format", "safetensors", "--multiplier", "1", "--output", str(out)]) == 0
    assert Steering.load(out / "steering.safetensors").layers == (2,)


def test_an_imported_vector_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--format released into a cell's folder: the losses are those of this vector."""
    base = families.make_base(tmp_path / "base", train=4)
    path = torch_file(tmp_path / "v.pt", V[1])
    out = base.path / "vectors" / base.model / "caa" / base.one / "caa_vector"
    words = ["--base_dir", str(base.path), "--model_name", base.model, "--device", "cpu", "--multiplier", "1", "--output", str(out)]
    assert cli.main(["export", "--format", "released", "--steering", str(path), "--layers", "2", *words]) == 0
    assert torch.equal(torch.load(out / "layer_2.pt", weights_only=True), V[1])
    measured = base.argv("caa", "vector", "--mode", "loss", "--multipliers", "0", "2", "--no-released_files", "--no_report", "--quiet")
    assert cli.main(measured) == 0
    table = pd.read_csv(base.path / "vectors" / base.model / "get_sft_loss" / "caa" / base.one / "caa_vector" / "losses_train.csv")
    model, tokenizer = spilt.load(base.path / "models" / base.model)
    rows = [(row["question"], row["matching"], row["not_matching"]) for row in families.pairs(4)]
    ours = spilt.measure(model, tokenizer, Steering.load(path, 2), rows, multipliers=[2])
    loss = (table["answer_loss_sum"] / table["answer_tokens"]).groupby([table["multiplier"], table["target"]]).mean()
    preference = {m: loss[m, "not_matching"] - loss[m, "matching"] for m in (0.0, 2.0)}
    assert dict(zip(ours["multiplier"], ours["preference"], strict=True)) == pytest.approx(preference, rel=1e-4)
    assert abs(preference[2.0] - preference[0.0]) > 0.01
    capsys.readouterr()
    folder, _ = adapter(tmp_path / "adapter")
    assert cli.main(["export", "--format", "released", "--steering", str(folder), *words[:-1], str(tmp_path / "no")]) == 2
    assert "at the output of one block" in capsys.readouterr().err
