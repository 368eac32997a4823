"""Networks of beliefs: the generalised hierarchical Gaussian filter, batched over series, differentiable, editable while it runs.

A node is a Gaussian belief (mean, precision) about a quantity that walks at random; the leaves are observed. A *value* parent predicts its
child's mean, a *volatility* parent the logarithm of the variance of its child's walk: when surprises are larger than expected, the parent
goes up, the child's precision falls, and the child learns faster. Each observation sends predictions down and precision-weighted errors up,
one node at a time, all in closed form. The structure is data: nodes and edges may come and go between two observations.

*Equations*, for node a with value parents j, volatility parents j, at time k after dt (hats are predictions):

- *prediction*, roots first: ``mu^_a = lambda_a mu_a + dt (rho_a + sum_j psi_j g_j(mu^_j))``,
  ``Omega_a = dt exp(omega_a + sum_j kappa_j mu^_j)``, ``pi^_a = 1 / (1/pi_a + Omega_a)``, ``gamma_a = Omega_a pi^_a``;
- *errors*: ``delta = mu - mu^``, ``Delta = (pi^/pi + pi^ delta^2 - 1) / (number of volatility parents)``;
- *value parent* b of children j: ``pi_b = pi^_b + sum_j pi^_j (psi_j^2 g_j'^2 - psi_j g_j'' delta_j)``,
  ``mu_b = mu^_b + sum_j psi_j g_j' pi^_j delta_j / pi_b``;
- *volatility parent*: ``pi_b = pi^_b + sum_j [(kappa gamma_j)^2 (1/2 + Delta_j) - kappa^2 gamma_j Delta_j / 2]``,
  ``mu_b = mu^_b + sum_j kappa gamma_j Delta_j / (2 pi)`` with ``pi = pi_b`` (``standard``) or ``pi^_b`` (``ehgf``: the mean is updated
  first, which avoids most impossible precisions). ``unbounded`` never leaves the domain: it blends two quadratic expansions of the
  log-posterior, at the prediction and near the mode, by their values (a volatility parent of one child);
- *inputs* have a fixed precision and ``mu^ = sum_j psi_j g_j(mu^_j)``; binary ones ``mu^ = sigmoid(...)``, and ``mu^ (1 - mu^)`` in the
  place of ``pi^`` with the error ``delta / (mu^ (1 - mu^))``.

With ``kappa = 0`` this is the Kalman filter of a random walk. *Surprise* is the negative logarithm of the predictive density of the input.

*Source.* Weber et al., "The generalized Hierarchical Gaussian Filter" (arXiv 2305.10937); the package pyhgf, whose numbers these are.

*Departures.* pyhgf multiplies an input's prediction by dt too, so that it filters irregular series wrongly, and lets volatility parents
gain precision from missing values. Here an input is predicted as it is, and what saw nothing only predicts; ``like_pyhgf=True`` does as
the package does. Surprise includes the input's own noise (``noise=False`` leaves it out, as the package does). A precision that becomes
negative is an error that names node and step instead of NaN, or is kept as predicted.

*Cost.* About a dozen vector operations a node and observation, on all series at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Learner, device_of, loop, trainable
from neurarium.roles import History

__all__ = ["HGF", "Beliefs", "HGFLearner", "HGFNetwork", "Trajectory", "adapt_structure", "surprise"]

Function = Callable[[Tensor], Tensor]
ADAM: Callable[..., Optimizer] = partial(Adam, lr=0.05)


class Node(nn.Module):
    """The parameters of one belief: where it starts and how it walks. Each is a number, or one a series."""

    def __init__(self, kind: str, *, mean: Any, precision: Any, tonic_volatility: Any, drift: Any, autoconnection: Any, dtype: Any) -> None:
        super().__init__()
        self.kind = kind  # state, continuous (input), binary (input)
        values = {"mean": mean, "tonic_volatility": tonic_volatility, "drift": drift, "autoconnection": autoconnection}
        precision = torch.as_tensor(precision, dtype=dtype)
        if not bool((precision > 0).all()):
            raise BadInput(f"precision must be positive, not {precision.tolist()}")
        for name, value in {**values, "log_precision": precision.log()}.items():
            value = torch.as_tensor(value, dtype=dtype).clone()
            if not bool(torch.isfinite(value).all()):
                raise BadInput(f"{name} must be finite")
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        return x


@dataclass(frozen=True)
class Edge:
    """``kind`` is value or volatility; ``fn`` is g of a value edge (None: the identity)."""

    parent: str
    child: str
    kind: str
    fn: Function | None = None

    @property
    def key(self) -> str:
        return f"{self.parent}->{self.child}"


@dataclass(frozen=True)
class Beliefs:
    """Mean and precision of every node after an observation, each (...) over the series, and what was predicted before it."""

    mean: Mapping[str, Tensor]
    precision: Mapping[str, Tensor]
    expected_mean: Mapping[str, Tensor]
    expected_precision: Mapping[str, Tensor]


@dataclass(frozen=True)
class Trajectory:
    """:class:`Beliefs` at every step, each (..., time). An input's ``mean`` is what it saw; NaN where it saw nothing."""

    mean: Mapping[str, Tensor]
    precision: Mapping[str, Tensor]
    expected_mean: Mapping[str, Tensor]
    expected_precision: Mapping[str, Tensor]
    network: HGFNetwork
    last: Beliefs
    bad: tuple[str, int] | None = None  # the first node whose precision became impossible, and the step


