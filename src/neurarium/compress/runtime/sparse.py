"""A model whose sparse layers really skip the zeros: smaller on disk, faster where the planner says so, still an ordinary module.

``to_sparse_runtime`` copies a model, looks at every masked ``Linear`` or ``Conv2d`` (and every plain one with enough zeros), asks the
planner, and replaces those where a sparse form wins by :class:`SparseLinear` or
:class:`~neurarium.compress.runtime.conv.SparseConv2d`; a following ReLU or GELU inside the same ``nn.Sequential`` goes into the
product. The others become plain dense layers again, and ``result.plan`` says why.

*Source*: arXiv 2306.16601 (constant blocks shaped like the vector instruction, fused epilogue); the 16 x 1 groups are those of arXiv
2310.19509.
*Departures*: activations keep their usual layout (tokens, features), so that any model can be taken; the transposition that
the kernel wants is part of each product and of each measurement.

What works on the result: ``state_dict`` (also into an empty shell, :func:`load_sparse`), pickle, deep copy, ``torch.save``, safetensors,
``torch.export`` and ``torch.compile`` (one operator a layer; whoever loads the exported program imports neurarium first), gradients of
the input, the kept values and the bias in float32. ONNX has no such operator: ``to_dense_runtime`` first.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor, nn

from neurarium.compress.plan import MaskedConv2d, MaskedLinear, finalise, prunable
from neurarium.compress.runtime.formats import GroupSparse, SparseMatrix, from_numbers, from_tensors
from neurarium.compress.runtime.int8 import Int8Sparse
from neurarium.compress.runtime.planner import Choice, Machine, candidates, choose
from neurarium.compress.runtime.product import ACTS
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["RuntimePlan", "SparseLinear", "load_sparse", "to_dense_runtime", "to_sparse_runtime"]


class SparseLinear(nn.Module):
    """``act(x W^T + b)`` with W in a compact form. `weight` is the dense matrix, made anew on each access."""

    def __init__(self, matrix: SparseMatrix | Int8Sparse, bias: Tensor | None = None, act: str | None = None) -> None:
        super().__init__()
        if act not in ACTS:
            raise BadInput(f"act must be None, 'relu' or 'gelu', got {act!r}")
        tensors = matrix.tensors()
        self.act = act
        for name, tensor in tensors.items():
            if name == "values" and tensor.is_floating_point():
                self.values = nn.Parameter(tensor)
            else:
                self.register_buffer(name, tensor)
        if bias is not None and tuple(bias.shape) != (matrix.shape[0],):
            raise BadInput(f"the bias must be ({matrix.shape[0]},), got {tuple(bias.shape)}")
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self._settle()

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, block: tuple[int, int] = (16, 1), *, dtype: str = "float32", act: str | None = None
    ) -> SparseLinear:
        """The sparse twin of a (masked) Linear, whatever the planner would say."""
        if not isinstance(linear, nn.Linear):
            raise UnsupportedModel("is not a Linear", module=type(linear).__name__)
        (matrix,) = candidates(linear.weight.detach(), mask=getattr(linear, "mask", None), dtype=dtype, block=block).values()
        return cls(matrix, linear.bias, act).train(linear.training)

    @property
    def matrix(self) -> SparseMatrix | Int8Sparse:
        """The weights in their compact form, sharing memory with the module."""
        return (Int8Sparse.from_numbers if self.int8 else from_numbers)(self._numbers, {n: getattr(self, n) for n in self._names})

    @property
    def weight(self) -> Tensor:
        return self.matrix.to_dense()

    @property
    def nbytes(self) -> int:
        """The bytes of weights, indices and bias."""
        return self.matrix.nbytes + (0 if self.bias is None else self.bias.numel() * self.bias.element_size())

    def to_linear(self) -> nn.Linear:
        """A plain dense layer of the same weights (without the fused activation)."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None)
        with torch.no_grad():
            linear.weight.copy_(self.weight)
            if self.bias is not None:
                linear.bias.copy_(self.bias)
        return linear.to(self.values.device).train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        if torch.onnx.is_in_onnx_export():
            raise UnsupportedModel("ONNX has no sparse product; export to_dense_runtime(model)", module=type(self).__name__)
        if torch.is_autocast_enabled("cpu") and x.dtype in (torch.bfloat16, torch.float16):
            return self.matrix.matmul(x.float(), bias=self.bias, act=self.act).to(x.dtype)
        return self.matrix.matmul(x, bias=self.bias, act=self.act)

    def extra_repr(self) -> str:
        m = self.matrix
        kind = f"{m.n}:{m.m}" if isinstance(m, GroupSparse) else ("int8 " if self.int8 else "") + f"{m.block[0]}x{m.block[1]}"
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, {kind}, density={m.density:.3f}"
        return f"{sizes}, bias={self.bias is not None}" + (f", act={self.act}" if self.act else "")

    def _settle(self) -> None:
        """Plain numbers out of `meta`, so that a forward pass reads no tensor for them."""
        self._numbers = tuple(self.meta.tolist())
        self.int8 = self._numbers[0] == 2
        self._names = ("row_ptr", "col", "values", *(("scale", "row_sum") if self.int8 else ()))
        self.out_features, self.in_features = self._numbers[1], self._numbers[2]

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """A state dict may hold another pattern of the same layer: the tensors take its sizes first."""
        if all(prefix + n in state_dict for n in (*self._names, "meta")):
            matrix = _matrix_in(state_dict, prefix)
            if matrix.shape != (self.out_features, self.in_features) or isinstance(matrix, Int8Sparse) != self.int8:
                here = (self.out_features, self.in_features)
                raise BadInput(f"{prefix}: the state dict has a {type(matrix).__name__} of {matrix.shape}, the layer is {here}")
            for name in (*self._names, "meta"):
                found, here = state_dict[prefix + name], getattr(self, name)
                if found.shape == here.shape and found.dtype == here.dtype:
                    continue
                fresh = torch.empty_like(found, device=here.device)
                setattr(self, name, nn.Parameter(fresh, here.requires_grad) if isinstance(here, nn.Parameter) else fresh)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._settle()


