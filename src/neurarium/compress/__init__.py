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
from neurarium.compress.distil import (
    ActiveShapeModel,
    LandmarkKD,
    SoftTargets,
    assistive_loss,
    landmark_kd_loss,
    main_loss,
    with_teachers,
)
from neurarium.compress.factor.fold import factors, fold, svd_curve, unfold
from neurarium.compress.factor.lowrank import LowRankConv2d, LowRankLinear, apply_ranks, decomposable, low_rank, rank_macs
from neurarium.compress.fuse.crosslayer import align_layers, apply_fusion, cla_fuse, plan_fusion
from neurarium.compress.fuse.similarity import cka, layer_costs
from neurarium.compress.fuse.transport import FusionPlan, optimal_transport, ot_fuse
from neurarium.compress.gpt import GPT
from neurarium.compress.graph import ChannelGraph
from neurarium.compress.pattern import NM, Block, Group, Pattern, Unstructured
from neurarium.compress.plan import MaskPlan, apply, finalise
from neurarium.compress.prune.chita import SparseSolution, chita, chita_pp, plan_chita, sparse_quadratic
from neurarium.compress.prune.hessian import HapScores, ImplantConv2d, ImplantLinear, apply_hap, hap, hap_scores, plan_hap
from neurarium.compress.prune.magnitude import diagonal_fisher, magnitude, plan_magnitude
from neurarium.compress.prune.obs import woodfisher
from neurarium.compress.prune.sparsegpt import plan_sparsegpt, sparsegpt
from neurarium.compress.prune.wanda import plan_wanda, wanda
from neurarium.compress.quant.affine import UniformGrid, affine_grid, round_ste, symmetric_grid
from neurarium.compress.quant.fixedpoint import Dyadic, dyadic, fixed_codes, fixed_point
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
from neurarium.compress.unit_scores import (
    ablation,
    choose_groups,
    norm_product,
    plan_units,
    unit_norm,
    unit_sum,
    unit_taylor,
)

__all__ = [
    "GPT",
    "NM",
    "ActiveShapeModel",
    "BitPlan",
    "Block",
    "BlockSparse",
    "ChannelGraph",
    "ChannelPlan",
    "Cost",
    "Dyadic",
    "FisherOperator",
    "FusionPlan",
    "Group",
    "GroupSparse",
    "HapScores",
    "ImplantConv2d",
    "ImplantLinear",
    "InputStats",
    "Int8Sparse",
    "LandmarkKD",
    "Layout",
    "LinearView",
    "LowRankConv2d",
    "LowRankLinear",
    "MaskPlan",
    "PackedConv2d",
    "PackedLinear",
    "Pattern",
    "RankPlan",
    "SelfAttention",
    "SoftTargets",
    "SparseLinear",
    "SparseSolution",
    "TraceReport",
    "TransformerBlocks",
    "UniformGrid",
    "Unstructured",
    "ablation",
    "affine_grid",
    "align_layers",
    "apply",
    "apply_channels",
    "apply_fusion",
    "apply_hap",
    "apply_ranks",
    "assistive_loss",
    "calibrate",
    "chita",
    "chita_pp",
    "choose",
    "choose_groups",
    "cka",
    "cla_fuse",
    "decomposable",
    "diagonal_fisher",
    "dyadic",
    "explicit",
    "factors",
    "finalise",
    "fixed_codes",
    "fixed_point",
    "fold",
    "global_threshold",
    "hap",
    "hap_scores",
    "hessian_trace",
    "hutchinson_trace",
    "knapsack_dp",
    "landmark_kd_loss",
    "layer_costs",
    "load_sparse",
    "low_rank",
    "magnitude",
    "main_loss",
    "milp",
    "minimax_bisect",
    "norm_product",
    "optimal_transport",
    "ot_fuse",
    "pack",
    "pack_layer",
    "packed_bytes",
    "per_sample_grads",
    "plan_chita",
    "plan_fusion",
    "plan_hap",
    "plan_magnitude",
    "plan_sparsegpt",
    "plan_units",
    "plan_wanda",
    "rank_macs",
    "round_ste",
    "sparse_quadratic",
    "sparsegpt",
    "svd_curve",
    "symmetric_grid",
    "taylor",
    "to_dense_runtime",
    "to_sparse_runtime",
    "unfold",
    "uniform",
    "unit_norm",
    "unit_sum",
    "unit_taylor",
    "unpack",
    "wanda",
    "with_teachers",
    "woodfisher",
]
