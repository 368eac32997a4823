"""Room ``learn``: how parameters are learned. Learners, local rules, optimizers."""

from neurarium.learn.cascaded_forward import CascadedForward
from neurarium.learn.chain import Chain, as_chain
from neurarium.learn.fit import Backprop, Diverged, EarlyStopping, Learner, evaluate, load_checkpoint, save_checkpoint
from neurarium.learn.forward_forward import ForwardForward
from neurarium.learn.local import LocalLearner, LocalObjective, Readout, gradient_alignment
from neurarium.learn.mono_forward import MonoForward
from neurarium.learn.orthogonal import ROOT, Muon, matrix_groups, newton_schulz
from neurarium.learn.predictive import HGF, HGFLearner, HGFNetwork, adapt_structure, surprise
from neurarium.learn.predictive_coding import PredictiveCoding, PredictiveCodingMLP
from neurarium.learn.two_stage import OIGBP, OIGHWO, OWOBP, OWOHWO, TwoLayerMLP, TwoStage, levenberg_marquardt

__all__ = [
    "HGF",
    "OIGBP",
    "OIGHWO",
    "OWOBP",
    "OWOHWO",
    "ROOT",
    "Backprop",
    "CascadedForward",
    "Chain",
    "Diverged",
    "EarlyStopping",
    "ForwardForward",
    "HGFLearner",
    "HGFNetwork",
    "Learner",
    "LocalLearner",
    "LocalObjective",
    "MonoForward",
    "Muon",
    "PredictiveCoding",
    "PredictiveCodingMLP",
    "Readout",
    "TwoLayerMLP",
    "TwoStage",
    "adapt_structure",
    "as_chain",
    "evaluate",
    "gradient_alignment",
    "levenberg_marquardt",
    "load_checkpoint",
    "matrix_groups",
    "newton_schulz",
    "save_checkpoint",
    "surprise",
]
