"""Renders a plan as lines of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.plan.estimate import PlanReport
    from trainer.plan.result import Plan, RankPlan
    from trainer.recipe import Recipe

WIDTH = 80
LABEL = 38
GIB = 2**30

PARTS = (
    ("frozen_bytes", "frozen weights"),
    ("quant_state_bytes", "their scales, complete on every rank"),
    ("trainable_bytes", "trained weights"),
    ("gradient_bytes", "gradients"),
    ("optimizer_bytes", "optimizer state"),
    ("padding_bytes", "left empty by uneven shards"),
    ("teacher_bytes", "weights of the teacher"),
    ("reward_bytes", "weights of the reward model"),
    ("server_bytes", "the vLLM server"),
    ("activation_bytes", "activations, at their peak"),
    ("unsharded_bytes", "gathered weights and their buffers"),
    ("writing_bytes", "or, before the forward: texts"),
    ("update_bytes", "or, after the backward: the update"),
)
SMALL = 2**20
"""In bytes. Parts that are smaller on every rank are left out."""


def report(found: PlanReport) -> Iterator[str]:
    recipe, plan = found.recipe, found.plan
    adapter, model = recipe.adapter, recipe.model
    method = "full fine-tuning" if adapter.method == "none" else f"{adapter.method}, rank {adapter.rank},"
    weights = model.dtype if model.quantization == "none" else f"{model.quantization} computing in {model.dtype}"
    yield from _wrapped(
        f"{recipe.name}: {method} of {model.path}, {weights}, {recipe.strategy.kind} on "
        f"{plan.world_size} rank{'s' if plan.world_size > 1 else ''}"
    )
    yield ""
    yield from _facts(found)
    yield ""
    yield from _table(plan)
    yield ""
    if plan.world_size > 1:
        yield from _traffic(found)
        yield ""
    yield from _verdict(plan)
    yield from _advice(found)
    for note in plan.notes:
        yield from _wrapped(f"note: {note}")


def first_lines(recipe: Recipe, device: int | None) -> Iterator[str]:
    """Yields what is known before anything is measured. ``device``: the bytes of each GPU, if they are known."""
    from trainer.plan.first_estimate import first_estimate, read_numbers
    from trainer.plan.rollout_memory import server_bytes

    ranks, numbers = recipe.resources.min_workers, read_numbers(recipe.model.path)
    found = None if numbers is None else first_estimate(recipe, numbers, ranks)
    if found is None:
        why = "its config.json is not on this machine" if numbers is None else "its layers are not the usual ones"
        yield from _wrapped(f"no estimate of {recipe.model.path} before it is measured: {why}")
        return
    yield f"estimate from config.json, for {ranks} rank{'s' if ranks > 1 else ''}, without activations:"
    trained, total = "known once it is measured", found.parameters
    if found.trained is not None:
        total += 0 if recipe.adapter.method == "none" else found.trained  # as the plan counts
        trained = f"{_short(found.trained)} ({found.trained / total:.2%})"
    lines = {
        "parameters": _short(total),
        "trained": trained,
        "GiB per rank: frozen weights": gib(found.weight_bytes),
    }
    if found.training_bytes is not None:
        lines["GiB per rank: trained weights and state"] = gib(found.training_bytes)
    if found.writing_bytes:
        lines["GiB per rank: cache of texts"] = gib(found.writing_bytes)
    server = server_bytes(recipe, device)
    if server:
        lines["GiB per rank: the vLLM server"] = gib(server)
    yield from (f"  {label:<{LABEL + 4}}{text}" for label, text in lines.items())
    if device is not None:
        left = device - found.bytes - server
        yield (
            f"  {gib(left)} of {gib(device)} GiB are left for activations"
            if left > 0
            else f"  does NOT fit into {gib(device)} GiB"
        )


def _short(count: int) -> str:
    """Returns a number of elements in the unit that people use: ``8.03 B``, ``41.9 M``."""
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _facts(found: PlanReport) -> Iterator[str]:
    recipe, plan, outlook = found.recipe, found.plan, found.outlook
    share = plan.trainable_parameters / plan.total_parameters
    yield _row("parameters", f"{plan.total_parameters:,}")
    yield _row("trained", f"{plan.trainable_parameters:,} ({share:.2%})")
    base = plan.total_parameters - (0 if recipe.adapter.method == "none" else plan.trainable_parameters)
    if recipe.adapter.method != "none":
        quantised = f", {plan.quantised_parameters / base:.0%} quantised" if plan.quantised_parameters else ""
        yield _row("weights", f"{plan.adapted_parameters / base:.0%} adapted{quantised}")
    yield _work(recipe, plan)
    if outlook.samples_per_epoch is not None:
        yield _row("samples per epoch", f"{outlook.samples_per_epoch:,} ({outlook.steps_per_epoch:,} steps)")
    yield _row("steps", "known after the data are prepared" if outlook.steps is None else f"{outlook.steps:,}")
    yield _row("a checkpoint", f"{gib(plan.checkpoint_bytes)} GiB")
    yield from _time(found)


def _work(recipe: Recipe, plan: Plan) -> str:
    batch, section = recipe.training.global_batch, recipe.rollout_section
    if section is None:
        return _row("tokens per step", f"{plan.tokens_per_step:,} ({batch:,} packs of {recipe.data.sequence_length:,})")
    answers = recipe.grpo.group_size if section is recipe.grpo else 1
    return _row("texts per step", f"{batch * answers:,} ({batch:,} prompts; {section.max_new_tokens:,} tokens at most)")


def _time(found: PlanReport) -> Iterator[str]:
    outlook = found.outlook
    if outlook.tokens_per_s is None:
        if found.price is not None:
            yield _row("cost", "needs --tokens-per-s, or a run that has started")
        return
    before = "" if outlook.measured_ranks is None else f" (this run, on {outlook.measured_ranks} ranks)"
    yield _row("tokens per second", f"{outlook.tokens_per_s:,.0f}{before}")
    if found.hours is not None and found.gpu_hours is not None:
        yield _row("time", f"{found.hours:,.1f} h, {found.gpu_hours:,.1f} h of all devices")
    if found.cost is not None:
        yield _row("cost", f"{found.cost:,.2f}")


def _table(plan: Plan) -> Iterator[str]:
    shown = _columns(plan)
    yield _row("GiB per rank", *(heading for heading, _ in shown))
    for name, label in PARTS:
        values = [int(getattr(rank, name)) for _, rank in shown]
        if max(values) >= SMALL:
            yield _row(f"  {label}", *map(gib, values))
    if any(rank.offloaded_bytes for _, rank in shown):
        yield _row("  of these in the host's memory", *(gib(rank.offloaded_bytes) for _, rank in shown))
    yield _row("peak on the device", *(gib(rank.peak_device_bytes) for _, rank in shown))
    yield _row("peak on the host while loading", *(gib(rank.peak_host_load_bytes) for _, rank in shown))
    yield _row("peak on the host", *(gib(rank.peak_host_bytes) for _, rank in shown))


def _columns(plan: Plan) -> list[tuple[str, RankPlan]]:
    """Returns the rank that needs most and the rank that needs least, or one column if they need the same."""
    least = min(plan.ranks, key=lambda r: (r.peak_device_bytes, -r.rank))
    if gib(least.peak_device_bytes) == gib(plan.peak_device_bytes):
        return [("rank 0", plan.ranks[0])] if plan.world_size == 1 else [("each", plan.ranks[0])]
    return [(f"rank {plan.largest.rank}", plan.largest), (f"rank {least.rank}", least)]


def _traffic(found: PlanReport) -> Iterator[str]:
    """Yields what each rank sends in a step, and with bandwidths the time of this and of the other strategies."""
    plan, network = found.plan, found.network
    sent = plan.traffic
    if network is None:
        yield _row("GiB that each rank sends in a step", gib(sent.inside + sent.across))
        if sent.context:
            yield _row("  exchanged in attention", gib(sent.context))
        if sent.inside and sent.across:
            yield _row("  to other replicas", gib(sent.across))
        return
    yield _row("GiB that each rank sends in a step", "inside", "across", "seconds")
    replicas = found.recipe.strategy.replicas
    own = f"{found.recipe.strategy.kind}{f', {replicas} replicas' if replicas > 1 else ''} (this recipe)"
    others = {k: v for k, v in network.by_strategy.items() if replicas > 1 or k != found.recipe.strategy.kind}
    for name, traffic in {own: sent, **others}.items():
        seconds = network.seconds(traffic, replicas if name == own else 1)
        share = f" ({seconds / found.step_s:.0%})" if found.step_s else ""
        yield _row(f"  {name}", gib(traffic.inside), gib(traffic.across), f"{seconds:,.2f}{share}")
    of_step = "" if found.step_s is None else f", and in % of a step of {found.step_s:,.1f} s"
    yield from _wrapped(
        f"Inside a replica and across replicas; the time if nothing is overlapped{of_step}. The other strategies: "
        "without replicas."
    )


def _verdict(plan: Plan) -> Iterator[str]:
    if plan.fits is None:
        yield from _wrapped("To see if it fits, give --gpu-memory 24GiB and --host-memory 64GiB.")
    device = "memory for each rank" if plan.on_host else "each GPU"
    for limit, fits, peak, reserve, what in (
        (plan.limits.device, plan.device_fits, plan.peak_device_bytes, plan.device_reserve_bytes, device),
        (plan.limits.host, plan.host_fits, plan.peak_host_bytes, plan.host_reserve_bytes, "host memory for each rank"),
    ):
        if limit is not None:
            answer = "Fits" if fits else "Does NOT fit"
            yield from _wrapped(
                f"{answer}: {gib(peak)} GiB and a reserve of {gib(reserve)} GiB, of {gib(limit)} GiB of {what}."
            )


def _advice(found: PlanReport) -> Iterator[str]:
    if found.plan.fits is not False:
        return
    if not found.suggestions:
        yield from _wrapped(
            "No change of micro_batch, checkpointing, tiles, context_parallel, strategy, offload, quantization or "
            "ranks helps."
        )
        return
    yield "What fits, the smallest change first (GiB on the device, on the host):"
    for suggestion in found.suggestions:
        figures = f"{gib(suggestion.plan.peak_device_bytes)}, {gib(suggestion.plan.peak_host_bytes)}"
        *before, last = suggestion.overrides
        yield from (f"  {override}" for override in before)
        yield f"  {last:<{WIDTH - 20}}{figures:>18}"


def gib(size: int) -> str:
    return f"{size / GIB:,.2f}"


def _row(label: str, *values: str) -> str:
    if len(values) == 1 and len(values[0]) > 12:
        return f"{label:<20}{values[0]}"
    return f"{label:<{LABEL}}" + "".join(f"{value:>12}" for value in values)


def _wrapped(text: str) -> list[str]:
    """A path that is longer than a line has a line of its own, so that it can be copied."""
    return textwrap.wrap(text, WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
