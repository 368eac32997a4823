"""Figures, drawn from a record alone: whoever has the record redraws them without running anything.

An experiment module may bring ``figure(record, fig)``, given a :class:`~neurarium.lab.view.RecordView` and an empty matplotlib figure,
which the lab lays out ("constrained"; ``fig.tight_layout()`` does nothing) and saves.
Without one, a paper's figure shows each claim's measure against its bound, a comparison's shows its two measures against each other.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neurarium.catalog import Comparison
from neurarium.errors import BadInput, RecordError
from neurarium.lab.files import atomic_write
from neurarium.lab.record import Record
from neurarium.lab.view import RecordView

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from neurarium.lab.runner import Subject

__all__ = ["COLOURS", "draw", "draw_or_say", "lower_is_better", "pareto_front", "render"]

#: Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")

_COSTS = {"bytes", "cost", "energy", "error", "flops", "joules", "latency", "loss", "macs", "mae", "mape", "memory", "mse", "parameters"}
_COSTS |= {"peak", "perplexity", "regret", "residual", "rmse", "saved", "seconds", "spikes", "steps"}


def draw(record: Record, paper: Subject, path: Path | str) -> Path:
    """Draw a record's figure into a file, png, svg or pdf by its ending, and return its path."""
    path = Path(path)
    kind = path.suffix.lstrip(".").lower()
    if kind not in ("png", "svg", "pdf"):
        raise BadInput(f"{path.name!r}: a figure is a .png, .svg or .pdf file")
    atomic_write(path, render(record, paper, kind))
    return path


def render(record: Record, paper: Subject, kind: str = "png", *, default: bool = False) -> bytes:
    """A record's figure as the bytes of a file. ``default`` leaves the experiment's own drawing aside."""
    from cycler import cycler
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if record.id != paper.id:
        raise BadInput(f"the record is of {record.id!r}, not of {paper.id!r}")
    style: Any = {"axes.prop_cycle": cycler(color=COLOURS), "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "0"}
    with rc_context(style):
        fig = Figure(figsize=(8, 4.5), layout="constrained")
        fig.tight_layout = fig.set_layout_engine = lambda *args, **options: None  # type: ignore[method-assign]
        _drawing(paper, default)(RecordView(record), fig)
        buffer = io.BytesIO()
        fig.savefig(buffer, format=kind, dpi=120, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()


def draw_or_say(record: Record, paper: Subject, path: Path, note: Callable[[str], None]) -> None:
    """Draw; if the experiment's own drawing fails, say so and draw the default. A record is never lost to its picture."""
    try:
        draw(record, paper, path)
    except RecordError:
        raise
    except Exception as error:
        note(f"{paper.id}: its figure failed ({type(error).__name__}: {error}); a plain one is drawn instead")
        try:
            atomic_write(path, render(record, paper, default=True))
        except RecordError:
            raise
        except Exception as worse:
            note(f"{paper.id}: the plain figure failed too ({type(worse).__name__}: {worse}); there is none")


def _drawing(paper: Subject, default: bool) -> Callable[[RecordView, Figure], None]:
    if not default:
        own: Callable[[RecordView, Figure], None] | None = getattr(importlib.import_module(str(paper.experiment)), "figure", None)
        if own is not None:
            return own
    if isinstance(paper, Comparison):
        return lambda view, fig: _trade_off(paper, view, fig)
    return lambda view, fig: _metrics(view, fig)


def _metrics(view: RecordView, fig: Figure) -> None:
    """One panel a metric that is a number in every arm that ran, at most six: a bar an arm, a dot a seed."""
    arms = [arm for arm in view.arms if view.metrics(arm)]
    shared = [m for m in view.metrics(arms[0]) if all(view.has(a, m) and view.values(a, m).ndim == 1 for a in arms)]
    names = ([m for m in shared if m != "seconds"] or ["seconds"])[:6]
    for axis, metric in zip(fig.subplots(1, len(names), squeeze=False)[0], names):
        for i, arm in enumerate(arms):
            values = view.values(arm, metric)
            axis.bar(i, view.mean(arm, metric), color=COLOURS[i % len(COLOURS)], alpha=0.6)
            axis.plot([i] * len(values), values, "o", color="black", markersize=3)
        axis.set_title(metric)
        axis.set_xticks(range(len(arms)), arms, rotation=30, ha="right")
    fig.suptitle(f"{view.id}, {view.scale} scale, {len(view.seeds)} seed{'s' if len(view.seeds) > 1 else ''}")


def _trade_off(comparison: Comparison, view: RecordView, fig: Figure) -> None:
    """The comparison's two metrics against each other: a point an arm with its spread over seeds, and the Pareto front."""
    x, y = (*comparison.plot, "seconds", "accuracy")[:2] if len(comparison.plot) < 2 else comparison.plot[:2]
    arms = [arm for arm in view.arms if view.has(arm, x) and view.has(arm, y)]
    if not arms:
        raise BadInput(f"no arm of {comparison.id!r} has both {x!r} and {y!r}")
    axis = fig.subplots()
    points = {arm: (view.mean(arm, x), view.mean(arm, y)) for arm in arms}
    for i, arm in enumerate(arms):
        spread = [np.nanstd(view.values(arm, metric)) for metric in (x, y)]
        axis.errorbar(*points[arm], xerr=spread[0], yerr=spread[1], fmt="o", color=COLOURS[i % len(COLOURS)], capsize=3)
        axis.annotate(arm, points[arm], xytext=(6, 6), textcoords="offset points")
    best = pareto_front(points, x_lower=lower_is_better(x), y_lower=lower_is_better(y))
    axis.step([points[a][0] for a in best], [points[a][1] for a in best], where="post", color="grey", linestyle=":", zorder=0)
    for name, metric, lower in (("x", x, lower_is_better(x)), ("y", y, lower_is_better(y))):
        getattr(axis, f"set_{name}label")(f"{metric} ({'lower' if lower else 'higher'} is better)")
    fig.suptitle(comparison.question)


def lower_is_better(metric: str) -> bool:
    """Whether a metric is a cost or an error, judged by its name."""
    return any(word in _COSTS for word in metric.lower().split("_"))


def pareto_front(points: Mapping[str, tuple[float, float]], *, x_lower: bool = True, y_lower: bool = False) -> list[str]:
    """The names of the points that no other point beats in both, from left to right."""
    signed = {name: (x if x_lower else -x, y if y_lower else -y) for name, (x, y) in points.items()}
    front = [
        name for name, at in signed.items() if not any(all(o <= a for o, a in zip(other, at)) and other != at for other in signed.values())
    ]
    return sorted(front, key=lambda name: points[name])
