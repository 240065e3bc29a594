"""What a post-block edit can and cannot do beside weights and other places, in float64 (arXiv 2603.00425; design/post_block.md, 8).

A gated MLP y(h) = W_d m, m = act(a_g) * a_u, a_g = W_g h, a_u = W_u h, elementwise products.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import families
import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import silu

from spilt.engine import oracle
from spilt.errors import UserError
from spilt.steering import hooks, post_block
from spilt.steering.interventions import PostBlock
from spilt.steering.steering import Site, Steering

D, F = 8, 12


def random(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W_G, W_U, W_D = random(F, D, seed=1, scale=D**-0.5), random(F, D, seed=2, scale=D**-0.5), random(D, F, seed=3, scale=F**-0.5)
H = random(40, D, seed=4)


def mlp(h: Tensor, g: Tensor = W_G, u: Tensor = W_U, d: Tensor = W_D) -> Tensor:
    return (silu(h @ g.T) * (h @ u.T)) @ d.T


def slope(x: Tensor) -> Tensor:
    """silu'(x), by its formula."""
    s = torch.sigmoid(x)
    return s * (1 + x * (1 - s))


def first_order(h: Tensor, dg: Tensor, du: Tensor, dd: Tensor) -> Tensor:
    """dy of small changes of the three matrices."""
    a_g, a_u = h @ W_G.T, h @ W_U.T
    return (silu(a_g) * a_u) @ dd.T + ((slope(a_g) * a_u) * (h @ dg.T) + silu(a_g) * (h @ du.T)) @ W_D.T


def before_mlp(h: Tensor, dh: Tensor) -> Tensor:
    """dy of a small change of the MLP's input: A(h) dh."""
    a_g, a_u = h @ W_G.T, h @ W_U.T
    return ((slope(a_g) * a_u) * (dh @ W_G.T) + silu(a_g) * (dh @ W_U.T)) @ W_D.T


@pytest.mark.parametrize("way", ("fine-tuning", "input"))
def test_what_first_order_leaves_out_falls_with_the_square(way: str) -> None:
    dg, du, dd, dh = random(F, D, seed=5), random(F, D, seed=6), random(D, F, seed=7), random(40, D, seed=8)
    errors = []
    for eps in (1e-1, 1e-2, 1e-3):
        if way == "input":
            exact, first = mlp(H + eps * dh) - mlp(H), before_mlp(H, eps * dh)
        else:
            exact, first = mlp(H, W_G + eps * dg, W_U + eps * du, W_D + eps * dd) - mlp(H), first_order(H, eps * dg, eps * du, eps * dd)
        errors.append(float((exact - first).norm() / first.norm()) * eps)  # of first order: relative error x size
    assert errors[0] / errors[1] == pytest.approx(100, rel=0.3) and errors[1] / errors[2] == pytest.approx(100, rel=0.05)


def test_a_change_of_gate_and_up_that_is_one_of_the_input_is_matched() -> None:
    """dW_g = W_g K and dW_u = W_u K: the input h + K h gives the same, exactly and for any K; a linear adapter U D = K at mlp_input."""
    K = random(D, D, seed=9, scale=0.3)
    torch.testing.assert_close(mlp(H, W_G + W_G @ K, W_U + W_U @ K), mlp(H + H @ K.T), atol=1e-14, rtol=1e-13)
    made = PostBlock(D, rank=D, nonlinearity="linear", write_point="mlp_input").double()
    made.down.data, made.up.data = K, torch.eye(D, dtype=torch.float64)
    torch.testing.assert_close(mlp(made(H[None], None, 1.0)[0]), mlp(H, W_G + W_G @ K, W_U + W_U @ K), atol=1e-14, rtol=1e-13)


