"""muP: parametrise a network so that good hyperparameters of a narrow one are good for a wide one.

With standard initialisation and one learning rate for all, an Adam step moves the activations of a wide layer further than those of a
narrow one, so the best learning rate falls as the layer widens. muP ties the initial scale and the learning rate of each tensor to its
width, such that every activation moves by O(1) a step at any width. Then one tunes a narrow network and copies the settings.

*Equations.* ``m_in``, ``m_out`` are the growth of a weight's input and output over the base network, where they grow at all.
With the multiplier ``alpha / m_in`` in front of the readout ("table 8")::

                        initial std, times that of torch    SGD rate times     Adam rate times
    input, bias, gain   1 (biases: sqrt(m_in))              m_out              1
    hidden              1                                   m_out / m_in       1 / m_in
    output              sqrt(m_in), or zero                 m_in               1

and without it ("table 3") the output has ``alpha / sqrt(m_in)``, ``alpha^2 / m_in`` and ``alpha / m_in``: the same function all along.
Attention divides by the head's width where that grows (:func:`attention_scale`). Gradients shrink like ``1 / m_out`` (``m_in`` for the
output), and Adam's epsilon should shrink with them. Orthogonal updates (``family="muon"``) have spectral norm 1 whatever the width:
their rate grows by ``sqrt(m_out / m_in)``, divided by the growth of the optimizer's own scale.

*Source.* arXiv 2203.03466, tables 3 and 8; numbers equal those of the authors' package. The rule for orthogonal updates follows from
the condition that ``||dW||`` be of the size of ``sqrt(fan_out / fan_in)``.

*Departures.* Widths are kept beside the model, not on its tensors, so the model compiles, exports and shards as before. The weight of a
tied embedding and readout keeps its initial scale as an embedding; only the multiplier is applied.

*Cost.* One multiplication of the readout's input.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import SGD, Adam, Optimizer

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.coordinates import CoordinateCheck, coordinate_check
from neurarium.learn.widths import Parametrization, Shape, infer_shapes

__all__ = [
    "CoordinateCheck", "MuAdam", "MuSGD", "Multiplier", "Parametrization", "Shape", "attention_scale", "coordinate_check", "infer_shapes",
    "mup_", "mup_groups",
]  # fmt: skip

FAMILIES = ("adam", "sgd", "muon")


class Multiplier:
    """A forward hook that multiplies a module's output (or, as pre-hook, its input) by a constant. Names of parameters stay."""

    def __init__(self, factor: float, at: str) -> None:
        self.factor, self.at = factor, at

    def before(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * self.factor, *args[1:])

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return (output[0] * self.factor, *output[1:]) if isinstance(output, tuple) else output * self.factor

    def attach(self, module: nn.Module) -> None:
        if self.at == "input":
            module.register_forward_pre_hook(self.before)
        else:
            module.register_forward_hook(self.after)


def mup_(
    model: nn.Module, shapes: Parametrization, *, zero_readout: bool = True, zero_query: bool = False, init: str = "fan_in"
) -> nn.Module:
    """Rescale the initial weights and put the multipliers into the forward pass, in place. A second call changes nothing.

    Call it once on the freshly made model; a checkpoint is loaded afterwards. The state gets one entry, ``mup_version``.

    Args:
        zero_readout: start the readout at zero, which removes a mismatch of order 1/sqrt(width) at the start. Tied weights stay.
        zero_query: start the projections to queries at zero; they are found by type or by name (``query``, ``q_proj``, ...).
        init: how the model was made: ``"fan_in"`` (std proportional to 1/sqrt(fan_in), as torch's layers do) or ``"constant"`` (one std for
            all widths, as in GPT-2).
    """
    if init not in ("fan_in", "constant"):
        raise BadInput(f"init is 'fan_in' or 'constant', not {init!r}")
    factors = {name: shapes.readout_multiplier / m for name, m in shapes.readouts.items()} if shapes.table == 8 else {}
    wanted = {(n, "input"): f for n, f in factors.items()} | {(n, "output"): f for n, f in shapes.branches.items()}
    _check_names(model, shapes)
    if "mup_version" in model._buffers:
        if (found := _multipliers(model)) != wanted:
            raise BadInput(f"the model is already parametrised, with other multipliers: {found}, not {wanted}")
        return model
    with torch.no_grad():
        for name, module in model.named_modules():
            _rescale(name, module, shapes, zero_readout, init)
        if zero_query:
            _zero_queries(model)
    for (name, at), factor in wanted.items():
        Multiplier(factor, at).attach(model.get_submodule(name))
    model.register_buffer("mup_version", torch.tensor(1))
    return model


