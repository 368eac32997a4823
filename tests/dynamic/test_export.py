"""Every policy of the room, as a program on torch.export and ONNX Runtime."""

from __future__ import annotations

import copy
import importlib

import pytest

from neurarium import catalog
from neurarium.dynamic import EarlyExit, MaxProb, split
from neurarium.testing.exporting import check_export, check_program
from neurarium.testing.state import seeded

for package in ("onnx", "onnxscript", "onnxruntime"):
    pytest.importorskip(package)

POLICIES = {p.id: p for p in catalog.load().papers if p.room == "dynamic" and p.role == "policy" and p.status == "works"}


def build(paper):
    module, name = paper.example.split(":")
    example = getattr(importlib.import_module(module), name)()
    with seeded(0):
        policy = example.make(0).eval()
    inputs = example.inputs(256, 1)
    return policy, inputs[0] if len(inputs) == 1 else inputs


@pytest.mark.parametrize("paper", list(POLICIES))
def test_the_exported_policy_is_the_policy(paper):
    check_export(*build(POLICIES[paper]))


@pytest.fixture(scope="module")
def jei():
    return build(POLICIES["jei-dnn"])


@pytest.mark.parametrize("cheat", ["choice", "cost", "output"])
def test_a_program_that_differs_is_noticed(jei, cheat):
    policy, x = jei
    other = copy.deepcopy(policy)
    if cheat == "choice":
        other.tau[0] += 0.3
    elif cheat == "cost":
        table = policy.costs(x)
        other.costs = lambda example: type(table)(tuple(2 * s for s in table.steps))
    else:
        other.staged.heads[0][-1].bias.data += 1  # of every class: the same probabilities
    program = split(policy, x[:3])
    check_program(policy, program, x)
    with pytest.raises(AssertionError, match={"choice": "choose", "cost": "charged", "output": "answers"}[cheat]):
        check_program(other, program, x)


def test_the_gate_is_inside_the_segment(jei):
    """The host compares; it computes no score."""
    policy, x = jei
    plain = EarlyExit(copy.deepcopy(policy.staged), MaxProb(), threshold=0.6).eval()
    program = split(plain, x[:2])
    asked = [node for node in program.plan.nodes if node["do"] == "ask"]
    produced = {name for node in program.plan.nodes if node["do"] == "call" for name in node["out"]}
    assert len(asked) == plain.staged.n_stages - 1 and all(node["on"] in produced for node in asked)
