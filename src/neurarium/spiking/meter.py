"""What a spiking network costs in events: spikes, firing rates, synaptic operations.

A synaptic operation is one accumulate that one non-zero input of a layer causes; its count is the number of non-zero inputs times their
fan-out, borders of convolutions included. Layers before the first neuron see real values, so their work is counted as multiply-accumulates.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput
from neurarium.meter import energy
from neurarium.spiking.neuron import Neuron

__all__ = ["SpikeMeter"]


class SpikeMeter:
    """Context manager that counts while ``net`` runs, in either order of execution and over any number of batches.

    After (or during) the block: ``spikes`` and ``updates`` by neuron path (of which :meth:`rate` is the quotient), ``sops`` by path of a
    ``Conv2d`` or ``Linear`` after the first neuron, ``macs`` by path of one before it. Layers that a constant input runs once count once.
    """

    def __init__(self, net: nn.Module) -> None:
        self.spikes: dict[str, float] = {}
        self.updates: dict[str, int] = {}
        self.sops: dict[str, float] = {}
        self.macs: dict[str, float] = {}
        self._net, self._handles = net, []

    def __enter__(self) -> SpikeMeter:
        for name, module in self._net.named_modules():
            if isinstance(module, Neuron):
                self._handles.append(module.register_forward_hook(self._neuron(name)))
            elif isinstance(module, (nn.Conv2d, nn.Linear)):
                self._handles.append(module.register_forward_hook(self._synapses(name)))
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._handles:
            self._handles.pop().remove()

    def rate(self, path: str | None = None) -> float:
        """Spikes a neuron and step, of one layer or of all."""
        if not self.updates or (path is not None and path not in self.updates):
            raise BadInput(f"nothing was counted for {path or 'the network'}; counted are {sorted(self.updates) or 'no neurons'}")
        paths = list(self.updates) if path is None else [path]
        return sum(self.spikes[p] for p in paths) / sum(self.updates[p] for p in paths)

    def joules(self) -> float:
        """Energy of the operations by the table of :func:`neurarium.meter.energy`."""
        return energy(macs=sum(self.macs.values()), acs=sum(self.sops.values()))

    def _neuron(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            self.spikes[name] = self.spikes.get(name, 0) + float(output.detach().sum())
            self.updates[name] = self.updates.get(name, 0) + output.numel()

        return hook

    def _synapses(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            events = bool(self.updates) and name not in self.macs
            x = inputs[0].detach()
            x = (x != 0).to(x.dtype) if events else torch.ones_like(x)
            table = self.sops if events else self.macs
            table[name] = table.get(name, 0) + _operations(module, x)

        return hook


def _operations(module: nn.Module, active: Tensor) -> float:
    if isinstance(module, nn.Linear):
        return float(active.sum(dtype=torch.float64)) * module.out_features
    assert isinstance(module, nn.Conv2d)
    ones = active.new_ones((1, 1, *module.kernel_size))
    reached = F.conv2d(active.sum(1, keepdim=True), ones, None, module.stride, module.padding, module.dilation)
    return float(reached.sum(dtype=torch.float64)) * module.out_channels / module.groups
