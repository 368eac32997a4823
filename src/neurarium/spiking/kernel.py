r"""A leaky integrate-and-fire layer over a whole sequence, as one autograd operation.

Per neuron and step, with leak :math:`\lambda`, threshold :math:`\theta` and input current :math:`x[t]`:

.. math::
   h[t] = \lambda v[t-1] + x[t], \qquad s[t] = H(h[t] - \theta), \qquad v[t] = \text{reset}(h[t], s[t])

===========  =============================================  ==========================================
``reset``    after a spike                                  :math:`J = dv/dh`
===========  =============================================  ==========================================
``soft``     :math:`v = h - \theta s`                       :math:`1`, or :math:`1 - \theta\sigma'`
``hard``     :math:`v = h + s (v_{reset} - h)`              :math:`1 - s`, or :math:`1 - s - (h - v_{reset})\sigma'`
``none``     :math:`v = h`                                  :math:`1`
``delayed``  :math:`h[t]=\lambda h[t-1]+x[t]-\theta s[t-1]` (soft, but after the leak; the carried state is :math:`h`)
===========  =============================================  ==========================================

(the second form of :math:`J` where the reset is not detached, :math:`\sigma'` being the surrogate at :math:`h-\theta`). The backward pass
is one reverse scan, :math:`d[t] = g_s[t]\sigma'(h[t]-\theta) + \lambda J[t] d[t+1]`, and the gradients of a learnable leak,
:math:`\sum_t d[t] v[t-1]`, and threshold come out of the same scan.

Only :math:`h` is kept for it: spikes, masks and the surrogate are functions of :math:`h`. A loop of ordinary operations
(:func:`lif_loop`: the same numbers, bit for bit) keeps several tensors a step and pays the dispatcher for each.
``detach_time=True`` leaves :math:`d[t+1]` out: every step is then differentiated as if its incoming membrane were a constant.

*Cost.* Time and memory linear in the number of steps; one tensor of the input's size is saved, none without gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from neurarium.errors import BadInput
from neurarium.spiking.surrogate import Surrogate, Triangle, spike

__all__ = ["Reset", "lif_loop", "lif_sequence"]

#: elements of one step that are run through all steps together on a CPU, per thread: a few such tensors fit into a core's cache
BLOCK = 2**17

Reset = Literal["soft", "hard", "none", "delayed"]


@dataclass(frozen=True)
class _Options:
    reset: str
    v_reset: float
    surrogate: Surrogate
    detach_reset: bool
    detach_time: bool
    strict: bool


def lif_sequence(
    x: Tensor,
    v0: Tensor | None = None,
    *,
    leak: float | Tensor,
    threshold: float | Tensor = 1.0,
    reset: Reset = "soft",
    v_reset: float = 0.0,
    surrogate: Surrogate | None = None,
    detach_reset: bool = True,
    detach_time: bool = False,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """Runs a layer of neurons over ``x``: (time, batch, ...) and returns spikes (time, batch, ...) and the last state (batch, ...).

    ``leak`` and ``threshold`` are numbers, or tensors that broadcast against one step and may require gradients. ``v0`` is the state that
    an earlier call returned (rest if None). ``strict`` fires at ``h > threshold`` instead of ``>=``. Not twice differentiable.
    """
    options = _options(x, v0, reset, v_reset, surrogate, detach_reset, detach_time, strict)
    if torch.compiler.is_compiling():  # export and compile see ordinary operations
        return _loop(x, v0, leak, threshold, options)
    if torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in (x, v0, leak, threshold)):
        return _Scan.apply(x, v0, leak, threshold, options)
    return _scan(x, v0, leak, threshold, options, keep=False)[:2]


def lif_loop(
    x: Tensor,
    v0: Tensor | None = None,
    *,
    leak: float | Tensor,
    threshold: float | Tensor = 1.0,
    reset: Reset = "soft",
    v_reset: float = 0.0,
    surrogate: Surrogate | None = None,
    detach_reset: bool = True,
    detach_time: bool = False,
    strict: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`lif_sequence` as a loop of differentiable operations: the reference for tests, and what export sees."""
    return _loop(x, v0, leak, threshold, _options(x, v0, reset, v_reset, surrogate, detach_reset, detach_time, strict))


def _options(x: Tensor, v0: Tensor | None, reset: str, v_reset: float, surrogate: Surrogate | None, *flags: bool) -> _Options:
    if reset not in ("soft", "hard", "none", "delayed"):
        raise BadInput(f"reset must be 'soft', 'hard', 'none' or 'delayed', not {reset!r}")
    if x.dim() < 2 or x.shape[0] == 0:
        raise BadInput(f"a spiking layer takes (time, batch, ...) with at least one step, not {tuple(x.shape)}")
    if not x.is_floating_point():
        raise BadInput(f"a spiking layer takes floating-point currents, not {x.dtype}")
    if v0 is not None and v0.shape != x.shape[1:]:
        raise BadInput(f"the state has shape {tuple(v0.shape)}, one step of the input has {tuple(x.shape[1:])}")
    return _Options(reset, v_reset, surrogate or Triangle(), *flags)


