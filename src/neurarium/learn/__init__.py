"""Room ``learn``: how parameters are learned. Learners, local rules, optimizers."""

from neurarium.learn.balance import Clues, Recipe, balance_search, clues
from neurarium.learn.cascaded_forward import CascadedForward
from neurarium.learn.chain import Chain, as_chain
from neurarium.learn.conditions import DataCondition, NoiseCondition, OutputPenalty, TaskEmbedding
from neurarium.learn.coordinates import coordinate_check
from neurarium.learn.counter_current import CounterCurrent
from neurarium.learn.depth import MeanSubtraction, depth_mup_, feature_diversity, with_depth
from neurarium.learn.feedback import DFA, RandomFeedback
from neurarium.learn.fit import Backprop, Diverged, EarlyStopping, Learner, evaluate, load_checkpoint, save_checkpoint
from neurarium.learn.forward_forward import ForwardForward
from neurarium.learn.generate import IGPG, TaskConditioner, WeightGPT
from neurarium.learn.graph_forward import GraphForward, GraphLayers
from neurarium.learn.graph_links import link_loss, split_links
from neurarium.learn.grow import ExpandableCNN, NaturalExpansion, SelfExpanding, insert_identity_conv, natural_expansion_score, widen_conv
from neurarium.learn.hyper import HyperNetwork, Target, mip
from neurarium.learn.hyper_lstm import DynamicHyperLSTMCell
from neurarium.learn.hyper_probes import design, magnitude_probe
from neurarium.learn.local import LocalLearner, LocalObjective, Readout, gradient_alignment
from neurarium.learn.mono_forward import MonoForward
from neurarium.learn.noprop import NoProp, NoPropCTNet, NoPropFMNet, NoPropNet
from neurarium.learn.orthogonal import ROOT, Muon, matrix_groups, newton_schulz
from neurarium.learn.parametrize import MuAdam, MuSGD, attention_scale, mup_, mup_groups
from neurarium.learn.photonic import OPU
from neurarium.learn.physical import PhysicalChain, PhysicalForwardForward, PhysicalLayer, PhysicsAware, fit_twin
from neurarium.learn.predictive import HGF, HGFLearner, HGFNetwork, adapt_structure, surprise
from neurarium.learn.predictive_coding import PredictiveCoding, PredictiveCodingMLP
from neurarium.learn.private_feedback import DPSGD, PrivateDFA, epsilon
from neurarium.learn.scattering import Metasurface, RandomScattering
from neurarium.learn.schedule import CyclicalMomentum, HessianFreeLR, OneCycle, RangeTest, lr_range_test
from neurarium.learn.sweep import best_rate, sweep
from neurarium.learn.two_stage import OIGBP, OIGHWO, OWOBP, OWOHWO, TwoLayerMLP, TwoStage, levenberg_marquardt
from neurarium.learn.weight_tokens import GumbelVQ, WeightTokenizer
from neurarium.learn.widths import Parametrization, infer_shapes
from neurarium.learn.zoo import Instruction, ZooNet, model_zoo, train_many

__all__ = [
    "DFA",
    "DPSGD",
    "HGF",
    "IGPG",
    "OIGBP",
    "OIGHWO",
    "OPU",
    "OWOBP",
    "OWOHWO",
    "ROOT",
    "Backprop",
    "CascadedForward",
    "Chain",
    "Clues",
    "CounterCurrent",
    "CyclicalMomentum",
    "DataCondition",
    "Diverged",
    "DynamicHyperLSTMCell",
    "EarlyStopping",
    "ExpandableCNN",
    "ForwardForward",
    "GraphForward",
    "GraphLayers",
    "GumbelVQ",
    "HGFLearner",
    "HGFNetwork",
    "HessianFreeLR",
    "HyperNetwork",
    "Instruction",
    "Learner",
    "LocalLearner",
    "LocalObjective",
    "MeanSubtraction",
    "Metasurface",
    "MonoForward",
    "MuAdam",
    "MuSGD",
    "Muon",
    "NaturalExpansion",
    "NoProp",
    "NoPropCTNet",
    "NoPropFMNet",
    "NoPropNet",
    "NoiseCondition",
    "OneCycle",
    "OutputPenalty",
    "Parametrization",
    "PhysicalChain",
    "PhysicalForwardForward",
    "PhysicalLayer",
    "PhysicsAware",
    "PredictiveCoding",
    "PredictiveCodingMLP",
    "PrivateDFA",
    "RandomFeedback",
    "RandomScattering",
    "RangeTest",
    "Readout",
    "Recipe",
    "SelfExpanding",
    "Target",
    "TaskConditioner",
    "TaskEmbedding",
    "TwoLayerMLP",
    "TwoStage",
    "WeightGPT",
    "WeightTokenizer",
    "ZooNet",
    "adapt_structure",
    "as_chain",
    "attention_scale",
    "balance_search",
    "best_rate",
    "clues",
    "coordinate_check",
    "depth_mup_",
    "design",
    "epsilon",
    "evaluate",
    "feature_diversity",
    "fit_twin",
    "gradient_alignment",
    "infer_shapes",
    "insert_identity_conv",
    "levenberg_marquardt",
    "link_loss",
    "load_checkpoint",
    "lr_range_test",
    "magnitude_probe",
    "matrix_groups",
    "mip",
    "model_zoo",
    "mup_",
    "mup_groups",
    "natural_expansion_score",
    "newton_schulz",
    "save_checkpoint",
    "split_links",
    "surprise",
    "sweep",
    "train_many",
    "widen_conv",
    "with_depth",
]
