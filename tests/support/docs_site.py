"""The documentation's site, built as ``make docs`` does, into another folder."""

from __future__ import annotations

from pathlib import Path

import pytest

CONFIG = Path(__file__).resolve().parents[2] / "docs" / ".site" / "mkdocs.yml"


def build_site(folder: Path) -> Path:
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        build(load_config(str(CONFIG), site_dir=str(folder), strict=True))
    return folder
