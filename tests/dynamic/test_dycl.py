"""Splitting: known cuts, liveness, every path, refusals by line, programs that run without torch."""

from __future__ import annotations

import copy
import json
import os
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from neurarium.dynamic import Builder, EarlyExit, Entropy, FamilyPolicy, Patience, load_program, split, with_exits
from neurarium.errors import BadInput, MissingExtra, UnsupportedModel
from neurarium.experiments.dynamic.dycl import coverage, one_by_one
from neurarium.experiments.dynamic.dycl_zoo import PROGRAMS, inputs, make

X = inputs(120, torch.Generator().manual_seed(5))
SEGMENTS = {"early exit": 3, "cascade": 2, "resolution": 2, "nested ifs": 5, "skipped blocks": 5}  # counted by hand


@pytest.fixture(scope="module")
def zoo():
    programs = make(seed=3)
    return {name: (module, split(module, X[:4])) for name, module in programs.items()}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_program_and_module_agree_on_every_path(zoo, name):
    module, program = zoo[name]
    with torch.no_grad():
        torch.testing.assert_close(program(X), one_by_one(module, X), rtol=1e-4, atol=1e-4)
        assert coverage(program, X) == 1
    if name in SEGMENTS:
        assert len(program.segments) == SEGMENTS[name]


class Touched(Exception):
    pass


class Untouchable(torch.Tensor):
    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        raise Touched


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_every_declared_input_is_needed_and_nothing_else_is_kept(zoo, name):
    _, program = zoo[name]
    for segment, tensors in zip(program.segments, program.examples):
        segment(*tensors)
        for i in range(len(tensors)):
            with pytest.raises(Touched):
                segment(*[t.as_subclass(Untouchable) if j == i else t for j, t in enumerate(tensors)])
    nodes = program.plan.nodes
    for i, node in enumerate(nodes):
        if node["do"] == "call":
            assert set(node["out"]) & set(nodes[node["next"]]["live"]) == set(node["out"]), f"node {i} gives what nobody reads"
    broken = copy.deepcopy(program)
    for node in broken.host.plan["nodes"]:
        node["live"] = []
    with pytest.raises(KeyError):
        broken(X)


def test_a_loop_takes_as_many_turns_as_the_module():
    class Count(nn.Module):
        def forward(self, x):
            steps = 0
            while x.norm(dim=-1) > 0.5 and steps < 20:
                x = x * 0.7
                steps += 1
            return x, steps

    x = torch.randn(40, 6) * torch.arange(40)[:, None]
    program = split(Count(), x[:3])
    got, steps = program(x)
    assert steps.tolist() == [Count()(row[None])[1] for row in x] and len(set(steps.tolist())) > 5
    assert any(node.get("next", len(program.plan.nodes)) <= i for i, node in enumerate(program.plan.nodes)), "the loop was unrolled"
    assert torch.equal(got, torch.cat([Count()(row[None])[0] for row in x]))


def test_equal_segments_are_shared_and_loops_over_modules_unrolled(zoo):
    _, program = zoo["skipped blocks"]
    assert len([n for n in program.plan.nodes if n["do"] == "call"]) == 5

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            for _ in range(3):
                if x.sum(-1) > 0:
                    x = self.layer(x)
            return x

    program = split(Twice(), X[:4].flatten(1)[:, :4])
    calls = [n for n in program.plan.nodes if n["do"] == "call"]
    assert len(calls) == 6 and len(program.segments) == 2


def test_batch_semantics_and_costs():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            while x.abs().max().item() > 1:
                x = self.a(x) * 0.3
            return self.b(x) if not x.mean() > 0 else -self.b(x)

    module, x = Whole(), 3 * torch.randn(6, 4)
    program = split(module, x, rows="batch")
    for part in (x, x[:2], -x, 100 * x):
        torch.testing.assert_close(program(part), module(part))
    assert program(x[:0]).shape == (0, 2)
    with pytest.raises(UnsupportedModel, match=r"one value a row.*rows='batch'"):
        split(module, x)

    class Exit(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.a(x)
            return (y, 0) if y[:, 0] > 0 else (self.b(y), 1)

    outcome = split(Exit(), x).decide(x)
    assert outcome.cost.tolist() == [24 if k == 0 else 24 + 18 for k in outcome.output[1].tolist()]
    assert 0 < int(outcome.choice.sum()) < 6 and torch.equal(outcome.choice, outcome.output[1])


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 2), 0


class Keeps(Base):
    def forward(self, x):
        self.calls = 1
        return self.layer(x)


class Writes(Base):
    def forward(self, x):
        x[:, 0] = 0
        return self.layer(x)


class Prints(Base):
    def forward(self, x):
        print(x)
        return self.layer(x)


class Tries(Base):
    def forward(self, x):
        try:
            return self.layer(x)
        except ValueError:
            return x


