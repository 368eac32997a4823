"""Changing the budget of a network while it serves: slices that are views, beside once-for-all's way of copying the active sub-network out.

    pytest benchmarks/dynamic/test_elastic.py -s

Once-for-all (Cai et al. 2020) deploys a configuration by ``get_active_subnet``: it builds the smaller modules and copies the leading
weights into them. That is written out here for the same weights, and its networks are checked to compute the same, bit for bit.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neurarium.dynamic.backbones import ElasticBackbone
from neurarium.dynamic.elastic import Config, ElasticFamily, Sliced, active, at, flops
from neurarium.dynamic.sorted import SortedNet
from neurarium.meter import latency


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that are made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and t.device.type == "cpu" and t.untyped_storage().data_ptr() not in known:
                self.bytes += t.untyped_storage().nbytes()
        return out


def setting(model: nn.Module, config: Config) -> None:
    """Set the slices, and put them back."""
    with active(model, config):
        pass


def by_copies(model: nn.Module, config: Config) -> nn.Module:
    """Once-for-all's sub-network: smaller modules into which the leading weights are copied (blocks that are skipped are not copied)."""
    with active(model, config):

        def built(module: nn.Module) -> nn.Module:
            if isinstance(module, Sliced):
                return module.plain()
            new = copy.copy(module)
            new._modules = {}
            children = [(n, c) for n, c in module.named_children() if c in list(module)] if isinstance(module, nn.Sequential) else None
            for name, child in children if children is not None else module.named_children():
                new._modules[name] = built(child)
            return new

        return built(model)


@pytest.fixture(params=["BackboneS", "four times as wide"])
def served(request: pytest.FixtureRequest) -> tuple[str, SortedNet, Tensor]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    scale = 1 if request.param == "BackboneS" else 4
    model = ElasticBackbone(widths=[scale * w for w in (16, 32, 48, 64)]).eval()
    x = torch.randn(64, 1, 28, 28)
    configs = [at(model, w, d) for w in (0.25, 0.5, 0.75, 1.0) for d in (0.0, 1.0)]
    return request.param, SortedNet(ElasticFamily(model, configs, x[:1]), x[:1]).eval(), x


@torch.no_grad()
def test_switching_the_budget(served: tuple[str, SortedNet, Tensor]) -> None:
    name, policy, x = served
    model, configs = policy.family.model, policy.configs
    prices = policy.prices(x).tolist()

    print(f"\n{name}: {sum(p.numel() for p in model.parameters()) / 1e3:.0f} thousand parameters, 8 networks")
    print("   MFLOPs   choose by budget   set slices   copy out    ratio   kB made: ours, copies   run, 64 rows: slices / copy")
    for i, config in enumerate(configs):
        alone = by_copies(model, config)
        with active(model, config):
            torch.testing.assert_close(alone(x), model(x), rtol=0, atol=0)
        with Allocated() as mine:
            setting(model, config)
        with Allocated() as other:
            by_copies(model, config)
        assert mine.bytes == 0
        assert other.bytes >= 4 * sum(p.numel() for p in alone.parameters())
        switches = {
            "use": partial(policy.use, x, budget=float(prices[i])),
            "set": partial(setting, model, config),
            "copy": partial(by_copies, model, config),
        }
        timings = {n: t.median for n, t in latency(switches, repeats=25, warmup=2).items()}
        runs = latency({"slices": partial(policy.decide, x, config=i), "copy": partial(alone, x)}, repeats=9, warmup=1)
        use, switch, copied = timings["use"], timings["set"], timings["copy"]
        run, run_alone = runs["slices"].median, runs["copy"].median
        print(
            f"{prices[i] / 1e6:9.2f}   {1e6 * use:13.0f} us   {1e6 * switch:7.0f} us   {1e6 * copied:5.0f} us   {copied / switch:6.1f}   "
            f"{mine.bytes / 1e3:10.0f} {other.bytes / 1e3:10.0f}   {1e3 * run:8.2f} / {1e3 * run_alone:.2f} ms = {run / run_alone:.2f}"
        )
    assert flops(model, configs, x[:1]) == prices
