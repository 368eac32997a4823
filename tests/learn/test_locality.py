"""Every rule that goes without backpropagation is as local as it claims, and its updates can be compared with the gradient.

One table for all of them; that it also holds of convolutions and transformers is with the tests of each rule.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from neurarium.learn import (
    DFA,
    OPU,
    Backprop,
    CascadedForward,
    CounterCurrent,
    ForwardForward,
    GraphForward,
    GraphLayers,
    Learner,
    LocalLearner,
    MonoForward,
    NoProp,
    NoPropNet,
    PhysicalChain,
    PhysicalForwardForward,
    PredictiveCoding,
    PrivateDFA,
    gradient_alignment,
)
from neurarium.learn.fit import find_loss
from neurarium.learn.predictive_coding import PredictiveCodingMLP
from neurarium.testing.locality import assert_feedback_local, assert_local

X = torch.randn(24, 12, generator=torch.Generator().manual_seed(0))
BATCH = (X, X[:, :3].argmax(1))
GD = partial(SGD, lr=0.1)


def mlp(head: bool = True) -> nn.Module:
    torch.manual_seed(0)
    hidden = [m for a, b in pairwise((12, 32, 24, 16)) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*hidden, *([nn.Linear(16, 3)] if head else []))


def physical() -> nn.Module:
    torch.manual_seed(0)
    return PhysicalChain([nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in pairwise((15, 10, 9, 8))], 12, 3)


def diffusion() -> nn.Module:
    torch.manual_seed(0)
    return NoPropNet(lambda: nn.Sequential(nn.Linear(12, 8), nn.ReLU()), 3, X[:2], steps=3, hidden=8)


def graph() -> nn.Module:
    pytest.importorskip("torch_geometric")
    torch.manual_seed(0)
    return GraphLayers("gcn", 12, 8, 8, 3)


def crowned() -> nn.Module:
    pytest.importorskip("torch_geometric")
    torch.manual_seed(0)
    return GraphLayers("gcn", 12, 8, 8, 3, top=3)


def predictive() -> nn.Module:
    torch.manual_seed(0)
    return PredictiveCodingMLP((12, 10, 9, 8, 3))


nodes = torch.arange(24)
RING = torch.stack([torch.cat([nodes, nodes.roll(1)]), torch.cat([nodes.roll(1), nodes])])
GRAPH, LINKS = ((X, RING), BATCH[1]), ((X, RING), RING[:, :24])


class Claim(NamedTuple):
    """``claims``: alone = hears nothing from above; feedback = not through the weights above; neighbour = from the next block alone."""

    claims: str
    learner: Learner
    model: Callable[[], nn.Module]
    batch: Any = BATCH
    blocks: Callable[[nn.Module], list[list[str]]] | None = None


def below(*prefixes: str) -> Callable[[nn.Module], list[list[str]]]:
    """Blocks by the beginnings of their parameters' names."""
    return lambda model: [[n for n, _ in model.named_parameters() if n.startswith(p)] for p in prefixes]


LAYERS, BLOCKS, CONVS = (
    below("layers.0.", "layers.1.", "layers.2."),
    below("blocks.0.", "blocks.1.", "blocks.2."),
    below("convs.0.", "convs.1.", "convs.2."),
)
RULES = {
    "mono-forward": Claim("alone", MonoForward(optimizer=GD), mlp),
    "mono-forward, parallel": Claim("alone", MonoForward(order="parallel", optimizer=GD), mlp),
    "forward-forward": Claim("alone", ForwardForward(optimizer=GD), mlp),
    "forward-forward, greedy": Claim("alone", ForwardForward(order="greedy", optimizer=GD), mlp),
    "forward-forward, no head": Claim("alone", ForwardForward(optimizer=GD), partial(mlp, head=False)),
    "cascaded-forward": Claim("alone", CascadedForward(loss="ce", optimizer=GD), mlp),
    "counter-current": Claim("alone", CounterCurrent(clip=None, optimizer=GD), mlp),
    "counter-current, cosine": Claim("alone", CounterCurrent(clip=None, similarity="cosine", self_similarity=0.5, optimizer=GD), mlp),
    "physical-ff": Claim("feedback", PhysicalForwardForward(optimizer=GD), physical, blocks=LAYERS),
    "physical-ff, parallel": Claim("feedback", PhysicalForwardForward(order="parallel", optimizer=GD), physical, blocks=LAYERS),
    "noprop": Claim("feedback", NoProp(optimizer=GD), diffusion, blocks=BLOCKS),
    "noprop, parallel": Claim("feedback", NoProp(order="parallel", optimizer=GD), diffusion, blocks=BLOCKS),
    "forwardgnn": Claim("feedback", GraphForward(optimizer=GD), graph, GRAPH, CONVS),
    "forwardgnn, virtual nodes": Claim("feedback", GraphForward(mode="ff-virtual", optimizer=GD), graph, GRAPH, CONVS),
    "forwardgnn, links": Claim("feedback", GraphForward(task="link", optimizer=GD), graph, LINKS, CONVS),
    "forwardgnn, top to input": Claim("neighbour", GraphForward(mode="sf-top2input", optimizer=GD), crowned, GRAPH),
    "dfa": Claim("feedback", DFA(optimizer=GD), mlp),
    "light-in-the-loop": Claim("feedback", DFA(ternary=0.4, projector=partial(OPU, noise=0.1), optimizer=GD), mlp),
    "photonic-dp": Claim("feedback", PrivateDFA(sigma=0.1, optimizer=GD), mlp),
    "predictive coding": Claim("neighbour", PredictiveCoding(6, optimizer=GD), predictive),
}


