"""Room ``learn``: how parameters are learned. Learners, local rules, optimizers."""

from neurarium.learn.balance import Clues, Recipe, balance_search, clues
from neurarium.learn.cascaded_forward import CascadedForward
from neurarium.learn.chain import Chain, as_chain
from neurarium.learn.fit import Backprop, Diverged, EarlyStopping, Learner, evaluate, load_checkpoint, save_checkpoint
from neurarium.learn.forward_forward import ForwardForward
from neurarium.learn.grow import (
    ExpandableCNN,
    NaturalExpansion,
    SelfExpanding,
    insert_identity_conv,
    natural_expansion_score,
    widen_conv,
)
from neurarium.learn.local import LocalLearner, LocalObjective, Readout, gradient_alignment
from neurarium.learn.mono_forward import MonoForward
from neurarium.learn.orthogonal import ROOT, Muon, matrix_groups, newton_schulz
from neurarium.learn.schedule import CyclicalMomentum, HessianFreeLR, OneCycle, RangeTest, lr_range_test

__all__ = [
    "ROOT",
    "Backprop",
    "CascadedForward",
    "Chain",
    "Clues",
    "CyclicalMomentum",
    "Diverged",
    "EarlyStopping",
    "ExpandableCNN",
    "ForwardForward",
    "HessianFreeLR",
    "Learner",
    "LocalLearner",
    "LocalObjective",
    "MonoForward",
    "Muon",
    "NaturalExpansion",
    "OneCycle",
    "RangeTest",
    "Readout",
    "Recipe",
    "SelfExpanding",
    "as_chain",
    "balance_search",
    "clues",
    "evaluate",
    "gradient_alignment",
    "insert_identity_conv",
    "load_checkpoint",
    "lr_range_test",
    "matrix_groups",
    "natural_expansion_score",
    "newton_schulz",
    "save_checkpoint",
    "widen_conv",
]
