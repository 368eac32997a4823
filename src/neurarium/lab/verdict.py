"""Verdicts: does a record bear a paper's claims out?

A claim's measure is evaluated at each seed (arms paired by seed); over the seeds that gives a mean and a 95 % interval of Student's t.
The *interval* decides:

- ``held``: all of it satisfies the claim's bound ``holds``;
- ``weaker``: not that, but all of it satisfies ``direction`` (the effect is there, smaller than claimed);
- ``failed``: neither. A value that is not finite, or an arm that crashed at some seed, fails the claim and is named: what could not be
  measured at every seed is not confirmed;
- ``not judged``: a smoke run, or fewer than three seeds.

``within_noise`` says that the interval straddles the bound: more seeds might decide otherwise.

**The null check.** The claim is judged once more with the method's measurements replaced by its baseline's (``null`` in the catalog maps
arms to arms). If it still holds, it says nothing about the method: it is parity, not evidence. ``null_fails`` is True where the null is
refused, None where it cannot be told: the baseline did not log what the measure reads, or the measure reads no arm that is replaced.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from neurarium.catalog import Bound
from neurarium.errors import BadInput
from neurarium.lab.expression import Expression, Lookup
from neurarium.lab.record import Record

if TYPE_CHECKING:
    from neurarium.catalog import Claim, Paper

__all__ = ["MIN_SEEDS", "VERDICTS", "Verdict", "interval", "judge", "judge_claim"]

VERDICTS = ("held", "weaker", "failed", "not judged")
MIN_SEEDS = 3


@dataclass(frozen=True)
class Verdict:
    """What a record says of one claim."""

    says: str
    reported: str
    measure: str
    holds: str
    verdict: str  # held, weaker, failed or not judged
    measured: float | None = None  # mean over seeds; None if nothing could be evaluated
    interval: tuple[float, float] | None = None  # 95 %
    values: Mapping[int, float] = field(default_factory=dict)  # by seed
    within_noise: bool = False
    null_fails: bool | None = None
    null_measured: float | None = None
    reason: str = ""  # why it is so: ours where it could not be judged, the catalog's where it does not hold

    @property
    def n(self) -> int:
        """Seeds at which the measure was evaluated."""
        return len(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; what is not finite becomes null."""
        return {
            "says": self.says,
            "reported": self.reported,
            "measured": _finite(self.measured),
            "interval": None if self.interval is None else [_finite(end) for end in self.interval],
            "verdict": self.verdict,
            "null_fails": self.null_fails,
        }


def judge(paper: Paper | str, record: Record) -> list[Verdict]:
    """The verdict on each claim of a paper, in the catalog's order. The bounds are today's; see ``moved`` of verify for the record's."""
    if isinstance(paper, str):
        from neurarium import catalog

        paper = catalog.load().get(paper)
    if record.id != paper.id or record.kind != "paper":
        raise BadInput(f"the record is of {record.kind} {record.id!r}, not of paper {paper.id!r}")
    return [judge_claim(claim, record, claim.null if claim.null is not None else paper.null) for claim in paper.claims]


