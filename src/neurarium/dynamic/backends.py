"""What compiles a segment: ``torch.export``, ONNX Runtime, ``torch.compile``. Any batch size works on all of them.

See :mod:`neurarium.dynamic.compile`.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput, MissingExtra

__all__ = ["OnnxRuntime", "export", "inductor", "to_onnx"]


def export(segment: nn.Module, example: tuple[Tensor, ...]) -> torch.export.ExportedProgram:
    """A ``torch.export`` program with a free batch size."""
    n = max((len(t) for t in example if t.ndim), default=0)
    free = torch.export.Dim("n", min=1, max=2**16)
    dims = [{0: free} if t.ndim and len(t) == n > 1 else None for t in example]
    with torch.no_grad():
        try:
            return torch.export.export(segment, example, dynamic_shapes=(tuple(dims),))
        except (ValueError, RuntimeError):  # len(x) is a constant to it
            return torch.export.export(segment, example, dynamic_shapes=(tuple(dims),), strict=True)


def inductor(segments: Iterable[nn.Module], examples: Iterable[tuple[Tensor, ...]]) -> list[nn.Module]:
    """Segments by ``torch.compile``; on the CPU it writes C++, for which there must be a compiler."""
    if any(t.device.type == "cpu" for tensors in examples for t in tensors):
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.exc import InvalidCxxCompiler

        try:
            get_cpp_compiler()
        except InvalidCxxCompiler as error:
            raise BadInput(
                "backend 'inductor' writes C++, and no compiler for it was found: install g++ or clang++, or name one in the environment "
                "variable CXX; 'export' and 'onnx' need none"
            ) from error
    return [_Compiled(segment) for segment in segments]


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


def to_onnx(exported: Callable[[], Sequence[torch.export.ExportedProgram]], examples: Sequence[tuple[Tensor, ...]]) -> list[bytes]:
    """The segments as ONNX models; ``exported`` makes them ``torch.export`` programs, once it is known that the packages are there."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        try:
            __import__(package)
        except ImportError as error:
            raise MissingExtra(package, "export") from error
    with _quick_exporter():
        return [_to_onnx(program, example) for program, example in zip(exported(), examples)]


def _to_onnx(program: torch.export.ExportedProgram, example: tuple[Tensor, ...]) -> bytes:
    names = {"input_names": [f"in{i}" for i in range(len(example))]}
    made = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    return made.model_proto.SerializeToString()


class OnnxRuntime(nn.Module):
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
        return OnnxRuntime, (self.binary,)

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxRuntime:
        return OnnxRuntime(self.binary)


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
