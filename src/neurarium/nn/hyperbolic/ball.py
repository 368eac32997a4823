"""The Poincaré ball: vectors that add, move and average in hyperbolic space, with hand-written gradients.

The ball of curvature -c holds the points with ``c |x|^2 < 1``; lengths at x are stretched by ``lambda_x = 2 / (1 - c |x|^2)``, so that
the border is infinitely far and a tree's exponentially many leaves find room. Its "addition" and its maps to flat space are

    x (+) y = [(1 + 2c<x,y> + c|y|^2) x + (1 - c|x|^2) y] / (1 + 2c<x,y> + c^2 |x|^2 |y|^2)               (Möbius addition)
    exp0(v) = tanh(sqrt c |v|) v / (sqrt c |v|),   exp_x(v) = x (+) exp0(lambda_x v / 2)                   (exponential map)
    log0(y) = artanh(sqrt c |y|) y / (sqrt c |y|), log_x(y) = 2/lambda_x log0(-x (+) y)                    (logarithm)
    d(x, y) = 2 |log0(-x (+) y)|,                  PT_{x->y} v = lambda_x/lambda_y gyr[y, -x] v            (distance, transport)
    midpoint = 1/2 (x) sum_i w_i lambda_i x_i / sum_i w_i (lambda_i - 1)                                   (gyromidpoint)

As chains of elementary operations these keep ten intermediate tensors each for the backward pass. With ``exact=True`` addition, the
radial maps and the moments of the midpoint have backward passes derived by hand, which keep their inputs alone and are differentiable
again; everything else is composed of them. ``exact=False`` is the same arithmetic under plain autograd.

*Source*: van Spengler, Berkhout, Mettes, "Poincaré ResNet" (2023); the operations are those of Ungar and of Ganea et al. (2018).

*Departures*: the curvature may be learned (its gradient is part of every backward pass). Radial functions are functions of the squared
norm with a Taylor branch, so that gradients of any order are finite at the origin.

*Cost*: every operation acts on the last axis and is elementwise. Points are kept inside ``sqrt c |x| <= 1 - eps`` with eps = 4e-3 in
float32 and 1e-5 in float64; half precision computes in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput
from neurarium.nn.autograd import exact_function
from neurarium.nn.hyperbolic.smooth import atanhc, tanhc

__all__ = ["PoincareBall", "border"]

_BORDER = {torch.float64: 1e-5, torch.float32: 4e-3}


def border(dtype: torch.dtype) -> float:
    """How far below 1 the largest ``sqrt c |x|`` lies."""
    return _BORDER[dtype]


def wide(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute in float32 what comes in half precision, and without autocast."""

    @wraps(op)
    def run(self, *args, **options):
        dtype = next(a.dtype for a in args if isinstance(a, Tensor))
        if dtype in _BORDER:
            return op(self, *args, **options)
        out = op(self, *(a.float() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args), **options)
        return out.to(dtype)

    return run


def _square(x: Tensor) -> Tensor:
    return (x * x).sum(-1, keepdim=True)


# Radial maps x -> g(c |x|^2) x. Each gain returns its value and, if asked, its slope.

Gain = Callable[[Tensor, bool], tuple[Tensor, Tensor]]


def _exp_gain(q: Tensor, sloped: bool) -> tuple[Tensor, Tensor]:
    """tanh(sqrt q)/sqrt q, not beyond the border."""
    f, slope = tanhc.slope(q) if sloped else (tanhc(q), q)
    return _bounded(q, f, slope, f * f * q, sloped)


def _inside_gain(q: Tensor, sloped: bool) -> tuple[Tensor, Tensor]:
    """1, not beyond the border."""
    return _bounded(q, torch.ones_like(q), torch.zeros_like(q), q, sloped)


def _bounded(q: Tensor, f: Tensor, slope: Tensor, reached: Tensor, sloped: bool) -> tuple[Tensor, Tensor]:
    most = 1 - border(q.dtype)
    over = reached > most * most
    far = torch.where(over, q, 1)
    safe = most * far.rsqrt()
    return torch.where(over, safe, f), torch.where(over, -0.5 * safe / far, slope) if sloped else slope


def _log_gain(q: Tensor, sloped: bool) -> tuple[Tensor, Tensor]:
    """artanh(sqrt q)/sqrt q, finite on the unit sphere and beyond."""
    most = 1 - (1e-6 if q.dtype == torch.float32 else 1e-14)
    if not sloped:
        return atanhc(q.clamp(max=most)), q
    f, slope = atanhc.slope(q.clamp(max=most))
    return f, torch.where(q < most, slope, 0)


