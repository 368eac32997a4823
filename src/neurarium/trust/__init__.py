"""Trust: what a network has learned, how sure it may be, and what it does when somebody interferes."""

from neurarium.trust.explain import (
    METHODS,
    CamReport,
    Capture,
    Faithfulness,
    Localisation,
    capture,
    class_activation,
    faithfulness,
    last_map,
    localise,
    patch,
    peaks,
)

__all__ = [
    "METHODS",
    "CamReport",
    "Capture",
    "Faithfulness",
    "Localisation",
    "capture",
    "class_activation",
    "faithfulness",
    "last_map",
    "localise",
    "patch",
    "peaks",
]
