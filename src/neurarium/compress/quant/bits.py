"""Which layers get few bits: an integer linear program on second-order perturbations (HAWQ-V3).

Rounding the weights of layer i to b bits raises the loss by about half dW' H dW. With the Hessian's mean curvature of the layer,

    Omega(i, b) = tr(H_i) / n_i * |Q_b(W_i) - W_i|^2,

and the plan minimises the sum over layers under one or several budgets: bytes of weights, bit operations (multiply-adds times weight bits
times input bits), or measured seconds. Traces and roundings are those of the folded weights, which the integer network stores.

*Source*: "HAWQ-V3: Dyadic Neural Network Quantization", arXiv 2011.10680, section 3.4; the traces as in HAWQ-V2, arXiv 1911.03852.
*Cost*: a Hessian-vector product a probe; the program itself takes milliseconds.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from neurarium.compress.allocate import milp
from neurarium.compress.bit_plan import BitPlan
from neurarium.compress.curvature import hessian_trace
from neurarium.compress.quant.affine import symmetric_grid
from neurarium.compress.quant.fold import fold_batchnorm
from neurarium.compress.sensitivity import Loss
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import undisturbed

__all__ = ["bit_costs", "plan_bits", "sensitivities"]


def plan_bits(
    model: nn.Module,
    loader: Iterable,
    *,
    choices: Sequence[int] = (4, 8),
    budget: Mapping[str, float],
    ties: Iterable[Sequence[str]] = (),
    fixed: Mapping[str, int] | None = None,
    seconds: Mapping[str, Sequence[float]] | None = None,
    probes: int = 32,
    samples: int = 256,
    loss_fn: Loss = F.cross_entropy,
    seed: int = 0,
) -> BitPlan:
    """The bits of each layer (weights and inputs alike) with the least summed perturbation.

    Args:
        loader: labelled batches ``(x, y)`` for the curvature.
        choices: bits to choose from.
        budget: most "bytes", "bops" (for one sample) or "seconds"; several at once are all kept.
        ties: groups of layers that take the same bits, e.g. a shortcut and its main branch.
        fixed: layer -> its bits, one of the choices.
        seconds: layer -> measured seconds at each choice, where they are in the budget.
        probes, samples: of the trace estimate.
    """
    if not choices or len(set(choices)) != len(choices) or not all(isinstance(b, int) and 2 <= b <= 16 for b in choices):
        raise BadInput(f"choices must be different numbers of bits in 2..16, got {choices}")
    if unknown := set(budget) - {"bytes", "bops", "seconds"}:
        raise BadInput(f"a budget is of bytes, bops or seconds, not {sorted(unknown)[0]!r}")
    if not budget or ("seconds" in budget and seconds is None):
        raise BadInput("a budget of seconds needs the measured seconds" if budget else "plan_bits needs a budget")
    batches = list(loader)
    harm = sensitivities(model, batches, choices=choices, probes=probes, samples=samples, loss_fn=loss_fn, seed=seed)
    costs = bit_costs(model, batches[0][0], choices=choices)
    if seconds is not None:
        costs["seconds"] = {name: list(seconds[name]) for name in harm}
    perturbation = {name: list(row) for name, row in harm.items()}
    for name, bits in (fixed or {}).items():
        if name not in harm or bits not in choices:
            raise BadInput(f"{name}: {'is no layer of the plan' if name not in harm else f'{bits} bits are not among the choices'}")
        perturbation[name] = [h if b == bits else float("inf") for h, b in zip(harm[name], choices, strict=True)]
    used = {kind: {name: costs[kind][name] for name in harm} for kind in budget}
    chosen = milp(perturbation, used, budget, ties=ties)
    kind = next(iter(budget))
    return BitPlan(
        {name: (choices[i], choices[i]) for name, i in chosen.items()},
        {name: harm[name][i] for name, i in chosen.items()},
        sum(used[kind][name][i] for name, i in chosen.items()),
    )


def sensitivities(
    model: nn.Module, loader: Iterable, *, choices: Sequence[int] = (4, 8), probes: int = 32, samples: int = 256,
    loss_fn: Loss = F.cross_entropy, seed: int = 0,
) -> dict[str, list[float]]:  # fmt: skip
    """layer -> Omega at each choice."""
    folded = _folded(model)
    known = {id(p): name for name, p in folded.named_parameters()}
    layers = {n: m for n, m in _layers(folded).items() if known.get(id(m.weight)) == f"{n}.weight".lstrip(".")}
    names = [f"{n}.weight".lstrip(".") for n in layers]
    report = hessian_trace(folded, loader, names=names, probes=probes, samples=samples, loss_fn=loss_fn, seed=seed, tol=0.05)
    result = {}
    for (name, layer), weight in zip(layers.items(), names, strict=True):
        w = layer.weight.detach().double()
        w = w.transpose(0, 1) if isinstance(layer, _ConvTransposeNd) else w
        error = [float((symmetric_grid(w, b, axis=0)(w) - w).square().sum()) for b in choices]
        result[name] = [max(float(report.mean[weight]), 0.0) / w.numel() * e for e in error]
    return result


def bit_costs(model: nn.Module, example: Tensor, *, choices: Sequence[int] = (4, 8)) -> dict[str, dict[str, list[float]]]:
    """"bytes" and "bops" -> layer -> the cost of each choice; bit operations are those of one sample."""
    macs: dict[str, float] = {}

    def watch(name: str):
        def hook(module: nn.Module, args: tuple, out: Tensor) -> None:
            places = (args[0] if isinstance(module, _ConvTransposeNd) else out).numel() / len(example)
            macs[name] = macs.get(name, 0.0) + places * module.weight[0].numel()

        return hook

    layers = _layers(model)
    handles = [m.register_forward_hook(watch(n)) for n, m in layers.items()]
    try:
        with undisturbed(model), torch.no_grad():
            model.eval()(example)
    finally:
        for handle in handles:
            handle.remove()
    return {
        "bytes": {n: [m.weight.numel() * b / 8 for b in choices] for n, m in layers.items()},
        "bops": {n: [macs.get(n, 0.0) * b * b for b in choices] for n in layers},
    }


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    found = {n: m for n, m in model.named_modules() if isinstance(m, _ConvNd | nn.Linear)}
    if not found:
        raise UnsupportedModel("has no convolution or linear layer", module=type(model).__name__)
    return found


def _folded(model: nn.Module) -> nn.Module:
    try:
        return fold_batchnorm(model)
    except UnsupportedModel:  # it cannot be traced: nothing is folded
        return copy.deepcopy(model).eval()
