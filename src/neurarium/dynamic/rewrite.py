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

*Where.* Statements are first made simple (:mod:`~neurarium.dynamic.simplify`), their names bound to objects
(:mod:`~neurarium.dynamic.scope`); here they are followed from place to place (:mod:`~neurarium.dynamic.places`), which gives a graph of
regions (:mod:`~neurarium.dynamic.regions`); that becomes a program (:mod:`~neurarium.dynamic.assemble`), and is checked here.

*Source.* Chen, Wei, Zhao, Wu, Yang, arXiv 2307.04963. *Departures.* See :mod:`neurarium.dynamic.compile`: the passes are reconstructed.
Assertions are dropped.
"""

from __future__ import annotations

import ast
import copy
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from neurarium.dynamic.assemble import assemble
from neurarium.dynamic.builder import sample
from neurarium.dynamic.places import NUMBERS, ROWS, Computed, Env, Frame, Known, place, still_read, tidy
from neurarium.dynamic.plan import Rows
from neurarium.dynamic.program import Program
from neurarium.dynamic.regions import ANSWER, RESULT, Region
from neurarium.dynamic.scope import NoPeeking, Scope
from neurarium.dynamic.simplify import Simplifier
from neurarium.dynamic.syntax import assignment, bare, names_written
from neurarium.dynamic.tree import rows as count
from neurarium.dynamic.tree import take
from neurarium.errors import BadInput, UnsupportedModel

__all__ = ["from_source"]

MOST = 400  # nodes of a graph


def from_source(module: nn.Module, example: Any, *, rows: Rows = "each") -> Program:
    """Cut a module at the branches of its source; see :func:`neurarium.dynamic.compile.split`."""
    module = copy.deepcopy(module).eval()
    program = _Reader(module, sample(example) if rows == "each" else example, rows).read()
    _verify(module, program, example, rows)
    return program


class _Reader:
    """Follows the program from branch to branch; each stretch between two is a region."""

    def __init__(self, module: nn.Module, example: Any, rows: Rows) -> None:
        self.module, self.example = module, example
        self.scope = Scope(module, count(example), rows)
        self.simplify = Simplifier(self.scope)
        self.regions: list[Region] = []
        self.places: dict[Any, int] = {}
        self.shapes: dict[Any, int] = {}  # how many kinds of tensors a place was reached with
        self.todo: list[tuple[int, tuple[Frame, ...], Env]] = []
        self.returns: dict[tuple[int, int], list[ast.stmt]] = {}  # of called methods, as assignments

    def read(self) -> Program:
        body, arguments, _ = self.scope.function(type(self.module).forward, "")
        needed = len(_parameters(type(self.module).forward)) - 1
        given = self.example if needed > 1 and isinstance(self.example, tuple) else (self.example,)
        if len(given) < needed:
            raise BadInput(f"forward takes {needed} inputs: pass a tuple of as many")
        env: Env = {arguments[0][0]: Known(self.module)}
        for i, (name, default) in enumerate(arguments[1:]):
            env[name] = Computed(given[i]) if i < len(given) else Known(default)
        self.inputs = {name: v.sample for name, v in env.items() if isinstance(v, Computed)}
        with torch.no_grad(), torch.random.fork_rng(devices=[]), NoPeeking():
            self.go((Frame("block", body),), env)
            while self.todo:
                self.explore(*self.todo.pop(0))
        return assemble(self.regions, self.scope, self.inputs)

    def go(self, frames: tuple[Frame, ...], env: Env) -> int:
        """The node for this place with what is known here."""
        frames = tidy(frames)
        alive = still_read(frames)
        env = {name: v for name, v in env.items() if name in alive}
        key = place(frames, env)
        if key not in self.places:
            self.shapes[key[:2]] = self.shapes.get(key[:2], 0) + 1
            if len(self.regions) >= MOST or self.shapes[key[:2]] > 8:
                raise self.scope.refuse(
                    "comes to no known place again after many turns: bound the loop, keep shapes, or let `while` ask the tensor"
                )
            self.scope.kept.append((frames, env))
            self.places[key] = len(self.regions)
            self.regions.append(Region({name: v.sample for name, v in env.items() if isinstance(v, Computed)}))
            self.todo.append((self.places[key], frames, env))
        return self.places[key]

    def explore(self, number: int, frames: tuple[Frame, ...], env: Env) -> None:
        """Follow the program from a node to the next branch."""
        region, env, first = self.regions[number], dict(env), True
        while True:
            if not frames:
                raise self.scope.refuse("ends without a return")
            top, below = frames[-1], frames[:-1]
            if top.kind == "join":
                region.end = "go", self.go(below, env)
                return
            if top.kind == "call":
                raise self.scope.refuse("calls a method that ends without a return")
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
            self.scope.line = getattr(stmt, "lineno", self.scope.line)
            here, after = frames, (*below, Frame("block", top.node, top.index + 1))
            if (new := self.simplify.statement(stmt, env, len([f for f in frames if f.kind == "call"]))) is not None:
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
                    if self.scope.computed(stmt.test, env):
                        yes = (*after, Frame("join", stmt), Frame("block", stmt.body))
                        no = (*after, Frame("join", stmt), Frame("block", stmt.orelse)) if stmt.orelse else after
                        self.ask(stmt.test, yes, no, env, region)
                        return
                    frames = (*after, Frame("block", stmt.body if self.scope.evaluate(stmt.test, env) else stmt.orelse))
                case ast.While():
                    if stmt.orelse:
                        raise self.scope.refuse("has a while with an else")
                    asks = self.scope.computed(stmt.test, env)
                    if self.scope.computed(getattr(stmt, "asked", stmt.test), env):
                        self.loosen(stmt, env, region)
                    if not first or region.code:
                        region.end = "go", self.go(here, env)
                        return
                    turn = (*here, Frame("while", stmt), Frame("block", stmt.body))
                    if asks:
                        self.ask(stmt.test, turn, after, env, region)
                        return
                    frames = turn if self.scope.evaluate(stmt.test, env) else (*after, Frame("join"))
                case ast.For():
                    if stmt.orelse:
                        raise self.scope.refuse("has a for with an else")
                    if self.scope.computed(stmt.iter, env):
                        raise self.scope.refuse("loops over something computed: loop over a range, or over modules")
                    leaves = any(isinstance(n, ast.Break) for n in ast.walk(stmt))
                    end = [Frame("join")] if leaves else []  # where all ways out of the loop meet
                    frames = (*after, *end, Frame("for", stmt, -1, tuple(self.scope.evaluate(stmt.iter, env))))
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
                        raise self.scope.refuse("returns nothing")
                    if not calls:
                        region.end = "return", self.give(stmt.value, env, region)
                        return
                    at = calls[-1]  # below it is the place where all returns of the called method meet
                    frames = (*frames[:at], Frame("block", self.returned(stmt, frames[at].node)))
                case _:
                    raise self.scope.refuse(f"is a statement that cannot be compiled: {ast.unparse(stmt).splitlines()[0]!r}")
            first = False

    def returned(self, stmt: ast.Return, call: ast.Assign) -> list[ast.stmt]:
        """The return of a called method as an assignment where it was called."""
        key = id(stmt), id(call)
        if key not in self.returns:
            self.returns[key] = [assignment(call.targets[0], stmt.value, stmt)]
            self.scope.kept.append((stmt, call))
        return self.returns[key]

    def inlined(self, value: ast.expr, env: Env, frames: tuple[Frame, ...]) -> Any:
        if not isinstance(value, ast.Call):
            return None
        found = self.simplify.follows(value, env)
        if found is None:
            return None
        function, owner = found
        depth = len([f for f in frames if f.kind == "call"])
        if depth > 20:
            raise self.scope.refuse("calls itself")
        body, arguments, _ = self.scope.function(function, f"{function.__name__}{depth}_")
        given: dict[str, Any] = {arguments[0][0]: Known(owner)}
        named = {k.arg: k.value for k in value.keywords}
        for i, (name, default) in enumerate(arguments[1:]):
            plain = name.removeprefix(f"{function.__name__}{depth}_")
            given[name] = value.args[i] if i < len(value.args) else named.get(plain, Known(default))
        return body, given

    def arguments(self, values: dict[str, Any], env: Env, region: Region) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, value in values.items():
            if isinstance(value, Known):
                made[name] = value
            else:
                mine = dict(env)
                self.assign(ast.Name(name, ast.Store()), value, mine, region)
                made[name] = mine[name]
        return made

    def assign(self, target: ast.expr, value: ast.expr, env: Env, region: Region) -> None:
        for part in ast.walk(target):
            if isinstance(part, ast.Attribute):
                raise self.scope.refuse("changes an attribute: what a forward pass leaves behind cannot be compiled")
            if isinstance(part, (ast.Subscript, ast.Starred)):
                raise self.scope.refuse("writes into a tensor in place, or unpacks with *: make a new tensor instead")
        if not self.scope.computed(value, env):
            known = self.scope.evaluate(value, env)
            if not any(isinstance(leaf, Tensor) for leaf in tree_leaves(known)) or not any(
                isinstance(n, ast.Call) for n in ast.walk(value)
            ):
                self.store(target, Known(known), env)
                return
        code = self.scope.bound(value, env)
        result = self.scope.run(code, env)
        leaves = tree_leaves(result)
        if leaves and not all(isinstance(leaf, Tensor) for leaf in leaves):
            if any(isinstance(leaf, Tensor) for leaf in leaves):
                raise self.scope.refuse("computes tensors and numbers in one expression: assign them one by one")
            self.store(target, Known(self.scope.size(code, result, env)), env)  # a size
            return
        region.code.append(ast.Assign([copy.deepcopy(target)], code))
        self.store(target, Computed(result), env)

    def store(self, target: ast.expr, value: Known | Computed, env: Env) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
            return
        inner = value.value if isinstance(value, Known) else value.sample
        if not isinstance(target, (ast.Tuple, ast.List)):
            raise self.scope.refuse("assigns to something that is no variable")
        parts = list(inner)
        if len(parts) != len(target.elts):
            raise self.scope.refuse(f"unpacks {len(parts)} values into {len(target.elts)} variables")
        for t, v in zip(target.elts, parts):
            self.store(t, type(value)(v), env)

    def loosen(self, loop: ast.While, env: Env, region: Region) -> None:
        """Known numbers that a loop of unknown length changes become tensors."""
        for name in sorted(set().union(*(names_written(s) for s in loop.body))):
            known = env.get(name)
            if isinstance(known, Known) and isinstance(known.value, NUMBERS):
                code = self.scope.number(known.value, env)
                region.code.append(ast.Assign([ast.Name(name, ast.Store())], code))
                env[name] = Computed(self.scope.run(code, env))

    def ask(self, test: ast.expr, yes: tuple[Frame, ...], no: tuple[Frame, ...], env: Env, region: Region) -> None:
        """End a region with a question."""
        code = self.scope.bound(bare(test) if self.scope.rows == "each" else test, env)
        answer = self.scope.run(code, env)
        if not isinstance(answer, Tensor):
            size = self.scope.size(code, answer, env)
            if size is ROWS:
                raise self.scope.refuse("branches on the number of rows")
            region.end = "go", self.go(yes if size else no, env)
            return
        each = self.scope.rows == "each"
        if answer.numel() != (self.scope.n if each else 1):
            one, hint = ("row", "; for one decision a batch say rows='batch'") if each else ("batch", "")
            raise self.scope.refuse(f"branches on a tensor of shape {tuple(answer.shape)}, not on one value a {one}{hint}")
        region.code.append(assignment(ANSWER, code, test))
        region.end = "ask", self.go(yes, env), self.go(no, env)

    def give(self, value: ast.expr, env: Env, region: Region) -> Any:
        """The result of the program, a nest of tensors; known numbers in it become tensors."""
        if isinstance(value, (ast.Tuple, ast.List)):
            parts = [v if self.scope.computed(v, env) else self.told(v, env) for v in value.elts]
            value = ast.Tuple(parts, ast.Load())
        elif not self.scope.computed(value, env):
            value = self.told(value, env)
        code = self.scope.bound(value, env)
        result = self.scope.run(code, env)
        if not all(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            raise self.scope.refuse("returns something that is neither a tensor nor a number")
        region.code.append(ast.Assign([ast.Name(RESULT, ast.Store())], code))
        return result

    def told(self, value: ast.expr, env: Env) -> ast.expr:
        known = self.scope.evaluate(value, env)
        if not isinstance(known, NUMBERS):
            raise self.scope.refuse("returns something that is neither a tensor nor a number")
        return self.scope.number(known, env)


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
