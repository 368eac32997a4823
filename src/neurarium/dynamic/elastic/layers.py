"""Linear layers, convolutions and attention that run their leading units, and blocks of which the leading ones run."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic.decoder import Attention
from neurarium.dynamic.elastic.slices import Sliced, Width, adopt, fits
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["Depth", "ElasticAttention", "ElasticConv2d", "ElasticLinear"]


class ElasticLinear(Sliced, nn.Linear):
    """A linear layer that reads the leading units of ``inputs`` and makes those of ``outputs``; ``None`` is always all.

    A unit may be several features: a head, or a channel that was flattened together with its pixels.
    """

    inputs: Width | None
    outputs: Width | None

    def __init__(
        self, in_features: int, out_features: int, bias: bool = True, *, inputs: Width | None = None, outputs: Width | None = None
    ) -> None:
        super().__init__(in_features, out_features, bias)
        self._follow(inputs, outputs)

    @classmethod
    def of(cls, layer: nn.Linear, inputs: Width | None = None, outputs: Width | None = None) -> ElasticLinear:
        """With the weights of a given layer, shared."""
        new: ElasticLinear = adopt(layer, cls)
        new._follow(inputs, outputs)
        return new

    def _follow(self, inputs: Width | None, outputs: Width | None) -> None:
        fits(inputs, self.in_features, "input features")
        fits(outputs, self.out_features, "output features")
        self.inputs, self.outputs = inputs, outputs
        rows = {} if outputs is None else {0: outputs}
        self._track({"weight": rows if inputs is None else {**rows, 1: inputs}, "bias": rows})

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.part("weight"), self.part("bias"))

    def plain(self) -> nn.Linear:
        w, b = self.part("weight"), self.part("bias")
        assert w is not None
        return _linear(w, b).train(self.training)


class ElasticConv2d(Sliced, nn.Conv2d):
    """A convolution on the leading channels. Depthwise ones (``groups`` = input channels) follow their input; other groups are refused."""

    inputs: Width | None
    outputs: Width | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        inputs: Width | None = None,
        outputs: Width | None = None,
        **options: Any,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, **options)
        self._follow(inputs, outputs)

    @classmethod
    def of(cls, layer: nn.Conv2d, inputs: Width | None = None, outputs: Width | None = None) -> ElasticConv2d:
        """With the weights of a given layer, shared."""
        new: ElasticConv2d = adopt(layer, cls)
        new._follow(inputs, outputs)
        return new

    def _follow(self, inputs: Width | None, outputs: Width | None) -> None:
        self.depthwise = self.groups == self.in_channels and self.groups > 1
        if self.groups not in (1, self.in_channels) and not (inputs is None and outputs is None):
            raise UnsupportedModel(f"has {self.groups} groups over {self.in_channels} channels: slices would cut them", module="Conv2d")
        if self.depthwise and inputs is not outputs:
            raise UnsupportedModel("a depthwise convolution puts out the units that it reads", module="Conv2d")
        fits(inputs, self.in_channels, "input channels")
        fits(outputs, self.out_channels, "output channels")
        self.inputs, self.outputs = inputs, outputs
        rows = {} if outputs is None else {0: outputs}
        self._track({"weight": rows if inputs is None or self.depthwise else {**rows, 1: inputs}, "bias": rows})

    def _groups(self) -> int:
        return self.groups * self.inputs.active // self.inputs.size if self.depthwise and self.inputs is not None else self.groups

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.part("weight"), self.part("bias")
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            return F.conv2d(x, w, b, self.stride, 0, self.dilation, self._groups())
        return F.conv2d(x, w, b, self.stride, self.padding, self.dilation, self._groups())

    def plain(self) -> nn.Conv2d:
        w, b, groups = self.part("weight"), self.part("bias"), self._groups()
        assert w is not None
        new = nn.Conv2d(
            w.shape[1] * groups, w.shape[0], self.kernel_size, self.stride, self.padding, self.dilation, groups, b is not None,
            self.padding_mode, device="meta",
        )  # fmt: skip
        return self._copy_to(new, weight=w, bias=b)


class ElasticAttention(Attention):
    """Multi-head self-attention ``(n, time, features)`` that runs its leading heads.

    Args:
        stream: the width of what is read and added to; ``None`` is always all.
    """

    def __init__(
        self, features: int, heads: int, *, causal: bool = False, bias: bool = True, stream: Width | None = None, name: str = "heads"
    ) -> None:
        nn.Module.__init__(self)
        if features % heads:
            raise BadInput(f"{features} features cannot be shared by {heads} heads")
        self.head_dim, self.causal, self.kept = features // heads, causal, Width(name, heads)
        self.q, self.k, self.v = (ElasticLinear(features, features, bias, inputs=stream, outputs=self.kept) for _ in range(3))
        self.o = ElasticLinear(features, features, bias, inputs=self.kept, outputs=stream)

    @property
    def heads(self) -> int:  # type: ignore[override]
        return self.kept.active

    @classmethod
    def of(cls, layer: nn.Module, *, causal: bool = False, stream: Width | None = None, name: str = "heads") -> ElasticAttention:
        """With the weights of this library's attention (shared) or of torch's (copied)."""
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        if isinstance(layer, Attention):
            parts = [layer.q, layer.k, layer.v, layer.o]
            new.head_dim, new.causal, new.kept = layer.head_dim, layer.causal, Width(name, layer.heads)
        elif isinstance(layer, nn.MultiheadAttention):
            if not layer._qkv_same_embed_dim or layer.bias_k is not None or layer.add_zero_attn or layer.dropout or not layer.batch_first:
                raise UnsupportedModel("needs batch_first, no dropout, no bias_k and one size of queries, keys and values", module=name)
            new.head_dim, new.causal, new.kept = layer.head_dim, causal, Width(name, layer.num_heads)
            biases = [None] * 3 if layer.in_proj_bias is None else layer.in_proj_bias.chunk(3)
            parts = [_linear(w, b) for w, b in zip(layer.in_proj_weight.chunk(3), biases)] + [layer.out_proj]
        else:
            raise UnsupportedModel("is no attention whose heads are known", module=type(layer).__name__)
        new.q, new.k, new.v = (ElasticLinear.of(part, stream, new.kept) for part in parts[:3])
        new.o = ElasticLinear.of(parts[3], new.kept, stream)
        return new.train(layer.training)


def _linear(w: Tensor, b: Tensor | None) -> nn.Linear:
    new = nn.Linear(w.shape[1], w.shape[0], b is not None, device="meta")
    new.weight = nn.Parameter(w.detach().clone())
    if b is not None:
        new.bias = nn.Parameter(b.detach().clone())
    return new


class Depth(nn.Sequential):
    """Blocks of which the leading ``active`` run. Each must put out what it reads, as residual blocks do.

    Iterating goes over the running blocks only, so it also stands in for an ``nn.ModuleList`` that a model loops over.
    """

    def __init__(self, *blocks: nn.Module, least: int = 0, name: str = "depth") -> None:
        super().__init__(*blocks)
        if not 0 <= least <= len(blocks) or not blocks:
            raise BadInput(f"{name}: of {len(blocks)} blocks at least {least} cannot run")
        self.least, self.active, self.name = least, len(blocks), name

    @property
    def values(self) -> range:
        return range(self.least, len(self._modules) + 1)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(list(self._modules.values())[: self.active])

    def __len__(self) -> int:
        return self.active
