"""An optical processing unit, simulated: light through a scattering medium multiplies by a huge random matrix at the speed of a camera.

A laser beam is shaped by an array of micromirrors (each on or off), passes a diffuser and falls on a camera. The diffuser adds up the
light of all mirrors with fixed random complex weights, so the field on the camera is a random projection of the mask, of any size, in one
exposure. As a :class:`~neurarium.learn.feedback.Projector` it does the one product that direct feedback alignment needs.

*Equations.* Field ``z = H m`` for a mask ``m``, with ``H`` complex Gaussian. A camera sees intensity. ``"off-axis"``: the field interferes
with a reference beam and the fringes give back its real part, ``Re(H m) + noise``, which is linear in ``m``. ``"intensity"``: ``|H m|^2 +
noise``, which is not. Either is read through a converter of ``levels`` steps that clips at ``saturation``. A ternary vector is shown as
two masks, the positive and the negative entries, and the two readings are subtracted.

*Source.* Launay et al., "Light-in-the-loop" (arXiv 2006.01475).

*Departures.* A simulation: noise is white and Gaussian, the medium does not drift, exposure adapts to each call unless ``saturation`` says
otherwise. Rate and power are settings (a camera of 1.5 kHz, a device of 30 W), counted and not measured.

*Cost.* Of the simulation: one or two products by ``H``. Of the device: ``frames / rate`` seconds, whatever the size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from neurarium.errors import BadInput

__all__ = ["OPU"]


class OPU(nn.Module):
    """A noisy random projector that takes -1, 0 and 1.

    Args:
        noise: standard deviation of each reading; a field of unit-length input has 1 over the square root of ``in_dim``.
        levels: steps of the converter between ``-saturation`` and ``saturation``; ``None``: no rounding.
        saturation: where the converter clips; ``None``: the largest value of the call.
        ternary: the modulator is binary: inputs must hold -1, 0 and 1 only and take two exposures. ``False``: an analog modulator, one.
        holography: ``"off-axis"`` or ``"intensity"``.
        rate, watts: exposures a second and power of the device, for :meth:`counters`.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        *,
        noise: float = 0.01,
        levels: int | None = 256,
        saturation: float | None = None,
        ternary: bool = True,
        holography: str = "off-axis",
        rate: float = 1500.0,
        watts: float = 30.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if holography not in ("off-axis", "intensity"):
            raise BadInput(f"holography must be 'off-axis' or 'intensity', not {holography!r}")
        if noise < 0 or (levels is not None and levels < 2):
            raise BadInput(f"noise must be >= 0 and levels >= 2, not {noise} and {levels}")
        generator = torch.Generator().manual_seed(seed)
        self.noise, self.levels, self.saturation, self.ternary, self.holography = noise, levels, saturation, ternary, holography
        self.rate, self.watts = rate, watts
        self.register_buffer("real", torch.randn(out_dim, in_dim, generator=generator) * in_dim**-0.5)
        imaginary = torch.randn(out_dim, in_dim, generator=generator) * in_dim**-0.5 if holography == "intensity" else None
        self.register_buffer("imaginary", imaginary)
        self.register_buffer("frames", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def project(self, e: Tensor) -> Tensor:
        """(n, in_dim) -> (n, out_dim)."""
        if not self.ternary:
            return self.expose(e)
        if not bool(((e == 0) | (e.abs() == 1)).all()):
            raise BadInput("the modulator shows -1, 0 and 1 only: ternarise the error first, or set ternary=False")
        return self.expose((e > 0).to(e.dtype)) - self.expose((e < 0).to(e.dtype))

    def expose(self, mask: Tensor) -> Tensor:
        """One reading of the camera for each row."""
        self.frames += len(mask)
        seen = mask @ self.real.T
        if self.holography == "intensity":
            seen = seen.square() + (mask @ self.imaginary.T).square()
        if self.noise:
            seen = seen + self.noise * torch.randn_like(seen)
        full = seen.abs().amax().clamp_min(1e-12) if self.saturation is None else torch.as_tensor(self.saturation).to(seen)
        if self.levels is not None:
            step = 2 * full / (self.levels - 1)
            seen = ((seen + full) / step).round() * step - full  # levels are spread evenly over [-full, full]
        return seen.clamp(-full, full)

    def counters(self) -> dict[str, float]:
        """What a device would have spent so far: exposures, seconds, joules."""
        frames = float(self.frames)
        return {"frames": frames, "seconds": frames / self.rate, "joules": frames / self.rate * self.watts}
