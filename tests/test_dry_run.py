"""What config.json and the settings already show is told before anything loads: layers, families, sizes, and what a step costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import families
import pytest

from spilt import cli, plan, verbs
from spilt.verbs import estimate as costs

MODES = ("generate", "apply", "both", "loss", "all")


@pytest.fixture
def base(tmp_path: Path) -> families.Base:
    return families.make_base(tmp_path / "base", train=12, test=6)


def config(base: families.Base, **values: Any) -> Path:
    path = base.path / "models" / base.model / "config.json"
    content = {**json.loads(path.read_text()), **values}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not Ellipsis}))
    return path


def run(base: families.Base, capsys: pytest.CaptureFixture[str], *words: str, method: str = "sft", form: str = "vector") -> tuple[int, str]:
    capsys.readouterr()
    before = families.listing(base.path)
    code = cli.main(base.argv(method, form, "--quiet", *words))
    out, err = capsys.readouterr()
    assert "Traceback" not in err and (code == 0 or families.listing(base.path) == before)
    return code, out + err


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spilt.model.host.load", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dry", [True, False])
def test_a_layer_that_the_model_does_not_have(base: families.Base, capsys: pytest.CaptureFixture[str], mode: str, dry: bool) -> None:
    for layers in ("20", "5", "0 5"):
        words = ("--set", f"layers=[{layers.replace(' ', ', ')}]", *(["--dry_run"] if dry else []))
        code, said = run(base, capsys, "--mode", mode, *words, form="all")
        assert code == 2 and f"layer {layers.split()[-1]} does not exist: the model has 5 blocks, 0 to 4" in said and "layers" in said
        assert "cost" not in said and said.count("error:") == 1


def test_the_last_layer_is_there(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = run(base, capsys, "--set", "layers=4", "--dry_run")
    assert code == 0 and "cost     about" in said and "-" not in said.split("cost     about")[1].splitlines()[0]


@pytest.mark.parametrize("model_type", families.FAMILY_NAMES)
def test_blocks_are_counted_in_every_family(tmp_path: Path, capsys: pytest.CaptureFixture[str], model_type: str) -> None:
    base = families.make_base(tmp_path / "base", model_type, train=4)
    assert run(base, capsys, "--dry_run", "--mode", "loss")[0] == 0
    code, said = run(base, capsys, "--dry_run", "--set", f"layers={families.LAYERS}")
    assert code == 2 and f"has {families.LAYERS} blocks" in said


@pytest.mark.usefixtures("nothing_loads")
@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("values", "needles"),
    [
        ({"model_type": ...}, ("no model_type",)),
        ({"model_type": 5}, ("model_type = 5",)),
        ({"num_hidden_layers": "5"}, ('num_hidden_layers = "5"', "above 0")),
        ({"hidden_size": -32}, ("hidden_size = -32", "above 0")),
        ({"vocab_size": 0}, ("vocab_size = 0", "above 0")),
        ({"num_attention_heads": True}, ("num_attention_heads = true", "above 0")),
        ({"intermediate_size": 48.5}, ("intermediate_size = 48.5", "above 0")),
    ],
)
def test_a_model_that_cannot_run(
    base: families.Base, capsys: pytest.CaptureFixture[str], dry: bool, values: dict[str, Any], needles: tuple[str, ...]
) -> None:
    path = config(base, **values)
    code, said = run(base, capsys, *(["--dry_run"] if dry else []))
    assert code == 2 and "config.json" in said and [needle for needle in needles if needle not in said] == [], said
    assert said.count("error:") == 1 and path.is_file()


@pytest.mark.parametrize("text", ["{", "[]", "null", '"x"', "[" * 5000, "\ud800"])
def test_a_config_that_is_no_object(base: families.Base, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (base.path / "models" / base.model / "config.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    for words in (["--dry_run"], []):
        code, said = run(base, capsys, *words)
        assert code == 2 and "config.json" in said and said.count("error:") == 1


def test_a_model_that_is_not_there_yet_is_missing_in_a_dry_run(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    (base.path / "models" / base.model / "config.json").unlink()
    code, said = run(base, capsys, "--dry_run", "--set", "layers=20")
    assert code == 0 and "missing" in said


def test_a_small_config_that_leaves_the_rest_to_the_library_is_enough(base: families.Base, capsys: pytest.CaptureFixture[str]) -> None:
    """As the released trees are tried out, and with fewer keys still."""
    path = base.path / "models" / base.model / "config.json"
    path.write_text(json.dumps({"model_type": "gemma2", "num_hidden_layers": 42}))
    assert run(base, capsys, "--dry_run", "--set", "layers=41")[0] == 0
    path.write_text(json.dumps({"model_type": "qwen2"}))
    assert run(base, capsys, "--dry_run", "--set", "layers=20")[0] == 0


def test_a_dry_run_imports_no_torch(base: families.Base) -> None:
    program = "import sys; from spilt.cli import main; code = main(sys.argv[1:]); print({'torch', 'transformers'} & set(sys.modules), code)"
    env = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[1])}
    words = base.argv("all", "all", "--dry_run")
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, env=env, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "set() 0"


# ---------------------------------------------------------------- cost


def cost(base: families.Base, mode: str, method: str = "sft", limit: int | None = None, **overrides: Any) -> costs.Cost:
    request = verbs.Request(
        base.one, method, base.model, "vector", mode=mode, base_dir=base.path, device="cpu", overrides=overrides, limit=limit
    )
    (step,) = plan.make(request, dry=True).steps
    found = verbs.cost(step, request)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("mode", "method", "key"),
    [
        ("generate", "sft", "max_num_of_examples"),
        ("generate", "caa", "max_num_of_examples"),
        ("loss", "sft", "max_num_of_examples"),
        ("apply", "sft", "generation_data_size"),
    ],
)
def test_the_cost_is_of_the_rows_that_are_read(base: families.Base, mode: str, method: str, key: str) -> None:
    all_of_them = cost(base, mode, method)
    for rows in (1, 3):
        assert cost(base, mode, method, **{key: rows}) == cost(base, mode, method, limit=rows) != all_of_them
        assert cost(base, mode, method, limit=2, **{key: rows}) == cost(base, mode, method, limit=min(2, rows))
    assert cost(base, mode, method, **{key: 999}) == all_of_them == cost(base, mode, method, **{key: None})


def test_the_cost_of_a_fit_is_of_all_its_layers(base: families.Base) -> None:
    """Trained layers are a fit each, a joint one is one fit; closed forms read all from one pass, up to the highest."""
    one, three = (cost(base, "generate", layers=f"[{layer}]") for layer in (1, 3))
    both = cost(base, "generate", layers="[1, 3]")
    assert both.flops == one.flops + three.flops and both.tokens == one.tokens + three.tokens and both.cache == one.cache + three.cache
    assert both.peak == max(one.peak, three.peak) + one.cache, "all that is recorded is kept until the step is over"
    assert one.flops <= cost(base, "generate", layers="[1, 3]", joint="true").flops < both.flops
    low, high = (cost(base, "generate", "caa", layers=f"[{layer}]") for layer in (1, 3))
    several = cost(base, "generate", "caa", layers="[1, 3]")
    assert several.flops == high.flops > low.flops and several.tokens == high.tokens and several.cache == 2 * high.cache < one.cache
    assert cost(base, "generate", "caa", layers="[1]", direction_layer="3", intervention_method="vector") == high


def test_the_cost_of_a_model_that_also_sees_is_of_its_language_model(tmp_path: Path) -> None:
    flat = {"num_hidden_layers": 34, "hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 4}
    flat |= {"head_dim": 256, "vocab_size": 262208}
    for name, content in (
        ("flat", flat),
        ("nested", {"model_type": "gemma3", "vision_config": {"hidden_size": 1152}, "text_config": flat}),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(content))
    assert costs.shape_of(tmp_path / "nested") == costs.shape_of(tmp_path / "flat") != None  # noqa: E711
