"""A convolution of which each row computes its own filters: the predictor, the target that it learns, and two ways to run.

``masked`` computes every filter and multiplies by the mask: it is what trains, and one graph. ``compact`` computes only the kept filters
from the kept inputs, in one of three forms, each charged for what it runs:

- rows that keep everything go through the plain convolution;
- for other rows their own weights and inputs are gathered, and rows of equal counts run as one grouped convolution, a group a row;
- on maps of fewer than ``whole_below`` positions the plain convolution computes every filter, and the row pays for all. Copying a weight
  takes as long as some dozens of multiplications with it: where each weight meets fewer positions than that, leaving filters out is slower.

The form depends on the size of a layer's map and on the row's own counts, so a row's cost depends on that row alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["ChannelConv", "MaskPredictor", "Plan", "target_mask"]

Target = Literal["mass", "uniform"]
PIECE = 16  # rows of one grouped convolution: more fall out of the cache


def target_mask(output: Tensor, *, mass: float = 0.9, target: Target = "mass") -> Tensor:
    """g: which filters carry the activations ``(n, C, H, W)``, ``(n, C)`` bool."""
    heat = output.detach().abs().amax((2, 3))
    filters = heat.shape[1]
    order = heat.argsort(dim=1, descending=True, stable=True)
    if target == "uniform":
        keep = torch.arange(filters, device=heat.device).expand_as(heat) < max(1, filters - int((1 - mass) * filters))
    else:
        share = (heat.double() / heat.double().sum(1, keepdim=True).clamp(min=1e-30)).gather(1, order)
        keep = share > 1e-5 if mass == 1 else share.cumsum(1) - mass <= 1e-5
        keep[:, 0] = True
    return torch.zeros_like(keep).scatter(1, order, keep)


class MaskPredictor(nn.Module):
    """A logit for each filter from the pooled input: ``(n, inputs, h, w) -> (n, filters)``."""

    def __init__(self, inputs: int, filters: int, side: int = 1) -> None:
        super().__init__()
        self.side, self.linear = side, nn.Linear(inputs * side**2, filters)
        nn.init.constant_(self.linear.bias, 2.0)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean((2, 3)) if self.side == 1 else F.adaptive_avg_pool2d(x, self.side).flatten(1)
        return self.linear(pooled.softmax(1) * pooled.shape[1])


@dataclass
class Plan:
    """What the layers of one policy are to do in a pass, and what they note down."""

    granularity: int
    joint: bool
    whole_below: int = 1
    mode: str = "masked"  # dense: compute masks, apply none
    threshold: Any = 0.5
    counts: tuple[int, ...] | None = None
    chosen: Callable[[ChannelConv, Tensor, Tensor | None], Tensor] | None = None  # other masks than the predictors' (masked mode)
    kept: dict[str, Tensor] = field(default_factory=dict)  # layer -> (n, filters) bool
    seen: dict[str, tuple[Tensor, Tensor]] | None = None  # layer -> logits, output before its mask
    spent: Tensor | None = None

    def round(self, count: Any, filters: int) -> Any:
        """The next count that is run."""
        step = self.granularity
        up = (count + step - 1) // step * step
        return up.clamp(min(step, filters), filters) if isinstance(up, Tensor) else max(min(step, filters), min(up, filters))

    def keep(self, layer: ChannelConv, logits: Tensor) -> Tensor:
        filters = logits.shape[1]
        if self.counts is None:
            count = self.round((logits.sigmoid() > self.threshold).sum(1, keepdim=True), filters)
        else:
            count = torch.full_like(logits[:, :1], self.counts[layer.index], dtype=torch.int64)
        if torch.compiler.is_exporting():  # ONNX has no stable sort: a filter's place is how many are before it
            here, other = logits[:, :, None], logits[:, None, :]
            earlier = torch.ones(filters, filters, dtype=torch.bool, device=logits.device).tril(-1)
            return ((other > here) | (other == here) & earlier).sum(2) < count
        order = logits.argsort(dim=1, descending=True, stable=True)
        first = torch.arange(filters, device=logits.device) < count
        return torch.zeros_like(first).scatter(1, order, first)


class ChannelConv(nn.Module):
    """A convolution, its batch normalisation and its ReLU, of which single filters can be left out for single rows.

    Without a predictor every filter is computed, but only those inputs are read that the layer ``source`` has kept.
    """

    def __init__(
        self, conv: nn.Conv2d, norm: nn.Module | None, activation: nn.Module | None, predictor: MaskPredictor | None, plan: Plan
    ) -> None:
        super().__init__()
        self.conv, self.norm, self.activation, self.predictor, self.plan = conv, norm, activation, predictor, plan
        self.name, self.index, self.source = "", -1, ""

    @property
    def depthwise(self) -> bool:
        return self.conv.groups > 1

    def positions(self, x: Tensor) -> int:
        """How many the output has for such an input."""
        conv, total = self.conv, 1
        if conv.padding == "same":
            return x.shape[2] * x.shape[3]
        pads = (0, 0) if isinstance(conv.padding, str) else conv.padding
        for size, kernel, pad, stride, dilation in zip(x.shape[2:], conv.kernel_size, pads, conv.stride, conv.dilation):
            total *= (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        return total

    def flops(self, inputs: Any, filters: Any, places: int) -> Any:
        """Of one row that keeps ``filters`` and reads ``inputs``, on a map of ``places`` positions."""
        size = self.conv.weight[0, 0].numel()
        if places < self.plan.whole_below:
            inputs, filters = self.conv.in_channels, self.conv.out_channels
        return 2 * places * size * filters * (1 if self.depthwise else inputs)

    def forward(self, x: Tensor) -> Tensor:
        plan = self.plan
        if plan.mode == "compact":
            return self.compact(x)
        out = self.conv(x)
        out = out if self.norm is None else self.norm(out)
        out = out if self.activation is None else self.activation(out)
        if self.predictor is None:
            if plan.seen is not None:
                plan.seen[self.name] = out, out
            return out
        logits = self.predictor(x if plan.joint else x.detach())
        if plan.seen is not None:
            plan.seen[self.name] = logits, out
        if plan.mode == "dense":
            return out
        keep = plan.keep(self, logits) if plan.chosen is None else plan.chosen(self, logits, out)
        plan.kept[self.name] = keep
        mask = keep.to(out.dtype)
        if plan.joint:
            p = logits.sigmoid()
            mask = mask + (p - p.detach())
        return out * mask[:, :, None, None]

    def compact(self, x: Tensor) -> Tensor:
        """Only the kept filters, from the kept inputs; zeros elsewhere."""
        plan, (n, width), filters, places = self.plan, x.shape[:2], self.conv.out_channels, self.positions(x)
        keep = plan.keep(self, self.predictor(x)) if self.predictor is not None else None
        given = None if self.depthwise else plan.kept.get(self.source)
        if keep is not None:
            plan.kept[self.name] = keep
        if places < plan.whole_below:
            result = self._finish(self._convolve(x, *self.folded(), self.conv.groups))
            if plan.spent is not None:
                plan.spent = plan.spent + self.flops(width, filters, places)
            return result if keep is None else result * keep[:, :, None, None].to(result.dtype)
        every = torch.ones((), dtype=torch.int64, device=x.device)
        inputs = (every * width).expand(n) if given is None else given.sum(1)
        outputs = (every * filters).expand(n) if keep is None else keep.sum(1)
        weight, bias = self.folded()
        kind = inputs * (filters + 1) + outputs
        kinds = kind.unique().tolist()
        if kinds == [width * (filters + 1) + filters]:
            result = self._finish(self._convolve(x, weight, bias, self.conv.groups))
        else:
            result, parts = None, []
            for value in kinds:
                i, o = divmod(value, filters + 1)
                rest = None if i == width else given, None if o == filters else keep
                parts += [(where, *rest) for where in (kind == value).nonzero().squeeze(1).split(PIECE)]
            for where, read, write in parts:
                if read is None and write is None:
                    part = self._finish(self._convolve(x.index_select(0, where), weight, bias, self.conv.groups))
                    slots = (where[:, None] * filters + torch.arange(filters, device=x.device)).flatten()
                else:
                    part, slots = self._gathered(x, where, read, write, weight, bias)
                if result is None:
                    result = x.new_zeros(n, filters, *part.shape[-2:])
                result.view(n * filters, *part.shape[-2:]).index_copy_(0, slots, part.reshape(-1, *part.shape[-2:]))
        if plan.spent is not None:
            plan.spent = plan.spent + self.flops(inputs, outputs, places)
        return result

    def _gathered(
        self, x: Tensor, where: Tensor, given: Tensor | None, keep: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The rows ``where`` as one grouped convolution, one group a row; and where its channels belong among all rows' filters."""
        m, width, filters = len(where), x.shape[1], len(weight)
        out = self._chosen(keep, where, filters)  # (m, k_out)
        slots = (where[:, None] * filters + out).flatten()
        if self.depthwise:
            part = x.flatten(0, 1).index_select(0, slots)[None]
            w, groups = weight.index_select(0, out.flatten()), len(slots)
        else:
            read = self._chosen(given, where, width)  # (m, k_in)
            part = x.flatten(0, 1).index_select(0, (where[:, None] * width + read).flatten())[None]
            if given is None:
                w = weight.index_select(0, out.flatten())
            else:
                pairs = (out[:, :, None] * width + read[:, None, :]).flatten()
                w = weight.flatten(0, 1).index_select(0, pairs).view(len(slots), read.shape[1], *weight.shape[2:])
            groups = m
        part = self._convolve(part, w, None if bias is None else bias.index_select(0, out.flatten()), groups)
        return self._finish(part), slots

    @staticmethod
    def _chosen(mask: Tensor | None, where: Tensor, width: int) -> Tensor:
        if mask is None:
            return torch.arange(width, device=where.device).expand(len(where), width)
        return mask.index_select(0, where).nonzero()[:, 1].view(len(where), -1)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
        return F.conv2d(x, weight, bias, self.conv.stride, self.conv.padding, self.conv.dilation, groups)

    def _finish(self, out: Tensor) -> Tensor:
        return out if self.activation is None else self.activation(out)

    def folded(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with the running statistics of the normalisation folded in."""
        weight, bias, norm = self.conv.weight, self.conv.bias, self.norm
        if norm is None:
            return weight, bias
        scale = (norm.running_var + norm.eps).rsqrt()
        scale = scale if norm.weight is None else scale * norm.weight
        shift = (0 if bias is None else bias) - norm.running_mean
        shift = shift * scale if norm.bias is None else shift * scale + norm.bias
        return weight * scale[:, None, None, None], shift
