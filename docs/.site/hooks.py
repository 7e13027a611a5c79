"""What the site takes from outside docs/: the README as its first page, the recipes, links to them, a script, a style.

In a checkout ``../recipes/README.md`` and ``../deepspeed/`` lead where they say. The site has pages for Markdown, the
file itself for a recipe, and for what it does not have the words of the link alone.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path, PurePosixPath
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = {"README.md": "index.md", "recipes/README.md": "recipes/README.md"}
PAGES |= {name: name for name in ("CHANGELOG.md", "CONTRIBUTING.md")}
PICTURES = {
    "report": "One run",
    "report-compared": "Several runs",
    "report-dark": "In dark colours",
    "report-tablet": "On a tablet",
    "report-phone": "On a phone",
    "report-printed": "On paper",
}
"""Titles in the gallery by the stem of the picture's file name; another picture has its stem."""

ITSELF = re.compile(r'^<img src="docs/images/site.*\n', re.M)
"""The pictures of the site in the README, which the site does not show."""
LINK = re.compile(r"\[([^\[\]]*)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)")


def beside_docs() -> dict[str, str]:
    """Place in the site for each file of the checkout that it takes."""
    recipes = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    return PAGES | {name: name for name in recipes}


def on_files(files: Files, config: Any) -> Files:
    for source, name in beside_docs().items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / source)))
    for name in ("iframe-worker.js", "site.css"):
        files.append(File.generated(config, f"assets/{name}", abs_src_path=str(Path(__file__).with_name(name))))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    here = page.file.src_uri
    source = {name: source for source, name in beside_docs().items()}.get(here, f"docs/{here}")

    def lead(link: re.Match[str]) -> str:
        words, target, anchor = link[1], link[2], link[3] or ""
        place = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        inside = PurePosixPath(place).is_relative_to("docs") and not (ROOT / place).is_dir()
        there = posixpath.relpath(place, "docs") if inside else beside_docs().get(place.removesuffix("/"))
        if there is None and (ROOT / place / "README.md").is_file():
            there = beside_docs().get(f"{place}/README.md")
        page = ROOT / place
        if there and words.endswith(".md") and page.is_file():  # a reader of the site knows pages by their titles
            words = next(line.removeprefix("# ") for line in page.read_text().splitlines() if line.startswith("# "))
        return f"[{words}]({posixpath.relpath(there, posixpath.dirname(here) or '.')}{anchor})" if there else words

    return LINK.sub(lead, f"{markdown}\n{reports()}" if here == "gallery.md" else ITSELF.sub("", markdown))


def reports() -> str:
    """Every picture of a report in docs/images, in the order of their titles below."""
    pictures = {path.stem: path.name for path in sorted((ROOT / "docs" / "images").glob("report*.*"))}
    order = [*(stem for stem in PICTURES if stem in pictures), *(stem for stem in pictures if stem not in PICTURES)]
    titles = [(PICTURES.get(stem, stem), pictures[stem]) for stem in order]
    return "\n".join(f"## {title}\n\n![{title}](images/{name})\n" for title, name in titles)
