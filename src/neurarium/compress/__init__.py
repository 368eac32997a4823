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
from neurarium.compress.distil import ActiveShapeModel, LandmarkKD, SoftTargets, assistive_loss, landmark_kd_loss, main_loss, with_teachers
from neurarium.compress.factor.alds import alds, plan_alds, plan_svd
from neurarium.compress.factor.fold import factors, fold, svd_curve, unfold
from neurarium.compress.factor.gblr import BlockLowRankLinear, GaudiGBLR, WidthShrink, box_mask, gaudi_mask, gblr, pack_blocks
from neurarium.compress.factor.lowrank import LowRankConv2d, LowRankLinear, apply_ranks, decomposable, low_rank, rank_macs
from neurarium.compress.factor.trp import TRPCallback, decompose, plan_decompose, trp
from neurarium.compress.fuse.crosslayer import align_layers, apply_fusion, cla_fuse, plan_fusion
from neurarium.compress.fuse.similarity import cka, layer_costs
from neurarium.compress.fuse.transport import FusionPlan, optimal_transport, ot_fuse
from neurarium.compress.gpt import GPT
from neurarium.compress.graph import ChannelGraph
from neurarium.compress.pattern import NM, Block, Group, Pattern, Unstructured
from neurarium.compress.plan import MaskPlan, apply, finalise
from neurarium.compress.prune.block import Tiles, block_prune, plan_block_prune
from neurarium.compress.prune.chita import SparseSolution, chita, chita_pp, plan_chita, sparse_quadratic
from neurarium.compress.prune.conditional import ConditionalPruner, cacp
from neurarium.compress.prune.dsnot import dsnot, plan_dsnot, reselect
from neurarium.compress.prune.flap import FlapPlan, apply_flap, flap, magnitude_sp, plan_flap, wanda_sp
from neurarium.compress.prune.gate import Gate, Gated, GateLoss, add_gates, saw_gate, strip_gates, trainable_gate
from neurarium.compress.prune.hessian import HapScores, ImplantConv2d, ImplantLinear, apply_hap, hap, hap_scores, plan_hap
from neurarium.compress.prune.magnitude import diagonal_fisher, magnitude, plan_magnitude
from neurarium.compress.prune.meta import NetworkGraph, PruningMetaNet, meta_prune, meta_train, plan_group_norm
from neurarium.compress.prune.obs import woodfisher
from neurarium.compress.prune.sparsegpt import plan_sparsegpt, sparsegpt
from neurarium.compress.prune.wanda import plan_wanda, wanda
from neurarium.compress.quant.adapt import AdaPT
from neurarium.compress.quant.affine import UniformGrid, affine_grid, round_ste, symmetric_grid
from neurarium.compress.quant.bits import bit_costs, plan_bits, sensitivities
from neurarium.compress.quant.dyadic import quantize_integer
from neurarium.compress.quant.fixedpoint import Dyadic, dyadic, fixed_codes, fixed_point
from neurarium.compress.quant.fold import fold_batchnorm
from neurarium.compress.quant.integer import IntegerNetwork, count_float_ops
from neurarium.compress.quant.mixture import MixtureConv2d, MixtureLinear, MixtureWeight, dgms, harden, plan_dgms, soften
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
    SparseBytePlan,
    SparseConv2d,
    SparseLinear,
    choose,
    group_mask,
    load_sparse,
    plan_groups,
    rearrange_channels,
    sparsebyte,
    to_dense_runtime,
    to_sparse_runtime,
)
from neurarium.compress.sensitivity import FisherOperator, per_sample_grads
from neurarium.compress.taylor import taylor
from neurarium.compress.unit_scores import (
    ablation,
    choose_groups,
    norm_product,
    plan_units,
    unit_fluctuation,
    unit_norm,
    unit_sum,
    unit_taylor,
)