def test_a_change_of_the_down_projection_leaves_what_the_input_can_reach() -> None:
    """dy = A(h) dh lies in col(W_d): where W_d has half the rank, a dW_d outside it cannot be matched by any dh, and post-block can."""
    low = W_D.clone()
    low[D // 2 :] = 0
    change = torch.zeros_like(W_D)
    change[D // 2 :] = random(D - D // 2, F, seed=10)
    wanted = mlp(H, d=low + change) - mlp(H, d=low)
    a_g, a_u = H[0] @ W_G.T, H[0] @ W_U.T
    A = low @ ((slope(a_g) * a_u)[:, None] * W_G + silu(a_g)[:, None] * W_U)
    solved = A @ torch.linalg.lstsq(A, wanted[0, :, None]).solution
    assert solved.norm() < 1e-12 * wanted[0].norm() and wanted[0].norm() > 0.1
    torch.testing.assert_close(mlp(H, d=low) + wanted, mlp(H, d=low + change))  # what is added behind the block may be anything


def test_reft_behind_the_mlp_is_a_change_of_the_down_projection_in_its_own_rows() -> None:
    """y + R^T (W y + b - R y) = (W_d + (R^T W - R^T R) W_d) m + R^T b."""
    R, W, b = torch.linalg.qr(random(D, 3, seed=11)).Q.T, random(3, D, seed=12), random(3, seed=13)
    y = mlp(H)
    edited = y + (y @ W.T + b - y @ R.T) @ R
    change = (R.T @ W - R.T @ R) @ W_D
    torch.testing.assert_close(edited, mlp(H, d=W_D + change) + b @ R)
    assert torch.linalg.matrix_rank(change) == 3 and (change - R.T @ (R @ change)).abs().max() < 1e-13


def test_disjoint_subspaces() -> None:
    """Where skip and MLP outputs meet in 0 alone, the adapter A P at the block is the adapter A at the MLP, of the same rank."""
    frame = random(D, D, seed=14)
    skip, y = H[:, :3] @ frame[:, :3].T, H[:, 3:] @ frame[:, 3:].T
    P = frame @ torch.diag(torch.tensor([0.0] * 3 + [1.0] * (D - 3), dtype=torch.float64)) @ torch.linalg.inv(frame)  # on the MLP part
    for nonlinearity in ("linear", "silu"):
        at_mlp = PostBlock(D, rank=2, nonlinearity=nonlinearity, write_point="mlp").double()
        at_mlp.down.data, at_mlp.up.data = random(2, D, seed=15), random(D, 2, seed=16)
        at_block = PostBlock(D, rank=2, nonlinearity=nonlinearity).double()
        at_block.down.data, at_block.up.data = at_mlp.down.data @ P, at_mlp.up.data
        ours, theirs = at_block((skip + y)[None], None, 1.0)[0], skip + at_mlp(y[None], None, 1.0)[0]
        torch.testing.assert_close(ours, theirs, atol=1e-13, rtol=1e-12)


# ---------------------------------------------------------------- in a model


def double() -> torch.nn.Module:
    return families.build("llama").double()


def test_an_mlp_that_writes_nothing_can_be_steered_behind_the_block_alone() -> None:
    """W_d = 0: every input-dependent edit of the MLP's output is 0 (no biases); at the block it is not."""
    model = double()
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.zero_()
    ids, _ = families.token_rows([9])
    plain = model(input_ids=ids).logits

    def effect(site: str) -> float:
        steering = post_block.build(model, sites=[site], rank=4)
        with torch.no_grad():
            for i, parameter in enumerate(steering.parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.2)
        with torch.no_grad(), hooks.attach(model, steering.at(1.0)):
            return float((model(input_ids=ids).logits - plain).abs().max())

    assert effect("mlp") == effect("mlp_input") == 0.0 and effect("block") > 0.1


def tuned(model: torch.nn.Module, size: float = 0.02) -> dict[str, Tensor]:
    """The parameters of a fine-tuned model: every matrix inside the blocks a little elsewhere."""
    return {
        name: value + size * torch.randn(value.shape, generator=torch.Generator().manual_seed(i), dtype=value.dtype)
        for i, (name, value) in enumerate(model.named_parameters())
        if ".layers." in name and value.ndim == 2
    }


def test_the_oracle_is_the_fine_tuned_model() -> None:
    """Its stream put in behind every block, or the same numbers added there, gives its logits; behind one block alone a KL."""
    model = double()
    changes, (ids, _) = tuned(model), families.token_rows([9, 9])
    other = families.build("llama").double()
    other.load_state_dict({**model.state_dict(), **changes})
    wanted = functional_call(model, changes, (ids,)).logits
    torch.testing.assert_close(other(input_ids=ids).logits, wanted)
    found = oracle.oracle(model, other, ids)
    assert found.added.shape == (families.LAYERS, *ids.shape, families.HIDDEN)
    torch.testing.assert_close(found.logits, wanted, atol=1e-12, rtol=1e-10)
    shifts = [h.register_forward_hook(partial(shifted, found.added[i])) for i, h in enumerate(model.model.layers)]
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-12, rtol=1e-10)  # as numbers that are added, not put
    for handle in shifts:
        handle.remove()
    kl = oracle.kl_by_layer(model, other, ids)
    assert len(kl) == families.LAYERS and abs(kl[-1]) < 1e-12 and kl[0] > 1e-6  # behind the last block: all of it
    with pytest.raises(UserError, match="no fine-tuned version"):
        oracle.oracle(model, families.build("llama", num_hidden_layers=2), ids)


def shifted(delta: Tensor, module: torch.nn.Module, args: object, output: Any) -> Any:
    return (output[0] + delta, *output[1:]) if isinstance(output, tuple) else output + delta


def test_the_spectrum_is_that_of_a_decomposition() -> None:
    """Shares of the squared singular values, and the rank that holds so much of them; of a delta of rank 2 all by 2."""
    low = random(50, 2, seed=20) @ random(2, D, seed=21)
    shares = oracle.spectrum(low)
    values = torch.linalg.svdvals(low) ** 2
    torch.testing.assert_close(shares, values / values.sum(), atol=1e-12, rtol=1e-9)
    assert oracle.rank_of(shares, 0.999) == 2 and oracle.rank_of(torch.ones(4) / 4, 0.6) == 3


def test_shares_of_the_change_of_a_block() -> None:
    """||dMLP|| / (||dMLP|| + ||dskip||), and the two parts add up to the change of the block's output."""
    model = double()
    other = families.build("llama").double()
    other.load_state_dict({**model.state_dict(), **tuned(model)})
    ids, _ = families.token_rows([9])
    parts = oracle.parts(model, other, ids)
    whole = oracle.outputs(other, ids) - oracle.outputs(model, ids)
    torch.testing.assert_close(parts.mlp + parts.skip, whole, atol=1e-12, rtol=1e-9)
    by_hand = model.model.layers[0].mlp
    assert torch.equal(oracle.outputs(model, ids, "mlp")[0], first_mlp(model, by_hand, ids))
    shares = oracle.mlp_share(parts)
    for layer, share in enumerate(shares):
        up, rest = (float(part[layer].flatten(0, 1).norm(dim=-1).mean()) for part in parts)
        assert share == pytest.approx(up / (up + rest)) and 0 < share < 1


def first_mlp(model: torch.nn.Module, mlp: torch.nn.Module, ids: Tensor) -> Tensor:
    """What the first MLP gives, caught by a hook of PyTorch's own."""
    seen = []
    handle = mlp.register_forward_hook(lambda module, args, output: seen.append(output))
    model(input_ids=ids)
    handle.remove()
    return seen[0]


def test_shares_need_an_mlp_whose_output_is_added() -> None:
    with pytest.raises(UserError, match="gemma2: what its MLP gives"):
        oracle.parts(families.model("gemma2"), families.model("gemma2"), families.token_rows([4])[0])


def test_a_post_block_adapter_in_a_model_of_float64_is_its_equation() -> None:
    model = double()
    steering = Steering([(Site(1), PostBlock(families.HIDDEN, rank=2, nonlinearity="tanh").double())])
    with torch.no_grad():
        for parameter in steering.parameters():
            parameter.copy_(random(*parameter.shape, seed=30, scale=0.3))
    ids, _ = families.token_rows([7])
    made = steering.entries[0][1]

    def by_hand(module: torch.nn.Module, args: object, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        return shifted(0.8 * torch.tanh(h @ made.down.T) @ made.up.T, module, args, output)  # type: ignore[operator]

    handle = model.model.layers[1].register_forward_hook(by_hand)
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        handle.remove()
        with hooks.attach(model, steering.at(0.8)):
            torch.testing.assert_close(model(input_ids=ids).logits, wanted, atol=1e-12, rtol=1e-10)
