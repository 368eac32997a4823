"""Auto-regression as a network, and as least squares.

AR-Net writes the auto-regression ``y_t = c + sum_i w_i y_{t-i} + e_t`` as one linear layer trained by stochastic gradients. Its weights
*are* the AR coefficients, its cost is linear in the order p, and a penalty that is steep near zero and flat for large weights
makes them sparse, so that the order need not be known.

    loss = data loss + lambda(progress) R(w)
    R(w) = mean_i [ 2 / (1 + exp(-c1 |w_i|^(1/c2))) - 1 ] = mean_i tanh(c1 |w_i|^(1/c2) / 2)
    lambda(progress) = reg_strength (1/s - 1) min(1, 2 progress),   s = expected share of non-zero coefficients

*Source*: Triebe, Laptev, Rajagopal, "AR-Net: A simple Auto-Regressive Neural Network for time-series" (2019); the regulariser and its
schedule as in the authors' later code.

*Departures*: ``c1 = c2 = 2`` by default: with the first publication's 3, the cube root's slope near zero makes Adam's steps there as
large as the learning rate. Under the root ``|w|`` is ``|w| + 1e-6``, less the root at 0: R(0) = 0, with a finite gradient there.
``fit`` anneals the rate to nearly nothing (one cycle), because the penalty swings weights about zero by one rate. Series
are standardised inside: the coefficients have no scale, lambda has.

*Cost*: O(N p) an epoch. Least squares by QR is O(N p^2), Yule-Walker O(N log N + p^2), and :class:`ClassicAR`'s normal equations, which
use that the lags are shifts of one series, O(N p + p^3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Diverged
from neurarium.roles import History
from neurarium.sequence.accuracy import DieboldMariano, diebold_mariano, directional_accuracy, mae, mase, rmse, seasonal_naive, smape
from neurarium.sequence.windows import Scaler, Windows

__all__ = [
    "ARNet",
    "ClassicAR",
    "DieboldMariano",
    "Scaler",
    "Windows",
    "diebold_mariano",
    "directional_accuracy",
    "mae",
    "mase",
    "rmse",
    "seasonal_naive",
    "smape",
    "stpe",
]

LOSSES = {"mse": functional.mse_loss, "huber": functional.huber_loss}
EPS = 1e-6


class ARNet(nn.Module):
    """A linear (or, with ``hidden`` sizes, ReLU) network from the last ``order`` values to the next ``horizon``.

    ``forward``: (batch, order), oldest first -> (batch, horizon), both in the units of the series that :meth:`fit` saw.
    ``sparsity`` is the share of coefficients that is expected to matter, in (0, 1]; None or 1 means no penalty. ``reg_c`` = (c1, c2).
    """

    def __init__(
        self,
        order: int,
        horizon: int = 1,
        *,
        hidden: Sequence[int] = (),
        sparsity: float | None = None,
        reg_c: tuple[float, float] = (2.0, 2.0),
        reg_strength: float = 0.05,
        loss: Literal["mse", "huber"] = "mse",
    ) -> None:
        super().__init__()
        if min(order, horizon, *hidden) < 1:
            raise BadInput(f"order, horizon and hidden sizes are at least 1, got {order}, {horizon}, {tuple(hidden)}")
        if sparsity is not None and not 0 < sparsity <= 1:
            raise BadInput(f"sparsity is the share of non-zero coefficients, in (0, 1], not {sparsity}")
        if loss not in LOSSES:
            raise BadInput(f"loss is one of {', '.join(LOSSES)}, not {loss!r}")
        self.order, self.horizon, self.loss = order, horizon, loss
        self.sparsity, self.reg_c, self.reg_strength = sparsity, reg_c, reg_strength
        sizes = [order, *hidden, horizon]
        self.layers = nn.ModuleList([nn.Linear(i, o) for i, o in pairwise(sizes)])
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.order:
            raise BadInput(f"the input is (batch, {self.order}), the last values of the series, not {tuple(x.shape)}")
        return self.mean + self.scale * self._network((x - self.mean) / self.scale)

    def _network(self, z: Tensor) -> Tensor:
        """The forecast in standardised units."""
        for layer in self.layers[:-1]:
            z = functional.relu(layer(z))
        return self.layers[-1](z)

    def penalty(self, weight: Tensor) -> Tensor:
        """R(w): 0 at 0, concave in \\|w\\|, near 1 for large weights."""
        c1, c2 = self.reg_c
        return torch.tanh(c1 / 2 * ((weight.abs() + EPS) ** (1 / c2) - EPS ** (1 / c2))).mean()

    def strength(self, progress: float) -> float:
        """lambda at a share ``progress`` of the training: grows linearly up to half of it."""
        if self.sparsity is None:
            return 0.0
        return self.reg_strength * (1 / self.sparsity - 1) * min(1.0, 2 * progress)

    def regulariser(self, progress: float) -> Tensor:
        """lambda(progress) R(w), to add to the loss in a training loop of one's own."""
        return self.strength(progress) * self.penalty(self.layers[0].weight)

    @property
    def coefficients(self) -> Tensor:
        """(horizon, order), lag 1 first: the weights in reverse, as the last input is the most recent value."""
        self._linear("coefficients")
        return self.layers[0].weight.detach().flip(1).clone()

    @property
    def intercept(self) -> Tensor:
        """(horizon,) the constant c, in the units of the series."""
        self._linear("an intercept")
        weight, bias = self.layers[0].weight.detach(), self.layers[0].bias.detach()
        return self.mean * (1 - weight.sum(1)) + self.scale * bias

    def _linear(self, what: str) -> None:
        if len(self.layers) > 1:
            raise UnsupportedModel(f"a network with hidden layers has no {what} of an auto-regression", module="ARNet")

    def fit(
        self, series: Tensor, *, epochs: int = 20, lr: float = 1e-2, batch_size: int = 128, seed: int = 0, val: Tensor | None = None
    ) -> History:
        """Train on all windows of ``series`` (time,) by Adam with one learning-rate cycle; goes on from the present weights.

        ``lr`` is the peak rate, at a quarter of the training. ``val`` is a later series, whose loss is noted after each epoch. Losses in
        the history are of the standardised series, without the penalty. Mean and scale are those of ``series``.

        Raises ``BadInput`` for a series that is too short, constant, or not finite, and ``Diverged`` where the loss becomes NaN.
        """
        like = self.layers[0].weight
        windows = _univariate(series, self.order, self.horizon, self.order + self.horizon)
        if epochs < 1 or batch_size < 1:
            raise BadInput(f"epochs and batch_size are at least 1, got {epochs} and {batch_size}")
        scaler = Scaler().fit(series.double())
        if not (series != series[0]).any():
            raise BadInput("the series is constant: there is nothing to regress on")
        self.mean.copy_(scaler.mean)
        self.scale.copy_(scaler.scale)
        rows = scaler.transform(series.double()).to(like).unfold(0, self.order + self.horizon, 1)
        held_out = None if val is None else Windows(scaler.transform(val.double()).to(like), self.order, self.horizon)
        steps = epochs * math.ceil(len(windows) / batch_size)
        optimizer = torch.optim.Adam(self.parameters(), lr=lr, fused=True)
        criterion, generator = LOSSES[self.loss], torch.Generator().manual_seed(seed)
        train, validation, step = [], [], 0
        for epoch in range(epochs):
            order = torch.randperm(len(rows), generator=generator).to(rows.device)
            total = torch.zeros((), device=rows.device)
            for batch in order.split(batch_size):
                both = rows.index_select(0, batch)  # the windows are copied here and nowhere else
                loss = criterion(self._network(both[:, : self.order]), both[:, self.order :])
                total += loss.detach() * len(batch)
                if (strength := self.strength(step / steps)) > 0:
                    loss = loss + strength * self.penalty(self.layers[0].weight)
                optimizer.zero_grad()
                loss.backward()
                optimizer.param_groups[0]["lr"] = _one_cycle(step / steps, lr)
                optimizer.step()
                step += 1
            train.append({"loss": total.item() / len(rows)})
            if not math.isfinite(train[-1]["loss"]):
                raise Diverged(f"the loss is not finite in epoch {epoch}; a smaller lr than {lr:g} may help", step=step, module=None)
            if held_out is not None:
                with torch.no_grad():
                    validation.append({"loss": criterion(self._network(held_out.x), held_out.y).item()})
        return History(tuple(train), tuple(validation), step)

    @torch.no_grad()
    def forecast(self, series: Tensor, steps: int) -> Tensor:
        """The next ``steps`` values after (..., time): direct up to ``horizon``, beyond it on the model's own forecasts."""
        return _roll(series.to(self.mean), steps, self.order, self).to(series)

    def extra_repr(self) -> str:
        return f"order={self.order}, horizon={self.horizon}, sparsity={self.sparsity}, loss={self.loss}"


