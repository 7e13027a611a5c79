"""The inputs of checkpointed layers: what is handed to the host, and that training is the same with it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.models import built, packed
from tests.support.training import losses, small_recipe, train_here, write_pairs
from trainer.errors import InputError, RecipeError
from trainer.layers.find import decoder_layers
from trainer.layers.offloading import Copies, CountedCopies, keep_layer_inputs
from trainer.tasks import make_task

CHECKPOINTING = {"training.gradient_checkpointing": True}


class Host(Copies):
    """Copies in a list, as a host would have them."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[torch.Tensor] = []
        self.begun: list[int] = []
        self.ended: list[int] = []

    def write(self, tensor: torch.Tensor) -> int:
        self.held.append(tensor.detach().clone())
        return len(self.held) - 1

    def begin_read(self, host: int) -> int:
        self.begun.append(host)
        return host

    def end_read(self, begun: int) -> torch.Tensor:
        self.ended.append(begun)
        return self.held[begun]


def gradients(recipe: Any, copies: Any = None) -> tuple[dict[str, torch.Tensor], int]:
    model, _ = built(recipe)
    task = make_task(recipe)
    task.attach(model)
    if copies:
        keep_layer_inputs(model, copies)
    torch.manual_seed(0)
    task.loss(model, packed([[40, 24], [32, 32]]), torch.device("cpu")).loss_sum.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found, len(decoder_layers(model))


@pytest.mark.parametrize("adapter", [{"method": "lora", "rank": 4, "dropout": 0.1}, {"method": "none"}])
def test_the_input_of_each_layer_and_nothing_else(adapter: dict[str, Any], tiny_model: Path, tmp_path: Path) -> None:
    recipe = small_recipe("r", tiny_model, tmp_path, **CHECKPOINTING, adapter=adapter)
    want, layers = gradients(recipe)
    host = Host()
    got, _ = gradients(recipe, host)
    assert [tuple(t.shape) for t in host.held] == [(2, 64, 64)] * layers
    backwards = list(reversed(range(layers)))
    assert host.begun == host.ended == backwards, "each is read once, the last layer's first"
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)


def test_values_on_the_host_are_those_the_backward_uses(tiny_model: Path, tmp_path: Path) -> None:
    recipe = small_recipe("r", tiny_model, tmp_path, **CHECKPOINTING)
    want, _ = gradients(recipe)

    class Lost(Host):
        def end_read(self, begun: int) -> torch.Tensor:
            return super().end_read(begun) * (begun > 0)

    got, _ = gradients(recipe, Lost())
    first = {name for name in want if ".layers.0." in name}
    changed = {name for name in want if not torch.equal(want[name], got[name])}
    assert changed, "the first layer is computed again from what the host gave back"
    assert changed <= first


def test_the_next_one_is_read_ahead_within_a_forward() -> None:
    """The copies of another forward may be gone, as after gradients were taken."""
    host = Host()
    first, second = (host.put(torch.ones(1)) for _ in range(2))
    host.get(second)
    assert (host.begun, host.ended) == ([1, 0], [1])
    host.get(first)
    assert (host.begun, host.ended) == ([1, 0], [1, 0])
    del first, second
    host.get(host.put(torch.ones(1)))
    assert host.begun == [1, 0, 2]


def test_copies_without_values_are_counted() -> None:
    copies = CountedCopies()
    tensor = torch.empty(3, 5, dtype=torch.bfloat16, device="meta")
    back = copies.get(copies.put(tensor))
    assert copies.bytes == 30
    assert (back.shape, back.dtype, back.device) == (tensor.shape, tensor.dtype, tensor.device)


def test_a_model_without_checkpointed_layers_is_refused() -> None:
    with pytest.raises(InputError, match="offload_activations does not work for Linear: none of its layers"):
        keep_layer_inputs(torch.nn.Linear(2, 2), CountedCopies())


def test_without_checkpointing_the_recipe_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"offload_activations.*set training\.gradient_checkpointing to true"):
        small_recipe("r", tiny_model, tmp_path, **{"compute.offload_activations": True})


def test_a_cpu_has_nothing_to_offload(tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_pairs(tmp_path / "data" / "a.jsonl", 20)
    plain = small_recipe("plain", tiny_model, tmp_path, **CHECKPOINTING, **{"training.steps": 2})
    recipe = small_recipe(
        "r", tiny_model, tmp_path, **CHECKPOINTING, **{"training.steps": 2, "compute.offload_activations": True}
    )
    with caplog.at_level(logging.WARNING):
        assert train_here(plain) == train_here(recipe) == "succeeded"
    assert losses(recipe) == losses(plain)
    assert caplog.text.count("offload_activations has no effect on a CPU") == 1
