"""Many small networks trained at once: the data set of methods that learn from weights.

Networks of one architecture are stacked, and one vmap call trains all of them, each on its own task, from its own start. A zoo is made of
*families*: all nets of a family start at one initialisation plus a little noise, so that a family has its own solution and its members are
near to each other. With one family the mean of all weights is already a good network; with one family a net, weights look like noise to
everything that has not seen very many. In between, a generator must keep the parts of a network consistent with each other.

*Cost.* A step of n networks is a batched product; on a processor several hundred networks of a thousand weights train in seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F
from torch.optim import Adam

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["Instruction", "ZooNet", "accuracies", "model_zoo", "train_many"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Instruction:
    """What weights are wanted for: the names of a data set and of an architecture."""

    dataset: str
    architecture: str


@dataclass(frozen=True, eq=False)
class ZooNet:
    """A trained network: its weights, what it was trained for, its family and its accuracy on test data."""

    state: State
    instruction: Instruction
    family: int
    accuracy: float


def train_many(
    model: nn.Module, states: Sequence[State], data: Sequence[TensorData], *, steps: int, batch: int = 32, lr: float = 1e-2, seed: int = 0
) -> list[State]:
    """Train ``states[i]`` of the architecture ``model`` on ``data[i]`` (equal sizes) by Adam and cross-entropy, all in one call a step."""
    if len(states) != len(data) or not states:
        raise BadInput(f"{len(states)} states and {len(data)} data sets: one each, at least one")
    if len({tuple(d.x.shape) for d in data}) > 1:
        raise BadInput("the data sets must have equal shapes")
    for name, m in model.named_modules():
        if getattr(m, "running_mean", None) is not None:
            raise UnsupportedModel("running statistics cannot be stacked; use GroupNorm or LayerNorm", module=name)
    shell = deepcopy(model).to("meta")
    weights = {n: torch.stack([s[n] for s in states]).requires_grad_() for n, _ in model.named_parameters()}
    rest = {n: torch.stack([s[n] for s in states]) for n, _ in model.named_buffers() if n in states[0]}
    distinct = {id(d): d for d in data}
    place = {key: i for i, key in enumerate(distinct)}
    which = torch.tensor([place[id(d)] for d in data])[:, None]
    x, y = torch.stack([d.x for d in distinct.values()]), torch.stack([d.y for d in distinct.values()])
    optimizer, generator = Adam(list(weights.values()), lr=lr), torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randint(x.shape[1], (len(data), batch), generator=generator)
        scores = vmap(lambda w, b, x: functional_call(shell, (w, b), (x,)))(weights, rest, x[which, rows])
        loss = F.cross_entropy(scores.flatten(0, 1), y[which, rows].flatten()) * len(data)  # so that nets do not feel each other
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [{n: weights[n][i].detach().clone() if n in weights else t for n, t in s.items()} for i, s in enumerate(states)]


@torch.no_grad()
def accuracies(model: nn.Module, states: Sequence[State], data: TensorData) -> Tensor:
    """Of each state of the architecture ``model`` on ``data``: (states,)."""
    shell = deepcopy(model).to("meta").eval()
    stacked = {n: torch.stack([s[n] for s in states]) for n in states[0]}
    scores = vmap(lambda w: functional_call(shell, w, (data.x,)))(stacked)
    return (scores.argmax(-1) == data.y).float().mean(1)


def model_zoo(
    architectures: Mapping[str, Callable[[], nn.Module]],
    tasks: Mapping[str, tuple[TensorData, TensorData]],
    *,
    nets: int = 8,
    families: int = 4,
    noise: float = 0.02,
    steps: int = 200,
    batch: int = 32,
    lr: float = 1e-2,
    seed: int = 0,
) -> list[ZooNet]:
    """``nets`` networks for each architecture, task and family; the same arguments make the same zoo.

    Args:
        architectures: name -> a function that makes a freshly initialised module.
        tasks: name -> training and test data; training sets of equal shape.
        families: initialisations of each architecture, shared by its tasks.
        noise: standard deviation of what each net adds to its family's initialisation.
    """
    if min(nets, families, steps, batch) < 1 or noise < 0 or not architectures or not tasks:
        raise BadInput("nets, families, steps and batch must be at least 1, noise at least 0, and there must be architectures and tasks")
    made = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, make in architectures.items():
            starts = [make() for _ in range(families)]
            plan = [(task, family) for task in tasks for family in range(families) for _ in range(nets)]
            states = [
                {n: p + noise * torch.randn_like(p) if p.is_floating_point() else p.clone() for n, p in starts[f].state_dict().items()}
                for _, f in plan
            ]
            trained = train_many(starts[0], states, [tasks[t][0] for t, _ in plan], steps=steps, batch=batch, lr=lr, seed=seed)
            each = families * nets
            for i, (task, (_, test)) in enumerate(tasks.items()):
                part = trained[i * each : (i + 1) * each]
                for state, (_, family), accuracy in zip(part, plan[i * each :], accuracies(starts[0], part, test).tolist()):
                    made.append(ZooNet(state, Instruction(task, name), family, accuracy))
    return made
