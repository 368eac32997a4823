"""Put a new layer in place of every matching one in a user's own model.

A :class:`Rule` says which layers (``match``), what takes their place (``build``) and how the new weights start: ``"fresh"`` at the
recipe's own initialisation, or ``"fit"`` as the nearest weights that the recipe can express, so that a *trained* network is compressed
rather than trained anew. :func:`replace_layers` applies rules to a copy of the model and leaves all that does not match untouched.

A module reached under two names is replaced once and stays shared. A layer whose replacement would break something is kept, with the
reason in the report: the recipe cannot express its shape, its weight is tied to another module's, it carries hooks or a
parametrisation, or its class only derives from the one that the rule names (its ``forward`` may be another).
"""

from __future__ import annotations

import copy as copying
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.roles import Report

__all__ = ["ReplaceReport", "Replaced", "Rule", "Skipped", "replace_layers"]


@dataclass(frozen=True)
class Rule:
    """Which layers to replace, and by what.

    ``match``: a class (exactly this class) or a predicate ``(name, module) -> bool``. ``build``: the old layer -> the new one; it raises
    ``BadInput`` or ``UnsupportedModel`` for a layer that it cannot express, which then stays. ``init="fit"`` calls the new layer's
    ``fit_(old, inputs)``. ``build_first``: builds for the first match in module order instead, which usually reads raw channels;
    with ``first``, for the first match that is this too. A first layer that is kept stays the first: the next one is built by ``build``.
    """

    match: type[nn.Module] | Callable[[str, nn.Module], bool]
    build: Callable[[nn.Module], nn.Module]
    init: Literal["fresh", "fit"] = "fresh"
    build_first: Callable[[nn.Module], nn.Module] | None = None
    first: type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str, nn.Module], bool] | None = None


@dataclass(frozen=True)
class Replaced:
    """One replaced layer and its parameter counts."""

    name: str
    before: int
    after: int


@dataclass(frozen=True)
class Skipped:
    """One layer that a rule matched and that was kept all the same."""

    name: str
    why: str


@dataclass(frozen=True)
class ReplaceReport(Report):
    """What :func:`replace_layers` did. ``before`` and ``after`` count the parameters of the replaced layers together."""

    replaced: tuple[Replaced, ...]
    skipped: tuple[Skipped, ...]

    @property
    def before(self) -> int:
        return sum(r.before for r in self.replaced)

    @property
    def after(self) -> int:
        return sum(r.after for r in self.replaced)

    def describe(self) -> str:
        """One line a layer, then the totals."""
        lines = [f"{r.name or '(model)'}: {r.before:,} -> {r.after:,} parameters" for r in self.replaced]
        lines += [f"{s.name or '(model)'}: kept, {s.why}" for s in self.skipped]
        return "\n".join([*lines, f"{len(self.replaced)} layers replaced: {self.before:,} -> {self.after:,} parameters"])


