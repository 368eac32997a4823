"""DyCL's front end: read the source of a module, find where it branches on tensors, and cut it there.

The source of ``forward`` is followed as far as it is known before any input is: attributes, sizes, loops over modules and ranges are
evaluated now, so a loop over layers becomes a row of layers. Where a branch depends on the value of a tensor, both ways are followed. A
place in the program (a statement, the turn of each loop around it) that is reached twice with the same known values is one node of a
graph, so branches meet again, and a loop whose end depends on a tensor is a cycle.

What lies between two branches becomes a segment: its inputs are the variables that it reads and others wrote (liveness, backward), its
outputs those that are read later, and the answer of the branch, computed inside. Calls of modules and methods that branch themselves are
followed into; ``experts[i]`` with a computed i becomes a branch for each expert.

*What cannot be known is refused by line*: attributes that ``forward`` changes, writes into a tensor in place, calls for their side effects,
``try``, tensors read by Python inside a library call, loops that never come back to a known place.

*Rows.* With ``rows="each"`` the answer of a branch must be one value a row; ``.item()``, ``.all()``, ``.any()``, ``bool()`` around it,
which say the same for one row, are taken away. The program then does for each row of a batch what the module does for that row alone, and
is run once against it before it is returned.

*Source.* Chen, Wei, Zhao, Wu, Yang, arXiv 2307.04963. *Departures.* See :mod:`neurarium.dynamic.compile`: the passes are reconstructed.
Assertions are dropped.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, treespec_dumps
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.compile import Piece, Plan, Program, Rows, liveness, sample
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.regions import (
    ANSWER,
    RESULT,
    Code,
    Region,
    assignment,
    bare,
    inside_out,
    leaf_names,
    load,
    names_read,
    names_written,
    needs,
    plain_result,
    read_by_loop,
    read_first,
    rename,
    replaced,
    settle,
)  # fmt: skip
from neurarium.dynamic.tree import rows as count
from neurarium.dynamic.tree import take
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["from_source"]

MOST = 400  # nodes of a graph
NUMBERS = (bool, int, float)


def from_source(module: nn.Module, example: Any, *, rows: Rows = "each") -> Program:
    """Cut a module at the branches of its source; see :func:`neurarium.dynamic.compile.split`."""
    module = copy.deepcopy(module).eval()
    program = _Reader(module, sample(example) if rows == "each" else example, rows).read()
    _verify(module, program, example, rows)
    return program


def _verify(module: nn.Module, program: Program, example: Any, rows: Rows) -> None:
    """The program must answer what the module answers."""
    index = torch.arange(min(count(example), 4))
    inputs = [take(example, i[None]) for i in index] if rows == "each" else [example]
    several = len(_parameters(type(module).forward)) > 2 and isinstance(example, tuple)
    with torch.no_grad():
        want = [tree_leaves(module(*x) if several else module(x)) for x in inputs]
        got = tree_leaves(program(take(example, index) if rows == "each" else example))
    for i, leaves in enumerate(want):
        for a, b in zip(leaves, got, strict=True):
            b = b[i : i + 1] if rows == "each" else b
            a = torch.as_tensor(a, dtype=b.dtype)
            if not torch.allclose(a.reshape(b.shape), b, rtol=1e-3, atol=1e-4, equal_nan=True):
                raise UnsupportedModel(
                    f"was rewritten, but row {i} of the program's answer is not the module's: rows influence each other, or the module "
                    "keeps something between calls",
                    module=type(module).__name__,
                )


def _parameters(function: Callable[..., Any]) -> list[str]:
    return [p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]


# ---- what is known, and where in the program one is


@dataclass
class Known:
    """A variable whose value is known while the source is read."""

    value: Any


@dataclass
class Computed:
    """A variable that a segment computes: any nest of tensors, of which ``sample`` is an example."""

    sample: Any


class _Rows:
    """The number of rows, which is not known."""


ROWS = _Rows()


@dataclass(frozen=True, eq=False)
class Frame:
    """Where one is: in a list of statements, in a turn of a loop, in a call, or below a branch on a tensor."""

    kind: str  # block, for, while, call, join
    node: Any = None  # list of statements, or the statement
    index: int = 0
    items: tuple[Any, ...] = ()

    @property
    def key(self) -> Any:
        return self.kind, id(self.node), self.index, tuple(_identity(v) for v in self.items)


def _identity(value: Any) -> Any:
    if isinstance(value, (str, bytes, *NUMBERS, type(None))):
        return type(value).__name__, value
    if isinstance(value, (tuple, list)):
        return type(value).__name__, tuple(_identity(v) for v in value)
    return id(value)


class _Peek(Exception):
    pass


class _NoPeeking(TorchDispatchMode):
    """Python must not read a value out of a tensor: on another input it would be another one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.is_nonzero.default:
            raise _Peek
        return func(*args, **(kwargs or {}))


def _still_read(frames: Sequence[Frame]) -> set[str]:
    out: set[str] = set()
    for frame in frames:
        if frame.kind == "block":
            out = read_first(frame.node[frame.index :], out)
        elif frame.kind == "for" and frame.index + 1 < len(frame.items):
            out = read_by_loop(frame.node, out)
    return out


