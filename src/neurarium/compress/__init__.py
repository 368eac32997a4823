"""Room `compress`: smaller and faster networks that stay ordinary modules.

Every transform is *plan + apply*: a planner reads the model and writes a frozen plan (:mod:`neurarium.compress.plan`), ``apply`` makes
the new module of it. So one paper's plan goes with another's executor."""

from neurarium.compress.allocate import global_threshold, knapsack_dp, milp, minimax_bisect, uniform
from neurarium.compress.attention import SelfAttention
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
from neurarium.compress.quant.affine import UniformGrid, affine_grid, round_ste, symmetric_grid
from neurarium.compress.quant.bits import bit_costs, plan_bits, sensitivities
from neurarium.compress.quant.dyadic import quantize_integer
from neurarium.compress.quant.fixedpoint import Dyadic, dyadic, fixed_codes, fixed_point
from neurarium.compress.quant.fold import fold_batchnorm
from neurarium.compress.quant.integer import IntegerNetwork, count_float_ops
from neurarium.compress.quant.packing import PackedConv2d, PackedLinear, pack, pack_layer, packed_bytes, unpack
from neurarium.compress.quant.qat import prepare_qat
from neurarium.compress.quant.range import estimate_range, golden_section, plan_ranges, requant
from neurarium.compress.quant.range_plan import RangeFit, RangePlan, apply_ranges
from neurarium.compress.quant.simulate import simulate
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
    "IntegerNetwork",
    "Layout",
    "LinearView",
    "LowRankConv2d",
    "LowRankLinear",
    "MaskPlan",
    "PackedConv2d",
    "PackedLinear",
    "Pattern",
    "RangeFit",
    "RangePlan",
    "RankPlan",
    "SelfAttention",
    "SparseLinear",
    "SparseSolution",
    "TraceReport",
    "TransformerBlocks",
    "UniformGrid",
    "Unstructured",
    "affine_grid",
    "apply",
    "apply_channels",
    "apply_ranges",
    "apply_ranks",
    "bit_costs",
    "calibrate",
    "chita",
    "chita_pp",
    "choose",
    "count_float_ops",
    "decomposable",
    "diagonal_fisher",
    "dyadic",
    "estimate_range",
    "explicit",
    "factors",
    "finalise",
    "fixed_codes",
    "fixed_point",
    "fold",
    "fold_batchnorm",
    "global_threshold",
    "golden_section",
    "hessian_trace",
    "hutchinson_trace",
    "knapsack_dp",
    "load_sparse",
    "low_rank",
    "magnitude",
    "milp",
    "minimax_bisect",
    "pack",
    "pack_layer",
    "packed_bytes",
    "per_sample_grads",
    "plan_bits",
    "plan_chita",
    "plan_magnitude",
    "plan_ranges",
    "plan_sparsegpt",
    "plan_wanda",
    "prepare_qat",
    "quantize_integer",
    "rank_macs",
    "requant",
    "round_ste",
    "sensitivities",
    "simulate",
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
]
