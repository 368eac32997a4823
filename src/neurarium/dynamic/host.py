"""Runs a program whose decisions were cut out: numpy alone, and onnxruntime for the segments between the decisions.

This file is copied into every saved program as ``host.py``, above it the program as a list of steps. There it needs neither torch nor
neurarium::

    python host.py rows.npy --budget 1e6        # writes rows.out.npy, prints what each row cost

or ``from host import load; load(folder).decide(x, budget=1e6)``.

A plan is a list of nodes: call a segment, ask whether a value reaches a threshold (or is true), go where the setting points, return. Rows
that answer differently part; rows that meet again go on together. A row that has no answer (NaN) counts as not sure.
"""

from __future__ import annotations

import json
import pathlib
import sys

import numpy as np


class Arrays:
    """What the host needs to know about arrays."""

    numbers = staticmethod(lambda n, value=0: np.full(n, value, np.int64))
    arange = staticmethod(np.arange)
    take = staticmethod(lambda a, index: a[index])
    join = staticmethod(np.concatenate)
    order = staticmethod(np.argsort)
    like = staticmethod(lambda a, n, value: np.full(n, value, a.dtype))

    @staticmethod
    def part(answer, tau):
        """Indices of the rows that say yes, and of the others."""
        yes = answer.reshape(-1).astype(bool) if tau is None else answer.reshape(-1) >= np.asarray(tau, answer.dtype)
        if len(yes) == 1:
            return ([0], []) if yes[0] else ([], [0])
        return np.flatnonzero(yes), np.flatnonzero(~yes)

    @staticmethod
    def nothing(shape, dtype):
        return np.zeros((0, *shape), dtype)