def _tidy(frames: Sequence[Frame]) -> tuple[Frame, ...]:
    """Without blocks at their end, and without what is only popped: two ways to say one place become the same."""
    tidy: list[Frame] = []
    for frame in frames:
        done = frame.kind == "block" and frame.index >= len(frame.node)
        if not done and not (frame.kind == "join" and tidy and tidy[-1].kind == "join"):
            tidy.append(frame)
    while tidy and tidy[-1].kind in ("join", "while"):
        tidy.pop()
    return tuple(tidy)


# ---- the reader


class _Reader:
    def __init__(self, module: nn.Module, example: Any, rows: Rows) -> None:
        self.module, self.example, self.rows = module, example, rows
        self.n = count(example)
        self.space: dict[str, Any] = {"__builtins__": builtins}  # objects that the code names
        self.held: dict[str, Any] = {}  # modules and tensors that it uses, as attributes of its segment
        self.named: dict[int, str] = {}
        self.kept: list[Any] = []  # so that no id is given twice
        self.functions: dict[Any, Any] = {}
        self.rewritten: dict[int, list[ast.stmt]] = {}
        self.regions: list[Region] = []
        self.places: dict[Any, int] = {}
        self.shapes: dict[Any, int] = {}  # how many kinds of tensors a place was reached with
        self.todo: list[tuple[int, tuple[Frame, ...], dict[str, Any]]] = []
        self.line = 0

    def refuse(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"line {self.line} of its source {why}", module=type(self.module).__name__)

    def read(self) -> Program:
        body, arguments, _ = self.function(type(self.module).forward, "")
        needed = len(_parameters(type(self.module).forward)) - 1
        given = self.example if needed > 1 and isinstance(self.example, tuple) else (self.example,)
        if len(given) < needed:
            raise BadInput(f"forward takes {needed} inputs: pass a tuple of as many")
        env: dict[str, Any] = {arguments[0][0]: Known(self.module)}
        for i, (name, default) in enumerate(arguments[1:]):
            env[name] = Computed(given[i]) if i < len(given) else Known(default)
        self.inputs = {name: v.sample for name, v in env.items() if isinstance(v, Computed)}
        with torch.no_grad(), torch.random.fork_rng(devices=[]), _NoPeeking():
            self.go((Frame("block", body),), env)
            while self.todo:
                self.explore(*self.todo.pop(0))
        return self.assemble()

    def function(self, function: Any, prefix: str) -> tuple[list[ast.stmt], list[tuple[str, Any]], bool]:
        """Statements, arguments with defaults, and whether anything branches; its variables renamed so that none meets another's."""
        function = inspect.unwrap(function)
        if (function, prefix) in self.functions:
            return self.functions[function, prefix]
        try:
            lines, first = inspect.getsourcelines(function)
            (tree,) = ast.parse(textwrap.dedent("".join(lines))).body
        except (OSError, TypeError, SyntaxError, ValueError) as error:
            raise UnsupportedModel(
                f"has no source that can be read for {getattr(function, '__qualname__', function)!r} ({error})",
                module=type(self.module).__name__,
            ) from error
        if not isinstance(tree, ast.FunctionDef):
            raise UnsupportedModel(f"has no source that can be read for {function.__qualname__!r}", module=type(self.module).__name__)
        ast.increment_lineno(tree, first - 1)
        self.line = tree.lineno
        if tree.args.vararg or tree.args.kwarg:
            raise self.refuse("takes * or ** arguments")
        outside = inspect.getclosurevars(function)
        free = {**vars(builtins), **function.__globals__, **outside.nonlocals}
        names = {a.arg for a in [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs]}
        names |= set().union(*(names_written(s) for s in tree.body)) if tree.body else set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Name):
                if node.id in names:
                    node.id = prefix + node.id
                elif node.id in free:
                    node.id = self.bind(free[node.id], node.id)
        signature = inspect.signature(function).parameters.values()
        made = (
            tree.body,
            [(prefix + p.name, p.default) for p in signature],
            any(isinstance(n, (ast.If, ast.While, ast.IfExp)) for n in ast.walk(tree)),
        )
        self.functions[function, prefix] = made
        return made

    def bind(self, value: Any, hint: str = "object") -> str:
        """A name under which the code finds an object."""
        if id(value) not in self.named:
            name = f"_{hint.strip('_').split('.')[-1]}" if hint.isidentifier() else "_object"
            while name in self.space:
                name += "_"
            self.space[name], self.named[id(value)] = value, name
            self.kept.append(value)
        return self.named[id(value)]

    # -- expressions

    def evaluate(self, expression: ast.expr, env: dict[str, Any]) -> Any:
        """The value of a known expression."""
        local = {name: v.value for name, v in env.items() if isinstance(v, Known)}
        code = compile(ast.fix_missing_locations(ast.Expression(copy.deepcopy(expression))), "<known>", "eval")
        with _disable_current_modes():
            return eval(code, {**self.space, **local})

    def run(self, expression: ast.expr, env: dict[str, Any], rows: int | None = None) -> Any:
        """The value of a bound expression on the samples (or on their first ``rows`` rows)."""
        local: dict[str, Any] = {name: v.sample for name, v in env.items() if isinstance(v, Computed)}
        if rows is not None:
            local = tree_map(lambda t: t[:rows] if isinstance(t, Tensor) and t.ndim and len(t) == self.n else t, local)
        holder = nn.Module()
        for name, value in self.held.items():
            object.__setattr__(holder, name, value)
        code = compile(ast.fix_missing_locations(ast.Expression(copy.deepcopy(expression))), "<segment>", "eval")
        try:
            return eval(code, {**self.space, **local, "self": holder})
        except _Peek as error:
            raise self.refuse(
                "lets Python read a tensor's value inside an expression: branch on it with if or while, or index a list of modules with it"
            ) from error
        except Exception as error:
            raise self.refuse(f"cannot be computed for {self.n} rows at once: {error}") from error

    def computed(self, expression: ast.AST, env: dict[str, Any]) -> bool:
        """Does it depend on the inputs?"""
        return any(isinstance(env.get(name), Computed) or _mentions_rows(env.get(name)) for name in names_read(expression))

    def bound(self, expression: ast.expr, env: dict[str, Any]) -> ast.expr:
        """The expression as code of a segment: what is known is put in, Python's numbers out of tensors stay tensors."""
        return _Bind(self, env).visit(copy.deepcopy(expression))

    def hold(self, value: Any, hint: str) -> ast.expr:
        """Code that names a known value."""
        if value is ROWS:
            raise AssertionError
        if value is None or value is Ellipsis or isinstance(value, (str, bytes, *NUMBERS)):
            return ast.Constant(value)
        owner = getattr(value, "__self__", None)
        if isinstance(owner, nn.Module) and hasattr(value, "__func__"):
            return ast.Attribute(self.hold(owner, "module"), value.__name__, ast.Load())
        if isinstance(value, (nn.Module, Tensor)):
            if id(value) not in self.named:
                name = next(n for n in (f"{hint}{i or ''}" for i in range(len(self.held) + 1)) if n not in self.held)
                self.held[name], self.named[id(value)] = value, name
                self.kept.append(value)
            return ast.Attribute(load("self"), self.named[id(value)], ast.Load())
        return load(self.bind(value, hint))

    # -- following the program

    def go(self, frames: tuple[Frame, ...], env: dict[str, Any]) -> int:
        """The node for this place with what is known here."""
        frames = _tidy(frames)
        alive = _still_read(frames)
        env = {name: v for name, v in env.items() if name in alive}
        known = tuple(sorted((name, "known", _identity(v.value)) for name, v in env.items() if isinstance(v, Known)))
        kinds = tuple(
            sorted(
                (name, str(tree_flatten(v.sample)[1]), str([(t.shape, t.dtype) for t in tree_leaves(v.sample)]))
                for name, v in env.items()
                if isinstance(v, Computed)
            )
        )
        key = tuple(f.key for f in frames), known, kinds
        if key not in self.places:
            self.shapes[key[:2]] = self.shapes.get(key[:2], 0) + 1
            if len(self.regions) >= MOST or self.shapes[key[:2]] > 8:
                raise self.refuse(
                    "comes to no known place again after many turns: bound the loop, keep shapes, or let `while` ask the tensor"
                )
            self.kept.append((frames, env))
            self.places[key] = len(self.regions)
            self.regions.append(Region({name: v.sample for name, v in env.items() if isinstance(v, Computed)}))
            self.todo.append((self.places[key], frames, env))
        return self.places[key]

    def explore(self, number: int, frames: tuple[Frame, ...], env: dict[str, Any]) -> None:
        """Follow the program from a node to the next branch."""
        region, env, first = self.regions[number], dict(env), True
        while True:
            if not frames:
                raise self.refuse("ends without a return")
            top, below = frames[-1], frames[:-1]
            if top.kind == "join":
                region.end = "go", self.go(below, env)
                return
            if top.kind == "call":
                raise self.refuse("calls a method that ends without a return")
            if top.kind == "while":
                frames = below
                continue
            if top.kind == "for":
                if top.index + 1 < len(top.items):
                    top = Frame("for", top.node, top.index + 1, top.items)
                    self.store(top.node.target, Known(top.items[top.index]), env)
                    frames = (*below, top, Frame("block", top.node.body))
                else:
                    frames = below
                continue
            if top.index >= len(top.node):
                frames = below
                continue
            stmt = top.node[top.index]
            self.line = getattr(stmt, "lineno", self.line)
            here, after = frames, (*below, Frame("block", top.node, top.index + 1))
            if (new := self.simplify(stmt, env, len([f for f in frames if f.kind == "call"]))) is not None:
                frames = (*after, Frame("block", new))
                continue
            match stmt:
                case ast.Pass() | ast.Assert() | ast.Expr(value=ast.Constant()):
                    frames = after
                case ast.Assign(targets=[target]):
                    called = self.inlined(stmt.value, env, frames)
                    if called is not None:
                        body, values = called
                        env.update(self.arguments(values, env, region))
                        frames = (*after, Frame("join"), Frame("call", stmt), Frame("block", body))
                    else:
                        self.assign(target, stmt.value, env, region)
                        frames = after
                case ast.If():
                    if self.computed(stmt.test, env):
                        yes = (*after, Frame("join", stmt), Frame("block", stmt.body))
                        no = (*after, Frame("join", stmt), Frame("block", stmt.orelse)) if stmt.orelse else after
                        self.ask(stmt.test, yes, no, env, region)
                        return
                    frames = (*after, Frame("block", stmt.body if self.evaluate(stmt.test, env) else stmt.orelse))
                case ast.While():
                    if stmt.orelse:
                        raise self.refuse("has a while with an else")
                    asks = self.computed(stmt.test, env)
                    if self.computed(getattr(stmt, "asked", stmt.test), env):
                        self.loosen(stmt, env, region)
                    if not first or region.code:
                        region.end = "go", self.go(here, env)
                        return
                    turn = (*here, Frame("while", stmt), Frame("block", stmt.body))
                    if asks:
                        self.ask(stmt.test, turn, after, env, region)
                        return
                    frames = turn if self.evaluate(stmt.test, env) else (*after, Frame("join"))
                case ast.For():
                    if stmt.orelse:
                        raise self.refuse("has a for with an else")
                    if self.computed(stmt.iter, env):
                        raise self.refuse("loops over something computed: loop over a range, or over modules")
                    leaves = any(isinstance(n, ast.Break) for n in ast.walk(stmt))
                    end = [Frame("join")] if leaves else []  # where all ways out of the loop meet
                    frames = (*after, *end, Frame("for", stmt, -1, tuple(self.evaluate(stmt.iter, env))))
                case ast.Break() | ast.Continue():
                    at = max(i for i, f in enumerate(frames) if f.kind in ("for", "while"))
                    joined = any(f.kind == "join" for f in frames[at:])
                    if isinstance(stmt, ast.Continue):
                        frames = frames[: at + 1]
                    elif frames[at].kind == "for":
                        frames = frames[:at]
                    else:  # the block below stands at the loop itself
                        block = frames[at - 1]
                        frames = (*frames[: at - 1], Frame("block", block.node, block.index + 1))
                    if joined:
                        region.end = "go", self.go(frames, env)
                        return
                case ast.Return():
                    calls = [i for i, f in enumerate(frames) if f.kind == "call"]
                    if stmt.value is None:
                        raise self.refuse("returns nothing")
                    if not calls:
                        region.end = "return", self.give(stmt.value, env, region)
                        return
                    at = calls[-1]  # below it is the place where all returns of the called method meet
                    frames = (*frames[:at], Frame("block", self.returned(stmt, frames[at].node)))
                case _:
                    raise self.refuse(f"is a statement that cannot be compiled: {ast.unparse(stmt).splitlines()[0]!r}")
            first = False

    def returned(self, stmt: ast.Return, call: ast.Assign) -> list[ast.stmt]:
        """The return of a called method as an assignment where it was called."""
        key = "return", id(stmt), id(call)
        if key not in self.functions:
            self.functions[key] = [assignment(call.targets[0], stmt.value, stmt)]
            self.kept.append((stmt, call))
        return self.functions[key]

    def simplify(self, stmt: ast.stmt, env: dict[str, Any], depth: int) -> list[ast.stmt] | None:
        """The same in simpler statements, if it is not simple."""
        if id(stmt) in self.rewritten:
            return self.rewritten[id(stmt)]
        new: list[ast.stmt] | None = None
        match stmt:
            case ast.AugAssign(target=ast.Name(id=name)):
                new = [assignment(name, ast.BinOp(load(name), stmt.op, stmt.value), stmt)]
            case ast.AnnAssign(target=ast.Name(id=name)):
                new = [assignment(name, stmt.value, stmt)] if stmt.value is not None else []
            case ast.Assign() if len(stmt.targets) > 1:
                first = stmt.targets[0]
                new = [assignment(first, stmt.value, stmt)]
                new += [assignment(t, ast.Name(first.id, ast.Load()), stmt) for t in stmt.targets[1:] if isinstance(first, ast.Name)]
            case ast.Assign(targets=[ast.Tuple(elts=to)], value=ast.Tuple(elts=given)) if len(to) == len(given):
                new = [assignment(f"_{i}", v, stmt) for i, v in enumerate(given)] + [
                    assignment(t, load(f"_{i}"), stmt) for i, t in enumerate(to)
                ]
            case ast.Expr(value=ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="append"), args=[item])):
                if name in env:
                    both = [ast.Starred(load(name), ast.Load()), item]
                    new = [assignment(name, ast.List(both, ast.Load()), stmt)]
            case ast.With(items=[ast.withitem(context_expr=ast.Call(func=called, args=[]), optional_vars=None)]):
                if not self.computed(called, env) and self.evaluate(called, env) in (torch.no_grad, torch.inference_mode):
                    new = stmt.body
            case ast.Assign(targets=[target], value=ast.IfExp() as choice) if self.computed(choice.test, env):
                new = [
                    ast.copy_location(
                        ast.If(choice.test, [assignment(target, choice.body, stmt)], [assignment(target, choice.orelse, stmt)]), stmt
                    )
                ]
            case ast.Return(value=ast.IfExp() as choice) if self.computed(choice.test, env):
                both_ways = [[ast.copy_location(ast.Return(v), stmt)] for v in (choice.body, choice.orelse)]
                new = [ast.copy_location(ast.If(choice.test, *both_ways), stmt)]
            case ast.If(test=ast.BoolOp() | ast.UnaryOp(op=ast.Not())) | ast.While(test=ast.BoolOp() | ast.UnaryOp(op=ast.Not())) if (
                self.at_once(stmt.test, env)
            ):
                pass
            case ast.If(test=ast.UnaryOp(op=ast.Not(), operand=test)):
                new = [ast.copy_location(ast.If(test, stmt.orelse or [ast.Pass()], stmt.body), stmt)]
            case ast.If(test=ast.BoolOp(op=op, values=[test, *rest])):
                others = ast.copy_location(ast.If(rest[0] if len(rest) == 1 else ast.BoolOp(op, rest), stmt.body, stmt.orelse), stmt)
                ways = ([others], stmt.orelse) if isinstance(op, ast.And) else (stmt.body, [others])
                new = [ast.copy_location(ast.If(test, *ways), stmt)]
            case ast.While(test=ast.BoolOp() | ast.UnaryOp() as test) if not stmt.orelse:
                loop = ast.While(ast.Constant(True), [ast.If(test, stmt.body, [ast.Break()])], [])
                loop.asked = test
                new = [ast.copy_location(loop, stmt)]
        if new is None and isinstance(stmt, (ast.Assign, ast.Return, ast.If)):
            new = self.unfold(stmt, env, depth)
        if new is not None:
            for s in new:
                ast.fix_missing_locations(s)
            self.rewritten[id(stmt)] = new
            self.kept.append(stmt)
        return new

    def at_once(self, test: ast.expr, env: dict[str, Any]) -> bool:
        """May all parts of a question be computed, whatever the first ones say?"""
        if isinstance(test, ast.BoolOp):
            return all(self.at_once(v, env) for v in test.values)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self.at_once(test.operand, env)
        return self.computed(test, env) and not any(isinstance(n, ast.Call) for n in ast.walk(bare(test)))

    def unfold(self, stmt: ast.Assign | ast.Return | ast.If, env: dict[str, Any], depth: int) -> list[ast.stmt] | None:
        """Put a call that is to be followed, and ``modules[computed]``, into statements of their own."""
        where = "test" if isinstance(stmt, ast.If) else "value"
        whole = getattr(stmt, where)
        if whole is None:
            return None
        for node in inside_out(whole):
            match node:
                case ast.Subscript(value=listed, slice=index) if self.computed(index, env) and not self.computed(listed, env):
                    found = self.evaluate(listed, env)
                    if not isinstance(found, (nn.ModuleList, nn.Sequential, list, tuple)) or not all(
                        isinstance(m, nn.Module) for m in found
                    ):
                        continue
                    name = f"_which{depth}"
                    cases: list[ast.stmt] = []
                    for i in reversed(range(len(found))):
                        fixed = ast.Subscript(listed, ast.Constant(i), ast.Load())
                        one = replaced(stmt, where, node, fixed)
                        test = ast.Compare(load(name), [ast.Eq()], [ast.Constant(i)])
                        cases = [ast.copy_location(ast.If(test, [one], cases), stmt)] if cases else [one]
                    return [assignment(name, index, stmt), *cases]
                case ast.Call() if self.follows(node, env) and not (node is whole and isinstance(stmt, ast.Assign)):
                    name = f"_call{depth}_{getattr(node, 'col_offset', 0)}"
                    return [assignment(name, node, stmt), replaced(stmt, where, node, load(name))]
        return None

    def follows(self, call: ast.Call, env: dict[str, Any]) -> Any:
        """The function behind a call of a module or method of the user's own that branches or loops; else nothing."""
        if self.computed(call.func, env) or not any(self.computed(a, env) for a in [*call.args, *(k.value for k in call.keywords)]):
            return None
        if names_read(call.func) - set(env) - set(self.space):
            return None
        target = self.evaluate(call.func, env)
        owner = target if isinstance(target, nn.Module) else getattr(target, "__self__", None)
        if not isinstance(owner, nn.Module):
            return None
        function = type(owner).forward if owner is target else target.__func__
        if function.__module__.startswith("torch."):
            return None
        return (function, owner) if self.function(function, "")[2] else None

    def inlined(self, value: ast.expr, env: dict[str, Any], frames: tuple[Frame, ...]) -> Any:
        if not isinstance(value, ast.Call):
            return None
        found = self.follows(value, env)
        if found is None:
            return None
        function, owner = found
        depth = len([f for f in frames if f.kind == "call"])
        if depth > 20:
            raise self.refuse("calls itself")
        body, arguments, _ = self.function(function, f"{function.__name__}{depth}_")
        given: dict[str, Any] = {arguments[0][0]: Known(owner)}
        named = {k.arg: k.value for k in value.keywords}
        for i, (name, default) in enumerate(arguments[1:]):
            plain = name.removeprefix(f"{function.__name__}{depth}_")
            given[name] = value.args[i] if i < len(value.args) else named.get(plain, Known(default))
        return body, given

    def arguments(self, values: dict[str, Any], env: dict[str, Any], region: Region) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, Known):
                made[name] = value
            else:
                mine = dict(env)
                self.assign(ast.Name(name, ast.Store()), value, mine, region)
                made[name] = mine[name]
        return made

    def assign(self, target: ast.expr, value: ast.expr, env: dict[str, Any], region: Region) -> None:
        for part in ast.walk(target):
            if isinstance(part, ast.Attribute):
                raise self.refuse("changes an attribute: what a forward pass leaves behind cannot be compiled")
            if isinstance(part, (ast.Subscript, ast.Starred)):
                raise self.refuse("writes into a tensor in place, or unpacks with *: make a new tensor instead")
        if not self.computed(value, env):
            known = self.evaluate(value, env)
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(known)) or not any(
                isinstance(n, ast.Call) for n in ast.walk(value)
            ):
                self.store(target, Known(known), env)
                return
        code = self.bound(value, env)
        result = self.run(code, env)
        leaves = tree_leaves(result)
        if leaves and not all(isinstance(leaf, Tensor) for leaf in leaves):
            if any(isinstance(leaf, Tensor) for leaf in leaves):
                raise self.refuse("computes tensors and numbers in one expression: assign them one by one")
            self.store(target, Known(self.size(code, result, env)), env)  # a size
            return
        region.code.append(ast.Assign([copy.deepcopy(target)], code))
        self.store(target, Computed(result), env)

    def size(self, code: ast.expr, result: Any, env: dict[str, Any]) -> Any:
        """A number that is the same for any number of rows; or the number of rows."""
        if self.rows == "batch" and self.n == 1:
            return result
        fewer = self.run(code, env, rows=self.n - 1)

        def one(a: Any, b: Any) -> Any:
            if isinstance(a, tuple) and isinstance(b, tuple):
                return tuple(one(*pair) for pair in zip(a, b))
            if a == b:
                return a
            if a == self.n and b == self.n - 1:
                return ROWS
            raise self.refuse("computes a number from the number of rows: only that number itself can be kept")

        return one(result, fewer)

    def store(self, target: ast.expr, value: Known | Computed, env: dict[str, Any]) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
            return
        inner = value.value if isinstance(value, Known) else value.sample
        if not isinstance(target, (ast.Tuple, ast.List)):
            raise self.refuse("assigns to something that is no variable")
        parts = list(inner)
        if len(parts) != len(target.elts):
            raise self.refuse(f"unpacks {len(parts)} values into {len(target.elts)} variables")
        for t, v in zip(target.elts, parts):
            self.store(t, type(value)(v), env)

    def anchor(self, env: dict[str, Any]) -> str:
        for name, v in env.items():
            if isinstance(v, Computed) and isinstance(v.sample, Tensor) and v.sample.ndim and len(v.sample) == self.n:
                return name
        raise self.refuse("needs the number of rows where no tensor is left that has it")

    def number(self, value: bool | int | float, env: dict[str, Any]) -> ast.expr:
        """Code for a known number as a tensor: one a row, or one."""
        kind = {bool: torch.bool, int: torch.int64}.get(type(value), torch.get_default_dtype())
        anchor = self.anchor(env)
        shape = f"({anchor}.shape[0],)" if self.rows == "each" else "()"
        text = f"{anchor}.new_full({shape}, {value!r}, dtype={self.bind(kind, str(kind).split('.')[-1])})"
        return ast.parse(text, mode="eval").body

    def loosen(self, loop: ast.While, env: dict[str, Any], region: Region) -> None:
        """Known numbers that a loop of unknown length changes become tensors."""
        for name in sorted(set().union(*(names_written(s) for s in loop.body))):
            known = env.get(name)
            if isinstance(known, Known) and isinstance(known.value, NUMBERS):
                code = self.number(known.value, env)
                region.code.append(ast.Assign([ast.Name(name, ast.Store())], code))
                env[name] = Computed(self.run(code, env))

    def ask(self, test: ast.expr, yes: tuple[Frame, ...], no: tuple[Frame, ...], env: dict[str, Any], region: Region) -> None:
        """End a region with a question."""
        code = self.bound(bare(test) if self.rows == "each" else test, env)
        answer = self.run(code, env)
        if not isinstance(answer, Tensor):
            size = self.size(code, answer, env)
            if size is ROWS:
                raise self.refuse("branches on the number of rows")
            region.end = "go", self.go(yes if size else no, env)
            return
        if answer.numel() != (self.n if self.rows == "each" else 1):
            hint = "; for one decision a batch say rows='batch'" if self.rows == "each" else ""
            raise self.refuse(
                f"branches on a tensor of shape {tuple(answer.shape)}, not on one value a {'row' if self.rows == 'each' else 'batch'}{hint}"
            )
        region.code.append(assignment(ANSWER, code, test))
        region.end = "ask", self.go(yes, env), self.go(no, env)

    def give(self, value: ast.expr, env: dict[str, Any], region: Region) -> Any:
        """The result of the program, a nest of tensors; known numbers in it become tensors."""
        if isinstance(value, (ast.Tuple, ast.List)):
            parts = [v if self.computed(v, env) else self.told(v, env) for v in value.elts]
            value = ast.Tuple(parts, ast.Load())
        elif not self.computed(value, env):
            value = self.told(value, env)
        code = self.bound(value, env)
        result = self.run(code, env)
        if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            raise self.refuse("returns something that is neither a tensor nor a number")
        region.code.append(ast.Assign([ast.Name(RESULT, ast.Store())], code))
        return result

    def told(self, value: ast.expr, env: dict[str, Any]) -> ast.expr:
        known = self.evaluate(value, env)
        if not isinstance(known, NUMBERS):
            raise self.refuse("returns something that is neither a tensor nor a number")
        return self.number(known, env)

    # -- from regions to a program

    def assemble(self) -> Program:
        order = []
        while order != (order := settle(self.regions)):
            pass
        for r in order:
            rename(self.regions[r])
        nodes: list[dict[str, Any]] = []
        segments: list[Piece] = []
        examples: list[tuple[Tensor, ...]] = []
        shared: dict[Any, int] = {}
        entry: dict[int, int] = {}
        structure, output, returns = None, None, 0
        for r in order:
            region = self.regions[r]
            entry[r] = len(nodes)
            plain = plain_result(region)
            if plain is not None:
                region.code = region.code[:-1]
            if region.code:
                takes = [name for name in region.start if name in needs(region.code)]
                gives = {"ask": [ANSWER], "return": [RESULT] if plain is None else []}.get(region.end[0], [])
                read = region.live | set(plain or ()) | set(region.renamed.values())
                gives += sorted(set().union(*(names_written(s) for s in region.code)) & read - set(gives))
                argument = tuple(region.start[name] for name in takes)
                body = self.code(region.code, takes, gives)
                piece = Piece(body, argument)
                tensors = tuple(tree_leaves(argument))
                with torch.no_grad():
                    results = body(argument)
                names = [leaf_name for name, v in zip(gives, results) for leaf_name in leaf_names(name, v)]
                ins = [leaf_name for name, v in zip(takes, argument) for leaf_name in leaf_names(name, v)]
                self.check([*zip(ins, tensors), *zip(names, tree_leaves(results))])
                key = body.source, tuple(body.held), tuple((t.shape, t.dtype) for t in tensors)
                if key not in shared:
                    shared[key] = len(segments)
                    segments.append(piece)
                    examples.append(tensors)
                cost = self.cost(piece, tensors)
                nodes.append({"do": "call", "segment": shared[key], "in": ins, "out": names, "cost": cost, "next": len(nodes) + 1})
            if region.renamed:
                kinds = {**region.start, **(dict(zip(gives, results)) if region.code else {})}
                pairs = [pair for to, of in region.renamed.items() for pair in zip(leaf_names(to, kinds[of]), leaf_names(of, kinds[of]))]
                to, of = map(list, zip(*pairs))
                nodes.append({"do": "name", "out": to, "in": of, "next": len(nodes) + 1})
            match region.end:
                case ("ask", yes, no):
                    nodes.append({"do": "ask", "on": ANSWER, "tau": None, "yes": yes, "no": no, "open": True})
                case ("go", to):
                    if not region.code and not region.renamed:
                        raise self.refuse("never ends")
                    nodes[-1].update(next=to, open=True)
                case ("return", result):
                    names = leaf_names(RESULT, result) if plain is None else list(plain)
                    spec = treespec_dumps(tree_flatten(result)[1])
                    kind = [
                        (list(t.shape[1 if self.rows == "each" or t.ndim else 0 :]), str(t.dtype).removeprefix("torch."))
                        for t in tree_leaves(result)
                    ]
                    if structure not in (None, spec):
                        raise UnsupportedModel("returns results of different structure", module=type(self.module).__name__)
                    structure, output = spec, kind
                    nodes.append({"do": "return", "out": names, "choice": returns})
                    returns += 1
        for node in nodes:
            if node.pop("open", False):
                for way in ("next", "yes", "no"):
                    if way in node:
                        node[way] = entry[node[way]]
        for node, alive in zip(nodes, liveness(nodes)):
            node["live"] = sorted(alive)
        inputs = [leaf_name for name, v in self.inputs.items() for leaf_name in leaf_names(name, v)]
        return Program(segments, Plan(nodes, inputs, output, structure, rows=self.rows), examples)

    def check(self, values: Sequence[tuple[str, Tensor]]) -> None:
        for name, t in values:
            if self.rows == "each" and not (t.ndim and len(t) == self.n):
                raise UnsupportedModel(
                    f"the variable {name.split('.')[0]!r} of shape {tuple(t.shape)} does not have one entry a row; for one decision a "
                    "batch say rows='batch'",
                    module=type(self.module).__name__,
                )

    def cost(self, piece: Piece, tensors: tuple[Tensor, ...]) -> int:
        if self.rows == "each":
            return CostTable.measure([lambda t: piece(*t)], tensors).full
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            piece(*tensors)
        return counter.get_total_flops() // self.n

    def code(self, statements: list[ast.stmt], takes: list[str], gives: list[str]) -> Code:
        names = set().union(*(names_read(s) for s in statements))
        used = {
            n.attr
            for s in statements
            for n in ast.walk(s)
            if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
        }
        lines = [f"def forward(self, {', '.join(takes)}):".replace(", )", ")")]
        lines += [f"    {line}" for s in statements for line in ast.unparse(ast.fix_missing_locations(s)).splitlines()]
        lines += [f"    return ({', '.join(gives)},)", ""]
        space = {name: self.space[name] for name in sorted(names & set(self.space))}
        return Code("\n".join(lines), {name: v for name, v in self.held.items() if name in used}, space)


