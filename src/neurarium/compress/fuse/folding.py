"""Batch normalisation, folded into the layer before it and written back later.

In eval mode BatchNorm(W x + b) is affine, so it can be part of W and b: ``fold_norms``. Averages of two networks should be taken of what
the layers do, hence of folded weights. ``write_back`` undoes it with new statistics: with the mean m and the variance v of the folded
layer's output on some data, a normalisation with running statistics (m, v), scale sqrt(v + eps) and shift m computes the identity in eval
mode, and normalises again when the network trains.

Only a normalisation whose input is the very output of a convolution or linear layer is folded; the result is compared with the model's
output, and where they differ (the output is read elsewhere too) nothing is folded.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neurarium.meter import undisturbed

__all__ = ["Folded", "fold_norms", "output", "outputs", "replace", "write_back"]

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Folded(nn.Identity):
    """Stands where a normalisation was: `layer` took it in. Moves and copies with its layer, wherever the two go."""

    def __init__(self, norm: nn.Module, layer: nn.Module) -> None:
        super().__init__()
        self.kind, self.eps, self.momentum, self.trained = type(norm), norm.eps, norm.momentum, norm.weight.requires_grad
        self.held = (layer,)  # in a tuple: not a submodule
        self.absorbs = layer.bias is None


@torch.no_grad()
def fold_norms(model: nn.Module, x: Tensor) -> nn.Module:
    """A copy in eval mode with :class:`Folded` in place of each normalisation that can be folded."""
    model = copy.deepcopy(model).eval()
    made: dict[int, tuple[nn.Module, Tensor]] = {}
    pairs: dict[nn.Module, nn.Module] = {}

    def layer(module: nn.Module, args: tuple, out: Tensor) -> None:
        made[id(out)] = (module, out)  # the tensor is kept, so that its id stays taken

    def norm(module: nn.Module, args: tuple) -> None:
        if module.running_mean is not None and module.weight is not None and id(args[0]) in made:
            pairs[module] = made[id(args[0])][0]

    hooks = [m.register_forward_hook(layer) for m in model.modules() if type(m) in _LAYERS]
    hooks += [m.register_forward_pre_hook(norm) for m in model.modules() if type(m) in _NORMS]
    try:
        before = output(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    if not pairs or len(set(pairs.values())) < len(pairs):
        return model
    plain = copy.deepcopy(model)
    names = {m: n for n, m in model.named_modules()}
    for module, target in pairs.items():
        scale = (module.running_var.double() + module.eps).rsqrt() * module.weight.double()
        shift = module.bias.double() - module.running_mean.double() * scale
        marker = Folded(module, target)
        bias = torch.zeros_like(shift) if target.bias is None else target.bias.double()
        target.bias = nn.Parameter((bias * scale + shift).to(target.weight.dtype), target.weight.requires_grad)
        target.weight.copy_(target.weight.double() * scale.view(-1, *[1] * (target.weight.ndim - 1)))
        replace(model, names[module], marker)
    same = torch.allclose(output(model, x), before, rtol=1e-3, atol=1e-3 * float(before.abs().max()))
    return model if same else plain


@torch.no_grad()
def write_back(model: nn.Module, x: Tensor) -> nn.Module:
    """Puts a normalisation, with statistics of `x`, wherever a :class:`Folded` stands, in place, without changing the function."""
    marks = {n: m for n, m in model.named_modules() if isinstance(m, Folded)}
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(module: nn.Module, args: tuple, out: Tensor) -> None:
        rows = out.detach().double().transpose(0, 1).flatten(1)
        found[module] = (rows.mean(1), rows.var(1, correction=0))

    hooks = [mark.held[0].register_forward_hook(watch) for mark in marks.values()]
    try:
        output(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    for name, mark in marks.items():
        (layer,), weight = mark.held, mark.held[0].weight
        mean, variance = found[layer]
        norm = mark.kind(len(mean), mark.eps, mark.momentum, device=weight.device, dtype=weight.dtype).eval()
        norm.running_mean.copy_(mean - layer.bias.double() if mark.absorbs else mean), norm.running_var.copy_(variance)
        norm.weight.copy_((variance + mark.eps).sqrt()), norm.bias.copy_(mean)
        norm.requires_grad_(mark.trained)
        if mark.absorbs:
            layer.bias = None
        replace(model, name, norm)
    return model


def replace(model: nn.Module, name: str, new: nn.Module) -> None:
    """Puts `new` where the submodule `name` is."""
    path, _, attribute = name.rpartition(".")
    model.get_submodule(path)._modules[attribute] = new


@torch.no_grad()
def output(model: nn.Module, x: Tensor) -> Tensor:
    """The model's first output tensor, in eval mode; the model is as before afterwards."""
    with undisturbed(model):
        return next(t for t in tree_leaves(model.eval()(x)) if isinstance(t, Tensor)).clone()


def outputs(model: nn.Module, x: Tensor, names: Any) -> dict[str, Tensor]:
    """The outputs of submodules by name, copied (an in-place activation may follow)."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple, out: Any) -> None:
            found[name] = (out[0] if isinstance(out, tuple) else out).detach().clone()

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(watch(name)) for name in dict.fromkeys(names)]
    try:
        output(model, x)
    finally:
        for hook in hooks:
            hook.remove()
    return found
