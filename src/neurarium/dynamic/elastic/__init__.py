"""Elastic layers: one set of weights, many networks cut out of its leading slices.

A :class:`Width` is a number of units (channels, features, heads) that several layers share: the one that makes them, the norms that scale
them, the layers that read them. A :class:`Depth` is a row of blocks of which the leading ones run. A :class:`Config` says how many of each.
``with active(model, config):`` sets the slices: layers then use views of the leading rows and columns of their weights, so FLOPs really
fall, and switching allocates nothing. ``extract(model, config)`` cuts the same network out as a plain module with weights of its own.
Batch statistics belong to a config: :mod:`~neurarium.dynamic.elastic.norm` says which.

*Source.* Slimmable networks (Yu et al. 2019) and their universal form (Yu and Huang 2019) for slices and statistics of their own;
once-for-all (Cai et al. 2020) for elastic depth and the order of channels by importance.
"""

from neurarium.dynamic.elastic.configs import active, at, full, grid, slots
from neurarium.dynamic.elastic.family import ElasticFamily, flops
from neurarium.dynamic.elastic.layers import Depth, ElasticAttention, ElasticConv2d, ElasticLinear
from neurarium.dynamic.elastic.norm import ElasticNorm, Statistics
from neurarium.dynamic.elastic.slices import Config, Sliced, Width
from neurarium.dynamic.elastic.surgery import declare, extract, recalibrate, reorder, units

__all__ = [
    "Config",
    "Depth",
    "ElasticAttention",
    "ElasticConv2d",
    "ElasticFamily",
    "ElasticLinear",
    "ElasticNorm",
    "Sliced",
    "Statistics",
    "Width",
    "active",
    "at",
    "declare",
    "extract",
    "flops",
    "full",
    "grid",
    "recalibrate",
    "reorder",
    "slots",
    "units",
]
