"""The MkDocs hook: adds the generated pages and files to the guides under ``docs/``. ``mkdocs build`` and ``mkdocs serve`` work too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from neurarium.site import gallery, pages
from neurarium.site.diagram import from_mermaid
from neurarium.site.facts import Atlas
from neurarium.site.reference import reference_pages
from neurarium.site.scoreboard import scoreboard

__all__ = ["on_config", "on_env", "on_files", "on_page_content", "on_page_markdown"]

_ROLE = re.compile(r":(?:func|class|mod|attr|meth|data|exc|obj):<code>~?(?:[\w.]*\.)?(\w+)</code>")
_MATH = re.compile(r":math:<code>([^<]*)</code>")
_INCLUDE = re.compile(r"<!-- atlas:(\w+)(?: (\S+))? -->")


def on_config(config: Any) -> Any:
    """Gather the facts once a build; :func:`neurarium.site.build` may have done so."""
    root = Path(config.config_file_path).parent
    if "atlas" not in config.extra:
        config.extra["atlas"] = Atlas.load(root, cache=root / "build" / "site-cache")
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Every page that has no file of its own."""
    from mkdocs.structure.files import File

    atlas: Atlas = config.extra["atlas"]
    root = Path(config.config_file_path).parent
    texts = {"rooms/index.md": pages.room_index(atlas), "comparisons/index.md": pages.comparison_index(atlas)}
    texts["scoreboard.md"] = scoreboard(atlas)
    texts |= {f"rooms/{id}.md": pages.room_page(id, atlas) for id in atlas.rooms}
    texts |= {one.url.removesuffix(".html") + ".md": pages.paper_page(one, atlas) for one in atlas.facts}
    texts |= {one.url.removesuffix(".html") + ".md": pages.comparison_page(one, atlas) for one in atlas.comparisons}
    texts |= reference_pages()
    texts["guides/add-a-paper.md"] = _contributing((root / "CONTRIBUTING.md").read_text(encoding="utf-8"))
    texts["index.md"] = "---\ntitle: Papers\ntemplate: gallery.html\nhide:\n  - navigation\n  - toc\n---\n\n"
    contents: dict[str, str | bytes] = {**texts, **atlas.figures, "assets/atlas-index.js": gallery.index(atlas)}
    for path, content in contents.items():
        files.append(File.generated(config, path, content=content))
    return files


def on_env(env: Any, *, config: Any, files: Any) -> Any:
    """What the gallery's template shows."""
    env.globals["gallery"] = gallery.gallery(config.extra["atlas"])
    return env


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Diagrams as SVG, included files, links to what lies outside of ``docs/``."""
    atlas: Atlas = config.extra["atlas"]
    root = Path(config.config_file_path).parent

    def include(match: re.Match[str]) -> str:
        kind, what = match[1], match[2]
        if kind == "roles":
            return pages.roles_table(atlas, page.file.url)
        if kind == "file":
            text = (root / what).read_text(encoding="utf-8").rstrip()
            return f"```python\n{text}\n```"
        raise ValueError(f"{page.file.src_uri}: nothing is known of {match[0]}")

    markdown = _INCLUDE.sub(include, markdown)
    markdown = re.sub(
        r"^```mermaid\n(.*?)^```$",
        lambda m: from_mermaid(m[1], f"Diagram of {page.file.src_uri.removesuffix('.md').rpartition('/')[2]}"),
        markdown,
        flags=re.DOTALL | re.MULTILINE,
    )
    return markdown.replace("(../CONTRIBUTING.md)", "(guides/add-a-paper.md)")


def on_page_content(html: str, *, page: Any, config: Any, files: Any) -> str:
    """Cross-references of docstrings as the names that they are."""
    from neurarium.site.docstrings import _mathml

    html = _MATH.sub(lambda m: _mathml(m[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"), "inline"), html)
    return _ROLE.sub(r"<code>\1</code>", html)


def _contributing(text: str) -> str:
    """CONTRIBUTING.md as a guide."""
    text = text.replace("# Contributing", "---\ntitle: Add a paper\n---\n\n# Add a paper", 1)
    return text.replace("(docs/architecture.md)", "(../architecture.md)")
