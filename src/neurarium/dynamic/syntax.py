"""Syntax trees: which names they read and write, and small ones made anew."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["assignment", "bare", "inside_out", "load", "names_read", "names_written", "read_by_loop", "read_first", "replaced"]


def names_read(node: ast.AST | Sequence[ast.AST]) -> set[str]:
    """Names read in an expression, less those that a comprehension or lambda binds."""
    if isinstance(node, ast.AST):
        bound = {n.id for c in ast.walk(node) if isinstance(c, ast.comprehension) for n in ast.walk(c.target) if isinstance(n, ast.Name)}
        bound |= {a.arg for c in ast.walk(node) if isinstance(c, ast.Lambda) for a in c.args.args}
        return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)} - bound
    return set().union(*(names_read(n) for n in node))


def names_written(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}


def read_first(body: Sequence[ast.stmt], out: set[str]) -> set[str]:
    """Names that these statements, or what follows them, may read before they write them."""
    for stmt in reversed(body):
        match stmt:
            case ast.Assign() | ast.AnnAssign():
                targets = stmt.targets if isinstance(stmt, ast.Assign) else [stmt.target]
                out = out - set().union(*(names_written(t) for t in targets)) | names_read(stmt)
            case ast.AugAssign():
                out = out | names_read(stmt) | names_written(stmt.target)
            case ast.If():
                out = names_read(stmt.test) | read_first(stmt.body, out) | read_first(stmt.orelse, out)
            case ast.For():
                out = read_by_loop(stmt, out)
            case ast.While():
                out = read_by_loop(stmt, out)
            case _:
                out = out | names_read(stmt)
    return out


def read_by_loop(loop: ast.For | ast.While, out: set[str]) -> set[str]:
    head, targets = (loop.iter, names_written(loop.target)) if isinstance(loop, ast.For) else (loop.test, set())
    live, before = out | names_read(head), None
    while live != before:
        before, live = live, live | (read_first(loop.body, live) - targets)
    return live


def load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def assignment(target: ast.expr | str, value: ast.expr, like: ast.AST) -> ast.Assign:
    where = ast.Name(target, ast.Store()) if isinstance(target, str) else target
    return ast.copy_location(ast.Assign([where], value), like)


def inside_out(node: ast.AST) -> Iterator[ast.AST]:
    """Expressions in the order in which they are computed, but for those that may not be."""
    if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp, ast.Lambda)):
        return
    inner = [node.test] if isinstance(node, ast.IfExp) else [node.values[0]] if isinstance(node, ast.BoolOp) else ast.iter_child_nodes(node)
    for child in inner:
        yield from inside_out(child)
    yield node


def replaced(stmt: Any, where: str, node: ast.AST, new: ast.AST) -> Any:
    """A copy of a statement in which one node of an expression is another."""
    made = copy.copy(stmt)
    setattr(made, where, copy.deepcopy(getattr(stmt, where), {id(node): new}))
    return made


def bare(test: ast.expr) -> ast.expr:
    """A question without what changes nothing for a single row."""
    match test:
        case ast.Call(func=ast.Attribute(value=inner, attr="all" | "any" | "item"), args=[], keywords=[]):
            return bare(inner)
        case ast.Call(func=ast.Attribute(attr="all" | "any"), args=[inner], keywords=[]) if not isinstance(inner, ast.Constant):
            return bare(inner)
        case ast.Call(func=ast.Name(id="_bool"), args=[inner]):
            return bare(inner)
    match test:
        case ast.BoolOp():
            return ast.BoolOp(test.op, [bare(v) for v in test.values])
        case ast.UnaryOp(op=ast.Not()):
            return ast.UnaryOp(test.op, bare(test.operand))
    return test
