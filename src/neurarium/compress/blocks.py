"""Heads and feed-forward units of transformers, seen the same way in every library.

``TransformerBlocks.of(model)`` finds the blocks of Hugging Face GPT-2, OPT, BERT, ViT and the Llama family (Llama, Mistral, Qwen2, Qwen3,
Gemma), of ``torch.nn.TransformerEncoderLayer``, of :class:`~neurarium.compress.gpt.GPT`, and of your own class that a :class:`Layout`
describes. A block is

    attention: qkv (query, key, value), out         ffn: up (one map, or gate and up), down

each a :class:`LinearView`: rows of a matrix, however it is stored (GPT-2's Conv1D has the transposed weight and all of q, k, v in one).

Two kinds of unit can go. A *head* is rows of q, k, v and columns of out; with grouped-query attention it is a key-value head with all
query heads that read it. A *feed-forward unit* is a row of up (and gate) and a column of down. The groups of units are named
``"<block>.heads"`` and ``"<block>.ffn"``. ``remove`` makes a smaller model of plain layers, equal to that of ``zero``, which only
silences the units.

The smaller model's ``config`` is updated where it can express the new sizes (the same in all layers, and for heads an explicit
``head_dim``); ``generate`` runs either way, and ``resized`` rebuilds the shapes for a stored state dict.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import torch
from torch import Tensor, nn

from neurarium.compress.attention import SelfAttention
from neurarium.compress.calibrate import is_conv1d
from neurarium.compress.gpt import GPTBlock
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["LAYOUTS", "Block", "Layout", "LinearView", "TransformerBlocks", "explicit", "opened"]


@dataclass(frozen=True)
class Layout:
    """Where a class of blocks keeps its parts; all paths are relative to the block.

    Args:
        block: the class, or its name.
        qkv: paths of query, key and value; or one path of a layer with all three below each other, each as wide as the others.
        out: path of the attention's output projection.
        up: paths of the maps into the feed-forward units (one, or gate and up).
        down: path of the map out of them.
        head_dim: path of the attribute with the size of a head.
        sizes: path of an attribute -> "heads", "kv_heads" or "width" (heads * head_dim), set after a removal where it exists.
        config: "heads", "kv_heads", "ffn" -> the name in ``model.config`` that holds it (heads only if config has ``head_dim``).
    """

    block: str | type
    qkv: tuple[str, ...]
    out: str
    up: tuple[str, ...]
    down: str
    head_dim: str
    sizes: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, str] = field(default_factory=dict)

    def matches(self, module: nn.Module) -> bool:
        if not isinstance(self.block, str):
            return type(module) is self.block
        return type(module).__name__ == self.block and type(module).__module__.startswith("transformers.")


def _llama(block: str) -> Layout:
    return Layout(
        block, ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj", ("mlp.gate_proj", "mlp.up_proj"),
        "mlp.down_proj", "self_attn.head_dim", {"self_attn.num_heads": "heads", "self_attn.num_key_value_heads": "kv_heads"},
        {"heads": "num_attention_heads", "kv_heads": "num_key_value_heads", "ffn": "intermediate_size"},
    )  # fmt: skip


LAYOUTS: tuple[Layout, ...] = (
    Layout(
        "GPT2Block", ("attn.c_attn",), "attn.c_proj", ("mlp.c_fc",), "mlp.c_proj", "attn.head_dim",
        {"attn.num_heads": "heads", "attn.split_size": "width"}, {"ffn": "n_inner"},
    ),
    Layout(
        "OPTDecoderLayer", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.out_proj", ("fc1",), "fc2",
        "self_attn.head_dim", {"self_attn.num_heads": "heads"}, {"ffn": "ffn_dim"},
    ),
    Layout(
        "BertLayer", ("attention.self.query", "attention.self.key", "attention.self.value"), "attention.output.dense",
        ("intermediate.dense",), "output.dense", "attention.self.attention_head_size",
        {"attention.self.num_attention_heads": "heads", "attention.self.all_head_size": "width"}, {"ffn": "intermediate_size"},
    ),
    Layout(
        "ViTLayer", ("attention.q_proj", "attention.k_proj", "attention.v_proj"), "attention.o_proj", ("mlp.fc1",), "mlp.fc2",
        "attention.head_dim", {"attention.num_attention_heads": "heads"}, {"ffn": "intermediate_size"},
    ),
    *(_llama(f"{family}DecoderLayer") for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma")),
    Layout(
        GPTBlock, ("attention.q", "attention.k", "attention.v"), "attention.out", ("up",), "down", "attention.head_dim",
        {"attention.num_heads": "heads"},
    ),
)  # fmt: skip

_FUSED = Layout(
    nn.TransformerEncoderLayer, ("self_attn",), "self_attn.out_proj", ("linear1",), "linear2", "self_attn.head_dim"
)  # fmt: skip
_OPENED = Layout(
    nn.TransformerEncoderLayer, ("self_attn.q", "self_attn.k", "self_attn.v"), "self_attn.out", ("linear1",), "linear2",
    "self_attn.head_dim", {"self_attn.num_heads": "heads"},
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LinearView:
    """y = W x + b, where W is some rows of what a module stores.

    Attributes:
        name: the module's name in the model.
        module: a Linear, a Hugging Face Conv1D, or a MultiheadAttention (its input projection).
        start, stop: which of its outputs.
    """

    name: str
    module: nn.Module
    start: int
    stop: int

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs), detached; writing to it writes to the module."""
        return _matrix(self.module)[self.start : self.stop]

    @property
    def bias(self) -> Tensor | None:
        """(outputs,), detached, or None."""
        bias = self.module.in_proj_bias if isinstance(self.module, nn.MultiheadAttention) else self.module.bias
        return None if bias is None else bias.detach()[self.start : self.stop]

    @torch.no_grad()
    def add_bias(self, vector: Tensor) -> None:
        """Adds to the bias, which is made if there is none."""
        if self.bias is not None:
            self.bias.add_(vector.to(self.bias))
        elif isinstance(self.module, nn.Linear):
            bias = torch.zeros(self.module.out_features, dtype=self.module.weight.dtype, device=self.module.weight.device)
            bias[self.start : self.stop] = vector.to(bias)
            self.module.bias = nn.Parameter(bias)
        else:
            raise UnsupportedModel("has no bias to add to", module=self.name)


