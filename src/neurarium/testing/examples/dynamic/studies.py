"""Studies of the room `dynamic`: experiments alone, with nothing that a contract could be checked on."""

from __future__ import annotations

from neurarium.testing.example import Example


def transformer_inference_survey() -> Example:
    return Example("study")
