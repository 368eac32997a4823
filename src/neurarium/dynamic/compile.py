"""DyCL: compile what decides, by moving the decisions out of what is compiled.

A compiler follows one path. Of a network that decides at run time it refuses to make a program, or it makes one that is wrong on every
other path without saying so. :func:`split` cuts the network at its decisions into *segments* that only compute, and a *plan* that only
decides: call a segment, ask, go on here or there, return. Any compiler takes a segment; a small host program of plain Python and numpy
interprets the plan::

    program = split(policy, x)                 # segments and plan; runs like the policy
    fast = program.compile("onnx")             # or "export", "inductor"
    fast.decide(x, budget=1e6)                 # output, cost and choice of every row: what the policy would have said
    program.save("folder")                     # .onnx, plan.json and a host.py that needs onnxruntime and numpy alone

*Front ends.* Policies are split along what they offer: stages and gates (:func:`from_staged`), configurations of a family
(:func:`from_family`), or a method ``program(example)`` that builds with :class:`Builder`. Of any other module the source is read
(:func:`from_source`).

*Rows.* With ``rows="each"`` (not in the paper, which runs one input at a time) every row goes its own way: the host parts the rows where
they answer differently, runs the next segment on those that need it, and lets them meet again, so that a batch costs what its rows cost.
Scores are computed inside segments, where the policy computes them, and only compared outside, in their own dtype.

*Source.* Chen, Wei, Zhao, Wu, Yang, "DyCL: Dynamic Neural Network Compilation Via Program Rewriting and Graph Optimization", arXiv
2307.04963.

*Departures.* The graph passes are reconstructed from the paper's description: segments that only one other one leads to are merged with it,
outputs that nobody reads are dropped, equal segments are compiled once, loops of known length are unrolled. Python numbers that change in
a loop of unknown length become tensors of the program.

*Cost.* Splitting runs each segment once on a few rows. The host adds some ten microseconds a segment. ``Outcome.cost`` is what the policy
charges.
"""

from __future__ import annotations

import copy
import functools
import inspect
import json
import logging
import pathlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_map, tree_unflatten, treespec_dumps, treespec_loads

from neurarium.dynamic import host as host_module
from neurarium.dynamic.cost import evaluating
from neurarium.dynamic.exits import EarlyExit
from neurarium.dynamic.family import FamilyPolicy
from neurarium.dynamic.host import Arrays, Host
from neurarium.dynamic.outcome import Policy
from neurarium.dynamic.staged import step
from neurarium.dynamic.tree import rows as count
from neurarium.dynamic.tree import take
from neurarium.errors import BadInput, MissingExtra, UnsupportedModel
from neurarium.roles import Outcome

__all__ = ["Builder", "Plan", "Program", "from_family", "from_staged", "load_program", "split"]

Rows = Literal["each", "batch"]
Backend = Literal["eager", "export", "onnx", "inductor"]
SAMPLE = 4  # rows that segments are traced with: exporters treat 0 and 1 as constants


def split(module: nn.Module, example: Any, *, rows: Rows = "each") -> Program:
    """Cut ``module`` at its decisions.

    Args:
        module: a policy of this room, or any module whose source can be read. It is copied in evaluation mode, as it is now; later
            training does not reach the program.
        example: a batch that the module takes.
        rows: ``"each"``: every row goes its own way. ``"batch"``: one decision for the whole batch (for modules read from source).

    A policy of your own that is neither staged nor a family offers ``program(example) -> Program``, see :class:`Builder`.

    Raises:
        UnsupportedModel: names what, or which line, cannot be compiled.
    """
    if rows not in ("each", "batch"):
        raise BadInput(f"rows must be 'each' or 'batch', not {rows!r}")
    if count(example) == 0:
        raise BadInput("an empty batch cannot be split on: pass at least one row")
    own = getattr(module, "program", None)
    decides = callable(own) or isinstance(module, Policy)
    if decides and rows == "batch":
        raise BadInput("a policy decides for each row: rows='batch' is for modules that are read from source")
    if not decides:
        from neurarium.dynamic.rewrite import from_source

        return from_source(module, example, rows=rows)
    module = copy.deepcopy(module).eval()
    if callable(own):
        return module.program(example)
    if isinstance(module, FamilyPolicy):
        return from_family(module, example)
    if isinstance(module, EarlyExit):
        return from_staged(module, example)
    raise UnsupportedModel(
        "is neither an EarlyExit nor a FamilyPolicy: give it a method program(example) that returns a Program (see Builder)",
        module=type(module).__name__,
    )


