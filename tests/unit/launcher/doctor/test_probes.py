"""What a rank sees of its host, its GPUs and its storage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.doctor.probes import examine, gpus, memory, space, storage_roundtrip
from launcher.doctor.probes.gpus import _FIELDS
from launcher.doctor.probes.roundtrip import STEPS
from tests.storage.doubles import faulty, unreachable
from trainer.storage import open_storage


def test_a_folder_goes_the_whole_way_and_is_left_empty(tmp_path: Path) -> None:
    storage = open_storage(str(tmp_path / "runs"))
    found = storage_roundtrip(storage)
    assert found.error is None
    assert (found.conditional, found.same_place) == (True, None)
    assert tuple(found.seconds) == STEPS
    assert all(0 <= s < 10 for s in found.seconds.values())
    assert storage.list() == []


def test_a_beacon_tells_whether_two_hosts_share_a_place(tmp_path: Path) -> None:
    here, elsewhere = (open_storage(str(tmp_path / name)) for name in ("a", "b"))
    here.write("beacon", b"1")
    assert storage_roundtrip(here, "beacon").same_place is True
    assert storage_roundtrip(elsewhere, "beacon").same_place is False


def test_a_storage_without_conditional_put() -> None:
    storage, backend = faulty()
    backend.create = backend.write  # type: ignore[method-assign]
    found = storage_roundtrip(storage)
    assert found.error is None
    assert found.conditional is False
    assert backend.objects == {}


def test_a_storage_that_does_not_answer_is_told_with_the_steps_that_were_done() -> None:
    storage, backend = faulty()
    backend.before = unreachable
    assert "connection refused" in str(storage_roundtrip(storage).error)
    backend.before = lambda verb, path: unreachable(verb, path) if verb == "list" else None
    found = storage_roundtrip(storage)
    assert set(found.seconds) == {"put", "get"}
    assert found.error is not None


def test_a_storage_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    found = storage_roundtrip(open_storage(str(tmp_path / "file" / "runs")))
    assert found.error is not None
    assert ".probe-" not in found.error


def answers(rows: str, known: int) -> object:
    """nvidia-smi of a driver that knows the fields from the ``known``-th question on."""

    def ask(fields: Sequence[str]) -> str | None:
        return rows if _FIELDS.index(tuple(fields)) == known else None  # type: ignore[arg-type]

    return ask


FULL = (
    "0, GPU-aa, NVIDIA H100, 550.54, 81559, 1024, 41, 0, Not Active, Not Active, Not Active, No, No, None\n"
    "1, GPU-bb, NVIDIA H100, 550.54, 81559, 512, 88, 3, Active, Not Active, Not Active, Yes, No, Reset\n"
)


def test_gpus_and_their_health() -> None:
    well, sick = gpus(None, answers(FULL, 0))  # type: ignore[arg-type]
    assert (well.name, well.total_bytes, well.free_bytes) == ("NVIDIA H100", 81559 * 2**20, 80535 * 2**20)
    assert (well.temperature_c, well.ecc_errors, well.problems, well.slow) == (41, 0, (), ())
    assert sick.slow == ("slowed down by heat (hardware)",)
    assert [word in "; ".join(sick.problems) for word in ("remap", "Reset", "3 uncorrected")] == [True] * 3


@pytest.mark.parametrize(("visible", "seen"), [("1", ["GPU-bb"]), ("GPU-bb,GPU-aa", ["GPU-bb", "GPU-aa"]), ("", [])])
def test_only_the_visible_gpus_are_looked_at(visible: str, seen: list[str]) -> None:
    assert [g.uuid for g in gpus(visible, answers(FULL, 0))] == seen  # type: ignore[arg-type]


def test_an_old_driver_and_a_card_without_ecc() -> None:
    (found,) = gpus(None, answers("0, GPU-aa, Tesla T4, 470.1, 15360, 0, 30, [N/A]\nNo devices\n", 2))  # type: ignore[arg-type]
    assert (found.ecc_errors, found.problems) == (None, ())
    (found,) = gpus(None, answers("0, GPU-aa, Tesla T4, 470.1, 15360, 0, 30\n", 3))  # type: ignore[arg-type]
    assert found.driver == "470.1"


def test_a_host(tmp_path: Path) -> None:
    found = examine("", [("storage", str(tmp_path / "not" / "there"))])
    assert found.gpus == ()
    assert found.versions["torch"]
    assert found.disks["storage"].path == str(tmp_path)
    assert 0 < found.memory.available_bytes <= found.memory.total_bytes
    assert space("/").free_bytes <= space("/").total_bytes


def test_memory_is_that_of_the_control_group(tmp_path: Path) -> None:
    group = tmp_path
    for folder in (tmp_path, tmp_path / "memory"):  # version 2, version 1
        folder.mkdir(exist_ok=True)
        (folder / "memory.stat").write_text("anon 1\ninactive_file 1000\n")
    (group / "memory.max").write_text("1000000\n")
    (group / "memory.current").write_text("301000\n")
    (group / "memory" / "memory.limit_in_bytes").write_text("1000000\n")
    (group / "memory" / "memory.usage_in_bytes").write_text("301000\n")
    assert (memory(str(group)).total_bytes, memory(str(group)).available_bytes) == (1000000, 700000)
    (group / "memory.max").write_text("max\n")
    (group / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert memory(str(group)).total_bytes > 1000000
