"""Ten small programs whose path depends on what they compute, as people write them: for one input, with ``if``, ``while`` and ``break``.

Weights are random. Thresholds are then set to medians of what is compared with them, so that every way is taken. ``cond(x)``, where there
is one, is the same program written by hand with ``torch.cond``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["PROGRAMS", "inputs", "make"]

CLASSES = 5


def conv(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1), nn.ReLU())


def head(width: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, CLASSES))


def sure(logits: Tensor) -> Tensor:
    return logits.softmax(-1).amax(-1)


class EarlyExit(nn.Module):
    """Leaves at the first exit that is sure."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList([conv(1, 8), conv(8, 16, 2), conv(16, 16, 2)])
        self.heads = nn.ModuleList(head(w) for w in (8, 16, 16))
        self.tau = [0.5, 0.5, 0.0]

    def forward(self, x):
        for stage, classify, tau in zip(self.stages, self.heads, self.tau):
            x = stage(x)
            y = classify(x)
            if sure(y).item() >= tau:
                break
        return y

    def cond(self, x):
        def ask(k, x, y):
            if k == 2:
                return self.heads[k](self.stages[k](x))
            x = self.stages[k](x)
            y = self.heads[k](x)
            return torch.cond(sure(y).squeeze(0) >= self.tau[k], lambda x, y: y.clone(), lambda x, y: ask(k + 1, x, y), (x, y))

        return ask(0, x, None)

    def settle(self, x):
        for k in range(2):
            x = self.stages[k](x)
            score = sure(self.heads[k](x))
            self.tau[k] = float(score.median())
            x = x[score < self.tau[k]]


class Patience(nn.Module):
    """Leaves when three exits in a row agree."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(1, 8, 2)
        self.stages = nn.ModuleList(conv(8, 8) for _ in range(4))
        self.heads = nn.ModuleList(head(8) for _ in range(4))

    def forward(self, x):
        x, last, agreed = self.stem(x), None, 0
        for stage, classify in zip(self.stages, self.heads):
            x = x + stage(x)
            y = classify(x)
            answer = y.argmax(-1)
            if last is not None:
                if answer == last:
                    agreed += 1
                    if agreed == 2:
                        return y
                else:
                    agreed = 0
            last = answer
        return y

    def settle(self, x):
        x = self.stem(x)
        for stage, classify in zip(self.stages, self.heads):  # answers differ between inputs and between heads
            x = x + stage(x)
            classify[-1].bias -= classify(x).mean(0)


class Gated(nn.Module):
    """A residual block that its gate may skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate, self.body, self.tau = nn.Linear(width, 1), conv(width, width), 0.0

    def forward(self, x):
        if self.gate(x.mean((2, 3))).item() > self.tau:
            return x + self.body(x)
        return x


class Skipping(nn.Module):
    """SkipNet: a gate before every block."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = conv(1, 16, 2), nn.ModuleList(Gated(16) for _ in range(2)), head(16)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def cond(self, x):
        x = self.stem(x)
        for block in self.blocks:
            gate = block.gate(x.mean((2, 3))).squeeze() > block.tau
            x = torch.cond(gate, lambda x, b=block: x + b.body(x), lambda x: x.clone(), (x,))
        return self.head(x)

    def settle(self, x):
        x = self.stem(x)
        for block in self.blocks:
            score = block.gate(x.mean((2, 3))).squeeze(1)
            block.tau = float(score.median())
            x = torch.where((score > block.tau).view(-1, 1, 1, 1), x + block.body(x), x)


class Cascade(nn.Module):
    """A small network, and a large one for what the small one is not sure of."""

    def __init__(self) -> None:
        super().__init__()
        self.small = nn.Sequential(conv(1, 8, 2), head(8))
        self.large = nn.Sequential(conv(1, 16), conv(16, 32, 2), head(32))
        self.tau = 0.5

    def forward(self, x):
        y = self.small(x)
        return y if sure(y) >= self.tau else self.large(x)

    def cond(self, x):
        y = self.small(x)
        return torch.cond(sure(y).squeeze(0) >= self.tau, lambda x, y: y.clone(), lambda x, y: self.large(x), (x, y))

    def settle(self, x):
        self.tau = float(sure(self.small(x)).median())


class Resolution(nn.Module):
    """The picture at half size first; at full size, with what was seen, if that was not enough."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse, self.first = conv(1, 16), head(16)
        self.fine, self.second = conv(1, 16), head(32)
        self.tau = 0.5

    def forward(self, x):
        seen = self.coarse(F.avg_pool2d(x, 2))
        y = self.first(seen)
        if sure(y) < self.tau:
            y = self.second(torch.cat([self.fine(x), F.interpolate(seen, scale_factor=2.0)], 1))
        return y

    def cond(self, x):
        seen = self.coarse(F.avg_pool2d(x, 2))
        y = self.first(seen)

        def more(x, seen, y):
            return self.second(torch.cat([self.fine(x), F.interpolate(seen, scale_factor=2.0)], 1))

        return torch.cond(sure(y).squeeze(0) < self.tau, more, lambda x, seen, y: y.clone(), (x, seen, y))

    def settle(self, x):
        self.tau = float(sure(self.first(self.coarse(F.avg_pool2d(x, 2)))).median())


