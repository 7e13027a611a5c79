"""Optimizers, and the state that they continue from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from launcher.testing.optimizers import CHECKS, MATRICES, Made, copies, parameters, section
from trainer.errors import CorruptObject, InputError
from trainer.optim import make_optimizer
from trainer.recipe import OptimizerSection
from trainer.recipe.optimizers import OPTIMIZERS
from trainer.strategies.held import HeldPart, Itself

QUANTISED = [name for name, row in OPTIMIZERS.items() if row.quantised]

pytestmark = pytest.mark.filterwarnings(
    "ignore:Paged optimizers are not supported on CPU", "ignore:OptimState", "ignore:Calling register_constant"
)


@pytest.fixture(autouse=True)
def _eager() -> Iterator[None]:
    with torch.compiler.set_stance("force_eager"):  # torchao compiles its updates, for half a minute each
        yield


@pytest.mark.parametrize("name", OPTIMIZERS.names())
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check: Callable[[str, Path], None], name: str, tmp_path: Path) -> None:
    check(name, tmp_path)


class Elements(Itself):
    """Some of a parameter's elements, as a rank has them."""

    def __init__(self, source: torch.nn.Parameter, start: int, stop: int) -> None:
        self.source, self.part = source, HeldPart(start, stop - start)
        self.parameter = torch.nn.Parameter(source.detach().reshape(-1)[start:stop])


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("cuts", [(0, 3072, 6144), (0, 4800, 6144), (0, 4096, 4608, 6144)])
def test_a_quantised_state_moves_to_other_parts_within_its_precision(name: str, cuts: tuple[int, ...]) -> None:
    """The state of one tensor is read from the parts of several, and back."""
    row = OPTIMIZERS[name]
    codec = row.load_codec()
    source = {"w": parameters()["big.weight"]}
    complete = Made(name, source)
    for number in range(3):
        complete.step(number)
    want = codec.values(codec.raw(complete.optimizer.state[source["w"]]))
    stored = {f"w.{k}": v.clone() for k, v in dict(_entries(complete)).items()}
    parts: dict[str, torch.Tensor] = {}
    for start, stop in itertools.pairwise(cuts):
        held = Elements(source["w"], start, stop)
        part = Made(name, {"w": held.parameter}, {"w": held})
        part.state.load({"w": [key.removeprefix("w.") for key in stored]}, stored.__getitem__)
        state = part.optimizer.state[held.parameter]
        for key, flat in codec.values(codec.raw(state)).items():
            near(flat, want[key][start:stop], row.blocks.bits)
        raw = codec.raw(state)
        parts |= {f"w.{key}@{start}": value.clone() for key, value in raw.items()}
        parts |= {f"w.{k}": v for k, v in dict(_entries(part)).items() if not v.ndim}
    back = Made(name, source)
    back.state.load({"w": [key.removeprefix("w.") for key in parts]}, parts.__getitem__)
    for key, flat in codec.values(codec.raw(back.optimizer.state[source["w"]])).items():
        near(flat, want[key], row.blocks.bits)


def _entries(made: Made) -> Iterator[tuple[str, torch.Tensor]]:
    yield from made.state._entries(next(iter(made.held.values()))).items()


def near(got: torch.Tensor, want: torch.Tensor, bits: int) -> None:
    """Equal within two roundings to so many bits of the largest value in a block."""
    assert (got - want).abs().max() <= 2 * want.abs().max() / (2 ** (bits - 3))


@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_a_state_that_an_earlier_version_stored_loads(name: str, tmp_path: Path) -> None:
    """With the tables of bitsandbytes' code values."""
    made = Made(name, parameters())
    made.step(0)
    old = {}
    for n, parameter in made.named.items():
        for key, value in made.optimizer.state[parameter].items():
            old[f"{n}.{key}"] = torch.tensor(value) if isinstance(value, int) else value.clone()
    assert "big.weight.qmap1" in old
    save_file(old, tmp_path / "state")
    other = Made(name, copies(made.named))
    other.load(tmp_path / "state")
    for n in made.named:
        mine, theirs = made.optimizer.state[made.named[n]], other.optimizer.state[other.named[n]]
        assert all(torch.equal(torch.as_tensor(mine[key]), torch.as_tensor(theirs[key])) for key in mine), n


def test_a_state_is_copied_into_the_memory_that_the_optimizer_allocates(tmp_path: Path) -> None:
    """A paged one stays in paged memory."""
    made = Made("paged_adamw_8bit", parameters())
    made.step(0)
    made.save(tmp_path / "state")
    other = Made("paged_adamw_8bit", copies(made.named))
    buffers: list[torch.Tensor] = []
    get_buffer = other.optimizer.get_state_buffer
    other.optimizer.get_state_buffer = lambda p, dtype: buffers.append(get_buffer(p, dtype=dtype)) or buffers[-1]
    other.load(tmp_path / "state")
    assert len(buffers) == 2 * len(made.named)
    for n, parameter in other.named.items():
        for key in ("state1", "state2"):
            assert any(other.optimizer.state[parameter][key] is buffer for buffer in buffers)
            assert torch.equal(other.optimizer.state[parameter][key], made.optimizer.state[made.named[n]][key])


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_states_are_as_small_as_their_row_says(name: str) -> None:
    made = Made(name, parameters())
    made.step(0)
    codec = OPTIMIZERS[name].load_codec()
    quantised = {n: codec.is_quantised(codec.raw(made.optimizer.state[p])) for n, p in made.named.items()}
    blocks = OPTIMIZERS[name].blocks
    assert quantised == {"big.weight": True, "small.weight": False, "norm.weight": False, "m": not blocks.full_only}


