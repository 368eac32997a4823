"""Sparse products beside torch's dense and CSR ones: one layer's product, in one run.

    pytest benchmarks/compress/test_spmm.py -s

One thread, float32 unless named, the same weights for all, contenders measured in turn; packing of the inputs is inside our times. Every
product is checked against float64 before it is timed. Dense int8 and bfloat16 use AMX where the processor has it; set
ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI (AVX512_CORE for bfloat16) before the run to see them without.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from neurarium.compress import Group, Unstructured
from neurarium.compress.runtime import BlockSparse, GroupSparse, Int8Sparse, backend, choose
from neurarium.meter import latency

SHAPES = {"32 x 768 -> 768": (32, 768, 768), "128 x 768 -> 768": (128, 768, 768), "128 x 768 -> 3072": (128, 3072, 768),
          "128 x 3072 -> 768": (128, 768, 3072), "384 x 768 -> 3072": (384, 3072, 768)}  # fmt: skip
SPARSITIES = (0.5, 0.6, 0.7, 0.8, 0.9)
FOUND: dict[float, list[dict[str, float]]] = {}


def case(tokens: int, rows: int, columns: int, sparsity: float):
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(tokens, columns, generator=g), torch.randn(rows, columns, generator=g)
    masks = {h: Group(h).mask(weight.abs(), sparsity) if h > 1 else Unstructured().mask(weight.abs(), sparsity) for h in (1, 4, 16)}
    quads = weight.view(rows // 16, 16, columns // 4, 4).abs().sum((1, 3))
    cut = quads.flatten().kthvalue(max(1, round(sparsity * quads.numel()))).values
    wide = weight * (quads > cut).repeat_interleave(16, 0).repeat_interleave(4, 1)
    sparse = {h: weight * m for h, m in masks.items()}
    csr = sparse[16].to_sparse_csr()
    forms = {f"{h}x1": (BlockSparse.from_dense(sparse[h], (h, 1)), sparse[h]) for h in (16, 4, 1)}
    forms["int8 16x4"] = (Int8Sparse.from_dense(wide, (16, 4)), wide)
    forms["int8 4x1"] = (Int8Sparse.from_dense(sparse[4], (4, 1)), sparse[4])
    for name, (form, w) in forms.items():
        exact = x.double() @ w.double().T
        close = 5e-2 if name.startswith("int8") else 1e-5
        assert (form.matmul(x) - exact).abs().max() <= close * exact.abs().max(), name
    a, b = x.bfloat16(), weight.bfloat16()
    c, d = (x * 30).clamp(-127, 127).to(torch.int8), (weight * 30).clamp(-127, 127).to(torch.int8).T
    runs = {"dense": lambda: F.linear(x, weight), "dense bfloat16": lambda: F.linear(a, b), "dense int8": lambda: torch._int_mm(c, d),
            "CSR": lambda: (csr @ x.T).T}  # fmt: skip
    runs |= {name: (lambda form=form: form.matmul(x)) for name, (form, _) in forms.items()}
    return runs


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("shape", SHAPES)
def test_product(shape: str, sparsity: float) -> None:
    torch.set_num_threads(1)
    tokens, rows, columns = SHAPES[shape]
    with torch.no_grad():
        found = latency(case(tokens, rows, columns, sparsity), repeats=20)
    seconds = {name: t.median for name, t in found.items()}
    FOUND.setdefault(sparsity, []).append(seconds)
    print(f"\n{shape}, {sparsity:.0%} zeros, {backend()}: dense {1e6 * seconds['dense']:.0f} us; times as fast as dense float32: ", end="")
    print(", ".join(f"{n} {seconds['dense'] / s:.2f}" for n, s in seconds.items() if n != "dense"), end="; ")
    print(f"as CSR: 16x1 {seconds['CSR'] / seconds['16x1']:.2f}, as dense int8: 16x4 {seconds['dense int8'] / seconds['int8 16x4']:.2f}")


def test_summary() -> None:
    if set(FOUND) != set(SPARSITIES):
        pytest.skip("needs the whole table")

    def mean(sparsity: float, above: str, below: str) -> float:
        logs = [math.log(s[above] / s[below]) for s in FOUND[sparsity]]
        return math.exp(sum(logs) / len(logs))

    for sparsity in SPARSITIES:
        ratios = [
            f"{n} {mean(sparsity, 'dense', n):.2f}"
            for n in ("CSR", "1x1", "4x1", "16x1", "int8 4x1", "int8 16x4", "dense bfloat16", "dense int8")
        ]
        print(f"\n{sparsity:.0%} zeros, geometric mean over shapes, times as fast as dense float32: {', '.join(ratios)}", end="")
    print()
    if backend() != "avx512":
        pytest.skip(f"the bounds are for AVX512; this run used {backend()}")

    def best(s: float) -> float:
        logs = [math.log(t["dense"] / min(t["4x1"], t["16x1"])) for t in FOUND[s]]
        return math.exp(sum(logs) / len(logs))

    assert best(0.8) >= 2.0
    assert best(0.9) >= 3.5
    assert mean(0.9, "CSR", "16x1") >= 1.5


def test_two_of_four() -> None:
    torch.set_num_threads(1)
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(128, 768, generator=g), torch.randn(768, 768, generator=g)
    keep = torch.rand(768, 192, 4, generator=g).argsort(-1).argsort(-1).flatten(1) < 1
    one = GroupSparse.from_dense(weight * keep, 1, 4)
    csr = (weight * keep).to_sparse_csr()
    with torch.no_grad():
        t = latency({"dense": lambda: F.linear(x, weight), "CSR": lambda: (csr @ x.T).T, "1:4": lambda: one.matmul(x)}, repeats=20)
    print(
        "\n1:4, 128 x 768 -> 768, times as fast as dense: "
        + ", ".join(f"{n} {t['dense'].median / t[n].median:.2f}" for n in ("CSR", "1:4"))
    )


def test_the_planner_stays_dense_where_matrix_units_win() -> None:
    torch.set_num_threads(1)
    weight = torch.randn(768, 3072, generator=torch.Generator().manual_seed(0))
    weight = weight * Group(16).mask(weight.abs(), 0.6)
    for dtype, rivals in (("float32", None), ("float32", ("float32", "bfloat16")), ("int8", None)):
        found = choose(weight, 128, dtype=dtype, rivals=rivals)
        print(f"\n{dtype} against dense {', '.join(rivals) if rivals else 'default'}: {found.reason}", end="")
        assert found.seconds[found.name] <= 1.05 * min(found.seconds.values())
    print()
