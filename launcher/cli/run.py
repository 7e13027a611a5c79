"""``muster run``: trains a recipe here, or submits it as a job."""

from __future__ import annotations

import os

from rich.text import Text

from launcher.cli.options import (
    AddressOption,
    DetachOption,
    Overrides,
    PlaceOption,
    RecipeFile,
    TakeoverOption,
    TrustOption,
)
from launcher.submit import submit
from launcher.submit.place import choose_place
from launcher.terminal.console import hush_libraries, stderr
from trainer.errors import Interrupted
from trainer.interruption import RESUMES, current
from trainer.recipe.sweeps.trials import as_text
from trainer.recipe.sweeps.variants import variants
from trainer.run.recipe_url import given_at, recipe_at


def run(
    recipe: RecipeFile,
    overrides: Overrides = None,
    on: PlaceOption = None,
    address: AddressOption = None,
    takeover: TakeoverOption = False,
    detach: DetachOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Train RECIPE to its end. Running it again resumes it."""
    console = stderr()
    loaded = recipe_at(recipe, overrides or [], trust=trust_remote_code)
    if loaded.sweep is not None:
        note = (
            "the recipe has a section sweep, which muster sweep reads; this trains it once, without what varies there"
        )
        console.print(Text(note), soft_wrap=True)
    place = choose_place(on, address, loaded)
    given = given_at(recipe, overrides or []) if loaded.adapters else {}
    together = variants(given) if given else []
    if place is not None:
        text = as_text(given) if given else None
        flags = ["--takeover"] if takeover else []
        submit.run_elsewhere(loaded, place, flags, address, detach=detach, together=together, text=text)
        return
    os.environ.update(loaded.cluster.env)  # before the libraries that read it are imported
    if recipe == "quickstart" and not os.path.isfile(recipe):
        from launcher.quickstart.prepare import make_inputs
        from trainer.progress.lines import ProgressLines, called_often

        hush_libraries()
        lines = ProgressLines(lambda text, style: console.print(Text(text, style=style), soft_wrap=True))
        with called_often(lines.repeat):
            make_inputs(loaded, lines)
    from launcher.driver.driver import run_together
    from launcher.monitor.progress import Progress
    from trainer.progress.ending import last_lines
    from trainer.storage import open_storage

    current.command(RESUMES)
    try:
        adapters = run_together(together or [loaded], Progress(console), takeover=takeover)
    except KeyboardInterrupt:  # typer would make an exit code of its own of it
        raise Interrupted(current.sentence() if current.heard else RESUMES) from None
    said = [f"finished: the adapter is {adapter}" for adapter in adapters]
    if not loaded.adapters:
        said += last_lines(loaded, open_storage(loaded.run_uri), adapters[0])
    for line in said:
        console.print(Text(line), soft_wrap=True)  # without line breaks, so that a command can be copied