class Grows(Base):
    def forward(self, x):
        while x.sum(-1) < 100:
            x = torch.cat([x, x], 1)
        return x


class Peeks(Base):
    def forward(self, x):
        return self.layer(x * max(x[:, 0], x[:, 1]))


class Mixes(Base):
    def forward(self, x):
        return self.layer(x - x.mean(0)) if x[:, 0] > 0 else self.layer(x)


class Stays(Base):
    def forward(self, x):
        if x[:, 0] > 0:
            x = x + 1


@pytest.mark.parametrize(
    "kind, why",
    [(Keeps, "attribute"), (Writes, "in place"), (Prints, "cannot be compiled"), (Tries, "try"), (Grows, "known place"), (Peeks, "at once"),
     (Mixes, "rows influence"), (Stays, "without a return")],
)  # fmt: skip
def test_what_cannot_be_compiled_is_refused_by_line(kind, why):
    with pytest.raises(UnsupportedModel, match=why) as error:
        split(kind(), torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    if kind is not Mixes:
        source, first = __import__("inspect").getsourcelines(kind)
        line = int(str(error.value).split("line ")[1].split()[0])
        assert first < line <= first + len(source), "the line named is not in the module"


def test_no_source_and_bad_input():
    scope = {"nn": nn}
    exec("class Hidden(nn.Module):\n    def forward(self, x):\n        return x", scope)
    with pytest.raises(UnsupportedModel, match="source"):
        split(scope["Hidden"](), torch.randn(2, 3))
    policy, x = staged()
    with pytest.raises(BadInput, match="at least one row"):
        split(policy, x[:0])
    with pytest.raises(BadInput, match="'each' or 'batch'"):
        split(policy, x, rows="row")
    with pytest.raises(BadInput, match="decides for each row"):
        split(policy, x, rows="batch")
    program = split(policy, x)
    with pytest.raises(BadInput, match="calibrate"):
        program.decide(x, budget=1e9)
    with pytest.raises(BadInput, match="backend"):
        program.compile("c")
    with pytest.raises(BadInput, match="no program"):
        load_program("nowhere")
    with pytest.raises(BadInput, match="one of budget"):
        program.decide(x, budget=1e9, threshold=0.5)


def staged(gate=None, dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(64, 6) * 3
    return EarlyExit(with_exits(model, x[:2], cuts=2), gate, threshold=0.5).to(dtype).eval(), x.to(dtype)


@pytest.mark.parametrize("gate", [None, Entropy(), Patience(1)], ids=["max-prob", "entropy", "patience"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_staged_policies_of_any_gate_and_dtype(gate, dtype):
    policy, x = staged(gate, dtype)
    policy.calibrate([(x, torch.arange(64) % 3)])
    policy.use(x, budget=0.7 * policy.costs(x).full)
    program = split(policy, x[:1])
    for budget in (None, *policy.curve.cost(policy.costs(x))[[0, 20, 40, -1]].tolist()):
        want, got = policy.decide(x, budget=budget), program.decide(x, budget=budget)
        assert torch.equal(got.choice, want.choice) and torch.equal(got.cost, want.cost) and torch.equal(got.score, want.score)
        torch.testing.assert_close(got.output, want.output)
    assert split(policy, x).use(threshold=2.0).decide(x).choice.unique().tolist() == [2]
    for twin in (copy.deepcopy(program), pickle.loads(pickle.dumps(program))):
        assert torch.equal(twin.decide(x).choice, program.decide(x).choice)
    with pytest.raises(BadInput, match="smallest feasible"):
        program.decide(x, budget=1)


def test_not_a_number_is_not_sure():
    policy, x = staged()
    x = x.clone()
    x[3] = float("nan")
    outcome = split(policy, x[:2]).decide(x)
    assert outcome.choice[3] == 2 and outcome.output[3].isnan().all()
    assert torch.equal(torch.cat([outcome.choice[:3], outcome.choice[4:]]), policy.decide(torch.cat([x[:3], x[4:]])).choice)


class Prefixes(nn.Module):
    configs = (1, 2, 3)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def run(self, x, config):
        for layer in self.layers[:config]:
            x = torch.tanh(layer(x))
        return x

    def extract(self, config):
        return nn.Sequential(*(m for layer in self.layers[:config] for m in (copy.deepcopy(layer), nn.Tanh())))


class Plain(FamilyPolicy):
    def loss(self, x, y, step=0):
        raise NotImplementedError


def test_families_keep_the_configurations_that_a_budget_picks():
    policy, x = Plain(Prefixes()).eval(), torch.randn(9, 6)
    policy.scores = torch.tensor([0.5, 0.4, 0.6], dtype=torch.float64)
    program = split(policy, x)
    assert len(program.segments) == 2 and program.plan.settings == [0, 2]
    for budget in (72, 150, 216, 1e9):
        want, got = policy.decide(x, budget=budget), program.decide(x, budget=budget)
        assert torch.equal(want.output, got.output) and torch.equal(want.cost, got.cost) and torch.equal(want.choice, got.choice)
    assert program.use(config=0).decide(x).choice.tolist() == [0] * 9
    with pytest.raises(BadInput, match="smallest feasible one is 72"):
        program.decide(x, budget=71)
    with pytest.raises(BadInput, match="config must be one of"):
        program.decide(x, config=1)
    with pytest.raises(BadInput, match="no thresholds"):
        program.decide(x, threshold=0.5)


def test_a_policy_of_another_structure_writes_its_own_program():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 2), nn.Linear(6, 2)

        def program(self, example):
            build = Builder(example)
            y = build.call(self.first, build.inputs, cost=16)
            score = build.call(Score(), y, cost=0)
            build.leave_if(score, tau=0, output=y, choice=0, score=score)
            z = build.call(Joined(self.second), (build.inputs, y), cost=24)
            build.leave(z, choice=1, score=1.0)
            return build.program(setting=[0.5], menu=[{"cost": 16, "setting": [float("-inf")]}, {"cost": 40, "setting": [float("inf")]}])

    class Score(nn.Module):
        def forward(self, y):
            return y.softmax(-1)[:, 0]

    class Joined(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, both):
            return self.layer(torch.cat(both, 1))

    module, x = Two(), torch.randn(30, 4)
    program = split(module, x[:2])
    y = module.first(x)
    first = y.softmax(-1)[:, 0] >= 0.5
    outcome = program.decide(x)
    torch.testing.assert_close(outcome.output, torch.where(first[:, None], y, module.second(torch.cat([x, y], 1))))
    assert outcome.cost.tolist() == [16 if f else 40 for f in first] and outcome.choice.tolist() == [int(not f) for f in first]
    assert program.decide(x, budget=16).cost.unique().tolist() == [16] and program.decide(x, budget=40).cost.unique().tolist() == [40]


def test_the_saved_program_needs_neither_torch_nor_neurarium(tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    policy, x = staged()
    policy.calibrate([(x, torch.arange(64) % 3)])
    program = split(policy, x[:2])
    folder = program.save(tmp_path / "program")
    assert json.loads((folder / "plan.json").read_text(), parse_constant=pytest.fail)["segments"] == [f"segment_{k}.onnx" for k in range(3)]
    budget = 0.7 * policy.costs(x).full
    code = (
        "import sys; sys.path.insert(0, '.'); import host, numpy as np\n"
        f"said = host.load(threads=1).decide(np.load('x.npy'), budget={budget})\n"
        "np.savez('said.npz', output=said['output'][0], cost=said['cost'], choice=said['choice'])\n"
        "assert not {'torch', 'neurarium'} & {name.split('.')[0] for name in sys.modules}\n"
        "assert host.load(threads=1).decide(np.load('x.npy')[:0])['output'][0].shape == (0, 3)\n"
    )
    np.save(folder / "x.npy", x.numpy())
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=60)
    said, want = np.load(folder / "said.npz"), policy.decide(x, budget=budget)
    assert said["choice"].tolist() == want.choice.tolist() and said["cost"].tolist() == want.cost.tolist()
    np.testing.assert_allclose(said["output"], want.output.detach().numpy(), rtol=1e-4, atol=1e-5)
    again = load_program(folder).use(budget=budget)
    assert torch.equal(again.decide(x).choice, want.choice) and again.save(tmp_path / "again") != folder
    assert "segment_0" in (folder / "host.py").read_text().split('"""')[0]


def test_without_onnxruntime_the_extra_is_named(monkeypatch):
    policy, x = staged()
    program = split(policy, x)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"neurarium\[export\]"):
        program.compile("onnx")


@pytest.mark.slow
def test_the_inductor_says_what_the_module_says():
    """A compiler for one segment only: the other is a matrix product, for which nothing is written."""
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        pytest.skip("the inductor writes C++, and there is no compiler here")

    class Impatient(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x):
            y = self.first(x)
            return y if y.softmax(-1).amax(-1) > 0.42 else self.rest(y)

    torch.manual_seed(0)
    program, x = split(Impatient().eval(), torch.randn(4, 4)), torch.randn(7, 4)
    fast = program.compile("inductor")
    for n in (7, 3):
        want, got = program.decide(x[:n]), fast.decide(x[:n])
        assert torch.equal(got.choice, want.choice) and torch.equal(got.cost, want.cost) and 0 < int(want.choice.sum()) < n
        torch.testing.assert_close(got.output, want.output)


def test_without_a_compiler_the_inductor_says_what_it_needs(monkeypatch):
    inductor = pytest.importorskip("torch._inductor.config")
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    policy, x = staged()
    with pytest.raises(BadInput, match="no compiler") as error:
        split(policy, x).compile("inductor")
    assert "g++" in str(error.value) and "CXX" in str(error.value)
