"""The nonlinearity of hyperbolic linear layers, from inner products to points, as one operation with a hand-written gradient.

Output k of a hyperbolic linear layer is the (scaled, signed) distance v_k to a hyperplane with orientation z_k and offset r_k:

    v_k = 2|z_k|/sqrt c arsinh( lambda_x sqrt c <x, z_k>/|z_k| cosh(2 sqrt c r_k) - (lambda_x - 1) sinh(2 sqrt c r_k) )
    w_k = sinh(sqrt c v_k)/sqrt c,      y = w / (1 + sqrt(1 + c |w|^2))

All of it depends on the input through ``P_k = <x, z_k>`` and ``R = |x|^2`` alone. So the layer is an ordinary matrix product or convolution
for P, and this operation on (P, R, |z|, r, c), for which only those are kept.

Two identities make flat features cheap. For ``x = exp0(u)``: ``lambda_x sqrt c x = sinh(2 sqrt c |u|) u/|u|`` and
``lambda_x - 1 = cosh(2 sqrt c |u|)``; and ``log0(y) = arsinh(sqrt c |w|)/2 w/(sqrt c |w|)``. A layer between tangent spaces at the
origin therefore never forms x or y: ``into`` and ``out`` say in which form features come and go.
"""

from __future__ import annotations

from functools import lru_cache
from math import atanh
from typing import Literal

import torch
from torch import Tensor

from neurarium.nn.autograd import exact_function
from neurarium.nn.hyperbolic.ball import border
from neurarium.nn.hyperbolic.smooth import arsinh, asinhc, sinhc

__all__ = ["Into", "Out", "gyroplane"]

Into = Literal["ball", "tangent"]
Out = Literal["ball", "tangent", "scores"]
_STEEP = 36.0  # arguments of the last sinh are cut here, far outside of the border: its square still fits into float32


def gyroplane(p: Tensor, square: Tensor, norm: Tensor, r: Tensor, c: Tensor, *, into: Into, out: Out, exact: bool = True) -> Tensor:
    """(..., k) from p (..., k), square (..., 1), norm (k,), r (k,) and the curvature. ``out="scores"`` gives the distances v."""
    functions = _functions(into, out, c.requires_grad)
    return functions[0 if exact and not torch.compiler.is_compiling() else 1](p, square, norm, r, c)


def _enter(square: Tensor, c: Tensor, into: Into) -> tuple[Tensor, Tensor]:
    """e and h with lambda_x sqrt c <x, z> = e P and lambda_x - 1 = h."""
    if into == "ball":
        lam = 2 / (1 - c * square)
        return lam * c.sqrt(), lam - 1
    q, cut, _ = _cut(square, c)
    f = sinhc(q)
    return 2 * c.sqrt() * cut * f, (1 + q * f * f).sqrt()


