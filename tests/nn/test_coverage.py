"""Every recipe goes into every kind of model that it can, trains there and exports, or says by name why a layer stays."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from neurarium.nn.hyperbolic import PoincareBall, hyperbolic
from neurarium.nn.hypercomplex import hypercomplex
from neurarium.nn.kernel_layer import kernelise
from neurarium.nn.replace import replace_layers
from neurarium.nn.signal import signal_report
from neurarium.nn.wavemix import wave_mixing


class Residual(nn.Module):
    def __init__(self, inner: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inner, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.skip = nn.Identity() if inner == out and stride == 1 else nn.Conv2d(inner, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.skip(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ViT(nn.Module):
    """Patches, two encoder layers of torch's own attention, a classifier on the mean token."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 4, 4)
        self.place = nn.Parameter(0.02 * torch.randn(1, 16, width))
        self.attend = nn.ModuleList(nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(4))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)) for _ in range(2))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2) + self.place
        for i in range(2):
            h = self.norms[2 * i](x)
            x = x + self.attend[i](h, h, h, need_weights=False)[0]
            x = x + self.mlps[i](self.norms[2 * i + 1](x))
        return self.head(x.mean(1))


class Decoder(nn.Module):
    """A Hugging Face decoder that returns its logits alone."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=32, use_cache=False,
        )  # fmt: skip
        self.model = transformers.LlamaForCausalLM(config)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids).logits


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


def resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), Residual(8, 8), Residual(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 8)
    )


def pixels(n: int) -> Tensor:
    return torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    "mlp": (mlp, lambda n: torch.randn(n, 12, generator=torch.Generator().manual_seed(0))),
    "resnet": (resnet, pixels),
    "vit": (ViT, pixels),
    "decoder": (Decoder, lambda n: torch.randint(0, 32, (n, 6), generator=torch.Generator().manual_seed(0))),
}
#: recipe -> (its rule, the models in which it finds something to replace)
RECIPES: dict[str, tuple[Callable[[], object], set[str]]] = {
    "phnn": (lambda: hypercomplex(2), {"mlp", "resnet", "vit", "decoder"}),
    "snnk": (lambda: kernelise("relu", num_features=8), {"mlp", "resnet", "vit", "decoder"}),
    "wavemix": (lambda: wave_mixing(), {"resnet"}),
    "poincare-resnet": (lambda: hyperbolic(PoincareBall(0.1)), {"mlp", "resnet", "vit", "decoder"}),
}


@cache
def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name][0]()


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_in_a_model(recipe, name):
    model, x = built(name), MODELS[name][1](4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    rule, where = RECIPES[recipe]
    torch.manual_seed(1)
    new = replace_layers(model, rule(), example=x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the user's model was changed"
    report = new.replace_report
    assert all(s.why for s in report.skipped)
    assert bool(report.replaced) == (name in where), report.describe()
    if not report.replaced:
        return

    new.train()
    out = new(x)
    assert torch.isfinite(out).all() and out.shape == model(x).shape
    F.cross_entropy(out.flatten(0, -2), torch.randint(0, out.shape[-1], out.shape[:-1]).flatten()).backward()
    for r in report.replaced:
        moved = [p for p in new.get_submodule(r.name).parameters() if p.grad is not None and p.grad.abs().sum() > 0]
        assert moved, f"{r.name} gets no gradient"
        assert all(torch.isfinite(p.grad).all() for p in new.get_submodule(r.name).parameters() if p.grad is not None)

    new.eval()
    exported = torch.export.export(new, (x,)).module()
    torch.testing.assert_close(exported(x), new(x), rtol=1e-4, atol=1e-5)


def test_replacement_reaches_inside_a_signal_report():
    """The meter reads a replaced model like any other."""
    model = replace_layers(built("resnet"), hypercomplex(2))
    report = signal_report(model, pixels(8))
    assert 0.1 <= report.gain <= 10 and "PHConv2d" in {s.kind for s in report.layers}
