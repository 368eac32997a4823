"""Normalisation folded into the layer in front of it, and the symbolic trace that finds such pairs.

In eval mode BatchNorm is the affine map y = g (x - mean) / sqrt(var + eps) + b of each channel. Behind a convolution or a linear layer
it is one with it: the weight's rows are multiplied by g / sqrt(var + eps), the bias follows.
"""

from __future__ import annotations

import copy

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from neurarium.errors import UnsupportedModel

__all__ = ["affine_of", "fold_batchnorm", "trace"]


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return next(m.children(), None) is None and (m.__module__.startswith("torch.nn") or isinstance(m, _ConvNd | nn.Linear))


def trace(model: nn.Module) -> fx.Graph:
    """The model's graph, with torch's own layers (and kinds of them) as nodes."""
    try:
        return _Tracer().trace(model)
    except Exception as error:  # whatever a forward does to a proxy
        line = (str(error).strip() or "?").splitlines()[0][:160]
        raise UnsupportedModel(f"cannot be traced ({type(error).__name__}: {line})", module=type(model).__name__) from error


def affine_of(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Factor and offset of each channel in eval mode, float64."""
    if norm.running_mean is None or norm.running_var is None:
        raise UnsupportedModel("BatchNorm without running statistics depends on the batch", module=type(norm).__name__)
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight.detach().double()
    offset = -norm.running_mean.double() * factor
    return factor, offset if norm.bias is None else offset + norm.bias.detach().double()


def fold_batchnorm(model: nn.Module, graph: fx.Graph | None = None) -> nn.Module:
    """A copy in eval mode, equal as a function, whose BatchNorms are identities where they follow a layer that nothing else reads.

    Layers keep their names. A layer or a norm that is used twice stays as it is.
    """
    result = copy.deepcopy(model).eval()
    nodes = list((trace(result) if graph is None else graph).nodes)
    named = dict(result.named_modules(remove_duplicate=False))
    calls = [id(named[n.target]) for n in nodes if n.op == "call_module"]
    for node in nodes:
        norm = named.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(norm, _BatchNorm) or not isinstance(before := node.args[0], fx.Node) or before.op != "call_module":
            continue
        layer = named[str(before.target)]
        alone = len(before.users) == 1 and calls.count(id(layer)) == 1 and calls.count(id(norm)) == 1
        if not isinstance(layer, _ConvNd | nn.Linear) or not alone or norm.running_var is None:
            continue
        factor, offset = affine_of(norm)
        weight, transposed = layer.weight.detach().double(), isinstance(layer, _ConvTransposeNd)
        if transposed:  # (in, out / groups, ...)
            parts = weight.view(layer.groups, -1, *weight.shape[1:]) * factor.view(layer.groups, 1, -1, *[1] * (weight.ndim - 2))
            weight = parts.view_as(weight)
        else:
            weight = weight * factor.view(-1, *[1] * (weight.ndim - 1))
        bias = offset if layer.bias is None else layer.bias.detach().double() * factor + offset
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), layer.weight.requires_grad)
        layer.bias = nn.Parameter(bias.to(layer.weight.dtype), layer.weight.requires_grad)
        _replace(result, norm, nn.Identity().eval())
    return result


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new
