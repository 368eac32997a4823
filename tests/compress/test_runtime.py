"""The sparse product equals the dense one on every backend, formats lose nothing, layers behave as modules, and the planner can say no."""

from __future__ import annotations

import copy
import io
import pickle
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from neurarium.compress import NM, Group, MaskPlan, apply, finalise, magnitude
from neurarium.compress.runtime import (
    BlockSparse,
    GroupSparse,
    Int8Sparse,
    Machine,
    RuntimePlan,
    SparseLinear,
    build,
    choose,
    load_sparse,
    to_dense_runtime,
    to_sparse_runtime,
    using,
)
from neurarium.compress.runtime.formats import SparseMatrix, from_tensors
from neurarium.compress.runtime.int8 import quantise_tokens
from neurarium.compress.runtime.planner import candidates
from neurarium.errors import BadInput, UnsupportedModel
from neurarium.meter import stored_bytes

BACKENDS = [*build.ISA[: (build.kernel() if build.kernel() is not None else -1) + 1], "torch"]
BLOCKS = [(1, 1), (4, 1), (8, 1), (16, 1), (16, 4), (4, 3)]
ACTS = {None: lambda z: z, "relu": F.relu, "gelu": F.gelu}
SIZES = [(1, 5, 7), (2, 40, 17), (7, 33, 19), (23, 37, 41), (25, 16, 8), (64, 48, 96), (65, 70, 130), (0, 8, 8)]


def sparse(rows: int, columns: int, keep: float, seed: int = 0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) / columns**0.5 * (torch.rand(rows, columns, generator=g) < keep)
    weight[rows // 3 : rows // 3 + 5] = 0  # empty rows
    return weight


def grouped(rows: int, columns: int, n: int, m: int, height: int = 1) -> torch.Tensor:
    """A random matrix with n of m, the choice shared by `height` rows; the last group may be short."""
    g = torch.Generator().manual_seed(0)
    score = torch.rand(-(-rows // height), -(-columns // m), m, generator=g)
    keep = score.argsort(-1).argsort(-1) < n
    return torch.randn(rows, columns, generator=g) * keep.flatten(1)[:, :columns].repeat_interleave(height, 0)[:rows]


def forms(rows: int, columns: int) -> list[tuple[SparseMatrix, torch.Tensor]]:
    weight = sparse(rows, columns, 0.2)
    found: list[tuple[SparseMatrix, torch.Tensor]] = [(BlockSparse.from_dense(weight, b), weight) for b in BLOCKS]
    for n, m, height in ((2, 4, 1), (1, 4, 4), (3, 5, 16)):
        w = grouped(rows, columns, n, m, height)
        found.append((GroupSparse.from_dense(w, n, m, rows=height), w))
    return found


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), SIZES)
def test_every_format_equals_the_dense_product(tokens: int, rows: int, columns: int, backend: str) -> None:
    g = torch.Generator().manual_seed(1)
    x, bias = torch.randn(tokens, columns, generator=g), torch.randn(rows, generator=g)
    for i, (matrix, weight) in enumerate(forms(rows, columns)):
        act = list(ACTS)[i % 3]
        want = ACTS[act]((x.double() @ weight.double().T) + (bias if i % 2 else 0)).float()
        with using(backend):
            got = matrix.matmul(x, bias=bias if i % 2 else None, act=act)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, msg=lambda m, matrix=matrix: f"{matrix.layout}: {m}")


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes(backend: str) -> None:
    x = torch.randn(9, 32)
    with using(backend):
        for weight in (torch.zeros(24, 32), torch.randn(24, 32)):
            for block in BLOCKS:
                torch.testing.assert_close(BlockSparse.from_dense(weight, block).matmul(x), x @ weight.T, atol=1e-5, rtol=1e-5)
        wide = BlockSparse.from_dense(torch.randn(16, 32), (16, 1))
        z = 40 * torch.linspace(-1, 1, 9 * 32).view(9, 32)
        torch.testing.assert_close(BlockSparse.from_dense(torch.eye(32), (4, 1)).matmul(z, act="gelu"), F.gelu(z), atol=4e-6, rtol=1e-6)
        minus = BlockSparse.from_dense(torch.eye(32), (1, 1)).matmul(torch.full((2, 32), -torch.inf), act="relu")
        assert torch.equal(minus, torch.zeros(2, 32))
        bad = x.clone()
        bad[3, 5] = torch.nan
        for act in ACTS:
            assert wide.matmul(bad, act=act)[3].isnan().all()
            assert wide.matmul(bad, act=act)[2].isfinite().all()