def judge_claim(claim: Claim, record: Record, null: Mapping[str, str]) -> Verdict:
    """The verdict on one claim; ``null`` maps method arms to baseline arms."""
    expression, bound = Expression.parse(claim.measure), Bound.parse(claim.holds)
    table: dict[str, Any] = {"says": claim.says, "reported": claim.reported, "measure": claim.measure, "holds": claim.holds}
    _check_names(expression, record)
    try:
        values, missing = _values(expression, record, {})
    except BadInput as error:  # at smoke scale lists may be shorter than the measure's indices expect
        if record.scale == "laptop":
            raise
        return Verdict(**table, verdict="not judged", reason=f"it cannot be evaluated at {record.scale} scale: {error}")
    table |= {"values": values}
    if values:
        mean, low, high = interval(list(values.values()))
        table |= {"measured": mean, "interval": (low, high) if len(values) > 1 and math.isfinite(mean) else None}
    if record.scale != "laptop":
        return Verdict(**table, verdict="not judged", reason=f"{record.scale} scale only shows that the experiment runs through")
    if missing:
        return Verdict(**table, verdict="failed", reason=missing)
    if len(values) < MIN_SEEDS:
        return Verdict(**table, verdict="not judged", reason=f"{len(values)} seeds; a verdict needs {MIN_SEEDS}")
    null_fails, null_mean, null_reason = _null(expression, bound, record, null)
    table |= {"null_fails": null_fails, "null_measured": null_mean}
    if bad := [seed for seed, value in values.items() if not math.isfinite(value)]:
        return Verdict(**table, verdict="failed", reason=f"the measure is not finite at seed {', '.join(map(str, bad))}")
    within = not bound.contains_interval(low, high) and _touches(bound, low, high)
    if bound.contains_interval(low, high):
        return Verdict(**table, verdict="held", reason=null_reason)
    weaker = claim.direction is not None and Bound.parse(claim.direction).contains_interval(low, high)
    reasons = [claim.reason or "", null_reason]
    return Verdict(**table, verdict="weaker" if weaker else "failed", within_noise=within, reason="; ".join(filter(None, reasons)))


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and 95 % interval of Student's t. Equal values have an interval without width; one value an infinite one."""
    array = np.asarray(values, dtype=np.float64)
    if not np.isfinite(array).all():
        return float(array.mean()), math.nan, math.nan
    mean = float(array.mean())
    if (array == array[0]).all():
        mean = float(array[0])
        return (mean, mean, mean) if len(array) > 1 else (mean, -math.inf, math.inf)
    from scipy.special import stdtrit  # type: ignore[import-untyped,unused-ignore]

    half = float(stdtrit(len(array) - 1, 0.975) * array.std(ddof=1) / math.sqrt(len(array)))
    return mean, mean - half, mean + half


def _null(expression: Expression, bound: Bound, record: Record, null: Mapping[str, str]) -> tuple[bool | None, float | None, str]:
    """Whether the claim fails with the baseline in the method's place, the measure's mean then, and why it cannot be told."""
    if not set(expression.arms) & {arm for arm, other in null.items() if arm != other}:
        return None, None, "no null check: the measure reads no method arm"
    try:
        values, missing = _values(expression, record, null)
    except BadInput:
        return None, None, "no null check: the baseline did not log what the measure reads"
    if missing:
        return None, None, "no null check: the baseline crashed"
    if not all(math.isfinite(value) for value in values.values()):
        return None, None, "no null check: the measure is not finite with the baseline in the method's place"
    mean, low, high = interval(list(values.values()))
    return not bound.contains_interval(low, high), mean, ""


def _values(expression: Expression, record: Record, replaced: Mapping[str, str]) -> tuple[dict[int, float], str]:
    """The measure by seed, and what is missing at the seeds where it could not be evaluated."""
    values: dict[int, float] = {}
    missing: list[str] = []
    for seed in record.seeds:
        gone = [arm for arm in dict.fromkeys(replaced.get(a, a) for a in expression.arms) if not _ran(record, seed.seed, arm)]
        if gone:
            missing.append(f"arm {gone[0]} crashed at seed {seed.seed}")
        else:
            values[seed.seed] = expression.evaluate(_lookup(record, seed.seed, replaced))
    return values, "; ".join(missing)


def _check_names(expression: Expression, record: Record) -> None:
    """An arm or a metric that the experiment does not have is a mistake of the measure, not a crash."""
    for arm, metric in expression.names:
        if arm not in record.arms and not any(seed.error for seed in record.seeds):
            raise BadInput(f"measure {expression.text!r}: no arm {arm!r}; there are {', '.join(record.arms) or 'none'}")
        for seed in record.seeds:
            if _ran(record, seed.seed, arm):
                _lookup(record, seed.seed, {})(arm, metric)


def _ran(record: Record, seed: int, arm: str) -> bool:
    """Whether an arm is done at a seed."""
    run = record.run(seed, arm)
    return run is not None and run.status == "done"


def _lookup(record: Record, seed: int, replaced: Mapping[str, str]) -> Lookup:
    """What was logged at a seed, with some arms' measurements in the place of others'."""

    def look(arm: str, metric: str) -> Any:
        run = record.run(seed, replaced.get(arm, arm))
        assert run is not None
        if metric not in run.metrics:
            raise BadInput(f"arm {run.arm!r} of {record.id!r} has no metric {metric!r}; it logged {', '.join(run.metrics) or 'nothing'}")
        return run.metrics[metric]

    return look


def _touches(bound: Bound, low: float, high: float) -> bool:
    """Whether some value between low and high satisfies the bound."""
    nearest = min(max(low, bound.low), high)
    return bound.contains(nearest) or bound.contains(math.nextafter(nearest, high))


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
