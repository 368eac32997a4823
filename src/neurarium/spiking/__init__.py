"""Room ``spiking``: spiking neural networks. Neurons without hidden state, executors over time, learning rules, coding."""

from neurarium.spiking.encode import direct, latency, poisson
from neurarium.spiking.net import OverTime, SpikingSequential, State, check, reset, split, step, unroll
from neurarium.spiking.neuron import IF, LI, LIF
from neurarium.spiking.surrogate import ATan, GaussianSG, Rectangle, SigmoidSG, SuperSpike, Surrogate, Triangle, spike
from neurarium.spiking.train import BPTT, SLTT

__all__ = [
    "BPTT",
    "IF",
    "LI",
    "LIF",
    "SLTT",
    "ATan",
    "GaussianSG",
    "OverTime",
    "Rectangle",
    "SigmoidSG",
    "SpikingSequential",
    "State",
    "SuperSpike",
    "Surrogate",
    "Triangle",
    "check",
    "direct",
    "latency",
    "poisson",
    "reset",
    "spike",
    "split",
    "step",
    "unroll",
]