def mup_groups(
    params: nn.Module | Iterable[Any],
    shapes: Parametrization,
    lr: float,
    *,
    family: str = "adam",
    weight_decay: float = 0.0,
    scale_decay: bool = True,
    eps: float | None = None,
    orth_scale: str | None = "rms",
) -> list[dict[str, Any]]:
    """Parameter groups for an optimizer of ``family``: each with its learning rate and weight decay, ``role`` and ``use_orth``.

    Args:
        params: the model, its ``named_parameters()``, or groups ``{"params": [(name, parameter), ...], ...}`` whose ``lr``,
            ``weight_decay`` and other settings are kept.
        lr: that of the base network.
        family: ``"adam"`` (also RMSprop, Adagrad, Lion: steps without regard to the gradient's size), ``"sgd"``, or ``"muon"``: matrices
            orthogonalised, the others by Adam; takes :class:`~neurarium.learn.orthogonal.ROOT`.
        scale_decay: keep ``lr * weight_decay`` the same in all groups, as the authors' package does.
        eps: Adam's epsilon at the base width; groups then get theirs.
        orth_scale: the ``scale`` that ROOT is given.
    """
    if family not in FAMILIES:
        raise BadInput(f"family must be one of {FAMILIES}, not {family!r}")
    if orth_scale not in ("rms", "spectral", None):
        raise BadInput(f"orth_scale must be 'rms', 'spectral' or None, not {orth_scale!r}")
    found: dict[Any, dict[str, Any]] = {}
    for i, group in enumerate(_groups(params)):
        settings = {"lr": lr, "weight_decay": weight_decay} | {k: v for k, v in group.items() if k != "params"}
        for name, p in group["params"]:
            if name not in shapes:
                raise BadInput(f"parameter {name!r} has no shape: infer_shapes was called on another model")
            if not p.requires_grad:
                continue
            s = shapes[name]
            orth = family == "muon" and p.ndim >= 2 and s.role in ("input", "hidden")
            rate = _orth_rate(s, p, orth_scale) if orth else _rate(s, "sgd" if family == "sgd" else "adam", shapes)
            own = {**settings, "lr": settings["lr"] * rate, "role": s.role, "use_orth": orth}
            if scale_decay:
                own["weight_decay"] = settings["weight_decay"] / rate
            if eps is not None and family != "sgd":
                own["eps"] = eps * s.branch * _gradient(s, shapes)
            key = (i, s.role, orth, rate, own.get("eps"))
            found.setdefault(key, {**own, "params": []})["params"].append(p)
    return list(found.values())


def MuAdam(
    params: nn.Module | Iterable[Any], shapes: Parametrization, lr: float = 1e-3, *, impl: Callable[..., Optimizer] = Adam,
    weight_decay: float = 0.0, scale_decay: bool = True, eps: float | None = None, **settings: Any,
) -> Optimizer:  # fmt: skip
    """Adam, or another optimizer of its kind as ``impl``, with the learning rates of :func:`mup_groups`."""
    groups = mup_groups(params, shapes, lr, family="adam", weight_decay=weight_decay, scale_decay=scale_decay, eps=eps)
    return impl(groups, lr=lr, **settings)


def MuSGD(
    params: nn.Module | Iterable[Any], shapes: Parametrization, lr: float = 1e-2, *, impl: Callable[..., Optimizer] = SGD,
    weight_decay: float = 0.0, scale_decay: bool = True, **settings: Any,
) -> Optimizer:  # fmt: skip
    """SGD, or another optimizer of its kind as ``impl``, with the learning rates of :func:`mup_groups`."""
    return impl(mup_groups(params, shapes, lr, family="sgd", weight_decay=weight_decay, scale_decay=scale_decay), lr=lr, **settings)


def attention_scale(width: int, base_width: int | None = None) -> float:
    """What to multiply ``q . k`` by for heads of this width: ``sqrt(base) / width``, which is 1/sqrt(width) at the base width."""
    return (width if base_width is None else base_width) ** 0.5 / width


def _rate(s: Shape, family: str, shapes: Parametrization) -> float:
    """Learning rate over that of the base network."""
    alpha = shapes.readout_multiplier
    if family == "adam":
        rate = {"hidden": 1 / s.fan_in_mult, "output": 1.0 if shapes.table == 8 else alpha / s.fan_in_mult}.get(s.role, 1.0)
        return rate * s.step
    out = s.fan_in_mult if shapes.table == 8 else alpha**2 / s.fan_in_mult
    rate = {"hidden": s.fan_out_mult / s.fan_in_mult, "output": out, "fixed": 1.0}.get(s.role, s.fan_out_mult)
    return rate * s.step / s.branch