def _mentions_rows(known: Any) -> bool:
    return isinstance(known, Known) and any(leaf is ROWS for leaf in tree_leaves(known.value))


class _Bind(ast.NodeTransformer):
    def __init__(self, reader: _Reader, env: dict[str, Any]) -> None:
        self.reader, self.env = reader, env

    def visit(self, node: ast.AST) -> Any:
        names = names_read(node) if isinstance(node, ast.expr) else set()
        if (
            not isinstance(node, ast.expr)
            or isinstance(node, (ast.Constant, ast.Starred))
            or isinstance(getattr(node, "ctx", None), ast.Store)
        ):
            return super().visit(node)
        known = {n for n in names if isinstance(self.env.get(n), Known)}
        settled = names <= known | {n for n in names if n in self.reader.space and n not in self.env}
        simple = isinstance(node, (ast.Name, ast.Attribute, ast.Subscript))
        if settled and names and (simple or not any(_mentions_rows(self.env.get(n)) for n in known)):
            value = self.reader.evaluate(node, self.env)
            if value is ROWS:
                anchor = self.reader.anchor(self.env)
                return ast.parse(f"{anchor}.shape[0]", mode="eval").body
            if isinstance(value, tuple) and any(v is ROWS for v in value):
                return super().visit(node)
            if simple or value is None or isinstance(value, (str, *NUMBERS, torch.dtype, torch.Size)):
                return self.reader.hold(value, _hint(node))
        return super().visit(node)

    def is_tensor(self, code: ast.expr) -> bool:
        return isinstance(self.reader.run(code, self.env), Tensor)

    def visit_Call(self, node: ast.Call) -> Any:
        plain = self.reader.space.get(node.func.id) if isinstance(node.func, ast.Name) and node.func.id not in self.env else None
        node = self.generic_visit(node)
        match node:
            case ast.Call(func=ast.Attribute(value=inner, attr="item"), args=[]):
                return inner
            case ast.Call(args=[inner], keywords=[]) if plain is len and self.is_tensor(inner):
                return ast.Subscript(ast.Attribute(inner, "shape", ast.Load()), ast.Constant(0), ast.Load())
            case ast.Call(args=[inner], keywords=[]) if plain in (float, int, bool) and self.is_tensor(inner):
                kind = {int: "long", bool: "bool"}.get(plain)
                return inner if kind is None else ast.Call(ast.Attribute(inner, kind, ast.Load()), [], [])
        return node

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        node = self.generic_visit(node)
        if not all(self.is_tensor(v) for v in node.values):
            return node
        both = torch.logical_and if isinstance(node.op, ast.And) else torch.logical_or
        first, *rest = node.values
        for other in rest:
            first = ast.Call(load(self.reader.bind(both, both.__name__)), [first, other], [])
        return first

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        node = self.generic_visit(node)
        if isinstance(node.op, ast.Not) and self.is_tensor(node.operand):
            return ast.Call(load(self.reader.bind(torch.logical_not, "logical_not")), [node.operand], [])
        return node

    def visit_Compare(self, node: ast.Compare) -> Any:
        if len(node.ops) > 1:
            sides = [node.left, *node.comparators]
            pairs = [ast.Compare(a, [op], [b]) for a, op, b in zip(sides, node.ops, sides[1:])]
            return self.visit(ast.BoolOp(ast.And(), pairs))
        return self.generic_visit(node)


def _hint(node: ast.AST) -> str:
    """A readable name for what an expression names."""
    text = ast.unparse(node)
    text = "".join(c if c.isalnum() else "_" for c in text).strip("_").removeprefix("self_")
    return text if text.isidentifier() else "part"
