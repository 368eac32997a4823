"""The channel graph beside torch-pruning: the same coupled groups on CNNs, seconds to build, and Hugging Face models.

    pytest benchmarks/compress/test_channels.py -s
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

import pytest
import torch
from torch import nn

from neurarium.compress import ChannelGraph
from neurarium.testing.architectures import subject

tp = pytest.importorskip("torch_pruning")

Groups = frozenset[frozenset[tuple[str, str]]]


def ours(graph: ChannelGraph) -> Groups:
    """Each group as the layers that make, scale and read its channels."""
    return frozenset(
        frozenset((m.module, m.side) for m in g.members if m.side in ("out", "in") and m.module) for g in graph.groups
    )  # fmt: skip


def theirs(model: nn.Module, x: torch.Tensor) -> Groups:
    names = {m: n for n, m in model.named_modules()}
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    found = set()
    for group in graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]):
        parts = set()
        for dependency, _ in group:
            layer, how = dependency.target.module, dependency.handler.__name__
            if layer in names and isinstance(layer, nn.Conv2d | nn.Linear):
                parts.add((names[layer], "out" if "out" in how else "in"))
        found.add(frozenset(parts))
    return frozenset(found)


def seconds(build: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        build()
        times.append(time.perf_counter() - began)
    return sorted(times)[len(times) // 2]


@pytest.mark.parametrize("name", ["mlp", "vgg", "resnet"])
def test_same_groups_on_convolutional_networks(name: str) -> None:
    case = subject(name)
    mine, other = ours(ChannelGraph.trace(case.model, case.inputs)), theirs(case.model, case.inputs[0])
    readable = frozenset(g for g in other if any(side == "in" for _, side in g))  # theirs lists the outputs of the network too
    assert mine == readable, (mine ^ readable)
    a = seconds(lambda: ChannelGraph.trace(case.model, case.inputs))
    b = seconds(lambda: theirs(case.model, case.inputs[0]))
    print(f"\n{name:10} groups {len(mine):3}   seconds: neurarium {a:.3f} (with the proof by removal), torch-pruning {b:.3f}")


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError("not done after 60 s")


@pytest.mark.parametrize("name", ["llama", "opt", "gpt2"])
def test_hugging_face_models(name: str) -> None:
    pytest.importorskip("transformers")
    case = subject(name)
    before = case.run()
    began = time.perf_counter()
    graph = ChannelGraph.trace(case.model, case.inputs)
    mine = time.perf_counter() - began
    small = graph.remove(case.model, {g.id: range(1, g.size) for g in graph.groups if g.size > 1})
    assert case.run(small).shape == before.shape and bool(case.run(small).isfinite().all())
    case.model.config.use_cache = False  # so that the peer meets no cache among the outputs
    began = time.perf_counter()
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(60)
    try:
        pruner = tp.pruner.MagnitudePruner(
            case.model, case.inputs[0], importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.3,
            ignored_layers=[m for n, m in case.model.named_modules() if n.endswith("lm_head")],
        )  # fmt: skip
        pruner.step()
        case.run()
        outcome = "runs"
    except Exception as error:
        outcome = f"{type(error).__name__}: {str(error).splitlines()[0][:90] if str(error) else ''}"
    finally:
        signal.alarm(0)
    other = time.perf_counter() - began
    print(f"\n{name:6} neurarium: {len(graph.groups)} groups in {mine:.2f} s; torch-pruning, {other:.2f} s: {outcome}")
    assert mine < 20
