"""What is done to an elastic model as a whole: cut a network out, measure batch statistics, sort units by importance."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from neurarium.dynamic.decoder import Attention
from neurarium.dynamic.elastic.configs import active, check, slots
from neurarium.dynamic.elastic.layers import Depth, ElasticAttention, ElasticConv2d, ElasticLinear
from neurarium.dynamic.elastic.norm import ElasticNorm
from neurarium.dynamic.elastic.slices import Config, Sliced, Width, adopt
from neurarium.errors import BadInput
from neurarium.learn.fit import device_of, to
from neurarium.roles import Loader

__all__ = ["declare", "extract", "recalibrate", "reorder", "units"]


def extract(model: nn.Module, config: Config) -> nn.Module:
    """A stand-alone plain module with copied weights that computes what ``model`` does under ``config``, bit for bit."""
    with active(model, config):
        model = copy.deepcopy(model)
    return _plain(model)


def _plain(module: nn.Module) -> nn.Module:
    if isinstance(module, Sliced):
        return module.plain()
    if isinstance(module, Depth):
        return nn.Sequential(*(_plain(m) for m in module)).train(module.training)
    if isinstance(module, ElasticAttention):
        heads, module = module.heads, adopt(module, Attention)
        del module.kept
        module.heads = heads
    for name, child in list(module.named_children()):
        setattr(module, name, _plain(child))
    return module


def declare(model: nn.Module, configs: Iterable[Config]) -> None:
    """Give each config batch statistics of its own (``statistics="config"``), to be learned in training."""
    configs = list(configs)
    slot = slots(model)
    for config in configs:
        check(config, *slot)
    for module in model.modules():
        if isinstance(module, ElasticNorm):
            module.declare(configs)


@torch.no_grad()
def recalibrate(model: nn.Module, loader: Loader, configs: Iterable[Config], *, batches: int = 8) -> None:
    """Measure the batch statistics of each config as their mean over the first batches."""
    norms = [m for m in model.modules() if isinstance(m, ElasticNorm) and m.batch]
    if not norms:
        return
    if any(m.statistics == "shared" for m in norms):
        raise BadInput("shared statistics belong to no config: build the model with statistics='config' or 'recalibrate'")
    configs, device = list(configs), device_of(model)
    declare(model, configs)
    modes, momenta = [(m, m.training) for m in model.modules()], [m.momentum for m in norms]
    model.eval()
    try:
        for config in configs:
            with active(model, config):
                k = 0
                for m in norms:
                    m.training = m.measuring = True
                for batch in loader:
                    if k == batches:
                        break
                    k += 1
                    for m in norms:
                        m.momentum = 1 / k
                    model(to(batch[0] if isinstance(batch, tuple | list) else batch, device))
                if not k:
                    raise BadInput("the loader yielded no samples to measure statistics on")
    finally:
        for m, momentum in zip(norms, momenta):
            m.momentum, m.measuring = momentum, False
        for module, mode in modes:
            module.training = mode


def units(model: nn.Module, width: Width) -> Tensor:
    """How much the readers of each unit weigh it: the L1 norm of the weights that read it, ``(units,)``."""
    total = torch.zeros(width.size, dtype=torch.float64)
    for module in model.modules():
        if isinstance(module, ElasticLinear | ElasticConv2d) and module.inputs is width:
            dim = 0 if isinstance(module, ElasticConv2d) and module.depthwise else 1
            weight = module.weight.detach().double().cpu().abs().transpose(0, dim)
            total += weight.reshape(width.size, -1).sum(1)
    return total


@torch.no_grad()
def reorder(model: nn.Module, scores: dict[str, Tensor] | None = None) -> None:
    """Sort the units of every width by importance, in place, so that the leading slice is the best one. The full network computes the same.

    Args:
        scores: importance of the units of a width by its name; without one, :func:`units`. Whole steps are moved, by their summed score.
    """
    for width in slots(model)[0]:
        score = units(model, width) if scores is None or width.name not in scores else scores[width.name]
        if score.shape != (width.size,):
            raise BadInput(f"{width.name!r} has {width.size} units, the scores have shape {tuple(score.shape)}")
        steps = score.view(-1, width.step).sum(1).argsort(descending=True, stable=True)
        order = (steps[:, None] * width.step + torch.arange(width.step)).flatten()
        for module in model.modules():
            if not isinstance(module, Sliced):
                continue
            for name, axes in module.axes().items():
                tensor = getattr(module, name, None)
                for dim in (d for d, w in axes.items() if w is width and tensor is not None):
                    per = tensor.shape[dim] // width.size
                    index = (order[:, None] * per + torch.arange(per)).flatten().to(tensor.device)
                    tensor.copy_(tensor.index_select(dim, index))
