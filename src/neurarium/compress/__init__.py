"""Room `compress`: smaller and faster networks that stay ordinary modules.

Every transform is *plan + apply*: a planner reads the model and writes a frozen plan (:mod:`neurarium.compress.plan`), ``apply`` makes
the new module of it. So one paper's plan goes with another's executor.
"""

from neurarium.compress.attention import SelfAttention
from neurarium.compress.blocks import Layout, LinearView, TransformerBlocks, explicit
from neurarium.compress.calibrate import InputStats, calibrate
from neurarium.compress.gpt import GPT
from neurarium.compress.pattern import NM, Block, Group, Pattern, Unstructured
from neurarium.compress.plan import MaskPlan, apply, finalise
from neurarium.compress.prune.chita import SparseSolution, chita, chita_pp, plan_chita, sparse_quadratic
from neurarium.compress.prune.magnitude import diagonal_fisher, magnitude, plan_magnitude
from neurarium.compress.prune.obs import woodfisher
from neurarium.compress.prune.sparsegpt import plan_sparsegpt, sparsegpt
from neurarium.compress.prune.wanda import plan_wanda, wanda
from neurarium.compress.sensitivity import FisherOperator, per_sample_grads

__all__ = [
    "GPT",
    "NM",
    "Block",
    "FisherOperator",
    "Group",
    "InputStats",
    "Layout",
    "LinearView",
    "MaskPlan",
    "Pattern",
    "SelfAttention",
    "SparseSolution",
    "TransformerBlocks",
    "Unstructured",
    "apply",
    "calibrate",
    "chita",
    "chita_pp",
    "diagonal_fisher",
    "explicit",
    "finalise",
    "magnitude",
    "per_sample_grads",
    "plan_chita",
    "plan_magnitude",
    "plan_sparsegpt",
    "plan_wanda",
    "sparse_quadratic",
    "sparsegpt",
    "wanda",
    "woodfisher",
]
