"""HoT and H2OT: which frames stay, and how all of them come back."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium import data
from neurarium.dynamic.backbones import VisionTransformerS
from neurarium.dynamic.pose import VideoPoseTransformer, mpjpe, pose_loss
from neurarium.dynamic.tokens import TokenRecoveringAttention, dpc_knn, hourglass, interpolate, kept_frames, prune_tokens
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import flops

FRAMES, JOINTS = 12, 3


def host(joint_tokens: bool = False, depth: int = 3, dim: int = 8) -> VideoPoseTransformer:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return VideoPoseTransformer(FRAMES, JOINTS, dim, depth, 2, joint_tokens=joint_tokens).eval()


@pytest.fixture(scope="module")
def x():
    return torch.randn(4, FRAMES, JOINTS, 2, generator=torch.Generator().manual_seed(1))


def by_loops(x: np.ndarray, n: int, k: int, tie: np.ndarray) -> list[int]:
    """One row's centres, from the definition."""
    tokens, width = x.shape
    d = [[float(np.linalg.norm(x[i] - x[j])) / width**0.5 for j in range(tokens)] for i in range(tokens)]
    density = [np.exp(-np.mean([v**2 for v in sorted(d[i])[:k]])) + 1e-6 * tie[i] for i in range(tokens)]
    score = []
    for i in range(tokens):
        denser = [d[i][j] for j in range(tokens) if density[j] > density[i]]
        score.append(density[i] * (min(denser) if denser else max(max(row) for row in d)))
    return sorted(sorted(range(tokens), key=lambda i: -score[i])[:n])


