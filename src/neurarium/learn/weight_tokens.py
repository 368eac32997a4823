"""Weights as tokens: flatten a network, cut it into chunks, and name each chunk by a few codes of a learned codebook.

:class:`WeightTokenizer` is exact in both directions. :class:`GumbelVQ` loses what its codes cannot say.

*Equations.* ``z = encoder(chunk)``, logits over codes ``-a |z - e_j|^2``, ``y`` = Gumbel-softmax at a temperature that falls on a cosine,
``z_q = sum_j y_j e_j``, ``chunk' = decoder(z_q, place)``. Loss: ``mean |mask (chunk - chunk')|^2 + |z - sg(z_q)|^2 + beta |sg(z) - z_q|^2 +
kl_weight * KL(q || uniform)``.

*Source.* The quantiser of "Instruction-Guided Autoregressive Neural Network Parameter Generation" (arXiv 2504.02012).

*Departures.* The encoder's logits are distances to the codes, so that the commitment terms act on what is chosen. Codes that nobody uses
are put on chunks that are badly served.

*Cost.* Of a chunk: one pass through two small MLPs and a product with the codebook.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.errors import BadInput

__all__ = ["GumbelVQ", "WeightTokenizer"]

State = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Where the entries of one architecture lie in its flat vector."""

    shapes: dict[str, torch.Size]
    dtypes: dict[str, torch.dtype]
    chunks: int
    layers: tuple[int, ...]  # of each chunk: the number of the tensor that its first entry belongs to

    @property
    def size(self) -> int:
        return sum(s.numel() for s in self.shapes.values())