class FusedActivation(nn.Identity):
    """Stands in a Sequential where the activation was that the product before it now applies."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.original = original


@dataclass(frozen=True)
class RuntimePlan:
    """What became of each layer.

    Attributes:
        formats: layer -> its sparse format.
        reasons: layer -> why that format.
        skipped: layer -> why it stayed dense or untouched.
        tokens: layer -> rows of its input that were planned for.
        bytes_before, bytes_after: of the replaced layers' weights, indices and biases.
    """

    formats: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    skipped: Mapping[str, str] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0

    def describe(self) -> str:
        """One line a layer."""
        lines = [f"{name or '(model)'}: {self.reasons[name]}" for name in self.formats]
        lines += [f"{name or '(model)'}: {why}" for name, why in self.skipped.items()]
        return "\n".join([*lines, f"{self.bytes_before} bytes before, {self.bytes_after} after"])

    def to_json(self) -> str:
        return json.dumps({"kind": "runtime", **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> RuntimePlan:
        data = json.loads(text)
        if data.pop("kind", None) != "runtime":
            raise BadInput("not a runtime plan")
        return cls(**data)


def to_sparse_runtime(
    model: nn.Module,
    *,
    dtype: str = "float32",
    block: tuple[int, int] | None = None,
    min_sparsity: float = 0.6,
    example: object = None,
    planner: str | Machine = "measure",
    rivals: tuple[str, ...] | None = None,
) -> nn.Module:
    """A copy whose sparse Linears and convolutions run from a compact form; `result.plan` is the :class:`RuntimePlan`.

    Args:
        dtype: "float32", or "int8" (Linears only; weights rounded per output row, inputs per token; no gradients).
        block: the format, (16, 1), (8, 1), (4, 1), (1, 1), ..., for int8 (16, 4) or (4, 1); None lets the planner look for it.
        min_sparsity: layers with fewer zeros are not even tried.
        example: an input of the model (a tensor, a tuple of arguments, or a mapping of keywords), from which the size of each layer's
            input is read; without it 128 tokens are assumed, and images of 14 x 14 for convolutions.
        planner: "measure" times dense and sparse on this machine now, "always" takes the sparsest format without asking, a
            :class:`~neurarium.compress.runtime.planner.Machine` computes.
        rivals: see :func:`~neurarium.compress.runtime.planner.choose`.
    """
    if dtype not in ("float32", "int8"):
        raise BadInput(f"dtype must be 'float32' or 'int8', got {dtype!r}")
    if not 0 <= min_sparsity <= 1:
        raise BadInput(f"min_sparsity must be in [0, 1], got {min_sparsity}")
    if not (planner in ("measure", "always") or isinstance(planner, Machine)):
        raise BadInput(f"planner must be 'measure', 'always' or a Machine, got {planner!r}")
    from neurarium.compress.runtime.conv import SparseConv2d, choose_conv, pixels, unfit  # they build on this module

    layers, skipped = prunable(model, (nn.Linear, nn.Conv2d) if dtype == "float32" else (nn.Linear,))
    shapes = _shapes(model, layers, example)
    tokens: dict[str, int] = {}
    formats: dict[str, str] = {}
    reasons: dict[str, str] = {}
    made: dict[str, nn.Module] = {}
    before = after = 0
    for name, layer in layers.items():
        mask = getattr(layer, "mask", None)
        weight = layer.weight.detach() if mask is None else layer.weight.detach() * mask
        empty = 1 - ((weight != 0) if mask is None else mask).float().mean().item()
        conv = isinstance(layer, nn.Conv2d)
        if layer.weight.dtype != torch.float32 or layer.weight.device.type != "cpu":
            skipped[name] = f"is {layer.weight.dtype} on {layer.weight.device.type}; the kernels are for float32 models on the CPU"
        elif empty < min_sparsity:
            skipped[name] = f"has {empty:.0%} zeros, below min_sparsity = {min_sparsity:.0%}"
        elif conv and (why := unfit(layer)):
            skipped[name] = why
        else:
            tokens[name] = pixels(layer, shapes[name]) if conv else math.prod(shapes[name][:-1])
            if conv and planner == "measure":
                choice = choose_conv(layer, shapes[name], block=block)
            else:
                flat = None if mask is None else mask.flatten(1)
                choice = _decide(weight.flatten(1), flat, tokens[name], dtype, block, planner, rivals)
            if choice.matrix is None:
                skipped[name] = choice.reason
            else:
                sparse = SparseConv2d(choice.matrix, layer) if conv else SparseLinear(choice.matrix, layer.bias)
                made[name] = sparse.train(layer.training)
                for old, new in ((layer.weight, sparse.values), (layer.bias, sparse.bias)):
                    if isinstance(new, nn.Parameter):
                        new.requires_grad_(old.requires_grad)
                formats[name], reasons[name] = choice.name, choice.reason
                before += sum(t.numel() * t.element_size() for t in (weight, layer.bias) if t is not None)
                after += sparse.nbytes
        if name not in made and isinstance(layer, (MaskedLinear, MaskedConv2d)):
            made[name] = finalise(layer)
    result = _fused(_replaced(model, {id(layers[n]): new for n, new in made.items()}))
    result.plan = RuntimePlan(formats, reasons, skipped, {n: tokens[n] for n in formats}, before, after)
    return result


def to_dense_runtime(model: nn.Module) -> nn.Module:
    """A copy with plain Linears (and their activations) for every SparseLinear: the way back, and the way to ONNX."""
    made: dict[int, nn.Module] = {id(m): m.original for m in model.modules() if isinstance(m, FusedActivation)}
    fused = _fused_pairs(model)
    made |= {id(m): _opened(m, m not in fused) for m in model.modules() if isinstance(m, SparseLinear)}
    result = _replaced(model, made)
    if hasattr(result, "plan"):
        del result.plan
    return result


def load_sparse(model: nn.Module, state: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a dense model with the weights of a sparse one: layers that the state dict has in compact form become SparseLinears.

    `model` is the network as it was built before ``to_sparse_runtime``; its own weights do not matter.
    """
    from neurarium.compress.runtime.conv import SparseConv2d

    names = [key[: -len(".meta")] if key != "meta" else "" for key in state if key == "meta" or key.endswith(".meta")]
    modules = dict(model.named_modules())
    made = {}
    for name in names:
        prefix = f"{name}." if name else ""
        layer = modules.get(name)
        if not isinstance(layer, (nn.Linear, nn.Conv2d, SparseLinear)):
            raise BadInput(f"the state dict has a sparse layer {name!r}, the model {'none' if layer is None else type(layer).__name__}")
        matrix = _matrix_in(state, prefix)
        if matrix.shape != tuple(layer.weight.flatten(1).shape):
            raise BadInput(f"{name}: the state dict's matrix is {matrix.shape}, the layer's {tuple(layer.weight.shape)}")
        plain = isinstance(layer, nn.Conv2d)
        sparse = SparseConv2d(matrix, layer) if plain else SparseLinear(matrix, state.get(prefix + "bias"))
        made[id(layer)] = sparse.train(layer.training)
    result = _fused(_replaced(model, made))
    result.load_state_dict(state)
    return result


