"""Networks that decide at run time how much to compute.

A dynamic network is a set of plain segments and a question asked between them. The answer is a path; output, cost, training loss and
exported program are functions of the path. One engine runs paths (:mod:`~neurarium.dynamic.staged`), one meter prices them
(:mod:`~neurarium.dynamic.cost`), one calibration turns budgets into thresholds (:mod:`~neurarium.dynamic.budget`)."""

from neurarium.dynamic.attacks import pgd
from neurarium.dynamic.backbones import BackboneS, ElasticBackbone, VisionTransformerS
from neurarium.dynamic.budget import Curve
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.coupling import make_elastic
from neurarium.dynamic.decoder import Decoder
from neurarium.dynamic.elastic import Config, ElasticFamily, active, extract
from neurarium.dynamic.exits import EarlyExit, ExitChain, with_exits
from neurarium.dynamic.family import FamilyPolicy
from neurarium.dynamic.gates import Entropy, LearnedGate, Margin, MaxProb, Patience
from neurarium.dynamic.jei import JEIDNN
from neurarium.dynamic.outcome import Family, Policy, Staged
from neurarium.dynamic.slimmable import Slimmable
from neurarium.dynamic.sorted import SortedNet
from neurarium.dynamic.tips import TIPS, path_importance
from neurarium.dynamic.train import CachedStages, fit_policy, measure

__all__ = [
    "JEIDNN",
    "BackboneS",
    "Config",
    "ElasticBackbone",
    "ElasticFamily",
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
    "Slimmable",
    "SortedNet",
    "Staged",
    "TIPS",
    "VisionTransformerS",
    "active",
    "extract",
    "fit_policy",
    "make_elastic",
    "measure",
    "path_importance",
    "pgd",
    "with_exits",
]
