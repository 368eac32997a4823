"""Mixtures of LoRA experts: entropies, routing, dispatch and what it costs."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.decoder import Decoder
from neurarium.dynamic.lora_experts import DynMoLE, auxiliary_loss, mole_transform, tsallis_entropy
from neurarium.errors import BadInput, UnsupportedModel


def layer(seed: int = 0, **options) -> DynMoLE:
    """Experts and a router that have learned something."""
    torch.manual_seed(seed)
    made = DynMoLE(nn.Linear(6, 5), **{"experts": 4, "rank": 2, "alpha": 3.0, "dropout": 0.0, "dispatch": "sparse", **options})
    nn.init.normal_(made.up)
    if made.router is not None:
        nn.init.normal_(made.router)
    return made.eval()


def by_hand(m: DynMoLE, x: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """Token by token, expert by expert, as the paper writes it."""
    outputs, counts = [], []
    for token in x.reshape(-1, x.shape[-1]).double():
        p = (m.router.double() @ token).softmax(0)
        q = m.entropic_index
        entropy, most = (1 - (p**q).sum()) / (q - 1), (1 - m.experts ** (1 - q)) / (q - 1)
        kept = list(range(m.experts))
        if entropy / most <= m.entropy_threshold:
            kept, mass = [], 0.0
            for e in p.argsort(descending=True).tolist():
                if mass >= m.top_p and len(kept) >= m.top_k:
                    break
                kept.append(e)
                mass += p[e].item()
        y = F.linear(token, m.base.weight.double(), m.base.bias.double())
        for e in kept:
            y = y + m.scaling * (p[e] / p[kept].sum()) * (m.up[e].double() @ (m.down[e].double() @ token))
        outputs.append(y)
        counts.append(len(kept))
    return torch.stack(outputs).view(*x.shape[:-1], -1).float(), counts


@given(st.integers(2, 9), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_tsallis_entropy_of_known_orders(n, seed):
    p = (2 * torch.randn(7, n, generator=torch.Generator().manual_seed(seed))).softmax(-1)
    shannon = -(p * p.log()).sum(-1)
    torch.testing.assert_close(tsallis_entropy(p, 1.0), shannon)
    for q in (1 - 1e-4, 1 + 1e-4):
        torch.testing.assert_close(tsallis_entropy(p, q), shannon, atol=1e-3, rtol=0)
    torch.testing.assert_close(tsallis_entropy(p, 2.0), 1 - p.square().sum(-1))  # Gini
    torch.testing.assert_close(tsallis_entropy(p, 0.5), (1 - p.sqrt().sum(-1)) / -0.5)
    even = torch.full((n,), 1 / n)
    assert tsallis_entropy(even, 1.2).item() == pytest.approx((1 - n**-0.2) / 0.2, rel=1e-4)
    assert (tsallis_entropy(p, 1.2) <= tsallis_entropy(even, 1.2) + 1e-6).all()
    sure = F.one_hot(torch.tensor(0), n).float().requires_grad_()
    assert tsallis_entropy(sure, 1.2).item() == 0
    assert torch.autograd.grad(tsallis_entropy(sure, 1.2), sure)[0].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"top_k": 1, "top_p": 0.5}, {"entropy_threshold": 0.6}, {"top_k": 9, "entropic_index": 2.0}])
def test_routing_and_output_token_by_token(options):
    m, x = layer(**options), torch.randn(9, 5, 6)
    want, counts = by_hand(m, x)
    for dispatch in ("sparse", "dense"):
        m.dispatch = dispatch
        torch.testing.assert_close(m(x), want, atol=1e-4, rtol=1e-4)
        assert m.last_active.flatten().tolist() == counts and m.last_active.shape == (9, 5)


def test_limits():
    x = torch.randn(40, 6)
    soft = layer(entropy_threshold=float("-inf"))
    y, p = soft(x), soft.probabilities(x)
    assert (soft.last_active == 4).all()
    dense = torch.stack([soft.base(row) + soft.delta(w) @ row for row, w in zip(x, p)])  # merged: sum_e p_e B_e A_e
    torch.testing.assert_close(y, dense)
    torch.testing.assert_close(layer(entropy_threshold=float("inf"), top_p=0.0, top_k=4)(x), y)
    first = layer(entropy_threshold=float("inf"), top_p=0.0, top_k=1)
    got, best = first(x), first.probabilities(x).argmax(1)
    want = torch.stack([first.base(row) + first.delta(F.one_hot(e, 4).float()) @ row for row, e in zip(x, best)])
    torch.testing.assert_close(got, want)
    assert (first.last_active == 1).all()
    crossing = layer(entropy_threshold=float("inf"), top_p=0.75, top_k=1)
    used = crossing.choose(torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.8, 0.1, 0.05, 0.05]]))
    assert used.tolist() == [[True, True, False, False], [True, False, False, False]]  # the one that crosses stays
    fresh = DynMoLE(nn.Linear(6, 5))
    assert torch.equal(fresh.eval()(x), fresh.base(x))


@pytest.mark.parametrize("options", [{}, {"top_k": 1}, {"entropy_threshold": -1.0}, {"experts": 1}, {"dispatch": "dense"}])
def test_cost_is_what_the_counter_counts(options):
    m = layer(**{"entropy_threshold": 0.7, **options})
    for x in (torch.randn(3, 50, 6), torch.randn(1, 6), torch.randn(6)):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            m(x)
        assert counter.get_total_flops() == int(m.last_cost.sum())
    one = 2 * 2 * 11
    if "dispatch" not in options:
        m(x := torch.randn(30, 6))
        assert torch.equal(m.last_cost, 60 + (0 if m.router is None else 48) + one * m.last_active)
        assert options or len(m.last_active.unique()) > 1
        alone = torch.cat([m(row[None]) for row in x])  # tokens do not see each other
        torch.testing.assert_close(alone, m(x))
    m(torch.randn(0, 6))
    assert m.last_cost.shape == (0,)


def test_the_layer_picks_the_faster_dispatch_and_charges_for_it():
    small, large = (DynMoLE(nn.Linear(6, 5), experts=8, rank=rank) for rank in (8, 64))
    assert not small.sparse and large.sparse
    one = DynMoLE(nn.Linear(6, 5), experts=1)
    for m in (small, large, one):
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            m(torch.randn(30, 6))
        spent = int(m.last_cost.sum())
        assert counter.get_total_flops() == spent
        m.dispatch = "dense" if m.sparse else "sparse"
        assert int(m.last_cost.sum()) == spent  # of the last call, whatever the next one will run
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for dispatch in ("sparse", "dense"):
            small.dispatch = dispatch
            assert small(torch.randn(9, 6)).shape == (9, 5)


def test_gradients_do_not_depend_on_the_dispatch():
    m, x = layer(entropy_threshold=0.7), torch.randn(30, 6)
    found = []
    for dispatch in ("sparse", "dense"):
        m.dispatch = dispatch
        m.zero_grad()
        (m(x).square().sum() + m.auxiliary(1.0, 1.0)).backward()
        found.append([p.grad.clone() for p in (m.router, m.down, m.up)])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)
    assert m.base.weight.grad is None and not m.base.weight.requires_grad


def test_one_expert_is_lora():
    # peft 0.21: a Linear LoRA layer with these weights, rank 2 and alpha 3, gave these outputs
    base = nn.Linear(3, 2)
    m = DynMoLE(base, experts=1, rank=2, alpha=3, dropout=0.0)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[0.5, -1.0, 2.0], [1.0, 0.0, -0.5]]))
        base.bias.copy_(torch.tensor([0.25, -0.75]))
        m.down.copy_(torch.tensor([[[1.0, 2.0, -1.0], [0.0, 0.5, 3.0]]]))
        m.up.copy_(torch.tensor([[[2.0, -1.0], [0.5, 4.0]]]))
    x = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 0.5, 0.25]])
    want = torch.tensor([[-4.25, 60.25], [-2.5, 3.9375]])
    torch.testing.assert_close(m(x), want)
    torch.testing.assert_close(m.merged()(x), want)
    assert m.router is None and m.last_cost.tolist() == [12 + 20, 12 + 20]
    with pytest.raises(BadInput, match="no one weight matrix"):
        layer().merged()


def test_one_expert_is_lora_of_peft():
    layers = pytest.importorskip("peft.tuners.lora.layer", exc_type=ImportError)
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    base = nn.Linear(12, 7)
    theirs = layers.Linear(base, "default", config=peft.LoraConfig(r=3, lora_alpha=8, lora_dropout=0.0), r=3, lora_alpha=8)
    ours = DynMoLE(copy.deepcopy(base), experts=1, rank=3, alpha=8, dropout=0.0)
    nn.init.normal_(theirs.lora_B["default"].weight)
    with torch.no_grad():
        ours.down[0], ours.up[0] = theirs.lora_A["default"].weight, theirs.lora_B["default"].weight
    x = torch.randn(4, 5, 12)
    torch.testing.assert_close(ours(x), theirs(x), atol=1e-6, rtol=1e-6)
    theirs.merge()
    torch.testing.assert_close(ours.merged()(x), theirs.base_layer(x), atol=1e-6, rtol=1e-6)


def test_auxiliary_loss_by_hand():
    model = nn.Sequential(layer(0), nn.ReLU(), nn.Linear(5, 6), layer(1, entropy_threshold=0.5), layer(2, experts=1))
    model[4] = DynMoLE(nn.Linear(5, 2), experts=1)
    model(torch.randn(20, 6))
    total = 0.0
    for m in (model[0], model[3]):
        p, used = m.last_probabilities, m.last_active
        assert p.shape == (20, 4) and used.shape == (20,)
        chosen = m.choose(p).float()
        total += 1e-2 * ((1 - (p**1.2).sum(1)) / 0.2).mean() + 1e-3 * 4 * (chosen.mean(0) * p.mean(0)).sum()
    torch.testing.assert_close(auxiliary_loss(model), total)
    before = auxiliary_loss(model, 1.0, 0.0)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    x = torch.randn(20, 6)
    for _ in range(30):
        optimizer.zero_grad()
        model(x)
        auxiliary_loss(model, 1.0, 0.0).backward()
        optimizer.step()
    assert auxiliary_loss(model, 1.0, 0.0) < 0.5 * before  # it makes routers decide
    with pytest.raises(BadInput, match="no layer"):
        auxiliary_loss(nn.Linear(2, 2))
    with pytest.raises(BadInput, match="not seen"):
        auxiliary_loss(layer())


def test_a_decoder_gets_experts():
    torch.manual_seed(0)
    decoder, ids = Decoder(11, width=8, heads=2, layers=2, context=6).eval(), torch.randint(11, (3, 6))
    before = {k: v.clone() for k, v in decoder.state_dict().items()}
    tuned = mole_transform(decoder, experts=lambda name: 2 if "layers.0" in name else 4, rank=2).eval()
    torch.testing.assert_close(tuned(ids), decoder(ids))
    assert all(torch.equal(v, before[k]) for k, v in decoder.state_dict().items()) and all(p.requires_grad for p in decoder.parameters())
    layers = {name: m for name, m in tuned.named_modules() if isinstance(m, DynMoLE)}
    assert len(layers) == 12 and layers["layers.0.up"].experts == 2 and layers["layers.1.attention.q"].experts == 4
    assert {n.rpartition(".")[2] for n, p in tuned.named_parameters() if p.requires_grad} == {"router", "down", "up"}
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        tuned(ids)
    with torch.inference_mode(), FlopCounterMode(display=False) as plain:
        decoder(ids)
    ours, theirs = (
        sum(f(m) for m in layers.values()) for f in (lambda m: int(m.last_cost.sum()), lambda m: 2 * 18 * m.base.weight.numel())
    )
    assert counter.get_total_flops() - plain.get_total_flops() == ours - theirs
    shared = nn.Linear(4, 4)
    twice = mole_transform(nn.ModuleDict({"q": shared, "k": shared}))
    assert twice["q"] is twice["k"]


def test_what_cannot_have_experts():
    with pytest.raises(BadInput, match=r"called \['0', '1'\]"):
        mole_transform(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(UnsupportedModel, match=r"q: experts are added to nn\.Linear, this is Conv1d"):
        mole_transform(nn.ModuleDict({"q": nn.Conv1d(2, 2, 1)}))
    with pytest.raises(UnsupportedModel, match="reads its weight"):
        mole_transform(nn.TransformerEncoderLayer(4, 2), ("linear1",))
    for options in ({"experts": 0}, {"rank": 0}, {"top_p": 1.5}, {"top_k": 0}, {"entropic_index": 0.0}, {"dispatch": "all"}):
        with pytest.raises(BadInput):
            DynMoLE(nn.Linear(2, 2), **options)
    with pytest.raises(UnsupportedModel):
        DynMoLE(nn.Conv2d(1, 1, 1))
    with pytest.raises(BadInput, match="expected"):
        layer()(torch.randn(3, 7))
    assert layer()(torch.full((2, 6), math.nan)).isnan().all()
    half = layer().bfloat16()
    assert half.probabilities(torch.randn(3, 6).bfloat16()).dtype == torch.float32