def _matrix_in(state: Mapping[str, Tensor], prefix: str) -> SparseMatrix | Int8Sparse:
    tensors = {k: state[prefix + k] for k in ("meta", "row_ptr", "col", "values", "scale", "row_sum") if prefix + k in state}
    if missing := {"meta", "row_ptr", "col", "values"} - set(tensors):
        raise BadInput(f"the state dict has no {prefix}{min(missing)}")
    return (Int8Sparse.from_tensors if int(tensors["meta"][0]) == 2 else from_tensors)(tensors)


def _decide(weight, mask, tokens, dtype, block, planner, rivals) -> Choice:
    if planner != "always":
        machine = planner if isinstance(planner, Machine) else None
        return choose(weight, tokens, mask=mask, dtype=dtype, block=block, rivals=rivals, machine=machine)
    forms = candidates(weight, mask=mask, dtype=dtype, block=block)
    name = min(forms, key=lambda n: forms[n].nbytes)
    return _Asked(name, forms[name], {}, tokens, False)


class _Asked(Choice):
    @property
    def reason(self) -> str:
        return f"{self.name}, as asked, without a look at the time"


def _shapes(model: nn.Module, layers: Mapping[str, nn.Module], example: object) -> dict[str, tuple[int, ...]]:
    """The shape of each layer's input, the largest where a layer runs several times."""
    seen = {name: (1, m.in_channels, 14, 14) if isinstance(m, nn.Conv2d) else (128, m.in_features) for name, m in layers.items()}
    if example is None:
        return seen
    met: set[str] = set()
    handles = []
    for name, layer in layers.items():

        def look(_module, args, kwargs, name=name):
            x = args[0] if args else next(iter(kwargs.values()))
            if name not in met or x.numel() > math.prod(seen[name]):
                seen[name] = tuple(x.shape)
            met.add(name)

        handles.append(layer.register_forward_pre_hook(look, with_kwargs=True))
    training = {m: m.training for m in model.modules()}
    try:
        with torch.no_grad():
            given = example if isinstance(example, Mapping) else {}
            model.eval()(*(() if given else example if isinstance(example, tuple) else (example,)), **given)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in training.items():
            module.training = mode
    return seen


