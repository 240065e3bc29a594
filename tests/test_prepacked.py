"""Copies of the weights in the processor library's order: the same products, a model that stays as it is, memory that does not grow."""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import families
import numpy as np
import pytest
import torch
from torch import nn

from spilt import cli, memory
from spilt.engine import attention, prepacked
from spilt.steering import anatomy

pytestmark = pytest.mark.skipif(not prepacked.able(), reason="no oneDNN, or not x86: the model's own products are taken")
TYPES = [torch.float32, *([torch.bfloat16] if prepacked.able() and attention.has_bfloat16() else [])]


def linear(n: int, k: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias=bias).to(dtype).requires_grad_(False)


def packed_maps(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module.__dict__.get("forward"), prepacked.Prepacked)]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_products(dtype: torch.dtype, bias: bool) -> None:
    """Of every layout of x; a row alone has the same bits as beside others."""
    own = linear(33, 17, dtype, bias)
    made = prepacked.Prepacked(own)
    rows = torch.randn(64, 17, dtype=dtype)
    wide = torch.randn(4, 6, 40, dtype=dtype)
    for x in (
        rows,
        rows[0],
        rows[:0],
        rows.view(2, 4, 8, 17),
        rows[:1].expand(3, 17),
        wide[:, ::2, 3:20],
        torch.randn(17, 5, dtype=dtype).T,
    ):
        torch.testing.assert_close(
            made(x), own(x), rtol=1e-5 if dtype == torch.float32 else 0.016, atol=1e-5 if dtype == torch.float32 else 2e-3
        )
        assert made(x).is_contiguous()
    assert all(torch.equal(made(rows[i : i + 1])[0], made(rows)[i]) for i in range(64))


@pytest.mark.parametrize("dtype", TYPES)
def test_slopes(dtype: torch.dtype) -> None:
    """dL/dx, with a copy of W^T and without; of a sum too, whose slope is one number seen everywhere."""
    own = linear(33, 17, dtype)
    made, x = prepacked.Prepacked(own), torch.randn(2, 5, 17, dtype=dtype, requires_grad=True)
    for learning in (False, True):
        made.learning = learning
        for loss in (lambda y: y.sum(), lambda y: y.float().square().sum()):
            (found,), (wanted,) = (torch.autograd.grad(loss(of(x)), [x]) for of in (made, own))
            torch.testing.assert_close(found, wanted)
        assert (made.transposed is not None) == learning


def test_own_way() -> None:
    """A weight that was written into or exchanged, one that is learned, another dtype, autocast: the map computes as it does."""
    x = torch.randn(3, 17)

    def differs(change: Callable[[nn.Linear], object], inside: AbstractContextManager[object] | None = None) -> bool:
        """Whether the map's own product is taken afterwards: it is told by another weight."""
        own = linear(33, 17)
        made, before = prepacked.Prepacked(own), own(x)
        change(own)
        with inside or nullcontext():
            torch.testing.assert_close(made(x), own(x), rtol=0, atol=0)
            assert made(x).requires_grad == own.weight.requires_grad
        return not torch.equal(own(x), before)

    assert differs(lambda map_: map_.weight.add_(1.0))
    assert differs(lambda map_: setattr(map_.weight, "data", map_.weight.data + 1))
    assert differs(lambda map_: setattr(map_, "weight", nn.Parameter(map_.weight + 1, requires_grad=False)))
    differs(lambda map_: map_.weight.requires_grad_())
    differs(lambda map_: None, torch.autocast("cpu", torch.bfloat16))
    with pytest.raises(RuntimeError, match="dtype"):
        prepacked.Prepacked(linear(33, 17))(x.double())


