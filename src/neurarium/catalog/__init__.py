"""The catalog: which papers there are, what each claims, and where its code and its experiment live.

One TOML file a room under ``rooms/``, read into frozen dataclasses. Nothing here imports torch, and nothing that a catalog names is
imported before it is asked for with :func:`resolve`. Other packages add papers through the entry-point group ``neurarium.catalog``
(see :mod:`neurarium.catalog.plugins`).

>>> from neurarium import catalog
>>> catalog.load().get("sltt").title
'Towards Memory- and Time-Efficient Backpropagation for Training Spiking Neural Networks'
"""

from __future__ import annotations

from neurarium.catalog.bounds import Bound
from neurarium.catalog.library import Catalog, load, load_files
from neurarium.catalog.references import resolve
from neurarium.catalog.schema import EVIDENCE, ROLES, STATUSES, Claim, Comparison, Paper

__all__ = [
    "EVIDENCE",
    "ROLES",
    "STATUSES",
    "Bound",
    "Catalog",
    "Claim",
    "Comparison",
    "Paper",
    "load",
    "load_files",
    "resolve",
]