@pytest.mark.parametrize(("n", "k"), [(1, 2), (4, 2), (6, 5), (15, 3)])
def test_centres_are_those_of_the_definition(n, k):
    x = torch.randn(5, 15, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    tie = torch.rand(15, generator=torch.Generator().manual_seed(7))
    got = dpc_knn(x, n, k, torch.Generator().manual_seed(7))
    for row, index in zip(x, got):
        assert index.tolist() == by_loops(row.numpy(), n, k, tie.numpy())
    assert n < 15 or torch.equal(got, torch.arange(15).expand(5, -1))  # keeping all is the identity


def test_three_blobs_have_a_centre_each():
    g = torch.Generator().manual_seed(0)
    blob = torch.tensor([0, 1, 2, 1, 0, 2, 0, 1, 2, 2])
    x = (10 * torch.eye(3)[blob] + 0.1 * torch.randn(10, 3, generator=g))[None]
    assert sorted(blob[dpc_knn(x, 3)[0]].tolist()) == [0, 1, 2]


def test_frames_in_another_order_are_the_same_choice():
    x = torch.randn(1, 15, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    order = torch.randperm(15, generator=torch.Generator().manual_seed(4))
    # with k = 2 two frames that are each other's nearest tie, and the place in the sequence decides
    assert sorted(order[dpc_knn(x[:, order], 5, 3)[0]].tolist()) == dpc_knn(x, 5, 3)[0].tolist()


def test_recovering_attention_is_torch_attention():
    torch.manual_seed(0)
    layer = TokenRecoveringAttention(FRAMES, 8, 2, torch.randn(FRAMES, 8)).double()
    assert torch.allclose(layer(torch.zeros(1, 5, 8).double())[0], layer.queries)  # it starts from the queries and kept tokens
    for p in layer.parameters():
        nn.init.normal_(p)
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    weights = torch.cat([m.weight for m in (layer.q, layer.k, layer.v)]), torch.cat([m.bias for m in (layer.q, layer.k, layer.v)])
    queries = layer.queries[:, None].expand(-1, 3, -1)
    want, _ = F.multi_head_attention_forward(
        queries, x.transpose(0, 1), x.transpose(0, 1), 8, 2, *weights, None, None, False, 0.0, layer.out.weight, layer.out.bias
    )
    assert torch.allclose(layer(x), (queries + want).transpose(0, 1))
    joints = torch.stack([x, 2 * x], 2)  # (n, m, joints, dim): every joint alone
    assert torch.allclose(layer(joints)[:, :, 1], layer(2 * x))


def test_interpolation_is_numpys():
    g = torch.Generator().manual_seed(0)
    index = torch.stack([torch.randperm(20, generator=g)[:6].sort().values for _ in range(4)])
    values = torch.randn(4, 6, 3, 2, dtype=torch.float64, generator=g)
    got = interpolate(values, index, 20)
    for row in range(4):
        for c in np.ndindex(3, 2):
            assert np.allclose(got[row, :, *c], np.interp(np.arange(20), index[row], values[row, :, *c]))
    assert torch.equal(interpolate(values[:, :1], index[:, :1], 20), values[:, :1].expand(-1, 20, -1, -1))  # one frame: constant


class Plain(nn.Module):
    """A user's own host whose blocks do nothing."""

    def __init__(self, frames: int, depth: int = 3) -> None:
        super().__init__()
        self.frames, self.blocks, self.head = frames, nn.ModuleList(nn.Identity() for _ in range(depth)), nn.Linear(2, 2)
        nn.init.eye_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Swap(nn.Module):
    """Puts the frames where nobody looks for them."""

    def forward(self, x):
        return x.transpose(0, 1)


@pytest.mark.parametrize("prune", ["uniform", "motion", "random"])
def test_a_signal_linear_in_time_comes_back(prune):
    """With the outermost frames kept; and a piecewise linear one at its knots."""
    t = torch.arange(20.0)
    x = torch.stack([0.5 * t - 3, t.clone()], 1)[None]
    thin = hourglass(Plain(20), keep=[9, 5], at=[1, 2], prune=prune, recover="interpolate", always=[0, 19])
    assert torch.allclose(thin(x), x, atol=1e-5)
    knots = kept_frames(hourglass(Plain(20), keep=[9, 5], at=[1, 2], prune="uniform"), x)
    bent = torch.from_numpy(np.interp(t, knots[0], [0.0, 3, -1, 4, 2])).float()
    x = torch.stack([bent, bent], 1)[None]
    thin = hourglass(Plain(20), keep=[9, 5], at=[1, 2], prune="uniform", recover="interpolate")
    assert torch.allclose(thin(x), x, atol=1e-5)


@pytest.mark.parametrize("prune", ["cluster", "uniform", "motion", "attention", "random"])
def test_the_path_is_what_masks_would_keep(prune, x):
    """The numbers carried along equal those found by following a token that is its own frame number."""
    marked = hourglass(host(depth=4), keep=[9, 6, 4], at=[1, 2, 3], prune=prune, recover="none", always=[5])
    seen = []

    class Spy(nn.Module):
        def __init__(self, cut):
            super().__init__()
            self.cut = cut

        def forward(self, tokens):
            before = self.cut.route.index if len(self.cut.keeps) > 1 else torch.arange(FRAMES).expand(len(tokens), -1)
            out = self.cut(tokens)
            alive = torch.zeros(len(tokens), FRAMES, dtype=torch.bool).scatter(1, self.cut.route.index, True)
            assert (alive <= torch.zeros_like(alive).scatter(1, before, True)).all()  # nobody comes back
            assert alive.sum(1).eq(self.cut.keeps[-1]).all() and alive[:, 5].all()
            seen.append(self.cut.route.index)
            return out

    for i in range(3):
        marked.blocks[i] = Spy(marked.blocks[i])
    with torch.no_grad():
        marked(x)
    assert [s.shape[1] for s in seen] == [9, 6, 4]
    assert all((s.diff(dim=1) > 0).all() for s in seen)  # in the order of time


def test_kept_tokens_go_on_unchanged(x):
    """A cut is a gather: what the next block sees are tokens of the block before, not averages."""
    model = host()
    thin = hourglass(model, keep=5, at=2, recover="none")
    seen, full = [], []
    thin.blocks[2].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    model.blocks[2].register_forward_pre_hook(lambda _, inputs: full.append(inputs[0]))
    with torch.no_grad():
        model(x)
        with pytest.raises(RuntimeError):
            thin(x).view(4, FRAMES, -1)  # nothing recovers: five frames
        index = kept_frames(thin, x)
    assert torch.equal(seen[0], full[0].gather(1, index[:, :, None].expand(-1, -1, 8)))
    assert torch.equal(index, dpc_knn(full[0], 5))


def test_motion_keeps_the_start_and_the_changes():
    t = torch.zeros(1, 10, 2)
    t[:, 3:] += 1
    t[:, 7:] += 5
    assert kept_frames(hourglass(Plain(10), keep=3, at=1, prune="motion"), t).tolist() == [[0, 3, 7]]


def test_attention_keeps_what_is_looked_at(x):
    model = host(depth=2)
    attention = model.blocks[0].attention
    weights = []
    attention.v.register_forward_pre_hook(lambda _, inputs: weights.append(inputs[0]))
    with torch.no_grad():
        index = kept_frames(hourglass(model, keep=4, at=1, prune="attention"), x)
        model(x)
        q, k = (m(weights[-1]).unflatten(2, (2, 4)).transpose(1, 2) for m in (attention.q, attention.k))
        received = (q @ k.transpose(2, 3) / 2).softmax(-1).sum((1, 2))
    assert torch.equal(index, received.topk(4).indices.sort().values)


def test_a_list_of_one_is_hot(x):
    a, b = hourglass(host(), keep=5, at=1), hourglass(host(), keep=[5], at=[1])
    assert torch.equal(a(x), b(x))


def test_keeping_all_frames_is_the_host(x):
    for joint_tokens in (False, True):
        model = host(joint_tokens)
        for prune in ("cluster", "uniform", "motion", "attention"):
            whole = hourglass(model, keep=FRAMES, at=1, prune=prune, recover="interpolate")
            assert torch.allclose(whole(x), model(x), atol=1e-6)


def test_flops_are_the_closed_form(x):
    """Blocks of 16 n d^2 + 4 n^2 d, clusters, and the recovering attention are all in the count."""
    d, m = 8, 5

    def block(n):
        return 16 * n * d * d + 4 * n * n * d

    ends = 2 * FRAMES * 2 * JOINTS * d, 2 * d * 3 * JOINTS  # embedding; head a frame
    assert flops(host(), x[:1]) == ends[0] + 3 * block(FRAMES) + FRAMES * ends[1]
    hot = hourglass(host(), keep=m, at=1, heads=2)
    clusters, attention = 2 * FRAMES**2 * d, 4 * (FRAMES + m) * d * d + 4 * FRAMES * m * d
    assert flops(hot, x[:1]) == ends[0] + block(FRAMES) + clusters + 2 * block(m) + attention + FRAMES * ends[1]
    light = hourglass(host(), keep=m, at=1, prune="uniform", recover="interpolate")
    assert flops(light, x[:1]) == ends[0] + block(FRAMES) + 2 * block(m) + m * ends[1]


def test_a_token_a_joint(x):
    model = host(joint_tokens=True)
    for recover in ("attention", "interpolate", "nearest"):
        thin = hourglass(model, keep=[6, 4], at=[1, 2], prune="attention", recover=recover, heads=2, example=x)
        assert thin(x).shape == model(x).shape
    flat = copy.deepcopy(thin)
    flat.double()(x.double()).sum().backward()
    assert all(p.grad is not None for p in flat.parameters() if p.requires_grad)


def test_the_pooling_head_of_a_classifier():
    torch.manual_seed(0)
    model, images = VisionTransformerS(image=8, width=8, depth=3, heads=2).eval(), torch.randn(3, 1, 8, 8)
    for prune in ("cluster", "attention", "uniform"):
        thin = prune_tokens(model, keep=[3, 2], at=[1, 2], prune=prune, example=images)
        assert thin(images).shape == (3, 10) and flops(thin, images) < flops(model, images)
        assert {k.replace("block.", "").replace("layer.", "") for k in thin.state_dict()} == set(model.state_dict())
    assert torch.allclose(prune_tokens(model, keep=4, at=1)(images), model(images), atol=1e-6)
    first = prune_tokens(model, keep=1, at=0, prune="uniform", always=[0])
    assert kept_frames(first, images).tolist() == [[0]] * 3


@pytest.mark.parametrize(
    ("error", "options"),
    [
        (BadInput, {"keep": [6, 6], "at": [1, 2]}),
        (BadInput, {"keep": [4, 6], "at": [1, 2]}),
        (BadInput, {"keep": [6, 4], "at": [2, 2]}),
        (BadInput, {"keep": [6, 4], "at": [1]}),
        (BadInput, {"keep": 13, "at": 1}),
        (BadInput, {"keep": 0, "at": 1}),
        (BadInput, {"keep": 5, "at": 4}),
        (BadInput, {"keep": 5, "at": 0, "prune": "attention"}),
        (BadInput, {"keep": 5, "at": 1, "prune": "best"}),
        (BadInput, {"keep": 5, "at": 1, "recover": "all"}),
        (BadInput, {"keep": 5, "at": 1, "recover": "attention", "heads": 3}),
        (BadInput, {"keep": 5, "at": 1, "always": [12]}),
    ],
)
def test_bad_settings_are_refused(error, options):
    with pytest.raises(error):
        hourglass(host(), **options)


def test_other_models_are_refused_by_name(x):
    headless, loose, mixed = Plain(5), Plain(5), Plain(5)
    headless.head = None
    del loose.blocks
    loose.blocks = [nn.Identity()]
    mixed.blocks[0] = Swap()
    frameless = Plain(5)
    del frameless.frames
    for model in (headless, loose, frameless, nn.Linear(2, 2), hourglass(Plain(5), keep=3, at=1)):
        with pytest.raises(UnsupportedModel):
            hourglass(model, keep=2, at=1)
    with pytest.raises(UnsupportedModel, match=r"blocks\.0"):
        hourglass(Plain(5), keep=2, at=1, prune="attention")
    for model in (mixed, Plain(4)):  # a block that changes tokens; more tokens than there are frames
        with pytest.raises(UnsupportedModel, match=r"blocks\.0"):
            hourglass(model, keep=2, at=1, example=torch.zeros(1, 5, 2))
    with pytest.raises(BadInput):
        dpc_knn(torch.full((1, 4, 2), torch.nan), 2)
    with pytest.raises(BadInput):
        host()(x[:, :5])


def test_poses_are_seeded_and_redundant():
    a, b = data.pose_sequences(25, 5, frames=40, seed=3), data.pose_sequences(21, 5, frames=40, seed=3)
    assert torch.equal(a.train.x[:21], b.train.x) and torch.equal(a.test.y, b.test.y)
    assert not torch.equal(a.train.y[:5], a.test.y)
    assert a.train.y[:, :, 0].abs().max() == 0  # relative to the root
    step = a.train.y.diff(dim=1).norm(dim=-1).mean(-1)
    fast = a.train_speed[:, 1:] > 1
    assert step[fast].mean() > 10 * step[~fast].mean()
    exact = data.pose_sequences(25, 5, frames=40, seed=3, noise=0)
    assert torch.allclose(exact.train.x, 4 * a.train.y[..., :2] / (4 - a.train.y[..., 2:]))
    moves = exact.train.y - exact.train.y.mean((0, 1))
    for turned in (data.pose_sequences(1, 1, frames=40, seed=3).train.y,):  # one sequence: five oscillators, one camera
        values = torch.linalg.svdvals((turned - turned.mean(1, keepdim=True))[0].flatten(1).double())
        assert values[5] < 1e-5 * values[0]
    assert moves.abs().max() < 3
    with pytest.raises(BadInput):
        data.pose_sequences(0, 1)


def test_losses():
    y = torch.randn(2, 4, 3, 3)
    assert mpjpe(y + torch.tensor([3.0, 4.0, 0.0]), y).item() == pytest.approx(5)
    assert pose_loss(y + 1, y).item() == pytest.approx(3**0.5)  # a constant shift has no wrong speed
    with pytest.raises(BadInput):
        mpjpe(y, y[:1])
