"""All meters at once."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from neurarium.meter.clock import Timing, latency
from neurarium.meter.compute import flops
from neurarium.meter.energy import energy
from neurarium.meter.memory import saved_bytes
from neurarium.meter.size import nonzero_parameters, parameters, stored_bytes
from neurarium.meter.state import undisturbed

__all__ = ["Profile", "profile"]


@dataclass(frozen=True)
class Profile:
    """What a model costs for given inputs. Prints as a table, in a terminal through rich."""

    parameters: int
    nonzero_parameters: int
    stored_bytes: int
    flops: int  # of one forward pass
    macs: int
    saved_bytes: int  # kept by one forward pass for the backward pass
    latency: Timing  # of one forward pass without gradients
    energy: float  # J a forward pass: float32 multiply-adds and one DRAM read of what is stored

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return asdict(self)

    def rows(self) -> list[tuple[str, str]]:
        """The table: what, and how much."""
        return [
            ("parameters", f"{self.parameters:,}"),
            ("non-zero parameters", f"{self.nonzero_parameters:,}"),
            ("stored", _bytes(self.stored_bytes)),
            ("FLOPs", f"{self.flops:,}"),
            ("multiply-adds", f"{self.macs:,}"),
            ("saved for backward", _bytes(self.saved_bytes)),
            ("latency", str(self.latency)),
            ("energy (model, 45 nm)", f"{self.energy * 1e6:.4g} uJ"),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        wide, far = (max(len(r[i]) for r in rows) for i in (0, 1))
        return "\n".join(f"{what:<{wide}}  {much:>{far}}" for what, much in rows)

    def __rich__(self) -> Any:
        from rich.table import Table

        table = Table("measure", "value", title="profile")
        table.columns[1].justify = "right"
        for row in self.rows():
            table.add_row(*row)
        return table


def profile(model: nn.Module, *inputs: Any, repeats: int = 20) -> Profile:
    """Every meter for ``model(*inputs)``, in its present mode. The model is left as it was."""
    with undisturbed(model), torch.no_grad():
        timing = latency(model, *inputs, repeats=repeats)
    work, stored = flops(model, *inputs), stored_bytes(model)
    return Profile(
        parameters=parameters(model),
        nonzero_parameters=nonzero_parameters(model),
        stored_bytes=stored,
        flops=work,
        macs=work // 2,
        saved_bytes=saved_bytes(model, *inputs),
        latency=timing,
        energy=energy(macs=work // 2, bytes=stored, memory="dram"),
    )


def _bytes(n: int) -> str:
    size, unit = float(n), "B"
    for larger in ("KiB", "MiB", "GiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{n} B" if unit == "B" else f"{size:.2f} {unit}"
