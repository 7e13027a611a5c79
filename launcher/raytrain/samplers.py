"""Optuna's samplers, by the name of a search. Without Ray: the library is checked before Ray is started."""

from __future__ import annotations

from typing import Any

from trainer.errors import InputError
from trainer.recipe.sweeps.searches import SEARCHES


def sampler(search: str, seed: int) -> Any:
    """Raises InputError where Optuna, or what its sampler needs, is not installed."""
    try:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        return SEARCHES.load(search)(seed=seed, **SEARCHES[search].settings)
    except ImportError as error:
        raise InputError(
            f"sweep.search {search} needs Optuna, and it cannot be imported ({error}): pip install optuna, and "
            "scipy for gp; or choose search: random"
        ) from error
