"""Networks that decide at run time how much to compute.

A dynamic network is a set of plain segments and a question asked between them. The answer is a path; output, cost, training loss and
exported program are functions of the path. One engine runs paths (:mod:`~neurarium.dynamic.staged`), one meter prices them
(:mod:`~neurarium.dynamic.cost`), one calibration turns budgets into thresholds (:mod:`~neurarium.dynamic.budget`)."""

from neurarium.dynamic.acquisition import SGUQ, ViewStages
from neurarium.dynamic.attacks import early_attack, pgd, slowdown
from neurarium.dynamic.backbones import BackboneS, ElasticBackbone, VisionTransformerS
from neurarium.dynamic.budget import Curve
from neurarium.dynamic.channel import FTWT
from neurarium.dynamic.compile import Builder, Plan, Program, load_program, split
from neurarium.dynamic.cost import CostTable
from neurarium.dynamic.coupling import make_elastic
from neurarium.dynamic.decoder import Decoder
from neurarium.dynamic.elastic import Config, ElasticFamily, active, extract
from neurarium.dynamic.exits import EarlyExit, ExitChain, with_exits
from neurarium.dynamic.family import FamilyPolicy
from neurarium.dynamic.flops import register_attention
from neurarium.dynamic.gates import Entropy, LearnedGate, Margin, MaxProb, Patience, Spread
from neurarium.dynamic.jei import JEIDNN
from neurarium.dynamic.lora_experts import DynMoLE, auxiliary_loss, mole_transform, tsallis_entropy
from neurarium.dynamic.mobile import MobileConfig, mobile_net, redistribute
from neurarium.dynamic.outcome import Family, Policy, Staged
from neurarium.dynamic.patch import PatchedModel, patch_inference, plan_memory, search_schedule
from neurarium.dynamic.patch_quant import quantmcu
from neurarium.dynamic.perceiver import CrossAttentionLayer, DistilledExit, DynPerceiver
from neurarium.dynamic.pose import VideoPoseTransformer, mpjpe, pose_loss
from neurarium.dynamic.quantised import QuantisedModel
from neurarium.dynamic.robust_family import ProARD
from neurarium.dynamic.robustness import dynn_robustness, transfer
from neurarium.dynamic.sensors import DynST, SensorMask, apply_mask
from neurarium.dynamic.slimmable import Slimmable
from neurarium.dynamic.sorted import SortedNet
from neurarium.dynamic.sorted_llm import SortedFineTuning
from neurarium.dynamic.stitch import SNNet, stitch
from neurarium.dynamic.tips import TIPS, path_importance
from neurarium.dynamic.tokens import dpc_knn, hourglass, kept_frames, prune_tokens
from neurarium.dynamic.train import CachedStages, fit_policy, measure

register_attention()

__all__ = [
    "FTWT",
    "JEIDNN",
    "SGUQ",
    "TIPS",
    "BackboneS",
    "Builder",
    "CachedStages",
    "Config",
    "CostTable",
    "CrossAttentionLayer",
    "Curve",
    "Decoder",
    "DistilledExit",
    "DynMoLE",
    "DynPerceiver",
    "DynST",
    "EarlyExit",
    "ElasticBackbone",
    "ElasticFamily",
    "Entropy",
    "ExitChain",
    "Family",
    "FamilyPolicy",
    "LearnedGate",
    "Margin",
    "MaxProb",
    "MobileConfig",
    "PatchedModel",
    "Patience",
    "Plan",
    "Policy",
    "ProARD",
    "Program",
    "QuantisedModel",
    "SNNet",
    "SensorMask",
    "Slimmable",
    "SortedFineTuning",
    "SortedNet",
    "Spread",
    "Staged",
    "VideoPoseTransformer",
    "ViewStages",
    "VisionTransformerS",
    "active",
    "apply_mask",
    "auxiliary_loss",
    "dpc_knn",
    "dynn_robustness",
    "early_attack",
    "extract",
    "fit_policy",
    "hourglass",
    "kept_frames",
    "load_program",
    "make_elastic",
    "measure",
    "mobile_net",
    "mole_transform",
    "mpjpe",
    "patch_inference",
    "path_importance",
    "pgd",
    "plan_memory",
    "pose_loss",
    "prune_tokens",
    "quantmcu",
    "redistribute",
    "search_schedule",
    "slowdown",
    "split",
    "stitch",
    "transfer",
    "tsallis_entropy",
    "with_exits",
]