def of(claim: str) -> list[str]:
    return [name for name, rule in RULES.items() if rule.claims == claim]


@pytest.mark.parametrize("name", of("alone"))
def test_blocks_that_learn_alone(name: str) -> None:
    rule = RULES[name]
    assert isinstance(rule.learner, LocalLearner)
    assert_local(rule.learner, rule.model(), rule.batch)


@pytest.mark.parametrize("name", of("feedback"))
def test_no_signal_comes_through_the_weights_above(name: str) -> None:
    rule, model = RULES[name], RULES[name].model()
    assert_feedback_local(rule.learner, model, rule.batch, blocks=rule.blocks and rule.blocks(model))


@pytest.mark.parametrize("order", ["sweep", "parallel"])
def test_blocks_of_noprop_hear_nothing_from_below_either(order: str) -> None:
    model = diffusion()
    assert_feedback_local(NoProp(order=order, optimizer=GD), model, BATCH, blocks=BLOCKS(model)[::-1])
    with pytest.raises(AssertionError, match="depends on the forward weights"):  # as the physical rule's do, upwards
        assert_feedback_local(PhysicalForwardForward(optimizer=GD), physical(), BATCH, blocks=LAYERS(physical())[::-1])


def test_settling_tells_a_block_of_the_next_one_alone() -> None:
    """After k steps of settling, k + 1 blocks from the top have something to learn, and the others move not at all."""
    for steps in (1, 2, 3, 4):
        model = predictive()
        trained = deepcopy(model)
        PredictiveCoding(steps, optimizer=GD).fit(trained, [BATCH], epochs=1)
        pairs = zip(model.named_parameters(), trained.parameters(), strict=True)
        moved = [not torch.equal(a, b) for (name, a), b in pairs if name.endswith("weight")]
        assert moved == [i >= 3 - steps for i in range(4)]


@dataclass(frozen=True, kw_only=True)
class Leaky(DFA):
    """Feedback as it should be, and a trace of the gradient that comes through the blocks above."""

    def gradients(self, chain: Any, feedback: Any, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        found = super().gradients(chain, feedback, x, y)
        (1e-3 * find_loss(self.loss)(chain.forward(x, detach=False)[-1], y)).backward()
        return found


LEAKS: dict[str, tuple[Callable[[], None], str]] = {
    "mono-forward": (
        lambda: assert_local(MonoForward(order="parallel", detach=False, optimizer=GD), mlp(), BATCH),
        "weights of blocks above",
    ),
    "forward-forward": (lambda: assert_local(ForwardForward(detach=False, optimizer=GD), mlp(), BATCH), "weights of blocks above"),
    "one norm for all": (lambda: assert_local(CounterCurrent(clip=1e-3, optimizer=GD), mlp(), BATCH), "weights of blocks above"),
    "feedback": (lambda: assert_feedback_local(Leaky(optimizer=GD), mlp(), BATCH), "forward weights"),
    "predictive coding": (lambda: assert_feedback_local(PredictiveCoding(6, optimizer=GD), predictive(), BATCH), "forward weights"),
    "backpropagation": (lambda: assert_feedback_local(Backprop(optimizer=GD), mlp(), BATCH), "forward weights"),
}


@pytest.mark.parametrize("name", LEAKS)
def test_what_crosses_blocks_is_caught(name: str) -> None:
    ask, says = LEAKS[name]
    with pytest.raises(AssertionError, match=says):
        ask()


@pytest.mark.parametrize("model", [mlp, physical, predictive], ids=["mlp", "physical", "predictive"])
def test_backpropagation_is_its_own_gradient(model: Callable[[], nn.Module]) -> None:
    found = gradient_alignment(Backprop(), model(), BATCH)
    assert set(found) == {n for n, _ in model().named_parameters()}
    assert all(v == pytest.approx(1, abs=1e-5) for v in found.values())


@pytest.mark.parametrize("name", [n for n in RULES if n != "forwardgnn, links"])  # links are no classes
def test_alignment_is_a_cosine_for_every_rule(name: str) -> None:
    rule, model = RULES[name], RULES[name].model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    found = gradient_alignment(rule.learner, model, rule.batch)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the meter changed the model"
    known = {n: v for n, v in found.items() if not math.isnan(v)}
    assert all(abs(v) <= 1 + 1e-9 for v in known.values())
    matrices = [n for n, p in model.named_parameters() if p.ndim == 2]
    still: Sequence[str] = [n for n in matrices if n not in known]
    if name == "cascaded-forward":  # its blocks stay random
        assert still == matrices[:-1]
    else:
        assert len(still) <= len(matrices) // 4, f"no cosine for {still}"


def test_alignment_under_a_settled_and_faint_error_is_that_of_the_gradient() -> None:
    """Predictive coding becomes backpropagation where the errors are small; the meter says so, and less where they are not."""
    faint, loud = (gradient_alignment(PredictiveCoding(200, output_precision=pi), predictive(), BATCH)["1.weight"] for pi in (1e-3, 3.0))
    assert faint > 0.999
    assert faint > loud
