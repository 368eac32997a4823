"""Custom gradients: a right one passes, a wrong, a greedy and an undifferentiable one are caught."""

import pytest
import torch

from neurarium.nn.autograd import assert_gradients, exact_function

# log(e^x + e^y): the output is all that has to be kept beside the inputs, plain autograd keeps both exponentials and their sum
good = exact_function(
    lambda x, y: torch.logaddexp(x, y),
    lambda kept, g: (g * torch.exp(kept[0] - kept[1]), g * (1 - torch.exp(kept[0] - kept[1]))),
    lambda inputs, out: (inputs[0], out),
)


def plain(x, y):
    return torch.log(torch.exp(x) + torch.exp(y))


def test_a_right_gradient_passes_in_all_forms():
    x, y = torch.randn(5), torch.randn(5)
    assert_gradients(good, x, y, reference=plain, vmap=True)
    grad = torch.func.grad(lambda t: good(t, y).sum())(x)
    torch.testing.assert_close(grad, torch.func.grad(lambda t: plain(t, y).sum())(x))


def test_wrong_and_greedy_gradients_are_caught():
    wrong = exact_function(lambda x: x**3, lambda kept, g: 2 * g * kept[0] ** 2, lambda inputs, out: (inputs[0],))
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        assert_gradients(wrong, torch.randn(3))
    greedy = exact_function(
        torch.sin, lambda kept, g: g * torch.cos(kept[0]), lambda inputs, out: (inputs[0], torch.cos(inputs[0]))
    )  # fmt: skip
    with pytest.raises(AssertionError, match="keeps"):
        assert_gradients(greedy, torch.randn(3), reference=torch.sin)
    detached = exact_function(lambda x: x**3, lambda kept, g: 3 * g * kept[0].detach() ** 2, lambda inputs, out: (inputs[0],))
    with pytest.raises(RuntimeError, match=r"[Jj]acobian|grad"):
        assert_gradients(detached, torch.randn(3))


def test_constants_pass_through():
    power = exact_function(lambda x, k: x**k, lambda kept, g: (3 * g * kept[0] ** 2, None), lambda inputs, out: (inputs[0],))
    assert_gradients(lambda x: power(x, 3), torch.randn(4))