class Ponder(nn.Module):
    """Adaptive computation time: steps until the halting scores add up to one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.step, self.halt, self.head = conv(1, 8, 2), conv(8, 8), nn.Linear(8, 1), head(8)
        self.shift, self.scale = 0.0, 1.0

    def forward(self, x):
        h = self.stem(x)
        total, steps = torch.zeros(len(x)), 0
        while steps < 8 and total < 1:
            h = F.relu(0.8 * h + self.step(h))
            total = total + torch.sigmoid((self.halt(h.mean((2, 3))) - self.shift) * self.scale - 1).squeeze(1)
            steps += 1
        return self.head(h)

    def settle(self, x):
        h = self.stem(x)
        score = self.halt(F.relu(0.8 * h + self.step(h)).mean((2, 3)))
        self.shift, self.scale = float(score.median()), 1 / float(score.std())


class Experts(nn.Module):
    """The expert that a router names."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.router, self.head = conv(1, 16, 2), nn.Linear(16, 3), head(16)
        self.experts = nn.ModuleList(conv(16, 16) for _ in range(3))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        x = self.stem(x)
        k = (self.router(x.mean((2, 3))) - self.mean).argmax(-1).item()
        return self.head(x + self.experts[k](x))

    def cond(self, x):
        x = self.stem(x)
        k = (self.router(x.mean((2, 3))) - self.mean).argmax(-1).squeeze(0)
        e = self.experts

        def other(x):
            return torch.cond(k == 1, lambda x: x + e[1](x), lambda x: x + e[2](x), (x,))

        return self.head(torch.cond(k == 0, lambda x: x + e[0](x), other, (x,)))

    def settle(self, x):
        self.mean.copy_(self.router(self.stem(x).mean((2, 3))).mean(0))


class Speller(nn.Module):
    """A decoder that writes two tokens, for each of which layers run until one is sure."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.read, self.embed = conv(1, 8, 2), nn.Linear(64, width)
        self.token = nn.Embedding(7, width)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(width, 2, 64, 0.0, batch_first=True) for _ in range(2))
        self.out, self.tau = nn.Linear(width, 7), 0.5

    def forward(self, x):
        words = self.embed(self.read(x).flatten(2))
        logits = []
        for _ in range(2):
            h = words
            for layer in self.layers:
                h = layer(h)
                y = self.out(h[:, -1])
                if sure(y) > self.tau:
                    break
            logits.append(y)
            words = torch.cat([words, self.token(y.argmax(-1))[:, None]], 1)
        return torch.stack(logits, 1)

    def settle(self, x):
        h = self.layers[0](self.embed(self.read(x).flatten(2)))
        self.tau = float(sure(self.out(h[:, -1])).median())


class Nested(nn.Module):
    """An if inside an if, and a tail that all ways share."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b, self.c, self.head = conv(1, 16, 2), conv(16, 16), conv(16, 16), conv(16, 16), head(16)
        self.bright, self.dark = 0.0, 0.0

    def forward(self, x):
        h = self.stem(x)
        if h.mean((1, 2, 3)) > self.bright:
            h = h + self.a(h)
            if h.amax((1, 2, 3)) > self.dark:
                h = h + self.b(h)
        else:
            h = h - self.c(h)
        return self.head(F.relu(h))

    def cond(self, x):
        def yes(h):
            h = h + self.a(h)
            return torch.cond(h.amax() > self.dark, lambda h: h + self.b(h), lambda h: h.clone(), (h,))

        h = self.stem(x)
        return self.head(F.relu(torch.cond(h.mean() > self.bright, yes, lambda h: h - self.c(h), (h,))))

    def settle(self, x):
        h = self.stem(x)
        self.bright = float(h.mean((1, 2, 3)).median())
        h = h[h.mean((1, 2, 3)) > self.bright]
        self.dark = float((h + self.a(h)).amax((1, 2, 3)).median())