class WeightTokenizer:
    """``state_dict`` <-> chunks of equal length and a mask of what is padding.

    Args:
        chunk: length.
        standardise: ``"kind"``: weights, biases and so on of each number of dimensions have a scale of their own, common to all
            architectures; ``"tensor"``: each tensor of each architecture; None: no scaling. Scales are powers of two, so the way back is
            exact to the bit.

    Integer buffers are carried as numbers and rounded on the way back.
    """

    def __init__(self, chunk: int = 256, standardise: str | None = "kind") -> None:
        if chunk < 1 or standardise not in ("kind", "tensor", None):
            raise BadInput(f"chunk must be at least 1 and standardise 'kind', 'tensor' or None, not {chunk} and {standardise!r}")
        self.chunk, self.standardise = chunk, standardise
        self.layouts: dict[str, Layout] = {}
        self.scales: dict[tuple, float] = {}

    def fit(self, states: Sequence[tuple[str, State]]) -> WeightTokenizer:
        """Learn layouts and scales from (architecture, state) pairs."""
        squares: dict[tuple, list[Tensor]] = {}
        for architecture, state in states:
            if architecture not in self.layouts:
                starts = [0, *torch.tensor([t.numel() for t in state.values()]).cumsum(0).tolist()]
                count = -(-starts[-1] // self.chunk)
                if not starts[-1]:
                    raise BadInput(f"the state of {architecture!r} is empty")
                layers = tuple(sum(s <= i * self.chunk for s in starts[:-1]) - 1 for i in range(count))
                self.layouts[architecture] = Layout(
                    {n: t.shape for n, t in state.items()}, {n: t.dtype for n, t in state.items()}, count, layers
                )
            for name, t in state.items():
                if t.is_floating_point() and t.numel():
                    squares.setdefault(self._kind(architecture, name, t), []).append(t.detach().double().square().mean())
        for kind, found in squares.items():
            rms = float(torch.stack(found).mean().sqrt())
            self.scales[kind] = float(2.0 ** round(torch.tensor(rms).log2().item())) if rms > 0 and rms < float("inf") else 1.0
        return self

    def _kind(self, architecture: str, name: str, t: Tensor) -> tuple:
        return (architecture, name) if self.standardise == "tensor" else (name.rpartition(".")[2], t.ndim)

    def _scale(self, architecture: str, name: str, t: Tensor) -> float:
        if self.standardise is None or not t.is_floating_point():
            return 1.0
        return self.scales.get(self._kind(architecture, name, t), 1.0)

    def layout(self, architecture: str) -> Layout:
        if architecture not in self.layouts:
            raise BadInput(f"no network of architecture {architecture!r} has been seen; known are {sorted(self.layouts)}")
        return self.layouts[architecture]

    def chunks(self, architecture: str, state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Values and mask, both (chunks, chunk)."""
        layout = self.layout(architecture)
        if {n: t.shape for n, t in state.items()} != layout.shapes:
            raise BadInput(f"this state has other names or shapes than architecture {architecture!r}")
        wide = any(t.dtype == torch.float64 or not t.is_floating_point() for t in state.values())
        dtype = torch.float64 if wide else torch.float32
        flat = torch.cat([t.detach().to(dtype).flatten() / self._scale(architecture, n, t) for n, t in state.items()])
        padded = F.pad(flat, (0, layout.chunks * self.chunk - len(flat)))
        return padded.view(-1, self.chunk), (torch.arange(len(padded), device=flat.device) < len(flat)).view(-1, self.chunk)

    def state(self, architecture: str, values: Tensor) -> State:
        """The way back; padding is dropped."""
        layout, found, start = self.layout(architecture), {}, 0
        flat = values.detach().flatten()
        for name, shape in layout.shapes.items():
            like = torch.empty(shape, dtype=layout.dtypes[name], device="meta")
            piece = flat[start : start + shape.numel()].view(shape) * self._scale(architecture, name, like)
            found[name] = (piece if like.is_floating_point() else piece.round()).to(like.dtype)
            start += shape.numel()
        return found


class GumbelVQ(nn.Module):
    """Chunks to ``tokens_per_chunk`` codes and back.

    Args:
        chunk: length of a chunk.
        codes, code_dim: of the codebook, which all positions share.
        hidden: of encoder and decoder, MLPs with one hidden layer each.
        places: the decoder is told (architecture, layer, chunk number), numbers below these.
        kl_weight, beta: see the module's docstring.
        temperature: at the start and the end of training.
    """

    def __init__(
        self, chunk: int, *, codes: int = 256, code_dim: int = 32, tokens_per_chunk: int = 4, hidden: int = 256,
        places: tuple[int, int, int] = (8, 64, 512), kl_weight: float = 5e-4, beta: float = 0.25,
        temperature: tuple[float, float] = (1.0, 0.01),
    ) -> None:  # fmt: skip
        super().__init__()
        if min(chunk, codes, code_dim, tokens_per_chunk, hidden, *places) < 1 or min(temperature) <= 0:
            raise BadInput("chunk, codes, code_dim, tokens_per_chunk, hidden and places must be at least 1, temperatures above 0")
        self.tokens_per_chunk, self.kl_weight, self.beta, self.schedule = tokens_per_chunk, kl_weight, beta, temperature
        self.encoder = nn.Sequential(nn.Linear(chunk, hidden), nn.GELU(), nn.Linear(hidden, tokens_per_chunk * code_dim))
        self.codebook = nn.Parameter(torch.randn(codes, code_dim))
        self.sharpness = nn.Parameter(torch.tensor(32.0).log())  # of distances against the Gumbel noise
        self.places = nn.ModuleList(nn.Embedding(n, hidden) for n in places)
        self.into, self.decoder = nn.Linear(tokens_per_chunk * code_dim, hidden), nn.Linear(hidden, chunk)
        self.middle = nn.Linear(hidden, hidden)

    def temperature(self, progress: float) -> float:
        """From the first to the last on half a cosine."""
        first, last = self.schedule
        return last + (first - last) * (1 + cos(pi * progress)) / 2

    def latent(self, values: Tensor) -> Tensor:
        """z of each token, of unit mean square, so that distances mean the same at every temperature."""
        z = self.encoder(values.to(self.codebook.dtype)).unflatten(-1, (self.tokens_per_chunk, -1))
        return F.layer_norm(z, z.shape[-1:])

    def logits(self, z: Tensor) -> Tensor:
        distance = z.square().sum(-1, keepdim=True) - 2 * z @ self.codebook.T + self.codebook.square().sum(-1)
        return -self.sharpness.exp() * distance

    def encode(self, values: Tensor) -> Tensor:
        """(..., chunk) -> the nearest codes, (..., tokens_per_chunk)."""
        return self.logits(self.latent(values)).argmax(-1)

    def decode(self, z_q: Tensor, place: Tensor) -> Tensor:
        """Codes as indices (..., tokens) or as vectors (..., tokens, code_dim), ``place`` (..., 3) -> chunks."""
        if not z_q.is_floating_point():
            z_q = self.codebook[z_q]
        h = self.into(z_q.flatten(-2)) + sum(e(place[..., i]) for i, e in enumerate(self.places))
        return self.decoder(F.gelu(self.middle(F.gelu(h))))

    def forward(self, values: Tensor, place: Tensor, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Reconstruction, z, z_q and logits; in training with Gumbel noise, else with the nearest codes. At temperature 0, ``z_q = z``."""
        z = self.latent(values)
        if self.training and temperature == 0:  # a plain autoencoder
            return self.decode(z, place), z, z, None
        logits = self.logits(z)
        z_q = F.gumbel_softmax(logits, temperature) @ self.codebook if self.training else self.codebook[logits.argmax(-1)]
        return self.decode(z_q, place), z, z_q, logits

    def loss(self, values: Tensor, mask: Tensor, place: Tensor, temperature: float = 1.0) -> Tensor:
        made, z, z_q, logits = self(values, place, temperature)
        error = ((made - values) * mask).square().sum() / mask.sum()
        if logits is None:
            return error
        q = logits.log_softmax(-1)
        kl = (q.exp() * q).sum(-1).mean() + torch.log(torch.tensor(float(q.shape[-1])))
        pull = (z - z_q.detach()).square().mean() + self.beta * (z.detach() - z_q).square().mean()
        return error + pull + self.kl_weight * kl

    @torch.no_grad()
    def place_codes(self, values: Tensor, iterations: int = 10) -> None:
        """Put the codes where the latents of these chunks are: k-means, begun from latents drawn by their distance."""
        z = self.latent(values).flatten(0, -2)
        book = z[torch.randint(len(z), (1,), device=z.device)]
        while len(book) < len(self.codebook):  # a few at a time
            distance = torch.cdist(z, book).amin(1).square() + 1e-12
            count = min(len(self.codebook) - len(book), max(1, len(self.codebook) // 16), len(z))
            book = torch.cat([book, z[torch.multinomial(distance, count)]])
        for _ in range(iterations):
            nearest = torch.cdist(z, book).argmin(1)
            size = torch.bincount(nearest, minlength=len(book))[:, None]
            mean = torch.zeros_like(book).index_add_(0, nearest, z) / size.clamp_min(1)
            book = torch.where(size > 0, mean, book)
        self.codebook.copy_(book)

    @torch.no_grad()
    def restart(self, values: Tensor, generator: torch.Generator | None = None) -> int:
        """Put codes that no chunk uses on latents drawn by their distance from the nearest code; their number."""
        z = self.latent(values).flatten(0, -2)
        distance, nearest = self.logits(z).neg().min(-1)
        dead = torch.ones(len(self.codebook), dtype=torch.bool, device=z.device)
        dead[nearest] = False
        count = min(int(dead.sum()), int((distance > 1e-6).sum()))
        if count:
            drawn = torch.multinomial(distance.clamp_min(0) * (distance > 1e-6), count, generator=generator)
            self.codebook[dead.nonzero()[:count, 0]] = z[drawn]
        return count
