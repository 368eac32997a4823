"""Networks that decide at run time how much to compute.

A dynamic network is a set of plain segments and a question asked between them. The answer is a path; output, cost, training loss and
exported program are functions of the path. One engine runs paths (:mod:`~neurarium.dynamic.staged`), one meter prices them
(:mod:`~neurarium.dynamic.cost`), one calibration turns budgets into thresholds (:mod:`~neurarium.dynamic.budget`)."""

from neurarium.dynamic.attacks import pgd
from neurarium.dynamic.backbones import BackboneS, VisionTransformerS
from neurarium.dynamic.budget import Curve
from neurarium.dynamic.channel import FTWT
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.decoder import Decoder
from neurarium.dynamic.exits import EarlyExit, ExitChain, with_exits
from neurarium.dynamic.family import FamilyPolicy
from neurarium.dynamic.gates import Entropy, LearnedGate, Margin, MaxProb, Patience
from neurarium.dynamic.jei import JEIDNN
from neurarium.dynamic.outcome import Family, Policy, Staged
from neurarium.dynamic.stitch import SNNet, stitch
from neurarium.dynamic.train import CachedStages, fit_policy, measure

__all__ = [
    "FTWT",
    "JEIDNN",
    "BackboneS",
    "CachedStages",
    "CostTable",
    "Curve",
    "Decoder",
    "EarlyExit",
    "Entropy",
    "ExitChain",
    "Family",
    "FamilyPolicy",
    "LearnedGate",
    "Margin",
    "MaxProb",
    "Patience",
    "Policy",
    "SNNet",
    "Staged",
    "VisionTransformerS",
    "fit_policy",
    "measure",
    "stitch",
    "pgd",
    "with_exits",
]
