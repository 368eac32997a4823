"""A transformer taken apart: what comes before its layers, the layers, and what comes after.

:func:`take_apart` finds the parts of this room's :class:`~neurarium.dynamic.decoder.Decoder` (or anything with its names), of the causal
language models of ``transformers`` that are built like Llama, GPT-2 or OPT, and of an ``nn.Sequential`` with a child named ``blocks``, such
as :class:`~neurarium.dynamic.backbones.VisionTransformerS`. A language model's parts are **proven** on a few tokens: put together they must
give the model's own logits, so a model that does something else in between (scaled embeddings, capped logits) is refused by name.

:class:`KeyValues` holds keys and values of all layers, for any subset of the rows at a time: rows that stop early leave the deeper layers'
entries to be filled.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.dynamic.cost import evaluating
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["KeyValues", "Parts", "take_apart"]


class KeyValues:
    """Keys and values ``(n, heads, capacity, size)`` of each layer, allocated when a layer first writes.

    ``rows``: which rows run (all if ``None``); ``at``: the position that is written next. ``update`` is what the layers of ``transformers``
    call; with ``filling`` it stops the layer there, for only its keys and values are wanted.
    """

    def __init__(self, rows: int, capacity: int) -> None:
        self.shape, self.at, self.rows, self.filling = (rows, capacity), 0, None, False
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def past(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """What the layer has written before ``at``, for the rows that run."""
        return None if self.at == 0 else self._read(layer, self.at)

    def write(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Put the newest positions in their place."""
        if layer not in self.layers:
            n, capacity = self.shape
            self.layers[layer] = tuple(t.new_zeros(n, t.shape[1], capacity, t.shape[3]) for t in (keys, values))
        where = slice(None) if self.rows is None else self.rows
        for store, new in zip(self.layers[layer], (keys, values)):
            store[where, :, self.at : self.at + new.shape[2]] = new

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        del args, kwargs
        self.write(layer_idx, keys, values)
        if self.filling:
            raise _FilledError
        return self._read(layer_idx, self.at + keys.shape[2])

    def _read(self, layer: int, length: int) -> tuple[Tensor, Tensor]:
        keys, values = (t[:, :, :length] for t in self.layers[layer])
        return (keys, values) if self.rows is None else (keys[self.rows], values[self.rows])


class _FilledError(Exception):
    """A layer has handed over its keys and values."""


class Parts:
    """``embed``, then ``layers`` one after another, then the modules of ``tail``. Base class, and the parts of a ``Decoder``."""

    text = True  # reads token ids and answers at each position

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def layers(self) -> nn.ModuleList | nn.Sequential:
        return self.model.layers

    @property
    def tail(self) -> list[nn.Module]:
        """What turns the last layer's output into logits."""
        return [self.model.norm, self.model.head]

    @property
    def vocabulary(self) -> int:
        return self.model.head.out_features

    @property
    def context(self) -> int | None:
        """The longest input, if there is one."""
        return getattr(self.model, "context", None)

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        """``(n, time, width)``, ``start`` the position of the first token."""
        return self.model.embed(x, start) if start else self.model.embed(x)

    def run(self, h: Tensor, layers: Iterable[int], cache: KeyValues | None = None) -> Tensor:
        """The output of these layers, which read and write the cache if there is one."""
        for i in layers:
            if cache is None:
                h = self.layers[i](h)
                continue
            h, (k, v) = self._step(i)(h, cache.past(i))
            cache.write(i, k[:, :, cache.at :], v[:, :, cache.at :])
        return h

    def fill(self, h: Tensor, layers: Iterable[int], cache: KeyValues) -> None:
        """Write the keys and values that these layers make of ``h``, each as if ``h`` were its input, and run nothing else."""
        for i in layers:
            attention, x = self.layers[i].attention, self.layers[i].attention_norm(h)
            cache.write(i, *(m(x).unflatten(2, (attention.heads, attention.head_dim)).transpose(1, 2) for m in (attention.k, attention.v)))

    def shortened(self, depth: int) -> nn.Module:
        """A copy of the model with its first layers alone."""
        model = copy.deepcopy(self.model)
        model.layers = model.layers[:depth]
        return model

    def replace_tail(self, tail: list[nn.Module]) -> None:
        self.model.norm, self.model.head = tail

    def logits(self, ids: Tensor) -> Tensor:
        """What the model itself says."""
        return self.model(ids)

    def _step(self, i: int) -> Any:
        step = getattr(self.layers[i], "step", None)
        if step is None:
            raise UnsupportedModel("has no step(x, past) -> (x, (keys, values)) to generate with", module=f"layers.{i}")
        return step


class _Chain(Parts):
    """An ``nn.Sequential`` with a child ``blocks``."""

    text, context = False, None

    @property
    def layers(self) -> nn.Sequential:
        return self.model.blocks

    @property
    def _split(self) -> tuple[list[str], list[str]]:
        names = [name for name, _ in self.model.named_children()]
        cut = names.index("blocks")
        return names[:cut], names[cut + 1 :]

    @property
    def tail(self) -> list[nn.Module]:
        return [getattr(self.model, name) for name in self._split[1]]

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        del start
        for name in self._split[0]:
            x = getattr(self.model, name)(x)
        return x

    def shortened(self, depth: int) -> nn.Module:
        model = copy.deepcopy(self.model)
        model.blocks = model.blocks[:depth]
        return model

    def replace_tail(self, tail: list[nn.Module]) -> None:
        for name, module in zip(self._split[1], tail):
            setattr(self.model, name, module)


