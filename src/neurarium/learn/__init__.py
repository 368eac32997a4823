"""Room ``learn``: how parameters are learned. Learners, local rules, optimizers."""

from neurarium.learn.cascaded_forward import CascadedForward
from neurarium.learn.chain import Chain, as_chain
from neurarium.learn.feedback import DFA, RandomFeedback
from neurarium.learn.fit import Backprop, Diverged, EarlyStopping, Learner, evaluate, load_checkpoint, save_checkpoint
from neurarium.learn.forward_forward import ForwardForward
from neurarium.learn.local import LocalLearner, LocalObjective, Readout, gradient_alignment
from neurarium.learn.mono_forward import MonoForward
from neurarium.learn.orthogonal import ROOT, Muon, matrix_groups, newton_schulz
from neurarium.learn.photonic import OPU
from neurarium.learn.physical import PhysicalChain, PhysicalForwardForward, PhysicalLayer, PhysicsAware, fit_twin
from neurarium.learn.private_feedback import DPSGD, PrivateDFA, epsilon
from neurarium.learn.scattering import Metasurface, RandomScattering

__all__ = [
    "DFA",
    "DPSGD",
    "OPU",
    "ROOT",
    "Backprop",
    "CascadedForward",
    "Chain",
    "Diverged",
    "EarlyStopping",
    "ForwardForward",
    "Learner",
    "LocalLearner",
    "LocalObjective",
    "Metasurface",
    "MonoForward",
    "Muon",
    "PhysicalChain",
    "PhysicalForwardForward",
    "PhysicalLayer",
    "PhysicsAware",
    "PrivateDFA",
    "RandomFeedback",
    "RandomScattering",
    "Readout",
    "as_chain",
    "epsilon",
    "evaluate",
    "fit_twin",
    "gradient_alignment",
    "load_checkpoint",
    "matrix_groups",
    "newton_schulz",
    "save_checkpoint",
]
