"""LoRA and post-block adapters together: projections in closed form, through Adam, rank-deficient; both in one file."""

from __future__ import annotations

from pathlib import Path

import families
import pytest
import torch
from torch import Tensor, nn

from spilt.engine import whole
from spilt.errors import UserError
from spilt.steering import joint, post_block
from spilt.steering.interventions import LoRA, PostBlock
from spilt.steering.joint import Apart, basis, without
from spilt.steering.steering import Steering


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_a_projection_is_one_and_takes_out_as_many_dimensions_as_there_are() -> None:
    """P^2 = P, the overlap is gone, a B of rank 2 among 4 rows takes 2, and B = 0 nothing; against Q of a QR decomposition."""
    B = random(2, 12)
    low = random(4, 2, seed=1) @ B  # [4, 12] of rank 2
    V = basis(low)
    assert V.shape == (12, 2)
    torch.testing.assert_close(V.T @ V, torch.eye(2, dtype=torch.float64))
    Q = torch.linalg.qr(B.T).Q
    torch.testing.assert_close(V @ V.T, Q @ Q.T)
    down, up = random(3, 12, seed=2), random(12, 3, seed=3)
    for of, axis in ((down, 1), (up, 0)):
        once = without(V, of, axis)
        torch.testing.assert_close(without(V, once, axis), once)
        assert ((once @ V) if axis else (V.T @ once)).abs().max() < 1e-12
        assert torch.linalg.matrix_rank(once) == 3 and torch.equal(without(basis(torch.zeros(4, 12)).double(), of, axis), of)
    assert basis(torch.zeros(4, 12)).shape == (12, 0)


def made(model: nn.Module, rank: int = 2) -> Steering:
    return joint.both(joint.lora(model, rank=rank), post_block.build(model, rank=3))


def steps(model: nn.Module, steering: Steering, projection: str, count: int = 6) -> Apart:
    """Adam on one text, everything together."""
    ids, _ = families.token_rows([12])
    apart, optimizer = Apart(model, steering, projection), torch.optim.AdamW(steering.parameters(), lr=0.02)
    for _ in range(count):
        with whole.steer(model, steering, 1.0):
            loss = nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        apart.gradients()
        optimizer.step()
        apart.parameters(optimizer)
    return apart


@pytest.mark.parametrize(("projection", "field"), [("input", "read"), ("output", "write")])
def test_it_holds_at_every_step_of_adam_and_without_it_they_meet(projection: str, field: str) -> None:
    model = families.model("llama")
    kept, free = (steps(model, made(model), word) for word in (projection, "none"))
    assert len(kept.overlaps()) == families.LAYERS
    assert max(getattr(one, field) for one in kept.overlaps().values()) < 1e-6
    assert min(getattr(one, field) for one in free.overlaps().values()) > 0.05
    assert all(adapter.norm() > 1e-6 for _, _, adapter in kept.pairs)


def test_the_start_is_nothing_and_projects_nothing() -> None:
    """The public code wipes the first coordinates of D while B is 0."""
    model = families.model("llama")
    steering = made(model)
    ids, _ = families.token_rows([6])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with whole.steer(model, steering, 1.0):
            assert torch.equal(model(input_ids=ids).logits, plain)
    before = [p.clone() for p in steering.parameters()]
    Apart(model, steering, "input").parameters(torch.optim.AdamW(steering.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(before, steering.parameters(), strict=True))


def test_both_in_one_file_and_either_alone(tmp_path: Path) -> None:
    model = families.model("qwen2")
    steering = made(model)
    steps(model, steering, "output", 2)
    again = Steering.load(steering.save(tmp_path / "joint.safetensors"))
    assert again == steering
    kinds = {mode: {type(intervention) for _, intervention in joint.part(again, mode)} for mode in joint.MODES}
    assert kinds == {"all": {LoRA, PostBlock}, "lora_only": {LoRA}, "adapter_only": {PostBlock}}
    with pytest.raises(UserError, match="nothing of that kind"):
        joint.part(joint.part(again, "lora_only"), "adapter_only")


def test_a_lora_is_one_of_peft() -> None:
    """W x + B A x at the same maps with the same numbers gives the logits that PEFT gives."""
    import peft

    model = families.build("llama")
    steering = joint.lora(model, maps=("q_proj", "down_proj"), rank=2)
    for _, one in steering:
        assert isinstance(one, LoRA)
        one.lora_B = nn.Parameter(torch.randn(one.lora_B.shape, generator=torch.Generator().manual_seed(4)) * 0.3)
    ids, _ = families.token_rows([7])
    with torch.no_grad(), whole.steer(model, steering, 1.0):
        ours = model(input_ids=ids).logits
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "down_proj"]))
    for (site, one), (name, module) in zip(steering, [(n, m) for n, m in wrapped.named_modules() if hasattr(m, "lora_A")], strict=True):
        assert name.endswith(f"layers.{site.layer}.{site.write_point}") and isinstance(one, LoRA)
        module.lora_A["default"].weight.data, module.lora_B["default"].weight.data = one.lora_A.data.T, one.lora_B.data.T
    with torch.no_grad():
        torch.testing.assert_close(wrapped(input_ids=ids).logits, ours, atol=1e-5, rtol=1e-4)


def test_words_that_are_none() -> None:
    model = families.model("llama")
    with pytest.raises(UserError, match="unknown projection 'both'"):
        Apart(model, made(model), "both")
    with pytest.raises(UserError, match="no block has both"):
        Apart(model, post_block.build(model), "output")
    with pytest.raises(UserError, match="unknown linear map 'w_proj'"):
        joint.lora(model, maps=("w_proj",))
    with pytest.raises(UserError, match="unknown mode 'lora'"):
        joint.part(made(model), "lora")
