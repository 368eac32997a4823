"""An elastic model with the configs that matter, and what each of them costs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.cost import CostTable, evaluating
from neurarium.dynamic.elastic.configs import active, full, slots
from neurarium.dynamic.elastic.norm import ElasticNorm
from neurarium.dynamic.elastic.slices import Config, Sliced
from neurarium.dynamic.elastic.surgery import declare, extract
from neurarium.dynamic.tree import repeat
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["ElasticFamily", "flops"]


class ElasticFamily(nn.Module):
    """An elastic model and the configs that matter, from the cheapest to the dearest: what budget policies and samplers work on.

    Args:
        example: a batch on which the configs' FLOPs are measured to sort them; of equal ones the one with fewer units comes first.
    """

    def __init__(self, model: nn.Module, configs: Iterable[Config], example: Any) -> None:
        super().__init__()
        self.model = model
        configs = list(dict.fromkeys(configs))
        if not configs:
            raise BadInput("a family needs at least one config")
        if not any(slots(model)):
            raise UnsupportedModel(
                "has no elastic layer: make_elastic(model, example) makes one of an ordinary model", module=type(model).__name__
            )
        norms = [m for m in model.modules() if isinstance(m, ElasticNorm) and m.batch]
        if any(m.statistics == "config" for m in norms):
            declare(model, configs)
        price = dict(zip(configs, flops(model, configs, example)))
        self.configs = tuple(sorted(configs, key=lambda c: (price[c], sum(c.key), c.key)))

    def run(self, x: Any, config: Config) -> Tensor:
        with active(self.model, config):
            return self.model(x)

    def forward(self, x: Any) -> Tensor:
        """The dearest config."""
        return self.run(x, self.configs[-1])

    def extract(self, config: Config) -> nn.Module:
        return extract(self.model, config)


def flops(model: nn.Module, configs: Sequence[Config], example: Any) -> list[int]:
    """FLOPs a row of each config.

    One pass over everything tells what each elastic layer costs, of which a config takes the share of the weights in its slice. That is
    checked on the smallest, the middle and the largest; where it is not so (attention, layers used in other ways) each config is measured.
    """
    slices = [m for m in model.modules() if isinstance(m, Sliced)]
    norms = [m for m in slices if isinstance(m, ElasticNorm) and m.batch]
    widths, depths = slots(model)
    blocks = {id(m): (i, k) for i, d in enumerate(depths) for k, b in enumerate(d._modules.values()) for m in b.modules()}
    number, spent = {id(w): i for i, w in enumerate(widths)}, {id(m): 0 for m in slices}

    def measured(config: Config) -> int:
        with active(model, config):
            return CostTable.measure([model], example).full

    def share(config: Config) -> int:
        total = whole
        for m, follows in costly:
            i, k = blocks.get(id(m), (0, -1))
            part = spent[id(m)] if k < 0 or k < config.depths[i] else 0
            for w in follows:
                part = part * config.widths[w] // widths[w].size
            total += part - spent[id(m)]
        return total

    with evaluating(model):
        for m in norms:
            m.measuring = True  # prices need no statistics
        try:
            whole = measured(full(model))
            with active(model, full(model)), FlopCounterMode(display=False) as counter, torch.inference_mode():
                before: list[int] = []
                handles = [m.register_forward_pre_hook(lambda *_: before.append(counter.get_total_flops())) for m in slices]

                def after(m: nn.Module, *_: Any) -> None:
                    spent[id(m)] += counter.get_total_flops() - before.pop()

                handles += [m.register_forward_hook(after) for m in slices]
                try:
                    model(repeat(example, 1))
                finally:
                    for handle in handles:
                        handle.remove()
            costly = [(m, [number[id(w)] for w in m.axes()["weight"].values()]) for m in slices if spent[id(m)]]
            prices = [share(c) for c in configs]
            order = sorted(range(len(configs)), key=lambda i: configs[i].key)
            if any(prices[i] != measured(configs[i]) for i in {order[0], order[len(order) // 2], order[-1]}):
                prices = [measured(c) for c in configs]
        finally:
            for m in norms:
                m.measuring = False
    return prices
