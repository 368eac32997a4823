"""Conditional automated channel pruning: one agent that learns the layers' pruning rates for every target at once.

Automatic channel pruning (AMC) lets an agent walk through the layers; at each it sees what the layer is like and what has been removed so
far, and says which share of the channels goes. At the end the pruned, untrained network is judged on held-out data, and that reward
teaches the agent (DDPG). One search gives one network, and whoever needs three sizes searches three times. Here the target is a part of
what the agent sees. Each episode draws a target c, and what is learnt about the layers at one rate serves at all the others::

    state_t  = (t/L, c_in, c_out, kernel, stride, H, W, MACs_t, removed so far, still removable, a_(t-1), c)
    a_t      = share of the units of group t that goes, 0 < a_t <= a_max; the largest L1 norms stay
    reward   = accuracy of the pruned network, the same for all steps of the episode, minus a moving average *per target*

The constraint is met by construction: a_t is raised where the target could not be reached any more if all later groups lost a_max, and
lowered where it would be exceeded even if all later ones stayed whole. Both bounds count the shrunken inputs of the layers behind.
:class:`ConditionalPruner` with a single rate is AMC.

*Source*: Liu et al., "Conditional Automated Channel Pruning for Deep Neural Networks", IEEE Signal Processing Letters 2021
(arXiv 2009.09724); the walk, DDPG and its settings from He et al., "AMC", ECCV 2018 (arXiv 1802.03494).

*Departures*: sizes of the networks and schedules are AMC's, since the paper names none; the bound from above is ours (with it the
remaining cost equals the target to within one unit of the last groups); the steps are coupled groups of the channel graph, so heads and
feed-forward units are steps too; the critic learns the episode's reward itself, which at gamma 1 is what DDPG's targets stand for
(``bootstrap=True`` gives those); the actor's gradient is taken at the nearest allowed action and not followed beyond a bound; and
:meth:`~ConditionalPruner.plan` returns the best plan that was judged for a target unless ``best=False`` asks for the actor's own.

*Cost*: an episode is one forward pass of the pruned model on the reward's samples and one or two milliseconds of DDPG a group.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress.channels import ChannelPlan, apply_channels
from neurarium.compress.graph import ChannelGraph, Example
from neurarium.compress.prune.units import keep_top, refresh_norms, traced, unit_norms
from neurarium.compress.sensitivity import collect
from neurarium.errors import BadInput
from neurarium.meter import undisturbed

__all__ = ["ConditionalPruner", "cacp"]

FEATURES = 12


class _Step(NamedTuple):
    state: Tensor
    bounds: tuple[float, float]  # the actions that the constraint allows
    action: float


class ConditionalPruner:
    """Learns pruning rates for a set of targets and prunes to any of them.

    Args:
        model: any model that :class:`~neurarium.compress.graph.ChannelGraph` can trace; it is never changed.
        example: an input (tuple or mapping of inputs) for the trace.
        rates: targets, shares of the multiply-adds to remove. One rate makes this AMC.
        reward: function of a pruned model, larger is better; by default its accuracy (minus squared error for real targets) on the data.
        episodes: pruned models that are judged, in all; one more for each rate at the end.
        samples: rows of the loader for the default reward; the first 200 also renew the statistics of batch normalisation.
        most: a_max, the largest share that a group may lose.
        continuous: draw targets from the whole range of `rates` instead of the set.
        conditional: False hides the target from the agent (to see what it is worth).
        warmup, decay: share of the episodes with the full noise, then its factor an episode.
        updates: DDPG steps for each step of an episode.
        bootstrap: the critic learns one-step targets from slow copies of both networks, as DDPG does, instead of the episode's reward.

    Attributes:
        graph: the groups, in order.
        history: (target, units kept in each group, reward) of each episode.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        example: Example,
        rates: Sequence[float] = (0.3, 0.5, 0.7),
        reward: Callable[[nn.Module], float] | None = None,
        episodes: int = 200,
        seed: int = 0,
        samples: int = 500,
        most: float = 0.8,
        continuous: bool = False,
        conditional: bool = True,
        warmup: float = 0.25,
        decay: float = 0.97,
        updates: int = 2,
        bootstrap: bool = False,
    ) -> None:
        if not rates or episodes < 1 or not 0.0 < most < 1.0:
            raise BadInput(f"needs at least one rate, one episode and 0 < most < 1, got {tuple(rates)}, {episodes} and {most}")
        self.rates, self.episodes, self.seed, self.samples = tuple(sorted(rates)), episodes, seed, samples
        self.most, self.continuous, self.conditional = most, continuous, conditional
        self.warmup, self.decay, self.updates, self.reward = warmup, decay, updates, reward
        self.bootstrap = bootstrap
        self.model, self.graph = traced(model, example)
        self.sizes = np.array([g.size for g in self.graph.groups])
        self.floors = np.maximum(1, np.ceil((1 - most) * self.sizes - 1e-9)).astype(int)
        self.full = float(self.graph.macs(self.sizes))
        for rate in self.rates:
            self._target(rate)
        self._layers = _features(self.model, self.graph, example, self.full)
        self._scores = unit_norms(self.model, self.graph, p=1)
        self._agent: _Agent | None = None
        self._calibration: Tensor | None = None
        self.history: list[tuple[float, tuple[int, ...], float]] = []

    def fit(self, loader: Iterable) -> ConditionalPruner:
        """Runs the episodes. `loader` yields (x, y); its first rows judge and must not be test data."""
        x, y = collect(loader, max(self.samples, 1))
        self._calibration = x[:200]
        judge = self.reward or (lambda pruned: _accuracy(pruned, x, y))
        draw = np.random.default_rng(self.seed)
        agent = _Agent(self.seed, self.most, len(self.rates), self.bootstrap)
        self._agent, self.history = agent, []
        warm = math.ceil(self.warmup * self.episodes)
        for episode in range(self.episodes):
            low, high = self.rates[0], self.rates[-1]
            rate = float(draw.uniform(low, high) if self.continuous else draw.choice(self.rates))
            sigma = 0.5 * self.decay ** max(0, episode - warm)
            counts, steps = self.walk(rate, partial(agent.explore, sigma=sigma, draw=draw))
            reward = self._judged(rate, counts, judge)
            agent.remember(steps, reward, int(np.abs(np.array(self.rates) - rate).argmin()))
            if episode >= warm:
                agent.learn(self.updates * len(steps))
        for rate in self.rates:
            self._judged(rate, self.walk(rate, agent.act)[0], judge)
        return self

    def _judged(self, rate: float, counts: np.ndarray, judge: Callable[[nn.Module], float]) -> float:
        key = tuple(counts.tolist())
        reward = next((r for _, seen, r in self.history if seen == key), None)
        if reward is None:
            with torch.no_grad(), undisturbed(self.model):
                reward = float(judge(self._pruned(self._plan(counts)).eval()))
            if not math.isfinite(reward):
                raise BadInput(f"the reward of a pruned model is {reward}")
        self.history.append((rate, key, reward))
        return reward

    def plan(self, rate: float, *, best: bool = True) -> ChannelPlan:
        """The plan for any target in reach.

        Args:
            best: for a target of the set, the best that was judged for it, the agent's last choice among them (what AMC's code gives out).
                Otherwise, and for all other targets, the choice of the agent without noise.
        """
        if self._agent is None:
            raise BadInput("the agent has not learnt yet: call fit(loader) first")
        seen = [(reward, counts) for c, counts, reward in self.history if c == rate]
        if best and seen:
            return self._plan(np.array(max(seen)[1]))
        return self._plan(self.walk(rate, self._agent.act)[0])

    def prune(self, rate: float, *, best: bool = True) -> nn.Module:
        """The smaller model, with renewed statistics of batch normalisation; `result.plan` is the plan. It wants fine-tuning."""
        return self._pruned(self.plan(rate, best=best))

    def walk(self, rate: float, choose: Callable[[Tensor, float, float], float]) -> tuple[np.ndarray, list[_Step]]:
        """One episode with actions `choose(state, least, most)`: the units kept in each group, and its steps."""
        target, counts, steps = self._target(rate), self.sizes.copy(), list[_Step]()
        for t, n in enumerate(self.sizes.tolist()):
            low, high = self._bounds(t, counts, target)
            state = self._state(t, counts, steps[-1].action if steps else 0.0, rate)
            bounds = 1 - high / n, 1 - min(low, high) / n
            counts[t] = min(max(math.ceil((1 - choose(state, *bounds)) * n - 1e-9), low), high)
            steps.append(_Step(state, bounds, 1 - counts[t] / n))
        return counts, steps

    def _target(self, rate: float) -> float:
        """The multiply-adds that stay."""
        if not 0.0 < rate < 1.0:
            raise BadInput(f"a rate is the share of multiply-adds to remove, in (0, 1), got {rate}")
        least = float(self.graph.macs(self.floors)) / self.full
        if least > 1 - rate:
            raise BadInput(f"the rate {rate} is out of reach: with {self.most:.0%} of every group gone, {least:.3f} of the cost remains")
        return (1 - rate) * self.full * (1 + 1e-12)

    def _bounds(self, t: int, counts: np.ndarray, target: float) -> tuple[int, int]:
        """Fewest and most units of group t with which the target can still be met by what comes after."""
        floor, n = int(self.floors[t]), int(self.sizes[t])

        def cost(k: int, rest: np.ndarray) -> float:
            return float(self.graph.macs(np.concatenate([counts[:t], [k], rest[t + 1 :]])))

        span = range(floor, n + 1)
        high = floor + bisect_right(span, target, key=lambda k: cost(k, self.floors)) - 1
        low = floor + bisect_left(span, target, key=lambda k: cost(k, self.sizes))
        return min(low, n), max(high, floor)

    def _state(self, t: int, counts: np.ndarray, action: float, rate: float) -> Tensor:
        later_whole = float(self.graph.macs(np.concatenate([counts[:t], self.sizes[t:]])))
        later_least = float(self.graph.macs(np.concatenate([counts[:t], self.floors[t:]])))
        moving = [1 - later_whole / self.full, (later_whole - later_least) / self.full, action, rate if self.conditional else 0.0]
        return torch.tensor([*self._layers[t].tolist(), *moving], dtype=torch.float32)

    def _plan(self, counts: np.ndarray) -> ChannelPlan:
        sizes = {g.id: int(k) for g, k in zip(self.graph.groups, counts, strict=True)}
        return self.graph.plan(keep_top(self._scores, sizes), scores=self._scores)

    def _pruned(self, plan: ChannelPlan) -> nn.Module:
        result = apply_channels(self.model, plan)
        if self._calibration is not None:
            refresh_norms(result, self._calibration)
        result.plan = plan  # type: ignore[assignment]
        return result


