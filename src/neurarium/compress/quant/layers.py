"""Which layers a weight quantiser takes, and putting other modules in their places."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from neurarium.compress.quant.packing import PackedConv2d, PackedLinear
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["quantisable", "swap"]


def quantisable(
    model: nn.Module, skip: str | Sequence[str] = (), *, modules: Sequence[type] = (nn.Linear, nn.Conv2d), done: Sequence[type] = ()
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers whose weights can be quantised, by name, and why others that hold a weight matrix are left alone.

    Args:
        skip: names to leave alone, or "first_last": the first and the last module with a weight matrix, embeddings included, in the order
            in which the model lists them.
        modules: the layers that are taken; no subclasses, which may compute anything.
        done: further layers, beside the packed ones, that count as quantised already.

    A module used several times is listed once; a weight that several modules share is left alone. A model with nothing to quantise is
    refused, unless it has quantised layers already: then the first dictionary is empty.
    """
    finished = (PackedLinear, PackedConv2d, *done)
    holders = {n: m for n, m in model.named_modules() if isinstance(w := getattr(m, "weight", None), Tensor) and w.ndim > 1}
    if isinstance(skip, str):
        if skip != "first_last":
            raise BadInput(f"skip must be names of layers or 'first_last', got {skip!r}")
        names = list(holders)
        reasons = dict.fromkeys(names[-1:], "it is the last layer") | dict.fromkeys(names[:1], "it is the first layer")
    else:
        if unknown := [name for name in skip if name not in holders]:
            raise BadInput(f"skip names {unknown[0]!r}, which is no layer with a weight matrix; there are {', '.join(holders)}")
        reasons = dict.fromkeys(skip, "it was to be skipped")
    owners: dict[int, list[str]] = {}
    for name, module in holders.items():
        if "weight" in module._parameters:
            owners.setdefault(id(module.weight), []).append(name)
    found: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in holders.items():
        if isinstance(module, finished):
            skipped[name] = "it is quantised already"
        elif type(module) not in modules:
            skipped[name] = f"{type(module).__name__} is not one of {', '.join(m.__name__ for m in modules)}"
        elif module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
            skipped[name] = "it carries hooks"
        elif "weight" not in module._parameters:
            skipped[name] = "its weight is computed from other parameters"
        elif len(tied := owners[id(module.weight)]) > 1:
            skipped[name] = f"its weight is tied to {next(n for n in tied if n != name)}"
        elif name in reasons:
            skipped[name] = reasons[name]
        else:
            found[name] = module
    if not found and not any(isinstance(m, finished) for m in holders.values()):
        first = next(iter(skipped), None)
        why = "".join(f"; {n or 'it'}: {reason}" for n, reason in list(skipped.items())[:4])
        raise UnsupportedModel(f"the model has no layer to quantise{why}", module=first or type(model).__name__)
    return found, skipped


def swap(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Puts each new module in every place of its old one, in place; returns the model (the new one, where the model itself is replaced)."""
    if model in made:
        return made[model]
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                parent._modules[name] = made[child]
    return model