def _orth_rate(s: Shape, p: Tensor, scale: str | None) -> float:
    """The same for an orthogonal update, which the optimizer itself multiplies by ``scale``."""
    rows, columns = p.shape[0], p[0].numel()
    wide, narrow = ({
        "rms": max(r, c) ** 0.5, "spectral": max(1.0, r / c) ** 0.5, None: 1.0,
    }[scale] for r, c in ((rows, columns), (rows / s.fan_out_mult, columns / s.fan_in_mult)))  # fmt: skip
    return (s.fan_out_mult / s.fan_in_mult) ** 0.5 * narrow / wide * s.step


def _gradient(s: Shape, shapes: Parametrization) -> float:
    """Size of the gradient over that of the base network."""
    if s.role == "output":
        return 1 / s.fan_in_mult if shapes.table == 8 else 1 / shapes.readout_multiplier
    return 1 / s.fan_out_mult


def _groups(params: nn.Module | Iterable[Any]) -> list[dict[str, Any]]:
    if isinstance(params, nn.Module):
        params = params.named_parameters()
    params = list(params)
    groups = [dict(g) for g in params] if params and isinstance(params[0], Mapping) else [{"params": params}]
    for group in groups:
        group["params"] = list(group["params"])
        if not all(isinstance(p, tuple) and len(p) == 2 and isinstance(p[0], str) for p in group["params"]):
            raise BadInput("parameters are known by name here: pass the model, model.named_parameters(), or groups of those pairs")
    return groups


def _check_names(model: nn.Module, shapes: Parametrization) -> None:
    if odd := sorted(set(shapes) ^ {n for n, _ in model.named_parameters()}):
        raise BadInput(f"the shapes are of another model: {odd[:3]} are in one of the two only")
    if "" in shapes.readouts:
        raise UnsupportedModel("is itself a readout: put it into a model", module=type(model).__name__)


def _rescale(name: str, module: nn.Module, shapes: Parametrization, zero_readout: bool, init: str) -> None:
    """From torch's initial scale to muP's."""
    prefix = f"{name}." if name else ""
    weight = shapes.shapes.get(f"{prefix}weight")  # None where it is another module's, as in a tied readout
    fan_in = weight.fan_in_mult if weight is not None else shapes.readouts.get(name, 1.0)
    bias = getattr(module, "bias", None)
    bias = bias if isinstance(module, (nn.Linear, _ConvNd)) and isinstance(bias, Tensor) else None
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)) and init == "fan_in":  # torch gives them all 1/sqrt(hidden size)
        for leaf, p in module.named_parameters(recurse=False):
            if shapes[prefix + leaf].role != "hidden":
                p.mul_(shapes[prefix + leaf].fan_out_mult ** 0.5)
    if bias is not None and init == "fan_in" and fan_in != 1:
        bias.mul_(fan_in**0.5)
    if weight is not None and weight.role == "output":
        scale = fan_in**0.5 if init == "fan_in" else 1.0
        scale *= 1.0 if shapes.table == 8 else shapes.readout_multiplier / fan_in
        if scale != 1:
            module.weight.mul_(scale)
        if zero_readout:
            module.weight.zero_()
            if bias is not None:
                bias.zero_()
    if init == "constant":
        for leaf, p in module.named_parameters(recurse=False):
            s = shapes.shapes.get(prefix + leaf)
            if s is not None and s.role == "hidden":
                p.mul_(s.fan_in_mult**-0.5)


def _zero_queries(model: nn.Module) -> None:
    found = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            weight = module.q_proj_weight if module.in_proj_weight is None else module.in_proj_weight[: module.embed_dim]
            weight.zero_()
        elif isinstance(module, nn.Linear) and re.fullmatch("q|w_?q|to_q|q_proj|query|q_lin", name.rpartition(".")[2]):
            module.weight.zero_()
        else:
            continue
        found += 1
    if not found:
        raise UnsupportedModel("zero_query found no projection to queries", module=type(model).__name__)


def _multipliers(model: nn.Module) -> dict[tuple[str, str], float]:
    """(module name, "input" or "output") -> factor, of the hooks that are there."""
    found = {}
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(owner := getattr(hook, "__self__", None), Multiplier):
                found[name, owner.at] = owner.factor
    return found
