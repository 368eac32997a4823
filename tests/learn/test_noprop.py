"""NoProp: the diffusion's algebra, an oracle that must be right, and blocks that do not hear of each other."""

from copy import deepcopy
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.utils.data import DataLoader

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import evaluate
from neurarium.learn.local import gradient_alignment
from neurarium.learn.noprop import NoProp, NoPropCTNet, NoPropFMNet, NoPropNet, class_medoids, posterior, prior
from neurarium.meter import SavedBytes

X, Y = (torch.tensor(a) for a in load_digits(return_X_y=True))
TRAIN, VAL = TensorData(X.float() / 16, Y).split(1200, seed=0)
VALID = VAL.batches(300, shuffle=False)
BATCH = TRAIN[:48]


def encoder():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU())


def net(kind=NoPropNet, seed=0, make=encoder, **options):
    torch.manual_seed(seed)
    return kind(make, 10, TRAIN.x[:2], hidden=32, **options)


def test_the_posterior_keeps_the_marginals():
    abar = net(steps=6).abar
    for before, after in pairwise(abar):
        a, b, c = posterior(before, after)
        torch.testing.assert_close(a + b * before.sqrt(), after.sqrt())
        torch.testing.assert_close(c + b**2 * (1 - before), 1 - after)
    generator = torch.Generator().manual_seed(0)
    u, draw = 0.7, lambda: torch.randn(50_000, generator=generator)
    z = abar[0].sqrt() * u + (1 - abar[0]).sqrt() * draw()
    for t in range(6):
        a, b, c = posterior(abar[t], abar[t + 1])
        z = a * u + b * z + c.sqrt() * draw()
        assert float(z.mean()) == pytest.approx(float(abar[t + 1].sqrt() * u), abs=0.02)
        assert float(z.var()) == pytest.approx(float(1 - abar[t + 1]), rel=0.03)


def test_noise_falls_and_the_weights_telescope():
    model = net(steps=7)
    snr = model.abar / (1 - model.abar)
    assert (snr.diff() > 0).all()
    assert sum(float(model.weight(t)) for t in range(7)) == pytest.approx(7 / 2 * float(snr[-1] - snr[0]), rel=1e-5)


def test_the_prior_term_is_the_divergence_of_two_normals():
    u, abar = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)), torch.tensor(0.3)
    q = torch.distributions.Normal(abar.sqrt() * u, (1 - abar).sqrt())
    want = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(1).mean()
    torch.testing.assert_close(prior(u, abar), want)


class Oracle(nn.Module):
    """Knows the label: its class probabilities (or its velocity) are exact."""

    def __init__(self, model, y):
        super().__init__()
        self.model, self.y = (model,), y

    def features(self, x):
        return x

    def joined(self, z, features, time=None):
        (model,) = self.model
        if isinstance(model, NoPropFMNet):
            return (model.embedding[self.y] - z) / (1 - time)
        return 50.0 * F.one_hot(self.y, 10).float()

    def forward(self, z, x, time=None):
        return self.joined(z, x, time)


@pytest.mark.parametrize("kind", [NoPropNet, NoPropCTNet, NoPropFMNet])
@pytest.mark.parametrize("embed", ["onehot", 20])
def test_with_a_block_that_knows_the_label_every_prediction_is_right(kind, embed):
    model = net(kind, embed=embed, steps=10).eval()
    model.blocks = nn.ModuleList(Oracle(model, VAL.y) for _ in model.blocks)
    with torch.no_grad():
        assert float((model(VAL.x).argmax(1) == VAL.y).float().mean()) > 0.99