class Host:
    """Interprets ``plan``; ``call(segment, arrays)`` runs a segment."""

    error = ValueError

    def __init__(self, plan, call, arrays=Arrays):
        self.plan, self.call, self.arrays = plan, call, arrays
        self.setting = plan["setting"]
        self.taken = None  # a set here notes which way is taken at which question

    def choose(self, budget=None, threshold=None, config=None):
        """The setting that a budget (FLOPs a row), one threshold for all questions, or a configuration's number stands for."""
        if sum(v is not None for v in (budget, threshold, config)) > 1:
            raise self.error("give one of budget, threshold and config")
        now, menu = self.setting, self.plan["menu"]
        if threshold is not None:
            if not isinstance(now, list):
                raise self.error("this program has no thresholds: give a budget")
            return [float(threshold)] * len(now)
        if config is not None:
            if not isinstance(now, int) or config not in [m["setting"] for m in menu]:
                raise self.error(f"config must be one of {[m['setting'] for m in menu if isinstance(now, int)]}, not {config!r}")
            return int(config)
        if budget is None:
            return now
        if not menu:
            raise self.error("this program was split from an uncalibrated policy: call calibrate(loader) on it, then split it again")
        fits = [m for m in menu if m["cost"] <= budget * (1 + 1e-12)]
        if not fits:
            raise self.error(
                f"a budget of {budget:g} FLOPs a row is below the cheapest path: the smallest feasible one is {menu[0]['cost']:.0f}"
            )
        return fits[-1]["setting"]

    def use(self, **setting):
        """Make a budget, a threshold or a configuration the current setting."""
        self.setting = self.choose(**setting)
        return self

    def __call__(self, *inputs):
        return self.decide(*inputs)["output"]

    def decide(self, *inputs, budget=None, threshold=None, config=None):
        """``{"output": list, "cost", "choice", "score", "price"}``, every entry in the order of the rows."""
        plan, ops, setting = self.plan, self.arrays, self.choose(budget, threshold, config)
        if len(inputs) != len(plan["inputs"]):
            raise self.error(f"this program takes {len(plan['inputs'])} inputs, not {len(inputs)}")
        n = len(inputs[0])
        if n == 0:
            empty = [ops.nothing(*o) for o in plan["output"]]
            return {"output": empty, "cost": ops.numbers(0), "choice": ops.numbers(0), "score": None, "price": None}
        waiting, left, parted = {}, [], False
        at, rows, cost, values = 0, ops.arange(n), ops.numbers(n), dict(zip(plan["inputs"], inputs))
        while True:
            node = plan["nodes"][at]
            if node["do"] == "call":
                values.update(zip(node["out"], self.call(node["segment"], [values[v] for v in node["in"]])))
                ways = [(node["next"], rows, cost + node["cost"] if node["cost"] else cost, values)]
            elif node["do"] == "name":
                values.update({to: values[of] for to, of in zip(node["out"], node["in"])})
                ways = [(node["next"], rows, cost, values)]
            elif node["do"] == "switch":
                ways = [(node["to"][str(setting)], rows, cost, values)]
            elif node["do"] == "ask":
                yes, no = ops.part(values[node["on"]], None if node["tau"] is None else float(setting[node["tau"]]))
                if self.taken is not None:
                    self.taken.update((at, way) for way, some in (("yes", yes), ("no", no)) if len(some))
                if plan["rows"] == "batch" or not len(yes) or not len(no):  # all go one way
                    ways = [(node["yes" if len(yes) else "no"], rows, cost, values)]
                else:
                    parted = True
                    ways = [(node[way], *self._some(node[way], index, rows, cost, values)) for way, index in (("yes", yes), ("no", no))]
            else:
                left.append(self._leave(node, rows, cost, values))
                ways = []
            if len(ways) == 1 and not waiting:
                ((at, rows, cost, values),) = ways
                continue
            for to, *group in ways:
                waiting.setdefault(to, []).append(tuple(group))
            if not waiting:
                break
            at = min(waiting)  # a loop goes on until its last row has left, then all go on together
            rows, cost, values = self._meet(waiting.pop(at), plan["nodes"][at]["live"])
        parts = [ops.join(p) if len(p) > 1 else p[0] for p in zip(*left) if p[0] is not None]
        if parted:
            order = ops.order(parts[0])
            parts = [ops.take(p, order) for p in parts]
        named = dict(zip([name for name, p in zip(self._names(left[0]), left[0]) if p is not None], parts))
        output = [named[f"output{i}"] for i in range(len(plan["output"]))]
        return {"output": output, **{name: named.get(name) for name in ("cost", "choice", "score", "price")}}

    def _meet(self, groups, live):
        rows, costs, values = zip(*groups)
        kept = {v: [g[v] for g in values] for v in live}
        if len(groups) == 1:
            return rows[0], costs[0], {v: parts[0] for v, parts in kept.items()}
        join = self.arrays.join
        return join(rows), join(costs), {v: join(parts) for v, parts in kept.items()}

    def _some(self, to, index, rows, cost, values):
        take = self.arrays.take
        return take(rows, index), take(cost, index), {v: take(values[v], index) for v in self.plan["nodes"][to]["live"]}

    def _leave(self, node, rows, cost, values):
        def tell(what):
            """A number, or the name of a value."""
            said = node.get(what)
            if said is None or isinstance(said, str):
                return said if said is None else values[said]
            if isinstance(said, float):
                return self.arrays.like(values[node["out"][0]], len(rows), said)
            return self.arrays.numbers(len(rows), said)

        more = tell("more")
        cost = cost if more is None else cost + more
        return (rows, cost, tell("choice"), tell("score"), tell("price"), *(values[v] for v in node["out"]))

    @staticmethod
    def _names(part):
        return ["rows", "cost", "choice", "score", "price", *(f"output{i}" for i in range(len(part) - 5))]


def load(folder=None, threads=None):
    """The program saved in ``folder``, by default in the folder of this file."""
    import onnxruntime as ort

    folder = pathlib.Path(__file__ if folder is None else folder)
    folder = folder if folder.is_dir() else folder.parent
    plan = json.loads((folder / "plan.json").read_text())
    options = ort.SessionOptions()
    if threads:
        options.intra_op_num_threads = threads
    sessions = [ort.InferenceSession(str(folder / name), options, ["CPUExecutionProvider"]) for name in plan["segments"]]
    names = [[i.name for i in s.get_inputs()] for s in sessions]
    return Host(plan, lambda k, arrays: sessions[k].run(None, dict(zip(names[k], arrays))))


def main(arguments):
    import argparse

    parser = argparse.ArgumentParser(description="Run the saved program on rows.")
    parser.add_argument("inputs", nargs="+", help=".npy files, one an input")
    parser.add_argument("--budget", type=float, help="FLOPs a row")
    options = parser.parse_args(arguments)
    said = load().decide(*(np.load(path) for path in options.inputs), budget=options.budget)
    target = pathlib.Path(options.inputs[0]).with_suffix(".out.npy")
    np.save(target, said["output"][0])
    choices = dict(zip(*(v.tolist() for v in np.unique(said["choice"], return_counts=True))))
    print(f"{len(said['cost'])} rows to {target}; mean cost {np.mean(said['cost']):.0f} FLOPs; rows by choice {choices}")


if __name__ == "__main__":
    main(sys.argv[1:])
