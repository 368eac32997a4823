"""Bytes kept for the backward pass, against counts by hand."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from neurarium.meter import SavedBytes, saved_bytes

B, I, H, O = 32, 20, 50, 10


def mlp(activation: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(I, H), activation, nn.Linear(H, O))


@pytest.mark.parametrize(
    ("activation", "hidden"),
    [
        (nn.ReLU(), 1),  # its output, which the next layer saves too: one storage
        (nn.ReLU(inplace=True), 1),
        (nn.Tanh(), 1),
        (nn.GELU(), 2),  # its input and, for the next layer, its output
        (nn.Identity(), 1),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_mlp_by_hand(activation: nn.Module, hidden: int, dtype: torch.dtype) -> None:
    model, x = mlp(activation).to(dtype), torch.randn(B, I, dtype=dtype)
    assert saved_bytes(model, x) == hidden * B * H * torch.empty(0, dtype=dtype).element_size()


def test_batch_norm_and_convolution_by_hand() -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), torch.randn(4, 3, 10, 10)
    maps = 4 * 8 * 8 * 8 * 4
    assert saved_bytes(model, x) == 2 * maps + 2 * 8 * 4  # norm: its input and the batch's mean and deviation; relu: its output


def test_inputs_weights_and_slices_of_the_data_cost_nothing() -> None:
    data, layer = torch.randn(10_000, I), nn.Linear(I, O)
    x = data[:64]
    assert saved_bytes(layer, x) == 0
    assert saved_bytes(layer, data[64:128].requires_grad_()) == 0
    assert saved_bytes(lambda: layer(data[128:192])) == 0  # sliced inside
    assert saved_bytes(lambda: layer(data[torch.arange(64)])) == 64 * I * 4  # copied inside, and the graph keeps the copy
    assert saved_bytes(lambda: torch.mm(x.clone().requires_grad_(), layer.weight.t())) == 0  # both leaves


def test_a_slice_of_an_older_activation_counts_with_what_it_shows() -> None:
    old = torch.randn(1000, 10, requires_grad=True) * 2.0
    assert saved_bytes(lambda: old[:7].square()) == 7 * 10 * 4


def test_live_falls_when_the_graph_goes_and_peak_is_one_step() -> None:
    model, x = mlp(nn.ReLU()), torch.randn(B, I)
    step = B * H * 4
    with SavedBytes() as saved:
        for _ in range(5):
            loss = model(x).sum()
            assert saved.live == step
            loss.backward()
            assert saved.live == 0
        assert (saved.peak, saved.total) == (step, 5 * step)
        out = [model(x) for _ in range(3)]
        assert saved.live == 3 * step
    del out[0]
    assert saved.live == 2 * step  # followed after the block too
    out.clear()
    assert (saved.live, saved.peak) == (0, 3 * step)


@pytest.mark.parametrize("truncate", [False, True])
def test_through_time_the_peak_grows_unless_the_graph_is_cut(truncate: bool) -> None:
    cell, x = nn.RNNCell(I, H), torch.randn(12, B, I)

    def peak(steps: int) -> int:
        with SavedBytes() as saved:
            h, loss = x.new_zeros(B, H), x.new_zeros(())
            for t in range(steps):
                h = cell(x[t], h.detach() if truncate else h)
                if truncate:
                    h.sum().backward()
                else:
                    loss = loss + h.sum()
            if not truncate:
                loss.backward()
            assert saved.live == 0
        return saved.peak

    state = B * H * 4  # the states before and after each step, each once
    assert [peak(3), peak(12)] == ([2 * state] * 2 if truncate else [4 * state, 13 * state])


def test_checkpointing_lowers_the_peak() -> None:
    blocks = nn.ModuleList(mlp(nn.GELU()) for _ in range(4))
    glue = nn.ModuleList(nn.Linear(O, I) for _ in range(4))
    x = torch.randn(B, I, requires_grad=True)

    def run(reentrant: bool | None) -> tuple[int, Tensor]:
        x.grad = None
        with SavedBytes() as saved:
            h: Any = x
            for block, linear in zip(blocks, glue):
                h = linear(block(h) if reentrant is None else checkpoint(block, h, use_reentrant=reentrant))
            h.sum().backward()
        assert x.grad is not None
        return saved.peak, x.grad

    (plain, want), (again, got), (lazy, also) = run(None), run(True), run(False)
    assert torch.allclose(want, got)
    assert torch.allclose(want, also)
    assert lazy <= again < 0.6 * plain
    assert again >= 2 * B * H * 4  # one block's recomputation is in it


def test_detached_intermediates_and_masks_count() -> None:
    first, second, x = nn.Linear(I, H), nn.Linear(H, O), torch.randn(B, I)
    assert saved_bytes(lambda: second(first(x).detach())) == B * H * 4
    spikes = lambda: second((first(x).detach() > 0).float())  # noqa: E731
    assert saved_bytes(spikes) == B * H * 4


class PackedStep(torch.autograd.Function):
    """A spike whose surrogate window is kept as bits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        window = (x.abs() < 0.5).to(torch.uint8).view(-1, 8)
        ctx.save_for_backward((window << torch.arange(8, dtype=torch.uint8)).sum(1).to(torch.uint8))
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (bits,) = ctx.saved_tensors
        return grad * ((bits[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).view_as(grad)


def test_bit_packed_residuals_count_with_their_bytes() -> None:
    x = torch.randn(B, 64, requires_grad=True)
    assert saved_bytes(lambda: PackedStep.apply(x * 1.0)) == B * 64 // 8


def test_functions_that_save_their_own_output_are_freed_without_the_collector() -> None:
    x = torch.randn(B, H, requires_grad=True)
    gc.collect()
    gc.disable()
    try:
        with SavedBytes() as saved:
            y = (x * 1.0).exp().sigmoid().softmax(-1)
            assert saved.live == 3 * B * H * 4
            del y
            assert saved.live == 0
    finally:
        gc.enable()


def test_addresses_that_are_used_again_do_not_confuse_the_books() -> None:
    w = torch.randn(H, requires_grad=True)
    with SavedBytes() as saved:
        for _ in range(50):
            x = torch.randn(B, H)
            (x * w).sum().backward()
            del x
        assert (saved.live, saved.peak, saved.total) == (0, B * H * 4, 50 * B * H * 4)


def test_an_older_tensor_freed_inside_does_not_hide_a_new_one() -> None:
    w, old = torch.randn(H, requires_grad=True), [torch.randn(B, H) for _ in range(20)]
    with SavedBytes() as saved:
        old.clear()
        kept = [torch.randn(B, H) * w for _ in range(20)]
        assert saved.live == 20 * B * H * 4
        del kept


def test_gradients_are_the_same_also_second_ones() -> None:
    torch.manual_seed(0)
    model, x = mlp(nn.Tanh()).double(), torch.randn(4, I, dtype=torch.float64, requires_grad=True)

    def second() -> Tensor:
        (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), list(model.parameters()))[0]

    plain = second()
    with SavedBytes():
        metered = second()
    assert torch.equal(plain, metered)


def test_writing_into_a_saved_tensor_is_still_an_error() -> None:
    w = torch.randn(5, requires_grad=True)
    with SavedBytes():
        h = w * 2.0
        y = h.square()
        h.add_(1.0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_it_counts_while_another_meter_did_before() -> None:
    model, x = mlp(nn.ReLU()), torch.randn(B, I)
    assert saved_bytes(model, x) == saved_bytes(model, x) == saved_bytes(model.eval(), x)
    with torch.no_grad():
        assert saved_bytes(model, x) == B * H * 4
    for p in model.parameters():
        p.requires_grad_(False)
    assert saved_bytes(model, x) == 0
