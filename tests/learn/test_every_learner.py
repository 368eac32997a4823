"""What every learner owes its user: a loss that turns NaN stops by name, an impossible model is refused, a kill leaves no trace.

The examples of the catalog, and beside them every optimizer, schedule and variant of a rule. That data with NaN, an empty loader and a
model of another kind are refused, and that ``history.state`` goes on, is checked by the conformance suite.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR

from neurarium import catalog, learn
from neurarium.data import TensorData
from neurarium.errors import UnsupportedModel
from neurarium.learn import (
    DFA,
    DPSGD,
    OIGBP,
    OPU,
    OWOBP,
    OWOHWO,
    ROOT,
    Backprop,
    CascadedForward,
    CounterCurrent,
    CyclicalMomentum,
    Diverged,
    ForwardForward,
    GraphForward,
    GraphLayers,
    Learner,
    MonoForward,
    MuAdam,
    Muon,
    MuSGD,
    NoProp,
    NoPropCTNet,
    NoPropFMNet,
    OneCycle,
    PhysicalChain,
    PhysicalForwardForward,
    PhysicalLayer,
    PhysicsAware,
    PredictiveCoding,
    PrivateDFA,
    RandomScattering,
    fit_twin,
    infer_shapes,
    load_checkpoint,
    matrix_groups,
    save_checkpoint,
)  # fmt: skip
from neurarium.testing.suite import load_example

FAST, STEPS = partial(Adam, lr=1e-2), 9  # three epochs of three batches


class Case(NamedTuple):
    make: Callable[[], Learner]
    model: Callable[[int], nn.Module]
    loader: Callable[[int], Any]

    def build(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return self.model(seed)


def mlp(seed: int, width: int = 12) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 3))


def loader(seed: int) -> Any:
    x = torch.randn(24, 6, generator=torch.Generator().manual_seed(seed))
    return TensorData(x, x[:, :3].argmax(1)).batches(8, seed=seed)


def links(seed: int) -> Any:
    x, edges, _ = CASES["forwardgnn"].loader(seed)[0]
    return [((x, edges), edges[:, :18])]


def diffusion(kind: type, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return kind(lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU()), 3, torch.zeros(2, 6), hidden=8)


def optics(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(PhysicalLayer(RandomScattering(6, 8), 6, 12), nn.Linear(12, 3))


def named(model: nn.Module) -> Any:
    return list(model.named_parameters())


PAPERS = [p for p in catalog.load().papers if p.room == "learn" and p.status == "works" and p.role == "learner"]
EXAMPLES = {p.id: load_example(str(p.example)) for p in PAPERS}
CASES = {name: Case(e.make, e.model, e.loader) for name, e in EXAMPLES.items()}  # type: ignore[arg-type]
SHAPES = infer_shapes(mlp(0), mlp(0, 6), table=3)
TWIN = partial(fit_twin, pairs=64, hidden=8, epochs=1)
CYCLES: dict[str, Callable[..., Any]] = {
    "one-cycle": lambda o: OneCycle(o, None, STEPS), "cyclical momentum": lambda o: CyclicalMomentum(o, 2),
    "torch's one-cycle": partial(OneCycleLR, max_lr=1e-2, total_steps=STEPS), "steps": partial(MultiStepLR, milestones=[2, 5]),
}  # fmt: skip
ON_MLP: dict[str, Callable[[], Learner]] = {
    "adamw": Backprop,
    "momentum and clip": lambda: Backprop(optimizer=partial(SGD, lr=0.1, momentum=0.9), clip=1.0),
    "root": lambda: Backprop(optimizer=ROOT, groups=matrix_groups),
    "muon": lambda: Backprop(optimizer=Muon, groups=matrix_groups),
    "mu-adam": lambda: Backprop(optimizer=partial(MuAdam, shapes=SHAPES, lr=1e-2), groups=named),
    "mu-sgd": lambda: Backprop(optimizer=partial(MuSGD, shapes=SHAPES, lr=1e-1, momentum=0.9), groups=named),
    "dp-sgd": lambda: DPSGD(optimizer=FAST, sigma=0.1),
    "mono-forward, parallel": lambda: MonoForward(order="parallel", optimizer=FAST),
    "mono-forward, not cached": lambda: MonoForward(cache=False, optimizer=FAST),
    "forward-forward": lambda: ForwardForward(optimizer=FAST),
    "forward-forward, greedy": lambda: ForwardForward(order="greedy", optimizer=FAST),
    "cascaded-forward by descent": lambda: CascadedForward(loss="ce", optimizer=FAST),
    "dfa": lambda: DFA(optimizer=FAST),
    "dfa on a cycle": lambda: DFA(optimizer=partial(SGD, lr=0.1, momentum=0.9), schedule=CYCLES["one-cycle"]),
    "private, through optics": lambda: PrivateDFA(sigma=0.1, ternary=0.4, projector=partial(OPU, noise=0.1, saturation=3.0)),
    "predictive coding, unit precision": lambda: PredictiveCoding(4, optimizer=FAST),
} | {name: partial(Backprop, optimizer=partial(SGD, lr=0.1, momentum=0.9), schedule=cycle) for name, cycle in CYCLES.items()}  # fmt: skip
CASES |= {name: Case(make, mlp, loader) for name, make in ON_MLP.items()}
for name, rule in {"oig-bp": OIGBP, "owo-bp": OWOBP, "owo-hwo": OWOHWO}.items():
    CASES[name] = CASES["optimal-input-gain"]._replace(make=rule)
for order in ("sampled", "parallel"):
    CASES[f"noprop, {order}"] = CASES["noprop"]._replace(make=partial(NoProp, order=order))
CASES["noprop, continuous time"] = Case(NoProp, partial(diffusion, NoPropCTNet), loader)
CASES["noprop, flow matching"] = Case(NoProp, partial(diffusion, NoPropFMNet), loader)
CASES["physical, parallel"] = CASES["physical-ff"]._replace(make=partial(PhysicalForwardForward, order="parallel", optimizer=FAST))
CASES["physics-aware"] = Case(lambda: PhysicsAware(optimizer=FAST, twin=TWIN), optics, loader)
CASES["forwardgnn, layer by layer"] = CASES["forwardgnn"]._replace(make=partial(GraphForward, optimizer=FAST, patience=None))
CASES["forwardgnn, links"] = CASES["forwardgnn"]._replace(make=partial(GraphForward, task="link", optimizer=FAST), loader=links)
CASES["forwardgnn, top to input"] = CASES["forwardgnn"]._replace(
    make=partial(GraphForward, mode="sf-top2input", optimizer=FAST), model=lambda seed: GraphLayers("gcn", 6, 8, 8, top=3)
)


def test_no_learner_is_forgotten() -> None:
    exported = [c for c in vars(learn).values() if inspect.isclass(c) and issubclass(c, Learner) and not inspect.isabstract(c)]
    met = {type(case.make()) for case in CASES.values()}
    assert {c.__name__ for c in exported} <= {c.__name__ for kind in met for c in kind.__mro__}


SPOILT = {"pyhgf": "nodes.level1.mean", "cascaded-forward by descent": "2.weight"}  # what is still read after an epoch; else the first
RESTING = partial(learn.SelfExpanding, cooldown=9)  # a score of the NaN, between epochs, is refused with words of its own


@pytest.mark.parametrize("name", CASES)
def test_a_loss_that_turns_nan_stops_with_step_and_layer(name: str) -> None:
    case = CASES[name]
    learner, model, ended = (RESTING if name == "self-expanding" else case.make)(), case.build(0), []
    where = SPOILT.get(name) or next(n for n, p in model.named_parameters() if p.is_floating_point())

    def spoil(progress: Any) -> None:
        ended.append(progress.steps)
        with torch.no_grad():
            model.get_parameter(where).view(-1)[0] = torch.nan

    with pytest.raises(Diverged) as caught:
        learner.fit(model, case.loader(0), epochs=3, callbacks=[spoil])
    step, module, layer = caught.value.step, caught.value.module, where.rpartition(".")[0]
    if name == "noprop, sampled":  # a step trains one block, and the spoilt one's turn may come later
        assert step >= ended[0]
    elif getattr(learner, "order", None) == "greedy" and step != ended[0]:  # a block that is not the spoilt one; steps count anew in each
        assert step == 0
        assert len(ended) == 3
    else:
        assert step == ended[0]
        assert len(ended) == 1
    assert module is not None
    if name == "pyhgf":  # a filter names the node whose belief fails first
        assert module in ("nodes.level1", "nodes.level2")
    else:
        assert layer.startswith(module) or module.startswith(layer)
    assert f"step {step}" in str(caught.value)
    assert repr(module) in str(caught.value)
    others = [p for n, p in model.named_parameters() if n != where]
    assert all(torch.isfinite(p).all() for p in others), "the step was taken with a loss that is not a number"


class Killed(Exception):
    pass


class Watched:
    """The batches of a loader, until a kill is due: then the second batch is the last."""

    def __init__(self, batches: Any) -> None:
        self.batches, self.due = batches, False
        if hasattr(batches, "set_epoch"):
            self.set_epoch = batches.set_epoch

    def __iter__(self) -> Any:
        for i, batch in enumerate(self.batches):
            if self.due and i == min(1, len(self.batches) - 1):
                raise Killed
            yield batch


@pytest.mark.parametrize("name", CASES)
def test_a_killed_run_goes_on_as_if_nothing_had_been(name: str, tmp_path: Any) -> None:
    """The last checkpoint is of the first epoch; the kill comes within the second, or after it where a rule reads its loader but once."""
    case = CASES[name]
    whole, broken, fresh = (case.build(seed) for seed in (0, 0, 1))
    want = case.make().fit(whole, case.loader(0), epochs=3, seed=5)
    watched, file = Watched(case.loader(0)), tmp_path / "state.safetensors"

    def checkpoint(progress: Any) -> None:
        if watched.due:
            raise Killed
        save_checkpoint(file, progress.state())
        watched.due = True

    with pytest.raises(Killed):
        case.make().fit(broken, watched, epochs=3, seed=5, callbacks=[checkpoint])
    got = case.make().fit(fresh, case.loader(0), epochs=3, seed=5, resume=load_checkpoint(file))
    for (key, a), (other, b) in zip(whole.state_dict().items(), fresh.state_dict().items(), strict=True):
        assert key == other
        assert torch.equal(a, b), f"{key} differs after a kill"
    assert got.steps == want.steps
    assert got.extra["loss"] == want.extra["loss"]
    timeless = [[{k: v for k, v in e.items() if k != "seconds"} for e in h.train] for h in (got, want)]
    assert timeless[0] == timeless[1]


class Again(nn.Module):
    """One layer, twice: what the head is given is not what the layer puts out the first time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.shared(self.shared(self.first(x))))