class _HuggingFace(Parts):
    """A causal language model of ``transformers``: the names of Llama (and its many likes), GPT-2 or OPT."""

    @property
    def base(self) -> nn.Module:
        base = self.model.transformer if hasattr(self.model, "transformer") else self.model.model
        return getattr(base, "decoder", base)

    @property
    def layers(self) -> nn.ModuleList:
        return self.base.h if hasattr(self.base, "h") else self.base.layers

    @property
    def _tail(self) -> list[tuple[nn.Module, str]]:
        names = ("norm", "ln_f", "final_layer_norm", "project_out")
        return [*((self.base, n) for n in names if getattr(self.base, n, None) is not None), (self.model, "lm_head")]

    @property
    def tail(self) -> list[nn.Module]:
        return [getattr(owner, name) for owner, name in self._tail]

    @property
    def vocabulary(self) -> int:
        return self.model.get_input_embeddings().num_embeddings

    @property
    def context(self) -> int | None:
        return getattr(self.model.config, "max_position_embeddings", None)

    def embed(self, x: Tensor, start: int = 0) -> Tensor:
        base, where = self.base, self._positions(x, start)
        if hasattr(base, "wte"):
            return base.drop(base.wte(x) + base.wpe(where))
        h = base.embed_tokens(x)
        if getattr(base, "project_in", None) is not None:
            h = base.project_in(h)
        if hasattr(base, "embed_positions"):
            seen = torch.ones(len(x), start + x.shape[1], dtype=torch.int64, device=x.device)
            h = h + base.embed_positions(seen, start, position_ids=where.expand(len(x), -1))
        return h

    def run(self, h: Tensor, layers: Iterable[int], cache: KeyValues | None = None) -> Tensor:
        where = self._positions(h, 0 if cache is None else cache.at)
        options: dict[str, Any] = {"position_ids": where, "past_key_values": cache, "attention_mask": None}
        if hasattr(self.base, "rotary_emb"):
            options["position_embeddings"] = self.base.rotary_emb(h, position_ids=where)
        time = h.shape[1]
        if time > 1 and self.model.config._attn_implementation == "eager":
            lowest = torch.full((time, time), torch.finfo(h.dtype).min, dtype=h.dtype, device=h.device)
            options["attention_mask"] = lowest.triu(1)[None, None]
        for i in layers:
            h = self.layers[i](h, **options)
        return h

    def fill(self, h: Tensor, layers: Iterable[int], cache: KeyValues) -> None:
        cache.filling = True
        try:
            for i in layers:
                try:
                    self.run(h, [i], cache)
                except _FilledError:
                    continue
        finally:
            cache.filling = False

    def shortened(self, depth: int) -> nn.Module:
        twin = _HuggingFace(copy.deepcopy(self.model))
        setattr(twin.base, "h" if hasattr(twin.base, "h") else "layers", twin.layers[:depth])
        twin.model.config.num_hidden_layers = depth
        return twin.model

    def replace_tail(self, tail: list[nn.Module]) -> None:
        for (owner, name), module in zip(self._tail, tail):
            setattr(owner, name, module)

    def logits(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits

    def _positions(self, x: Tensor, start: int) -> Tensor:
        return torch.arange(start, start + x.shape[1], device=x.device)[None]


def take_apart(model: nn.Module) -> Parts:
    """Find the parts of a model and, for a language model, prove that they are all of it.

    Raises:
        UnsupportedModel: the parts have other names, or together do not give the model's own logits.
    """
    kind = type(model).__name__
    if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
        parts: Parts = _Chain(model)
        if not isinstance(getattr(model, "blocks", None), nn.Sequential) or not len(model.blocks):
            raise UnsupportedModel("has no nn.Sequential named `blocks`", module=kind)
        if not any(p.numel() for module in parts.tail for p in module.parameters()):
            raise UnsupportedModel("has nothing to learn after its blocks: no norm and head to share over depths", module=kind)
        return parts
    if all(hasattr(model, name) for name in ("embed", "layers", "norm", "head")):
        parts = Parts(model)
    elif hasattr(model, "lm_head") and (hasattr(model, "model") or hasattr(model, "transformer")):
        parts = _HuggingFace(model)
        config = getattr(model, "config", None)
        if getattr(config, "_attn_implementation", "") not in ("sdpa", "eager"):
            raise UnsupportedModel("needs attn_implementation 'sdpa' or 'eager', whose masks are known", module=kind)
        if getattr(config, "sliding_window", None) is not None:
            raise UnsupportedModel("attends through a sliding window, which a cache by rows does not know", module=kind)
    else:
        raise UnsupportedModel("has neither embed, layers, norm, head nor a transformers decoder with an lm_head", module=kind)
    try:
        _prove(parts)
    except (AttributeError, TypeError, ValueError, IndexError, RuntimeError, BadInput) as error:
        raise UnsupportedModel(f"cannot be taken apart: {type(error).__name__}: {error}", module=kind) from error
    return parts


@torch.no_grad()
def _prove(parts: Parts) -> None:
    device = next(parts.model.parameters()).device
    ids = torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]], device=device)
    with evaluating(parts.model):
        h = parts.run(parts.embed(ids), range(len(parts.layers)))
        for module in parts.tail:
            h = module(h)
        want = parts.logits(ids)
    if h.shape != want.shape or not torch.allclose(h, want, rtol=1e-3, atol=1e-4, equal_nan=True):
        raise ValueError("embedding, layers, norm and head put together do not give the model's own logits")
