"""Checks of the role `optimizer`: drop-in in a plain loop."""

from __future__ import annotations

import copy
import io

import torch
from torch import Tensor, nn

from neurarium.testing.example import Example, Skipped
from neurarium.testing.state import assert_same, seeded, unchanged_rng

__all__ = ["CHECKS"]


def _task(dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[nn.Module, Tensor, Tensor]:
    """A small regression that has matrices, vectors and a convolution kernel."""
    with seeded(0):
        model = nn.Sequential(nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3))
        x, y = torch.randn(32, 2, 6), torch.randn(32, 3)
    return model.to(device, dtype), x.to(device, dtype), y.to(device, dtype)


def _steps(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, n: int) -> list[float]:
    losses = []
    for _ in range(n):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def descends(example: Example) -> None:
    """Forty steps of a plain loop lower the loss."""
    model, x, y = _task()
    losses = _steps(model, example.make(list(model.parameters())), x, y, 40)  # type: ignore[misc]
    assert losses[-1] < 0.95 * losses[0], f"the loss went from {losses[0]:.4f} to {losses[-1]:.4f} in 40 steps"


def resumes(example: Example) -> None:
    """After state_dict -> save -> load the optimizer goes on bit for bit."""
    model, x, y = _task()
    optimizer = example.make(list(model.parameters()))  # type: ignore[misc]
    _steps(model, optimizer, x, y, 4)
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    _steps(model, optimizer, x, y, 4)
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other, _, _ = _task()
    other.load_state_dict(saved["model"])
    resumed = example.make(list(other.parameters()))  # type: ignore[misc]
    resumed.load_state_dict(saved["optimizer"])
    _steps(other, resumed, x, y, 4)
    for (name, a), (_, b) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        assert_same(a.detach(), b.detach(), f"{name} differs after a resume from state_dict: some state is not in it")


def groups(example: Example) -> None:
    """Parameter groups keep their own settings: a group of learning rate 0 stays where it is, the others move."""
    model, x, y = _task()
    params = list(model.parameters())
    optimizer = example.make([{"params": params[:2], "lr": 0.0, "weight_decay": 0.0}, {"params": params[2:]}])  # type: ignore[misc]
    before = copy.deepcopy([p.detach() for p in params])
    _steps(model, optimizer, x, y, 3)
    for i, (p, old) in enumerate(zip(params, before, strict=True)):
        same = torch.equal(p.detach(), old)
        assert same == (i < 2), f"parameter {i} {'moved at learning rate 0' if i < 2 else 'did not move'}"


def missing_gradients(example: Example) -> None:
    """A parameter without gradient is left alone; a zero gradient gives a finite step."""
    model, x, y = _task()
    params = list(model.parameters())
    optimizer = example.make(params)  # type: ignore[misc]
    before = params[0].detach().clone()
    nn.functional.mse_loss(model(x), y).backward()
    params[0].grad = None
    params[2].grad = torch.zeros_like(params[2])
    optimizer.step()
    assert torch.equal(params[0].detach(), before), "a parameter whose gradient is None was changed"
    assert all(torch.isfinite(p).all() for p in params), "a zero gradient gave a parameter that is not finite"


def dtypes(example: Example) -> None:
    """float64 and bfloat16 parameters are stepped in their own dtype."""
    for dtype in (torch.float64, torch.bfloat16):
        model, x, y = _task(dtype)
        before = [p.detach().clone() for p in model.parameters()]
        _steps(model, example.make(list(model.parameters())), x, y, 3)  # type: ignore[misc]
        for p, old in zip(model.parameters(), before, strict=True):
            assert p.dtype == dtype and torch.isfinite(p).all(), f"a {dtype} parameter became {p.dtype} or not finite"
            assert not torch.equal(p.detach(), old), f"a {dtype} parameter did not move"


def closure(example: Example) -> None:
    """step(closure) evaluates the closure with gradients on and returns its loss."""
    model, x, y = _task()
    optimizer = example.make(list(model.parameters()))  # type: ignore[misc]

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        return loss

    want = nn.functional.mse_loss(model(x), y).item()
    got = optimizer.step(evaluate)
    assert got is not None and abs(got.item() - want) < 1e-6, "step(closure) does not return the closure's loss"


def leaves_the_rest_alone(example: Example) -> None:
    """A step does not move the global random state nor the gradients it was given."""
    model, x, y = _task()
    optimizer = example.make(list(model.parameters()))  # type: ignore[misc]
    nn.functional.mse_loss(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    with unchanged_rng("step()"):
        optimizer.step()
    for old, p in zip(grads, model.parameters(), strict=True):
        assert p.grad is not None
        assert_same(old, p.grad, "step() changed a gradient in place")


def deterministic(example: Example) -> None:
    """Two runs from the same start agree bit for bit."""
    ends = []
    for _ in range(2):
        model, x, y = _task()
        _steps(model, example.make(list(model.parameters())), x, y, 5)  # type: ignore[misc]
        ends.append([p.detach() for p in model.parameters()])
    assert_same(ends[0], ends[1], "two runs from the same start end differently")


def cuda(example: Example) -> None:
    """Parameters on CUDA are stepped there."""
    if not torch.cuda.is_available():
        raise Skipped("no CUDA device here")
    model, x, y = _task(device="cuda")
    losses = _steps(model, example.make(list(model.parameters())), x, y, 40)  # type: ignore[misc]
    assert losses[-1] < 0.95 * losses[0], "the loss does not fall on CUDA"


CHECKS = {
    "descends": descends,
    "resumes": resumes,
    "groups": groups,
    "missing_gradients": missing_gradients,
    "dtypes": dtypes,
    "closure": closure,
    "leaves_the_rest_alone": leaves_the_rest_alone,
    "deterministic": deterministic,
    "cuda": cuda,
}