class Sorted(nn.Module):
    """As many leading channels as a look at the input says that it needs."""

    def __init__(self) -> None:
        super().__init__()
        self.look, self.first, self.last = nn.Linear(64, 1), nn.Conv2d(1, 32, 3, 1, 1), nn.Linear(32, CLASSES)
        self.middle = nn.Conv2d(32, 32, 3, 1, 1)
        self.low, self.high = 0.0, 0.0

    def run(self, x, width):
        h = F.relu(F.conv2d(x, self.first.weight[:width], self.first.bias[:width], padding=1))
        h = F.relu(F.conv2d(h, self.middle.weight[:width, :width], self.middle.bias[:width], padding=1))
        return F.linear(h.mean((2, 3)), self.last.weight[:, :width], self.last.bias)

    def forward(self, x):
        need = self.look(F.avg_pool2d(x, 2).flatten(1)).item()
        width = 32
        if need < self.low:
            width = 8
        elif need < self.high:
            width = 16
        return self.run(x, width)

    def cond(self, x):
        need = self.look(F.avg_pool2d(x, 2).flatten(1)).squeeze()

        def wide(x):
            return torch.cond(need < self.high, lambda x: self.run(x, 16), lambda x: self.run(x, 32), (x,))

        return torch.cond(need < self.low, lambda x: self.run(x, 8), wide, (x,))

    def settle(self, x):
        need = self.look(F.avg_pool2d(x, 2).flatten(1))
        self.low, self.high = float(need.quantile(0.33)), float(need.quantile(0.67))


PROGRAMS: dict[str, Callable[[], nn.Module]] = {
    "early exit": EarlyExit,
    "patience": Patience,
    "skipped blocks": Skipping,
    "cascade": Cascade,
    "resolution": Resolution,
    "pondering": Ponder,
    "experts": Experts,
    "speller": Speller,
    "nested ifs": Nested,
    "widths": Sorted,
}


def inputs(rows: int, generator: torch.Generator) -> Tensor:
    """Pictures of 16x16 whose contrast, brightness and grain differ."""
    coarse = F.interpolate(torch.randn(rows, 1, 4, 4, generator=generator), scale_factor=4.0)
    grain = torch.randn(rows, 1, 16, 16, generator=generator) * torch.rand(rows, 1, 1, 1, generator=generator)
    return coarse * 2 * torch.rand(rows, 1, 1, 1, generator=generator) + grain + torch.randn(rows, 1, 1, 1, generator=generator)


def make(names: Sequence[str] = tuple(PROGRAMS), seed: int = 0) -> dict[str, nn.Module]:
    """The programs, their weights drawn from ``seed``, in evaluation mode."""
    made = {}
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for name in names:
            torch.manual_seed(seed)
            program = PROGRAMS[name]().eval()
            for module in program.modules():  # louder than the usual start, so that inputs differ in what they cause
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    nn.init.kaiming_normal_(module.weight)
                    nn.init.normal_(module.bias, std=0.3)
            if hasattr(program, "settle"):
                program.settle(inputs(256, torch.Generator().manual_seed(seed + 1)))
            made[name] = program
    return made