def _opened(layer: SparseLinear, alone: bool) -> nn.Module:
    linear = layer.to_linear()
    return linear if layer.act is None or not alone else nn.Sequential(linear, nn.ReLU() if layer.act == "relu" else nn.GELU())


def _fused(model: nn.Module) -> nn.Module:
    """In every Sequential, an activation right behind a sparse layer becomes a part of it (in place; both must be used only here)."""
    users: dict[int, int] = {}
    for parent in model.modules():
        for child in parent.children():
            users[id(child)] = users.get(id(child), 0) + 1
    for parent in [m for m in model.modules() if type(m) is nn.Sequential]:
        names = list(parent._modules)
        for first, second in itertools.pairwise(names):
            layer, act = parent._modules[first], parent._modules[second]
            kind = "relu" if type(act) is nn.ReLU else "gelu" if type(act) is nn.GELU and act.approximate == "none" else None
            hooked = any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in (layer, act))
            if isinstance(layer, SparseLinear) and layer.act is None and kind and not hooked and users[id(layer)] == 1:
                layer.act = kind
                parent._modules[second] = FusedActivation(act)
    return model


def _fused_pairs(model: nn.Module) -> set[nn.Module]:
    """The sparse layers whose activation stands behind them as a FusedActivation."""
    found = set()
    for parent in model.modules():
        children = list(parent.children())
        found |= {a for a, b in itertools.pairwise(children) if isinstance(a, SparseLinear) and isinstance(b, FusedActivation)}
    return found


def _replaced(model: nn.Module, made: Mapping[int, nn.Module]) -> nn.Module:
    """A deep copy in which the modules with these ids are others, wherever they are used."""
    result = copy.deepcopy(model, dict(made))
    for module in result.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and not (type(module.linear1) is type(module.linear2) is nn.Linear):
            module.activation_relu_or_gelu = 0  # torch's fused layer would read the dense weights
    return result