def _loop(x: Tensor, v0: Tensor | None, leak: float | Tensor, threshold: float | Tensor, options: _Options) -> tuple[Tensor, Tensor]:
    v = torch.zeros_like(x[0]) if v0 is None else v0
    o, spikes = options, []
    for x_t in x:
        if o.detach_time:
            v = v.detach()
        h = leak * v + x_t
        if o.reset == "delayed":
            late = threshold * _fire(v - threshold, o, o.detach_reset)
            h = h - (late.detach() if o.detach_time else late)
        s = _fire(h - threshold, o)
        r = s.detach() if o.detach_reset else s
        v = h - threshold * r if o.reset == "soft" else h + r * (o.v_reset - h) if o.reset == "hard" else h
        spikes.append(s)
    return torch.stack(spikes), v


def _fire(x: Tensor, o: _Options, detach: bool = False) -> Tensor:
    s = spike(x, o.surrogate)
    if o.strict:  # the value changes where x == 0, the derivative does not
        s = s - (x.detach() == 0).to(x.dtype)
    return s.detach() if detach else s


def _reached(h: Tensor, threshold: Any, strict: bool, out: Tensor) -> Tensor:
    # A comparison can write 0/1 straight into a float tensor, which is several times faster than a mask and a cast.
    return (torch.gt if strict else torch.ge)(h, threshold, out=out)


def _subtract(h: Tensor, s: Tensor, threshold: Any, out: Tensor) -> Tensor:
    if isinstance(threshold, Tensor):
        return torch.addcmul(h, s, threshold, value=-1, out=out)
    return torch.add(h, s, alpha=-threshold, out=out)


def _reset(h: Tensor, s: Tensor, threshold: Any, o: _Options, out: Tensor) -> Tensor:
    if o.reset == "soft":
        return _subtract(h, s, threshold, out)
    if o.reset == "hard":
        return torch.addcmul(h, s, h - o.v_reset if o.v_reset else h, value=-1, out=out)
    return out.copy_(h)


def _scan(x: Tensor, v0: Tensor | None, leak: Any, threshold: Any, o: _Options, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The forward pass: spikes, the last state, and h of every step (of one, if not to be kept)."""
    leak, threshold = (a.detach() if isinstance(a, Tensor) else a for a in (leak, threshold))
    spikes, hs = _fresh(x, len(x)), _fresh(x, len(x) if keep else 1)
    last = torch.empty_like(x[0])
    start = torch.zeros_like(last) if v0 is None else v0.detach()
    for rows in _blocks(x, leak, threshold):
        v, out = start[rows], last[rows]
        currents, outputs, membranes = (a[:, rows].unbind() for a in (x, spikes, hs))
        for t, (x_t, s) in enumerate(zip(currents, outputs)):
            h = membranes[t if keep else 0]
            if o.reset == "delayed":
                _reached(v, threshold, o.strict, out=s)
                torch.mul(v, leak, out=h).add_(x_t)
                _subtract(h, s, threshold, out=h)
            else:
                torch.mul(v, leak, out=h).add_(x_t)
            _reached(h, threshold, o.strict, out=s)
            v = _reset(h, s, threshold, o, out=out)
    return spikes, last, hs


def _fresh(x: Tensor, steps: int) -> Tensor:
    """An empty sequence in the memory format of one step of ``x``, so that a channels-last network stays so."""
    one = torch.empty_like(x[0])
    return torch.empty_strided((steps, *one.shape), (one.numel(), *one.stride()), dtype=x.dtype, device=x.device)


def _blocks(x: Tensor, *settings: Any) -> list[slice]:
    """Rows of the batch that are run together through all steps: few enough on a CPU that a step's tensors stay in the cache."""
    batch, size = x.shape[1], max(1, x[0, :1].numel())
    if not x.is_cpu or any(isinstance(a, Tensor) and a.dim() >= x.dim() - 1 for a in settings):
        return [slice(0, batch)]
    rows = max(1, BLOCK * torch.get_num_threads() // size)
    return [slice(i, min(i + rows, batch)) for i in range(0, batch, rows)]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, v0: Tensor | None, leak: Any, threshold: Any, o: _Options) -> tuple[Tensor, Tensor]:
        spikes, v, hs = _scan(x, v0, leak, threshold, o, keep=True)
        start = v0 if o.reset == "delayed" or (isinstance(leak, Tensor) and leak.requires_grad) else None
        tensors = [a if isinstance(a, Tensor) else None for a in (leak, threshold)]
        ctx.save_for_backward(hs, start, *tensors)
        ctx.numbers = [a if b is None else None for a, b in zip((leak, threshold), tensors)]
        ctx.options = o
        ctx.set_materialize_grads(False)
        return spikes, v

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g_spikes: Tensor | None, g_last: Tensor | None) -> tuple[Tensor | None, ...]:
        o: _Options = ctx.options
        hs, start, *tensors = ctx.saved_tensors
        leak, threshold = (a if b is None else b for a, b in zip(ctx.numbers, tensors))
        needs_v0, needs_leak, needs_threshold = ctx.needs_input_grad[1:4]
        d = torch.empty_like(hs)
        g_v0, g_leak, g_threshold = (torch.zeros_like(hs[0]) if n else None for n in (needs_v0, needs_leak, needs_threshold))
        for rows in _blocks(hs, leak, threshold):
            block = slice(None), rows
            sequences = (a if a is None else a[block] for a in (hs, d, g_spikes))
            singles = (a if a is None else a[rows] for a in (g_last, start, g_v0, g_leak, g_threshold))
            _scan_back(*sequences, *singles, leak, threshold, o)
        return (
            d,
            g_v0,
            g_leak.sum_to_size(leak.shape) if needs_leak else None,
            g_threshold.sum_to_size(threshold.shape) if needs_threshold else None,
            None,
        )


