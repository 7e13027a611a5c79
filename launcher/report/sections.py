"""The sections of a report, in order. Every page has all of them; an empty section gives the reason."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.report.chart import Chart
from launcher.report.data_charts import composition_chart, fill_told, length_chart
from launcher.report.metric_charts import Value, largest_rank, metric_chart, step_time_chart
from launcher.report.page import PageSection
from launcher.report.reading import RunRecord
from launcher.report.tables import failure_texts, happenings, host_table, sample_tables, summary_table, version_table
from launcher.report.timeline_charts import checkpoint_chart, goodput_chart, rank_chart, straggler, timeline_chart

Runs = Sequence[RunRecord]


def sections_of(runs: Runs) -> list[PageSection]:
    return [*_outcome(runs), *_speed(runs), *_course(runs), *_inputs(runs), *_origin(runs)]


def _metric(runs: Runs, key: str, title: str, value: Value, y: str, *, evaluation: bool = False) -> PageSection:
    chart = metric_chart(key, f"{title} over steps", y, runs, value, evaluation=evaluation)
    return _of(key, title, chart, "the metrics have no such values")


def _of(
    key: str, title: str, chart: Chart | None, missing: str, notes: Sequence[str] = (), *, wide: bool = False
) -> PageSection:
    shown = [note for note in notes if note]
    if chart is None:
        return PageSection(key, title, notes=[*shown, f"None: {missing}."], wide=wide)
    return PageSection(key, title, charts=[chart], notes=shown, wide=wide)


def _outcome(runs: Runs) -> list[PageSection]:
    return [
        PageSection("summary", "Summary", tables=[("", summary_table(runs))], wide=True),
        _metric(runs, "loss", "Loss", lambda row: row.loss, "loss"),
        _metric(runs, "eval-loss", "Evaluation loss", lambda row: row.eval_loss, "eval loss", evaluation=True),
        _metric(runs, "learning-rate", "Learning rate", lambda row: row.lr, "learning rate"),
        _metric(runs, "gradient-norm", "Gradient norm", lambda row: row.grad_norm, "gradient norm"),
    ]


def _speed(runs: Runs) -> list[PageSection]:
    return [
        _metric(runs, "throughput", "Throughput", lambda row: row.tokens_per_s, "tokens per second"),
        _of(
            "memory",
            "Memory",
            metric_chart(
                "memory",
                "memory of the rank that uses most",
                "GiB",
                runs,
                lambda row: row.memory_bytes and row.memory_bytes / 2**30,
            ),
            "the metrics have no such values",
            [*map(largest_rank, runs)],
        ),
        _of("step-times", "Step times", step_time_chart(runs), "no step has been trained"),
        _of(
            "ranks",
            "Step times per rank",
            rank_chart(runs),
            "the metrics have no times per rank",
            [
                "The time in which a rank works alone, before it exchanges data with the others: waiting for data, "
                "forward, and the backwards before the last one. The bar is the median step; the line above it ends at "
                "the 95th percentile.",
                *map(straggler, runs),
            ],
        ),
    ]


def _course(runs: Runs) -> list[PageSection]:
    goodput = [
        f"{run.label}: {100 * run.went.share:.1f} % of {run.went.wall_s:,.0f} s were spent on steps that were kept."
        for run in runs
        if run.went.wall_s > 0
    ]
    timeline, none = timeline_chart(runs), "no attempt has begun"
    charts, events = [timeline] if timeline else [], [("Events", happenings(runs))]
    return [
        PageSection("timeline", "Timeline", charts, events, failure_texts(runs), wide=True),
        _of("goodput", "Goodput", goodput_chart(runs), none, goodput, wide=True),
        _of("checkpoints", "Checkpoints", checkpoint_chart(runs), "nothing is committed yet"),
    ]


def _inputs(runs: Runs) -> list[PageSection]:
    texts = sample_tables(runs)
    notes = [] if texts else ["None: the run has stored no generated texts."]
    missing = "; ".join(dict.fromkeys(run.data.missing for run in runs if run.data.missing)) or "there are no rows"
    return [
        _of("data", "Data", composition_chart(runs), missing),
        _of("lengths", "Lengths and packs", length_chart(runs), missing, [fill_told(run) for run in runs]),
        PageSection("samples", "Samples before and after", tables=texts, notes=notes, wide=True),
    ]


def _origin(runs: Runs) -> list[PageSection]:
    recipes = [(run.label, run.recipe or "no recipe is frozen yet") for run in runs]
    return [
        PageSection("recipe", "Recipe", texts=recipes),
        PageSection("versions", "Versions", tables=[("", version_table(runs))]),
        PageSection("hosts", "Hosts", tables=[("", host_table(runs))]),
    ]
