"""Two-stage second-order training of a network with one hidden layer, with an optimal gain for every input.

The outputs are linear in the output weights, so those are *solved* at each iteration (output weight optimization, OWO). What is left is a
direction for the hidden weights and a step length. Multiplying the inputs by a matrix A before training changes neither what the network
can compute nor what it computes, but it changes the gradient step: mapped back, the step is the old one times ``R = A'A``. So the inputs'
scaling is a free choice of R, and it can be made anew at each iteration by a small Newton problem: a diagonal R is one gain an input.

*Equations.* Inputs with a one appended ``x`` (N+1), net functions ``n = W x``, ``O = f(n)``, outputs ``y = W_oi x + W_oh O``, error
``E = mean_p sum_i (t_pi - y_pi)^2`` over Nv patterns.

- *OWO*: least squares of t on the basis ``b = [x, O]``: ``R W_o' = C``, ``R = mean b b'``, ``C = mean b t'``.
- *Direction*, BP: ``G = mean_p delta_p x_p'``, ``delta_p(k) = f'(n_pk) sum_i 2 (t_pi - y_pi) w_oh(i, k)``.
  HWO (hidden weight optimization): ``G R_x^-1`` with ``R_x = mean x x'``, which is BP on whitened inputs.
- *Step* ``W + z G`` with the Gauss-Newton factor ``z``, or with gains ``W + G diag(r)``, ``H r = g``:
  ``dy_i/dr(m) = x_m sum_k w_oh(i, k) f'(n_k) g(k, m)``, ``g(m) = 2 mean_p sum_i (t - y) dy_i/dr(m)``,
  ``H(m, u) = 2 mean_p sum_i dy_i/dr(m) dy_i/dr(u)``. The gain of the appended one is among them; gains may be negative.

After the step, OWO again. Where E would rise the step is halved. The same with one factor a hidden unit instead of one an input is
``molf`` (multiple optimal learning factors).

*Source.* "Optimal Input Gain" (arXiv 2303.17732); OWO-BP, HWO and the factors are earlier work of the same group.

*Departures.* The linear systems are solved by Cholesky with a relative ridge instead of orthogonal least squares, in float64 whatever the
model's type. Halving is our safeguard. Any elementwise activation, several outputs and networks without the direct weights ``W_oi`` are
taken, and integer classes (one-hot targets).

*Cost.* The gains need one product of the inputs' size with the hidden layer for each output, and an (N+1)-system: a fraction of an
iteration, whose greatest part is OWO. ``history.extra["multiplies"]`` counts them. Full batch only: an epoch is one iteration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap
from torch.nn import functional as F

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.chain import as_chain
from neurarium.learn.fit import Learner, device_of, evaluate, forked_rng, is_classes, loop, to, trainable
from neurarium.learn.local import generator_state
from neurarium.roles import History, Loader

__all__ = [
    "OIGBP", "OIGHWO", "OWOBP", "OWOHWO", "TwoLayerMLP", "TwoStage", "levenberg_marquardt", "net_control_", "output_weights",
]  # fmt: skip

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


class TwoLayerMLP(nn.Module):
    """``output(f(hidden(x))) + bypass(x)``: one hidden layer, and direct weights from the inputs to the outputs.

    Args:
        bypass: with the direct weights; without them this is ``Sequential(Linear, activation, Linear)``.
        activation: a name in ``ACTIVATIONS`` or a module that acts on each element alone.
    """

    def __init__(
        self, n_in: int, n_hidden: int, n_out: int, bypass: bool = True, activation: str | nn.Module = "sigmoid", *, dtype: Any = None
    ) -> None:
        super().__init__()
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise BadInput(f"activation {activation!r} is not one of {sorted(ACTIVATIONS)}; a module is welcome too")
        self.hidden = nn.Linear(n_in, n_hidden, dtype=dtype)
        self.activation = ACTIVATIONS[activation]() if isinstance(activation, str) else activation
        self.output = nn.Linear(n_hidden, n_out, dtype=dtype)
        self.bypass = nn.Linear(n_in, n_out, bias=False, dtype=dtype) if bypass else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.output(self.activation(self.hidden(x)))
        return y if self.bypass is None else y + self.bypass(x)


@dataclass(frozen=True)
class TwoStage(Learner):
    """Solve the output weights, move the hidden ones by a second-order step, again and again, on all data at once.

    Args:
        direction: of the hidden weights: ``"bp"`` (the gradient) or ``"hwo"`` (the gradient on whitened inputs).
        gains: one optimal gain an input; without, one optimal factor for the whole step.
        ridge: added to the normalised matrices of the linear systems, which have ones on the diagonal; 0 solves them by the
            singular values, exactly and more slowly.
        molf: one optimal factor a hidden unit, instead of gains (``gains=False``).
        max_halvings: of a step that raises the error; then the iteration changes nothing.
        net_control: first scale each hidden unit so that its net function has mean 0.5 and deviation 1 on the data.

    ``fit`` takes ``TwoLayerMLP`` and every model that is a linear layer, an elementwise activation and a linear layer in this order. The
    loader is read once and joined; an epoch is an iteration, its loss the mean squared error after it. Targets are (n, outputs), or
    integer classes, which become one-hot.
    """

    direction: str = "hwo"
    gains: bool = True
    ridge: float = field(default=1e-8, kw_only=True)
    molf: bool = field(default=False, kw_only=True)
    max_halvings: int = field(default=20, kw_only=True)
    net_control: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        if self.direction not in ("bp", "hwo"):
            raise BadInput(f"direction must be 'bp' or 'hwo', not {self.direction!r}")
        if self.molf and self.gains:
            raise BadInput("molf (a factor a hidden unit) takes the place of gains (a factor an input): set gains=False")
        if self.ridge < 0 or self.max_halvings < 0:
            raise BadInput(f"ridge={self.ridge} and max_halvings={self.max_halvings} must not be negative")

    def fit(self, model, loader, *, epochs, val=None, device=None, seed=0, callbacks=(), resume=None) -> History:
        if device is not None:
            model.to(device)
        with forked_rng(device_of(model)):
            torch.manual_seed(seed)
            x, y = _joined(loader, device_of(model))
        problem, trace = _Problem(model, x, y), _Trace()

        def step(_x: Tensor, _y: Tensor) -> tuple[Tensor, Tensor]:
            return self.iterate(problem, trace)

        history = loop(
            model, [(x, y)], epochs=epochs, step=step, parts={"trace": trace}, val=val,
            evaluator=partial(evaluate, model, loss=squared_error), seed=seed, callbacks=callbacks, resume=resume,
        )  # fmt: skip
        lists = history.state["parts"]["trace"]
        return replace(history, extra={**history.extra, "multiplies": tuple(lists["multiplies"]), "halvings": tuple(lists["halvings"])})

    @torch.no_grad()
    def iterate(self, p: _Problem, trace: _Trace) -> tuple[Tensor, Tensor]:
        """One iteration; the error and the outputs after it."""
        work = 0
        if not trace.multiplies:
            if self.net_control:
                net_control_(p.model, p.x)
            p.solve_output(p.hidden_weights(), self.ridge)
            work = p.work["forward"] + p.work["owo"] + (p.work["whiten"] if self.direction == "hwo" else 0)
        w = p.hidden_weights()
        n, o = p.hidden_outputs(w)
        outputs = p.outputs(o)
        error = p.error(outputs)
        halvings = 0
        if torch.isfinite(error):  # otherwise the loop says so
            old = p.saved()
            update, spent = self.update(p, w, n, outputs)
            work += p.work["direction"] + spent
            while True:
                new, o = p.solve_output(w + update, self.ridge)
                work += p.work["forward"] + p.work["owo"]
                if new <= error:
                    error, outputs = new, p.outputs(o)
                    break
                p.restore(old)
                if halvings == self.max_halvings:
                    break
                update, halvings = update / 2, halvings + 1
        trace.multiplies.append(work + (trace.multiplies[-1] if trace.multiplies else 0))
        trace.halvings.append(halvings)
        return error / p.t.shape[1], outputs.to(p.y.dtype if p.y.is_floating_point() else torch.float32)

    def update(self, p: _Problem, w: Tensor, n: Tensor, outputs: Tensor) -> tuple[Tensor, int]:
        """The change of the hidden weights, and the multiplications for its factors."""
        slope = derivative(p.activation, n)
        g = direction(p.a, slope, p.t - outputs, p.output_on_hidden())
        if self.direction == "hwo":
            g = solve_gram(p.a, g.T * len(p.a), self.ridge).T  # G R_x^-1
        if self.molf:
            gradient, hessian = unit_factors(p.a, slope, p.t - outputs, p.output_on_hidden(), g)
            return symmetric_solve(hessian, gradient)[:, None] * g, p.work["molf"]
        if self.gains:
            gradient, hessian = input_gains(p.a, slope, p.t - outputs, p.output_on_hidden(), g)
            return g * symmetric_solve(hessian, gradient), p.work["gains"]
        return g * step_factor(p.a, slope, p.t - outputs, p.output_on_hidden(), g), p.work["factor"]


OWOBP = partial(TwoStage, "bp", False)
OWOHWO = partial(TwoStage, "hwo", False)
OIGBP = partial(TwoStage, "bp", True)
OIGHWO = partial(TwoStage, "hwo", True)


def direction(a: Tensor, slope: Tensor, residual: Tensor, w_oh: Tensor) -> Tensor:
    """Negative gradient of the error by the hidden weights (hidden, inputs). ``a``: inputs (n, inputs), ``slope``: f' (n, hidden)."""
    delta = slope * (2 * residual @ w_oh)
    return delta.T @ a / len(a)