@dataclass(frozen=True, eq=False)
class Block:
    """One transformer block of a model.

    Attributes:
        name: its name in the model.
        qkv: query, key, value.
        out, up, down: see the module's docstring; `up` has one entry or two (gate, up).
        n_heads, n_kv_heads, head_dim: attention sizes; with r = n_heads / n_kv_heads, the query heads g r .. g r + r - 1 read
            key-value head g.
    """

    name: str
    qkv: tuple[LinearView, LinearView, LinearView]
    out: LinearView
    up: tuple[LinearView, ...]
    down: LinearView
    n_heads: int
    n_kv_heads: int
    head_dim: int
    layout: Layout
    module: nn.Module

    @property
    def ffn(self) -> int:
        """Feed-forward units."""
        return self.down.weight.shape[1]

    def readers(self, kind: str, units: Tensor) -> tuple[LinearView, Tensor]:
        """The view that reads "heads" or "ffn" units, and which of its columns belong to them."""
        if kind == "ffn":
            return self.down, units
        per = self.n_heads // self.n_kv_heads * self.head_dim
        return self.out, (units[:, None] * per + torch.arange(per)).flatten()

    def writers(self, kind: str, units: Tensor) -> list[tuple[LinearView, Tensor]]:
        """The views that make the units, each with the rows (counted within the view) that belong to them."""
        if kind == "ffn":
            return [(view, units) for view in self.up]
        _, queries = self.readers("heads", units)
        keys = (units[:, None] * self.head_dim + torch.arange(self.head_dim)).flatten()
        return [(self.qkv[0], queries), (self.qkv[1], keys), (self.qkv[2], keys)]

    def unit_parameters(self, kind: str) -> int:
        """Parameters that leave with one unit of "heads" or "ffn"."""
        one = torch.zeros(1, dtype=torch.long)
        reader, columns = self.readers(kind, one)
        made = sum(len(rows) * (view.weight.shape[1] + (view.bias is not None)) for view, rows in self.writers(kind, one))
        return made + len(columns) * reader.weight.shape[0]


