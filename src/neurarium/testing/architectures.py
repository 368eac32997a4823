"""Twelve small networks of twelve kinds, with inputs, data and a loss: what a method for "any model" is tried on.

``subject(name)`` gives one. The three Hugging Face models need the package ``transformers`` and have random weights; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.compress.gpt import GPT
from neurarium.errors import BadInput, MissingExtra

__all__ = ["ARCHITECTURES", "Subject", "subject"]

CLASSES = 5
TOKENS = 40
TIME = 12


@dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
        name: one of :data:`ARCHITECTURES`.
        model: in eval mode, with weights and running statistics that are not those of an initialisation.
        inputs: a tuple with the model's one input, batch of 4.
        loader: two batches of ``(x, y)``, 8 rows each.
        loss: ``loss(output, y)``, mean over the batch.
    """

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...]
    loader: list[tuple[Tensor, Tensor]]
    loss: Callable[[Any, Tensor], Tensor] = field(repr=False)

    def run(self, model: nn.Module | None = None) -> Tensor:
        """Output tensor of the model (or of what a transform made of it) on :attr:`inputs`, in eval mode, without gradient."""
        with torch.no_grad():
            return _tensor((self.model if model is None else model).eval()(*self.inputs))


def subject(name: str, seed: int = 0) -> Subject:
    """The network `name` under `seed`, freshly made.

    Raises:
        BadInput: no such name.
        MissingExtra: ``transformers`` is not installed and the name is one of its models.
    """
    if name not in ARCHITECTURES:
        raise BadInput(f"no architecture {name!r}; there are {', '.join(ARCHITECTURES)}")
    make, kind = ARCHITECTURES[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _lived(make())
        batches = [_batch(kind, 8) for _ in range(2)]
    return Subject(name, model.eval(), (batches[0][0][:4],), batches, _loss)


def _batch(kind: str, n: int) -> tuple[Tensor, Tensor]:
    if kind == "language":
        ids = torch.randint(3, TOKENS, (n, TIME + 1))
        return ids[:, :-1], ids[:, 1:]
    if kind == "sequence":
        return torch.randint(0, TOKENS, (n, TIME)), torch.arange(n) % CLASSES
    x = torch.rand(n, 3, 16, 16)
    if kind == "pixels":
        return x, torch.randint(0, CLASSES, (n, 16, 16))
    return x, torch.arange(n) % CLASSES


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def _loss(output: Any, y: Tensor) -> Tensor:
    """Cross-entropy of (n, classes), (n, time, classes) or (n, classes, height, width) logits."""
    logits = _tensor(output)
    if y.ndim == 2:
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())
    return F.cross_entropy(logits, y)


def _lived(model: nn.Module) -> nn.Module:
    """Gives norms and biases values as training does, so that a method that loses one of them is found out."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.normal_(1, 0.2), m.bias.normal_(0, 0.2)
                m.running_mean.normal_(0, 0.2), m.running_var.uniform_(0.5, 2)  # type: ignore[union-attr, operator]
            elif isinstance(m, nn.LayerNorm):
                m.weight.normal_(1, 0.2), m.bias.normal_(0, 0.2)
    return model


def _conv(into: int, out: int, stride: int = 1, groups: int = 1, kernel: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(into, out, kernel, stride, kernel // 2, groups=groups, bias=False), nn.BatchNorm2d(out), nn.ReLU(inplace=True)
    )


def _tail(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES)]


class _Residual(nn.Module):
    def __init__(self, into: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        same = into == out and stride == 1
        self.shortcut = None if same else nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class _Dense(nn.Module):
    def __init__(self, into: int, growth: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.BatchNorm2d(n), nn.ReLU(), nn.Conv2d(n, growth, 3, padding=1, bias=False))
            for n in range(into, into + growth * layers, growth)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cat([x, layer(x)], 1)
        return x


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = self.qkv(x).reshape(batch, time, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, time, -1))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(width), _Attention(width, heads), nn.LayerNorm(width)
        self.ffn = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class _ViT(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.token, self.position = nn.Parameter(0.2 * torch.randn(1, 1, width)), nn.Parameter(0.2 * torch.randn(1, 17, width))
        self.layers = nn.Sequential(_Layer(width, heads), _Layer(width, heads))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


class _UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.low = _conv(3, 8), _conv(8, 12), _conv(12, 16)
        self.up2, self.down2 = nn.ConvTranspose2d(16, 12, 2, 2), _conv(24, 12)
        self.up1, self.down1, self.out = nn.ConvTranspose2d(12, 8, 2, 2), _conv(16, 8), nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x)
        b = self.b(F.max_pool2d(a, 2))
        x = self.down2(torch.cat([b, self.up2(self.low(F.max_pool2d(b, 2)))], 1))
        return self.out(self.down1(torch.cat([a, self.up1(x)], 1)))


class _Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.lstm = nn.Embedding(TOKENS, 8), nn.LSTM(8, 16, 2, batch_first=True)
        self.hidden, self.head = nn.Linear(16, 16), nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.hidden(self.lstm(self.embed(x))[0][:, -1])))


def _hugging_face(name: str) -> nn.Module:
    try:
        import transformers as t
    except ImportError as error:
        raise MissingExtra("transformers", "test") from error
    common: dict[str, Any] = {
        "vocab_size": TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 32,
    }  # fmt: skip
    if name == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**common, intermediate_size=48, num_key_value_heads=2, pad_token_id=0))
    if name == "opt":
        return t.OPTForCausalLM(t.OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=32, dropout=0.0, pad_token_id=0))
    config = t.GPT2Config(vocab_size=TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=32, bos_token_id=1, eos_token_id=2)
    return t.GPT2LMHeadModel(config)


#: name -> (maker, kind of data)
ARCHITECTURES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, CLASSES)),
        "images",
    ),
    "vgg": (
        lambda: nn.Sequential(
            _conv(3, 8), nn.MaxPool2d(2), _conv(8, 12), nn.MaxPool2d(2), _conv(12, 12), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 16),
            nn.ReLU(), nn.Dropout(), nn.Linear(16, CLASSES),
        ),
        "images",
    ),
    "resnet": (lambda: nn.Sequential(_conv(3, 8), _Residual(8, 8, 1), _Residual(8, 12, 2), _Residual(12, 12, 1), *_tail(12)), "images"),
    "mobilenet": (
        lambda: nn.Sequential(
            _conv(3, 8, 2), _conv(8, 8, groups=8), _conv(8, 16, kernel=1), _conv(16, 16, 2, 16), _conv(16, 16, kernel=1), *_tail(16)
        ),
        "images",
    ),
    "densenet": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3, 2, 1), _Dense(8, 4, 3), nn.BatchNorm2d(20), nn.ReLU(), nn.Conv2d(20, 12, 1), nn.AvgPool2d(2),
            _Dense(12, 4, 2), nn.BatchNorm2d(20), nn.ReLU(), *_tail(20),
        ),
        "images",
    ),
    "vit": (_ViT, "images"),
    "gpt": (lambda: GPT(TOKENS, width=16, heads=2, layers=2, hidden=48, context=16), "language"),
    "llama": (lambda: _hugging_face("llama"), "language"),
    "opt": (lambda: _hugging_face("opt"), "language"),
    "gpt2": (lambda: _hugging_face("gpt2"), "language"),
    "unet": (_UNet, "pixels"),
    "lstm": (_Recurrent, "sequence"),
}  # fmt: skip