def test_inputs_of_any_strides_and_ranks() -> None:
    weight = sparse(20, 24, 0.3)
    matrix = BlockSparse.from_dense(weight, (4, 1))
    base = torch.randn(3, 24, 5, 2)
    for x in (
        base[..., 0].transpose(1, 2),
        torch.randn(24),
        torch.randn(24, 6).T,
        torch.randn(10, 48)[:, ::2],
        torch.randn(10, 48)[::2, 4:28],
    ):
        torch.testing.assert_close(matrix.matmul(x), x @ weight.T, atol=1e-5, rtol=1e-5)
    expanded = torch.randn(1, 24).expand(6, 24)
    torch.testing.assert_close(matrix.matmul(expanded), expanded @ weight.T, atol=1e-5, rtol=1e-5)
    with pytest.raises(BadInput, match="24"):
        matrix.matmul(torch.randn(3, 23))
    with pytest.raises(BadInput, match="float64"):
        matrix.matmul(torch.randn(3, 24, dtype=torch.float64))
    with pytest.raises(BadInput, match="act"):
        matrix.matmul(torch.randn(3, 24), act="tanh")


def test_thread_counts_agree_bit_for_bit() -> None:
    before = torch.get_num_threads()
    weight = sparse(70, 64, 0.2)
    try:
        for tokens in (3, 40, 300):
            x = torch.randn(tokens, 64)
            makers = (
                lambda: BlockSparse.from_dense(weight, (4, 1)),
                lambda: BlockSparse.from_dense(weight, (16, 1)),
                lambda: GroupSparse.from_dense(grouped(70, 64, 2, 4), 2, 4),
                lambda: Int8Sparse.from_dense(weight, (4, 1)),
            )
            for make in makers:
                found = []
                for threads in (1, 2, 3):
                    torch.set_num_threads(threads)
                    found.append(make().matmul(x, act="gelu"))
                assert torch.equal(found[0], found[1])
                assert torch.equal(found[0], found[2])
    finally:
        torch.set_num_threads(before)


def test_formats_lose_nothing() -> None:
    for rows, columns in ((5, 7), (40, 33)):
        for matrix, weight in forms(rows, columns):
            assert torch.equal(matrix.to_dense(), weight)
            for back in (SparseMatrix.from_json(matrix.to_json()), from_tensors(matrix.tensors())):
                assert type(back) is type(matrix)
                assert torch.equal(back.to_dense(), weight)
                assert back.layout == matrix.layout
                assert back.nbytes == matrix.nbytes
    with pytest.raises(BadInput, match="kind"):
        SparseMatrix.from_json('{"kind": "mask"}')


def test_bytes_by_hand() -> None:
    weight = torch.zeros(32, 10)
    weight[:16, [1, 4, 7]] = 1
    weight[16:, 2] = 1
    assert BlockSparse.from_dense(weight, (16, 1)).nbytes == 4 * 16 * 4 + 4 * 2 + 3 * 4  # values, int16 indices, pointers
    assert BlockSparse.from_dense(weight, (4, 1)).nbytes == 16 * 4 * 4 + 16 * 2 + 9 * 4
    two_four = grouped(32, 16, 2, 4)
    assert GroupSparse.from_dense(two_four, 2, 4).nbytes == 32 * 8 * (4 + 1)
    # int8, quads of four columns: one quad of 4 x 4 weights holds the 3 columns of a row block, and the 1 column of the others
    assert Int8Sparse.from_dense(weight, (4, 1)).nbytes == 8 * 16 + 8 * 4 * 2 + 9 * 4 + 32 * 4 + 32 * 4


