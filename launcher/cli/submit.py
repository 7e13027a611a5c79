"""``muster render`` and ``muster cancel``: print a job, and end one."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster import KINDS, renderer_of
from launcher.cli import completion
from launcher.cli.options import Overrides, RecipeFile, RunUri, TrustOption
from launcher.replica_warnings import replica_warnings
from launcher.submit.submit import check_address, check_places, cluster_errors, job_of
from launcher.terminal.console import stderr
from trainer.recipe.trust import FLAG
from trainer.run.recipe_url import recipe_at


def render(
    recipe: RecipeFile,
    overrides: Overrides = None,
    on: Annotated[
        str,
        typer.Option(
            metavar="PLACE",
            autocompletion=completion.one_of("local", *KINDS),
            help=f"{' | '.join(KINDS)}, or local for the recipe with all defaults filled in",
        ),
    ] = "slurm",
    trust_remote_code: TrustOption = False,
) -> None:
    """Print what would be submitted: commands, or a manifest. Nothing is contacted."""
    from trainer.recipe import dump

    if on == "local":
        print(dump(recipe_at(recipe, overrides or [], trust=trust_remote_code)), end="")
        return
    with cluster_errors():
        cluster = renderer_of(on)
        loaded = recipe_at(recipe, overrides or [], trust=trust_remote_code)
        words = [recipe, *(overrides or []), *([FLAG] if trust_remote_code else [])]
        job = job_of(loaded, on, arguments=words)
        check_address(job, on)
        if KINDS[on].by_hand:  # there is no later check
            check_places(loaded, on)
        for text in replica_warnings(loaded, on):
            stderr().print(f"warning: {text}", soft_wrap=True, markup=False)
        print(cluster.render(job), end="")


def cancel(run_uri: RunUri) -> None:
    """Stop a run, wherever it runs: its workers commit a checkpoint, and its job is not started again. A job that
    trains other runs too continues without it."""
    from launcher.submit.cancel import cancel_run

    cancel_run(run_uri, lambda text: stderr().print(text, soft_wrap=True))
