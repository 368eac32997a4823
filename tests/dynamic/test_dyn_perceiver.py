"""Dyn-Perceiver: attention, what runs when, readouts, loss, errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from neurarium.dynamic.compile import split
from neurarium.dynamic.exits import EarlyExit
from neurarium.dynamic.gates import MaxProb
from neurarium.dynamic.perceiver import CrossAttentionLayer, DistilledExit, DynPerceiver, _Between, distilled_loss
from neurarium.dynamic.train import fit_policy
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.testing.examples.dynamic.exits import _batch
from neurarium.testing.examples.dynamic.perceiver import _policy
from neurarium.testing.exits import check_loss

CHANNELS = (4, 6, 8, 8)


def stages() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Conv2d(a, b, 3, s, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
        for a, b, s in zip(CHANNELS, CHANNELS[1:], (1, 2, 1))
    ]


def network(**options) -> DynPerceiver:
    torch.manual_seed(0)
    return DynPerceiver(stages(), CHANNELS, num_classes=3, stem=nn.Conv2d(1, 4, 3, 1, 1), **{"latents": 8, "pool": 3, **options}).eval()


@pytest.mark.parametrize("distil", [0.0, 0.5])
def test_the_loss_reaches_everything(distil):
    check_loss(DistilledExit(network(), distil=distil).train(), *_batch(24, 3), steps=range(1))


@pytest.mark.parametrize("heads", [1, 2])
def test_cross_attention_is_attention_with_a_bias_on_the_keys(heads):
    torch.manual_seed(0)
    layer = CrossAttentionLayer(6, 5, width=4, heads=heads, positions=9).double()
    nn.init.normal_(layer.bias)
    q, kv = torch.randn(3, 7, 6, dtype=torch.float64), torch.randn(3, 9, 5, dtype=torch.float64)
    n = F.layer_norm(kv, (5,), layer.norm_kv.weight, layer.norm_kv.bias)
    m = F.layer_norm(q, (6,), layer.norm_q.weight, layer.norm_q.bias)
    keys = n @ layer.k.weight.T + layer.bias  # the bias of a position belongs to its key
    parts = [t.view(3, -1, heads, 4 // heads).transpose(1, 2) for t in (layer.q(m), keys, layer.v(n))]
    want = q + layer.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(3, 7, 4))
    torch.testing.assert_close(layer(q, kv), want + layer.mlp(want))
    assert not torch.allclose(layer(q, kv), layer(q, kv.flip(1)))  # positions matter
    nn.init.zeros_(layer.bias)
    torch.testing.assert_close(layer(q, kv), layer(q, kv.flip(1)))


def test_without_reading_and_hints_readout_3_is_the_plain_network():
    net, (x, _) = network(x2z=False, z2x=False), _batch(5, 0)
    h = net.stem(x)
    for stage in net.stages:
        h = stage(h)
    torch.testing.assert_close(EarlyExit(net).outputs(x)[2], net.heads[2](h.mean((2, 3), keepdim=True).flatten(1)))


@pytest.mark.parametrize("exits", [0, 1, 2])
def test_an_exit_runs_only_what_comes_before_it(exits):
    net, (x, y) = network(), _batch(6, 0)
    state, last = net.start(x), len(net.stages) - 1
    for k in range(exits + 1):
        state, out = net.stage(k, state)
    F.cross_entropy(out, y).backward()
    later = net.stages[last - 1 + exits :]
    assert all(p.grad is None for p in later.parameters())
    assert any(p.grad is not None and p.grad.any() for p in net.stages[last - 2 + exits].parameters())
    policy = EarlyExit(net)
    policy.costs(x)
    policy.tau.fill_(2.0)[exits] = -1.0
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        policy.decide(x)
    names = "".join(counter.get_flop_counts())
    ran = [any(f"stages.{i}" in name for name in names.split("DynPerceiver")) for i in range(last + 1)]
    assert counter.get_total_flops() == 6 * policy.costs(x).total[exits]
    assert not any(ran[last - 1 + exits :])


def test_the_token_mixer_mixes_tokens():
    torch.manual_seed(0)
    mix, z = _Between(6, 3, 4, 4).double(), torch.randn(2, 6, 4, dtype=torch.float64)
    mix.expand = nn.Identity()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(mix(z)[..., order], mix(z[..., order]))  # channels are treated alike
    assert not torch.allclose(mix(z), mix(z[:, torch.tensor([1, 0, 2, 3, 4, 5])]))
    assert mix(z).shape == (2, 3, 4)


def test_hints_and_reading_connect_the_branches():
    x, _ = _batch(4, 0)
    for options, depends in (({}, True), ({"z2x": False}, False)):
        net = network(**options)
        before = EarlyExit(net).outputs(x)
        nn.init.normal_(net.latent)
        after = EarlyExit(net).outputs(x)
        assert not torch.equal(before[0], after[0]) and torch.equal(before[2], after[2]) == (not depends)
    blind = EarlyExit(network(x2z=False)).outputs(x)
    assert torch.equal(blind[0][:1].expand(4, -1), blind[0])  # tokens that read nothing say the same of all rows


def test_the_first_answer_is_reused():
    x, _ = _batch(4, 0)
    for reuse in (True, False):
        net = network(reuse=reuse)
        before = EarlyExit(net).outputs(x)
        nn.init.normal_(net.heads[0].bias, std=5)
        after = EarlyExit(net).outputs(x)
        assert [torch.equal(a, b) for a, b in zip(before, after)] == [False, not reuse, True, not reuse]


def test_loss_by_hand():
    torch.manual_seed(0)
    readouts, y = [torch.randn(5, 3, dtype=torch.float64, requires_grad=True) for _ in range(3)], torch.tensor([0, 1, 2, 0, 1])
    want = sum(w * F.cross_entropy(r, y) for w, r in zip((0.5, 0.25, 1), readouts))
    teacher = (readouts[-1] / 2).softmax(1).detach()
    for r in readouts[:-1]:
        want = want + 0.3 * 4 * (teacher * (teacher.log() - (r / 2).log_softmax(1))).sum(1).mean()
    got = distilled_loss(readouts, y, (0.5, 0.25, 1), 0.3, 2.0)
    torch.testing.assert_close(got, want)
    alone = torch.autograd.grad(F.cross_entropy(readouts[-1], y), readouts[-1])[0]
    torch.testing.assert_close(torch.autograd.grad(got, readouts[-1])[0], alone)  # the teacher learns nothing from its pupils


def test_trains_and_any_size_of_map_works():
    data = [_batch(32, s) for s in range(6)]
    torch.manual_seed(0)
    policy = _policy()
    fit_policy(policy, data, epochs=8, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-2))
    x, y = _batch(200, 9)
    with torch.no_grad():
        right = [(out.argmax(1) == y).double().mean().item() for out in policy.eval().outputs(x)]
    assert min(right) > 0.8, right
    assert policy.decide(torch.randn(3, 1, 11, 9)).output.shape == (3, 3)


@pytest.mark.parametrize("depth", [2, 5])
def test_other_depths_and_the_compiled_form(depth):
    torch.manual_seed(0)
    net = DynPerceiver([nn.Conv2d(3, 3, 3, padding=1) for _ in range(depth)], [3] * (depth + 1), num_classes=4, latents=2, pool=2).double()
    policy, x = EarlyExit(net, MaxProb(), threshold=0.3).eval(), torch.randn(5, 3, 6, 6, dtype=torch.float64)
    out = policy.decide(x)
    assert out.output.dtype == torch.float64
    if depth == 2:
        program = split(policy, x).decide(x)
        assert torch.equal(program.choice, out.choice) and torch.equal(program.cost, out.cost)
        torch.testing.assert_close(program.output, out.output)


@pytest.mark.parametrize(
    "call",
    [
        lambda: DynPerceiver([nn.Identity()], (4, 4), num_classes=3),
        lambda: DynPerceiver(stages(), CHANNELS[:-1], num_classes=3),
        lambda: network(latents=0),
        lambda: network(blocks=()),
        lambda: network(latent_dim=0),
        lambda: DistilledExit(network(), weights=(1.0, 1.0)),
        lambda: DistilledExit(network(), temperature=0.0),
        lambda: DistilledExit(network()).loss(_batch(4, 0)[0], torch.tensor([0, 1, 2, 3])),
        lambda: DistilledExit(network()).train().loss(*_batch(1, 0)),
        lambda: EarlyExit(network()).decide(torch.full((2, 1, 8, 8), float("nan"))),
        lambda: EarlyExit(network()).decide(torch.zeros(0, 1, 8, 8)),
        lambda: CrossAttentionLayer(4, 4, width=5, heads=2),
    ],
)
def test_bad_input_is_refused(call):
    with pytest.raises(BadInput):
        call()


def test_other_modules_are_refused():
    with pytest.raises(UnsupportedModel):
        DistilledExit(nn.Linear(2, 2))