def test_bad_matrices_are_refused() -> None:
    weight = torch.randn(8, 8)
    for bad, match in ((weight[0], "matrix"), (weight * torch.inf, "finite"), (weight.int(), "floating"), (weight[:0], "non-empty")):
        with pytest.raises(BadInput, match=match):
            BlockSparse.from_dense(bad)
    with pytest.raises(BadInput, match="outputs"):
        BlockSparse.from_dense(weight, (3, 1))
    with pytest.raises(BadInput, match="mask"):
        BlockSparse.from_dense(weight, (4, 1), mask=torch.ones(8, 7, dtype=torch.bool))
    with pytest.raises(BadInput, match="not 2:4"):
        GroupSparse.from_dense(weight, 2, 4)
    with pytest.raises(BadInput, match="int8 blocks"):
        Int8Sparse.from_dense(weight, (8, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tokens", "rows", "columns"), SIZES)
def test_int8_sums_are_exact(tokens: int, rows: int, columns: int, backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 256, (tokens, columns), generator=g, dtype=torch.uint8)
    codes[: tokens // 2] = 255  # the largest sums: an instruction that saturates would show
    weight = sparse(rows, columns, 0.3)
    weight[-1] = 1.0
    for block in ((16, 4), (4, 1)):
        matrix = Int8Sparse.from_dense(weight, block)
        assert (matrix.to_dense() - weight).abs().max() <= 0.5001 * weight.abs().max() / 127
        with using(backend):
            assert torch.equal(matrix.sums(codes), (codes.long() @ matrix.codes().long().T).int())


@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_products(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    for offset in (0.0, 3.0, -50.0):  # zero points at either end
        x, bias = torch.randn(30, 41, generator=g) + offset, torch.randn(37, generator=g)
        x[4] = 0
        with using(backend):
            codes, scale, zero = quantise_tokens(x)
            assert ((codes[:, :41].float() - zero[:, None]) * scale[:, None] - x).abs().max() <= 0.51 * scale.max()
            for block in ((16, 4), (4, 1)):
                matrix = Int8Sparse.from_dense(sparse(37, 41, 0.3), block)
                rounded = (codes[:, :41].double() - zero[:, None]) * scale[:, None].double()
                want = F.gelu(rounded @ matrix.to_dense().double().T + bias).float()
                torch.testing.assert_close(matrix.matmul(x, bias=bias, act="gelu"), want, atol=1e-5, rtol=1e-5)
                bad = x.clone()
                bad[2, 40], bad[7, 0] = torch.inf, torch.nan
                got = matrix.matmul(bad)
                assert got[[2, 7]].isnan().all()
                assert got[[0, 1, 3, 29]].isfinite().all()
    with pytest.raises(BadInput, match="no gradient"):
        matrix.matmul(x.requires_grad_())


def test_backends_round_the_inputs_alike() -> None:
    x = torch.randn(20, 77, generator=torch.Generator().manual_seed(3)) * 5
    found = []
    for backend in BACKENDS:
        with using(backend):
            found.append(quantise_tokens(x))
    for codes, scale, zero in found[1:]:
        assert torch.equal(scale, found[0][1])
        assert (zero - found[0][2]).abs().max() <= 1  # without a fused multiply-add a tie may fall to the other side
        assert (codes.int() - found[0][0].int()).abs().max() <= 1


@pytest.mark.parametrize("act", list(ACTS))
def test_gradients_are_those_of_the_dense_layer(act: str | None) -> None:
    torch.manual_seed(0)
    for matrix, weight in forms(21, 18):
        layer = SparseLinear(matrix, torch.randn(21), act)
        x = torch.randn(2, 5, 18, requires_grad=True)
        y = x.detach().clone().requires_grad_()
        dense = weight.clone().requires_grad_()
        bias = layer.bias.detach().clone().requires_grad_()
        seed = torch.randn(2, 5, 21)
        layer(x).backward(seed)
        ACTS[act](F.linear(y, dense, bias)).backward(seed)
        torch.testing.assert_close(x.grad, y.grad, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(layer.bias.grad, bias.grad, atol=1e-5, rtol=1e-5)
        values = layer.values.grad
        moved = copy.copy(matrix)
        moved.values = values
        stored = copy.copy(matrix)
        stored.values = torch.ones_like(values)
        torch.testing.assert_close(moved.to_dense(), dense.grad * stored.to_dense(), atol=1e-5, rtol=1e-5)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 64, bias=False), nn.ReLU(), nn.Linear(64, 10)).eval()


def test_a_model_round_trips_and_shrinks() -> None:
    model = network()
    masks = {
        name: Group(16 if model[int(name)].out_features % 16 == 0 else 1).mask(model[int(name)].weight.detach().abs(), 0.8)
        for name in "024"
    }
    masked = apply(model, MaskPlan(masks))
    before = {k: v.clone() for k, v in masked.state_dict().items()}
    x = torch.randn(11, 48)
    result = to_sparse_runtime(masked, planner="always", example=x)
    want = finalise(masked)(x)
    torch.testing.assert_close(result(x), want, atol=1e-5, rtol=1e-5)
    assert all(torch.equal(v, before[k]) for k, v in masked.state_dict().items())
    assert [type(result[i]).__name__ for i in range(5)] == [
        "SparseLinear",
        "FusedActivation",
        "SparseLinear",
        "FusedActivation",
        "SparseLinear",
    ]
    assert result.plan.tokens == {"0": 11, "2": 11, "4": 11}
    assert set(result.plan.formats.values()) <= {"16x1", "8x1", "4x1", "1x1", "1:4", "1:8"}
    assert result.plan.formats["0"] == "16x1"
    assert result.plan.bytes_after == sum(m.nbytes for m in result.modules() if isinstance(m, SparseLinear))
    assert result.plan.bytes_after < 0.3 * result.plan.bytes_before
    assert stored_bytes(result) < 0.35 * stored_bytes(finalise(masked))
    assert saved(result) < 0.6 * saved(finalise(masked))  # the zip container's overhead included
    assert RuntimePlan.from_json(result.plan.to_json()) == result.plan
    for back in (
        copy.deepcopy(result),
        pickle.loads(pickle.dumps(result)),
        load_sparse(network(), result.state_dict()),
        to_dense_runtime(result),
        to_sparse_runtime(finalise(masked), planner="always"),
    ):
        torch.testing.assert_close(back(x), want, atol=1e-5, rtol=1e-5)
    dense = to_dense_runtime(result)
    assert {type(m) for m in dense.modules()} == {type(m) for m in network().modules()}
    assert "plan" not in vars(dense)


def saved(model: nn.Module) -> int:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    return buffer.tell()


def test_a_state_dict_of_another_pattern_is_taken() -> None:
    a = SparseLinear.from_linear(nn.Linear(16, 32), (4, 1))
    layer = nn.Linear(16, 32)
    layer.weight.data = sparse(32, 16, 0.2, seed=5)
    b = SparseLinear.from_linear(layer, (16, 1))
    a.load_state_dict(b.state_dict())
    assert torch.equal(a.weight, layer.weight)
    x = torch.randn(3, 16)
    assert torch.equal(a(x), b(x))
    with pytest.raises(BadInput, match="the layer is"):
        SparseLinear.from_linear(nn.Linear(32, 16)).load_state_dict(b.state_dict())
    broken = {**b.state_dict(), "col": b.col + 1000}
    with pytest.raises(BadInput, match="do not make"):
        a.load_state_dict(broken)
    with pytest.raises(BadInput, match="sparse layer '0'"):
        load_sparse(nn.Sequential(nn.ReLU()), nn.Sequential(b).state_dict())


def test_exports_or_says_what_to_do(monkeypatch) -> None:
    x = torch.randn(7, 48)
    for dtype in ("float32", "int8"):
        model = to_sparse_runtime(magnitude(network(), sparsity=0.8), planner="always", min_sparsity=0.0, dtype=dtype)
        for p in model.parameters():
            p.requires_grad_(False)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
        more = torch.randn(13, 48)
        torch.testing.assert_close(program.module()(more), model(more))
        assert sum("_linear" in str(n.target) for n in program.graph.nodes if n.op == "call_function") == 3
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(UnsupportedModel, match="to_dense_runtime"):
        model(x)


def test_fine_tuning_keeps_the_pattern() -> None:
    torch.manual_seed(0)
    masked = apply(network(), MaskPlan({"0": NM(1, 4).mask(torch.rand(64, 48)), "2": Group(16).mask(torch.rand(64, 64), 0.75)}))
    model = to_sparse_runtime(masked, planner="always", min_sparsity=0.5)
    assert model.plan.formats == {"0": "1:4", "2": "16x1"}
    zeros = {i: model[i].weight == 0 for i in (0, 2)}
    x, y = torch.randn(64, 48), torch.randint(0, 10, (64,))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for i in (0, 2):
        assert (model[i].weight[zeros[i]] == 0).all()


def test_what_cannot_be_replaced_is_named() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head, self.body = nn.Embedding(12, 8), nn.Linear(8, 12, bias=False), nn.Linear(8, 8)
            self.head.weight = self.embed.weight
            self.conv = nn.Conv1d(8, 8, 1)

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            h = self.body(self.body(self.embed(i)))
            return self.head(self.conv(h.transpose(1, 2)).transpose(1, 2))

    model = Tied()
    model.body.weight.data = sparse(8, 8, 0.2)
    result = to_sparse_runtime(model, planner="always", example=torch.zeros(2, 5, dtype=torch.long))
    assert set(result.plan.skipped) == {"embed", "head", "conv"}
    assert "tied" in result.plan.skipped["head"]
    assert result.head.weight is result.embed.weight
    assert result.plan.tokens == {"body": 10}
    i = torch.randint(0, 12, (2, 5))
    torch.testing.assert_close(result(i), model(i), atol=1e-5, rtol=1e-5)
    kept = to_sparse_runtime(network())
    assert all("below min_sparsity" in why for why in kept.plan.skipped.values())
    with pytest.raises(UnsupportedModel, match="no prunable layer"):
        to_sparse_runtime(nn.Sequential(nn.ReLU()))
    half = to_sparse_runtime(network().bfloat16(), min_sparsity=0.0)
    assert "bfloat16" in half.plan.skipped["0"]
    for bad in ({"dtype": "int4"}, {"min_sparsity": 2}, {"planner": "guess"}):
        with pytest.raises(BadInput, match=next(iter(bad))):
            to_sparse_runtime(network(), **bad)


def test_torchs_fused_transformer_layer_does_not_bypass_the_sparse_one() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 64, batch_first=True), 2).eval()
    pruned = magnitude(model, sparsity=0.8, modules=(nn.Linear,))
    result = to_sparse_runtime(pruned, planner="always", min_sparsity=0.1)
    x, calls = torch.randn(2, 5, 16), []
    for module in result.modules():
        if isinstance(module, SparseLinear):
            module.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        got = result(x)
        want = finalise(pruned)(x)
    assert len(calls) == len(result.plan.formats) >= 4
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_autocast_gives_its_dtype() -> None:
    layer = SparseLinear.from_linear(nn.Linear(16, 32), (16, 1))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert layer(torch.randn(3, 16)).dtype == torch.float32
        assert layer(torch.randn(3, 16).bfloat16()).dtype == torch.bfloat16


RATES = {"dense float32": 100e9, "dense bfloat16": 500e9, "dense int8": 1000e9, "16x1": 60e9, "8x1": 55e9, "4x1": 50e9, "1x1": 20e9,
         "N:M": 25e9, "int8 16x4": 200e9, "int8 4x1": 120e9}  # fmt: skip


def test_the_planner_follows_the_rates_and_stays_dense_where_dense_wins() -> None:
    machine = Machine(RATES, overhead=0.0)
    weight = torch.randn(64, 64) * Group(16).mask(torch.rand(64, 64), 0.8)
    won = choose(weight, 32, machine=machine)
    assert won.name == "16x1"
    assert won.speedup == pytest.approx(0.6 / (52 / 256), rel=0.05)
    assert torch.equal(won.matrix.to_dense(), weight)
    lost = choose(weight, 32, machine=machine, rivals=("float32", "bfloat16"))
    assert lost.name == "dense bfloat16"
    assert lost.matrix is None
    assert lost.reason.startswith("stay dense: dense bfloat16 is 1.")
    assert choose(weight, 32, machine=machine, dtype="int8").name == "dense int8"
    assert choose(weight, 32, machine=machine, dtype="int8", rivals=("float32",)).name.startswith("int8")
    unstructured = torch.randn(64, 64) * (torch.rand(64, 64) > 0.9)
    assert choose(unstructured, 32, machine=machine).name == "1x1"
    assert choose(torch.randn(64, 64), 32, machine=machine).matrix is None
    assert choose(grouped(64, 64, 1, 4), 32, machine=machine, margin=1.0).seconds.keys() >= {"1:4", "1x1", "dense float32"}
    slow = Machine({**RATES, "16x1": 1e9, "8x1": 1e9, "4x1": 1e9, "1x1": 1e9}, overhead=0.0)
    plain = magnitude(network(), sparsity=0.9)
    kept = to_sparse_runtime(plain, planner=slow)
    assert not kept.plan.formats
    assert all(type(m) is not SparseLinear for m in kept.modules())
    assert type(kept[0]) is nn.Linear  # the mask is baked in
    assert all("stay dense" in kept.plan.skipped[i] for i in "02")
    with pytest.raises(BadInput, match="rivals"):
        choose(weight, 32, rivals=("int4",))
    with pytest.raises(BadInput, match="tokens"):
        choose(weight, 0)


def test_measuring_runs_every_contender() -> None:
    weight = torch.randn(32, 32) * Group(16).mask(torch.rand(32, 32), 0.75)
    found = choose(weight, 8, repeats=2, dtype="int8")
    assert found.measured
    assert {"dense float32", "dense bfloat16", "int8 16x4", "int8 4x1"} <= set(found.seconds)
    assert all(0 < s < 1 for s in found.seconds.values())
    machine = Machine.measured(8, 32, repeats=2)
    assert set(RATES) - {"dense int8"} <= set(machine.rates)
    assert set(candidates(weight)) >= {"16x1", "1x1"}


@pytest.mark.parametrize(
    ("settings", "why"), [({"NEURARIUM_NO_COMPILE": "1"}, "NO_COMPILE"), ({"CXX": "false"}, ""), ({"CXX": "no-such-compiler"}, "no C")]
)
def test_without_a_compiler_products_run_in_torch_and_that_is_said_once(settings, why, monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(build, "_known", [])
    monkeypatch.setenv("NEURARIUM_CACHE", str(tmp_path))
    monkeypatch.delenv("NEURARIUM_NO_COMPILE", raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    weight = torch.arange(20.0).view(4, 5) - 9
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        for _ in range(3):
            got = BlockSparse.from_dense(weight, (4, 1)).matmul(torch.ones(2, 5))
    assert build.backend() == "torch"
    assert torch.equal(got, weight.sum(1).expand(2, 4))
    (said,) = [str(w.message) for w in heard if "sparse products run in torch" in str(w.message)]
    assert why in said
    assert not list(tmp_path.rglob("*.so"))
    assert not list(tmp_path.rglob("build-*"))


def test_of_many_builders_one_builds(tmp_path) -> None:
    built = []

    def make(target) -> None:
        built.append(1)
        time.sleep(0.05)
        target.write_text("whole")

    def work() -> str:
        build._once(tmp_path / "kernels" / "library.so", make)
        return (tmp_path / "kernels" / "library.so").read_text()

    with ThreadPoolExecutor(6) as pool:
        assert [f.result() for f in [pool.submit(work) for _ in range(6)]] == ["whole"] * 6
    assert len(built) == 1


def test_limits_are_nested_and_checked() -> None:
    top = build.backend()
    with using("torch"):
        assert build.backend() == "torch"
        with using("plain"):
            assert build.backend() in ("plain", "torch")
    assert build.backend() == top
    with pytest.raises(BadInput, match="avx1024"), using("avx1024"):
        pass
    if top == "torch":
        warnings.warn("the compiled kernel was not tested here", stacklevel=1)
