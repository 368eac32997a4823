"""Room ``learn``: how parameters are learned. Learners, local rules, optimizers."""

from neurarium.learn.cascaded_forward import CascadedForward
from neurarium.learn.chain import Chain, as_chain
from neurarium.learn.conditions import DataCondition, NoiseCondition, OutputPenalty, TaskEmbedding
from neurarium.learn.fit import Backprop, Diverged, EarlyStopping, Learner, evaluate, load_checkpoint, save_checkpoint
from neurarium.learn.forward_forward import ForwardForward
from neurarium.learn.generate import IGPG, TaskConditioner, WeightGPT
from neurarium.learn.hyper import HyperNetwork, Target, mip
from neurarium.learn.hyper_lstm import DynamicHyperLSTMCell
from neurarium.learn.hyper_probes import design, magnitude_probe
from neurarium.learn.local import LocalLearner, LocalObjective, Readout, gradient_alignment
from neurarium.learn.mono_forward import MonoForward
from neurarium.learn.orthogonal import ROOT, Muon, matrix_groups, newton_schulz
from neurarium.learn.weight_tokens import GumbelVQ, WeightTokenizer
from neurarium.learn.zoo import Instruction, ZooNet, model_zoo, train_many

__all__ = [
    "IGPG",
    "ROOT",
    "Backprop",
    "CascadedForward",
    "Chain",
    "DataCondition",
    "Diverged",
    "DynamicHyperLSTMCell",
    "EarlyStopping",
    "ForwardForward",
    "GumbelVQ",
    "HyperNetwork",
    "Instruction",
    "Learner",
    "LocalLearner",
    "LocalObjective",
    "MonoForward",
    "Muon",
    "NoiseCondition",
    "OutputPenalty",
    "Readout",
    "Target",
    "TaskConditioner",
    "TaskEmbedding",
    "WeightGPT",
    "WeightTokenizer",
    "ZooNet",
    "as_chain",
    "design",
    "evaluate",
    "gradient_alignment",
    "load_checkpoint",
    "magnitude_probe",
    "matrix_groups",
    "mip",
    "model_zoo",
    "newton_schulz",
    "save_checkpoint",
    "train_many",
]
