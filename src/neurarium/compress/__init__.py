"""Room `compress`: smaller and faster networks that stay ordinary modules.

Every transform is *plan + apply*: a planner reads the model and writes a frozen plan (:mod:`neurarium.compress.plan`), ``apply`` makes
the new module of it. So one paper's plan goes with another's executor."""

from neurarium.compress.allocate import global_threshold, knapsack_dp, milp, minimax_bisect, uniform
from neurarium.compress.attention import SelfAttention
from neurarium.compress.binary import (
    BiPerConv2d,
    BiPerLinear,
    SignActivation,
    SignConv2d,
    SignLinear,
    binarize,
    biper_error,
    biper_penalty,
    laplace_error,
    pack_binary,
    plan_binary,
    set_sharpness,
    set_stage,
    xnor_product,
)
from neurarium.compress.bit_plan import BitPlan
from neurarium.compress.blocks import Layout, LinearView, TransformerBlocks, explicit
from neurarium.compress.calibrate import InputStats, calibrate
from neurarium.compress.channels import ChannelPlan, Cost, apply_channels
from neurarium.compress.curvature import TraceReport, hessian_trace, hutchinson_trace
from neurarium.compress.factor.fold import factors, fold, svd_curve, unfold
from neurarium.compress.factor.lowrank import LowRankConv2d, LowRankLinear, apply_ranks, decomposable, low_rank, rank_macs
from neurarium.compress.gpt import GPT
from neurarium.compress.graph import ChannelGraph
from neurarium.compress.pattern import NM, Block, Group, Pattern, Unstructured
from neurarium.compress.plan import MaskPlan, apply, finalise
from neurarium.compress.prune.chita import SparseSolution, chita, chita_pp, plan_chita, sparse_quadratic
from neurarium.compress.prune.magnitude import diagonal_fisher, magnitude, plan_magnitude
from neurarium.compress.prune.obs import woodfisher
from neurarium.compress.prune.sparsegpt import plan_sparsegpt, sparsegpt
from neurarium.compress.prune.wanda import plan_wanda, wanda
from neurarium.compress.quant.adapt import AdaPT
from neurarium.compress.quant.affine import UniformGrid, affine_grid, round_ste, symmetric_grid
from neurarium.compress.quant.fixedpoint import Dyadic, dyadic, fixed_codes, fixed_point
from neurarium.compress.quant.mixture import MixtureConv2d, MixtureLinear, MixtureWeight, dgms, harden, plan_dgms, soften
from neurarium.compress.quant.packing import PackedConv2d, PackedLinear, pack, pack_layer, packed_bytes, unpack
from neurarium.compress.rank_plan import RankPlan
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
from neurarium.compress.taylor import taylor

__all__ = [
    "GPT",
    "NM",
    "BiPerConv2d",
    "BiPerLinear",
    "AdaPT",
    "BitPlan",
    "Block",
    "BlockSparse",
    "ChannelGraph",
    "ChannelPlan",
    "Cost",
    "Dyadic",
    "FisherOperator",
    "Group",
    "GroupSparse",
    "InputStats",
    "Int8Sparse",
    "Layout",
    "LinearView",
    "LowRankConv2d",
    "LowRankLinear",
    "MaskPlan",
    "MixtureConv2d",
    "MixtureLinear",
    "MixtureWeight",
    "PackedConv2d",
    "PackedLinear",
    "Pattern",
    "RankPlan",
    "SelfAttention",
    "SignActivation",
    "SignConv2d",
    "SignLinear",
    "SparseLinear",
    "SparseSolution",
    "TraceReport",
    "TransformerBlocks",
    "UniformGrid",
    "Unstructured",
    "affine_grid",
    "apply",
    "apply_channels",
    "apply_ranks",
    "binarize",
    "biper_error",
    "biper_penalty",
    "calibrate",
    "chita",
    "chita_pp",
    "choose",
    "decomposable",
    "dgms",
    "diagonal_fisher",
    "dyadic",
    "explicit",
    "factors",
    "finalise",
    "fixed_codes",
    "fixed_point",
    "fold",
    "global_threshold",
    "harden",
    "hessian_trace",
    "hutchinson_trace",
    "knapsack_dp",
    "laplace_error",
    "load_sparse",
    "low_rank",
    "magnitude",
    "milp",
    "minimax_bisect",
    "pack",
    "pack_binary",
    "pack_layer",
    "packed_bytes",
    "per_sample_grads",
    "plan_binary",
    "plan_chita",
    "plan_dgms",
    "plan_magnitude",
    "plan_sparsegpt",
    "plan_wanda",
    "rank_macs",
    "round_ste",
    "set_sharpness",
    "set_stage",
    "soften",
    "sparse_quadratic",
    "sparsegpt",
    "svd_curve",
    "symmetric_grid",
    "taylor",
    "to_dense_runtime",
    "to_sparse_runtime",
    "unfold",
    "uniform",
    "unpack",
    "wanda",
    "woodfisher",
    "xnor_product",
]
