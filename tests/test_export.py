"""spilt export: each kind is loaded by its own library and gives the steered logits; what can't be exact is refused with the reason."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from families import FAMILY_NAMES, LAYERS, checkpoint, intervention, make_base, token_rows
from test_real_model import FOLDER, WHY
from transformers import AutoModelForCausalLM

from spilt import cli
from spilt.engine import whole
from spilt.export import FORMATS
from spilt.settings.values import SCOPES
from spilt.steering.anatomy import FAMILIES
from spilt.steering.steering import Site, Steering

M = 1.7
KINDS = ("vector", "lora", "local_weight")


def steering(form: str, layer: int = 2, site: str = "block", read_point: str | None = None) -> Steering:
    made = intervention(form, read_point, write_point=site, seed=layer)
    return Steering([(Site(layer, made.read_point, site), made)], {"method": "sft"})


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """A base folder with the model of a family."""

    def made(family: str) -> Path:
        (tmp_path / "models").mkdir(exist_ok=True)
        (tmp_path / "models" / family).symlink_to(checkpoint(family))
        return tmp_path

    return made


def run(base: Path, family: str, value: Steering | Path, kind: str, *words: str, multiplier: float | None = M) -> int:
    path = value if isinstance(value, Path) else value.save(base / "any.safetensors")
    named = ["--base_dir", str(base), "--model_name", family, "--steering", str(path), "--device", "cpu", "--output", str(base / "out")]
    strength = [] if multiplier is None else ["--multiplier", str(multiplier)]
    return cli.main(["export", "--format", kind, *named, *strength, *words])


def logits(model: Any) -> torch.Tensor:
    ids, _ = token_rows([9, 9])
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids, use_cache=False).logits).float()


def wanted(family: str, value: Steering) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32, attn_implementation="eager").eval()
    plain = logits(model)
    with whole.steer(model, value, M):
        ours = logits(model)
    assert (ours - plain).abs().max() > 0.02 * ours.abs().max()
    return ours


def assert_same(theirs: torch.Tensor, ours: torch.Tensor) -> None:
    assert (theirs - ours).abs().max() <= 1e-4 * ours.abs().max()


def exact(family: str, form: str, kind: str) -> dict[str, str]:
    """Where it has to be added so that the export is exact."""
    return {"site": "down_proj"} if FAMILIES[family].norm_after_mlp else {}


@pytest.mark.matrix
@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_peft_loads_the_adapter(folder: Callable[[str], Path], family: str, form: str, recwarn: pytest.WarningsRecorder) -> None:
    """AutoPeftModelForCausalLM on the folder alone: LoRA, a vector as a bias, a local weight as both. No library's warning is shown."""
    from peft import AutoPeftModelForCausalLM

    value = steering(form, **exact(family, form, "peft"))
    base = folder(family)
    assert run(base, family, value, "peft") == 0
    assert not [str(one.message) for one in recwarn]
    theirs = AutoPeftModelForCausalLM.from_pretrained(base / "out", dtype=torch.float32, attn_implementation="eager").eval()
    assert_same(logits(theirs), wanted(family, value))
    config = json.loads((base / "out" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and config["base_model_name_or_path"] == str((base / "models" / family).resolve())


@pytest.mark.matrix
@pytest.mark.parametrize("form", KINDS)
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "gemma2"])
def test_a_merged_checkpoint(folder: Callable[[str], Path], family: str, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Loaded by transformers; where the family can't have a bias, what adds a constant is refused."""
    value = steering(form, **exact(family, form, "merged"))
    base = folder(family)
    bias = family in ("llama", "gpt2")
    assert run(base, family, value, "merged") == (0 if bias or form == "lora" else 2)
    said = capsys.readouterr()
    if not (bias or form == "lora"):
        assert "wants a bias at the down projection" in said.err and "--format peft" in said.err and not (base / "out").exists()
        return
    theirs = AutoModelForCausalLM.from_pretrained(base / "out", attn_implementation="eager").eval()
    assert theirs.dtype == torch.float32
    assert_same(logits(theirs), wanted(family, value))
    assert "of the added weights" in (base / "out" / "README.md").read_text()
    own, written = (json.loads((folder / "config.json").read_text()) for folder in (base / "models" / family, base / "out"))
    assert {key for key in {*own, *written} if own.get(key) != written.get(key)} <= {"dtype", "torch_dtype", "mlp_bias"}
    tokenizer = [path for path in sorted((base / "models" / family).iterdir()) if path.name.startswith(("token", "special", "vocab"))]
    assert tokenizer and all((base / "out" / path.name).read_bytes() == path.read_bytes() for path in tokenizer)


@pytest.mark.parametrize("kind", ["peft", "merged", "vllm", "gguf"])
def test_a_norm_after_the_down_projection(folder: Callable[[str], Path], kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Gemma: folding would be wrong (0.43 against an effect of 0.004), so it is refused with what is exact."""
    if kind == "gguf":
        pytest.importorskip("gguf")
    base = folder("gemma2")
    assert run(base, "gemma2", steering("lora"), kind) == 2
    said = capsys.readouterr().err
    assert "a norm follows the down projection" in said and "--set site=down_proj" in said and "--format safetensors" in said
    assert not (base / "out").exists() and [path.name for path in base.iterdir() if path.name.startswith(".out")] == []
    if kind in ("peft", "merged"):
        assert run(base, "gemma2", steering("vector"), kind) == 2
        assert "--format gguf or vllm-hook holds vectors" in capsys.readouterr().err


def test_experts_have_no_weight_for_it(folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    base = folder("mixtral")
    assert run(base, "mixtral", steering("vector"), "peft") == 2
    said = capsys.readouterr().err
    assert "its MLP is a mixture of experts" in said and "--format gguf or vllm-hook" in said and not (base / "out").exists()
    assert run(base, "mixtral", steering("vector"), "safetensors") == 0


@pytest.mark.parametrize("read_point", ["mlp", "attn", "block"])
def test_what_reads_elsewhere_is_no_weight(folder: Callable[[str], Path], read_point: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = folder("qwen2")
    assert run(base, "qwen2", steering("lora", read_point=read_point), "peft") == 2
    said = capsys.readouterr().err
    assert f"reads at {read_point!r}" in said and "intervention_components=mlp_mid" in said
    assert run(base, "qwen2", steering("lora", read_point=read_point), "safetensors") == 0


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_safetensors_hold_everything(folder: Callable[[str], Path], family: str) -> None:
    """Several layers, forms and read points; the multiplier stays a number of its own, and is known."""
    parts = [*steering("vector", 1), *steering("lora", 2, read_point="attn"), *steering("local_weight", LAYERS - 1)]
    value = Steering(parts, {"method": "sft", "recommended_multiplier": M})
    base = folder(family)
    assert run(base, family, value, "safetensors", multiplier=None) == 0
    again = Steering.load(base / "out" / "steering.safetensors")
    assert again == value and again.about["recommended_multiplier"] == M


def test_a_strength_that_is_asked_for_is_not_recommended(folder: Callable[[str], Path]) -> None:
    """What the file recommends stays as it was, or unsaid."""
    base, known = folder("qwen2"), {"method": "sft", "recommended_multiplier": 3.0}
    for about in ({"method": "sft"}, known):
        assert run(base, "qwen2", Steering(steering("lora"), about), "safetensors") == 0
        assert Steering.load(base / "out" / "steering.safetensors").about == about
        assert f"multiplier: `{M:g}`" in (base / "out" / "README.md").read_text()
        shutil.rmtree(base / "out")


@pytest.mark.parametrize("scope", SCOPES[1:])
def test_some_tokens_alone(folder: Callable[[str], Path], scope: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Our own file holds it, and what it does there is compared; a file that cannot say it is refused."""
    base, value = folder("qwen2"), Steering(steering("lora"), {"scope": scope})
    assert run(base, "qwen2", value, "safetensors") == 0
    assert f"the tokens of scope {scope} alone are steered" in capsys.readouterr().out
    again = Steering.load(base / "out" / "steering.safetensors")
    assert again == value and again.scope == scope and "spilt.generate(" in (base / "out" / "README.md").read_text()
    shutil.rmtree(base / "out")
    for kind in FORMATS.keys() - {"safetensors"}:
        assert run(base, "qwen2", value, kind) == 2
        assert f"scope '{scope}' alone" in (said := capsys.readouterr().err) and "--format safetensors" in said
        assert not (base / "out").exists()


def test_several_entries_become_one_adapter(folder: Callable[[str], Path]) -> None:
    """Two in one layer and one in another: their ranks side by side, filled up with zeros."""
    from peft import AutoPeftModelForCausalLM

    value = Steering([*steering("vector", 1), *steering("lora", 1), *steering("lora", 3), *(steering("lora", 3) * 0.5)])
    base = folder("llama")
    assert run(base, "llama", value, "peft") == 0
    theirs = AutoPeftModelForCausalLM.from_pretrained(base / "out", dtype=torch.float32, attn_implementation="eager").eval()
    assert_same(logits(theirs), wanted("llama", value))


def test_for_vllm(folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """A LoRA with the line that serves it; a constant is refused, since vLLM applies none."""
    from peft import AutoPeftModelForCausalLM

    base = folder("qwen2")
    assert run(base, "qwen2", steering("lora"), "vllm", "--base_model", "org/model") == 0
    assert "vllm serve org/model --enable-lora --max-lora-rank 8 --lora-modules steered=adapter" in (base / "out" / "README.md").read_text()
    config = base / "out" / "adapter" / "adapter_config.json"
    known = json.loads(config.read_text())
    assert known["base_model_name_or_path"] == "org/model" and not known["lora_bias"]
    config.write_text(json.dumps({**known, "base_model_name_or_path": str(checkpoint("qwen2"))}))
    theirs = AutoPeftModelForCausalLM.from_pretrained(base / "out" / "adapter", dtype=torch.float32, attn_implementation="eager").eval()
    assert_same(logits(theirs), wanted("qwen2", steering("lora")))
    shutil.rmtree(base / "out")
    assert run(base, "qwen2", steering("vector"), "vllm") == 2 and "--format vllm-hook" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["qwen2", "gemma2"])
def test_for_vllm_hook(folder: Callable[[str], Path], family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The files as its steer worker reads them: rows + coefficient dir at the output of the layer."""
    value = steering("vector", 3)
    base = folder(family)
    assert run(base, family, value, "vllm-hook") == 0
    known = json.loads((base / "out" / "steer.json").read_text())["steering"]
    assert known == {"vector_path": str(base / "out" / "vector.pt"), "method": "add_vector", "coefficient": M, "optimal_layer": 3}
    direction = torch.tensor(torch.load(known["vector_path"], weights_only=True)["dir"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint(family), dtype=torch.float32, attn_implementation="eager").eval()

    def hook(_: Any, __: Any, output: Any) -> Any:
        rows = output[0] if isinstance(output, tuple) else output
        moved = rows + known["coefficient"] * direction.view(1, -1)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    with model.model.layers[known["optimal_layer"]].register_forward_hook(hook):
        assert_same(logits(model), wanted(family, value))
    shutil.rmtree(base / "out")
    assert run(base, family, steering("lora", site="down_proj"), "vllm-hook") == 2
    assert "one vector at one block's output" in capsys.readouterr().err


def test_what_cannot_be_told_apart_is_not_written(folder: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    """An update that changes nothing, and a file that gives other logits than ours."""
    base = folder("qwen2")
    assert run(base, "qwen2", steering("lora") * 0, "peft") == 2
    assert "gives other logits" in capsys.readouterr().err and not (base / "out").exists()
    assert run(base, "qwen2", steering("vector") * 0, "peft") == 2 and "adds nothing" in capsys.readouterr().err


def test_a_wrong_file_is_found_out(
    folder: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from spilt.export import folding, peft

    monkeypatch.setattr(peft, "factors", lambda job: folding.factors(job._replace(multiplier=1.001 * M)))
    base = folder("qwen2")
    assert run(base, "qwen2", steering("lora"), "peft") == 2
    assert "reloaded, it gives other logits" in capsys.readouterr().err and not (base / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--multiplier", "0"], "no steering"),
        (["--multiplier", "nan"], "finite number"),
        ([], "no recommended multiplier"),
        (["--format", "onnx"], "invalid choice"),
        (["--output", "any.safetensors"], "is there already"),
    ],
)
def test_wrong_words(folder: Callable[[str], Path], words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    base = folder("qwen2")
    words = [str(base / word) if word == "any.safetensors" else word for word in words]
    assert run(base, "qwen2", steering("vector"), "peft", *words, multiplier=None) == 2
    assert said in capsys.readouterr().err and not (base / "out").exists()


@pytest.mark.long
def test_a_cell_at_the_recommended_strength(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named as for every other program; what the losses recommend is written and said, with the picture of its curves."""
    base = make_base(tmp_path / "base", train=6)
    assert cli.main([*base.argv("sft", "lora", "--mode", "generate", "--quiet")]) == 0
    words = base.argv("sft", "lora", "--format", "peft", "--output", str(tmp_path / "out"))
    capsys.readouterr()
    assert cli.main(["export", *words]) == 2 and "no recommended multiplier" in capsys.readouterr().err
    few = ["--multipliers", "sweep", "--set", "sweep_points=5", "--control_pairs", "0", "--quiet"]
    assert cli.main(base.argv("sft", "lora", "--mode", "loss", *few)) == 0
    capsys.readouterr()
    code = cli.main(["export", *words])
    said = capsys.readouterr()
    if code == 2:  # these random numbers recommend none, with a reason
        assert "no recommended multiplier (" in said.err and cli.main(["export", *words, "--multiplier", "2"]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    head, _, text = card.removeprefix("---\n").partition("---\n")
    assert yaml.safe_load(head) == {"base_model": "tiny", "tags": ["steering", "spilt"], "library_name": "peft"}
    for part in ("- method: `sft`", "- data: `mine`", "- multiplier: `", "lora at layer 2", "logits on 3 texts", "![preference"):
        assert part in text
    assert (tmp_path / "out" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.real_model
@pytest.mark.skipif(not (FOLDER / "config.json").is_file(), reason=WHY)
@pytest.mark.long
def test_the_real_model_in_peft_and_merged(tmp_path: Path) -> None:
    """A LoRA and a vector on SmolLM2-135M: both libraries' logits are ours."""
    from peft import AutoPeftModelForCausalLM

    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "real").symlink_to(FOLDER.resolve())
    model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    hidden, middle = model.config.hidden_size, model.config.intermediate_size
    lora, vector = intervention("lora", None, hidden, middle, scale=0.05), intervention("vector", None, hidden)
    value = Steering([(Site(20, "mlp_mid"), lora), (Site(12), vector)])
    plain = logits(model)
    with whole.steer(model, value, M):
        ours = logits(model)
    assert (ours - plain).abs().max() > 0.02 * ours.abs().max()
    for kind, library in (("peft", AutoPeftModelForCausalLM), ("merged", AutoModelForCausalLM)):
        assert run(tmp_path, "real", value, kind) == 0
        theirs = library.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
        assert_same(logits(theirs), ours)
        shutil.rmtree(tmp_path / "out")