@pytest.mark.parametrize("family", families.EVERY)
def test_families(family: str) -> None:
    """The same logits; afterwards nothing is left, also where something is raised."""
    model, ids = families.model(family), torch.arange(40).view(2, 20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    own = model(ids).logits
    with pytest.raises(ZeroDivisionError), prepacked.weights(model):
        maps = packed_maps(model)
        blocks = [module for block in anatomy.blocks(model) for module in block.modules() if type(module) is nn.Linear]
        assert set(map(id, blocks)) <= set(map(id, maps))
        with prepacked.weights(model):  # once is enough
            torch.testing.assert_close(model(ids).logits, own, rtol=1e-4, atol=1e-4)
        assert packed_maps(model) == maps
        raise ZeroDivisionError
    assert not packed_maps(model) and torch.equal(model(ids).logits, own)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_where_it_does_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.model("llama")
    with prepacked.weights(model, tokens=prepacked.TOKENS - 1):
        assert not packed_maps(model)
    size = sum(module.weight.nbytes for module in prepacked._maps(model))
    monkeypatch.setattr(memory, "total", lambda: 4 * size - 4)
    with prepacked.weights(model):
        assert not packed_maps(model)
    monkeypatch.setattr(memory, "total", lambda: 4 * size)
    with prepacked.weights(model):
        assert packed_maps(model)


def test_learning() -> None:
    """Copies of W^T are there while something is learned, no longer."""
    model = families.model("llama")
    h = model.get_input_embeddings()(torch.arange(12)[None]).requires_grad_()
    with prepacked.weights(model):
        for held in (True, False):
            with prepacked.learning(model) if held else nullcontext():
                model(inputs_embeds=h).logits.sum().backward()
                assert {made.__dict__["forward"].transposed is not None for made in packed_maps(model)} == {held}
            assert not any(made.__dict__["forward"].transposed is not None for made in packed_maps(model))


def test_written_into_by_data() -> None:
    """What nothing tells: what adapters do to the weights is done without the copies."""
    model, ids = families.model("llama"), torch.arange(12)[None]
    map_ = anatomy.blocks(model)[1].mlp.down_proj
    own = model(ids).logits
    with prepacked.weights(model):
        maps = packed_maps(model)
        with prepacked.without(model):
            assert not packed_maps(model) and maps
            map_.weight.data.neg_()
            changed = model(ids).logits
            map_.weight.data.neg_()
        assert packed_maps(model) == maps
        torch.testing.assert_close(model(ids).logits, own, rtol=1e-4, atol=1e-4)
    assert not torch.equal(changed, own) and torch.equal(model(ids).logits, own)


@pytest.mark.parametrize(("words", "wanted"), [([], True), (["--engine", "plain"], False), (["--decode_step", "static"], False)])
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], wanted: bool) -> None:
    """A run has the copies from its first step to its last; the plain engine is the model as it is."""
    base = families.make_base(tmp_path, train=4)
    made: list[int] = []
    monkeypatch.setattr(prepacked, "product", lambda x, packed, bias, do=prepacked.product: made.append(1) or do(x, packed, bias))
    run = ["--dataset", base.one, "--method", "sft", "--intervention_method", "vector", "--model_name", base.model]
    run += ["--base_dir", str(tmp_path), "--device", "cpu", "--quiet"]
    for mode in ("generate", "apply"):
        assert cli.main([*run, "--mode", mode, *(words if mode == "apply" or "--engine" in words else ())]) == 0
        if mode == "generate" and "static" in words:
            made.clear()
    assert bool(made) == wanted


# ---------------------------------------------------------------- memory


def of_file(path: Path) -> int:
    """kB of a mapped file that are in this process's memory."""
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    return sum(int(re.search(r"^Rss:\s+(\d+)", part, re.MULTILINE)[1]) for part in parts if str(path) in part.split("\n")[0])  # type: ignore[index]


@pytest.mark.skipif(not Path("/proc/self/pagemap").exists(), reason="Linux tells which pages are whose")
def test_let_go(tmp_path: Path) -> None:
    """Pages as they are in the file leave the memory and come back; what was written into them is never lost."""
    count = 64 * mmap.PAGESIZE // 4
    path = tmp_path / "weights"
    path.write_bytes(np.arange(count, dtype=np.float32).tobytes())
    with open(path, "rb") as file:
        held = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    tensor = torch.frombuffer(held, dtype=torch.float32)
    assert tensor.sum() > 0 and of_file(path) > 200
    assert memory.let_go(tensor) and of_file(path) == 0
    assert torch.equal(tensor, torch.arange(count, dtype=torch.float32))
    tensor[count // 2] = -1.0
    assert not memory.let_go(tensor) and tensor[count // 2] == -1.0
    anonymous = torch.ones(count)
    assert not memory.let_go(anonymous) and anonymous.sum() == count
    assert not memory.let_go(torch.ones(2))