__all__ = [
    "GPT",
    "NM",
    "ActiveShapeModel",
    "AdaPT",
    "BiPerConv2d",
    "BiPerLinear",
    "BitPlan",
    "Block",
    "BlockLowRankLinear",
    "BlockSparse",
    "ChannelGraph",
    "ChannelPlan",
    "ConditionalPruner",
    "Cost",
    "Dyadic",
    "FisherOperator",
    "FlapPlan",
    "FusionPlan",
    "Gate",
    "GateLoss",
    "Gated",
    "GaudiGBLR",
    "Group",
    "GroupSparse",
    "HapScores",
    "ImplantConv2d",
    "ImplantLinear",
    "InputStats",
    "Int8Sparse",
    "IntegerNetwork",
    "LandmarkKD",
    "Layout",
    "LinearView",
    "LowRankConv2d",
    "LowRankLinear",
    "MaskPlan",
    "MixtureConv2d",
    "MixtureLinear",
    "MixtureWeight",
    "NetworkGraph",
    "PackedConv2d",
    "PackedLinear",
    "Pattern",
    "PruningMetaNet",
    "RangeFit",
    "RangePlan",
    "RankPlan",
    "SelfAttention",
    "SignActivation",
    "SignConv2d",
    "SignLinear",
    "SoftTargets",
    "SparseBytePlan",
    "SparseConv2d",
    "SparseLinear",
    "SparseSolution",
    "TRPCallback",
    "Tiles",
    "TraceReport",
    "TransformerBlocks",
    "UniformGrid",
    "Unstructured",
    "WidthShrink",
    "ablation",
    "add_gates",
    "affine_grid",
    "alds",
    "align_layers",
    "apply",
    "apply_channels",
    "apply_flap",
    "apply_fusion",
    "apply_hap",
    "apply_ranges",
    "apply_ranks",
    "assistive_loss",
    "binarize",
    "biper_error",
    "biper_penalty",
    "bit_costs",
    "block_prune",
    "box_mask",
    "cacp",
    "calibrate",
    "chita",
    "chita_pp",
    "choose",
    "choose_groups",
    "cka",
    "cla_fuse",
    "count_float_ops",
    "decomposable",
    "decompose",
    "dgms",
    "diagonal_fisher",
    "dsnot",
    "dyadic",
    "estimate_range",
    "explicit",
    "factors",
    "finalise",
    "fixed_codes",
    "fixed_point",
    "flap",
    "fold",
    "fold_batchnorm",
    "gaudi_mask",
    "gblr",
    "global_threshold",
    "golden_section",
    "group_mask",
    "hap",
    "hap_scores",
    "harden",
    "hessian_trace",
    "hutchinson_trace",
    "knapsack_dp",
    "landmark_kd_loss",
    "laplace_error",
    "layer_costs",
    "load_sparse",
    "low_rank",
    "magnitude",
    "magnitude_sp",
    "main_loss",
    "meta_prune",
    "meta_train",
    "milp",
    "minimax_bisect",
    "norm_product",
    "optimal_transport",
    "ot_fuse",
    "pack",
    "pack_binary",
    "pack_blocks",
    "pack_layer",
    "packed_bytes",
    "per_sample_grads",
    "plan_alds",
    "plan_binary",
    "plan_bits",
    "plan_block_prune",
    "plan_chita",
    "plan_decompose",
    "plan_dgms",
    "plan_dsnot",
    "plan_flap",
    "plan_fusion",
    "plan_group_norm",
    "plan_groups",
    "plan_hap",
    "plan_magnitude",
    "plan_ranges",
    "plan_sparsegpt",
    "plan_svd",
    "plan_units",
    "plan_wanda",
    "prepare_qat",
    "quantize_integer",
    "rank_macs",
    "rearrange_channels",
    "requant",
    "reselect",
    "round_ste",
    "saw_gate",
    "sensitivities",
    "set_sharpness",
    "set_stage",
    "simulate",
    "soften",
    "sparse_quadratic",
    "sparsebyte",
    "sparsegpt",
    "strip_gates",
    "svd_curve",
    "symmetric_grid",
    "taylor",
    "to_dense_runtime",
    "to_sparse_runtime",
    "trainable_gate",
    "trp",
    "unfold",
    "uniform",
    "unit_fluctuation",
    "unit_norm",
    "unit_sum",
    "unit_taylor",
    "unpack",
    "wanda",
    "wanda_sp",
    "with_teachers",
    "woodfisher",
    "xnor_product",
]