def test_a_state_before_any_step_is_empty_and_loads(tmp_path: Path) -> None:
    made = Made("adamw", parameters())
    made.save(tmp_path / "state")
    made.load(tmp_path / "state")
    made.step(0)


def test_state_of_another_model_or_optimizer_is_refused(tmp_path: Path) -> None:
    made = Made("adamw", parameters())
    made.step(0)
    made.save(tmp_path / "state")
    fewer = Made("adamw", {n: p for n, p in parameters().items() if n != "m"})
    with pytest.raises(CorruptObject, match=r"nothing here is called \['m'\]"):
        fewer.load(tmp_path / "state")
    with pytest.raises(CorruptObject, match="momentum_buffer is missing"):
        Made("sgd", parameters()).load(tmp_path / "state")
    with pytest.raises(CorruptObject, match=r"exp_avg is no part of the state"):
        Made("adafactor", {"norm.weight": parameters()["norm.weight"]}).state.load(
            {"norm.weight": ["step", "variance", "exp_avg"]}, lambda name: torch.zeros(64 if "step" not in name else ())
        )


def test_only_matrices_decay() -> None:
    made = Made("adamw", parameters(), weight_decay=0.1, betas=(0.8, 0.95), eps=1e-6)
    decays = {id(p): g["weight_decay"] for g in made.optimizer.param_groups for p in g["params"]}
    assert {n: decays[id(p)] for n, p in made.named.items()} == {
        "big.weight": 0.1, "small.weight": 0.1, "norm.weight": 0.0, "m": 0.0,
    }  # fmt: skip
    for group in made.optimizer.param_groups:
        assert (group["lr"], tuple(group["betas"]), group["eps"]) == (1e-2, (0.8, 0.95), 1e-6)
    before = copies(made.named)
    for parameter in made.named.values():
        parameter.grad = torch.zeros_like(parameter)
    made.optimizer.step()
    for n, p in made.named.items():
        assert torch.equal(p, before[n] * (1 - 1e-2 * 0.1) if p.ndim == 2 else before[n]), n


def test_a_matrix_that_zero3_has_cut_decays() -> None:
    cut: Any = torch.nn.Parameter(torch.empty(0))
    cut.ds_shape = torch.Size((96, 64))
    [group] = make_optimizer(section(weight_decay=0.1), {"w": cut}).param_groups
    assert group["weight_decay"] == 0.1


def test_a_model_of_matrices_alone_has_one_group() -> None:
    named = {n: p for n, p in parameters().items() if p.ndim == 2}
    assert len(make_optimizer(section(), named).param_groups) == 1


def test_muon_updates_matrices_and_adamw_everything_else() -> None:
    made = Made("muon", parameters(), weight_decay=0.1, settings={"ns_steps": 4})
    alone = copies(made.named)
    matrices = [p for n, p in alone.items() if n in MATRICES]
    others = [p for n, p in alone.items() if n not in MATRICES]
    muon = torch.optim.Muon(
        matrices, lr=1e-2, weight_decay=0.1, momentum=0.95, ns_steps=4, adjust_lr_fn="match_rms_adamw"
    )
    adamw = torch.optim.AdamW(others, lr=1e-2, weight_decay=0.0)
    for number in range(3):
        made.step(number)
        generator = torch.Generator().manual_seed(100 + number)
        for parameter in alone.values():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        muon.step()
        adamw.step()
    assert all(torch.equal(alone[n], p) for n, p in made.named.items())


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"settings": {"amsgad": True}},
            r"optimizer.settings.amsgad: adamw does not take it; its settings are amsgrad",
        ),
        ({"name": "muon", "settings": {"adjust_lr_fn": "none"}}, "cannot be made with these settings.*none"),
        ({"name": "no_such_module:Lion"}, "'no_such_module:Lion' cannot be imported from"),
        ({"name": "torch.optim:Lyon"}, "torch.optim has no 'Lyon'"),
        ({"name": "builtins:dict"}, "cannot be made|no torch.optim.Optimizer"),
        ({"name": "torch.optim:SGD", "eps": 1e-6}, "optimizer.eps: torch.optim:SGD does not take it"),
    ],
)
def test_an_optimizer_that_cannot_be_made_says_why(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        make_optimizer(OptimizerSection.model_validate({"lr": 1e-2, **fields}), parameters(), MATRICES)


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="needs torchao, which is not installed: pip install torchao"):
        make_optimizer(section("adamw_torchao_8bit"), parameters())


def test_an_optimizer_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_test.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    made = Made("mine_of_test:Signs", parameters(), settings={"scale": 2.0})
    made.step(0)
    made.state.check()
    made.save(tmp_path / "state")
    other = Made("mine_of_test:Signs", copies(made.named), settings={"scale": 2.0})
    other.load(tmp_path / "state")
    for group in other.optimizer.param_groups:
        group["lr"] = 1e-2
        assert (group["taken"], group["scale"]) == (1, 2.0)
    made.step(1)
    other.step(1)
    assert all(torch.equal(p, other.named[n]) for n, p in made.named.items())
    listing = Made("mine_of_test:Listing", parameters())
    listing.step(0)
    with pytest.raises(InputError, match=r"keeps a list as state\['all'\] of"):
        listing.state.check()


OWN = '''
import torch

class Signs(torch.optim.Optimizer):
    """Signs of the sum of the gradients, and a count of its steps."""

    def __init__(self, params, lr, scale=1.0):
        super().__init__(params, {"lr": lr, "scale": scale, "taken": 0})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["taken"] += 1
            for p in group["params"]:
                if p.grad is not None:
                    total = self.state[p].setdefault("sum", torch.zeros_like(p))
                    total += p.grad
                    p -= group["lr"] * group["scale"] * total.sign() / group["taken"]


class Listing(Signs):
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["all"] = [p.grad]
'''
