"""IGPG: trained networks as sentences. A tokenizer turns weights into codes, a small GPT writes new sentences when told what is wanted.

Weights are flattened and cut into chunks (:class:`~neurarium.learn.weight_tokens.WeightTokenizer`), each chunk becomes a few discrete
codes (:class:`~neurarium.learn.weight_tokens.GumbelVQ`), and a causal transformer models the code sequences of a zoo of trained networks,
conditioned on the data set and the architecture asked for (:class:`WeightGPT`). Codes are sampled in order, so later layers are
consistent with earlier ones: a network drawn place by place from the right marginals mixes solutions that do not fit together.
:class:`IGPG` holds the three.

*Equations.* ``p(s | instruction) = prod_i p(s_i | s_<i, instruction)``, trained by cross-entropy. A sequence longer than the context is
written in windows, each continuing the tail of the one before.

*Source.* "Instruction-Guided Autoregressive Neural Network Parameter Generation" (arXiv 2504.02012).

*Departures.* Sizes are a thousandth of the paper's. The instruction is read by a pluggable callable; :class:`TaskConditioner` uses a few
images a class, projected on principal components, and a bag of the words of the architecture's name, where the paper uses CLIP and a
language model.

*Cost.* As many transformer steps as the network has codes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from neurarium.data import TensorData
from neurarium.errors import BadInput
from neurarium.learn.weight_tokens import GumbelVQ, WeightTokenizer
from neurarium.learn.zoo import Instruction, ZooNet

__all__ = ["IGPG", "TaskConditioner", "WeightGPT"]

State = dict[str, Tensor]


class WeightGPT(nn.Module):
    """Next-code prediction after an instruction. ``model(tokens (n, t), condition (n, d)) -> logits (n, t + 1, codes)``.

    ``logits[:, i]`` predicts ``tokens[:, i]``. Positions are counted from the beginning of the network, so a window knows where it is.
    """

    def __init__(
        self, codes: int, *, condition_dim: int, layers: int = 4, width: int = 128, heads: int = 4, context: int = 512,
        longest: int = 4096, dropout: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if min(codes, condition_dim, layers, width, heads, longest) < 1 or context < 2:
            raise BadInput("codes, condition_dim, layers, width, heads and longest must be at least 1, context at least 2")
        self.context, self.codes = context, codes
        self.condition, self.embed = nn.Linear(condition_dim, width), nn.Embedding(codes, width)
        self.position = nn.Embedding(longest, width)
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout, "gelu", batch_first=True, norm_first=True)
        self.body = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.out = nn.Linear(width, codes)

    def forward(self, tokens: Tensor, condition: Tensor, start: int = 0) -> Tensor:
        n = tokens.shape[1]
        h = torch.cat([self.condition(condition)[:, None], self.embed(tokens) + self.position.weight[start : start + n]], 1)
        mask = torch.full((n + 1, n + 1), float("-inf"), dtype=h.dtype, device=h.device).triu(1)
        return self.out(self.body(h, mask, is_causal=True))

    @torch.no_grad()
    def sample(
        self, condition: Tensor, length: int, *, temperature: float = 1.0, top_k: int | None = None, overlap: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:  # fmt: skip
        """Codes (n, length). Beyond the context, windows continue the last ``overlap`` codes (half the context by default).

        ``temperature=0`` takes the most likely code each time.
        """
        overlap = self.context // 2 if overlap is None else overlap
        if not 0 < overlap < self.context or temperature < 0 or length > self.position.num_embeddings:
            raise BadInput(f"overlap must be in 1..{self.context - 1}, temperature >= 0, length at most {self.position.num_embeddings}")
        tokens, start = torch.empty(len(condition), 0, dtype=torch.long, device=condition.device), 0
        while tokens.shape[1] < length:
            if tokens.shape[1] - start == self.context:  # full: the next window
                start = tokens.shape[1] - overlap
            logits = self(tokens[:, start:], condition, start)[:, -1]
            if top_k is not None:
                logits = logits.masked_fill(logits < logits.topk(min(top_k, self.codes)).values[:, -1:], float("-inf"))
            drawn = (
                torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator) if temperature else logits.argmax(-1)[:, None]
            )
            tokens = torch.cat([tokens, drawn], 1)
        return tokens


class TaskConditioner(nn.Module):
    """Reads an :class:`Instruction`: what the data look like, class by class, and the words of the architecture's name.

    Args:
        datasets: name -> data; the first ``examples`` of each class are looked at, none else.
        architectures: names such as ``"mlp 64 16 10"``; every word has a learned vector, a name is the mean of its words.
        classes, features: the data become ``classes * features`` numbers by a fixed projection on principal components.
    """

    def __init__(
        self, datasets: Mapping[str, TensorData], architectures: Sequence[str], *, classes: int = 10, examples: int = 5, features: int = 8,
        width: int = 16,
    ) -> None:  # fmt: skip
        super().__init__()
        means = {
            name: torch.stack([d.x[d.y == k][:examples].flatten(1).mean(0) for k in range(classes)]).to(torch.float32)
            for name, d in datasets.items()
        }
        everything = torch.cat(list(means.values()))
        centre = everything.mean(0)
        projection = torch.linalg.svd(everything - centre, full_matrices=False)[2][:features].T
        embedded = torch.stack([((m - centre) @ projection).flatten() for m in means.values()])
        self.register_buffer("table", embedded / embedded.std().clamp_min(1e-12))
        self.datasets = {name: i for i, name in enumerate(datasets)}
        self.words = {w: i for i, w in enumerate(sorted({w for a in architectures for w in a.split()}))}
        self.bag = nn.EmbeddingBag(len(self.words), width)
        self.dim = self.table.shape[1] + width

    def forward(self, instructions: Sequence[Instruction]) -> Tensor:
        """(instructions, dim)."""
        for i in instructions:
            if i.dataset not in self.datasets or not all(w in self.words for w in i.architecture.split()):
                raise BadInput(f"{i} is not known; data sets are {sorted(self.datasets)}, words {sorted(self.words)}")
        words = [torch.tensor([self.words[w] for w in i.architecture.split()], device=self.table.device) for i in instructions]
        starts = torch.tensor([0, *map(len, words[:-1])], device=self.table.device).cumsum(0)
        data = self.table[[self.datasets[i.dataset] for i in instructions]]
        return torch.cat([data, self.bag(torch.cat(words), starts)], 1)


class IGPG(nn.Module):
    """Tokenizer, quantiser and prior together.

    ::

        model = IGPG(WeightTokenizer(32), GumbelVQ(32), WeightGPT(256, condition_dim=conditioner.dim), conditioner)
        model.fit_zoo(zoo, epochs_vq=50, epochs_prior=50)
        state = model.generate(Instruction("digits", "mlp 64 16 10"))[0]

    ``conditioner`` is any callable from a list of instructions to a tensor (n, condition_dim); a module is trained with the prior.
    """

    def __init__(
        self, tokenizer: WeightTokenizer, vq: GumbelVQ, prior: WeightGPT, conditioner: Callable[[Sequence[Instruction]], Tensor]
    ) -> None:
        super().__init__()
        if prior.codes != len(vq.codebook):
            raise BadInput(f"the prior knows {prior.codes} codes, the quantiser has {len(vq.codebook)}")
        self.tokenizer, self.vq, self.prior, self.conditioner = tokenizer, vq, prior, conditioner

    def forward(self, values: Tensor, place: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Chunks (n, chunks, chunk), place (n, chunks, 3), condition (n, d) -> reconstruction, logits of each code after those before."""
        made, _, _, logits = self.vq(values, place)
        tokens = logits.argmax(-1).flatten(1)
        return made, self.prior(tokens[:, :-1], condition)

    def place(self, architecture: str) -> Tensor:
        """(chunks, 3): architecture, layer and chunk number."""
        layout = self.tokenizer.layout(architecture)
        number = list(self.tokenizer.layouts).index(architecture)
        rows = torch.tensor([(number, layer, i) for i, layer in enumerate(layout.layers)], device=self.vq.codebook.device)
        if (rows.amax(0) >= torch.tensor([e.num_embeddings for e in self.vq.places], device=rows.device)).any():
            raise BadInput(f"{architecture!r} needs places up to {rows.amax(0).tolist()}; make the quantiser with larger places")
        return rows

    def fit_zoo(
        self, zoo: Sequence[ZooNet], *, epochs_vq: int, epochs_prior: int, batch: int = 256, batch_prior: int = 32, lr: float = 2e-3,
        lr_prior: float = 1e-3, seed: int = 0,
    ) -> dict[str, list[float]]:  # fmt: skip
        """Train the quantiser on all chunks, then the prior on all code sequences; the losses of both, one an epoch."""
        if not zoo:
            raise BadInput("the zoo is empty")
        self.tokenizer.fit([(z.instruction.architecture, z.state) for z in zoo])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            losses = {"vq": self._fit_vq(zoo, epochs_vq, batch, lr)}
            losses["prior"] = self._fit_prior(zoo, epochs_prior, batch_prior, lr_prior)
        self.eval()
        return losses

    def fit_prior(self, zoo: Sequence[ZooNet], epochs: int, *, batch: int = 32, lr: float = 1e-3, seed: int = 0) -> list[float]:
        """Train the prior (and the conditioner) alone, on the codes of a quantiser that is trained already."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._fit_prior(zoo, epochs, batch, lr)

    def _fit_vq(self, zoo: Sequence[ZooNet], epochs: int, batch: int, lr: float) -> list[float]:
        device = self.vq.codebook.device
        pieces = [(*self.tokenizer.chunks(z.instruction.architecture, z.state), self.place(z.instruction.architecture)) for z in zoo]
        values, mask, place = (torch.cat(p).to(device) for p in zip(*pieces))
        values = values.to(self.vq.codebook.dtype)
        optimizer = AdamW(self.vq.parameters(), lr=lr, betas=(0.5, 0.9), weight_decay=0.0)
        losses, steps = [], epochs * -(-len(values) // batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
        self.vq.train()
        warm = 2 * epochs // 3  # as a plain autoencoder, before there are codes: cheap epochs
        for epoch in range(epochs):
            if epoch == warm:
                self.vq.place_codes(values)
            elif warm < epoch < 0.8 * epochs:
                self.vq.restart(values)
            total = 0.0
            for rows in torch.randperm(len(values), device=device).split(batch):
                temperature = self.vq.temperature((epoch - warm) / (epochs - warm)) if epoch >= warm else 0.0
                loss = self.vq.loss(values[rows], mask[rows], place[rows], temperature)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach().item() * len(rows) / len(values)
            losses.append(total)
        self.vq.eval()
        return losses

    def tokens(self, architecture: str, state: State) -> Tensor:
        """The code sequence of a network."""
        values = self.tokenizer.chunks(architecture, state)[0]
        with torch.no_grad():
            return self.vq.encode(values.to(self.vq.codebook)).flatten()

    def _fit_prior(self, zoo: Sequence[ZooNet], epochs: int, batch: int, lr: float) -> list[float]:
        named: dict[str, list[ZooNet]] = {}
        for z in zoo:
            named.setdefault(z.instruction.architecture, []).append(z)
        sets = [([z.instruction for z in nets], torch.stack([self.tokens(a, z.state) for z in nets])) for a, nets in named.items()]
        learned = [*self.prior.parameters(), *(self.conditioner.parameters() if isinstance(self.conditioner, nn.Module) else [])]
        optimizer = AdamW(learned, lr=lr, weight_decay=0.01)
        plan = [(s, rows) for s, (_, tokens) in enumerate(sets) for rows in range(-(-len(tokens) // batch))]
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, epochs * len(plan)))
        losses, context = [], self.prior.context
        self.prior.train()
        for _ in range(epochs):
            orders = [torch.randperm(len(tokens)) for _, tokens in sets]
            total = 0.0
            for number in torch.randperm(len(plan)).tolist():
                s, part = plan[number]
                instructions, tokens = sets[s]
                rows = orders[s][part * batch : (part + 1) * batch]
                found, start = tokens[rows.to(tokens.device)], 0
                if found.shape[1] > context:  # one window of a long network
                    start = int(torch.randint(found.shape[1] - context + 1, ()))
                    found = found[:, start : start + context]
                logits = self.prior(found[:, :-1], self.conditioner([instructions[i] for i in rows.tolist()]), start)
                skip = 1 if start else 0  # a window inside a network begins with a code that is given
                loss = F.cross_entropy(logits[:, skip:].flatten(0, 1), found[:, skip:].flatten())
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                schedule.step()
                total += loss.detach().item() / len(plan)
            losses.append(total)
        self.prior.eval()
        return losses

    @torch.no_grad()
    def decode(self, architecture: str, tokens: Tensor) -> list[State]:
        """Code sequences (n, length) -> states."""
        values = self.vq.decode(tokens.unflatten(1, (-1, self.vq.tokens_per_chunk)), self.place(architecture).expand(len(tokens), -1, -1))
        return [self.tokenizer.state(architecture, v) for v in values]

    @torch.no_grad()
    def generate(
        self, instruction: Instruction, *, n: int = 1, temperature: float = 1.0, top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> list[State]:  # fmt: skip
        """``n`` networks of the instruction's architecture, for its data set."""
        length = self.tokenizer.layout(instruction.architecture).chunks * self.vq.tokens_per_chunk
        condition = self.conditioner([instruction]).expand(n, -1)
        tokens = self.prior.sample(condition, length, temperature=temperature, top_k=top_k, generator=generator)
        return self.decode(instruction.architecture, tokens)

    def reconstruct(self, architecture: str, state: State) -> State:
        """There and back through the codes."""
        return self.decode(architecture, self.tokens(architecture, state)[None])[0]