def test_blocks_train_alone():
    model = net(steps=3)
    before = deepcopy(model.state_dict())
    one = NoProp(order="sampled")
    one.fit(model, [BATCH], epochs=1, seed=5)  # one pass of three batches for blocks drawn at random
    moved = {n.split(".")[1] for n, p in model.named_parameters() if n.startswith("blocks") and not torch.equal(p, before[n])}
    single = net(steps=3)
    single.loss(1, *BATCH, 0.1)[0].backward()
    touched = {n.split(".")[1] for n, p in single.named_parameters() if n.startswith("blocks") and p.grad is not None}
    assert touched == {"1"} and 1 <= len(moved) <= 3

    for order in ("sweep", "parallel"):  # other blocks may be anything
        plain, disturbed = net(steps=3), net(steps=3)
        with torch.no_grad():
            for block in (disturbed.blocks[0], disturbed.blocks[2]):
                for p in block.parameters():
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        for m in (plain, disturbed):
            NoProp(order=order).fit(m, TRAIN.batches(200), epochs=1)
        for a, b in zip(plain.blocks[1].parameters(), disturbed.blocks[1].parameters()):
            assert torch.equal(a, b)


def test_a_step_keeps_one_block_whatever_their_number():
    def kept(steps):
        with SavedBytes() as meter:
            NoProp().fit(net(steps=steps), [BATCH], epochs=1)
        return meter.peak

    assert kept(6) <= 1.1 * kept(1)


def test_one_block_in_discrete_time_has_the_gradient_written_out():
    model = net(steps=1).double().eval()
    x, y = BATCH[0].double(), BATCH[1]
    torch.manual_seed(3)
    model.loss(0, x, y, 0.1)[0].backward()
    found = model.blocks[0].out.weight.grad.clone()
    torch.manual_seed(3)
    u = torch.eye(10, dtype=torch.float64)[y]
    z = model.abar[0].sqrt() * u + (1 - model.abar[0]).sqrt() * torch.randn_like(u)
    block = model.blocks[0]
    last = {}
    handle = block.out.register_forward_hook(lambda m, i, o: last.update(h=i[0].detach()))
    p = block(z, x).softmax(1).detach()
    handle.remove()
    snr = model.abar / (1 - model.abar)
    error = p - u
    logits_gradient = 2 * p * (error - (error * p).sum(1, keepdim=True)) / len(x)
    torch.testing.assert_close(found, 0.1 * 0.5 * (snr[1] - snr[0]) * logits_gradient.T @ last["h"])


def test_the_learned_schedule_rises_between_its_ends_and_knows_its_slope():
    schedule = net(NoPropCTNet).schedule.double()
    with torch.no_grad():
        for p in schedule.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(2)))
    t = torch.linspace(0, 1, 50, dtype=torch.float64)[:, None].requires_grad_()
    abar, rate = schedule(t)
    assert (abar.diff(dim=0) > 0).all()
    assert [float(v) for v in abar[[0, -1]].detach()] == pytest.approx([0.001, 0.99], rel=1e-4)
    (slope,) = torch.autograd.grad((abar / (1 - abar)).sum(), t)
    torch.testing.assert_close(rate, slope)


def test_flow_matching_learns_the_exact_velocity_between_two_points_of_known_law():
    """Two classes at +-1 in one dimension and inputs that say nothing: the best velocity is (E[u|z_t] - z_t) / (1 - t)."""
    torch.manual_seed(0)
    x, y = torch.zeros(512, 1), torch.arange(512) % 2
    model = NoPropFMNet(nn.Identity, 2, x[:2], embed=torch.tensor([[-1.0], [1.0]]), hidden=64)
    model.embedding.requires_grad_(False)
    NoProp(optimizer=partial(torch.optim.Adam, lr=3e-3)).fit(model, [(x, y)], epochs=300)
    t = 0.5
    z = torch.linspace(-1, 1, 9)[:, None]
    with torch.no_grad():
        found = model.blocks[0](z, torch.zeros(9, 1), torch.full((9, 1), t))
    weight = torch.tanh(z * t / (1 - t) ** 2)  # E[u|z] of two equal normals at +-t with deviation 1 - t
    want = (weight - z) / (1 - t)
    assert float((found - want).abs().mean()) < 0.2, (found.T, want.T)


