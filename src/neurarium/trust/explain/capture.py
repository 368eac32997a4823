"""The engine of the explanation methods: intermediate activations of any module by path, and running with some of them replaced.

A *site* is the output of the submodule with that name (``model.get_submodule``); where a module runs several times in one forward
pass, its last run. A site's tensor is what the module returned: the rest of the network is given a copy, so that an in-place
``ReLU`` behind it changes neither the value nor the gradient that is read. Nothing stays on the model: hooks go when the block ends,
parameters receive no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["Capture", "capture", "last_map", "patch"]


class Capture:
    """The output of a forward pass and its activations: ``captured["layer4"]``."""

    def __init__(self) -> None:
        self.output: Tensor = torch.empty(0)
        self.activations: dict[str, Tensor] = {}

    def __getitem__(self, site: str) -> Tensor:
        return self.activations[site]

    def gradient(self, score: Tensor, *, keep: bool = False) -> dict[str, Tensor]:
        """The gradient of the sum of ``score``, computed from :attr:`output`, at each site; zeros where the score does not depend on it.

        ``keep`` keeps the graph for another call.
        """
        sites = list(self.activations)
        found = torch.autograd.grad(score.sum(), [self.activations[s] for s in sites], retain_graph=keep, allow_unused=True)
        return {s: torch.zeros_like(self.activations[s]) if g is None else g for s, g in zip(sites, found)}


@contextmanager
def capture(model: nn.Module, sites: Iterable[str], x: Tensor, *, grad: bool = True) -> Iterator[Capture]:
    """One forward pass of ``model(x)``, in its present mode, with the activations of ``sites``.

    With ``grad`` the activations can be differentiated through, also in a model whose parameters are frozen. No graph is kept of
    what runs before the first site: parameters in front of it get no gradient from :attr:`Capture.output`.

    Raises:
        BadInput: a site that is no submodule.
        UnsupportedModel: a site that does not run, or whose output is not a tensor.
    """
    captured = Capture()

    def read(site: str) -> Callable[[nn.Module, Any, Any], Tensor]:
        def hook(_: nn.Module, __: Any, output: Any) -> Tensor:
            value = _tensor(output, site)
            if grad and not value.requires_grad:
                torch.set_grad_enabled(True)  # the graph begins at the first site: what runs before it need not be kept
                value = value.detach().requires_grad_()
            captured.activations[site] = value
            return value.clone()

        return hook

    with _hooks(model, {site: read(site) for site in sites}), torch.no_grad():
        captured.output = _tensor(model(x), "")
        torch.set_grad_enabled(grad)
        missing = [s for s in sites if s not in captured.activations]
        if missing:
            raise UnsupportedModel("does not run in a forward pass", module=missing[0])
        yield captured


@contextmanager
def patch(model: nn.Module, values: Mapping[str, tuple[Any, Any]]) -> Iterator[None]:
    """A block in which the model computes with replaced activations: ``{site: (index, value)}`` does ``output[index] = value``.

    The index is anything that a tensor takes, e.g. ``(slice(None), 3)`` for channel 3 of every row; the value is broadcast.
    """

    def write(site: str, index: Any, value: Any) -> Callable[[nn.Module, Any, Any], Tensor]:
        def hook(_: nn.Module, __: Any, output: Any) -> Tensor:
            changed = _tensor(output, site).clone()
            changed[index] = value
            return changed

        return hook

    with _hooks(model, {site: write(site, *change) for site, change in values.items()}):
        yield


def last_map(model: nn.Module, x: Tensor) -> str:
    """The site that runs last among those that return feature maps: (batch, channels, height, width) with more than one position."""
    last: list[str] = []

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.ndim == 4 and output.shape[2] * output.shape[3] > 1:
                last[:] = [name]

        return hook

    leaves = {name: note(name) for name, m in model.named_modules() if name and not any(True for _ in m.children())}
    with _hooks(model, leaves), torch.no_grad():
        model(x)
    if not last:
        raise UnsupportedModel("no submodule returns feature maps (batch, channels, height, width); name one with layer=")
    return last[0]


@contextmanager
def _hooks(model: nn.Module, hooks: Mapping[str, Callable[[nn.Module, Any, Any], Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for site, hook in hooks.items():
            try:
                module = model.get_submodule(site)
            except AttributeError:
                names = ", ".join(name for name, _ in model.named_modules() if name)
                raise BadInput(f"the model has no submodule {site!r}; it has {names or 'none'}") from None
            stack.callback(module.register_forward_hook(hook).remove)
        yield


def _tensor(output: Any, site: str) -> Tensor:
    if not isinstance(output, Tensor):
        raise UnsupportedModel(f"returns {type(output).__name__}, but a tensor is needed", module=site or "the model")
    return output
