"""The arithmetic of benchmarks: ratios, spreads, rates, and what moved."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare, results, startup, throughput, workloads
from benchmarks.results import Spread, moves, ratio

ROOT = Path(__file__).resolve().parents[3]


def test_a_ratio_is_taken_round_by_round() -> None:
    # The second round was three times as slow for both: medians by themselves would have said 2.5.
    assert ratio([20, 6.75, 20], [10, 3, 8]) == Spread(2.25, 2.0, 2.5)


def test_ratios_need_the_same_rounds_and_spreads_a_value() -> None:
    with pytest.raises(ValueError, match="shorter"):
        ratio([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least one"):
        Spread.of([])


@pytest.mark.parametrize(
    ("before", "after", "beyond"),
    [
        ([100, 101, 102], [110, 111, 112], True),
        ([100, 101, 102], [80, 81, 82], True),
        ([100, 101, 115], [110, 111, 112], False),  # the ranges meet
        ([100, 100, 100], [102, 102, 102], False),  # apart, by less than the floor
    ],
)
def test_a_figure_moved_when_its_ranges_are_apart(before: list[float], after: list[float], beyond: bool) -> None:
    (move,) = moves({"rate": before, "gone": [1]}, {"rate": after, "new": [1]})
    assert move.beyond is beyond
    assert move.change == after[1] / before[1]


def test_what_is_written_is_read_and_compared(tmp_path: Path) -> None:
    one, other = tmp_path / "one.json", tmp_path / "other.json"
    results.write(one, "throughput", {"rate": [10, 11, 12], "peak": [5]}, sides={"muster": {"torch": "2"}})
    results.write(other, "throughput", {"rate": [20, 21, 22], "wait": [5]})
    found = results.read(one)
    assert found["figures"]["rate"] == [10, 11, 12]
    assert found["sides"] == {"muster": {"torch": "2"}}
    assert found["versions"]["torch"]
    assert found["machine"]["cores"] >= 1
    command = [sys.executable, "benchmarks/compare.py", str(one), str(other)]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "| rate | 11.00 (10.00 to 12.00) | 21.00 (20.00 to 22.00) | +90.9% | yes |" in said
    assert "only before: peak" in said
    assert "only after: wait" in said


def test_what_is_no_result_is_said(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps({"figures": {}}))
    with pytest.raises(ValueError, match="no result of a benchmark"):
        results.read(file)


def result(**changes: Any) -> dict[str, Any]:
    base = {"benchmark": "throughput", "machine": {"cores": 2, "load": 1.0}, "versions": {"torch": "2.13.0"}}
    return {**base, "figures": {"rate": [1.0]}, **changes}


def test_other_machines_and_versions_are_named() -> None:
    after = result(machine={"cores": 4, "load": 9.0}, versions={"torch": "2.13.0", "peft": "1"})
    assert compare.differences(result(), after) == ["cores: 2 → 4", "peft: none → 1"]
    with pytest.raises(ValueError, match="not the same benchmark"):
        compare.report(result(), result(benchmark="plan"))


def test_rates_leave_the_first_steps_out_and_add_the_ranks_up() -> None:
    rank = {"seconds": [10.0, 2.0, 1.0, 1.0], "tokens": [900, 100, 200, 300, 7], "targets": [9, 1, 2, 3, 7]}
    ranks = [{**rank, "peak_mib": 5.0}, {**rank, "peak_mib": 6.0}]
    assert throughput.figures(ranks, 2) == (2 * 500 / 2.0, 2 * 5 / 2.0, 11.0)
    with pytest.raises(ValueError, match="none after"):
        throughput.figures(ranks, 4)


def test_aims_are_judged_by_the_median() -> None:
    def runs(*rates: float) -> list[throughput.Figures]:
        return [throughput.Figures(rate, rate / 4, 700.0) for rate in rates]

    comparison = throughput.COMPARISONS["100m-128k"]
    found = {"muster": runs(19, 20, 30), "trl-packed": runs(10, 10, 10)}
    faster, smaller = throughput.judged("large", comparison, found)
    assert faster == "- large: muster / trl-packed in tokens/s: 2.00 (1.90 to 3.00), aim ≥ 1.9"
    assert smaller.endswith("1.00 (1.00 to 1.00), aim ≤ 0.7, **missed**")
    assert throughput.judged("large", comparison, {"muster": runs(1)}) == []
    assert len(throughput.table("large", comparison, found)) == 2


@pytest.mark.parametrize("name", workloads.CASES)
def test_rows_have_the_tokens_that_they_should(name: str) -> None:
    case = workloads.CASES[name]
    rows = list(workloads.rows(case))
    assert len(rows) == case.samples
    prompts = [len(row["prompt"].split()) + 1 for row in rows]
    targets = [len(row["completion"].split()) + 1 for row in rows]
    totals = [p + t for p, t in zip(prompts, targets, strict=True)]
    mean, share = sum(totals) / len(rows), sum(targets) / sum(totals)
    wanted = {"gsm8k": (167, 0.53), "chat": (345, 0.5), "quarter": (225, 0.25)}[case.lengths]
    assert (mean, share) == (pytest.approx(wanted[0], rel=0.08), pytest.approx(wanted[1], abs=0.02))
    assert max(totals) <= 1500


def test_one_word_is_one_token() -> None:
    tokenizer = workloads.make_tokenizer(512)
    (row, *_) = workloads.rows(workloads.CASES["small-chat"])
    ids = tokenizer(row["prompt"])["input_ids"]
    assert len(ids) == len(row["prompt"].split()) + 1
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.pad_token_id not in ids


def test_what_startup_writes_is_compared(tmp_path: Path) -> None:
    def found(cold: float) -> dict[str, list[tuple[float, dict[str, float]]]]:
        return {"cold": [(cold, {"import": 5.0}), (cold + 1, {"import": 5.0})], "trl": [(9.0, {}), (9.5, {})]}

    for name, cold in (("one", 14.0), ("other", 20.0)):
        results.write(tmp_path / name, "startup", startup.figures(found(cold)))
    said = compare.report(results.read(tmp_path / "one"), results.read(tmp_path / "other"))
    assert "| cold s | 14.50 (14.00 to 15.00) | 20.50 (20.00 to 21.00) | +41.4% | yes |" in said
    assert "1 of 3 figures moved" in said
