"""Checks of the roles `layer` and `model`: what a user of nn.Module expects of every module."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.testing.example import Example, Skipped
from neurarium.testing.state import assert_same, close, seeded, unchanged_rng

__all__ = ["CHECKS"]


def build(example: Example, seed: int = 0) -> nn.Module:
    """The example's module, made under its seed whatever the global random state is."""
    with seeded(seed):
        module = example.make(seed)  # type: ignore[misc]
    assert isinstance(module, nn.Module), f"make(seed) returned {type(module).__name__}, not an nn.Module"
    return module


def feed(example: Example, batch: int, seed: int = 0) -> tuple[Any, ...]:
    """The example's inputs, each tensor with `batch` rows."""
    with seeded(seed):
        inputs = example.inputs(batch, seed)  # type: ignore[misc]
    return inputs if isinstance(inputs, tuple) else (inputs,)


def call(module: nn.Module, inputs: tuple[Any, ...], seed: int = 0) -> Any:
    """module(*inputs) under a fixed global seed (train-mode dropout is then repeatable)."""
    with seeded(seed):
        return module(*inputs)


def leaves(output: Any) -> list[Tensor]:
    """The floating-point tensors of an output."""
    return [t for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def to_dtype(inputs: tuple[Any, ...], dtype: torch.dtype) -> tuple[Any, ...]:
    """Floating-point tensors of the inputs cast to dtype; indices and masks stay."""
    return torch.utils._pytree.tree_map(lambda t: t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() else t, inputs)


def batch_size(example: Example) -> None:
    """Any batch size works, and in eval mode a row's result does not depend on the other rows."""
    module, inputs = build(example).eval(), feed(example, 5)
    with torch.no_grad():
        whole = leaves(call(module, inputs))
        for rows in (1, 2):
            part = torch.utils._pytree.tree_map(lambda t, n=rows: t[:n] if isinstance(t, Tensor) else t, inputs)
            for a, b in zip(leaves(call(module, part)), whole, strict=True):
                assert a.shape[0] == rows, f"an input of {rows} rows gave an output of {a.shape[0]} rows"
                assert close(a, b[:rows]), f"the first {rows} of 5 rows give another result alone than in the batch"


def dtypes(example: Example) -> None:
    """float64 and bfloat16: the module follows .to(dtype) and its output has that dtype and is finite."""
    for dtype in (torch.float64, torch.bfloat16):
        module = build(example).to(dtype).eval()
        with torch.no_grad():
            for out in leaves(call(module, to_dtype(feed(example, 2), dtype))):
                assert out.dtype == dtype, f"a {dtype} module and input gave a {out.dtype} output"
                assert torch.isfinite(out).all(), f"the output in {dtype} is not finite"


def gradients(example: Example) -> None:
    """A gradient reaches every parameter, and is finite."""
    module = build(example).train()
    loss = sum(_weighted(t, i) for i, t in enumerate(leaves(call(module, feed(example, 4)))))
    assert isinstance(loss, Tensor) and loss.requires_grad, "the output does not depend on any parameter"
    loss.backward()
    for name, p in module.named_parameters():
        if p.requires_grad:
            assert p.grad is not None, f"no gradient reaches {name}"
            assert torch.isfinite(p.grad).all(), f"the gradient of {name} is not finite"
            assert p.grad.any(), f"the gradient of {name} is zero everywhere"


def _weighted(t: Tensor, i: int) -> Tensor:
    weights = torch.randn(t.shape, generator=torch.Generator().manual_seed(i), dtype=torch.float32).to(t)
    return (t * weights).sum() + (t * t).sum()


def state_dict(example: Example) -> None:
    """A state_dict, saved and loaded into a fresh module of another seed, reproduces the outputs bit for bit."""
    source, target, inputs = build(example, 0).eval(), build(example, 1).eval(), feed(example, 3)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True))
    with torch.no_grad():
        assert_same(call(source, inputs), call(target, inputs), "loaded from a state_dict it gives other outputs: something is not in it")


def deterministic(example: Example) -> None:
    """The same seed gives the same weights and outputs, whatever the global random state was."""
    with seeded(123):
        first = build(example, 0)
    with seeded(321):
        torch.rand(7)
        second = build(example, 0)
    for (name, a), (_, b) in zip(first.state_dict().items(), second.state_dict().items(), strict=True):
        assert_same(a, b, f"two modules of one seed differ in {name}: the seed is ignored")
    inputs = feed(example, 3)
    assert_same(call(first.train(), inputs, 5), call(second.train(), inputs, 5), "two modules of one seed give different outputs")


def stateless_calls(example: Example) -> None:
    """A call leaves nothing behind: the next call on the same input gives the same output, inputs and global RNG stay as they were."""
    module, inputs = build(example).eval(), feed(example, 3)
    before = [t.clone() for t in inputs if isinstance(t, Tensor)]
    with torch.no_grad():
        with unchanged_rng("an eval-mode forward pass"):
            first = module(*inputs)
        call(module, feed(example, 2, seed=9))
        assert_same(first, call(module, inputs), "a second call on the same input gives another output: state is kept between calls")
    for old, new in zip(before, [t for t in inputs if isinstance(t, Tensor)], strict=True):
        assert_same(old, new, "the forward pass changed its input in place")


def copies(example: Example) -> None:
    """copy.deepcopy and pickle give modules with the same outputs, also after a training step was taken."""
    module, inputs = build(example), feed(example, 3)
    sum(t.sum() for t in leaves(call(module.train(), inputs))).backward()  # type: ignore[union-attr]
    module.zero_grad(set_to_none=True)
    module.eval()
    with torch.no_grad():
        want = call(module, inputs)
        assert_same(call(copy.deepcopy(module), inputs), want, "a deep copy gives other outputs")
        assert_same(call(pickle.loads(pickle.dumps(module)), inputs), want, "a pickled copy gives other outputs")


def export(example: Example) -> None:
    """torch.export captures the module in eval mode and the program agrees with it."""
    module, inputs = build(example).eval(), feed(example, 2)
    with torch.no_grad():
        program = torch.export.export(module, inputs)
        assert close(program.module()(*inputs), call(module, inputs)), "the exported program gives another output"


def cuda(example: Example) -> None:
    """.to("cuda") moves all that the module needs."""
    if not torch.cuda.is_available():
        raise Skipped("no CUDA device here")
    module, inputs = build(example).eval(), feed(example, 3)
    with torch.no_grad():
        want = call(module, inputs)
        moved = torch.utils._pytree.tree_map(lambda t: t.cuda() if isinstance(t, Tensor) else t, inputs)
        got = torch.utils._pytree.tree_map(lambda t: t.cpu() if isinstance(t, Tensor) else t, call(module.cuda(), moved))
    assert close(got, want, rtol=5e-3, atol=5e-3), "the module gives another output on CUDA"


CHECKS = {
    "batch_size": batch_size,
    "dtypes": dtypes,
    "gradients": gradients,
    "state_dict": state_dict,
    "deterministic": deterministic,
    "stateless_calls": stateless_calls,
    "copies": copies,
    "export": export,
    "cuda": cuda,
}