@pytest.mark.parametrize("kind, epochs, least", [(NoPropNet, 3, 0.75), (NoPropCTNet, 5, 0.3), (NoPropFMNet, 10, 0.55)])
def test_every_variant_learns(kind, epochs, least):
    model = net(kind, **({"steps": 4} if kind is NoPropNet else {"steps": 30}))
    NoProp(optimizer=partial(AdamW, lr=3e-3)).fit(model, TRAIN.batches(32), epochs=epochs)
    assert evaluate(model, VALID)["accuracy"] > least


def test_learned_embeddings_and_image_prototypes():
    medoids = class_medoids(*TRAIN[:])
    assert medoids.shape == (10, 64)
    own = TRAIN.x[TRAIN.y == 3]
    distances = np.linalg.norm(own.numpy()[:, None] - own.numpy()[None], axis=2).sum(1)
    torch.testing.assert_close(medoids[3], own[int(distances.argmin())])
    for embed in (20, medoids):
        model = net(steps=3, embed=embed)
        start = model.embedding.detach().clone()
        NoProp().fit(model, TRAIN.batches(32), epochs=2)
        assert not torch.equal(model.embedding, start)
        assert float(torch.pdist(model.embedding.detach()).min()) > 0.3 * float(torch.pdist(start).min())  # they do not fall together
        assert evaluate(model, VALID)["accuracy"] > 0.3


def test_the_encoder_is_the_users_own():
    def convolutional():
        return nn.Sequential(nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2))

    def attention():
        return nn.Sequential(nn.Unflatten(1, (8, 8)), nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True))

    for make in (convolutional, attention):
        model = net(steps=2, make=make)
        NoProp().fit(model, TRAIN.batches(64), epochs=4)
        assert evaluate(model, VALID)["accuracy"] > 0.6


def test_predictions_are_repeatable_and_the_generator_decides():
    model = net(steps=3).eval()
    with torch.no_grad():
        one, two = model(BATCH[0]), model(BATCH[0])
        other = model(BATCH[0], generator=torch.Generator().manual_seed(7))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_alignment_is_measured_block_by_block():
    found = gradient_alignment(NoProp(), net(steps=2), BATCH)
    assert any(abs(v) > 0.05 for n, v in found.items() if n.startswith("blocks.0") and v == v)
    assert len(found) > 10


@pytest.mark.parametrize("order", ["sweep", "sampled", "parallel"])
def test_resuming_is_seamless_with_a_dataloader(order):
    def loader():
        return DataLoader(TensorData(*TRAIN[:200]), 50, shuffle=True, generator=torch.Generator().manual_seed(3))

    rule, whole, parts = NoProp(order=order), net(steps=2), net(steps=2)
    rule.fit(whole, loader(), epochs=3)
    half = rule.fit(parts, loader(), epochs=1)
    rule.fit(parts, loader(), epochs=3, resume=half.state)
    for a, b in zip(whole.state_dict().values(), parts.state_dict().values()):
        assert torch.equal(a, b)


def test_refusals():
    with pytest.raises(UnsupportedModel, match="NoPropNet"):
        NoProp().fit(nn.Sequential(nn.Linear(64, 10)), [BATCH], epochs=1)
    for wrong in (lambda: NoProp(order="up").fit(net(), [BATCH], epochs=1), lambda: net(steps=0), lambda: net(embed="cube"),
                  lambda: net(embed=torch.zeros(3, 4)), lambda: net(steps=3)(BATCH[0], steps=5),
                  lambda: NoProp().fit(net(), [(BATCH[0][:, :60], BATCH[1])], epochs=1),
                  lambda: NoProp().fit(net(), [(BATCH[0], BATCH[1] + 3)], epochs=1),
                  lambda: class_medoids(BATCH[0], BATCH[1] * 2)):  # fmt: skip
        with pytest.raises(BadInput):
            wrong()
