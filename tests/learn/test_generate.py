"""Weights as tokens: the way there and back is exact, codes are learned, and the sampler writes what the grammar says."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.data import TensorData
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.generate import IGPG, TaskConditioner, WeightGPT
from neurarium.learn.weight_tokens import GumbelVQ, WeightTokenizer
from neurarium.learn.zoo import Instruction, ZooNet, accuracies, model_zoo, train_many


def net():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5))


def mlp(inputs=4, hidden=6):
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, 3))


def blobs(n=90, seed=0, turn=0):
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % 3
    x = torch.randn(n, 4, generator=generator) * 0.4 + 2 * F.one_hot((y + turn) % 3, 4)
    return TensorData(x, y)


@pytest.mark.parametrize("standardise", ["kind", "tensor", None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_the_way_there_and_back_is_exact_to_the_bit(standardise, dtype, chunk):
    torch.manual_seed(0)
    model = net()
    model(torch.randn(9, 1, 4, 4))  # running statistics, a counter
    model = model.to(dtype)
    with torch.no_grad():
        model[0].weight.mul_(1e-4), model[4].weight.mul_(300)
    state = model.state_dict()
    tokenizer = WeightTokenizer(chunk, standardise).fit([("net", state)])
    values, mask = tokenizer.chunks("net", state)
    size = sum(t.numel() for t in state.values())
    assert values.shape == mask.shape == (-(-size // chunk), chunk) and int(mask.sum()) == size and not values[~mask].any()
    back = tokenizer.state("net", torch.where(mask, values, float("nan")))  # padding plays no part
    assert list(back) == list(state)
    for name, t in state.items():
        assert back[name].dtype == t.dtype and torch.equal(back[name], t), name
    copy.deepcopy(model).load_state_dict(back)


def test_every_kind_of_tensor_comes_out_at_a_common_scale():
    states = [("a", {"w.weight": torch.randn(50, 60) * 1e-3, "w.bias": torch.randn(50) * 40})]
    tokenizer = WeightTokenizer(50).fit(states)
    values, _ = tokenizer.chunks(*states[0])
    for part in (values[:60], values[60:]):
        assert 0.5 < part.square().mean().sqrt() < 2
    assert tokenizer.layout("a").layers == (*[0] * 60, 1)
    with pytest.raises(BadInput, match="other names"):
        tokenizer.chunks("a", {"w.weight": torch.zeros(50, 60)})
    with pytest.raises(BadInput, match="known are"):
        tokenizer.layout("b")


def tiny_zoo(count=10, seed=0):
    torch.manual_seed(seed)
    return [ZooNet(mlp().state_dict(), Instruction("a", "mlp 4 6 3"), 0, 0.0) for _ in range(count)]


def constant(instructions):
    return torch.ones(len(instructions), 1)


def test_with_a_code_for_each_chunk_a_zoo_is_stored_to_a_thousandth():
    zoo = tiny_zoo()  # 10 networks of 51 weights: 40 chunks
    torch.manual_seed(0)
    vq = GumbelVQ(13, codes=64, code_dim=16, tokens_per_chunk=1, hidden=64, kl_weight=0.0, temperature=(0.5, 1e-3))
    model = IGPG(WeightTokenizer(13), vq, WeightGPT(64, condition_dim=1, layers=1, width=8, heads=1), constant)
    losses = model.fit_zoo(zoo, epochs_vq=360, epochs_prior=0, batch=40, lr=5e-3)["vq"]
    assert losses[-1] < losses[0] / 50
    for z in zoo:
        for name, t in model.reconstruct("mlp 4 6 3", z.state).items():
            assert (t - z.state[name]).square().mean() < 1e-3 * z.state[name].square().mean().clamp_min(0.01), name


def test_gumbel_softmax_averages_to_softmax_and_padding_has_no_say():
    torch.manual_seed(0)
    vq = GumbelVQ(4, codes=5, code_dim=3, tokens_per_chunk=1, hidden=8)
    vq.sharpness.data.fill_(-1.0)
    logits = vq.logits(vq.latent(torch.randn(1, 4)))[0, 0].detach()
    hard = F.gumbel_softmax(logits.expand(40_000, -1), 0.1, hard=True)
    torch.testing.assert_close(hard.mean(0), logits.softmax(-1), atol=0.01, rtol=0)
    assert (
        torch.equal(vq.encode(torch.randn(7, 4)), vq.eval()(torch.randn(7, 4), torch.zeros(7, 3, dtype=torch.long))[3].argmax(-1)) is False
    )
    values, place, mask = torch.randn(6, 4), torch.zeros(6, 3, dtype=torch.long), torch.ones(6, 4)
    mask[:, 2:] = 0
    with torch.no_grad():
        z = vq.latent(values)
        fixed = [vq.decode(vq.encode(values), place), z, vq.codebook[vq.encode(values)], vq.logits(z)]
    vq.forward = lambda *a: fixed
    changed = values.clone()
    changed[:, 2:] += 100
    assert torch.equal(vq.loss(values, mask, place), vq.loss(changed, mask, place))


def test_dead_codes_are_put_where_they_are_needed():
    torch.manual_seed(0)
    vq = GumbelVQ(4, codes=16, code_dim=3, tokens_per_chunk=1, hidden=8)
    vq.codebook.data[1:] = 1e3
    values = torch.randn(50, 4)
    before = vq.logits(vq.latent(values)).amax(-1).mean()
    assert vq.restart(values) == 15
    after = vq.logits(vq.latent(values)).amax(-1).mean()
    assert after > before / 4 and len(vq.encode(values).unique()) > 8
    vq.place_codes(values)
    assert vq.logits(vq.latent(values)).amax(-1).mean() > after


def grammar(n, length, seed=0):
    """After the instruction k: k, then each code is the sum of the two before, modulo 7."""
    first = torch.arange(n) % 7
    rows = [first, (2 * first + 1) % 7]
    while len(rows) < length:
        rows.append((rows[-1] + rows[-2]) % 7)
    return F.one_hot(first, 7).float(), torch.stack(rows, 1)


def test_the_prior_learns_a_grammar_and_windows_are_its_own_continuation():
    torch.manual_seed(0)
    condition, tokens = grammar(7, 12)
    prior = WeightGPT(7, condition_dim=7, layers=1, width=32, heads=2, context=12, longest=40)
    optimizer = torch.optim.Adam(prior.parameters(), lr=5e-3)
    for _ in range(150):
        loss = F.cross_entropy(prior(tokens[:, :-1], condition).flatten(0, 1), tokens.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.02
    assert torch.equal(prior.sample(condition, 12, temperature=0), tokens)
    assert (prior.sample(condition, 12, top_k=1) == tokens).all()
    # Windows: brute force, one code at a time, from what the window shows.
    for overlap in (11, 6, 1):
        found, start, want = prior.sample(condition, 30, temperature=0, overlap=overlap), 0, tokens[:, :0]
        while want.shape[1] < 30:
            start = want.shape[1] - overlap if want.shape[1] - start == 12 else start
            want = torch.cat([want, prior(want[:, start:], condition, start)[:, -1:].argmax(-1)], 1)
        assert torch.equal(found, want)
    # Causal: a later code changes no earlier prediction.
    other = tokens.clone()
    other[:, 8] = (other[:, 8] + 1) % 7
    torch.testing.assert_close(prior(other, condition)[:, :9], prior(tokens, condition)[:, :9])


def test_networks_trained_together_are_those_trained_alone():
    torch.manual_seed(0)
    states, data = [mlp().state_dict() for _ in range(3)], [blobs(), blobs(seed=1, turn=1), blobs()]
    together = train_many(mlp(), states, data, steps=15, batch=8, seed=3)
    generator = torch.Generator().manual_seed(3)
    rows = [torch.randint(90, (3, 8), generator=generator) for _ in range(15)]
    for i in range(3):
        model = mlp()
        model.load_state_dict(states[i])
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for r in rows:
            optimizer.zero_grad()
            F.cross_entropy(model(data[i].x[r[i]]), data[i].y[r[i]]).backward()
            optimizer.step()
        for name, t in model.state_dict().items():
            torch.testing.assert_close(together[i][name], t, rtol=1e-4, atol=1e-5)
        assert accuracies(model, together, data[i])[i] == pytest.approx((model(data[i].x).argmax(1) == data[i].y).float().mean().item())


def test_a_network_with_its_hidden_units_in_another_order_is_as_accurate():
    state, order = train_many(mlp(), [mlp().state_dict()], [blobs()], steps=30)[0], torch.randperm(6)
    other = state | {"0.weight": state["0.weight"][order], "0.bias": state["0.bias"][order], "2.weight": state["2.weight"][:, order]}
    found = accuracies(mlp(), [state, other], blobs(seed=5))
    assert found[0] == found[1] > 0.6


def test_what_is_written_follows_the_instruction():
    tasks = {"a": (blobs(), blobs(seed=9)), "b": (blobs(turn=1), blobs(seed=9, turn=1))}
    makers = {"mlp 4 6 3": mlp, "mlp 4 8 3": lambda: mlp(hidden=8)}
    zoo = model_zoo(makers, tasks, nets=4, families=1, steps=60, lr=3e-2)
    again = model_zoo(makers, tasks, nets=4, families=1, steps=60, lr=3e-2)
    assert len(zoo) == 16 and all(torch.equal(a.state["0.weight"], b.state["0.weight"]) for a, b in zip(zoo, again))
    torch.manual_seed(0)
    conditioner = TaskConditioner({k: v[0] for k, v in tasks.items()}, list(makers), classes=3, features=3)
    assert not torch.equal(*conditioner([Instruction("a", "mlp 4 6 3"), Instruction("b", "mlp 4 6 3")]))
    vq = GumbelVQ(13, codes=48, code_dim=16, tokens_per_chunk=1, hidden=64, kl_weight=0.0)
    model = IGPG(WeightTokenizer(13), vq, WeightGPT(48, condition_dim=conditioner.dim, layers=1, width=32, heads=2), conditioner)
    losses = model.fit_zoo(zoo, epochs_vq=120, epochs_prior=60, batch=160, batch_prior=16, lr=5e-3, lr_prior=5e-3)
    assert losses["prior"][-1] < losses["prior"][0] / 2
    for name, make in makers.items():
        for task, (_, test) in tasks.items():
            written = model.generate(Instruction(task, name), n=6, generator=torch.Generator().manual_seed(0))
            assert accuracies(make(), written, test).mean() > 0.8, (name, task)  # chance is 0.33
    assert model.prior.sample(conditioner([Instruction("a", "mlp 4 6 3")]), 4, generator=torch.Generator().manual_seed(1)).shape == (1, 4)


def test_refusals():
    vq, prior = GumbelVQ(4, codes=5, places=(1, 1, 1)), WeightGPT(6, condition_dim=1, layers=1, width=4, heads=1)
    with pytest.raises(BadInput, match="codes"):
        IGPG(WeightTokenizer(4), vq, prior, constant)
    model = IGPG(WeightTokenizer(4), vq, WeightGPT(5, condition_dim=1, layers=1, width=4, heads=1), constant)
    with pytest.raises(BadInput, match="empty"):
        model.fit_zoo([], epochs_vq=1, epochs_prior=1)
    with pytest.raises(BadInput, match="places"):
        model.fit_zoo(tiny_zoo(2), epochs_vq=1, epochs_prior=1)
    with pytest.raises(UnsupportedModel, match="running statistics"):
        model_zoo({"n": net}, {"a": (blobs(), blobs())}, nets=1, families=1, steps=1)
    for bad in (lambda: WeightTokenizer(0), lambda: GumbelVQ(4, codes=0), lambda: WeightGPT(5, condition_dim=1, context=1),
                lambda: prior.sample(torch.ones(1, 1), 4, overlap=0), lambda: train_many(mlp(), [], [], steps=1),
                lambda: TaskConditioner({"a": blobs()}, ["m"], classes=3)([Instruction("b", "m")])):  # fmt: skip
        with pytest.raises(BadInput):
            bad()