def replace_layers(
    model: nn.Module,
    rules: Rule | Sequence[Rule],
    *,
    example: Tensor | tuple[Tensor, ...] | None = None,
    keep: Collection[str | nn.Module] = (),
    copy: bool = True,
) -> nn.Module:
    """A copy of ``model`` with every matching layer replaced; the first rule that matches a layer decides.

    ``example``: inputs of the model; the old layers' inputs on them go to the new layers' ``fit_``, and the new model must give outputs
    of the old shape on them. ``keep``: names (or modules) to leave alone, with all that is below them. ``copy=False`` edits ``model``.
    New layers take over device, dtype, train/eval mode and ``requires_grad`` of the old. The :class:`ReplaceReport` is at
    ``.replace_report`` of the result.

    Raises ``BadInput`` for a name in ``keep`` that does not exist, ``UnsupportedModel`` where the new model breaks on ``example``.
    """
    rules = [rules] if isinstance(rules, Rule) else list(rules)
    names = {id(module): name for name, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    kept = {k if isinstance(k, str) else names.get(id(k), f"<{type(k).__name__} outside the model>") for k in keep}
    if unknown := kept - {name for name, _ in model.named_modules(remove_duplicate=False)}:
        raise BadInput(f"keep names {sorted(unknown)}, which the model does not have")
    if copy:
        model = copying.deepcopy(model)

    matches = [(name, old, rule) for name, old in model.named_modules() if (rule := _first_match(name, old, rules))]
    leads = _leads(matches)
    chosen = [(name, old, rule) for name, old, rule in matches if not any(name == k or name.startswith(f"{k}.") for k in kept)]
    args = (example,) if isinstance(example, Tensor) else example
    seen, shape = _inputs_of(model, [old for _, old, _ in chosen], args) if args is not None else ({}, None)

    tied = _tied(model)
    replaced, skipped, new_of = [], [], {}
    for name, old, rule in chosen:
        if any(not r.name or name.startswith(f"{r.name}.") for r in replaced):
            continue  # it went away with the block around it
        build = rule.build_first if rule.build_first and leads.get(id(rule)) == id(old) else rule.build
        why = _obstacle(old, rule, tied)
        if why is None:
            try:
                new = _like(build(old), old)
                if rule.init == "fit":
                    if not hasattr(new, "fit_"):
                        raise UnsupportedModel(f"{type(new).__name__} has no fit_ to start from the old weight", module=name)
                    new.fit_(old, seen.get(id(old)))
            except (BadInput, UnsupportedModel) as error:
                why = str(error)
        if why is not None:
            skipped.append(Skipped(name, why))
            continue
        new_of[id(old)] = new
        replaced.append(Replaced(name, _count(old), _count(new)))

    model = _swap(model, new_of)
    model.replace_report = ReplaceReport(tuple(replaced), tuple(skipped))
    if args is not None:
        _check_shape(model, args, shape)
    return model


def _first_match(name: str, module: nn.Module, rules: Sequence[Rule]) -> Rule | None:
    return next((rule for rule in rules if _is(rule.match, name, module)), None)


def _is(match: Any, name: str, module: nn.Module) -> bool:
    return isinstance(module, match) if isinstance(match, (type, tuple)) else match(name, module)


def _leads(matches: Sequence[tuple[str, nn.Module, Rule]]) -> dict[int, int]:
    """Of each rule (by identity) the layer that comes first in the model, whether it is kept or not."""
    found: dict[int, int] = {}
    for name, module, rule in matches:
        if rule.first is None or _is(rule.first, name, module):
            found.setdefault(id(rule), id(module))
    return found


def _obstacle(old: nn.Module, rule: Rule, tied: Collection[int]) -> str | None:
    """Why this layer must stay although it matches, or None."""
    if hasattr(old, "parametrizations"):
        return "it is parametrised: remove the parametrisation first"
    if isinstance(rule.match, type) and type(old) is not rule.match:
        return f"{type(old).__name__} derives from {rule.match.__name__} and may compute something else: give it a rule of its own"
    if any(id(p) in tied for p in old.parameters()):
        return "its weight is tied to another module's"
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in old.modules()):
        return "it carries hooks, which the new layer would lose"
    return None


def _tied(model: nn.Module) -> set[int]:
    """Parameters that more than one module owns."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for p in module.parameters(recurse=False):
            owners[id(p)] = owners.get(id(p), 0) + 1
    return {p for p, n in owners.items() if n > 1}


def _like(new: nn.Module, old: nn.Module) -> nn.Module:
    """The new layer on the old one's device and dtype, in its mode; frozen if the old one was."""
    for p in old.parameters():
        new = new.to(device=p.device, dtype=p.dtype)
        break
    if any(True for _ in old.parameters()) and not any(p.requires_grad for p in old.parameters()):
        new.requires_grad_(False)
    return new.train(old.training)


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _inputs_of(model: nn.Module, layers: Sequence[nn.Module], args: tuple[Tensor, ...]) -> tuple[dict[int, Tensor], list | None]:
    """Each layer's first input on the example, and the shapes of the model's output."""
    seen: dict[int, Tensor] = {}

    def keep_input(layer: nn.Module, inputs: tuple) -> None:
        seen.setdefault(id(layer), inputs[0].detach().clone())

    hooks = [layer.register_forward_pre_hook(keep_input) for layer in layers]
    try:
        out = _run(model, args)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, _shapes(out)


def _run(model: nn.Module, args: tuple[Tensor, ...]) -> object:
    """Forward in eval mode without gradients; modes come back as they were."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            return model(*args)
    finally:
        for module, mode in modes:
            module.training = mode


def _shapes(out: object) -> list:
    return [t.shape for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor)]


def _check_shape(model: nn.Module, args: tuple[Tensor, ...], shape: list | None) -> None:
    try:
        out = _run(model, args)
    except (RuntimeError, ValueError, TypeError) as error:
        raise UnsupportedModel(f"fails on the example after the replacement: {error}", module=type(model).__name__) from error
    if _shapes(out) != shape:
        raise UnsupportedModel(f"gives {_shapes(out)} on the example, it gave {shape} before", module=type(model).__name__)


def _swap(model: nn.Module, new_of: dict[int, nn.Module]) -> nn.Module:
    """The model with the old objects exchanged for the new ones, under every name that reaches them."""
    if id(model) in new_of:
        return new_of[id(model)]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and id(child) in new_of:
                parent._modules[name] = new_of[id(child)]
    return model
