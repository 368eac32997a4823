"""Statements in simpler statements: what is left is assignments, questions on one value, loops and returns.

``a += b``, ``x, y = y, x``, ``a if test else b``, ``not``, ``and``, ``or``, calls inside expressions, ``modules[computed]``: each is said
by means of the others. See :mod:`neurarium.dynamic.rewrite`.
"""

from __future__ import annotations

import ast
from typing import Any

import torch
from torch import nn

from neurarium.dynamic.places import Env
from neurarium.dynamic.scope import Scope
from neurarium.dynamic.syntax import assignment, bare, inside_out, load, names_read, replaced

__all__ = ["Simplifier"]


class Simplifier:
    """Rewrites statements, each once, so that a place in a program stays one place."""

    def __init__(self, scope: Scope) -> None:
        self.scope = scope
        self.rewritten: dict[int, list[ast.stmt]] = {}

    def statement(self, stmt: ast.stmt, env: Env, depth: int) -> list[ast.stmt] | None:
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
                if not self.scope.computed(called, env) and self.scope.evaluate(called, env) in (torch.no_grad, torch.inference_mode):
                    new = stmt.body
            case ast.Assign(targets=[target], value=ast.IfExp() as choice) if self.scope.computed(choice.test, env):
                new = [
                    ast.copy_location(
                        ast.If(choice.test, [assignment(target, choice.body, stmt)], [assignment(target, choice.orelse, stmt)]), stmt
                    )
                ]
            case ast.Return(value=ast.IfExp() as choice) if self.scope.computed(choice.test, env):
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
            self.scope.kept.append(stmt)
        return new

    def at_once(self, test: ast.expr, env: Env) -> bool:
        """May all parts of a question be computed, whatever the first ones say?"""
        if isinstance(test, ast.BoolOp):
            return all(self.at_once(v, env) for v in test.values)
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            return self.at_once(test.operand, env)
        return self.scope.computed(test, env) and not any(isinstance(n, ast.Call) for n in ast.walk(bare(test)))

    def unfold(self, stmt: ast.Assign | ast.Return | ast.If, env: Env, depth: int) -> list[ast.stmt] | None:
        """Put a call that is to be followed, and ``modules[computed]``, into statements of their own."""
        where = "test" if isinstance(stmt, ast.If) else "value"
        whole = getattr(stmt, where)
        if whole is None:
            return None
        for node in inside_out(whole):
            match node:
                case ast.Subscript(value=listed, slice=index) if self.scope.computed(index, env) and not self.scope.computed(listed, env):
                    found = self.scope.evaluate(listed, env)
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

    def follows(self, call: ast.Call, env: Env) -> Any:
        """The function behind a call of a module or method of the user's own that branches or loops; else nothing."""
        given = [*call.args, *(k.value for k in call.keywords)]
        if self.scope.computed(call.func, env) or not any(self.scope.computed(a, env) for a in given):
            return None
        if names_read(call.func) - set(env) - set(self.scope.space):
            return None
        target = self.scope.evaluate(call.func, env)
        owner = target if isinstance(target, nn.Module) else getattr(target, "__self__", None)
        if not isinstance(owner, nn.Module):
            return None
        function = type(owner).forward if owner is target else target.__func__
        if function.__module__.startswith("torch."):
            return None
        return (function, owner) if self.scope.function(function, "")[2] else None
