"""Room ``learn``: how parameters are learned. Learners, local rules, optimizers."""

from neurarium.learn.cascaded_forward import CascadedForward
from neurarium.learn.chain import Chain, as_chain
from neurarium.learn.counter_current import CounterCurrent
from neurarium.learn.fit import Backprop, Diverged, EarlyStopping, Learner, evaluate, load_checkpoint, save_checkpoint
from neurarium.learn.forward_forward import ForwardForward
from neurarium.learn.graph_forward import GraphForward, GraphLayers
from neurarium.learn.local import LocalLearner, LocalObjective, Readout, gradient_alignment
from neurarium.learn.mono_forward import MonoForward
from neurarium.learn.noprop import NoProp, NoPropCTNet, NoPropFMNet, NoPropNet
from neurarium.learn.orthogonal import ROOT, Muon, matrix_groups, newton_schulz

__all__ = [
    "ROOT",
    "Backprop",
    "CascadedForward",
    "Chain",
    "CounterCurrent",
    "Diverged",
    "EarlyStopping",
    "ForwardForward",
    "GraphForward",
    "GraphLayers",
    "Learner",
    "LocalLearner",
    "LocalObjective",
    "MonoForward",
    "Muon",
    "NoProp",
    "NoPropCTNet",
    "NoPropFMNet",
    "NoPropNet",
    "Readout",
    "as_chain",
    "evaluate",
    "gradient_alignment",
    "load_checkpoint",
    "matrix_groups",
    "newton_schulz",
    "save_checkpoint",
]
