"""Room `compress`: smaller and faster networks that stay ordinary modules.

Every transform is *plan + apply*: a planner reads the model and writes a frozen plan (:mod:`neurarium.compress.plan`), ``apply`` makes
the new module of it. So one paper's plan goes with another's executor.
"""

from neurarium.compress.pattern import NM, Block, Group, Pattern, Unstructured
from neurarium.compress.plan import MaskPlan, apply, finalise
from neurarium.compress.prune.chita import SparseSolution, chita, chita_pp, plan_chita, sparse_quadratic
from neurarium.compress.prune.magnitude import diagonal_fisher, magnitude, plan_magnitude
from neurarium.compress.prune.obs import woodfisher
from neurarium.compress.runtime import (
    BlockSparse,
    GroupSparse,
    Int8Sparse,
    SparseLinear,
    choose,
    load_sparse,
    to_dense_runtime,
    to_sparse_runtime,
)
from neurarium.compress.sensitivity import FisherOperator, per_sample_grads

__all__ = [
    "NM",
    "Block",
    "BlockSparse",
    "FisherOperator",
    "Group",
    "GroupSparse",
    "Int8Sparse",
    "MaskPlan",
    "Pattern",
    "SparseLinear",
    "SparseSolution",
    "Unstructured",
    "apply",
    "chita",
    "chita_pp",
    "choose",
    "diagonal_fisher",
    "finalise",
    "load_sparse",
    "magnitude",
    "per_sample_grads",
    "plan_chita",
    "plan_magnitude",
    "sparse_quadratic",
    "to_dense_runtime",
    "to_sparse_runtime",
    "woodfisher",
]