class HGFNetwork(nn.Module):
    """A directed graph of beliefs. Add nodes and edges in any order, then :meth:`run` or :meth:`observe`; change it whenever you like.

    Args:
        update: of volatility parents: ``"ehgf"``, ``"standard"``, or ``"unbounded"``, which takes any surprise.
        dtype: of all beliefs.
        impossible: a large surprise can push the precision of a volatility parent below zero, where the approximation ends: ``"raise"``
            an error that names node and step, or ``"keep"`` the predicted precision for that step.
        like_pyhgf: follow pyhgf 0.2.12 for dt other than 1 and for missing values too (see the module).
        max_precision: precisions are cut here.
    """

    def __init__(
        self,
        *,
        update: str = "ehgf",
        impossible: str = "raise",
        dtype: torch.dtype = torch.float64,
        like_pyhgf: bool = False,
        max_precision: float = 1e10,
    ) -> None:
        super().__init__()
        if impossible not in ("raise", "keep"):
            raise BadInput(f"impossible must be 'raise' or 'keep', not {impossible!r}")
        if update not in ("ehgf", "standard", "unbounded"):
            raise BadInput(f"update must be 'ehgf', 'standard' or 'unbounded', not {update!r}")
        self.update, self.impossible, self.dtype, self.like_pyhgf, self.max_precision = update, impossible, dtype, like_pyhgf, max_precision
        self.nodes, self.strengths = nn.ModuleDict(), nn.ParameterDict()
        self.edges: tuple[Edge, ...] = ()
        self.inputs: tuple[str, ...] = ()  # the order of the last axis of a series
        self.beliefs: Beliefs | None = None

    # Structure.

    def add_continuous(
        self, name: str, *, mean: Any = 0.0, precision: Any = 1.0, tonic_volatility: Any = -3.0, drift: Any = 0.0, autoconnection: Any = 1.0
    ) -> HGFNetwork:
        """A hidden belief: a random walk (``autoconnection`` 1) of variance ``exp(tonic_volatility)`` a unit of time, or an AR(1)."""
        settings = {"mean": mean, "precision": precision, "tonic_volatility": tonic_volatility}
        return self._add(name, "state", **settings, drift=drift, autoconnection=autoconnection)

    def add_input(self, name: str, kind: str = "continuous", precision: Any = 1e4) -> HGFNetwork:
        """A leaf that is observed: ``"continuous"`` with noise of this precision, or ``"binary"``."""
        if kind not in ("continuous", "binary"):
            raise BadInput(f"an input is 'continuous' or 'binary', not {kind!r}")
        self._add(name, kind, mean=0.0, precision=precision, tonic_volatility=0.0, drift=0.0, autoconnection=0.0)
        self.inputs = (*self.inputs, name)
        return self

    def add_binary(self, name: str) -> HGFNetwork:
        """An observed binary node."""
        return self.add_input(name, "binary", precision=1.0)

    def value(self, parent: str, child: str, strength: Any = 1.0, fn: Function | None = None) -> HGFNetwork:
        """``parent`` predicts the mean of ``child``, through ``fn`` (acting on each element) if given."""
        return self._connect(Edge(parent, child, "value", fn), strength)

    def volatility(self, parent: str, child: str, strength: Any = 1.0) -> HGFNetwork:
        """``parent`` predicts the logarithm of the variance of ``child``'s walk."""
        if child in self.nodes and self.nodes[child].kind != "state":
            raise BadInput(f"{child!r} is an input, which does not walk: give a volatility parent to its value parent")
        return self._connect(Edge(parent, child, "volatility"), strength)

    def disconnect(self, parent: str, child: str) -> HGFNetwork:
        key = f"{parent}->{child}"
        if key not in self.strengths:
            raise BadInput(f"there is no edge {key}; there are {sorted(self.strengths)}")
        del self.strengths[key]
        self.edges = tuple(e for e in self.edges if e.key != key)
        return self

    def remove(self, name: str) -> HGFNetwork:
        """Take a node out, with its edges."""
        self._known(name)
        for edge in self.edges:
            if name in (edge.parent, edge.child):
                self.disconnect(edge.parent, edge.child)
        del self.nodes[name]
        self.inputs = tuple(i for i in self.inputs if i != name)
        return self

    @contextmanager
    def edit(self) -> Iterator[HGFNetwork]:
        """Changes made inside hold together or, after an error, not at all. Beliefs of nodes that stay are kept."""
        names = ("nodes", "strengths", "edges", "inputs")
        before = {n: getattr(self, n) for n in names}
        self.nodes, self.strengths = nn.ModuleDict(dict(self.nodes.items())), nn.ParameterDict(dict(self.strengths.items()))
        try:
            yield self
            self._order()
        except BaseException:
            for n in names:
                setattr(self, n, before[n])
            raise

    def _add(self, name: str, kind: str, **settings: Any) -> HGFNetwork:
        if not name or "." in name or "->" in name:
            raise BadInput(f"a node's name must not be empty nor hold '.' or '->': {name!r}")
        if name in self.nodes:
            raise BadInput(f"there is a node {name!r} already")
        self.nodes[name] = Node(kind, dtype=self.dtype, **settings)
        return self

    def _known(self, name: str) -> None:
        if name not in self.nodes:
            raise BadInput(f"there is no node {name!r}; there are {list(self.nodes)}")

    def _connect(self, edge: Edge, strength: Any) -> HGFNetwork:
        self._known(edge.parent)
        self._known(edge.child)
        if self.nodes[edge.parent].kind != "state":
            raise BadInput(f"{edge.parent!r} is an input: it has no children")
        if edge.key in self.strengths:
            raise BadInput(f"{edge.key} is connected already; disconnect it first")
        self.strengths[edge.key] = nn.Parameter(torch.as_tensor(strength, dtype=self.dtype).clone(), requires_grad=False)
        self.edges = (*self.edges, edge)
        return self

    def _order(self) -> list[str]:
        """Parents before children, whatever the order of insertion."""
        waiting = {n: {e.parent for e in self.edges if e.child == n} for n in sorted(self.nodes)}
        order: list[str] = []
        while waiting:
            free = [n for n, parents in waiting.items() if not parents - set(order)]
            if not free:
                raise BadInput(f"the edges between {sorted(waiting)} run in a circle")
            order += free
            for n in free:
                del waiting[n]
        for name in self.inputs:
            if not any(e.child == name for e in self.edges):
                raise BadInput(f"the input {name!r} has no value parent that predicts it")
        if not self.inputs:
            raise BadInput("the network has no input")
        return order

    # Filtering.

    def reset(self) -> HGFNetwork:
        """Forget what was observed; parameters stay."""
        self.beliefs = None
        return self

    def observe(self, x: Tensor | float, dt: float | Tensor = 1.0, mask: Tensor | None = None) -> Beliefs:
        """One observation (..., inputs), or (...) of a single input, on top of all that was observed since :meth:`reset`."""
        x = torch.as_tensor(x, dtype=self.dtype)
        if len(self.inputs) == 1 and (x.ndim == 0 or x.shape[-1:] != (1,)):
            x, mask = x[..., None], None if mask is None else torch.as_tensor(mask)[..., None]
        mask = None if mask is None else torch.as_tensor(mask)[..., None, :]
        dt = dt[..., None] if isinstance(dt, Tensor) else dt
        self.beliefs = self.run(x[..., None, :], dt, mask, start=self.beliefs).last
        return self.beliefs

    def forward(self, series: Tensor, dt: Any = None, mask: Tensor | None = None) -> Trajectory:
        return self.run(series, dt, mask)

    def run(
        self,
        series: Tensor,
        dt: Any = None,
        mask: Tensor | None = None,
        *,
        start: Beliefs | None = None,
        strict: bool = True,
        compile: bool = False,
    ) -> Trajectory:
        """Filter series (..., time, inputs), or (..., time) of a single input, all leading dimensions at once.

        Args:
            dt: time since the observation before: a number, (time,) or (..., time); 1 by default.
            mask: true where a value was observed; of the series' shape. What is masked may be NaN.
            start: go on from these beliefs; nodes that are new start from their parameters.
            strict: raise where a precision becomes impossible, instead of NaN from there on.
            compile: let torch.compile make one kernel of several steps: three times faster and more, after some ten seconds for each
                new structure and shape. It needs a C++ compiler; edges with a function of their own cannot be compiled.
        """
        self._order()  # a network that cannot run says so before it looks at data
        series, mask = self._series(series, mask)
        steps, shape = series.shape[-2], series.shape[:-2]
        plan = _Plan(self, _dt(dt, series), steps, mask is not None)
        state = {n: plan.start(n, start, shape) for n in plan.states}
        xs = self._by_time(series)
        masks = [{}] * steps if mask is None else self._by_time(mask)
        dts = plan.dt if isinstance(plan.dt, list) else [plan.dt] * steps
        pieces, done = [], 0
        if compile:
            if any(e.fn is not None for e in self.edges):
                raise BadInput("compile=True cannot be had with edges that have a function of their own")
            chunk, values = _compiled(), [tuple(v.contiguous() for v in state[n]) for n in plan.states]
            while steps - done >= CHUNK:
                upto = done + CHUNK
                values, piece = chunk(plan, shape, dts[done:upto], values, xs[done:upto], masks[done:upto])
                pieces, done = [*pieces, piece], upto
            state = dict(zip(plan.states, values))
        history: dict[str, list[tuple[Tensor, ...]]] = {n: [] for n in plan.order}
        for k in range(done, steps):
            plan.step(dts[k], state, xs[k], masks[k], history)
        if done < steps or not steps:
            pieces.append(_stacked(plan, shape, history, series))
        fields = {n: [torch.cat(part).movedim(0, -1) if len(part) > 1 else part[0].movedim(0, -1) for part in zip(*(q[n] for q in pieces))]
                  for n in plan.order}  # fmt: skip
        bad = None if not steps else _first_impossible({n: fields[n][1] for n in plan.states})
        if bad is not None:
            if strict:
                raise BadInput(
                    f"the precision of {bad[0]!r} is not positive at step {bad[1]}: the surprise was too large for the approximation. "
                    f"impossible='keep' goes on with the predicted precision; update='ehgf' or a smaller volatility coupling may avoid it"
                )
            late = torch.arange(steps, device=series.device) >= bad[1]
            fields = {n: [torch.where(late, torch.nan, part) for part in f] for n, f in fields.items()}
        names = ("mean", "precision", "expected_mean", "expected_precision")
        parts = [{n: f[i] for n, f in fields.items()} for i in range(4)]
        last = Beliefs(*({n: v[..., -1] for n, v in part.items()} for part in parts)) if steps else start
        return Trajectory(**dict(zip(names, parts)), network=self, last=last, bad=bad)

    def _by_time(self, series: Tensor) -> list[dict[str, Tensor]]:
        """What each input saw, step by step."""
        rows = series.movedim((-2, -1), (0, 1)).contiguous()
        return [dict(zip(self.inputs, row.unbind(0))) for row in rows.unbind(0)]

    def _series(self, series: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if not isinstance(series, Tensor):
            raise BadInput(f"a series is a tensor, not a {type(series).__name__}")
        one = len(self.inputs) == 1 and (series.ndim == 1 or series.shape[-1] != 1)
        if mask is not None and mask.shape != series.shape:
            raise BadInput(f"mask has shape {tuple(mask.shape)}, the series {tuple(series.shape)}")
        if one:
            series, mask = series[..., None], None if mask is None else mask[..., None]
        if series.ndim < 2 or series.shape[-1] != len(self.inputs):
            raise BadInput(f"the last axis of a series holds the inputs {list(self.inputs)}; got shape {tuple(series.shape)}")
        mask = None if mask is None or bool(mask.all()) else mask.bool()
        good = torch.isfinite(series) if mask is None else torch.isfinite(series) | ~mask
        if not bool(good.all()):
            raise BadInput("the series holds a value that is not finite; name gaps with mask=")
        series = series.to(device_of(self), self.dtype)
        binary = [k for k, i in enumerate(self.inputs) if self.nodes[i].kind == "binary"]
        values = series[..., binary] if mask is None else series[..., binary][mask[..., binary]]
        if binary and not bool(((values == 0) | (values == 1)).all()):
            raise BadInput("a binary input is 0 or 1")
        return series, None if mask is None else mask.to(series.device)


class _Plan:
    """One run's parameters and order, with what is one or zero left out."""

    def __init__(self, network: HGFNetwork, dt: Any, steps: int, masked: bool) -> None:
        self.network, self.dt, self.masked = network, dt, masked
        self.order = network._order()
        nodes = network.nodes
        self.states = [n for n in self.order if nodes[n].kind == "state"]
        self.value_parents = {n: self._edges(n, "value", "child") for n in self.order}
        self.volatility_parents = {n: self._edges(n, "volatility", "child") for n in self.order}
        self.value_children = {n: self._edges(n, "value", "parent") for n in self.order}
        self.volatility_children = {n: self._edges(n, "volatility", "parent") for n in self.order}
        self.kind = {n: nodes[n].kind for n in self.order}
        self.input_precision = {n: nodes[n].log_precision.exp() for n in self.order if self.kind[n] == "continuous"}
        self.tonic = {n: nodes[n].tonic_volatility for n in self.states}
        self.drift = {n: _unless(nodes[n].drift, 0.0) for n in self.states}
        self.auto = {n: _unless(nodes[n].autoconnection, 1.0) for n in self.states}
        self.before: dict[str, Tensor] = {}  # the variances before a prediction
        if network.update == "unbounded":
            for n in self.states:
                crowd = [*self.volatility_children[n][1:], *self.value_children[n]] if self.volatility_children[n] else []
                if crowd or len(self.volatility_parents[n]) > 1:
                    raise UnsupportedModel("update='unbounded' is of one volatility parent of one child, with no other children", module=n)
        self.walk = {} if isinstance(dt, list) else {n: _times(self.tonic[n].exp(), dt) for n in self.states}

    def _edges(self, name: str, kind: str, end: str) -> list[tuple[str, Tensor | None, Function | None]]:
        """(other end, strength or None for one, g) of a node's edges of one kind."""
        other = "parent" if end == "child" else "child"
        found = sorted((e for e in self.network.edges if e.kind == kind and getattr(e, end) == name), key=lambda e: e.key)
        return [(getattr(e, other), _unless(self.network.strengths[e.key], 1.0), e.fn) for e in found]

    def start(self, name: str, beliefs: Beliefs | None, shape: torch.Size) -> tuple[Tensor, Tensor]:
        if beliefs is not None and name in beliefs.mean:
            return beliefs.mean[name], beliefs.precision[name]
        node = self.network.nodes[name]
        return node.mean.expand(shape), node.log_precision.exp().expand(shape)

    def step(self, dt: Any, state: dict[str, Any], x: dict[str, Tensor], seen: dict[str, Tensor], history: dict[str, list]) -> None:
        like = self.network.like_pyhgf
        mu_hat: dict[str, Tensor] = {}
        pi_hat: dict[str, Any] = {}
        gamma: dict[str, Tensor] = {}
        for n in self.order:
            total = None
            for parent, psi, fn in self.value_parents[n]:
                part = mu_hat[parent] if fn is None else fn(mu_hat[parent])
                part = part if psi is None else psi * part
                total = part if total is None else total + part
            if self.kind[n] == "binary":
                mu_hat[n] = torch.sigmoid(total).clamp(1e-6, 1 - 1e-6)
                pi_hat[n] = mu_hat[n] * (1 - mu_hat[n])
                continue
            if self.kind[n] == "continuous":
                mu_hat[n] = _times(total, dt) if like else total
                pi_hat[n] = self.input_precision[n]
                continue
            mean, precision = state[n]
            if self.drift[n] is not None:
                total = self.drift[n] if total is None else total + self.drift[n]
            mean = mean if self.auto[n] is None else self.auto[n] * mean
            mu_hat[n] = mean if total is None else mean + _times(total, dt)
            parents = self.volatility_parents[n]
            if parents:
                total = self.tonic[n]
                for parent, kappa, _ in parents:
                    total = total + (mu_hat[parent] if kappa is None else kappa * mu_hat[parent])
                omega = _times(total.exp(), dt)
            else:
                omega = self.walk[n] if self.walk else _times(self.tonic[n].exp(), dt)
            variance = precision.reciprocal()
            pi_hat[n] = (variance + omega).reciprocal()
            self.before[n] = variance
            if parents:
                gamma[n] = omega * pi_hat[n]

        error: dict[str, Tensor] = {}  # delta
        push: dict[str, Tensor] = {}  # Delta
        told: dict[str, Tensor] = dict(seen)  # which nodes have something to say, where anything is masked
        for n in reversed(self.order):
            kind = self.kind[n]
            if kind != "state":
                value = torch.where(seen[n], x[n], mu_hat[n]) if self.masked else x[n]
                error[n] = value - mu_hat[n]
                shown = torch.where(seen[n], x[n], torch.nan) if self.masked else x[n]
                history[n].append((shown, pi_hat[n], mu_hat[n], pi_hat[n]))
                continue
            mu, pi = self._posterior(n, state, mu_hat, pi_hat, gamma, error, push, told, dt)
            delta = mu - mu_hat[n]
            error[n] = delta
            if parents := self.volatility_parents[n]:
                surprise = pi_hat[n] * (pi.reciprocal() + delta * delta) - 1
                push[n] = surprise if len(parents) == 1 else surprise / len(parents)
            state[n] = (mu, pi)
            history[n].append((mu, pi, mu_hat[n], pi_hat[n]))

    def _posterior(self, n, state, mu_hat, pi_hat, gamma, error, push, told, dt) -> tuple[Tensor, Tensor]:
        network = self.network
        volatile, valued = self.volatility_children[n], self.value_children[n]
        if not volatile and not valued:
            return mu_hat[n], pi_hat[n]
        if volatile and network.update == "unbounded":
            child, kappa, _ = volatile[0]
            found = unbounded_update(
                mu_hat[n], pi_hat[n], 1.0 if kappa is None else kappa, self.tonic[child], dt, self.before[child], pi_hat[child],
                state[child][1].reciprocal() + error[child] ** 2,
            )  # fmt: skip
            if self.masked and child in told:
                told[n] = told[child]
                found = tuple(torch.where(told[child], new, old) for new, old in zip(found, (mu_hat[n], pi_hat[n])))
            return found[0], found[1].clamp_max(network.max_precision)
        first_mean = bool(volatile) and network.update == "ehgf"
        like, precision, force = network.like_pyhgf, pi_hat[n], None
        bends: list[tuple[Any, ...]] = []  # curved edges, whose slope is taken again at the new mean by ehgf
        for child, psi, fn in valued:
            strength = pi_hat[child]
            delta = error[child]
            if self.kind[child] == "binary":  # the error was divided by what is its weight here
                part, weight = (delta if psi is None else psi * delta), (strength if psi is None else psi * psi * strength)
                if fn is not None:
                    raise UnsupportedModel("a binary input takes its value parents as they are, without a function", module=child)
            elif fn is None:
                part = strength * delta if psi is None else psi * strength * delta
                weight = strength if psi is None else psi * psi * strength
            else:
                slope, bend = _derivatives(fn, state[n][0])
                part = strength * slope * delta if psi is None else psi * strength * slope * delta
                if first_mean:
                    bends.append((child, psi, fn))
                    weight = None
                else:
                    weight = _curved(strength, psi, slope, bend, delta)
            if self.masked and child in told and weight is not None:
                weight = weight * told[child]
            precision = precision if weight is None else precision + weight
            force = part if force is None else force + part
        for child, kappa, _ in volatile:
            g = gamma[child] if kappa is None else kappa * gamma[child]
            part = 0.5 * g * push[child]
            square = g * g
            weight = square * (push[child] + 0.5) - (part if kappa is None else kappa * part)
            if self.masked and child in told:
                part, weight = part * told[child], weight * told[child]
            precision = precision + weight
            force = part if force is None else force + part
        if first_mean:
            mean = mu_hat[n] + force / pi_hat[n]
            for child, psi, fn in bends:
                slope, bend = _derivatives(fn, mean)
                weight = _curved(pi_hat[child], psi, slope, bend, error[child])
                precision = precision + (weight * told[child] if self.masked and child in told else weight)
        if network.impossible == "keep" and (volatile or any(fn is not None for _, _, fn in valued)):
            precision = torch.where(precision > 0, precision, pi_hat[n])
        if self.masked:
            children = [told.get(child) for child, *_ in (*valued, *volatile)]
            if all(c is not None for c in children):
                any_seen = children[0]
                for other in children[1:]:
                    any_seen = any_seen | other
                precision = torch.where(any_seen, precision, self._idle(n, state, dt) if like else pi_hat[n])
                if not like:
                    told[n] = any_seen
        precision = precision.clamp_max(network.max_precision)
        return (mean if first_mean else mu_hat[n] + force / precision), precision

    def _idle(self, n: str, state: dict[str, Any], dt: Any) -> Tensor:
        """pyhgf's precision of a node that saw nothing: its parents' means are those before the step."""
        total = self.tonic[n]
        for parent, kappa, _ in self.volatility_parents[n]:
            total = total + (state[parent][0] if kappa is None else kappa * state[parent][0])
        return (state[n][1].reciprocal() + _times(total.exp(), dt)).reciprocal()


def unbounded_update(mu: Tensor, pi: Tensor, kappa: Any, omega: Tensor, dt: Any, variance: Tensor, child: Tensor, seen: Tensor) -> Any:
    """Mean and precision of a volatility parent, from its prediction (mu, pi).

    Its child had ``variance`` before the step and the predicted precision ``child``; ``seen`` is the expected square of the child's step,
    ``1/pi_child + delta^2``.
    """
    most = 0.5 * math.log(torch.finfo(mu.dtype).max)  # exponents beyond have no gradient
    offset = omega + (math.log(dt) if isinstance(dt, float) else dt.log())  # the child walks with log-variance kappa x + offset
    at = kappa * mu + offset
    w = torch.sigmoid(at - variance.log())  # the share of the walk in the child's predicted variance
    pi1 = pi + 0.5 * kappa**2 * w * (1 - w)
    mu1 = mu + kappa * w / (2 * pi1) * (child * seen - 1)

    scaled = pi / kappa**2
    top = at + _LambertOfExp.apply(seen.log() - (2 * scaled).log() + 0.5 / scaled - at) - 0.5 / scaled
    x = (top - offset) / kappa  # near the mode
    walk = top.clamp_max(most).exp()
    w = torch.sigmoid(top - variance.log())
    error = seen / (variance + walk) - 1
    full = pi + 0.5 * kappa**2 * w * (w + (2 * w - 1) * error)
    pi2 = torch.where(full > 0, full, pi + 0.5 * kappa**2 * w * (1 - w))
    mu2 = x + (0.5 * kappa * w * error - pi * (x - mu)) / pi2

    fine = torch.isfinite(pi2) & torch.isfinite(mu2)
    pi2, mu2 = torch.where(fine, pi2, pi1), torch.where(fine, mu2, mu1)

    def energy(mean: Tensor) -> Tensor:
        total = variance + (kappa * mean + offset).clamp_max(most).exp()
        return -0.5 * (total.log() + seen / total + pi * (mean - mu) ** 2)

    share = torch.sigmoid(energy(mu2) - energy(mu1))
    spread = (1 - share) / pi1 + share / pi2 + share * (1 - share) * (mu1 - mu2) ** 2
    return (1 - share) * mu1 + share * mu2, spread.reciprocal()


class _LambertOfExp(torch.autograd.Function):
    """``w`` with ``w + log w = x``: Lambert's W of exp(x), which itself may be too large for a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        w = torch.nn.functional.softplus(x).clamp_min(1e-300)
        for _ in range(5):
            w = w * (1 + x - w.log()) / (1 + w)
        ctx.save_for_backward(w)
        return w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (w,) = ctx.saved_tensors
        return grad * w / (1 + w)


def _curved(strength: Tensor, psi: Tensor | None, slope: Tensor, bend: Tensor, delta: Tensor) -> Tensor:
    if psi is None:
        return strength * (slope * slope - bend * delta)
    return strength * (psi * psi * slope * slope - psi * bend * delta)


def _derivatives(fn: Function, x: Tensor) -> tuple[Tensor, Tensor]:
    """g' and g'' of a function that acts on each element."""
    keep = torch.is_grad_enabled() and x.requires_grad
    with torch.enable_grad():
        x = x if keep else x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(fn(x).sum(), x, create_graph=True)
        bend = torch.zeros_like(x)
        if slope.requires_grad:
            (found,) = torch.autograd.grad(slope.sum(), x, create_graph=keep, retain_graph=True, allow_unused=True)
            bend = bend if found is None else found
    return (slope, bend) if keep else (slope.detach(), bend.detach())


def _unless(parameter: Tensor, neutral: float) -> Tensor | None:
    """None for a fixed parameter that changes nothing."""
    return None if not parameter.requires_grad and bool((parameter == neutral).all()) else parameter


def _times(value: Tensor, dt: Any) -> Tensor:
    return value if isinstance(dt, float) and dt == 1.0 else value * dt


def _dt(dt: Any, series: Tensor) -> Any:
    """A number, or a list over time."""
    if dt is None or isinstance(dt, (int, float)):
        value = 1.0 if dt is None else float(dt)
        if not value > 0 or math.isinf(value):
            raise BadInput(f"dt must be positive, not {dt}")
        return value
    dt = torch.as_tensor(dt, dtype=series.dtype, device=series.device)
    if dt.ndim == 0:
        return _dt(float(dt), series)
    if dt.shape[-1] != series.shape[-2] or not bool((torch.isfinite(dt) & (dt > 0)).all()):
        raise BadInput(f"dt must be positive, one a step: shape (..., {series.shape[-2]}), not {tuple(dt.shape)}")
    return list(dt.unbind(-1))


def _stacked(plan: _Plan, shape: torch.Size, history: Mapping[str, list[tuple[Tensor, ...]]], like: Tensor) -> dict[str, list[Tensor]]:
    """Each node's four quantities, (time, ...); contiguous with time last would take five times as long to write."""

    def stack(parts: Sequence[Tensor]) -> Tensor:
        if all(p is parts[0] for p in parts):
            return parts[0].expand(shape).expand(len(parts), *shape)
        return torch.stack([p.expand(shape) for p in parts])

    empty = [like.new_zeros(0, *shape)] * 4
    return {n: [stack(part) for part in zip(*h)] if h else empty for n, h in history.items()}


CHUNK = 8  # longer ones are a little faster and take longer to compile


def _steps(plan: _Plan, shape: torch.Size, dts: list[Any], values: list[Any], xs: list[Any], masks: list[Any]) -> Any:
    """What is compiled: a few steps as a function of tensors."""
    state = dict(zip(plan.states, values))
    history: dict[str, list[tuple[Tensor, ...]]] = {n: [] for n in plan.order}
    for dt, x, mask in zip(dts, xs, masks):
        plan.step(dt, state, x, mask, history)
    return [state[n] for n in plan.states], _stacked(plan, shape, history, plan.tonic[plan.states[0]])


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    return torch.compile(_steps, dynamic=False)


def _first_impossible(precisions: Mapping[str, Tensor]) -> tuple[str, int] | None:
    found = []
    for name, p in precisions.items():
        p = p.detach()
        if not bool((p > 0).all()):
            found.append((int((~(p > 0)).flatten(0, -2).any(0).nonzero()[0] if p.ndim > 1 else (~(p > 0)).nonzero()[0]), name))
    return None if not found else (min(found)[1], min(found)[0])


def surprise(trajectory: Trajectory, *, noise: bool = True) -> Tensor:
    """Negative log predictive density of what was observed, (..., time), summed over the inputs; 0 where nothing was.

    ``noise``: the predictive variance of a continuous input includes its own noise, as it must for a likelihood; without, it is the
    quantity that pyhgf reports.
    """
    network, total = trajectory.network, 0.0
    for name in network.inputs:
        x, expected = trajectory.mean[name], trajectory.expected_mean[name]
        observed = ~torch.isnan(x)
        if trajectory.bad is not None:
            observed = observed | torch.isnan(expected)  # stays NaN
        x = torch.where(observed, x, expected)
        if network.nodes[name].kind == "binary":
            part = -(x * expected.log() + (1 - x) * (-expected).log1p())
        else:
            variance = 1 / trajectory.expected_precision[name] if noise else 0.0
            for edge in network.edges:
                if edge.child == name:
                    slope = network.strengths[edge.key]
                    if edge.fn is not None:
                        slope = slope * _derivatives(edge.fn, trajectory.expected_mean[edge.parent])[0]
                    variance = variance + slope**2 / trajectory.expected_precision[edge.parent]
            part = 0.5 * (math.log(2 * math.pi) + variance.log() + (x - expected) ** 2 / variance)
        total = total + torch.where(observed, part, torch.zeros_like(part))
    return total


def HGF(
    levels: int = 2,
    kind: str = "continuous",
    update: str = "ehgf",
    *,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    precision: Sequence[float] = (1.0, 1.0, 1.0),
    tonic_volatility: Sequence[float] = (-3.0, -3.0, -3.0),
    coupling: Sequence[float] = (1.0, 1.0),
    input_precision: float = 1e4,
    **options: Any,
) -> HGFNetwork:
    """The usual hierarchies: a continuous input ``u`` under ``level1`` whose volatility is ``level2`` (and ``level3`` of that), or a binary
    input ``u``, itself the first level, under ``level2`` whose volatility is ``level3``. Sequences count from level 1. A single continuous
    level is the Kalman filter.
    """
    if kind not in ("continuous", "binary") or levels not in ((1, 2, 3) if kind == "continuous" else (2, 3)):
        raise BadInput(f"levels must be 1, 2 or 3 (2 or 3 where kind is 'binary', not 'continuous'), not {levels!r} and {kind!r}")
    network = HGFNetwork(update=update, **options)
    network.add_input("u", kind, precision=input_precision if kind == "continuous" else 1.0)
    first = 1 if kind == "continuous" else 2
    for i in range(first, levels + 1):
        network.add_continuous(f"level{i}", mean=mean[i - 1], precision=precision[i - 1], tonic_volatility=tonic_volatility[i - 1])
    network.value(f"level{first}", "u")
    for i in range(first, levels):
        network.volatility(f"level{i + 1}", f"level{i}", coupling[i - 1])
    return network


@dataclass(frozen=True)
class HGFLearner(Learner):
    """Maximise the evidence (minus the surprise) over chosen parameters of a network, by gradients through the filter.

    Args:
        parameters: names as in ``network.named_parameters()``, or their ends: ``"tonic_volatility"`` is that of every hidden node,
            ``"level1.tonic_volatility"`` one node's, ``"level2->level1"`` an edge's strength.
        optimizer: makes the optimizer.
        clip: largest norm of the whole gradient; surprising series have steep places.

    Batches are ``(series, observed)``: series as :meth:`HGFNetwork.run` takes them (or a tuple with dt), and a mask of the same shape, or
    one number a series that is not 0 for series to use. The loss is the mean surprise of an observation.
    """

    parameters: Sequence[str] = ("tonic_volatility",)
    optimizer: Callable[..., Optimizer] = ADAM
    clip: float | None = 1.0

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        if not isinstance(model, HGFNetwork):
            raise UnsupportedModel("must be an HGFNetwork: only a filter has a surprise", module=type(model).__name__)
        if device is not None:
            model.to(device)
        before = {p: p.requires_grad for p in model.parameters()}
        try:
            for p in model.parameters():
                p.requires_grad_(False)
            for p in self.chosen(model):
                p.requires_grad_(True)
            optimizer = self.optimizer(trainable(model))

            def step(x: Any, y: Tensor) -> tuple[Tensor, None]:
                optimizer.zero_grad()
                loss = mean_surprise(model, x, y)
                if torch.isfinite(loss):
                    loss.backward()
                    if self.clip is not None:
                        nn.utils.clip_grad_norm_(trainable(model), self.clip)
                    optimizer.step()
                return loss, None

            def evaluator(data: Any) -> dict[str, float]:
                with torch.no_grad():
                    parts = [(float(mean_surprise(model, x, y)), len(y)) for x, y in data]
                if not parts:
                    raise BadInput("the loader yielded no samples to evaluate on")
                return {"loss": sum(a * n for a, n in parts) / sum(n for _, n in parts)}

            return loop(
                model, loader, epochs=epochs, step=step, parts={"optimizer": optimizer}, val=val, evaluator=evaluator,
                forward=partial(_inspect, model), seed=seed, callbacks=callbacks, resume=resume,
            )  # fmt: skip
        finally:
            for p, wanted in before.items():
                p.requires_grad_(wanted)

    def chosen(self, model: HGFNetwork) -> list[nn.Parameter]:
        found: dict[str, nn.Parameter] = {}
        named = dict(model.named_parameters())
        hidden = [n for n in named if not n.startswith(tuple(f"nodes.{i}." for i in model.inputs))]
        for wanted in self.parameters:
            exact = [n for n in named if n == wanted or n.endswith(f".{wanted}")]
            matches = [n for n in exact if n in hidden] or exact
            if not matches:
                raise BadInput(f"no parameter is called {wanted!r}; there are {sorted(named)}")
            found |= {n: named[n] for n in matches}
        if not found:
            raise BadInput("parameters is empty: there is nothing to learn")
        return list(found.values())


def mean_surprise(network: HGFNetwork, x: Any, y: Tensor) -> Tensor:
    series, dt = x if isinstance(x, tuple) else (x, None)
    if y.shape == series.shape:
        mask = y.bool()
    elif y.shape == series.shape[:1]:
        mask = y.bool().view(-1, *[1] * (series.ndim - 1)).expand(series.shape)
    else:
        raise BadInput(f"y is a mask of the series' shape {tuple(series.shape)}, or one number a series; got {tuple(y.shape)}")
    if not bool(mask.any()):
        raise BadInput("the mask leaves nothing to learn from")
    return surprise(network.run(series, dt, mask, strict=False)).sum() / mask.sum()


def _inspect(network: HGFNetwork, x: Tensor, dt: Any = None) -> None:
    """Show each node's precision to whatever watches the nodes, the node that failed first."""
    trajectory = network.run(torch.nan_to_num(x), dt, strict=False)
    names = sorted(trajectory.precision, key=lambda n: trajectory.bad is None or n != trajectory.bad[0])
    for name in names:
        network.nodes[name](trajectory.precision[name])


def adapt_structure(
    network: HGFNetwork,
    series: Tensor,
    edits: Sequence[Callable[[HGFNetwork], Any]],
    *,
    threshold: float,
    window: int = 50,
    gain: float = 3.0,
) -> tuple[HGFNetwork, Tensor, list[tuple[int, int]]]:
    """Filter one series window by window and change the network's structure where it is surprised.

    When the mean surprise of a window exceeds ``threshold``, each edit (a function that changes a network) is tried on a copy that filters
    the window again from the same beliefs; the edit of the largest evidence is kept if it gains more than ``gain`` nats.

    Returns:
        the network at the end (the given one is not changed), the surprise of every step *as it was filtered first*, so that an edit pays
        only for what comes after it, and the edits that were kept: (step at which the new structure began, index of the edit).
    """
    if window < 1 or len(series) < 1:
        raise BadInput(f"window must be at least 1 and the series not empty; got {window} and length {len(series)}")
    network, start, kept, parts = deepcopy(network), None, [], []
    with torch.no_grad():
        for at in range(0, len(series), window):
            piece = series[at : at + window]
            run = network.run(piece, start=start)
            parts.append(surprise(run))
            if float(parts[-1].mean()) > threshold and at + window < len(series):
                best = (float(parts[-1].sum()) - gain, None, network, run)
                for i, edit in enumerate(edits):
                    other = deepcopy(network)
                    try:
                        with other.edit():
                            edit(other)
                        again = other.run(piece, start=start)
                    except BadInput:
                        continue  # an edit that does not fit this structure, or leaves the domain
                    found = (float(surprise(again).sum()), i, other, again)
                    best = min(best, found, key=lambda b: b[0])
                if best[1] is not None:
                    network, run = best[2], best[3]
                    kept.append((at + window, best[1]))
            start = run.last
    return network, torch.cat(parts), kept