def _radial(gain: Gain) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """(exact, plain) forms of ``(x, c) -> gain(c |x|^2) x``."""

    def forward(x: Tensor, c: Tensor) -> Tensor:
        return gain(c * _square(x), False)[0] * x

    def backward(kept, u):
        x, c = kept
        r = _square(x)
        g, slope = gain(c * r, True)
        along = slope * (u * x).sum(-1, keepdim=True)
        return torch.addcmul(g * u, 2 * c * along, x), (along * r).sum()

    return exact_function(forward, backward, lambda inputs, out: inputs), forward


_EXP0, _LOG0, _PROJECT = _radial(_exp_gain), _radial(_log_gain), _radial(_inside_gain)


def _add_forward(x: Tensor, y: Tensor, c: Tensor) -> Tensor:
    xx, yy, xy = _square(x), _square(y), (x * y).sum(-1, keepdim=True)
    d = _denominator(xx, yy, xy, c)
    z = torch.addcmul((1 + 2 * c * xy + c * yy) / d * x, (1 - c * xx) / d, y)
    return _inside_gain(c * _square(z), False)[0] * z


def _denominator(xx: Tensor, yy: Tensor, xy: Tensor, c: Tensor) -> Tensor:
    return (1 + 2 * c * xy + c * c * xx * yy).clamp_min(1e-15)


def _add_backward(kept, u):
    """With the two brackets of the addition over its denominator D as a, b; p = <u,x>, q = <u,y> and t = a p + b q."""
    x, y, c = kept
    xx, yy, xy = _square(x), _square(y), (x * y).sum(-1, keepdim=True)
    a, b, d = 1 + 2 * c * xy + c * yy, 1 - c * xx, _denominator(xx, yy, xy, c)
    # first back through the projection of the sum z onto the ball
    a, b = a / d, b / d
    z = torch.addcmul(a * x, b, y)
    zz = _square(z)
    g, slope = _inside_gain(c * zz, True)
    along = slope * (u * z).sum(-1, keepdim=True)
    dc = (along * zz).sum()
    u = torch.addcmul(g * u, 2 * c * along, z)
    p, q = (u * x).sum(-1, keepdim=True), (u * y).sum(-1, keepdim=True)
    t, k = a * p + b * q, 2 * c / d
    dx = torch.addcmul(torch.addcmul(a * u, -k * (t * c * yy + q), x), k * (p - t), y)
    dy = torch.addcmul(torch.addcmul(b * u, k * (p - t), x), k * (p - c * xx * t), y)
    dc = dc + (((2 * xy + yy) * p - xx * q - t * (2 * xy + 2 * c * xx * yy)) / d).sum()
    return dx, dy, dc


_ADD = exact_function(_add_forward, _add_backward, lambda inputs, out: inputs), _add_forward


def _scale_parts(x: Tensor, t: Tensor, c: Tensor):
    """g = tanh(t artanh r)/r as a function of q = r^2, its slopes in q and in t; r = sqrt c |x|."""
    q = (c * _square(x)).clamp(max=1 - (1e-6 if x.dtype == torch.float32 else 1e-14))
    a, a_slope = atanhc.slope(q)
    h, h_slope = tanhc.slope(t * t * q * a * a)
    in_q = t * a_slope * h + t**3 * a * h_slope * (a * a + 2 * q * a * a_slope)
    in_t = a * h + 2 * t * t * q * a**3 * h_slope
    return t * a * h, in_q, in_t


