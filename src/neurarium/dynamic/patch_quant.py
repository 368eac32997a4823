"""QuantMCU: few bits where a tile's values allow it.

Patch-based inference computes the halos twice. That work becomes cheaper with fewer bits for the activations, but values far from the rest
do not survive few bits. So tiles are told apart first, then every map of a tile gets its own number of bits, without training.

*Which tiles* (value-driven patch classification). The values of the calibration images are taken as Gaussian; one with
|v - mean| > z std is an outlier. A tile with a share of outliers above 1e-3 keeps 8 bits in all its maps. That is decided once, for a place
and all calibration images together, or (``dynamic``) for every image while it runs.

*Which bits* (value-driven quantisation search), for map i of another tile and b in {8, 4, 2}, from the input on:

    Phi(i, b)   = BitOPs that b bits save in what reads the map / BitOPs of the tile with 8 bits     (BitOPs = MACs x 8 x bits of the map)
    Omega(i, b) = (H(i) - H_b(i)) / sum_j H(j)   entropies of a 256-bin histogram of the map, before and after rounding to b bits
    b_i         = argmax_b  -lambda Omega(i, b) + (1 - lambda) Phi(i, b)

Both are shares of the whole branch, the maps of the tile: a map gets few bits where it has a larger part in the work than in the
information. Then, while the tile needs more memory than it may, the largest map of the operation at the peak gets fewer bits.

How a map is rounded and stored, and what of it is real: :mod:`neurarium.dynamic.quantised`.

*Source.* "Value-Driven Mixed-Precision Quantization for Patch-Based Inference on Microcontrollers" (QuantMCU), arXiv 2401.13714.

*Departures.* The outlier rule, lambda and the normalisations are reconstructed. Entropy lost is divided by that of the branch, as the
operations saved are: divided by that of its own map, it outweighs them for every lambda above 1/4 in a branch of seven maps, the earlier
the more maps there are, and all keep 8 bits. (With a lambda that is retuned to the length of the branch, that form chooses nearly the same
bits; so does a division by the dearest map.) lambda = 1/2 is the value of a grid that loses least on calibration images among those that
save what the paper saves. Entropy falls by about one for each bit, as the operations do, so that 4 bits are seldom the best: dear maps get
2, cheap ones 8. In a dynamic model, ranges and bits of tiles without outliers come from calibration images without outliers there.

*Cost.* One pass over the calibration images (two if dynamic) and a histogram a map and tile.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from neurarium.dynamic.patch import PatchedModel
from neurarium.dynamic.patch_plan import pixels
from neurarium.dynamic.quantised import FINE, SHARE, QuantisedModel, Statistics, has_outliers, operations, outlier_share
from neurarium.errors import BadInput

__all__ = ["bit_scores", "entropy", "outlier_tiles", "quantmcu", "usual_values"]


def quantmcu(
    patched: PatchedModel,
    calibration: Tensor,
    *,
    bits: Sequence[int] = (8, 4, 2),
    lam: float = 0.5,
    outlier_z: float = 3.0,
    dynamic: bool = False,
    limit_bytes: float | None = None,
) -> QuantisedModel:
    """A quantised copy of a patched model.

    Args:
        calibration: images ``(n, channels, height, width)`` of the size that the model will see.
        bits: to choose from: 8, 4, 2, 1.
        lam: 1 keeps 8 bits everywhere, 0 gives the fewest.
        outlier_z: 0 makes every tile one with outliers, ``inf`` none.
        dynamic: tell tiles with outliers apart for each image while it runs, instead of once for each place.
        limit_bytes: for the patch stage, its output included.

    Raises:
        UnsupportedModel: nothing is run in tiles.
        BadInput: the limit cannot be met with these bits; the message has the smallest found.
    """
    if not 0 <= lam <= 1:
        raise BadInput(f"lam must lie in 0..1, not {lam}")
    if not outlier_z >= 0:
        raise BadInput(f"outlier_z must be at least 0, not {outlier_z}")
    choices = sorted(set(bits), reverse=True)
    if not choices or choices[0] != 8 or not set(choices) <= {8, 4, 2, 1}:
        raise BadInput(f"bits must be 8 and others of 4, 2, 1, not {tuple(bits)}")
    statistics = Statistics.collect(patched, calibration)
    usual = usual_values(calibration, outlier_z)
    if dynamic:
        quiet = list(range(len(statistics.low)))
        statistics, loud = Statistics.collect(patched, calibration, ~has_outliers(patched, calibration, usual)), statistics
    else:
        quiet = [t for t, far in enumerate(outlier_tiles(patched, calibration, outlier_z)) if not far]
    table = torch.full(statistics.low.shape, 8)
    scores = bit_scores(patched, statistics, lam, choices)  # (bits, tiles, maps)
    for t in quiet:
        table[t] = torch.tensor(choices)[scores[:, t].argmax(0)]
    model = QuantisedModel(patched, statistics, table, usual=usual, loud=loud) if dynamic else QuantisedModel(patched, statistics, table)
    if limit_bytes is not None:
        _fit(model, statistics, quiet, choices, limit_bytes)
    return model


def usual_values(images: Tensor, z: float) -> Tensor:
    """Mean minus and plus ``z`` standard deviations of all values."""
    mean, spread = images.mean(), images.std() * z if z else 0 * images.std()
    return torch.stack([mean - spread, mean + spread])


def outlier_tiles(patched: PatchedModel, images: Tensor, z: float) -> list[bool]:
    """Whether a tile has outliers, all images together."""
    return (outlier_share(patched, images, usual_values(images, z)).mean(1) > SHARE).tolist()


def bit_scores(patched: PatchedModel, statistics: Statistics, lam: float, choices: Sequence[int]) -> Tensor:
    """-lambda Omega + (1 - lambda) Phi of every choice, tile and map, ``(bits, tiles, maps)``."""
    work = torch.tensor(operations(patched), dtype=torch.double)
    work = work / work.sum(1, keepdim=True).clamp(min=1)
    kept = torch.tensor([[[_entropy(statistics, t, i, b) for i in range(work.shape[1])] for t in range(len(work))] for b in (8, *choices)])
    lost = (kept[0] - kept[1:]).clamp(min=0) / kept[0].sum(1, keepdim=True).clamp(min=1e-12)
    saved = torch.stack([work * (8 - b) / 8 for b in choices])
    return -lam * lost + (1 - lam) * saved


def _entropy(statistics: Statistics, tile: int, i: int, bits: int) -> float:
    """Of a map rounded to this many bits; with 8 bits, that of 256 bins."""
    fine = statistics.histogram[tile, i]
    if bits == 8:
        return entropy(fine.view(256, -1).sum(1))
    low, high = statistics.low[tile, i], statistics.high[tile, i]
    centres = low + (high - low) * (torch.arange(FINE, dtype=low.dtype, device=low.device) + 0.5) / FINE
    levels = statistics.grid(tile, i, bits).codes(centres).long()
    return entropy(torch.zeros(2**bits, dtype=fine.dtype, device=fine.device).index_add(0, levels, fine))


def entropy(histogram: Tensor) -> float:
    """In bits, of counts."""
    p = histogram.double() / histogram.sum().clamp(min=1)
    return float(-(p * p.clamp(min=1e-300).log2()).sum())


def _fit(model: QuantisedModel, statistics: Statistics, tiles: Sequence[int], choices: Sequence[int], limit: float) -> None:
    """Lower the bits of the largest map where the memory of the patch stage is highest until it is within the limit."""
    places, at = list(model.tiles()), {n: i for i, n in enumerate(model.maps)}
    ops = {op.name: op for op in model.graph.ops[: model.stage]}
    spans: list[Mapping[str, Any]] = list(model.tiles().values())
    shape = {n: (model.graph.shape(n) or (1,))[0] for n in model.maps}
    while (plan := model.plan()).patch_peak > limit:
        worst = max((s for s in plan.steps if s.tile is not None), key=lambda s: s.bytes)
        t = places.index(worst.tile)  # type: ignore[arg-type]
        there = [n for n in (*ops[worst.op].reads, worst.op) if n in at and t in tiles and model.table[t][at[n]] > choices[-1]]
        if not there:
            raise BadInput(
                f"a limit of {limit:g} bytes for the patch stage cannot be met with these bits: the smallest found is {plan.patch_peak}"
            )
        name = max(there, key=lambda n: shape[n] * pixels(spans[t][n]) * model.table[t][at[n]])
        lower = next(b for b in choices if b < model.table[t][at[name]])
        model.table[t][at[name]] = lower
        model.low[t, at[name]], model.high[t, at[name]] = statistics.inner_low[t, at[name]], statistics.inner_high[t, at[name]]
