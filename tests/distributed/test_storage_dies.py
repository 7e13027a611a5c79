"""A storage that is gone after n puts, for every n of a short run: going on with a healthy one ends the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.backing import watch
from tests.support.nights import few_by_day
from tests.support.training import adapter_bytes, ledger, prepare, run_of, small_recipe, train_here, write_pairs
from trainer.checkpoint.publish import finished
from trainer.errors import MusterError
from trainer.recipe import Recipe
from trainer.storage import open_storage
from trainer.storage.backend import Transient

MOST_PUTS, EVERY = 200, 3
CHANGES = {
    "training": {"steps": 3, "global_batch": 2, "micro_batch": 2},
    "checkpoint": {"every_steps": 1, "keep_last": 1},
}


class Dies:
    """A hook for `Watched.before`: every put after the first ``count`` fails, and so does everything after them."""

    def __init__(self, count: int) -> None:
        self.left, self.dead = count, False

    def __call__(self, verb: str, path: str) -> None:
        if verb == "put":
            self.left -= 1
        self.dead = self.dead or self.left < 0
        if self.dead:
            raise Transient("the storage is gone")


def begun(name: str, model: Path, folder: Path) -> Recipe:
    """A recipe whose data is prepared, since every n would only do that again."""
    recipe = small_recipe(name, model, folder, **CHANGES)
    prepare(recipe, open_storage(recipe.storage))
    return recipe


@pytest.mark.parametrize("first", few_by_day(range(EVERY), 1))
def test_going_on_after_any_number_of_puts_ends_the_same(
    first: int, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 12)
    healthy = begun("healthy", tiny_model, tmp_path)
    train_here(healthy)
    for puts in range(first, MOST_PUTS, EVERY):
        recipe = begun(f"dies-after-{puts}", tiny_model, tmp_path)
        with monkeypatch.context() as patched:
            watch(patched, Path(recipe.storage), deadline_s=0.05).before = Dies(puts)
            try:
                if train_here(recipe) == "succeeded":
                    break
            except MusterError:
                pass
        if not finished(
            run_of(recipe)
        ):  # what a driver asks first: it completes what was cut short after the last commit
            # Its holder is this process, which is alive, so that it would be waited for.
            assert train_here(recipe, takeover=True) == "succeeded", f"after {puts} puts"
        assert adapter_bytes(recipe) == adapter_bytes(healthy), f"after {puts} puts"
        assert ledger(recipe) == ledger(healthy), f"after {puts} puts"
    assert 20 < puts < MOST_PUTS - EVERY
