"""A compiled network: segments that only compute, a plan that only decides, and the host that runs them.

The host is the one of :mod:`neurarium.dynamic.host`, which works on numpy; here it works on tensors too. See
:mod:`neurarium.dynamic.compile`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import pathlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_unflatten, treespec_loads

from neurarium.dynamic import host as host_module
from neurarium.dynamic.backends import OnnxRuntime, export, inductor, to_onnx
from neurarium.dynamic.host import Arrays, Host
from neurarium.dynamic.plan import Plan
from neurarium.errors import BadInput
from neurarium.roles import Outcome

__all__ = ["Program", "load_program"]

Backend = Literal["eager", "export", "onnx", "inductor"]


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
            segments = [OnnxRuntime(binary) for binary in to_onnx(self.exported, self.examples)]
        else:
            segments = inductor(self.segments, self.examples)
        return Program(segments, self.plan, self.examples, backend)

    def exported(self) -> list[torch.export.ExportedProgram]:
        """Each segment as a ``torch.export`` program with a free batch size."""
        if self.backend != "eager":
            raise BadInput("only the program that split returned can be exported")
        if not hasattr(self, "_exported"):
            object.__setattr__(self, "_exported", [export(s, e) for s, e in zip(self.segments, self.examples)])
        return self._exported

    def host_source(self) -> str:
        """The host program of this plan: what ``save`` writes as ``host.py``."""
        steps = "\n".join(f"#   {line}" for line in self.plan.listing().splitlines())
        return f"# The program in this folder:\n#\n{steps}\n\n{inspect.getsource(host_module)}"

    def save(self, folder: str | pathlib.Path) -> pathlib.Path:
        """Write the segments as .onnx, ``plan.json`` and ``host.py``, which together run without torch and without neurarium."""
        folder = pathlib.Path(folder)
        binaries = [s.binary for s in self.segments] if self.backend == "onnx" else to_onnx(self.exported, self.examples)
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
    return Program([OnnxRuntime((folder / name).read_bytes()) for name in plan.segments], plan, backend="onnx")


class _Host(Host):
    error = BadInput


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