class ClassicAR:
    """The classical estimators of ``y_t = c + sum_i w_i y_{t-i} + e_t``.

    ``method``: ``"ols"`` least squares by QR; ``"normal"`` least squares by normal equations, whose entries follow from each other by
    shifting; ``"yule-walker"`` (biased autocovariances by FFT, Levinson's recursion, always stationary); ``"burg"``.
    ``criterion``: ``"aic"`` or ``"bic"`` chooses the order among 1..``order``, all on the same rows; None takes ``order``.

    After :meth:`fit`: ``order``, ``coefficients`` (order,) lag 1 first, ``intercept``, ``noise_variance``.
    """

    def __init__(
        self, order: int, method: Literal["ols", "normal", "yule-walker", "burg"] = "ols", *, criterion: Literal["aic", "bic"] | None = None
    ) -> None:
        if method not in _METHODS:
            raise BadInput(f"method is one of {', '.join(_METHODS)}, not {method!r}")
        if order < 1 or criterion not in (None, "aic", "bic"):
            raise BadInput(f"order is at least 1 and criterion None, 'aic' or 'bic'; got {order} and {criterion!r}")
        self.max_order, self.method, self.criterion = order, method, criterion

    def fit(self, series: Tensor) -> ClassicAR:
        """Estimate from (time,), in float64. Raises ``BadInput`` for a series that is too short, constant or not finite."""
        _univariate(series, self.max_order, 1, 2 * self.max_order + 2)
        mean = series.double().mean()
        z = series.double() - mean
        if not z.any():
            raise BadInput("the series is constant: there is nothing to regress on")
        weights, offsets, variances, n = _METHODS[self.method](z, self.max_order)
        self.order = self.max_order
        if self.criterion is not None:
            price = 2.0 if self.criterion == "aic" else math.log(n)
            self.order = min(range(1, self.max_order + 1), key=lambda k: n * math.log(variances[k - 1]) + price * (k + 1))
        self.coefficients = weights(self.order)
        self.intercept = (mean * (1 - self.coefficients.sum()) + offsets(self.coefficients)).item()
        self.noise_variance = float(variances[self.order - 1])
        return self

    def predict(self, x: Tensor) -> Tensor:
        """One step ahead: (..., lags >= order), oldest first -> (..., 1)."""
        self._fitted()
        if x.shape[-1] < self.order:
            raise BadInput(f"a forecast of order {self.order} needs as many values of history, got {x.shape[-1]}")
        return (self.intercept + x[..., -self.order :].double() @ self.coefficients.flip(0))[..., None].to(x)

    def forecast(self, series: Tensor, steps: int) -> Tensor:
        """The next ``steps`` values after (..., time), each from the forecasts before it."""
        self._fitted()
        return _roll(series, steps, self.order, self.predict)

    def _fitted(self) -> None:
        if not hasattr(self, "coefficients"):
            raise BadInput("this auto-regression has no coefficients yet: call fit first")


