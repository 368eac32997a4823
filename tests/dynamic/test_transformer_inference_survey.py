"""The glue of the survey: every technique at full level is the model itself, and what it removes is really gone."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from neurarium import meter
from neurarium.dynamic.backbones import VisionTransformerS
from neurarium.dynamic.decoder import Decoder
from neurarium.errors import BadInput
from neurarium.experiments.dynamic import transformer_inference_survey as survey


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VisionTransformerS(1, 8, 2, width=24, depth=4, heads=3, mlp=2, classes=5).eval()


LOADER = [(torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.arange(12) % 5)]
X = LOADER[0][0]
TECHNIQUES = ("none", "unstructured", "heads", "ffn", "layers", "lowrank", "tokens")


@pytest.mark.parametrize("technique", [*TECHNIQUES, "bits"])
def test_the_full_level_is_the_model(model, technique):
    before = copy.deepcopy(model.state_dict())
    whole = survey.apply(technique, model, 32 if technique == "bits" else 1.0, LOADER)
    assert torch.equal(whole(X), model(X))
    survey.apply(technique, model, 8 if technique == "bits" else 0.5, LOADER)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()), "the model was changed"


@pytest.mark.parametrize("technique", ["heads", "ffn", "layers", "lowrank", "tokens"])
def test_what_is_removed_is_not_computed(model, technique):
    small = survey.apply(technique, model, 0.5, LOADER)
    assert small(X).shape == (12, 5) and meter.flops(small, X) < 0.9 * meter.flops(model, X)


@pytest.mark.parametrize(("width", "tokens_a_side", "hidden"), [(24, 4, 48), (32, 3, 96)])
def test_flops_of_a_block_are_those_of_the_closed_form(width, tokens_a_side, hidden):
    vit = VisionTransformerS(1, 2 * tokens_a_side, 2, width=width, depth=1, heads=4, mlp=hidden / width)
    n = tokens_a_side**2
    maps, attention = 4 * n * width**2 + 2 * n * width * hidden, 2 * n * n * width
    assert meter.flops(vit.blocks, torch.randn(1, n, width)) == 2 * (maps + attention)


def test_removed_heads_are_those_whose_output_is_zeroed(model):
    small = survey.apply("heads", model, 0.5, LOADER)
    kept = [block.attention.heads for block in small.blocks]
    assert sum(kept) == 6 and min(kept) >= 1
    twin = copy.deepcopy(model)
    for mine, theirs in zip(small.blocks, twin.blocks):
        have = mine.attention.o.weight.unflatten(1, (-1, 8)).unbind(1)
        with torch.no_grad():
            for head in theirs.attention.o.weight.unflatten(1, (-1, 8)).unbind(1):
                if not any(torch.equal(head, h) for h in have):
                    head.zero_()
    torch.testing.assert_close(small(X), twin(X), rtol=1e-4, atol=1e-5)


def test_the_least_useful_head_goes_first():
    torch.manual_seed(0)
    vit = VisionTransformerS(1, 8, 2, width=24, depth=1, heads=3, mlp=2, classes=5).eval()
    with torch.no_grad():
        vit.blocks[0].attention.o.weight[:, 8:16] *= 1e-4  # head 1 says nothing
    small = survey.apply("heads", vit, 2 / 3, LOADER)
    torch.testing.assert_close(small(X), vit(X), rtol=1e-2, atol=1e-3)


def test_keys_and_values_that_are_kept_give_what_recomputing_gives():
    torch.manual_seed(0)
    decoder = Decoder(11, width=16, heads=2, layers=3, context=12).eval()
    ids = torch.randint(11, (2, 12))
    past, hidden = [None] * 3, []
    for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:]):
        h = decoder.embed(part, start=sum(p.shape[1] for p in hidden))
        for i, layer in enumerate(decoder.layers):
            h, past[i] = layer.step(h, past[i])
        hidden.append(h)
    torch.testing.assert_close(decoder.head(decoder.norm(torch.cat(hidden, 1))), decoder(ids), rtol=1e-5, atol=1e-5)


def test_a_later_token_does_not_change_an_earlier_answer():
    torch.manual_seed(0)
    decoder = Decoder(11, width=16, heads=2, layers=2, context=12).eval()
    ids = torch.randint(11, (2, 12))
    other = ids.clone()
    other[:, 7:] = (ids[:, 7:] + 1) % 11
    assert torch.equal(decoder(ids)[:, :7], decoder(other)[:, :7])


def test_nonsense_is_refused(model):
    for technique, level in (("heads", 0.0), ("heads", 1.5), ("wishing", 0.5)):
        with pytest.raises(BadInput):
            survey.apply(technique, model, level, LOADER)
    with pytest.raises(BadInput, match="context"):
        Decoder(5, width=8, heads=2, layers=1, context=4)(torch.zeros(1, 5, dtype=torch.int64))
    with pytest.raises(BadInput, match="patches"):
        VisionTransformerS(image=10, patch=4)
    assert isinstance(model, nn.Sequential)
