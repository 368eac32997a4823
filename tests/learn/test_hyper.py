"""Hypernetworks: generated weights are weights, one call for many conditions is the loop, and the initialisations are what they claim."""

import copy
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.rnn import LSTMCell

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.conditions import DataCondition, NoiseCondition, OutputPenalty, TaskEmbedding
from neurarium.learn.hyper import HyperNetwork, Target, cos_sin, mip
from neurarium.learn.hyper_lstm import DynamicHyperLSTMCell
from neurarium.learn.hyper_probes import design, magnitude_probe

OUTPUTS = ("all", "multihead", "components", "chunks")


def mlp(seed=0, **kw):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.ReLU(), nn.Linear(7, 3)).to(**kw)


def cnn():
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.Flatten(), nn.Linear(96, 4)
    )


def transformer():
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


class Tied(nn.Module):
    """One matrix embeds and reads out; a scalar and a buffer besides."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(9, 6), nn.Linear(6, 9)
        self.out.weight = self.embed.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.register_buffer("shift", torch.arange(6.0))

    def forward(self, i):
        return self.out(self.scale * self.embed(i) + self.shift)


TARGETS = {
    "mlp": (mlp, lambda n: torch.randn(n, 5)),
    "cnn": (cnn, lambda n: torch.randn(n, 2, 6, 6)),
    "transformer": (transformer, lambda n: torch.randn(n, 4, 8)),
    "tied": (Tied, lambda n: torch.randint(9, (n, 3))),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", TARGETS)
def test_one_call_for_many_conditions_is_the_loop_over_them(name, output):
    make, inputs = TARGETS[name]
    torch.manual_seed(1)
    net = make()
    hyper = HyperNetwork(net, 2, hidden=(6,), output=output, chunk_size=17, chunk_embedding=3).double()
    c = torch.randn(4, 2, dtype=torch.float64)
    x = torch.stack([inputs(3) for _ in range(4)])
    x = x.double() if x.is_floating_point() else x
    own = dict(net.named_parameters())
    weights = hyper.weights(c)
    assert list(weights) == list(own)
    plain = copy.deepcopy(net).double()
    for i in range(4):
        for key, p in own.items():
            assert weights[key][i].shape == p.shape
        plain.load_state_dict({k: w[i] for k, w in weights.items()}, strict=False)  # written into an ordinary model
        want = plain(x[i])
        torch.testing.assert_close(hyper(c[i], x[i]), want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(hyper.groups(c, x)[i], want, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(hyper(c, x[:, 0])[i], want[0], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("output", OUTPUTS)
def test_without_influence_of_the_condition_it_is_ordinary_training_of_the_target(output):
    net = mlp(dtype=torch.float64)
    hyper = HyperNetwork(net, 2, output=output, chunk_size=9, residual=True, delta_scale=0.0)
    for p in [*hyper.heads.parameters(), *hyper.trunk.parameters()]:
        p.requires_grad_(False)
    x, y, c = torch.randn(12, 5).double(), torch.randint(3, (12,)), torch.randn(2).double()
    pair = [torch.optim.Adam(p, lr=1e-2) for p in (net.parameters(), [hyper.base])]
    for _ in range(5):
        for optimizer, call in zip(pair, (net, partial(hyper, c))):
            optimizer.zero_grad()
            F.cross_entropy(call(x), y).backward()
        torch.testing.assert_close(torch.cat([p.grad.flatten() for p in net.parameters()]), hyper.base.grad, rtol=1e-9, atol=1e-12)
        for optimizer in pair:
            optimizer.step()
    torch.testing.assert_close(net(x), hyper(c, x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("output", ["all", "multihead", "components"])
@pytest.mark.parametrize("encoding", [None, "cos_sin", "z_1mz"])
@pytest.mark.parametrize("init", ["hyperfan_in", "hyperfan_out"])
def test_generated_variance_is_hyperfan(output, encoding, init):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(40, 60), nn.LayerNorm(60), nn.Conv1d(1, 8, 5))
    hyper = HyperNetwork(net, 3, hidden=(64,), output=output, encoding=encoding, init=init, chunk_embedding=16)
    probes = torch.randn(4000, 3) if encoding is None else torch.rand(4000, 3)
    probes = probes[:200] if output == "components" else probes  # whose rows share the map: fewer independent numbers
    with torch.no_grad():
        made = hyper.weights(probes)
    fan = 40 if init == "hyperfan_in" else 60
    assert float(made["0.weight"].square().mean()) == pytest.approx(2 / fan, rel=0.3 if output == "components" else 0.05)
    assert torch.equal(made["1.weight"], torch.ones(len(probes), 60)) and not made["0.bias"].any()


def test_mip_starts_each_predicted_tensor_as_a_layer_of_its_own():
    net = nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 10))
    torch.manual_seed(0)
    hyper = mip(net, 1, hidden=(64,))
    rows = hyper.heads[0].weight.split(list(hyper.sizes.values()))
    for w, (name, size) in zip(rows, hyper.sizes.items()):
        want = 0.0 if name.endswith("bias") else 2 / 1.0001 / size
        assert float(w.detach().var()) == pytest.approx(want, rel=0.05)
    torch.testing.assert_close(hyper.base.data, torch.cat([p.data.flatten() for p in net.parameters()]))
    half = mip(net, 1, hidden=(64,), delta_scale=0.5)
    assert (half.heads[0].weight.std() / hyper.heads[0].weight.std()).item() == pytest.approx(0.5, rel=0.05)


def test_weights_are_proportional_to_the_condition_unless_it_has_constant_norm():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7, bias=False), nn.ReLU(), nn.Linear(7, 3, bias=False))
    conditions = torch.linspace(0.05, 1, 12, dtype=torch.float64)[:, None]
    plain = HyperNetwork(net, 1, hidden=(8, 8)).double()
    c = torch.rand(1, dtype=torch.float64)
    for key, w in plain.weights(c).items():
        torch.testing.assert_close(plain.weights(7 * c)[key], 7 * w, rtol=1e-12, atol=1e-12)
    x, y = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    torch.testing.assert_close(plain(3 * c, x), 9 * plain(c, x), rtol=1e-12, atol=1e-12)  # two layers: the square
    found = magnitude_probe(plain, conditions, (x, y), F.mse_loss)
    assert found.slope == pytest.approx(1, abs=1e-9) and found.correlation == pytest.approx(1, abs=1e-9)
    for kw in ({"encoding": "cos_sin"}, {"residual": True}):
        assert magnitude_probe(HyperNetwork(net, 1, hidden=(8, 8), **kw).double(), conditions).slope < 0.5
    ours = magnitude_probe(mip(net, 1, init="hyperfan_in", delta_scale=0.1).double(), conditions, (x, y), F.mse_loss)
    assert abs(ours.slope) < 0.02 and ours.grad_variance < 0.1 * found.grad_variance
    c = torch.rand(9, 3)
    torch.testing.assert_close(cos_sin(c).norm(dim=1), torch.full((9,), 3**0.5))


def test_the_encoding_warns_outside_its_range():
    hyper = mip(mlp(), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hyper.weights(torch.tensor([1.0]))
    with pytest.warns(UserWarning, match="scale them"):
        hyper.weights(torch.tensor([1.5]))


def test_equals_hyperlight_with_its_parameters():
    hyperlight = pytest.importorskip("hyperlight")
    net = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))
    for encoding, theirs in (("cos_sin", "cos|sin"), (None, None), ("z_1mz", "z|1-z")):
        hyper = mip(net, 2, encoding=encoding)
        peer = hyperlight.HyperNet({"c": (2,)}, hyper.target.shapes, [16, 64, 128], encoding=theirs)
        ours = [m for m in hyper.trunk if isinstance(m, nn.Linear)]
        with torch.no_grad():
            for a, b in zip(ours, [m for m in peer.backbone if isinstance(m, nn.Linear)]):
                a.weight.copy_(b.weight), a.bias.copy_(b.bias)
            hyper.heads[0].weight.copy_(peer.backbone.output.weight), hyper.base.copy_(peer.backbone.output.bias)
        c = torch.rand(4, 2)
        for key, want in peer(c=c).items():
            torch.testing.assert_close(hyper.weights(c)[key], want)


def test_equals_hypnettorch_in_chunks():
    pytest.importorskip("hypnettorch")
    from hypnettorch.hnets import ChunkedHMLP

    net = mlp()
    hyper = HyperNetwork(net, 2, hidden=(10,), output="chunks", chunk_size=16, activation=nn.ReLU)
    shapes = [list(s) for s in hyper.target.shapes.values()]
    peer = ChunkedHMLP(shapes, 16, chunk_emb_size=8, cond_in_size=2, layers=(10,), num_cond_embs=4, verbose=False)
    first, last = peer._hnet.layer_weight_tensors
    with torch.no_grad():
        hyper.trunk[0].weight.copy_(torch.cat([first[:, 8:], first[:, :8]], 1))  # they put the chunk's embedding first
        hyper.trunk[0].bias.copy_(peer._hnet.layer_bias_vectors[0])
        hyper.heads[0].weight.copy_(last), hyper.heads[0].bias.copy_(peer._hnet.layer_bias_vectors[1])
        hyper.embedding.copy_(peer.internal_params[-1])
        hyper.base.zero_()  # they start the scale of a normalisation layer wherever the chunk puts it
    c = torch.randn(4, 2)
    for row, want in enumerate(peer(cond_input=c)):
        for got, w in zip(hyper.weights(c[row]).values(), want):
            torch.testing.assert_close(got, w)


def test_chunks_are_smaller_than_the_target_and_design_says_so():
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    report = design(HyperNetwork(net, 1, hidden=(16,), output="chunks", chunk_size=64))
    assert report.parameters == 16 * 10 + 76 * 8 + 17 * 64 < report.target_parameters / 2 and report.outputs == "in chunks"
    assert "changes" in design(mip(net, 1)).outputs


def test_only_the_named_parameters_are_generated():
    net = mlp()
    hyper = HyperNetwork(Target(net, ["3.*"]), 2, residual=True, delta_scale=0.0)
    assert list(hyper.target.shapes) == ["3.weight", "3.bias"]
    assert {n for n, _ in hyper.target.named_parameters()} == {"module.0.weight", "module.0.bias", "module.1.weight", "module.1.bias"}
    x = torch.randn(3, 5)
    torch.testing.assert_close(hyper(torch.rand(2), x), net(x))
    hyper(torch.rand(3, 2), x).sum().backward()
    assert hyper.target.module[0].weight.grad.any()


def test_the_penalty_holds_what_was_generated_and_is_zero_where_nothing_changed():
    torch.manual_seed(0)
    hyper, tasks = HyperNetwork(mlp(), 4, hidden=(8,)), TaskEmbedding(3, 4)
    penalty = OutputPenalty(hyper, tasks([0, 1]), beta=0.5)
    assert penalty().item() == 0 and OutputPenalty(hyper, tasks([0])[:0], 1.0)().item() == 0
    before = hyper.flat(tasks([0, 1])).detach()
    with torch.no_grad():
        hyper.base.add_(0.1)
        tasks.vectors[0].add_(1.0)  # the penalty keeps a copy: a moved embedding is not its business
    want = 0.5 * (hyper.flat(penalty.conditions) - before).square().sum() / 2
    torch.testing.assert_close(penalty(), want)
    assert want.item() == pytest.approx(0.5 * 0.01 * before.shape[1], rel=1e-4)


def test_conditions():
    tasks = TaskEmbedding(3, 4)
    assert torch.equal(tasks(torch.tensor([2, 0])), torch.stack([tasks(2), tasks(0)]))
    tasks.freeze(1)
    assert [p.requires_grad for p in tasks.parameters()] == [True, False, True]
    draws = NoiseCondition(4).double()(50_000, torch.Generator().manual_seed(0))
    assert draws.dtype == torch.float64 and draws.mean().abs() < 0.01 and (draws.var() - 1).abs() < 0.02
    encoder, x = nn.Linear(5, 4), torch.randn(6, 5)
    torch.testing.assert_close(DataCondition(encoder)(x), DataCondition(encoder)(x[torch.randperm(6)]))
    with pytest.raises(BadInput):
        TaskEmbedding(0, 4)


def test_a_cell_whose_generator_says_nothing_is_an_lstm():
    torch.manual_seed(0)
    cell = DynamicHyperLSTMCell(3, 5, scale=0.0).double()
    plain = LSTMCell(3, 5).double()
    plain.load_state_dict(cell.main.state_dict())
    state, want = None, None
    for x in torch.randn(4, 2, 3).double():
        state, want = cell(x, state), plain(x, want)
        torch.testing.assert_close(state[:2], want)
    with torch.no_grad():
        cell.maps.normal_()
    a, b = cell(x, state)[0], cell(x, (*state[:2], -state[2], state[3]))[0]
    assert (a - b).abs().max() > 1e-3  # the weights of a step depend on the small cell's state


def test_refusals():
    with pytest.raises(UnsupportedModel, match=r"1: keeps running statistics"):
        HyperNetwork(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)), 1)
    with pytest.raises(UnsupportedModel, match="cells"):
        HyperNetwork(nn.LSTM(2, 3), 1)
    with pytest.raises(UnsupportedModel, match="no parameter"):
        HyperNetwork(nn.ReLU(), 1)
    with pytest.raises(UnsupportedModel, match="lazy"):
        HyperNetwork(nn.LazyLinear(3), 1)
    hyper = HyperNetwork(mlp(), 2)
    for bad in (lambda: hyper(torch.rand(3), torch.rand(4, 5)), lambda: hyper(torch.rand(3, 2), torch.rand(4, 5)),
                lambda: hyper.target.call({"0.weight": torch.rand(7, 5)}, torch.rand(1, 5)), lambda: HyperNetwork(mlp(), 2, output="some"),
                lambda: HyperNetwork(mlp(), 0), lambda: HyperNetwork(mlp(), 1, init="zeros"),
                lambda: magnitude_probe(hyper, torch.zeros(4, 2))):  # fmt: skip
        with pytest.raises(BadInput):
            bad()
