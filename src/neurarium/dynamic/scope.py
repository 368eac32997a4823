"""What the code of a segment may name: functions with their names bound to objects, and expressions with what is known put in.

The source names things by where it stands (``self.head``, a global, a variable of an enclosing call). A segment is code of its own, so
every object gets a name in one space, modules and tensors become attributes of the segment, and known values become constants. The same
expressions are run on a few rows as they are read: that is how shapes are known and how Python reading a tensor's value is noticed.

See :mod:`neurarium.dynamic.rewrite`.
"""

from __future__ import annotations

import ast
import builtins
import copy
import inspect
import textwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_map

from neurarium.dynamic.places import NUMBERS, ROWS, Computed, Env, Known, mentions_rows
from neurarium.dynamic.plan import Rows
from neurarium.dynamic.syntax import load, names_read, names_written
from neurarium.errors import UnsupportedModel

__all__ = ["NoPeeking", "Scope"]


class Scope:
    """The names that segments use, and the values of expressions on ``n`` sample rows."""

    def __init__(self, module: nn.Module, n: int, rows: Rows) -> None:
        self.module, self.n, self.rows = module, n, rows
        self.space: dict[str, Any] = {"__builtins__": builtins}  # objects that the code names
        self.held: dict[str, Any] = {}  # modules and tensors that it uses, as attributes of its segment
        self.named: dict[int, str] = {}
        self.kept: list[Any] = []  # so that no id is given twice
        self.functions: dict[Any, Any] = {}
        self.line = 0  # of the source, for what is refused

    def refuse(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"line {self.line} of its source {why}", module=type(self.module).__name__)

    # -- the source of functions, and names for objects

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

    # -- expressions

    def computed(self, expression: ast.AST, env: Env) -> bool:
        """Does it depend on the inputs?"""
        return any(isinstance(env.get(name), Computed) or mentions_rows(env.get(name)) for name in names_read(expression))

    def evaluate(self, expression: ast.expr, env: Env) -> Any:
        """The value of a known expression."""
        local = {name: v.value for name, v in env.items() if isinstance(v, Known)}
        code = compile(ast.fix_missing_locations(ast.Expression(copy.deepcopy(expression))), "<known>", "eval")
        with _disable_current_modes():
            return eval(code, {**self.space, **local})

    def bound(self, expression: ast.expr, env: Env) -> ast.expr:
        """The expression as code of a segment: what is known is put in, Python's numbers out of tensors stay tensors."""
        return _Bind(self, env).visit(copy.deepcopy(expression))

    def run(self, expression: ast.expr, env: Env, rows: int | None = None) -> Any:
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

    # -- numbers, and the number of rows

    def size(self, code: ast.expr, result: Any, env: Env) -> Any:
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

    def anchor(self, env: Env) -> str:
        for name, v in env.items():
            if isinstance(v, Computed) and isinstance(v.sample, Tensor) and v.sample.ndim and len(v.sample) == self.n:
                return name
        raise self.refuse("needs the number of rows where no tensor is left that has it")

    def number(self, value: bool | int | float, env: Env) -> ast.expr:
        """Code for a known number as a tensor: one a row, or one."""
        kind = {bool: torch.bool, int: torch.int64}.get(type(value), torch.get_default_dtype())
        anchor = self.anchor(env)
        shape = f"({anchor}.shape[0],)" if self.rows == "each" else "()"
        text = f"{anchor}.new_full({shape}, {value!r}, dtype={self.bind(kind, str(kind).split('.')[-1])})"
        return ast.parse(text, mode="eval").body


class _Bind(ast.NodeTransformer):
    def __init__(self, scope: Scope, env: Env) -> None:
        self.scope, self.env = scope, env

    def visit(self, node: ast.AST) -> Any:
        names = names_read(node) if isinstance(node, ast.expr) else set()
        if (
            not isinstance(node, ast.expr)
            or isinstance(node, (ast.Constant, ast.Starred))
            or isinstance(getattr(node, "ctx", None), ast.Store)
        ):
            return super().visit(node)
        known = {n for n in names if isinstance(self.env.get(n), Known)}
        settled = names <= known | {n for n in names if n in self.scope.space and n not in self.env}
        simple = isinstance(node, (ast.Name, ast.Attribute, ast.Subscript))
        if settled and names and (simple or not any(mentions_rows(self.env.get(n)) for n in known)):
            value = self.scope.evaluate(node, self.env)
            if value is ROWS:
                anchor = self.scope.anchor(self.env)
                return ast.parse(f"{anchor}.shape[0]", mode="eval").body
            if isinstance(value, tuple) and any(v is ROWS for v in value):
                return super().visit(node)
            if simple or value is None or isinstance(value, (str, *NUMBERS, torch.dtype, torch.Size)):
                return self.scope.hold(value, _hint(node))
        return super().visit(node)

    def is_tensor(self, code: ast.expr) -> bool:
        return isinstance(self.scope.run(code, self.env), Tensor)

    def visit_Call(self, node: ast.Call) -> Any:
        plain = self.scope.space.get(node.func.id) if isinstance(node.func, ast.Name) and node.func.id not in self.env else None
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
            first = ast.Call(load(self.scope.bind(both, both.__name__)), [first, other], [])
        return first

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        node = self.generic_visit(node)
        if isinstance(node.op, ast.Not) and self.is_tensor(node.operand):
            return ast.Call(load(self.scope.bind(torch.logical_not, "logical_not")), [node.operand], [])
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


class _Peek(Exception):
    pass


class NoPeeking(TorchDispatchMode):
    """Python must not read a value out of a tensor: on another input it would be another one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default or func is torch.ops.aten.is_nonzero.default:
            raise _Peek
        return func(*args, **(kwargs or {}))
