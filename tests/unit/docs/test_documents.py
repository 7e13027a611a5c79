"""What README and docs say is so: their recipes load, their links lead somewhere, their commands exist."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import yaml

from tests.support.browser import FOUND, PATIENCE_S, browser
from tests.support.docs_site import build_site

ROOT = Path(__file__).resolve().parents[3]
DOCUMENTS = [ROOT / "README.md", ROOT / "recipes" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", document.read_text(), flags=re.S)


def test_the_first_own_recipe_is_valid() -> None:
    from trainer.recipe import parse

    (text,) = blocks(ROOT / "README.md", "yaml")
    assert parse(yaml.safe_load(text)).run_uri == "runs/my-first"


def test_the_first_own_recipe_takes_the_overrides_that_stand_under_it(tmp_path: Path) -> None:
    from trainer.recipe import load

    recipe = tmp_path / "my-first.yaml"
    recipe.write_text(blocks(ROOT / "README.md", "yaml")[0])
    lines = [line.split("#")[0].split() for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    runs = [words[3:] for words in lines if words[1:3] == ["run", "my-first.yaml"]]
    assert any(runs)
    for overrides in runs:
        load(recipe, overrides)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text())
    missing = [link for link in links if "://" not in link and not (document.parent / link).exists()]
    assert not missing


def test_the_make_targets_that_the_readme_names_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"make ([a-z]+)", "".join(blocks(ROOT / "README.md", "sh"))))
    assert {"quickstart", "test"} <= named <= targets


def test_the_readme_lists_the_commands_that_there_are() -> None:
    import typer

    from launcher.cli.app import app

    command = typer.main.get_command(app)
    named = set(re.findall(r"^\| `muster ([a-z]+)", (ROOT / "README.md").read_text(), flags=re.M))
    assert named == set(command.commands)  # type: ignore[attr-defined]


def test_the_example_of_the_page_for_trl_is_valid() -> None:
    from trainer.recipe import parse

    (text,) = blocks(ROOT / "docs" / "migration.md", "yaml")
    assert parse(yaml.safe_load(text)).training.global_batch == 32


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_site(tmp_path_factory.mktemp("built") / "site")


def test_the_site_has_every_page_fetches_nothing_and_loses_no_link(site: Path) -> None:
    pages = {str(path.relative_to(site).with_suffix(".md")) for path in site.rglob("*.html")}
    assert {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")} <= pages
    assert 'href="quickstart.html"' in (site / "index.html").read_text()
    loaded = re.compile(
        r"""<(?:script|img|iframe)[^>]+src="(https?:[^"]+)"|<link[^>]+rel="stylesheet"[^>]+href="(https?:[^"]+)"""
    )
    for page in site.rglob("*.html"):
        assert not loaded.findall(page.read_text()), page
        for target in re.findall(r'<(?:a|img) [^>]*(?:href|src)="([^"#:]+)(?:#[^"]*)?"', page.read_text()):
            assert (page.parent / target).exists() or target.startswith("/"), f"{page.relative_to(site)}: {target}"


def test_the_gallery_shows_every_picture_of_a_report(site: Path) -> None:
    page = (site / "gallery.html").read_text()
    for picture in (ROOT / "docs" / "images").glob("report*.*"):
        assert page.count(f'src="images/{picture.name}"') == 1


def test_the_readme_shows_every_picture_of_the_site_and_the_site_none(site: Path) -> None:
    pictures = {picture.name for picture in (ROOT / "docs" / "images").glob("site*.*")}
    shown = re.findall(r'src="docs/images/(site[^"]*)"', (ROOT / "README.md").read_text())
    assert pictures
    assert sorted(shown) == sorted(pictures)
    assert "images/site" not in (site / "index.html").read_text()


@pytest.mark.skipif(FOUND is None, reason="there is no Chromium here")
def test_the_site_can_be_searched_from_a_folder(site: Path, tmp_path: Path) -> None:
    hits = "[...document.querySelectorAll('.md-search-result__item a')].map(a => a.href.split('/').pop())"
    with browser(tmp_path / "profile") as tab:
        tab.open(site / "clusters" / "ray.html")
        tab.ask("document.querySelector('#__search').click()")
        tab.ask(
            "(i => { i.value = 'flash-attn'; i.dispatchEvent(new Event('input')); "
            "i.dispatchEvent(new KeyboardEvent('keyup')); })(document.querySelector('.md-search__input'))"
        )
        deadline = time.monotonic() + PATIENCE_S
        while not (found := tab.ask(hits)):
            assert time.monotonic() < deadline, tab.said
            time.sleep(0.1)
        assert any(name.startswith("install.html") for name in found)
        assert tab.said == []
