"""Every rule meets three kinds of network: it trains what it says it trains, or it names the module that stands in its way.

What comes out is the table of the guide "Train with another rule", which is compared line by line.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Adam

from neurarium.errors import UnsupportedModel
from neurarium.learn import (
    DFA,
    DPSGD,
    OIGBP,
    OPU,
    Backprop,
    CascadedForward,
    CounterCurrent,
    ForwardForward,
    Learner,
    MonoForward,
    NoProp,
    PhysicalForwardForward,
    PhysicsAware,
    PredictiveCoding,
    PrivateDFA,
    SelfExpanding,
)

FAST = partial(Adam, lr=3e-3)
GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "learn.md"


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch, self.place = nn.Conv2d(1, 16, 4, 4), nn.Parameter(0.02 * torch.randn(1, 4, 16))

    def forward(self, x: Tensor) -> Tensor:
        return self.patch(x).flatten(2).transpose(1, 2) + self.place


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean(1)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))


def cnn() -> nn.Module:
    stem = nn.Conv2d(1, 8, 3, padding=1)
    return nn.Sequential(stem, nn.ReLU(), Block(8), Block(8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))


def transformer() -> nn.Module:
    layer = partial(nn.TransformerEncoderLayer, 16, 4, 32, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(Patches(), layer(), layer(), Mean(), nn.Linear(16, 5))


MODELS = {"MLP": mlp, "residual CNN": cnn, "transformer": transformer}
# "no": it has a model of its own; otherwise what of the user's model it trains
RULES: dict[str, tuple[Learner, str]] = {
    "Backprop": (Backprop(optimizer=FAST), "all"),
    "MonoForward": (MonoForward(optimizer=FAST), "all"),
    "ForwardForward": (ForwardForward(optimizer=FAST), "hidden"),
    "CascadedForward": (CascadedForward(), "head"),
    "CounterCurrent": (CounterCurrent(optimizer=FAST), "all"),
    "DFA": (DFA(optimizer=FAST), "all"),
    "DFA through an OPU": (DFA(ternary=0.1, projector=OPU, optimizer=FAST), "all"),
    "PrivateDFA": (PrivateDFA(sigma=0.1, optimizer=FAST), "all"),
    "DPSGD": (DPSGD(sigma=0.1, optimizer=FAST), "all"),
    "PredictiveCoding": (PredictiveCoding(4, optimizer=FAST), "all"),
    "SelfExpanding": (SelfExpanding(optimizer=FAST), "all"),
    "OIGBP": (OIGBP(), "all"),
    "NoProp": (NoProp(optimizer=FAST), "all"),
    "PhysicalForwardForward": (PhysicalForwardForward(), "all"),
    "PhysicsAware": (PhysicsAware(), "all"),
}
_SAID = {(line.split("|")[1].strip().strip("`"), model): cell.strip()
         for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")
         for model, cell in zip(MODELS, line.split("|")[2:5])}  # fmt: skip


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("kind", MODELS)
def test_the_guide_says_what_a_rule_takes(name: str, kind: str) -> None:
    learner, trained = RULES[name]
    torch.manual_seed(0)
    model = MODELS[kind]()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    x, y = torch.randn(20, 1, 8, 8), torch.arange(20) % 5
    try:
        learner.fit(model, [(x, y)] * 3, epochs=1)
    except UnsupportedModel as error:
        found = "no"
        assert error.module
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    else:
        found = trained
        head = len(model) - 1  # type: ignore[arg-type]
        still = {n for n, p in model.named_parameters() if n in before and torch.equal(p, before[n])}
        resting = {n for n in before if {"all": False, "hidden": n.startswith(f"{head}."), "head": not n.startswith(f"{head}.")}[trained]}
        assert still == resting
        predictor = learner.predictor(model) if hasattr(learner, "predictor") else model
        assert torch.isfinite(predictor(x)).all()
    assert _SAID[f"{name}", kind] == found


def test_the_guide_names_every_rule() -> None:
    assert {rule for rule, _ in _SAID} == set(RULES)
