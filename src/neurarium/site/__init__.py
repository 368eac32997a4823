"""The atlas: a static site of every paper, generated from the catalog, the docstrings and the published records.

``neurarium site build`` runs MkDocs with :mod:`~neurarium.site.hook`, which adds to the guides under ``docs/`` a gallery, a page for each
paper, room and comparison, a scoreboard and the reference. A number stands on a page only if a record holds it:
:mod:`~neurarium.site.facts` gathers what is known of a paper, :mod:`~neurarium.site.pages` and :mod:`~neurarium.site.gallery` lay it out.

The pages ask no server for anything and work from ``file://``.
"""

from __future__ import annotations

from neurarium.site.build import build, serve

__all__ = ["build", "serve"]
