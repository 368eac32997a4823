"""Differential equations and networks: physics-informed solvers, learned dynamics, and the derivatives they need."""

from neurarium.physics.causal import CausalPINN
from neurarium.physics.equations import allen_cahn, burgers, kuramoto_sivashinsky, lorenz
from neurarium.physics.jets import Jet, Orders
from neurarium.physics.leastsquares import LevenbergMarquardt
from neurarium.physics.networks import MLP, BoxFeatures, FourierFeatures, ModifiedMLP
from neurarium.physics.pinn import PINN, Progress
from neurarium.physics.problem import Box, Condition, Problem
from neurarium.physics.reference import Reference
from neurarium.physics.sampling import Slices, Uniform
from neurarium.physics.solution import Solution
from neurarium.physics.weighting import Causal

__all__ = [
    "MLP",
    "PINN",
    "Box",
    "BoxFeatures",
    "Causal",
    "CausalPINN",
    "Condition",
    "FourierFeatures",
    "Jet",
    "LevenbergMarquardt",
    "ModifiedMLP",
    "Orders",
    "Problem",
    "Progress",
    "Reference",
    "Slices",
    "Solution",
    "Uniform",
    "allen_cahn",
    "burgers",
    "kuramoto_sivashinsky",
    "lorenz",
]