def _scan_back(
    hs: Tensor, d: Tensor, g_spikes: Tensor | None, g_last: Tensor | None, start: Tensor | None, g_v0: Tensor | None,
    g_leak: Tensor | None, g_threshold: Tensor | None, leak: Any, threshold: Any, o: _Options,
) -> None:  # fmt: skip
    """The reverse scan: writes the gradients of all h into ``d``, that of the initial state into ``g_v0``, and adds to the other two."""
    room = torch.empty_like(hs[0])
    scaled = torch.empty_like(room)  # both reused: fresh tensors cost more than the arithmetic
    after = g_last  # gradient of the state after step t
    late = None  # d[t + 1], where the next step subtracts this step's spikes
    membranes, gradients = hs.unbind(), d.unbind()
    above = [None] * len(hs) if g_spikes is None else g_spikes.unbind()
    for t in reversed(range(len(hs))):
        h, d_t = membranes[t], gradients[t]
        _step_back(d_t, h, above[t], after, late, threshold, g_threshold, room, o)
        if g_leak is not None and (t > 0 or start is not None):
            g_leak.addcmul_(d_t, _state(membranes[t - 1], threshold, o) if t > 0 else start)
        if o.detach_time or (t == 0 and g_v0 is None and o.reset != "delayed"):
            after = late = None
        else:
            after, late = torch.mul(d_t, leak, out=scaled), d_t
    if after is None:
        return
    if o.reset == "delayed" and not (g_v0 is None and g_threshold is None):  # the initial state may have fired
        first = torch.empty_like(scaled)
        _step_back(first, torch.zeros_like(first) if start is None else start, None, after, late, threshold, g_threshold, room, o)
        after = first
    if g_v0 is not None:
        g_v0.copy_(after)


def _step_back(
    d: Tensor, h: Tensor, g_s: Tensor | None, after: Tensor | None, late: Tensor | None, threshold: Any, g_threshold: Tensor | None,
    room: Tensor, o: _Options,
) -> None:  # fmt: skip
    """Writes into ``d`` the gradient of h[t], from that of the spikes and that of the state after the step."""
    sg = o.surrogate.grad_(torch.sub(h, threshold, out=room))
    subtracted = {"soft": after, "delayed": late}.get(o.reset)  # gradient of the state that lost a threshold for this step's spikes
    if not o.detach_reset:  # the spikes also reach that state
        via = None if subtracted is None else subtracted * -threshold
        if o.reset == "hard" and after is not None:
            via = (o.v_reset - h).mul_(after)
        g_s = g_s if via is None else via if g_s is None else via.add_(g_s)
    if g_s is None:
        d.zero_()
    else:
        torch.mul(g_s, sg, out=d)
    if g_threshold is not None:
        g_threshold.sub_(d)
        if subtracted is not None:
            g_threshold.addcmul_(_reached(h, threshold, o.strict, out=sg), subtracted, value=-1)
    if after is not None:
        if o.reset == "hard":
            s = _reached(h, threshold, o.strict, out=sg)
            after = torch.addcmul(after, s, after, value=-1, out=sg)  # exactly zero where it fired
        d.add_(after)


def _state(h: Tensor, threshold: Any, o: _Options) -> Tensor:
    return _reset(h, _reached(h, threshold, o.strict, out=torch.empty_like(h)), threshold, o, out=torch.empty_like(h))