class Branch(nn.Module):
    """Control flow by the data: what is proved on one batch says nothing of the next."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.head(self.second(h) if x.sum() > 1e6 else h + self.second(h))


class Tied(nn.Sequential):
    """Two layers, one matrix."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
        self[2].weight = self[0].weight


ON_CHAINS: dict[str, Callable[[], Learner]] = {
    "mono-forward": MonoForward, "forward-forward": ForwardForward, "cascaded-forward": CascadedForward, "counter-current": CounterCurrent,
    "dfa": DFA, "private": PrivateDFA, "predictive coding": partial(PredictiveCoding, 4),
}  # fmt: skip


@pytest.mark.parametrize(("model", "where"), [(Again, "head"), (Branch, "head"), (Tied, "2")])
@pytest.mark.parametrize("name", ON_CHAINS)
def test_what_is_no_chain_is_refused_by_name_and_left_alone(name: str, model: Callable[[], nn.Module], where: str) -> None:
    torch.manual_seed(0)
    refused = model()
    before = {k: v.clone() for k, v in refused.state_dict().items()}
    with pytest.raises(UnsupportedModel) as caught:
        ON_CHAINS[name]().fit(refused, loader(0), epochs=1)
    assert caught.value.module == where
    assert where in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in refused.state_dict().items())


WRONG_KIND: dict[str, tuple[Callable[[], Learner], Callable[[int], nn.Module]]] = {
    "twins of nothing": (PhysicsAware, mlp),
    "one sample's gradient": (DPSGD, lambda seed: nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))),
    "nothing to train": (Backprop, lambda seed: mlp(seed).requires_grad_(False)),
    "no layer to train": (PhysicalForwardForward, lambda seed: PhysicalChain([nn.Linear(9, 4)], 6, 3).requires_grad_(False)),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_KIND)
def test_a_model_of_the_wrong_kind_is_refused_by_name_and_left_alone(name: str) -> None:
    make, build = WRONG_KIND[name]
    refused = build(0)
    before = {k: v.clone() for k, v in refused.state_dict().items()}
    with pytest.raises(UnsupportedModel) as caught:
        make().fit(refused, loader(0), epochs=1)
    assert caught.value.module
    assert caught.value.module in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in refused.state_dict().items())
