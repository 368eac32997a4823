"""The lab: runs experiments, keeps their records, judges their claims.

>>> from neurarium import lab
>>> record = lab.run("sltt")                        # doctest: +SKIP
>>> for verdict in lab.judge("sltt", record):       # doctest: +SKIP
...     print(verdict.verdict, verdict.says)

An experiment is a module with ``run(trial)`` (:mod:`~neurarium.lab.trial`); :mod:`~neurarium.lab.runner` runs it at several seeds
through an engine (:mod:`~neurarium.lab.engines`) and makes a record (:mod:`~neurarium.lab.record`); :mod:`~neurarium.lab.verdict` judges
the paper's claims on the record, the null check included; :mod:`~neurarium.lab.verify` does so for all published records; figures
(:mod:`~neurarium.lab.figures`) and reports (:mod:`~neurarium.lab.report`) are drawn from the record alone.

Names are loaded when they are first used: importing this package loads neither torch nor matplotlib.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from neurarium.lab.expression import Expression
    from neurarium.lab.figures import draw
    from neurarium.lab.fingerprinting import fingerprint
    from neurarium.lab.record import ArmRun, Record, SeedRun
    from neurarium.lab.records import publish, published, record_path, records_root
    from neurarium.lab.report import as_html, as_markdown, as_text
    from neurarium.lab.runner import compare, run, run_many
    from neurarium.lab.trial import Arm, Trial
    from neurarium.lab.verdict import Verdict, judge
    from neurarium.lab.verification import PaperReport, VerifyReport, verify
    from neurarium.lab.view import RecordView

_HOMES = {
    "Arm": "trial",
    "ArmRun": "record",
    "Expression": "expression",
    "PaperReport": "verification",
    "Record": "record",
    "RecordView": "view",
    "SeedRun": "record",
    "Trial": "trial",
    "Verdict": "verdict",
    "VerifyReport": "verification",
    "as_html": "report",
    "as_markdown": "report",
    "as_text": "report",
    "compare": "runner",
    "draw": "figures",
    "fingerprint": "fingerprinting",
    "judge": "verdict",
    "publish": "records",
    "published": "records",
    "record_path": "records",
    "records_root": "records",
    "run": "runner",
    "run_many": "runner",
    "verify": "verification",
}

__all__ = [
    "Arm",
    "ArmRun",
    "Expression",
    "PaperReport",
    "Record",
    "RecordView",
    "SeedRun",
    "Trial",
    "Verdict",
    "VerifyReport",
    "as_html",
    "as_markdown",
    "as_text",
    "compare",
    "draw",
    "fingerprint",
    "judge",
    "publish",
    "published",
    "record_path",
    "records_root",
    "run",
    "run_many",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"neurarium.lab.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'neurarium.lab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
