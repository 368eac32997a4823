"""From a trained model to :class:`~neurarium.dynamic.channel_conv.ChannelConv` layers: a traced copy, rewired.

Every convolution (plain or depthwise) that only a ReLU reads, with batch normalisation between or not, takes both into itself and gets a
predictor. A convolution that reads what such a layer put out, through nothing but operations on single channels, skips what was left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from neurarium.dynamic.channel_conv import ChannelConv, MaskPredictor, Plan
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["rewired"]

ACTIVATIONS = (nn.ReLU, nn.ReLU6)
ACTIVATION_CALLS: dict[Any, Callable[[], nn.Module]] = {F.relu: nn.ReLU, torch.relu: nn.ReLU, F.relu6: nn.ReLU6, "relu": nn.ReLU}
#: modules and functions that leave a channel of zeros a channel of zeros
CHANNELWISE = (
    nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Dropout, nn.Dropout2d, nn.Identity, nn.ReLU, nn.ReLU6,
)  # fmt: skip
CHANNELWISE_CALLS = (
    F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d, F.dropout, F.dropout2d, F.relu, torch.relu, F.relu6,
)  # fmt: skip


def rewired(model: nn.Module, plan: Plan, embedding: int | None, layers: Sequence[str] | None) -> fx.GraphModule:
    """A traced copy in which convolutions, norms and activations are :class:`ChannelConv`."""
    try:
        traced = fx.symbolic_trace(copy.deepcopy(model))
    except Exception as error:
        raise UnsupportedModel(f"cannot be traced: {error}", module=type(model).__name__) from error
    modules = dict(traced.named_modules())
    calls = [str(node.target) for node in traced.graph.nodes if node.op == "call_module"]
    source: dict[fx.Node, str] = {}
    index, found = 0, []
    for node in list(traced.graph.nodes):
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        if isinstance(module, nn.Conv2d) and _plain(module) and calls.count(str(node.target)) == 1:
            name, tail = str(node.target), _tail(node, modules)
            given = source.get(node.args[0], "")  # type: ignore[arg-type]
            if tail is not None and (layers is None or name in layers):
                norm, activation, merged = tail
                side = 1 if embedding is None else max(1, round((embedding / module.in_channels) ** 0.5))
                predictor = MaskPredictor(module.in_channels, module.out_channels, side).to(module.weight)
                layer = ChannelConv(module, norm, activation, predictor, plan)
                merged[-1].replace_all_uses_with(node)
                for extra in reversed(merged):
                    traced.graph.erase_node(extra)
                layer.index, index = index, index + 1
                source[node] = name
            elif given and module.groups == 1:
                layer = ChannelConv(module, None, None, None, plan)
            else:
                found += [name] if tail is not None else []
                continue
            layer.name, layer.source = name, given
            layer.train(module.training)
            found += [name] if tail is not None else []
            traced.set_submodule(name, layer)
        elif node.args and node.args[0] in source and (isinstance(module, CHANNELWISE) or node.target in CHANNELWISE_CALLS):
            source[node] = source[node.args[0]]
    if layers is not None and (unknown := [name for name in layers if name not in found]):
        raise BadInput(f"{unknown[0]!r} is no convolution that a ReLU follows; those are {found}")
    if not index:
        raise UnsupportedModel("has no Conv2d that a ReLU follows (with a BatchNorm2d between or not)", module=type(model).__name__)
    traced.delete_all_unused_submodules()
    traced.graph.lint()
    traced.recompile()
    return traced


def _plain(conv: nn.Conv2d) -> bool:
    depthwise = conv.groups == conv.in_channels == conv.out_channels
    return conv.padding_mode == "zeros" and (conv.groups == 1 or depthwise)


def _tail(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[nn.Module | None, nn.Module, list[fx.Node]] | None:
    """The normalisation and the activation that follow a convolution and are its only use, and their nodes."""
    norm, between = None, []
    after = _only(node)
    module = modules.get(str(after.target)) if after is not None and after.op == "call_module" else None
    if isinstance(module, nn.BatchNorm2d) and module.running_mean is not None:
        norm, between = module, [after]
        after = _only(after)
    if after is None:
        return None
    if after.op == "call_module" and isinstance(modules.get(str(after.target)), ACTIVATIONS):
        return norm, type(modules[str(after.target)])(inplace=True), [*between, after]
    if after.op in ("call_function", "call_method") and after.target in ACTIVATION_CALLS:
        return norm, ACTIVATION_CALLS[after.target](inplace=True), [*between, after]
    return None


def _only(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None