def stpe(estimate: Tensor, truth: Tensor) -> float:
    """Symmetric total percentage error of coefficients: ``100 sum|estimate - truth| / sum(|estimate| + |truth|)``, in 0..100.

    The shorter of the two is taken to be zero beyond its order.
    """
    size = max(estimate.numel(), truth.numel())
    estimate, truth = (functional.pad(t.double().flatten(), (0, size - t.numel())) for t in (estimate, truth))
    return (100 * (estimate - truth).abs().sum() / (estimate.abs() + truth.abs()).sum()).item()


def _univariate(series: Tensor, order: int, horizon: int, needed: int) -> Windows:
    if series.dim() != 1:
        raise BadInput(f"an auto-regression takes one series (time,), not {tuple(series.shape)}")
    if len(series) < needed:
        raise BadInput(f"an auto-regression of order {order} with horizon {horizon} needs at least {needed} values, got {len(series)}")
    return Windows(series, order, horizon)


def _roll(series: Tensor, steps: int, order: int, predict) -> Tensor:
    """Append forecasts until there are ``steps`` of them."""
    if series.shape[-1] < order:
        raise BadInput(f"a forecast of order {order} needs as many values of history, got {series.shape[-1]}")
    known = series[..., series.shape[-1] - order :]
    if not torch.isfinite(known).all():
        raise BadInput(f"the last {order} values of the history hold a NaN or an infinity")
    while known.shape[-1] < order + steps:
        window = known[..., known.shape[-1] - order :]
        known = torch.cat([known, predict(window.reshape(-1, order)).reshape(*window.shape[:-1], -1)], -1)
    return known[..., order : order + steps]


def _one_cycle(progress: float, peak: float) -> float:
    """From peak/25 up to the peak at a quarter, then down to peak/1e4, by half cosines."""
    if progress < 0.25:
        low, share = peak / 25, 4 * progress
    else:
        low, share = peak / 1e4, (1 - progress) / 0.75
    return low + (peak - low) * (1 - math.cos(math.pi * share)) / 2