def _cut(square: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(2 sqrt c |u|)^2, not beyond the border of the ball; the factor by which u is shortened for that; where."""
    most = (2 * atanh(1 - border(square.dtype))) ** 2
    q = 4 * c * square
    over = q > most
    return q.clamp(max=most), torch.where(over, (most / torch.where(over, q, most)).sqrt(), 1), over


def _enter_slopes(square: Tensor, c: Tensor, into: Into) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """de/dR, de/dc, dh/dR, dh/dc."""
    s = c.sqrt()
    if into == "ball":
        lam = 2 / (1 - c * square)
        half = lam * lam / 2
        return s * half * c, s * half * square + lam / (2 * s), half * c, half * square
    q, cut, over = _cut(square, c)
    f, slope = sinhc.slope(q)
    far = -s * cut * f / torch.where(over, square, 1)  # e is proportional to 1/sqrt R there, and h is constant
    in_square, in_c = torch.where(over, far, 8 * s * c * slope), torch.where(over, 0, f / s + 8 * s * square * slope)
    h_slope = torch.where(over, 0, 2 * f * (f + 2 * q * slope) / (1 + q * f * f).sqrt())  # dh/dq times 4
    return in_square, in_c, h_slope * c, h_slope * square


def _leave(q: Tensor, out: Out) -> Tensor:
    """y/w as a function of c |w|^2."""
    most = 1 - border(q.dtype)
    if out == "ball":
        gain, limit = 1 / (1 + (1 + q).sqrt()), most
    else:
        gain, limit = asinhc(q) / 2, atanh(most)
    over = gain * gain * q > limit * limit
    return torch.where(over, limit * torch.where(over, q, 1).rsqrt(), gain)


def _leave_slope(q: Tensor, out: Out) -> tuple[Tensor, Tensor]:
    most = 1 - border(q.dtype)
    if out == "ball":
        root = (1 + q).sqrt()
        gain, limit = 1 / (1 + root), most
        slope = -0.5 * gain * gain / root
    else:
        gain, slope = (t / 2 for t in asinhc.slope(q))
        limit = atanh(most)
    over = gain * gain * q > limit * limit
    safe = torch.where(over, q, 1)
    return torch.where(over, limit * safe.rsqrt(), gain), torch.where(over, -0.5 * limit * safe**-1.5, slope)


def _sum_to_last(t: Tensor) -> Tensor:
    return t.sum(tuple(range(t.dim() - 1)))


@lru_cache
def _functions(into: Into, out: Out, curved: bool):
    """The operation and its plain twin. ``curved``: the gradient for c is wanted."""

    def forward(p: Tensor, square: Tensor, norm: Tensor, r: Tensor, c: Tensor) -> Tensor:
        s = c.sqrt()
        e, h = _enter(square, c, into)
        turn = 2 * s * r
        theta = 2 * norm * arsinh(torch.addcmul(p * e * (turn.cosh() / norm), h, turn.sinh(), value=-1))
        if out == "scores":
            return theta / s
        steep = theta.clamp(-_STEEP, _STEEP).sinh()  # sqrt c w
        return steep * (_leave((steep * steep).sum(-1, keepdim=True), out) / s)

    def backward(kept, u):
        p, square, norm, r, c = kept
        s = c.sqrt()
        e, h = _enter(square, c, into)
        turn = 2 * s * r
        ch, sh = turn.cosh(), turn.sinh()
        lead = p * e * (1 / norm)
        a = torch.addcmul(lead * ch, h, sh, value=-1)
        arc = arsinh(a)
        dc = c.new_zeros(())
        if out == "scores":
            dtheta = u / s
            if curved:
                dc = -(u * norm * arc).sum() / (c * s)
        else:
            steep = (2 * norm * arc).clamp(-_STEEP, _STEEP).sinh()
            squares = steep * steep
            gain, slope = _leave_slope(squares.sum(-1, keepdim=True), out)
            along = (u * steep).sum(-1, keepdim=True)
            # y = gain(|steep|^2) steep / s; beyond the cut the gradient is that of the uncut function
            dtheta = torch.addcmul(u * (gain / s), steep, 2 * slope * along / s) * (1 + squares).sqrt()
            if curved:
                dc = -0.5 * (gain * along).sum() / (c * s)
        da = dtheta * torch.rsqrt(1 + a * a) * (2 * norm)
        bent = da * lead
        rows = _sum_to_last(bent)
        dnorm = 2 * _sum_to_last(arc * dtheta) - rows * ch / norm
        dturn = rows * sh - _sum_to_last(da * h) * ch
        de, dh = (bent @ ch).unsqueeze(-1) / e, -(da @ sh).unsqueeze(-1)
        e_square, e_c, h_square, h_c = _enter_slopes(square, c, into)
        if curved:
            dc = dc + (de * e_c + dh * h_c).sum() + (dturn * r).sum() / s
        return da * (ch / norm) * e, de * e_square + dh * h_square, dnorm, 2 * s * dturn, dc

    return exact_function(forward, backward, lambda inputs, output: inputs), forward
