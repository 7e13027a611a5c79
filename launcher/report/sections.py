"""The five groups of a report and their cards, in order. A card without content, and a group without cards, is left
out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launcher.report.chart import Chart, without_runs
from launcher.report.data_charts import composition_chart, fill_told, length_chart
from launcher.report.metric_charts import (
    largest_rank,
    metric_chart,
    step_time_chart,
    task_metrics,
    task_value,
)
from launcher.report.page import Card, Group
from launcher.report.reading import RunRecord
from launcher.report.tables import (
    answer_tables,
    failure_texts,
    happenings,
    host_table,
    sample_tables,
    version_table,
)
from launcher.report.timeline_charts import checkpoint_chart, goodput_chart, rank_chart, straggler, timeline_chart

Runs = Sequence[RunRecord]
FROM_ZERO = {"rangemode": "tozero"}
EXPONENT = {"tickformat": "~e", "labelalias": {"0e+0": "0"}}
RANK_NOTE = (
    "The time in which a rank works alone, without waiting for the others: the median step, and a line up to the 95th "
    "percentile."
)


def groups_of(runs: Runs) -> list[Group]:
    samples = [
        Card(f"samples-{at}", caption, tables=[("", told)], width="wide")
        for at, (caption, told) in enumerate(sample_tables(runs))
    ]
    answers = [
        Card(f"answers-{at}", f"Answers in evaluations{caption and f', {caption}'}", tables=[("", told)], width="wide")
        for at, (caption, told) in enumerate(answer_tables(runs))
    ]
    groups = [
        Group("loss", "Loss", _loss(runs)),
        Group("samples", "Samples", [*samples, *answers]),
        Group("machine", "Machine", _machine(runs)),
        Group("data", "Data", _data(runs)),
        Group("recipe", "Recipe", _recipe(runs)),
    ]
    shown = [replace(group, cards=[card for card in group.cards if card.shows]) for group in groups]
    return [_of_one_run(group, runs[0].label) if len(runs) == 1 else group for group in shown if group.cards]


def _of_one_run(group: Group, label: str) -> Group:
    """Leaves the run's name out of all tables, notes and captions."""

    def without_label(text: str) -> str:
        short = text.removeprefix(f"{label}: ").removeprefix(f"{label}, ")
        return short[:1].upper() + short[1:]

    cards = [
        replace(
            card,
            charts=[replace(chart, table=without_runs(chart.table)) for chart in card.charts],
            tables=[(caption, without_runs(table)) for caption, table in card.tables],
            texts=[(without_label(caption), text) for caption, text in card.texts],
            notes=[without_label(note) for note in card.notes],
        )
        for card in group.cards
    ]
    return replace(group, cards=cards)


def _chart(key: str, title: str, chart: Chart | None, notes: Sequence[str] = (), width: str = "") -> Card:
    return Card(
        key, title, [chart] if chart else [], notes=[note for note in notes if note] if chart else [], width=width
    )


def _loss(runs: Runs) -> list[Card]:
    loss = metric_chart("loss-curve", "loss over steps", "loss", runs, lambda row: row.loss, smooth=True, legend=True)
    evals = metric_chart(
        *("eval-loss", "evaluation loss over steps", "eval loss", runs, lambda row: row.eval_loss),
        evaluation=True,
        legend=True,
    )
    rate = metric_chart(
        "learning-rate", "learning rate over steps", "rate", runs, lambda row: row.lr, y_axis=FROM_ZERO | EXPONENT
    )
    norm = metric_chart(
        "gradient-norm", "gradient norm over steps", "norm", runs, lambda row: row.grad_norm, y_axis=FROM_ZERO
    )
    cards = [
        _chart("loss-curve", "Training loss", loss, width="hero"),
        _chart("eval-loss", "Evaluation loss", evals, width="tall"),
        _chart("learning-rate", "Learning rate", rate),
        _chart("gradient-norm", "Gradient norm", norm),
    ]
    for name, evaluation in task_metrics(runs):
        words = name.replace("_", " ")
        key = f"metric-{name}"
        chart = metric_chart(key, f"{words} over steps", words, runs, task_value(name), evaluation=evaluation)
        cards.append(_chart(key, words.capitalize(), chart))
    return cards


def _machine(runs: Runs) -> list[Card]:
    speed = metric_chart(
        "throughput", "throughput over steps", "tokens per second", runs, lambda row: row.tokens_per_s, y_axis=FROM_ZERO
    )
    memory = metric_chart(
        "memory",
        "memory of the rank that uses most, over steps",
        "GiB",
        runs,
        lambda row: row.memory_bytes and row.memory_bytes / 2**30,
        y_axis=FROM_ZERO,
    )
    return [
        _chart("throughput", "Throughput in tokens per second", speed),
        _chart("memory", "Memory in GiB, of the rank that uses most", memory, [*map(largest_rank, runs)]),
        _chart("step-times", "Seconds per step", step_time_chart(runs)),
        _chart("ranks", "Own seconds per step of each rank", rank_chart(runs), [RANK_NOTE, *map(straggler, runs)]),
        _chart("checkpoints", "Seconds per checkpoint", checkpoint_chart(runs)),
        _chart("goodput", "Goodput: the use of the wall time", goodput_chart(runs), width="wide"),
        _chart("timeline", "Timeline", timeline_chart(runs), width="wide"),
        Card("events", "Events", tables=[("", happenings(runs))], texts=failure_texts(runs), width="wide"),
        Card("hosts", "Hosts", tables=[("", host_table(runs))], width="wide"),
    ]


def _data(runs: Runs) -> list[Card]:
    fill = [fill_told(run) for run in runs]
    return [
        _chart("sources", "Sources", composition_chart(runs)),
        _chart("lengths", "Lengths and packs", length_chart(runs), fill),
        Card(
            "no-data", "Prepared data", notes=[f"{run.label}: {run.data.missing}." for run in runs if run.data.missing]
        ),
    ]


def _recipe(runs: Runs) -> list[Card]:
    versions = Card("versions", "Versions", tables=[("", version_table(runs))])
    best = next((run for run in runs if run.recipe), None)
    if best is None:
        return [versions]
    if len(runs) == 1:
        return [Card("recipe-text", "The complete recipe", texts=[("", best.recipe)]), versions]
    note = "The recipes of the other runs are the same but for the settings in the table at the head."
    folded = [(f"The complete recipe of {best.label}", best.recipe)]
    return [Card("recipe-text", "Recipe", notes=[note], folded=folded), versions]