def _scale_forward(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    return _scale_parts(x, t, c)[0] * x


def _scale_backward(kept, u):
    x, t, c = kept
    g, in_q, in_t = _scale_parts(x, t, c)
    p = (u * x).sum(-1, keepdim=True)
    return g * u + 2 * c * in_q * p * x, (in_t * p).sum(), (in_q * p * _square(x)).sum()


_SCALE = exact_function(_scale_forward, _scale_backward, lambda inputs, out: inputs), _scale_forward


def _moments_forward(x: Tensor, w: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """sum_i w_i lambda_i x_i and sum_i w_i (lambda_i - 1) over the last axis but one."""
    lam = 2 / (1 - c * _square(x))
    return (w * lam * x).sum(-2), (w * (lam - 1)).sum(-2)


def _moments_backward(kept, u, v):
    x, w, c = kept
    u, v = u.unsqueeze(-2), v.unsqueeze(-2)
    r = _square(x)
    lam = 2 / (1 - c * r)
    p = (u * x).sum(-1, keepdim=True)
    slope = 0.5 * lam * lam * w * (p + v)  # of the value in lambda, times d lambda / d(c r)
    return w * lam * u + 2 * c * slope * x, (lam * p + (lam - 1) * v), (slope * r).sum()


_MOMENTS = exact_function(_moments_forward, _moments_backward, lambda inputs, out: inputs), _moments_forward


class PoincareBall(nn.Module):
    """The ball ``{x : c |x|^2 < 1}`` along the last axis of every tensor. ``learnable``: c = exp(parameter) is trained along.

    ``exact=False`` runs the same arithmetic under plain autograd. One ball may be shared by any number of layers.
    """

    def __init__(self, c: float = 1.0, learnable: bool = False, *, exact: bool = True) -> None:
        super().__init__()
        if not 0 < c < float("inf"):
            raise BadInput(f"the ball needs a finite c > 0, got {c}; c -> 0 is flat space")
        self.exact, self.learnable = exact, learnable
        if learnable:
            self.log_c = nn.Parameter(torch.tensor(float(c)).log())
        else:
            self.register_buffer("_c", torch.tensor(float(c), dtype=torch.float64))  # exact in every dtype of the points

    @property
    def c(self) -> Tensor:
        """The negative curvature, a scalar tensor."""
        return self.log_c.exp() if self.learnable else self._c

    def _run(self, op: tuple[Callable[..., Tensor], Callable[..., Tensor]], *args: Tensor) -> Tensor:
        c = self.c.to(args[0].dtype)
        exact = self.exact and not torch.compiler.is_compiling()
        return op[0 if exact else 1](*args, c)

    @wide
    def project(self, x: Tensor) -> Tensor:
        """The nearest point inside the ball's numerical border."""
        return self._run(_PROJECT, x)

    @wide
    def expmap0(self, v: Tensor) -> Tensor:
        """The point reached from the origin along v."""
        return self._run(_EXP0, v)

    @wide
    def logmap0(self, y: Tensor) -> Tensor:
        """The vector that leads from the origin to y."""
        return self._run(_LOG0, y)

    @wide
    def mobius_add(self, x: Tensor, y: Tensor) -> Tensor:
        """x (+) y: y moved by the translation that takes the origin to x."""
        x, y = torch.broadcast_tensors(x, y)
        return self._run(_ADD, x, y)

    @wide
    def mobius_scale(self, x: Tensor, t: Tensor) -> Tensor:
        """t (x) x for a scalar t: the point at t times the distance from the origin."""
        return self.project(self._run(_SCALE, x, torch.as_tensor(t, dtype=x.dtype, device=x.device)))

    def scale_at(self, x: Tensor) -> Tensor:
        """lambda_x, with the last axis kept."""
        return 2 / (1 - self.c * _square(x))

    @wide
    def expmap(self, x: Tensor, v: Tensor) -> Tensor:
        """The point reached from x along the tangent vector v."""
        return self.mobius_add(x, self.expmap0(self.scale_at(x) * v / 2))

    @wide
    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """The tangent vector at x that leads to y."""
        return 2 / self.scale_at(x) * self.logmap0(self.mobius_add(-x, y))

    @wide
    def gyration(self, a: Tensor, b: Tensor, v: Tensor) -> Tensor:
        """gyr[a, b] v = -(a (+) b) (+) (a (+) (b (+) v)): the rotation by which Möbius addition fails to be associative."""
        c = self.c.to(v.dtype)
        aa, bb, ab = _square(a), _square(b), (a * b).sum(-1, keepdim=True)
        av, bv = (a * v).sum(-1, keepdim=True), (b * v).sum(-1, keepdim=True)
        of_a = -c * c * av * bb + c * bv + 2 * c * c * ab * bv
        of_b = -c * c * bv * aa - c * av
        return v + 2 * (of_a * a + of_b * b) / _denominator(aa, bb, ab, c)

    @wide
    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Parallel transport of the tangent vector v from x to y along the geodesic."""
        return self.scale_at(x) / self.scale_at(y) * self.gyration(y, -x, v)

    @wide
    def dist(self, x: Tensor, y: Tensor) -> Tensor:
        """Geodesic distance; where x = y its gradient is zero."""
        square = self.dist_squared(x, y)
        apart = square > 0
        return torch.where(apart, torch.where(apart, square, 1).sqrt(), 0)

    @wide
    def dist_squared(self, x: Tensor, y: Tensor) -> Tensor:
        """Squared geodesic distance, smooth everywhere."""
        return 4 * _square(self.logmap0(self.mobius_add(-x, y))).squeeze(-1)

    @wide
    def geodesic(self, t: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """The point at the share t of the way from x to y."""
        return self.mobius_add(x, self.mobius_scale(self.mobius_add(-x, y), t))

    @wide
    def midpoint(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """The gyromidpoint of the points along the last axis but one, (..., n, d) -> (..., d), in closed form.

        It minimises ``sum_i w_i (cosh(sqrt c d(x_i, m)) - 1)``, where the Fréchet mean minimises ``sum_i w_i d^2``.
        """
        w = x.new_ones(x.shape[:-1]) if weights is None else weights.expand(x.shape[:-1])
        above, below = self._run(_MOMENTS, x, w[..., None])
        m = above / below
        return self.project(m / (1 + (1 - self.c.to(x.dtype) * _square(m)).clamp_min(1e-15).sqrt()))

    def extra_repr(self) -> str:
        return f"c={self.c.item():.4g}, learnable={self.learnable}, exact={self.exact}"
