"""The conformance suite: the same battery of checks for every method of a role, ours or yours.

A method is described by a tiny :class:`Example` (how to build it, what to feed it). ``check_method(example)`` runs every check of its
role; :func:`parametrize_methods` makes a pytest test of every (paper, check) pair of the catalog::

    from neurarium.testing import Example, check_method, parametrize_methods

    check_method(Example("layer", make=lambda seed: MyLayer(8, 8), inputs=lambda n, seed: (torch.randn(n, 8),)))

    @parametrize_methods()
    def test_conformance(conformance):
        conformance()

A check that cannot apply to a method is named in ``Example.skip`` with its reason; the reason is what pytest prints.
"""

from neurarium.testing.example import Example, Skipped
from neurarium.testing.suite import CHECKS, check_method, checks_for, load_example, parametrize_methods

__all__ = ["CHECKS", "Example", "Skipped", "check_method", "checks_for", "load_example", "parametrize_methods"]