# Each method: (centred series, highest order) -> weights(k), shift of the intercept(w), noise variances of orders 1.., number of rows.


def _least_squares(z: Tensor, p: int, shifted: bool):
    """Least squares of all orders at once. R'R is the Gram matrix of the centred columns lag 1 .. lag p, y, and R of the QR or Cholesky
    decomposition holds the fit of order k in its leading block, what that leaves unexplained in its last column below."""
    rows = z.unfold(0, p + 1, 1)  # oldest first
    n = len(rows)
    if shifted:
        gram, sums = _shifted_gram(z, p)
        means = sums / n
        gram = (gram - n * means[:, None] * means).roll((-1, -1), (0, 1))  # y last
        r, failed = torch.linalg.cholesky_ex(gram, upper=True)
        if failed:
            raise BadInput("the lags are linearly dependent to working precision: lower the order, or use method='ols'")
    else:
        columns = torch.cat([rows[:, :-1].flip(1), rows[:, -1:]], 1)
        means = columns.mean(0).roll(1)  # y first
        r = torch.linalg.qr(columns - columns.mean(0), mode="r")[1]
        if (r.diagonal()[:p].abs() <= 1e-13 * r[0, 0].abs()).any():
            raise BadInput("the lags are linearly dependent: the series follows a recursion of lower order exactly; lower the order")
    unexplained = r[:, p].square().flip(0).cumsum(0).flip(0)

    def weights(k: int) -> Tensor:
        return torch.linalg.solve_triangular(r[:k, :k], r[:k, p:], upper=True)[:, 0]

    return weights, lambda w: means[0] - means[1 : len(w) + 1] @ w, (unexplained[1:] / n).clamp_min(1e-300).tolist(), n


def _shifted_gram(z: Tensor, p: int) -> tuple[Tensor, Tensor]:
    """``S_ij = sum_t z_{t-i} z_{t-j}`` and ``sum_t z_{t-i}`` over t = p.., i and j in 0..p: each diagonal gains a head and loses a tail."""
    n = len(z)
    head, tail = z[:p].flip(0), z[n - p :].flip(0)
    change = head[:, None] * head - tail[:, None] * tail
    gram = z.new_empty(p + 1, p + 1)
    gram[0] = gram[:, 0] = torch.stack([z[p:] @ z[p - j : n - j] for j in range(p + 1)])
    for i in range(p):
        gram[i + 1, 1:] = gram[i, :-1] + change[i]
    sums = z[p:].sum() + torch.cat([z.new_zeros(1), (head - tail).cumsum(0)])
    return gram, sums


def _yule_walker(z: Tensor, p: int):
    n = len(z)
    size = 1 << (n + p).bit_length()
    gamma = torch.fft.irfft(torch.fft.rfft(z, size).abs().square(), size)[: p + 1] / n
    paths, variances = _levinson(gamma, p)
    return (lambda k: paths[k - 1]), (lambda w: 0.0), variances.clamp_min(1e-300).tolist(), n


def _levinson(gamma: Tensor, p: int) -> tuple[list[Tensor], Tensor]:
    """Coefficients and noise variances of all orders up to p from the autocovariances (p + 1,)."""
    w, variance, paths, variances = gamma.new_zeros(0), gamma[0], [], []
    for k in range(p):
        reflection = (gamma[k + 1] - w @ gamma[1 : k + 1].flip(0)) / variance
        w = torch.cat([w - reflection * w.flip(0), reflection[None]])
        variance = variance * (1 - reflection * reflection)
        paths.append(w)
        variances.append(variance)
    return paths, torch.stack(variances)


def _burg(z: Tensor, p: int):
    n = len(z)
    forward, backward, variance = z[1:], z[:-1], z @ z / n
    w, paths, variances = z.new_zeros(0), [], []
    for _ in range(p):
        reflection = 2 * (forward @ backward) / (forward @ forward + backward @ backward).clamp_min(1e-300)
        w = torch.cat([w - reflection * w.flip(0), reflection[None]])
        variance = variance * (1 - reflection * reflection)
        forward, backward = (forward - reflection * backward)[1:], (backward - reflection * forward)[:-1]
        paths.append(w)
        variances.append(variance)
    return (lambda k: paths[k - 1]), (lambda w: 0.0), torch.stack(variances).clamp_min(1e-300).tolist(), n


_METHODS = {
    "ols": lambda z, p: _least_squares(z, p, shifted=False),
    "normal": lambda z, p: _least_squares(z, p, shifted=True),
    "yule-walker": _yule_walker,
    "burg": _burg,
}
