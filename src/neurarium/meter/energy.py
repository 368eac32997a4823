"""An energy model: joules from counted operations and moved bytes.

A model, not a measurement. It charges each multiply-add, each accumulation and each byte a constant of a stated technology, as is the
custom of the literature on spiking and quantised networks, and says nothing about control, clocking or leakage.

*Source* of :data:`CMOS_45NM`: M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, figure 1.1.9
(45 nm, 0.9 V): float32 multiply 3.7 pJ, add 0.9 pJ; float16 1.1 and 0.4; int8 multiply 0.2, add 0.03; int32 add 0.1; a 64-bit
read of an 8 kB SRAM 10 pJ. The 640 pJ of a 32-bit DRAM read are the figure that Han et al. (NeurIPS 2015, table 1) give for 45 nm.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from neurarium.errors import BadInput

__all__ = ["CMOS_45NM", "EnergyTable", "energy"]

PICO = 1e-12


@dataclass(frozen=True)
class EnergyTable:
    """Joules an operation by bit width, and a byte by kind of memory. ``dataclasses.replace`` makes a variant."""

    name: str
    multiply: Mapping[int, float]  # bits of the operands -> J
    accumulate: Mapping[int, float]  # bits of the operands -> J of one addition into the accumulator
    memory: Mapping[str, float]  # kind -> J a byte

    def mac(self, bits: int) -> float:
        """One multiply-add of operands of ``bits``."""
        return _look(self.multiply, bits, "multiply", self.name) + self.ac(bits)

    def ac(self, bits: int) -> float:
        """One accumulation, what a binary spike costs instead of a multiply-add."""
        return _look(self.accumulate, bits, "accumulate", self.name)


#: 32: float32; 16: float16; 8: int8 operands with an int32 accumulator, which is what sums of int8 products need.
CMOS_45NM = EnergyTable(
    "45 nm CMOS (Horowitz 2014)",
    MappingProxyType({32: 3.7 * PICO, 16: 1.1 * PICO, 8: 0.2 * PICO}),
    MappingProxyType({32: 0.9 * PICO, 16: 0.4 * PICO, 8: 0.1 * PICO}),
    MappingProxyType({"sram": 5.0 * PICO / 4, "dram": 640.0 * PICO / 4}),
)


def energy(
    *, macs: float = 0, acs: float = 0, bytes: float = 0, bits: int = 32, memory: str = "sram", table: EnergyTable = CMOS_45NM
) -> float:
    """Joules of ``macs`` multiply-adds and ``acs`` accumulations of ``bits``, and of ``bytes`` moved through ``memory``.

    ``memory`` is ``sram`` (an 8 kB buffer next to the arithmetic) or ``dram``.
    """
    for name, count in (("macs", macs), ("acs", acs), ("bytes", bytes)):
        if not 0 <= count < float("inf"):
            raise BadInput(f"{name} must be a finite count, got {count}")
    moved = bytes * _look(table.memory, memory, "memory", table.name) if bytes else 0.0
    return (macs * table.mac(bits) if macs else 0.0) + (acs * table.ac(bits) if acs else 0.0) + moved


def _look(table: Mapping[int, float] | Mapping[str, float], key: int | str, what: str, name: str) -> float:
    entry = dict(table).get(key)  # type: ignore[arg-type]
    if entry is None:
        raise BadInput(f"{name} has no figure for {what} {key!r}; it has {', '.join(map(str, table))}. Pass table= with one of your own")
    return entry