def input_gains(a: Tensor, slope: Tensor, residual: Tensor, w_oh: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Negative gradient and Gauss-Newton Hessian of the error by the gains r of ``W + g diag(r)``, at r = 0."""
    gradient, hessian = a.new_zeros(a.shape[1]), a.new_zeros(a.shape[1], a.shape[1])
    for i in range(len(w_oh)):
        dy = a * ((slope * w_oh[i]) @ g)  # (n, inputs)
        gradient += dy.T @ residual[:, i]
        hessian += dy.T @ dy
    return 2 * gradient / len(a), 2 * hessian / len(a)


def step_factor(a: Tensor, slope: Tensor, residual: Tensor, w_oh: Tensor, g: Tensor) -> Tensor:
    """The Gauss-Newton step length z of ``W + z g``."""
    dy = (slope * (a @ g.T)) @ w_oh.T  # (n, outputs)
    curvature = dy.square().sum()
    return (dy * residual).sum() / torch.where(curvature > 0, curvature, torch.ones_like(curvature))


def unit_factors(a: Tensor, slope: Tensor, residual: Tensor, w_oh: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Negative gradient and Gauss-Newton Hessian by the factors z of ``W + diag(z) g``."""
    moved = slope * (a @ g.T)  # (n, hidden)
    gradient = (moved * (residual @ w_oh)).sum(0)
    return 2 * gradient / len(a), 2 * (moved.T @ moved) * (w_oh.T @ w_oh) / len(a)


def output_weights(x: Tensor, o: Tensor, t: Tensor, ridge: float = 1e-8) -> Tensor:
    """Least squares of the targets on the basis ``[x, o]``: (outputs, columns of x + columns of o)."""
    basis = torch.cat([x, o], 1)
    return solve_gram(basis, basis.T @ t, ridge, target=t).T


def solve_gram(basis: Tensor, right: Tensor, ridge: float, *, target: Tensor | None = None) -> Tensor:
    """``(B'B)^-1 right``, with ``ridge`` on the diagonal after B's columns were scaled to length one; by singular values where it is 0.

    ``target``: ``right`` is B' times it, so that without a ridge this is plain least squares, and nothing is squared.
    """
    length = basis.norm(dim=0)
    length = torch.where(length > 0, length, torch.ones_like(length))
    scaled = basis / length
    if ridge == 0:
        inverse = torch.linalg.pinv(scaled, rtol=1e-12)
        return (inverse @ (target if target is not None else inverse.T @ (right / length[:, None]))) / length[:, None]
    gram = scaled.T @ scaled
    gram.diagonal().add_(ridge)
    return torch.cholesky_solve(right / length[:, None], torch.linalg.cholesky(gram)) / length[:, None]


def symmetric_solve(matrix: Tensor, right: Tensor) -> Tensor:
    """Least-norm solution in the scale of a unit diagonal: dependent inputs leave the matrix singular."""
    scale = matrix.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    values, vectors = torch.linalg.eigh(matrix * inverse * inverse[:, None])
    kept = values > 1e-12 * values[-1].clamp_min(1e-300)
    reciprocal = torch.where(kept, 1 / values, torch.zeros_like(values))
    return inverse * (vectors @ (reciprocal * (vectors.T @ (inverse * right))))


def derivative(activation: Callable[[Tensor], Tensor], n: Tensor) -> Tensor:
    with torch.enable_grad():
        n = n.detach().requires_grad_()
        return torch.autograd.grad(activation(n).sum(), n)[0]


@torch.no_grad()
def net_control_(model: nn.Module, x: Tensor, *, mean: float = 0.5, std: float = 1.0) -> nn.Module:
    """Scale each hidden unit of ``model`` in place so that its net function has this mean and deviation on ``x``."""
    hidden = _layers(model, x)[1]
    n = hidden(x.flatten(1)).double()
    spread = n.std(0, correction=0)
    scale = torch.where(spread > 1e-12, std / spread, torch.ones_like(spread))
    hidden.weight.mul_(scale[:, None])
    if hidden.bias is not None:
        hidden.bias.copy_(hidden.bias * scale + mean - n.mean(0) * scale)
    return model


def squared_error(output: Tensor, y: Tensor) -> Tensor:
    """Mean squared error; integer classes are one-hot targets."""
    return F.mse_loss(output, _targets(y, output.shape[1], output.dtype))


def levenberg_marquardt(model: nn.Module, x: Tensor, t: Tensor, *, iters: int, damping: float = 1e-2, max_tries: int = 10) -> History:
    """Levenberg-Marquardt on the squared error of any model, in place: ``(J'J + damping diag(J'J)) d = J'(t - y)``.

    The damping is divided by ten after a step that lowers the error and multiplied by ten before another try. Time and memory grow with
    the square of the number of parameters.
    """
    trainable(model)
    params = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    others = {k: v.detach() for k, v in (*model.named_parameters(), *model.named_buffers()) if k not in params}
    if not torch.isfinite(x).all() or not torch.isfinite(t).all():
        raise BadInput("x and t must be finite")
    shapes = [p.shape for p in params.values()]
    size, n, outputs = sum(s.numel() for s in shapes), len(x), t.shape[1]

    def run(vector: Tensor, rows: Tensor) -> Tensor:
        parts = [v.view(s) for v, s in zip(vector.split([s.numel() for s in shapes]), shapes)]
        return functional_call(model, others | dict(zip(params, parts)), (rows,))

    jacobian = vmap(jacrev(lambda v, row: run(v, row[None])[0]), (None, 0))
    vector = torch.cat([p.flatten() for p in params.values()])
    residual = t - run(vector, x)
    error, train, spent, work = residual.square().sum(), [], [], 0
    for _ in range(iters):
        began = time.perf_counter()
        j = jacobian(vector, x).reshape(-1, size)
        normal, right = j.T @ j, j.T @ residual.reshape(-1)
        work += 2 * size * n * outputs + n * outputs * size * (size + 1) // 2
        for _ in range(max_tries):
            damped = normal + torch.diag(damping * normal.diagonal().clamp_min(1e-12))
            factor, failed = torch.linalg.cholesky_ex(damped)
            work += size**3 // 6 + size**2 + n * size
            if not failed:
                candidate = vector + torch.cholesky_solve(right[:, None], factor)[:, 0]
                left = t - run(candidate, x)
                if left.square().sum() < error:
                    vector, residual, error, damping = candidate, left, left.square().sum(), max(damping / 10, 1e-12)
                    break
            damping = min(10 * damping, 1e12)
        train.append({"loss": float(error) / t.numel(), "seconds": time.perf_counter() - began})
        spent.append(work)
    with torch.no_grad():
        for p, v in zip(params.values(), vector.split([s.numel() for s in shapes])):
            p.copy_(v.view_as(p))
    return History(tuple(train), (), iters, {"loss": [e["loss"] for e in train], "multiplies": spent}, {})


class _Trace:
    """What a run counted so far."""

    def __init__(self) -> None:
        self.multiplies: list[int] = []
        self.halvings: list[int] = []

    def state_dict(self) -> dict[str, Any]:
        return {"multiplies": list(self.multiplies), "halvings": list(self.halvings)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.multiplies, self.halvings = list(state["multiplies"]), list(state["halvings"])


class _Problem:
    """A model, its data in float64, and the weights as matrices on inputs with a one appended."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        self.model, self.x, self.y = model, x, y
        self.activation, self.hidden, self.output, self.bypass = _layers(model, x)
        self.t = _targets(y, self.output.out_features, torch.float64)
        flat = x.flatten(1).double()
        one = flat.new_ones(len(x), 1)
        self.a = flat if self.hidden.bias is None else torch.cat([flat, one], 1)
        linear = [part for part, used in ((flat, self.bypass), (one, self.output.bias)) if used is not None]
        self.linear = torch.cat([*linear, one[:, :0]], 1)  # the part of the output's basis that never changes
        n, inputs, hidden, outputs = len(x), self.a.shape[1], self.hidden.out_features, self.t.shape[1]
        basis = self.linear.shape[1] + hidden
        whitening = inputs**3 // 6 + n * inputs * (inputs + 1) // 2
        self.work = {  # multiplications
            "forward": n * (inputs * hidden + basis * outputs),
            "owo": n * basis * (basis + 1) // 2 + n * basis * outputs + basis**3 // 6 + outputs * basis**2,
            "direction": n * (outputs * hidden + 2 * hidden + hidden * inputs),
            "whiten": whitening,
            "gains": outputs * n * (hidden + hidden * inputs + 2 * inputs + inputs * (inputs + 1) // 2) + inputs**3 // 6,
            "factor": n * (hidden * inputs + hidden + outputs * hidden + 2 * outputs),
            "molf": n * (hidden * inputs + 2 * hidden + outputs * hidden + hidden * (hidden + 1) // 2) + hidden**3 // 6,
        }

    def hidden_weights(self) -> Tensor:
        w = self.hidden.weight.detach().double()
        return w if self.hidden.bias is None else torch.cat([w, self.hidden.bias.detach().double()[:, None]], 1)

    def output_on_hidden(self) -> Tensor:
        return self.output.weight.detach().double()

    def hidden_outputs(self, w: Tensor) -> tuple[Tensor, Tensor]:
        n = self.a @ w.T
        return n, self.activation(n)

    def outputs(self, o: Tensor) -> Tensor:
        y = o @ self.output_on_hidden().T
        if self.bypass is not None:
            y = y + self.x.flatten(1).double() @ self.bypass.weight.double().T
        return y if self.output.bias is None else y + self.output.bias.double()

    def error(self, outputs: Tensor) -> Tensor:
        return (self.t - outputs).square().sum() / len(self.t)

    def solve_output(self, w: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
        """Write these hidden weights and their best output weights into the model; the error, and the hidden outputs, of what it holds."""
        features = self.hidden.in_features
        self.hidden.weight.copy_(w[:, :features])
        if self.hidden.bias is not None:
            self.hidden.bias.copy_(w[:, features])
        o = self.hidden_outputs(self.hidden_weights())[1]
        if not torch.isfinite(o).all():
            return o.new_tensor(torch.inf), o
        solved = output_weights(self.linear, o, self.t, ridge)
        constant = self.linear.shape[1]
        self.output.weight.copy_(solved[:, constant:])
        if self.bypass is not None:
            self.bypass.weight.copy_(solved[:, :features])
        if self.output.bias is not None:
            self.output.bias.copy_(solved[:, constant - 1])
        return self.error(self.outputs(o)), o

    def saved(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]

    def restore(self, old: list[Tensor]) -> None:
        for p, v in zip(self.model.parameters(), old):
            p.copy_(v)


def _targets(y: Tensor, outputs: int, dtype: torch.dtype) -> Tensor:
    if is_classes(y.new_empty(len(y), outputs), y):
        if len(y) and not 0 <= int(y.min()) <= int(y.max()) < outputs:
            raise BadInput(f"y holds classes {int(y.min())} to {int(y.max())}, but the model has {outputs} outputs")
        return F.one_hot(y.long(), outputs).to(dtype)
    if y.shape != (len(y), outputs):
        raise BadInput(f"y has shape {tuple(y.shape)}; the model's {outputs} outputs need ({len(y)}, {outputs}), or integer classes")
    return y.to(dtype)


def _joined(loader: Loader, device: torch.device) -> tuple[Tensor, Tensor]:
    """All batches in one; the loader's order is as before afterwards."""
    state = generator_state(loader)
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    batches = [(x, y) for x, y in loader]
    if state is not None:
        loader.generator.set_state(state)  # type: ignore[attr-defined]
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(0)
    if not sum(len(x) for x, _ in batches):
        raise BadInput("the loader yielded no samples")
    if not all(isinstance(x, Tensor) for x, _ in batches):
        raise BadInput("two-stage training needs batches (x, y) of one input tensor")
    x, y = (to(torch.cat(part), device) for part in zip(*batches))
    if not torch.isfinite(x).all() or not torch.isfinite(y).all():
        raise BadInput("x or y holds a value that is not finite")
    return x, y


def _layers(model: nn.Module, x: Tensor) -> tuple[Callable[[Tensor], Tensor], nn.Linear, nn.Linear, nn.Linear | None]:
    """Activation, hidden, output and direct layer of a model that the rule can train."""
    if frozen := [n for n, p in model.named_parameters() if not p.requires_grad]:
        raise UnsupportedModel("is frozen; both layers are trained here", module=frozen[0].rpartition(".")[0])
    if isinstance(model, TwoLayerMLP):
        named: dict[str, nn.Module] = {n: getattr(model, n) for n in ("hidden", "activation", "output")}
        bypass = model.bypass
    else:
        chain = as_chain(model, x[:2])
        named = {n: model.get_submodule(n) for group in chain.names for n in group}
        if isinstance(next(iter(named.values())), nn.Flatten):
            del named[next(iter(named))]
        bypass = None
    names, modules = list(named), list(named.values())
    for i, kind in enumerate((nn.Linear, nn.Module, nn.Linear)):
        if i >= len(modules):
            raise UnsupportedModel("one hidden layer is trained: Linear, activation, Linear; here is less", module=names[-1])
        if not isinstance(modules[i], kind):
            raise UnsupportedModel(f"must be a Linear (Linear, activation, Linear), is a {type(modules[i]).__name__}", module=names[i])
    if len(modules) > 3:
        raise UnsupportedModel("one hidden layer is trained: Linear, activation, Linear; this is one module too many", module=names[3])
    hidden, activation, output = modules
    _elementwise(activation, hidden.out_features, names[1])
    return activation, hidden, output, bypass


def _elementwise(activation: nn.Module, width: int, name: str) -> None:
    """Refuse what mixes units or samples, draws, or learns."""
    why = None
    n = torch.linspace(-2, 2, 3 * width, dtype=torch.float64).view(3, width)
    other = n.clone()
    other[0, 0] += 0.5
    if next(activation.parameters(), None) is not None:
        why = "has parameters of its own"
    else:
        with torch.no_grad(), forked_rng(torch.device("cpu")):
            before, after = activation(n), activation(other)
        if before.shape != n.shape:
            why = "changes the shape"
        elif not torch.equal(before.flatten()[1:], after.flatten()[1:]):
            why = "does not act on each element alone, or draws at random"
    if why:
        raise UnsupportedModel(f"{why}; the activation must be a fixed function of each element", module=name)