def cacp(
    model: nn.Module, loader: Iterable, *, rates: Sequence[float] = (0.3, 0.5, 0.7), example: Example | None = None, **options: Any
) -> dict[float, nn.Module]:
    """Smaller copies of the model, one for each rate, from one search.

    Args:
        loader: (x, y) batches to judge on (not the test set).
        rates: shares of the multiply-adds to remove.
        example: input for the trace; the loader's first row if not given.
        options: those of :class:`ConditionalPruner`.
    """
    x, _ = collect(loader, 1)
    pruner = ConditionalPruner(model, example=x if example is None else example, rates=rates, **options).fit(loader)
    return {rate: pruner.prune(rate) for rate in rates}


def _accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    device = next(model.parameters()).device
    out, y = model(x.to(device)), y.to(device)
    if y.is_floating_point():
        return -float(F.mse_loss(out, y))
    return float((out.argmax(-1 if out.shape[:-1] == y.shape else 1) == y).double().mean())


def _features(model: nn.Module, graph: ChannelGraph, example: Example, full: float) -> np.ndarray:
    """(groups, 8): place, inputs, outputs, kernel, stride, height, width and share of the cost, each divided by its largest."""
    shapes: dict[str, tuple[int, ...]] = {}
    firsts = [next(m for m in g.members if m.side == "out") for g in graph.groups]
    wanted = {m.module for m in firsts}

    def hook(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                shapes[name] = tuple(out.shape[2:] if isinstance(module, nn.modules.conv._ConvNd) else out.shape[1:-1])

        return note

    handles = [m.register_forward_hook(hook(name)) for name, m in model.named_modules() if name in wanted]
    try:
        with torch.no_grad(), undisturbed(model):
            model.eval()
            if isinstance(example, Mapping):
                model(**example)
            else:
                model(*((example,) if isinstance(example, Tensor) else example))
    finally:
        for handle in handles:
            handle.remove()
    rows, sizes = [], np.array([g.size for g in graph.groups])
    for t, member in enumerate(firsts):
        module, (attribute, dim) = model.get_submodule(member.module), member.tensors[0]
        shape = list(getattr(module, attribute).shape)
        out = shape.pop(dim)
        stride = getattr(module, "stride", 1)
        stride = stride[0] if isinstance(stride, tuple) else stride
        pixels = (*shapes.get(member.module, ()), 1, 1)
        without = sizes.copy()
        without[t] = 0
        share = 1 - float(graph.macs(without)) / full
        inputs, kernel = [*shape, 1, 1][:2]
        rows.append([t, inputs, out, kernel, stride if isinstance(stride, int) else 1, *pixels[:2], share])
    table = np.array(rows, np.float64)
    return table / np.maximum(table.max(0), 1e-12)


class _Agent:
    """DDPG: two hidden layers of 300, a replay of 2,000 transitions, one moving average of the reward for each target."""

    def __init__(self, seed: int, most: float, rates: int, bootstrap: bool) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.actor, self.critic = _mlp(FEATURES), _mlp(FEATURES + 1)
        self.slow_actor, self.slow_critic = copy.deepcopy(self.actor), copy.deepcopy(self.critic)
        self.follow = 0.01
        self.most, self.bootstrap, self.draw = most, bootstrap, torch.Generator().manual_seed(seed)
        self.actor_step = torch.optim.Adam(self.actor.parameters(), lr=1e-4, fused=True)
        self.critic_step = torch.optim.Adam(self.critic.parameters(), lr=1e-3, fused=True)
        self.table = torch.zeros(2000, 2 * FEATURES + 8)  # state, its bounds, action, reward, rate, whether a next state, it, its bounds
        self.filled, self.averages = 0, [math.nan] * rates

    def mean(self, actor: nn.Module, states: Tensor) -> Tensor:
        return self.most * torch.sigmoid(actor(states))

    @torch.no_grad()
    def act(self, state: Tensor, low: float = 0.0, high: float = 1.0) -> float:
        return min(max(float(self.mean(self.actor, state)), low), high)

    def explore(self, state: Tensor, low: float, high: float, sigma: float, draw: np.random.Generator) -> float:
        """The nearest allowed action plus normal noise, truncated to what is allowed."""
        normal = NormalDist(min(max(self.act(state), low), high), max(sigma, 1e-6))
        u = draw.uniform(normal.cdf(low), normal.cdf(high))
        return min(max(normal.inv_cdf(min(max(u, 1e-12), 1 - 1e-12)), low), high)

    def remember(self, steps: list[_Step], reward: float, rate: int) -> None:
        before = self.averages[rate]
        self.averages[rate] = reward if math.isnan(before) else 0.95 * before + 0.05 * reward
        for t, step in enumerate(steps):
            then = steps[t + 1] if t + 1 < len(steps) else None
            after = torch.zeros(FEATURES + 2) if then is None else torch.tensor([*then.state.tolist(), *then.bounds])
            now = torch.tensor([*step.state.tolist(), *step.bounds, step.action, reward, rate, float(then is not None)])
            self.table[self.filled % len(self.table)] = torch.cat([now, after])
            self.filled += 1

    def learn(self, steps: int) -> None:
        averages = torch.tensor([0.0 if math.isnan(v) else v for v in self.averages])
        slow = [*self.slow_actor.parameters(), *self.slow_critic.parameters()]
        fast = [*self.actor.parameters(), *self.critic.parameters()]
        for _ in range(steps):
            rows = self.table[torch.randint(min(self.filled, len(self.table)), (64,), generator=self.draw)]
            state, bounds, action, reward, rate, more, then, ahead = rows.split([FEATURES, 2, 1, 1, 1, 1, FEATURES, 2], 1)
            value = reward - averages[rate.long()]
            if self.bootstrap:
                with torch.no_grad():
                    next_action = _within(self.mean(self.slow_actor, then), ahead)
                    value = value + more * self.slow_critic(torch.cat([then, next_action], 1))
            self.critic_step.zero_grad()
            F.mse_loss(self.critic(torch.cat([state, action], 1)), value).backward()
            self.critic_step.step()
            wish = self.mean(self.actor, state)
            allowed = _within(wish.detach(), bounds).requires_grad_(True)
            (slope,) = torch.autograd.grad(self.critic(torch.cat([state, allowed], 1)).sum(), allowed)
            slope = torch.where((wish > allowed) & (slope > 0) | (wish < allowed) & (slope < 0), 0.0, slope)
            self.actor_step.zero_grad()
            wish.backward(-slope / len(slope))
            self.actor_step.step()
            if self.bootstrap:
                with torch.no_grad():
                    torch._foreach_lerp_(slow, fast, self.follow)


def _within(action: Tensor, bounds: Tensor) -> Tensor:
    return action.maximum(bounds[:, :1]).minimum(bounds[:, 1:])


def _mlp(into: int) -> nn.Module:
    return nn.Sequential(nn.Linear(into, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 1))
