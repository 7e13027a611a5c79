"""Options that commands of several modules have."""

from __future__ import annotations

from typing import Annotated

import typer

from trainer.recipe.trust import FLAG

TrustOption = Annotated[
    bool, typer.Option(FLAG, help="run the Python code that comes with the model, or that a stored recipe names")
]
