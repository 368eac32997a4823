"""What a policy over a family of networks must keep to, as one check on a policy in evaluation mode and one batch.

Every configuration really costs what it is charged, a stand-alone copy of it computes the same, and a budget buys what it says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from neurarium.errors import BadInput
from neurarium.testing.state import assert_same

__all__ = ["check_family"]


@torch.no_grad()
def check_family(policy: Any, x: Any, *, most: int = 12) -> None:
    """Raises AssertionError with what is wrong; at most ``most`` configurations are tried, spread over all."""
    prices, n = policy.prices(x), len(policy.configs)
    ordered = prices.tolist()
    assert ordered == sorted(ordered), "configs are not sorted by measured cost"
    assert policy.costs(x).total == tuple(ordered), "costs() and prices() disagree"
    where = sorted({round(i * (n - 1) / max(1, most - 1)) for i in range(most)})
    for config in where:
        with FlopCounterMode(display=False) as counter:
            outcome = policy.decide(x, config=config)
        said, spent = int(outcome.cost.sum()), counter.get_total_flops()
        assert said == spent, f"configuration {config} is charged {said} FLOPs and ran {spent}"
        assert bool((outcome.choice == config).all()), f"decide(config={config}) says that it ran another one"
        alone = policy.extract(config).eval()
        assert_same(alone(x), outcome.output, f"extract({config}) computes something else than the family")
        stored = {p.untyped_storage().data_ptr() for p in policy.parameters()}
        assert not any(p.untyped_storage().data_ptr() in stored for p in alone.parameters()), f"extract({config}) shares weights"
        by_row = policy.decide(x, config=config, mode="loop")
        assert torch.allclose(by_row.output.double(), outcome.output.double(), rtol=1e-4, atol=1e-5), "row by row the answers differ"
    last = -1
    for price in ordered:
        cost = int(policy.decide(x, budget=float(price)).cost[0])
        assert last <= cost <= price, f"a budget of {price} FLOPs a row spends {cost}, after {last} with less"
        last = cost
    refused = {
        "a budget below the cheapest configuration": lambda: policy.decide(x, budget=0.5 * ordered[0]),
        "a threshold": lambda: policy.decide(x, threshold=0.5),
        "an empty batch": lambda: policy.decide(tree_map(_none, x)),
        "a configuration that does not exist": lambda: policy.decide(x, config=n),
    }
    for what, call in refused.items():
        try:
            call()
        except BadInput:
            continue
        raise AssertionError(f"{what} was accepted")


def _none(t: Tensor) -> Tensor:
    return t[:0]
