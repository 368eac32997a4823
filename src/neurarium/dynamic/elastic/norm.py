"""Norms on leading units, and whose batch statistics they use.

Statistics of one width are wrong for another, which is the best known way to ruin the small networks of a family. :class:`ElasticNorm`
therefore has an explicit policy (``statistics=``):

- ``"config"``: a row of running statistics for each declared config (:func:`~neurarium.dynamic.elastic.surgery.declare`), updated while
  training under that config;
- ``"recalibrate"``: training keeps none; :func:`~neurarium.dynamic.elastic.surgery.recalibrate` measures them for the configs that
  matter, on a few batches;
- ``"shared"``: one row, sliced. Cheap and usually wrong; here for comparison.

A config without statistics is refused in evaluation mode. LayerNorm, RMSNorm and GroupNorm (whole groups) need none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.dynamic.elastic.slices import Config, Sliced, Width, fits
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["ElasticNorm", "Statistics"]

Statistics = Literal["config", "recalibrate", "shared"]


class ElasticNorm(Sliced):
    """A LayerNorm, RMSNorm, GroupNorm or BatchNorm on the leading units of ``width``, with the scale and shift of ``norm`` (shared).

    Args:
        statistics: the policy for the running statistics of batch normalisation, see the module's text.
    """

    def __init__(self, norm: nn.Module, width: Width, statistics: Statistics = "config") -> None:
        super().__init__()
        size = _normed(norm)
        if size is None:
            raise UnsupportedModel("no slice of this norm is known", module=type(norm).__name__)
        fits(width, size, "normalised features")
        if statistics not in ("config", "recalibrate", "shared"):
            raise BadInput(f"statistics must be 'config', 'recalibrate' or 'shared', not {statistics!r}")
        self.width, self.statistics, self.eps, self.size = width, statistics, norm.eps, size
        self.kind, self.batch = type(norm), isinstance(norm, nn.modules.batchnorm._BatchNorm)
        self.per_group = size // norm.num_groups if isinstance(norm, nn.GroupNorm) else 0
        if self.per_group and (width.step * (size // width.size)) % self.per_group:
            raise BadInput(f"{width.name!r} comes in steps of {width.step} units, which cut the groups of {self.per_group} channels")
        self.momentum: float | None = getattr(norm, "momentum", None)
        self.register_parameter("weight", norm.weight)
        self.register_parameter("bias", getattr(norm, "bias", None))
        self.row, self.rows, self.measuring = 0, {}, False
        axes = {"weight": {0: width}, "bias": {0: width}}
        self._track({**axes, "running_mean": {1: width}, "running_var": {1: width}} if self.batch else axes)
        if self.batch:
            if norm.running_mean is None:
                raise UnsupportedModel(
                    "keeps no running statistics, so that rows of a batch depend on each other", module=type(norm).__name__
                )
            shared = statistics == "shared"
            for name in ("running_mean", "running_var"):
                tensor = getattr(norm, name)
                self.register_buffer(name, tensor[None].clone() if shared else tensor.new_empty(0, size))
            self.register_buffer("keys", torch.zeros(0, 0, dtype=torch.int64))
        self.train(norm.training)

    def select(self, config: Config) -> None:
        """Use the statistics of this config; -1 where there are none."""
        self.row = 0 if self.statistics == "shared" else self.rows.get(config.key, -1)

    def declare(self, configs: Iterable[Config]) -> None:
        """Make room for the statistics of more configs."""
        new = [c.key for c in dict.fromkeys(configs) if c.key not in self.rows]
        if not self.batch or self.statistics == "shared" or not new:
            return
        mean, var = self.running_mean, self.running_var
        self.running_mean = torch.cat([mean, mean.new_zeros(len(new), mean.shape[1])])
        self.running_var = torch.cat([var, var.new_ones(len(new), var.shape[1])])
        added = torch.tensor(new, dtype=torch.int64, device=self.keys.device)
        self.keys = torch.cat([self.keys, added]) if len(self.keys) else added
        self.rows = {tuple(k): i for i, k in enumerate(self.keys.tolist())}

    def forward(self, x: Tensor) -> Tensor:
        w, b = self.part("weight"), self.part("bias")
        if self.per_group:
            return F.group_norm(x, x.shape[1] // self.per_group, w, b, self.eps)
        if not self.batch:
            own = x.shape[-1:]
            return F.layer_norm(x, own, w, b, self.eps) if issubclass(self.kind, nn.LayerNorm) else F.rms_norm(x, own, w, self.eps)
        mean, var = self._running()
        if self.training:
            return F.batch_norm(x, mean, var, w, b, True, 0.0 if self.momentum is None else self.momentum, self.eps)
        if mean is None:
            if not self.measuring:
                raise BadInput("no batch statistics for this config: recalibrate(model, loader, [config]) first")
            mean, var = x.new_zeros(x.shape[1]), x.new_ones(x.shape[1])
        return F.batch_norm(x, mean, var, w, b, False, 0.0, self.eps)

    def _running(self) -> tuple[Tensor | None, Tensor | None]:
        if not 0 <= self.row < len(self.running_mean) or (self.training and self.statistics == "recalibrate" and not self.measuring):
            return None, None
        mean, var = self.part("running_mean"), self.part("running_var")
        assert mean is not None and var is not None
        return mean[self.row], var[self.row]

    def plain(self) -> nn.Module:
        w, b = self.part("weight"), self.part("bias")
        n = self.width.active * (self.size // self.width.size)
        options: dict[str, Any] = {"eps": self.eps, "device": "meta"}
        if issubclass(self.kind, nn.LayerNorm):
            return self._copy_to(nn.LayerNorm(n, elementwise_affine=w is not None, bias=b is not None, **options), weight=w, bias=b)
        if issubclass(self.kind, nn.RMSNorm):
            return self._copy_to(nn.RMSNorm(n, elementwise_affine=w is not None, **options), weight=w)
        if issubclass(self.kind, nn.GroupNorm):
            return self._copy_to(nn.GroupNorm(n // self.per_group, n, affine=w is not None, **options), weight=w, bias=b)
        mean, var = self._running()
        if mean is None:
            raise BadInput("no batch statistics for this config: recalibrate(model, loader, [config]) first")
        new = self.kind(n, momentum=self.momentum, affine=w is not None, **options)
        new.num_batches_tracked = torch.zeros((), dtype=torch.int64)
        return self._copy_to(new, weight=w, bias=b, running_mean=mean, running_var=var)

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        if self.batch and f"{prefix}keys" in state:  # another number of configs may have been declared
            for name in ("keys", "running_mean", "running_var"):
                own, given = getattr(self, name), state[prefix + name]
                if own.shape != given.shape:
                    setattr(self, name, own.new_empty(given.shape))
            self.rows = {tuple(k): i for i, k in enumerate(state[f"{prefix}keys"].tolist())}
        super()._load_from_state_dict(state, prefix, *args)


def _normed(norm: nn.Module) -> int | None:
    """How many features a norm scales, if its slices are known."""
    if isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.SyncBatchNorm):
        return norm.num_features
    if isinstance(norm, nn.GroupNorm):
        return norm.num_channels
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm) and len(norm.normalized_shape) == 1:
        return norm.normalized_shape[0]
    return None
