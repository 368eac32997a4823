"""The plain learner is the loop that one writes by hand, and resuming it leaves no trace."""

import pickle
from functools import partial

import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import MultiStepLR, OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

from neurarium.errors import BadInput, UnsupportedModel
from neurarium.learn.fit import Backprop, Diverged, EarlyStopping, evaluate, load_checkpoint, save_checkpoint

X, Y = (torch.tensor(a) for a in load_digits(return_X_y=True))
X = X.float() / 16


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 10))


def loader(n=256):
    return DataLoader(TensorDataset(X[:n], Y[:n]), batch_size=64, shuffle=True)


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


ONE_CYCLE = partial(OneCycleLR, max_lr=1e-2, total_steps=12)


def test_backprop_is_the_hand_written_loop():
    ours, theirs = net(), net()
    history = Backprop(schedule=ONE_CYCLE, clip=1.0).fit(ours, loader(), epochs=3, seed=5)

    torch.manual_seed(5)
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-3)
    schedule = ONE_CYCLE(optimizer)
    theirs.train()
    losses = []
    for _ in range(3):
        for x, y in loader():
            optimizer.zero_grad()
            loss = F.cross_entropy(theirs(x), y)
            loss.backward()
            nn.utils.clip_grad_norm_(theirs.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    assert same(ours, theirs)
    assert list(history.extra["loss"]) == losses
    assert history.steps == 12
    assert history.train[0]["loss"] == pytest.approx(sum(losses[:4]) / 4)


@pytest.mark.parametrize("schedule", [None, ONE_CYCLE, partial(MultiStepLR, milestones=[3, 9])])
@pytest.mark.parametrize("through_file", [False, True])
def test_resume_ends_bit_for_bit_where_an_unbroken_run_ends(schedule, through_file, tmp_path):
    learner, whole, broken = Backprop(schedule=schedule), net(), net()
    unbroken = learner.fit(whole, loader(), epochs=3, val=loader(), seed=1)
    state = learner.fit(broken, loader(), epochs=1, val=loader(), seed=1).state
    if through_file:
        save_checkpoint(tmp_path / "half.safetensors", state)
        state = load_checkpoint(tmp_path / "half.safetensors")
    fresh = net(seed=9)  # weights come from the state
    resumed = learner.fit(fresh, loader(), epochs=3, val=loader(), seed=77, resume=state)
    assert same(whole, fresh)
    assert resumed.extra["loss"] == unbroken.extra["loss"]
    assert resumed.val == unbroken.val
    assert len(resumed.train) == 3


def test_resume_with_the_loaders_own_generator():
    def own():
        return DataLoader(TensorDataset(X[:256], Y[:256]), batch_size=64, shuffle=True, generator=torch.Generator().manual_seed(3))

    whole, broken = net(), net()
    Backprop().fit(whole, own(), epochs=2)
    state = Backprop().fit(broken, own(), epochs=1).state
    Backprop().fit(broken, own(), epochs=2, resume=state)
    assert same(whole, broken)


def test_a_state_is_a_copy_and_one_of_another_learner_is_refused():
    model = net()
    history = Backprop().fit(model, loader(), epochs=1)
    kept = history.state["parts"]["model"]["0.weight"].clone()
    Backprop().fit(model, loader(), epochs=2, resume=history.state)
    assert torch.equal(kept, history.state["parts"]["model"]["0.weight"])
    with pytest.raises(BadInput, match="schedule"):
        Backprop(schedule=ONE_CYCLE).fit(model, loader(), epochs=2, resume=history.state)


def test_watching_does_not_change_the_run_nor_the_callers_randomness():
    a, b = net(), net()
    torch.manual_seed(123)
    before = torch.get_rng_state()
    Backprop().fit(a, loader(), epochs=2, val=loader())
    assert torch.equal(before, torch.get_rng_state())
    Backprop().fit(b, loader(), epochs=2)
    assert same(a, b)


def test_evaluate_is_the_mean_over_samples_and_leaves_the_model_alone():
    model = net().train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    got = evaluate(model, [(X[:100], Y[:100]), (X[100:107], Y[100:107])])
    assert model.training
    assert not model[1].training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    logits = model.eval()(X[:107])
    assert got["loss"] == pytest.approx(F.cross_entropy(logits, Y[:107]).item(), rel=1e-5)
    assert got["accuracy"] == pytest.approx((logits.argmax(1) == Y[:107]).double().mean().item())
    assert set(evaluate(nn.Linear(64, 64), [(X, X)], loss="mse")) == {"loss"}


def test_a_nan_names_step_and_layer_and_spares_the_weights():
    class Spoil(nn.Module):
        seen = 0

        def forward(self, x):
            self.seen += 1
            return x if self.seen < 3 else x / 0 * 0

    model = nn.Sequential(nn.Linear(64, 32), nn.Sequential(nn.ReLU(), Spoil()), nn.Linear(32, 10))
    with pytest.raises(Diverged, match=r"step 2.*'1\.1' \(Spoil\)") as caught:
        Backprop().fit(model, loader(), epochs=1)
    assert (caught.value.step, caught.value.module) == (2, "1.1")
    assert isinstance(caught.value, BadInput)
    assert isinstance(caught.value, FloatingPointError)
    assert all(torch.isfinite(p).all() for p in model.parameters())

    bad = net()
    with torch.no_grad():
        bad[4].weight[0, 0] = torch.nan
    with pytest.raises(Diverged, match=r"parameter '4\.weight'"):
        Backprop().fit(bad, loader(), epochs=1)
    with pytest.raises(Diverged, match="the batch"):
        Backprop().fit(net(), [(X * torch.nan, Y)], epochs=1)


def test_bad_inputs():
    with pytest.raises(BadInput, match="no samples"):
        Backprop().fit(net(), [], epochs=1)
    with pytest.raises(BadInput, match="iterated again"):
        Backprop().fit(net(), iter([(X, Y)]), epochs=2)
    with pytest.raises(BadInput, match="evaluate"):
        evaluate(net(), [])
    with pytest.raises(BadInput, match="epochs"):
        Backprop().fit(net(), loader(), epochs=-1)
    with pytest.raises(BadInput, match="hinge"):
        Backprop(loss="hinge").fit(net(), loader(), epochs=1)
    with pytest.raises(UnsupportedModel, match="Flatten"):
        Backprop().fit(nn.Flatten(), loader(), epochs=1)


def test_callbacks_stop_and_checkpoint(tmp_path):
    seen = []

    def stop(progress):
        seen.append(progress.epoch)
        save_checkpoint(tmp_path / "c.safetensors", progress.state())
        return progress.epoch == 1

    model = net()
    history = Backprop().fit(model, loader(), epochs=9, callbacks=[stop])
    assert seen == [0, 1]
    assert len(history.train) == 2
    state = load_checkpoint(tmp_path / "c.safetensors")
    assert torch.equal(state["parts"]["model"]["0.weight"], model[0].weight)


def test_early_stopping_counts_epochs_since_the_best():
    progress = lambda losses: type("P", (), {"val": [{"loss": v} for v in losses], "train": []})()  # noqa: E731
    stop = EarlyStopping(patience=2)
    assert not stop(progress([3.0, 2.0, 2.5]))
    assert stop(progress([3.0, 2.0, 2.5, 2.1]))
    assert EarlyStopping(patience=1, sign=-1)(progress([3.0, 2.0]))


@pytest.mark.parametrize("epochs", [9, 30])
def test_early_stopping_ends_with_the_weights_of_the_best_epoch(epochs):
    data, val = TensorDataset(X[:96], Y[:96]), [(X[900:], Y[900:])]

    def run(model, epochs, restore, resume=None):
        stop = EarlyStopping(3, restore=restore)
        learner = Backprop(optimizer=partial(torch.optim.AdamW, lr=3e-2))
        return learner.fit(model, DataLoader(data, 32, shuffle=True), epochs=epochs, val=val, callbacks=[stop], resume=resume)

    model, last = net(), net()
    history = run(model, epochs, True)
    losses = [e["loss"] for e in history.val]
    assert evaluate(model, val)["loss"] == pytest.approx(min(losses), rel=1e-6)
    assert run(last, epochs, False).val == history.val
    assert evaluate(last, val)["loss"] == pytest.approx(losses[-1], rel=1e-6)
    broken = net()
    half = run(broken, 4, True)
    assert run(broken, epochs, True, half.state).val == history.val
    assert same(broken, model)
    again = run(broken, 99 if len(losses) < epochs else epochs, True, history.state)  # it had stopped: nothing is added
    assert again.val == history.val
    assert same(broken, model)


def test_loads_own_pt_without_running_code(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "w.pt")
    assert torch.equal(load_checkpoint(tmp_path / "w.pt")["w"], torch.ones(2))

    class Evil:
        def __reduce__(self):
            return (pytest.fail, ("code was run",))

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(tmp_path / "evil.pt")
    with pytest.raises(BadInput, match="holds"):
        save_checkpoint(tmp_path / "x.safetensors", {"f": {"g": object()}})
    with pytest.raises(BadInput, match="no checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def test_tuple_inputs_and_tied_weights_survive_a_checkpoint(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(64, 64)
            self.b = nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x, scale):
            return self.b(self.a(x) * scale)

    model = Two()
    history = Backprop().fit(model, [((X[:64], torch.tensor(2.0)), Y[:64])], epochs=1)
    save_checkpoint(tmp_path / "t.safetensors", history.state)
    model.load_state_dict(load_checkpoint(tmp_path / "t.safetensors")["parts"]["model"])
