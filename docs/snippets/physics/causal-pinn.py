"""Does a network that must solve an evolution equation find the right solution once no moment is learned before the ones it grows from?"""

import torch

from neurarium.physics import Box, CausalPINN, Problem

problem = Problem(  # your own equation: here u_t = 0.05 u_xx on a ring
    name="heat",
    domain=Box(x=(-1, 1), t=(0, 0.5), time="t", periodic=("x",)),
    fields=("u",),
    residual=lambda f, c, p: f.d("u", "t") - 0.05 * f.d("u", "xx"),
    initial=lambda c: {"u": torch.sin(torch.pi * c.x)},
)
solution = CausalPINN(width=16, depth=2).solve(problem, steps=10)
print(solution.residual())