def sample(example: Any) -> Any:
    """A few rows of ``example``."""
    n = count(example)
    return take(example, torch.arange(max(SAMPLE, min(n, SAMPLE))) % n)


def from_staged(policy: EarlyExit, example: Any) -> Program:
    """A segment a stage, its gate included. The thresholds and the calibrated curve are data of the plan."""
    build, table = Builder(example), policy.costs(example)
    carry: Any = build.inputs
    last = policy.staged.n_stages - 1
    for k in range(last + 1):
        y, score, carry = build.call(_Stage(policy, k), carry, cost=table.steps[k])
        if k < last:
            build.leave_if(score, tau=k, output=y, choice=k, score=score)
    build.leave(y, choice=last, score=1.0)
    menu = []
    if policy.curve is not None:
        prices = policy.curve.cost(table).tolist()
        menu = [{"cost": c, "setting": t} for c, t in zip(prices, policy.curve.tau.to(policy.tau).tolist())]
    return build.program(setting=policy.tau.tolist(), menu=menu)


class _Stage(nn.Module):
    def __init__(self, policy: EarlyExit, k: int) -> None:
        super().__init__()
        self.staged, self.gate, self.k = policy.staged, policy.gate, k

    def forward(self, carry: Any) -> Any:
        state, memory = (self.staged.start(carry), None) if self.k == 0 else carry
        state, y, score, memory = step(self.staged, self.gate, self.k, state, memory)
        return y, score, (state, memory)


def from_family(policy: FamilyPolicy, example: Any, *, configs: Iterable[int] | None = None) -> Program:
    """A segment a configuration: by default those that some budget picks, and the current one."""
    prices = policy.prices(example).tolist()
    known = policy.scores is not None or policy.search_free
    front = policy.front(example) if known else tuple(range(len(prices)))
    chosen = sorted({*(front if configs is None else configs), policy.setting})
    build = Builder(example)
    build.switch(chosen)
    for index in chosen:
        build.at(index)
        alone = policy.family.extract(policy.configs[index]).eval()
        build.leave(build.call(alone, build.inputs, cost=prices[index]), choice=index)
    menu = [{"cost": float(prices[i]), "setting": i} for i in front if i in chosen] if known else []
    return build.program(setting=policy.setting, menu=menu, settings=chosen)


