"""Explanations: where a model looks, and whether that is true."""

from neurarium.trust.explain.cam import METHODS, CamReport, class_activation
from neurarium.trust.explain.capture import Capture, capture, last_map, patch
from neurarium.trust.explain.faithful import Faithfulness, faithfulness
from neurarium.trust.explain.localise import Localisation, localise, peaks

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
