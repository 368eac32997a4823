"""The bounds that a claim sets on its measure: ``"<= 0.30"``, ``">= 0.8 and <= 1.2"``, ``"in [0.8, 1.2]"``, ``"== 1"``."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from neurarium.errors import BadInput

__all__ = ["Bound"]

_NUMBER = r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,3})?"
_PART = re.compile(rf"(<=|>=|==|<|>)\s*({_NUMBER})")
_RANGE = re.compile(rf"in\s*\[\s*({_NUMBER})\s*,\s*({_NUMBER})\s*\]")
_SYNTAX = "write it as '<= 0.3', '> 1', '== 1', '>= 0.8 and <= 1.2' or 'in [0.8, 1.2]'"


@dataclass(frozen=True)
class Bound:
    """A set of values between two ends, each of which belongs to it or not."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False  # True: the end itself is outside
    high_open: bool = False

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Read a bound; raises :class:`~neurarium.errors.BadInput` that shows the syntax."""
        text = text.strip()
        if len(text) > 100:
            raise BadInput(f"a bound of {len(text)} characters is too long; {_SYNTAX}")
        if match := _RANGE.fullmatch(text):
            bound = cls(float(match[1]), float(match[2]))
        else:
            low, high = (-math.inf, False), (math.inf, False)
            for part in re.split(r"\s+and\s+", text):
                match = _PART.fullmatch(part)
                if match is None:
                    raise BadInput(f"{text!r} is not a bound; {_SYNTAX}")
                sign, end = match[1], float(match[2])
                if sign in (">", ">=", "=="):
                    low = max(low, (end, sign == ">"))  # of equal ends the open one is the tighter
                if sign in ("<", "<=", "=="):
                    high = min(high, (end, sign == "<"), key=lambda limit: (limit[0], not limit[1]))
            bound = cls(low[0], high[0], low[1], high[1])
        if bound.low > bound.high or (bound.low == bound.high and (bound.low_open or bound.high_open)):
            raise BadInput(f"no value satisfies the bound {text!r}")
        return bound

    def contains(self, value: float) -> bool:
        """Whether one value satisfies the bound; NaN never does."""
        above = value > self.low if self.low_open else value >= self.low
        below = value < self.high if self.high_open else value <= self.high
        return above and below

    def contains_interval(self, low: float, high: float) -> bool:
        """Whether every value of the interval satisfies the bound."""
        return self.contains(low) and self.contains(high)

    def __str__(self) -> str:
        if self.low == self.high:
            return f"== {self.low:g}"
        ends = []
        if self.low != -math.inf:
            ends.append(f"{'>' if self.low_open else '>='} {self.low:g}")
        if self.high != math.inf:
            ends.append(f"{'<' if self.high_open else '<='} {self.high:g}")
        return " and ".join(ends)
