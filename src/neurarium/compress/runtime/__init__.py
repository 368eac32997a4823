"""Sparse layers that run: compact formats, a compiled product with fallbacks, and a planner that knows when to stay dense."""

from neurarium.compress.runtime.build import backend, using
from neurarium.compress.runtime.conv import SparseConv2d
from neurarium.compress.runtime.formats import BlockSparse, GroupSparse
from neurarium.compress.runtime.int8 import Int8Sparse
from neurarium.compress.runtime.planner import Choice, Machine, choose
from neurarium.compress.runtime.rearrange import SparseBytePlan, group_mask, plan_groups, rearrange_channels, sparsebyte
from neurarium.compress.runtime.sparse import RuntimePlan, SparseLinear, load_sparse, to_dense_runtime, to_sparse_runtime

__all__ = [
    "BlockSparse",
    "Choice",
    "GroupSparse",
    "Int8Sparse",
    "Machine",
    "RuntimePlan",
    "SparseBytePlan",
    "SparseConv2d",
    "SparseLinear",
    "backend",
    "choose",
    "group_mask",
    "load_sparse",
    "plan_groups",
    "rearrange_channels",
    "sparsebyte",
    "to_dense_runtime",
    "to_sparse_runtime",
    "using",
]
