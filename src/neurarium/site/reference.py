"""The reference: pages that mkdocstrings fills from the code's docstrings."""

from __future__ import annotations

from neurarium.site.docstrings import first_line, public, source_file

__all__ = ["reference_pages"]

HIDE = "hide:\n  - navigation"


def reference_pages() -> dict[str, str]:
    """Page below ``reference/`` -> Markdown that mkdocstrings fills: a page a package, a section a module."""
    import neurarium

    file = source_file("neurarium")
    assert file is not None and neurarium is not None
    pages: dict[str, str] = {}
    packages = sorted(p for p in file.parent.iterdir() if (p / "__init__.py").is_file() and p.name not in ("experiments", "site"))
    single = ["roles", "errors"]
    for name in (*single, *(p.name for p in packages)):
        modules = [f"neurarium.{name}"]
        if name not in single:
            folder = file.parent / name
            found = (path.relative_to(folder) for path in sorted(folder.rglob("*.py")) if "examples" not in path.parts)
            for path in found:
                if path.name == "__init__.py" and path.parent.parts:  # a package inside stands for itself, before its modules
                    path = path.parent
                if not path.name.startswith("_"):
                    modules.append(".".join((f"neurarium.{name}", *path.with_suffix("").parts)))
        body = "\n\n".join(_section(module) for module in modules)
        pages[f"reference/{name}.md"] = f'---\ntitle: "neurarium.{name}"\n{HIDE}\n---\n\n# neurarium.{name}\n\n{body}\n'
    items = "\n".join(f"- [`neurarium.{name}`]({name}.md): {first_line(f'neurarium.{name}')}" for name in (p[10:-3] for p in pages))
    pages["reference/index.md"] = (
        f"---\ntitle: Reference\n{HIDE}\n---\n\n# Reference\n\nEvery public class and function, from its own docstring.\n\n{items}\n"
    )
    return pages


def _section(module: str) -> str:
    """A package shows what its own file defines; what it takes over from its modules stands with them."""
    file = source_file(module)
    if file is None or file.name != "__init__.py":
        return f"::: {module}"
    names = [name for name, _ in public(module)]
    members = "".join(f"\n        - {name}" for name in names) if names else " false"
    return f"::: {module}\n    options:\n      members:{members}"
