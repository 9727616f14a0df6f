"""Adam against torch.optim.Adam (methods.md D, Optimiser)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sdi_fast.optim import Adam
from sdi_fast.types import SDIFastError

BETAS, EPS = (0.9, 0.99), 1e-15


def leaves(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    draws = torch.Generator().manual_seed(0)
    shapes = {"table": (40,), "w": (3, 5)}
    return {
        name: torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype).requires_grad_()
        for name, shape in shapes.items()
    }


def set_grads(params: dict[str, Tensor], step: int) -> None:
    draws = torch.Generator().manual_seed(100 + step)
    for param in params.values():
        # 1e-6 as well as 1: Adam's steps do not depend on the scale unless eps is too large
        scale = 10.0 ** -(6 * (step % 2))
        grad = torch.randn(param.shape, generator=draws, dtype=torch.float64) * scale
        param.grad = grad.to(param.dtype)


def ours(params: dict[str, Tensor]) -> Adam:
    groups = {
        "field": ({"table": params["table"]}, 1e-2),
        "background": ({"w": params["w"]}, 1e-3),
    }
    return Adam(groups, betas=BETAS, eps=EPS)


def torchs(params: dict[str, Tensor]) -> torch.optim.Adam:
    groups = [{"params": [params["table"]], "lr": 1e-2}, {"params": [params["w"]], "lr": 1e-3}]
    return torch.optim.Adam(groups, betas=BETAS, eps=EPS)


# a few roundings a step
@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_matches_torch(dtype: torch.dtype, rtol: float) -> None:
    a, b = leaves(dtype), leaves(dtype)
    mine, theirs = ours(a), torchs(b)
    for step in range(6):
        set_grads(a, step)
        set_grads(b, step)
        mine.step()
        theirs.step()
        for name in a:
            assert torch.allclose(a[name], b[name], rtol=rtol, atol=0.0), (name, step)
    assert not torch.equal(a["table"], leaves(dtype)["table"])


def test_first_step_is_lr_times_sign() -> None:
    params = leaves()
    before = {k: v.detach().clone() for k, v in params.items()}
    set_grads(params, 1)
    ours(params).step()
    for name, lr in (("table", 1e-2), ("w", 1e-3)):
        moved = params[name].detach() - before[name]
        # eps 1e-15 against gradients of about 1e-6
        assert torch.allclose(moved, -lr * params[name].grad.sign(), rtol=1e-6)


def test_missing_gradient_counts_as_zero() -> None:
    a, b = leaves(), leaves()
    mine, theirs = ours(a), torchs(b)
    for step in range(3):
        set_grads(a, step)
        set_grads(b, step)
        if step:
            a["w"].grad = None
            b["w"].grad = torch.zeros_like(b["w"])
        mine.step()
        theirs.step()
    assert torch.allclose(a["w"], b["w"], rtol=1e-13)


def test_zero_grad() -> None:
    params = leaves()
    optimizer = ours(params)
    set_grads(params, 0)
    assert any(p.grad is not None for p in params.values())
    optimizer.zero_grad()
    assert all(p.grad is None for p in params.values())


def test_state_round_trip_continues_the_run() -> None:
    a = leaves()
    first = ours(a)
    for step in range(3):
        set_grads(a, step)
        first.step()
    state = {k: v.clone() for k, v in first.state_dict().items()}
    assert set(state) == {
        "step",
        "exp_avg.field.table",
        "exp_avg_sq.field.table",
        "exp_avg.background.w",
        "exp_avg_sq.background.w",
    }
    b = {k: v.detach().clone().requires_grad_() for k, v in a.items()}
    second = ours(b)
    second.load_state_dict(state)
    for step in range(3, 6):
        for params, optimizer in ((a, first), (b, second)):
            set_grads(params, step)
            optimizer.step()
    for name in a:
        assert torch.equal(a[name], b[name])


def test_bad_states_are_named_and_change_nothing() -> None:
    params = leaves()
    optimizer = ours(params)
    set_grads(params, 0)
    optimizer.step()
    state = {k: v.clone() for k, v in optimizer.state_dict().items()}
    short = {k: v for k, v in state.items() if k != "exp_avg.field.table"}
    for bad, message in (
        (short, r"exp_avg\.field\.table.*missing"),
        ({**state, "extra": torch.zeros(1)}, "extra.*not expected"),
        ({**state, "exp_avg_sq.background.w": torch.zeros(5, 3)}, r"exp_avg_sq\.background\.w"),
    ):
        with pytest.raises(SDIFastError, match=message):
            optimizer.load_state_dict(bad)
    for name, value in optimizer.state_dict().items():
        assert torch.equal(value, state[name])


def test_bad_settings_are_named() -> None:
    w = torch.zeros(2, requires_grad=True)
    with pytest.raises(SDIFastError, match="learning rate"):
        Adam({"a": ({"w": w}, -1.0)})
    with pytest.raises(SDIFastError, match="betas"):
        Adam({"a": ({"w": w}, 1.0)}, betas=(0.9, 1.0))
    with pytest.raises(SDIFastError, match="eps"):
        Adam({"a": ({"w": w}, 1.0)}, eps=float("nan"))
    with pytest.raises(SDIFastError, match="more than one"):
        Adam({"a": ({"w": w}, 1.0), "b": ({"v": w}, 1.0)})
