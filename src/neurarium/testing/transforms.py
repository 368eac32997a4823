"""Checks of the role `transform`: f(model) -> an ordinary module; the input stays as it was."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import nn

from neurarium.errors import UnsupportedModel
from neurarium.testing.example import Example, Skipped
from neurarium.testing.modules import call, feed, leaves
from neurarium.testing.state import assert_same, close, seeded, snapshot, unchanged_rng

__all__ = ["CHECKS"]


def _pair(example: Example, noise: int = 0) -> tuple[nn.Module, nn.Module]:
    with seeded(0):
        model = example.model(0)  # type: ignore[misc]
    with seeded(noise):
        result = example.apply(model)  # type: ignore[misc]
    assert isinstance(result, nn.Module), f"the transform returned {type(result).__name__}, not an nn.Module"
    return model, result


def input_untouched(example: Example) -> None:
    """Weights, buffers, gradients, flags, hooks and modules of the input are as before, in train and in eval mode; so is the global RNG."""
    for training in (True, False):
        with seeded(0):
            model = example.model(0)  # type: ignore[misc]
        model.train(training)
        for i, p in enumerate(model.parameters()):
            p.grad = torch.full_like(p, float(i))
        before = snapshot(model)
        with unchanged_rng("the transform"):
            result = example.apply(model)  # type: ignore[misc]
        before.assert_unchanged(model, "the transform")
        assert result is not model, "the transform returned its input"


def shares_no_memory(example: Example) -> None:
    """The result owns its tensors: training it cannot change the input."""
    model, result = _pair(example)
    mine = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
    shared = [k for k, t in (*result.named_parameters(), *result.named_buffers()) if t.numel() and t.untyped_storage().data_ptr() in mine]
    assert not shared, f"the result shares memory with its input: {', '.join(shared[:5])}"


def batch_sizes(example: Example) -> None:
    """The result runs at any batch size and treats rows alone."""
    _, result = _pair(example)
    inputs = feed(example, 5)
    result.eval()
    with torch.no_grad():
        whole = leaves(call(result, inputs))
        one = leaves(call(result, tuple(t[:1] for t in inputs)))
    for a, b in zip(one, whole, strict=True):
        assert close(a, b[:1]), "the first of 5 rows gives another result alone than in the batch"
        assert torch.isfinite(b).all(), "the result's output is not finite"


def deterministic(example: Example) -> None:
    """Two calls agree bit for bit whatever the global random state is."""
    (_, first), (_, second) = _pair(example, noise=1), _pair(example, noise=2)
    a, b = first.state_dict(), second.state_dict()
    assert a.keys() == b.keys(), "two calls gave results of different structure"
    for name in a:
        assert_same(a[name], b[name], f"two calls differ in {name}: the seed is ignored")


def saves_and_copies(example: Example) -> None:
    """state_dict, deepcopy and pickle round trips keep the function."""
    _, result = _pair(example)
    inputs = feed(example, 3)
    result.eval()
    with torch.no_grad():
        want = call(result, inputs)
        clone = copy.deepcopy(result)
        assert_same(call(clone, inputs), want, "a deep copy gives other outputs")
        assert_same(call(pickle.loads(pickle.dumps(result)), inputs), want, "a pickled copy gives other outputs")
        buffer = io.BytesIO()
        torch.save(result.state_dict(), buffer)
        for p in clone.parameters():
            p.zero_()
        buffer.seek(0)
        clone.load_state_dict(torch.load(buffer, weights_only=True))
        assert_same(call(clone, inputs), want, "a state_dict round trip gives other outputs")
    carried = {id(t) for t in (*result.parameters(), *result.buffers())}
    hidden = [tuple(t.shape) for t in _pickled_tensors(result) if id(t) not in carried and t.numel() > 1]
    assert not hidden, f"the result keeps tensors that no state_dict carries, of shapes {hidden[:5]}"


class _Finder(pickle.Pickler):
    """Collects the tensors that pickling a module would meet."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.found: list[torch.Tensor] = []

    def persistent_id(self, obj: object) -> str | None:
        if isinstance(obj, torch.Tensor):
            self.found.append(obj)
            return "tensor"
        return None


def _pickled_tensors(module: nn.Module) -> list[torch.Tensor]:
    finder = _Finder()
    finder.dump(module)
    return finder.found


def trains_on(example: Example) -> None:
    """The result takes a gradient step like any module: finite gradients, changed parameters."""
    _, result = _pair(example)
    result.train()
    params = [p for p in result.parameters() if p.requires_grad]
    assert params, "the result has no trainable parameter"
    before = [p.detach().clone() for p in params]
    optimizer = torch.optim.SGD(params, lr=0.1)
    sum((t * t).mean() for t in leaves(call(result, feed(example, 4)))).backward()  # type: ignore[union-attr]
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in params), "a gradient of the result is not finite"
    optimizer.step()
    assert any(not torch.equal(p.detach(), old) for p, old in zip(params, before, strict=True)), "a gradient step changed nothing"
    with torch.no_grad():
        assert all(torch.isfinite(t).all() for t in leaves(call(result.eval(), feed(example, 2)))), "outputs are not finite after a step"


def export(example: Example) -> None:
    """torch.export captures the result and agrees with it."""
    _, result = _pair(example)
    inputs = feed(example, 2)
    result.eval()
    with torch.no_grad():
        program = torch.export.export(result, inputs).module()
        assert close(program(*inputs), call(result, inputs)), "the exported program gives another output"


def refuses_unsupported(example: Example) -> None:
    """A model with nothing to transform is refused by name and left as it was."""
    if example.unsupported is None:
        raise Skipped("the transform takes every module")
    model = example.unsupported()
    before = snapshot(model)
    try:
        example.apply(model)  # type: ignore[misc]
    except UnsupportedModel as error:
        assert str(error), "UnsupportedModel says nothing"
    else:
        raise AssertionError("an unsupported model was accepted in silence")
    before.assert_unchanged(model, "the refused transform")


CHECKS = {
    "input_untouched": input_untouched,
    "shares_no_memory": shares_no_memory,
    "batch_sizes": batch_sizes,
    "deterministic": deterministic,
    "saves_and_copies": saves_and_copies,
    "trains_on": trains_on,
    "export": export,
    "refuses_unsupported": refuses_unsupported,
}
