"""--model_name: a folder name, a path, a hub id of the local cache; GGUF files in the place of config.json and weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from command_line import clean  # noqa: F401
from families import Base, listing, make_base

from spilt import cli
from spilt.errors import UserError
from spilt.model import checkpoint, host
from spilt.model.locate import locate

ID = "people/some-model"


@pytest.fixture
def base(tmp_path: Path) -> Base:
    """A base folder whose settings are for `some-model`, and no model in it."""
    made = make_base(tmp_path / "base", train=4)
    for path in made.experiment.glob(f"*/{made.model}"):
        path.rename(path.with_name("some-model"))
    (tmp_path / "elsewhere").mkdir()
    (made.path / "models" / made.model).rename(tmp_path / "elsewhere" / "some-model")
    return made


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub cache that holds ID, as huggingface_hub lays it out: links into blobs."""
    top = tmp_path / "cache" / "models--people--some-model"
    snapshot = top / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    (top / "refs").mkdir()
    (top / "refs" / "main").write_text("abc123")
    (top / "blobs").mkdir()
    for path in families.checkpoint().iterdir():
        shutil.copy(path, top / "blobs" / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return snapshot


def run(base: Base, capsys: pytest.CaptureFixture[str], name: str, *words: str) -> tuple[int, str]:
    code = cli.main(base.argv("caa", "vector", "--mode", "generate", *words, model=name))
    said = capsys.readouterr()
    return code, said.out + said.err


def test_a_path(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    """Results are stored under its last part; a dry run leaves nothing; afterwards the name is enough."""
    elsewhere, before = base.path.parent / "elsewhere" / "some-model", listing(base.path)
    code, said = run(base, capsys, str(elsewhere), "--dry_run")
    assert code == 0 and f"--model_name {elsewhere}" in said and listing(base.path) == before
    assert run(base, capsys, str(elsewhere))[0] == 0
    assert (base.path / "vectors" / "some-model" / "caa" / base.one / "caa_vector" / "layer_2.pt").is_file()
    assert (base.path / "models" / "some-model").resolve() == elsewhere
    for name in ("some-model", str(elsewhere)):
        code, said = run(base, capsys, name)
        assert code == 0 and "already done" in said
    assert cli.main(["verify", "--base_dir", str(base.path)]) == 0
    assert cli.main(["anatomy", str(elsewhere)]) == 0


def test_another_model_of_that_name_is_not_mixed_up(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(families.checkpoint("llama"), base.path / "models" / "some-model")
    code, said = run(base, capsys, str(base.path.parent / "elsewhere" / "some-model"))
    assert code == 2 and "is another model than" in said and not (base.path / "vectors").exists()


@pytest.mark.usefixtures("cached")
def test_a_hub_id_in_the_local_cache(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(base, capsys, ID, "--dry_run")[0] == 0 and not (base.path / "models" / "some-model").exists()
    code, said = run(base, capsys, ID)
    assert code == 0, said
    assert (base.path / "vectors" / "some-model").is_dir() and (base.path / "models" / "some-model" / "config.json").is_file()


@pytest.mark.usefixtures("cached")
@pytest.mark.parametrize("name", ["people/other", "people/other/third", "./nothing", "~/nothing-here", "../../x", "people/..", "/"])
def test_what_is_not_there_is_said_and_nothing_is_fetched(
    base: Base, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    code, said = run(base, capsys, name)
    assert code == 2 and "error:" in said and said.count("error:") == 1 and "Traceback" not in said
    if name == "people/other":
        assert "nor in the local hub cache; --download fetches it" in said


def test_a_download_asks_for_what_is_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By a stand-in for the hub: weights as safetensors, pickled ones only where there are no others."""
    asked: list[dict[str, Any]] = []

    def fetch(hub_id: str, **given: Any) -> str:
        asked.append({"id": hub_id, **given})
        shutil.copytree(families.checkpoint(), tmp_path / "got", dirs_exist_ok=True)
        if len(asked) == 1:
            (tmp_path / "got" / "model.safetensors").rename(tmp_path / "later")
        return str(tmp_path / "got")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert locate(tmp_path, ID, download=True) == ("some-model", tmp_path / "got")
    assert (
        asked[0]["local_files_only"] is False
        and "*.safetensors" in asked[0]["allow_patterns"]
        and "*.bin" not in asked[0]["allow_patterns"]
    )
    assert len(asked) == 2 and asked[1]["allow_patterns"] == ["*.bin"]


# ---------------------------------------------------------------- GGUF


def as_gguf(folder: Path, path: Path) -> None:
    """The tiny llama as llama.cpp stores one: its names, its order of the rotary rows, a byte-level tokenizer."""
    gguf = pytest.importorskip("gguf")
    model: Any = families.build("llama")
    config, path = model.config, Path(path)
    out = gguf.GGUFWriter(str(path), "llama")
    out.add_block_count(config.num_hidden_layers)
    out.add_embedding_length(config.hidden_size)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_context_length(config.max_position_embeddings)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_freq_base(10000.0)
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("gpt2")
    tokens = sorted(families.tokenizer().get_vocab().items(), key=lambda at: at[1])
    out.add_token_list([token for token, _ in tokens[:-1]] + ["ab"])
    out.add_token_types([3 if n < len(families.SPECIAL) else 1 for _, n in tokens])
    out.add_token_merges(["a b"])
    out.add_bos_token_id(families.BOS)
    out.add_eos_token_id(families.EOS)
    out.add_chat_template(families.TEMPLATE)
    short = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
    short |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm"}
    short |= {
        "post_attention_layernorm": "ffn_norm",
        "model.layers": "blk",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
    }
    for name, value in model.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # the two halves of a head's rotary pairs, side by side
            value = value.reshape(heads, 2, -1, value.shape[-1]).transpose(1, 2).reshape(value.shape)
        for long, other in short.items():
            name = name.replace(long, other)
        out.add_tensor(name.replace("lm_head", "output"), value.contiguous().numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.mark.long
def test_a_gguf_file_is_the_model_that_it_was_made_from(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    folder = base.path.parent / "files"
    folder.mkdir()
    as_gguf(families.checkpoint("llama"), folder / "some-model.gguf")
    said = checkpoint.config(folder)
    assert (said["model_type"], said["num_hidden_layers"], said["hidden_size"]) == ("llama", families.LAYERS, families.HIDDEN)
    ids = torch.tensor([[5, 9, 30, 77]])
    found = host.load(folder, "float32", "cpu").model(input_ids=ids).logits
    torch.testing.assert_close(found, families.model("llama")(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    code, told = run(base, capsys, str(folder / "some-model.gguf"))
    assert code == 0, told
    assert (base.path / "vectors" / "some-model" / "caa" / base.one / "caa_vector" / "layer_2.pt").is_file()
    assert "already done" in run(base, capsys, "some-model")[1]
    (folder / "other.gguf").write_bytes(b"GGUF")
    with pytest.raises(UserError, match="other models lie beside it"):
        locate(base.path, str(folder / "some-model.gguf"))


def test_a_gguf_file_that_is_none(base: Base, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("gguf")
    folder = base.path / "models" / "some-model"
    folder.mkdir(parents=True)
    (folder / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    code, said = run(base, capsys, "some-model")
    assert code == 2 and "x.gguf: cannot be read as GGUF" in said