@dataclass(frozen=True)
class Plan:
    """What the host interprets, as plain data.

    Attributes:
        nodes: each a mapping with ``do``: ``call`` (``segment``, ``in``, ``out``, ``cost`` in FLOPs a row, ``next``), ``name`` (``out``,
            ``in``, ``next``: the same value under another name), ``ask`` (``on``,
            ``tau``: the number of the threshold, or none if the value is true or false; ``yes``, ``no``), ``switch`` (``to``: by
            setting), ``return`` (``out``, ``choice``, ``score``, ``price``, ``more``); and with ``live``: the values needed from here on.
        inputs: names of the inputs.
        output: shape (of one row) and dtype of each output.
        rows: ``"each"`` or ``"batch"``.
        setting: the current thresholds, or the current configuration.
        settings: the configurations that there are.
        menu: ``cost`` and ``setting``, cheapest first: what a budget buys.
        segments: file names, once saved.
    """

    nodes: list[dict[str, Any]]
    inputs: list[str]
    output: list[tuple[list[int], str]]
    structure: str
    rows: Rows = "each"
    setting: Any = None
    settings: Sequence[int] = ()
    menu: Sequence[Mapping[str, Any]] = ()
    segments: Sequence[str] = ()

    def to_json(self) -> str:
        return json.dumps(_finite(asdict(self)), indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        return cls(**json.loads(text))

    def listing(self) -> str:
        """The program as a list of steps."""
        lines = [f"takes {', '.join(self.inputs)}"]
        for i, node in enumerate(self.nodes):
            match node["do"]:
                case "call":
                    text = f"{', '.join(node['out'])} = segment_{node['segment']}({', '.join(node['in'])})"
                    text += f"    # {node['cost']:,} FLOPs a row" + ("" if node["next"] == i + 1 else f", then {node['next']}")
                case "name":
                    text = f"{', '.join(node['out'])} = {', '.join(node['in'])}" + (
                        "" if node["next"] == i + 1 else f"    # then {node['next']}"
                    )
                case "ask":
                    asked = node["on"] if node["tau"] is None else f"{node['on']} >= tau[{node['tau']}]"
                    text = f"if {asked}: go to {node['yes']}, else to {node['no']}"
                case "switch":
                    text = "by setting: " + ", ".join(f"{k} to {v}" for k, v in node["to"].items())
                case _:
                    text = f"return {', '.join(node['out'])}    # choice {node['choice']}"
            lines.append(f"{i:3}: {text}")
        return "\n".join(lines)


def _finite(tree: Any) -> Any:
    """JSON has no infinity: as text, which float() reads."""
    if isinstance(tree, Mapping):
        return {k: _finite(v) for k, v in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(v) for v in tree]
    return str(tree) if isinstance(tree, float) and tree in (float("inf"), float("-inf")) else tree


class Piece(nn.Module):
    """A segment: tensors in, a tuple of tensors out, no control flow. ``takes`` and ``gives`` say which leaves of the body's argument and
    result these are; other leaves of the argument are constants."""

    def __init__(self, body: nn.Module, argument: Any) -> None:
        super().__init__()
        self.body = body
        leaves, self.spec = tree_flatten(argument)
        self.fill = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        self.takes = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        self.gives: list[int] | None = None

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        leaves = list(self.fill)
        for i, tensor in zip(self.takes, tensors):
            leaves[i] = tensor
        out = tree_leaves(self.body(tree_unflatten(leaves, self.spec)))
        return tuple(out if self.gives is None else (out[i] for i in self.gives))


class Builder:
    """Writes a program down step by step: what ``policy.program(example)`` of a policy with a structure of its own uses::

        def program(self, example):
            build = Builder(example)
            state, y, score = build.call(self.first, build.inputs, cost=...)    # names of values, nested as the module's result
            build.leave_if(score, tau=0, output=y, choice=0, score=score)      # rows with score >= tau[0] leave
            build.leave(build.call(self.second, state, cost=...), choice=1)
            return build.program(setting=[0.5], menu=[{"cost": c, "setting": [t]} for c, t in ...])

    A module gets one argument (a nest of values) and must only compute: no ``.item()``, no Python branch on a tensor. ``choice``,
    ``score``, ``price`` and ``more`` (FLOPs beside the sum of what was called) of a leaving row are numbers or names of values.
    """

    def __init__(self, example: Any, *, rows: Rows = "each") -> None:
        self.rows = rows
        self.samples: dict[str, Tensor] = {}
        self.nodes: list[dict[str, Any]] = []
        self.segments: list[Piece] = []
        self.examples: list[tuple[Tensor, ...]] = []
        self.inputs = tree_map(self._name, sample(example) if rows == "each" else example)
        self.names = list(self.samples)
        self._switch: dict[str, Any] | None = None
        self._structure: TreeSpec | None = None

    def _name(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        name = f"v{len(self.samples)}"
        self.samples[name] = value.detach()
        return name

    def call(self, body: nn.Module, argument: Any, *, cost: int) -> Any:
        """Run ``body`` on the values that ``argument`` names; returns the names of what comes out, nested alike."""
        sample = tree_map(lambda v: self.samples.get(v, v) if isinstance(v, str) else v, argument)
        names = [v for v in tree_leaves(argument) if isinstance(v, str) and v in self.samples]
        piece = Piece(body, sample)
        with torch.no_grad(), evaluating(body):
            result = body(sample)
            leaves, structure = tree_flatten(result)
            where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
            piece.gives = where
            used, same = wiring(piece, [self.samples[n] for n in names])
        given: list[Any] = list(leaves)
        fresh: list[str] = []
        kept: list[int] = []
        for i, position in enumerate(where):
            kind, source = same.get(i, ("new", 0))
            if kind == "new":
                given[position] = self._name(leaves[position])
                fresh.append(given[position])
                kept.append(position)
            else:
                given[position] = names[source] if kind == "input" else given[where[source]]
        every, piece.gives, piece.takes = piece.takes, kept, [piece.takes[i] for i in used]
        inputs = [names[i] for i in used]
        try:
            with torch.no_grad(), evaluating(body):
                piece(*(self.samples[v] for v in inputs))
        except (AttributeError, TypeError):  # it asks for the shape of an input that it does not compute with
            piece.takes, inputs = every, names
        if self.rows == "each" and any(len(self.samples[v]) != SAMPLE for v in inputs + fresh if self.samples[v].ndim):
            raise UnsupportedModel("puts out a tensor that is not batch-first", module=type(body).__name__)
        self.segments.append(piece)
        self.examples.append(tuple(self.samples[v] for v in inputs))
        node = {"do": "call", "segment": len(self.segments) - 1, "in": inputs, "out": fresh, "cost": int(cost), "next": len(self.nodes) + 1}
        self.nodes.append(node)
        return tree_unflatten(given, structure)

    def leave_if(self, on: str, *, tau: int | None = None, output: Any, choice: Any, score: Any = None, price: Any = None) -> None:
        """Rows whose value ``on`` reaches threshold number ``tau`` (without one: is true) leave with ``output``."""
        here = len(self.nodes)
        self.nodes.append({"do": "ask", "on": on, "tau": tau, "yes": here + 1, "no": here + 2})
        self.leave(output, choice=choice, score=score, price=price)

    def leave(self, output: Any, *, choice: Any = 0, score: Any = None, price: Any = None, more: Any = None) -> None:
        """All rows that get here leave."""
        names, self._structure = tree_flatten(output)
        self.nodes.append({"do": "return", "out": names, "choice": choice, "score": score, "price": price, "more": more})

    def switch(self, settings: Sequence[int]) -> None:
        """Go on where :meth:`at` says for the current setting."""
        self._switch = {"do": "switch", "to": {str(s): -1 for s in settings}}
        self.nodes.append(self._switch)

    def at(self, setting: int) -> None:
        """What follows is for this setting."""
        assert self._switch is not None
        self._switch["to"][str(setting)] = len(self.nodes)

    def program(self, *, setting: Any = None, menu: Sequence[Mapping[str, Any]] = (), settings: Sequence[int] = ()) -> Program:
        """Drop what nobody reads and finish."""
        live = liveness(self.nodes)
        for node, alive in zip(self.nodes, live):
            node["live"] = sorted(alive)
        for node in self.nodes:
            if node["do"] == "call":
                needed = live[node["next"]]
                piece = self.segments[node["segment"]]
                kept = [i for i, name in enumerate(node["out"]) if name in needed]
                node["out"], piece.gives = [node["out"][i] for i in kept], [piece.gives[i] for i in kept]
        final = next(node for node in self.nodes if node["do"] == "return")
        output = [(list(t.shape[1:]), str(t.dtype).removeprefix("torch.")) for t in (self.samples[v] for v in final["out"])]
        assert self._structure is not None
        plan = Plan(
            self.nodes, self.names, output, treespec_dumps(self._structure), rows=self.rows, setting=setting, settings=list(settings),
            menu=list(menu),
        )  # fmt: skip
        return Program(self.segments, plan, self.examples)


def wiring(piece: nn.Module, inputs: Sequence[Tensor]) -> tuple[list[int], dict[int, tuple[str, int]]]:
    """Which inputs are read at all; and which outputs only repeat an input or an earlier output."""
    try:
        graph = make_fx(lambda *t: piece(*t))(*inputs).graph
    except RuntimeError as error:
        if "tracing tensor" not in str(error):
            raise
        raise UnsupportedModel(
            "decides inside a segment (.item(), or an if on a tensor): " + str(error).splitlines()[0], module=type(piece).__name__
        ) from error
    holders = [node for node in graph.nodes if node.op == "placeholder"]
    (results,) = next(node for node in graph.nodes if node.op == "output").args
    outputs, same = list(results), {}
    for i, node in enumerate(outputs):
        if node in holders:
            same[i] = "input", holders.index(node)
        elif node in outputs[:i]:
            same[i] = "output", outputs.index(node)
    used = [i for i, node in enumerate(holders) if any(user.op != "output" for user in node.users)]
    return used, same


def liveness(nodes: Sequence[Mapping[str, Any]]) -> list[set[str]]:
    """The values that each node, or one after it, reads before they are written."""
    live: list[set[str]] = [set() for _ in nodes]
    changed = True
    while changed:
        changed = False
        for i in reversed(range(len(nodes))):
            node = nodes[i]
            match node["do"]:
                case "call" | "name":
                    now = live[node["next"]] - set(node["out"]) | set(node["in"])
                case "ask":
                    now = {node["on"]} | live[node["yes"]] | live[node["no"]]
                case "switch":
                    now = set().union(*(live[j] for j in node["to"].values()))
                case _:
                    now = {*node["out"], *(v for v in (node.get(k) for k in ("choice", "score", "price", "more")) if isinstance(v, str))}
            if now != live[i]:
                live[i], changed = now, True
    return live


_ONE, _NONE = torch.zeros(1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)


@functools.lru_cache(4096)
def _in(dtype: torch.dtype, tau: float) -> float:
    """A threshold as the dtype of the score has it."""
    return float(torch.tensor(tau, dtype=dtype))


class _Tensors:
    """:class:`~neurarium.dynamic.host.Arrays` for tensors of any device."""

    join = staticmethod(torch.cat)
    arange = staticmethod(torch.arange)
    order = staticmethod(torch.argsort)
    take = staticmethod(lambda a, index: a.index_select(0, index.to(a.device)))
    like = staticmethod(lambda a, n, value: a.new_full((n,), value))

    @staticmethod
    def numbers(n: int, value: int = 0) -> Tensor:
        return torch.full((n,), value, dtype=torch.int64)

    @staticmethod
    def part(answer: Tensor, tau: float | None) -> tuple[Tensor, Tensor]:
        answer = answer.detach().reshape(-1)
        if len(answer) == 1:  # one row: no need to look for where it is
            return (_ONE, _NONE) if (bool(answer) if tau is None else float(answer) >= _in(answer.dtype, tau)) else (_NONE, _ONE)
        yes = answer.bool() if tau is None else answer >= torch.tensor(tau, dtype=answer.dtype, device=answer.device)
        return yes.nonzero().squeeze(1), (~yes).nonzero().squeeze(1)

    @staticmethod
    def nothing(shape: Sequence[int], dtype: str) -> Tensor:
        return torch.zeros(0, *shape, dtype=getattr(torch, dtype))


def _tensor(array: Any) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


class _Host(Host):
    error = BadInput


class Program(nn.Module):
    """Segments that only compute and a plan that only decides; runs like what it was split from.

    ``decide`` and ``use`` are the policy's, with what the plan knows: budgets need a calibrated policy. ``segments`` holds the modules of
    the present ``backend``.
    """

    def __init__(self, segments: Sequence[nn.Module], plan: Plan, examples: Sequence[tuple[Tensor, ...]] = (), backend: str = "eager"):
        super().__init__()
        self.segments, self.backend = nn.ModuleList(segments), backend
        self.shapes = [[(tuple(t.shape), t.dtype, str(t.device)) for t in tensors] for tensors in examples]
        numpy = backend == "onnx"  # there the host, too, works on numpy: small tensors cost more than the work on them
        self.host = _Host(asdict(plan), self._call_numpy if numpy else self._call, Arrays if numpy else _Tensors)
        self._sessions = [(s.session, s.names) for s in segments] if numpy else []
        self.structure = treespec_loads(plan.structure)
        self.training = False

    def train(self, mode: bool = True) -> Program:
        """A program is in evaluation mode, as its module was when it was split."""
        del mode
        return self

    @property
    def examples(self) -> list[tuple[Tensor, ...]]:
        """Inputs of the segments' shapes, to trace with."""
        return [tuple(torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in s) for s in self.shapes]

    def _call(self, k: int, tensors: list[Tensor]) -> Sequence[Tensor]:
        return self.segments[k](*tensors)

    def _call_numpy(self, k: int, arrays: list[Any]) -> Sequence[Any]:
        session, names = self._sessions[k]
        return session.run(None, dict(zip(names, arrays)))

    @property
    def plan(self) -> Plan:
        """The plan, with the current setting."""
        return replace(Plan(**self.host.plan), setting=self.host.setting)

    def forward(self, x: Any) -> Any:
        return self.decide(x).output

    def decide(self, x: Any, *, budget: float | None = None, threshold: float | None = None, config: int | None = None) -> Outcome:
        """As the policy's. An empty batch gives an empty output."""
        inputs = self._inputs(x)
        device = inputs[0].device
        if self.backend == "onnx":
            said = self.host.decide(*(t.detach().cpu().numpy() for t in inputs), budget=budget, threshold=threshold, config=config)
            said = {k: [torch.from_numpy(a).to(device) for a in v] if k == "output" else _tensor(v) for k, v in said.items()}
        else:
            said = self.host.decide(*inputs, budget=budget, threshold=threshold, config=config)
        output = tree_unflatten(said["output"], self.structure)
        return Outcome(output, *(None if said[k] is None else said[k].to(device) for k in ("cost", "choice", "score", "price")))

    def _inputs(self, x: Any) -> list[Tensor]:
        leaves = [leaf for leaf in tree_leaves(x) if isinstance(leaf, Tensor)]
        if not leaves:
            raise BadInput(f"expected tensors, not {type(x).__name__}")
        return leaves

    def use(self, *, budget: float | None = None, threshold: float | None = None, config: int | None = None) -> Program:
        """Make a budget, a threshold or a configuration the current setting."""
        self.host.use(budget=budget, threshold=threshold, config=config)
        return self

    def compile(self, backend: Backend = "export") -> Program:
        """The same program on other segments: ``"export"`` (one ``torch.export`` program each), ``"onnx"`` (ONNX Runtime), ``"inductor"``
        (``torch.compile``). Any batch size works on all of them."""
        if backend not in ("eager", "export", "onnx", "inductor"):
            raise BadInput(f"backend must be 'eager', 'export', 'onnx' or 'inductor', not {backend!r}")
        if backend == self.backend:
            return self
        if self.backend != "eager":
            raise BadInput(f"this program is compiled for {self.backend} already: compile the one that split returned")
        if backend == "eager":
            return self
        if backend == "export":
            segments: list[nn.Module] = [e.module() for e in self.exported()]
        elif backend == "onnx":
            segments = [_OnnxSegment(binary) for binary in self._onnx()]
        else:
            segments = [_Compiled(s) for s in self.segments]
        return Program(segments, self.plan, self.examples, backend)

    def exported(self) -> list[torch.export.ExportedProgram]:
        """Each segment as a ``torch.export`` program with a free batch size."""
        if self.backend != "eager":
            raise BadInput("only the program that split returned can be exported")
        if not hasattr(self, "_exported"):
            object.__setattr__(self, "_exported", [self._export(s, e) for s, e in zip(self.segments, self.examples)])
        return self._exported

    def _export(self, segment: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
        n = max((len(t) for t in example if t.ndim), default=0)
        free = torch.export.Dim("n", min=1, max=2**16)
        dims = [{0: free} if t.ndim and len(t) == n > 1 else None for t in example]
        with torch.no_grad():
            try:
                return torch.export.export(segment, example, dynamic_shapes=(tuple(dims),))
            except (ValueError, RuntimeError):  # len(x) is a constant to it
                return torch.export.export(segment, example, dynamic_shapes=(tuple(dims),), strict=True)

    def _onnx(self) -> list[bytes]:
        for package in ("onnx", "onnxscript", "onnxruntime"):
            try:
                __import__(package)
            except ImportError as error:
                raise MissingExtra(package, "export") from error
        with _quick_exporter():
            return [_to_onnx(e, s) for e, s in zip(self.exported(), self.examples)]

    def host_source(self) -> str:
        """The host program of this plan: what ``save`` writes as ``host.py``."""
        steps = "\n".join(f"#   {line}" for line in self.plan.listing().splitlines())
        return f"# The program in this folder:\n#\n{steps}\n\n{inspect.getsource(host_module)}"

    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Write the segments as .onnx, ``plan.json`` and ``host.py``, which together run without torch and without neurarium."""
        folder = pathlib.Path(folder)
        binaries = [s.binary for s in self.segments] if self.backend == "onnx" else self._onnx()
        folder.mkdir(parents=True, exist_ok=True)
        names = [f"segment_{k}.onnx" for k in range(len(binaries))]
        for name, binary in zip(names, binaries):
            (folder / name).write_bytes(binary)
        (folder / "plan.json").write_text(replace(self.plan, segments=names).to_json())
        (folder / "host.py").write_text(self.host_source())
        return folder

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}\n{self.plan.listing()}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Program:
        return Program([copy.deepcopy(s, memo) for s in self.segments], copy.deepcopy(self.plan), self.examples, self.backend)

    def __reduce__(self) -> Any:
        return _restored, (list(self.segments), self.plan, self.shapes, self.backend)


def _restored(segments: list[nn.Module], plan: Plan, shapes: list[Any], backend: str) -> Program:
    program = Program(segments, plan, backend=backend)
    program.shapes = shapes
    return program


def load_program(folder: str | pathlib.Path) -> Program:
    """A saved program, on ONNX Runtime."""
    folder = pathlib.Path(folder)
    if not (folder / "plan.json").is_file():
        raise BadInput(f"{folder} holds no program: there is no plan.json")
    plan = Plan.from_json((folder / "plan.json").read_text())
    return Program([_OnnxSegment((folder / name).read_bytes()) for name in plan.segments], plan, backend="onnx")


class _Compiled(nn.Module):
    """By torch.compile, with a free batch size from the start."""

    def __init__(self, segment: nn.Module) -> None:
        super().__init__()
        self.segment = segment
        self.run: Callable[..., Any] = torch.compile(segment, dynamic=True, fullgraph=True)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return self.run(*tensors)

    def __reduce__(self) -> Any:
        return _Compiled, (self.segment,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Compiled:
        return _Compiled(copy.deepcopy(self.segment, memo))


class _OnnxSegment(nn.Module):
    """A segment on ONNX Runtime, on the CPU."""

    def __init__(self, binary: bytes) -> None:
        super().__init__()
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingExtra("onnxruntime", "export") from error
        self.binary = binary
        options = ort.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self.session = ort.InferenceSession(binary, options, ["CPUExecutionProvider"])
        self.names = [i.name for i in self.session.get_inputs()]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        feed = {name: t.detach().cpu().contiguous().numpy() for name, t in zip(self.names, tensors)}
        return tuple(torch.from_numpy(out) for out in self.session.run(None, feed))

    def __reduce__(self) -> Any:
        return _OnnxSegment, (self.binary,)

    def __deepcopy__(self, memo: dict[int, Any]) -> _OnnxSegment:
        return _OnnxSegment(self.binary)


@contextmanager
def _quick_exporter() -> Iterator[None]:
    """The ONNX exporter without its remarks, and with its table of operators made once instead of once a segment."""
    log = logging.getLogger("torch.onnx")
    level, table, make = log.level, None, None
    log.setLevel(logging.ERROR)
    try:
        from torch.onnx._internal.exporter._registration import ONNXRegistry as table

        make = table.__dict__["from_torchlib"]
        table.from_torchlib = classmethod(lambda cls, *args, **kwargs: _operators(make.__func__, cls, *args, **kwargs))
    except (ImportError, KeyError, AttributeError):  # another version: slower, and as good
        make = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)
        if make is not None:
            table.from_torchlib = make


_TABLES: dict[Any, Any] = {}


def _operators(make: Callable[..., Any], cls: type, *args: Any, **kwargs: Any) -> Any:
    """A table of the exporter's operators, a second's work, from an earlier one for the same version of them."""
    key = cls, args, tuple(sorted(kwargs.items()))
    if key not in _TABLES:
        _TABLES[key] = make(cls, *args, **kwargs)
    table = copy.copy(_TABLES[key])
    table.functions = dict(table.functions)  # what one export registers is its own
    return table


def _to_onnx(program: torch.export.ExportedProgram, example: tuple[Tensor, ...]) -> bytes:
    names = {"input_names": [f"in{i}" for i in range(len(example))]}
    made = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    return made.model_proto.SerializeToString()