class TransformerBlocks:
    """The blocks of a model and the ways to make it smaller. The model itself is never changed.

    Attributes:
        model: the model.
        blocks: its blocks in order.
        skipped: attention and blocks that no layout describes, name -> why.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[Block], skipped: Mapping[str, str], layouts: Sequence[Layout]) -> None:
        self.model, self.blocks, self.skipped, self._layouts = model, list(blocks), dict(skipped), tuple(layouts)

    @classmethod
    def of(cls, model: nn.Module, layouts: Sequence[Layout] = ()) -> TransformerBlocks:
        """The blocks of a model; `layouts` describe your own classes and come before the built-in ones."""
        blocks, inside = [], set()
        for name, module in model.named_modules():
            layout = _layout(module, (*layouts, *LAYOUTS))
            if layout is not None:
                blocks.append(_block(name, module, layout))
                inside |= {id(m) for m in module.modules()}
        skipped = {
            name: f"no layout describes this {type(m).__name__}"
            for name, m in model.named_modules()
            if id(m) not in inside and isinstance(m, nn.MultiheadAttention | nn.TransformerDecoderLayer | nn.TransformerEncoderLayer)
        }
        if not blocks:
            known = ", ".join(dict.fromkeys(x.block if isinstance(x.block, str) else x.block.__name__ for x in (*LAYOUTS, _FUSED)))
            why = "".join(f"; {name}: {reason}" for name, reason in list(skipped.items())[:2])
            raise UnsupportedModel(f"has no transformer block among {known}, or of a given Layout{why}", module=type(model).__name__)
        _refuse_shared(model, blocks)
        return cls(model, blocks, skipped, layouts)

    def __iter__(self) -> Iterator[Block]:
        return iter(self.blocks)

    def __len__(self) -> int:
        return len(self.blocks)

    def sizes(self) -> dict[str, int]:
        """Unit group -> number of units; heads are counted as key-value heads."""
        return {key: n for b in self.blocks for key, n in ((_key(b, "heads"), b.n_kv_heads), (_key(b, "ffn"), b.ffn))}

    def unit_parameters(self) -> dict[str, int]:
        """Unit group -> parameters that leave with each of its units."""
        return {_key(b, kind): b.unit_parameters(kind) for b in self.blocks for kind in ("heads", "ffn")}

    def check(self, kept: Mapping[str, Tensor | Sequence[int]]) -> dict[str, Tensor]:
        """The kept indices, sorted. Raises BadInput for unknown groups, bad indices, and groups that would lose all units."""
        sizes, result = self.sizes(), {}
        for key, units in kept.items():
            if key not in sizes:
                raise BadInput(f"unknown unit group {key!r}; the model has {', '.join(list(sizes)[:4])}, ...")
            index = torch.as_tensor(units, dtype=torch.long).cpu().flatten()
            if len(index) == 0:
                raise BadInput(f"{key}: would lose all of its {sizes[key]} units; keep at least one")
            if int(index.min()) < 0 or int(index.max()) >= sizes[key] or len(index.unique()) != len(index):
                raise BadInput(f"{key}: kept indices must be different and in 0 .. {sizes[key] - 1}, got {index.tolist()[:8]}")
            result[key] = index.sort().values
        return result

    def zero(self, kept: Mapping[str, Tensor | Sequence[int]]) -> nn.Module:
        """A copy of the same shape in which nothing reads the units that are not kept. Groups that are not named keep all."""
        kept, twin = self.check(kept), self._twin()
        with torch.no_grad():
            for block in twin.blocks:
                for kind in ("heads", "ffn"):
                    if (key := _key(block, kind)) in kept:
                        gone = torch.ones(self.sizes()[key], dtype=torch.bool).index_fill(0, kept[key], False).nonzero()[:, 0]
                        view, columns = block.readers(kind, gone)
                        view.weight[:, columns.to(view.weight.device)] = 0
        return twin.model

    def remove(self, kept: Mapping[str, Tensor | Sequence[int]]) -> nn.Module:
        """A smaller copy with only the kept units of each named group, e.g. ``{"model.layers.0.heads": [0, 2]}``."""
        kept, twin = self.check(kept), self._twin()
        for block in twin.blocks:
            heads, ffn = kept.get(_key(block, "heads")), kept.get(_key(block, "ffn"))
            if ffn is not None and len(ffn) < block.ffn:
                _shrink(block, "ffn", ffn)
            if heads is not None and len(heads) < block.n_kv_heads:
                if isinstance(block.qkv[0].module, nn.MultiheadAttention):
                    block.module.self_attn = SelfAttention.of(block.module.self_attn, f"{block.name}.self_attn".lstrip("."))
                    block = _block(block.name, block.module, _OPENED)
                _shrink(block, "heads", heads)
                ratio = block.n_heads // block.n_kv_heads
                new = {"heads": ratio * len(heads), "kv_heads": len(heads), "width": ratio * len(heads) * block.head_dim}
                for path, size in block.layout.sizes.items():
                    owner, _, attribute = path.rpartition(".")
                    if hasattr(block.module.get_submodule(owner), attribute):
                        setattr(block.module.get_submodule(owner), attribute, new[size])
        _avoid_nested(twin.model)
        _update_config(twin.model, TransformerBlocks.of(twin.model, self._layouts).blocks)
        return twin.model

    def resized(self, sizes: Mapping[str, int]) -> nn.Module:
        """A copy with so many units in each group, for loading the state dict of a model that ``remove`` made.

        ``TransformerBlocks.of(fresh).resized(TransformerBlocks.of(small).sizes()).load_state_dict(small.state_dict())``
        """
        return self.remove({key: range(n) for key, n in sizes.items()})

    def _twin(self) -> TransformerBlocks:
        return TransformerBlocks.of(copy.deepcopy(self.model), self._layouts)


def explicit(model: nn.Module) -> nn.Module:
    """A copy, equal as a function, in which every linear map is an ``nn.Linear`` that is called.

    The attention of ``torch.nn.TransformerEncoderLayer`` becomes :class:`~neurarium.compress.attention.SelfAttention`, Hugging Face's
    Conv1D a Linear with the transposed weight. Then calibration, masks and quantisers that know Linear reach all of them.
    """
    result = copy.deepcopy(model)
    uses = [id(p) for m in result.modules() for p in m._parameters.values() if p is not None]
    made: dict[int, nn.Module] = {}  # a layer used in two places stays one layer
    for name, module in list(result.named_modules()):
        for child_name, child in list(module._modules.items()):
            full = f"{name}.{child_name}".lstrip(".")
            if isinstance(module, nn.TransformerEncoderLayer) and type(child) is nn.MultiheadAttention:
                module._modules[child_name] = made.setdefault(id(child), SelfAttention.of(child, full))
            elif is_conv1d(child):
                if uses.count(id(child.weight)) > 1:
                    raise UnsupportedModel("its weight is tied to another module's", module=full)
                module._modules[child_name] = made.setdefault(id(child), _linear(child))
    _avoid_nested(result)
    return result


def opened(model: nn.Module) -> nn.Module:
    """``explicit(model)`` if that differs from the model, else the model itself."""
    for module in model.modules():
        if is_conv1d(module) or (isinstance(module, nn.TransformerEncoderLayer) and type(module.self_attn) is nn.MultiheadAttention):
            return explicit(model)
    return model


def _linear(conv: nn.Module) -> nn.Linear:
    new = nn.Linear(conv.nx, conv.nf, device="meta").train(conv.training)
    new.weight = nn.Parameter(conv.weight.detach().T.contiguous(), conv.weight.requires_grad)
    new.bias = nn.Parameter(conv.bias.detach().clone(), conv.bias.requires_grad)
    return new


def _layout(module: nn.Module, layouts: Sequence[Layout]) -> Layout | None:
    if type(module) is nn.TransformerEncoderLayer:
        return _OPENED if isinstance(module.self_attn, SelfAttention) else _FUSED
    return next((x for x in layouts if x.matches(module)), None)


def _block(name: str, module: nn.Module, layout: Layout) -> Block:
    def view(path: str, start: int = 0, stop: int | None = None) -> LinearView:
        full = f"{name}.{path}".lstrip(".")
        try:
            part = module.get_submodule(path)
        except AttributeError as error:
            raise UnsupportedModel(f"a {type(module).__name__} without {path}", module=name) from error
        plain = type(part) in (nn.Linear, nn.modules.linear.NonDynamicallyQuantizableLinear) or is_conv1d(part)
        attention = type(part) is nn.MultiheadAttention and part.in_proj_weight is not None
        if not plain and not attention:
            raise UnsupportedModel(f"is a {type(part).__name__}, not a plain linear layer (bake masks in with finalise first)", module=full)
        return LinearView(full, part, start, len(_matrix(part)) if stop is None else stop)

    head_dim = reduce(getattr, layout.head_dim.split("."), module)
    if len(layout.qkv) == 1:
        third = len(view(layout.qkv[0]).weight) // 3
        q, k, v = (view(layout.qkv[0], i * third, (i + 1) * third) for i in range(3))
    else:
        q, k, v = (view(path) for path in layout.qkv)
    out, up, down = view(layout.out), tuple(view(p) for p in layout.up), view(layout.down)
    heads, kv_heads = len(q.weight) // head_dim, len(k.weight) // head_dim
    fits = len(q.weight) == heads * head_dim == out.weight.shape[1] and len(k.weight) == len(v.weight) == kv_heads * head_dim
    if not fits or heads % kv_heads or any(len(u.weight) != down.weight.shape[1] for u in up):
        raise UnsupportedModel(
            f"sizes do not fit: q, k, v make {len(q.weight)}, {len(k.weight)}, {len(v.weight)} features in heads of {head_dim}, out reads "
            f"{out.weight.shape[1]}; up makes {[len(u.weight) for u in up]}, down reads {down.weight.shape[1]}", module=name,
        )  # fmt: skip
    return Block(name, (q, k, v), out, up, down, heads, kv_heads, head_dim, layout, module)


def _matrix(module: nn.Module) -> Tensor:
    """The stored weight as (outputs, inputs)."""
    if isinstance(module, nn.MultiheadAttention):
        return module.in_proj_weight.detach()
    return module.weight.detach().T if is_conv1d(module) else module.weight.detach()


def _refuse_shared(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Two names for one weight: cutting it here would change it elsewhere."""
    owners: dict[int, set[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module._parameters.values():
            owners.setdefault(id(parameter), set()).add(name)
    for block in blocks:
        for view in (*block.qkv, block.out, *block.up, block.down):
            names = {name for p in view.module._parameters.values() if p is not None for name in owners[id(p)]}
            if len(names) > 1:
                other = min(names - {view.name})
                raise UnsupportedModel(f"its weight is shared with {other}; removing units here would change it there", module=view.name)


def _key(block: Block, kind: str) -> str:
    return f"{block.name}.{kind}".lstrip(".")


def _shrink(block: Block, kind: str, units: Tensor) -> None:
    """Fresh, smaller parameters for everything that makes or reads the units."""
    reader, columns = block.readers(kind, units)
    _cut(reader.module, None, columns)
    rows: dict[int, tuple[nn.Module, list[Tensor]]] = {}
    for view, index in block.writers(kind, units):
        rows.setdefault(id(view.module), (view.module, []))[1].append(index + view.start)
    for module, parts in rows.values():
        _cut(module, torch.cat(parts), None)


def _cut(module: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    transposed = is_conv1d(module)
    weight, bias = module.weight, module.bias
    for dim, index in ((int(transposed), rows), (1 - int(transposed), columns)):
        if index is not None:
            weight = weight.detach().index_select(dim, index.to(weight.device))
    if rows is not None and bias is not None:
        module.bias = nn.Parameter(bias.detach()[rows.to(bias.device)], bias.requires_grad)
    module.weight = nn.Parameter(weight.contiguous(), module.weight.requires_grad)
    outputs, inputs = module.weight.shape[::-1] if transposed else module.weight.shape
    if transposed:
        module.nf, module.nx = outputs, inputs
    else:
        module.out_features, module.in_features = outputs, inputs


def _avoid_nested(model: nn.Module) -> None:
    """torch's encoder packs padded batches into nested tensors if its first layer can take them; opened attention cannot."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, SelfAttention) for m in module.modules()):
            module.enable_nested_tensor = module.use_nested_tensor = False


def _update_config(model: nn.Module, blocks: Sequence[Block]) -> None:
    """Writes sizes that are equal in all blocks to the config, where it can express them."""
    config = getattr(model, "config", None)
    names = blocks[0].layout.config
    if config is None or not names or len({id(b.layout) for b in blocks}) > 1:
        return
    new = {"heads": {b.n_heads for b in blocks}, "kv_heads": {b.n_kv_heads for b in blocks}, "ffn": {b.ffn for b in blocks}}
    same = {key: next(iter(values)) for key, values in new.items() if len(values) == 1}
    if "ffn" in same and hasattr(config, names["ffn"]):
        setattr(config, names["ffn"], same["ffn"])
    if "heads" in same and hasattr(config, names.get("heads", "")) and config.hidden_size % same["heads"] == 0:
        config.head_dim = blocks[0].head_dim
        setattr(config, names["heads"], same["heads"])
        setattr(config, names["kv_heads"], same["kv_heads"])
