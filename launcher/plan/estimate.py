"""Estimates what a recipe needs on each rank, with suggestions, time and cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from trainer.errors import InputError, MusterError, UsageError
from trainer.fast_imports import load_libraries

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from trainer.artifacts.shared_base import PlannedModel
    from trainer.plan.config import Base
    from trainer.plan.result import Plan
    from trainer.plan.run_length import RunLength
    from trainer.plan.suggestions import Suggestion
    from trainer.plan.teacher_memory import TeacherModel
    from trainer.plan.traffic import Traffic
    from trainer.recipe import ModelSection, Recipe


@dataclass(frozen=True)
class Network:
    """Bandwidths of each rank in bytes per second, within one of several replicas and elsewhere, and what a rank would
    send under each strategy without replicas."""

    inside: float
    across: float
    by_strategy: Mapping[str, Traffic]

    def seconds(self, traffic: Traffic, replicas: int = 1) -> float:
        """Returns the time if nothing is overlapped. A ring of all ranks is as fast as its slowest connection."""
        return traffic.inside / (self.inside if replicas > 1 else self.across) + traffic.across / self.across

    def to_json(self) -> dict[str, Any]:
        return {
            "inside_bytes_per_s": self.inside,
            "across_bytes_per_s": self.across,
            "strategies": {
                name: {**traffic._asdict(), "seconds": self.seconds(traffic)}
                for name, traffic in self.by_strategy.items()
            },
        }


class PlanReport:
    """The answer of `muster plan`: the plan, suggestions, the run's length, time and cost."""

    def __init__(
        self,
        recipe: Recipe,
        plan: Plan,
        suggestions: Sequence[Suggestion],
        outlook: RunLength,
        price: float | None,
        network: Network | None = None,
    ) -> None:
        self.recipe, self.plan, self.suggestions = recipe, plan, suggestions
        self.outlook, self.price, self.network = outlook, price, network

    def __str__(self) -> str:
        """Returns the table that `muster plan` prints."""
        from launcher.plan.table import report

        return "\n".join(report(self))

    @property
    def step_s(self) -> float | None:
        """Seconds of a step."""
        return self.plan.tokens_per_step / self.outlook.tokens_per_s if self.outlook.tokens_per_s else None

    @property
    def hours(self) -> float | None:
        return self.outlook.hours(self.plan.tokens_per_step)

    @property
    def gpu_hours(self) -> float | None:
        """Hours of all GPUs together, of all ranks where there are none."""
        per_rank = max(1, self.recipe.resources.gpus_per_worker)
        return None if self.hours is None else self.hours * self.plan.world_size * per_rank

    @property
    def cost(self) -> float | None:
        return None if self.price is None or self.gpu_hours is None else self.price * self.gpu_hours

    def to_json(self) -> dict[str, Any]:
        outlook = self.outlook
        return {
            **self.plan.to_json(),
            "steps": outlook.steps,
            "steps_per_epoch": outlook.steps_per_epoch,
            "samples_per_epoch": outlook.samples_per_epoch,
            "tokens_per_s": outlook.tokens_per_s,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "network": self.network and self.network.to_json(),
            "suggestions": [
                {
                    "overrides": list(s.overrides),
                    "world_size": s.plan.world_size,
                    "peak_device_bytes": s.plan.peak_device_bytes,
                    "peak_host_bytes": s.plan.peak_host_bytes,
                }
                for s in self.suggestions
            ],
        }


def make(
    recipe: Recipe,
    device: int | None,
    host: int | None,
    speed: float | None,
    price: float | None,
    bandwidths: tuple[float, float] | None = None,
    say: Callable[[str], None] = lambda phase: None,
    together: Sequence[Recipe] = (),
) -> PlanReport:
    """``together``: the runs of a recipe with `adapters`, of which ``recipe`` is the first."""
    say("loading libraries")
    load_libraries()
    from trainer.plan.config import read_base
    from trainer.plan.memory import Planner
    from trainer.plan.result import Limits
    from trainer.plan.run_length import RunLengthQuery
    from trainer.plan.suggestions import suggestions
    from trainer.recipe.tasks import TASKS

    inquiry = RunLengthQuery(recipe, speed)
    base = read_base(recipe.model, TASKS[recipe.task].auto_class)
    notes = [base.note] if base.note else []
    limits = Limits(device, host)
    if device is None and recipe.resources.gpus_per_worker > 0 and (here := gpu_here()) is not None:
        limits = Limits(here[1], host)
        notes.append(f"measured against the GPU here: {here[0]}")
    teacher, note = _teacher(recipe)
    reward, of_reward = _reward(recipe)
    notes += [text for text in (note, of_reward, _server(recipe, limits.device)) if text]
    planner, ranks = Planner(base.config, limits, teacher, reward), recipe.resources.min_workers
    if recipe.resources.max_workers != ranks:
        notes.append(
            f"planned for the fewest workers, {ranks}; each keeps less with more, up to {recipe.resources.max_workers}"
        )
    say("measuring the memory on a model without weights")
    plan = planner.plan(recipe, ranks, tuple(notes))
    if note := _together(plan, recipe, [planner.plan(other, ranks) for other in together]):
        plan = replace(plan, notes=(*plan.notes, note))
    if plan.fits is False:
        say("it does not fit; looking for what does")
    advice = suggestions(planner, recipe, ranks) if plan.fits is False else []
    network = bandwidths and Network(*bandwidths, planner.traffic_by_strategy(recipe, ranks))
    return PlanReport(recipe, plan, advice, inquiry.outlook(), price, network)


def _together(plan: Plan, recipe: Recipe, plans: Sequence[Plan]) -> str:
    """Returns a note on runs that share the base model; empty if this one cannot, or without a limit."""
    from trainer.plan.together import added_bytes, most_together, together_bytes
    from trainer.recipe.rules.together import check_together

    if plans:
        size, limit = together_bytes(plans), plan.limits.device
        fits = limit is None or size + plan.device_reserve_bytes <= limit
        answer = "" if limit is None else f", which {'fits' if fits else 'does NOT fit'}"
        return f"the table is that of the first run; all {len(plans)} together need {size / 2**30:.2f} GiB{answer}"
    most = most_together(plan)
    try:
        check_together([recipe])
    except UsageError:
        return ""
    if not most:
        return ""
    each = added_bytes(plan.largest) / 2**30
    return f"{most} runs like this one fit on one base model (muster sweep --together); each adds {each:.2f} GiB"


def _teacher(recipe: Recipe) -> tuple[TeacherModel | None, str]:
    """Returns the sizes of a second model that teaches in every step, and a note on the teacher; empty if there is
    none."""
    from trainer.artifacts.teacher import planned_teacher
    from trainer.plan.config import read_base
    from trainer.plan.memory import LOAD_BUDGET
    from trainer.plan.teacher_memory import TeacherModel

    found, place = planned_teacher(recipe), recipe.distill.teacher
    if found is None:
        return None, ""
    if found.shared:
        return None, f"the teacher {place} shares the student's base model; its own adapter is not counted"
    try:
        base = read_base(found.section)
        model = TeacherModel.of(_typed(found, base), base.config)
    except InputError as error:
        raise InputError(f"distill.teacher {place}: {error}") from error
    note = f"the teacher {place} is a second model of {model.elements:,} parameters. {base.note}".strip()
    if not recipe.stores_outputs:
        return model, note
    kept = model.bytes(recipe, recipe.resources.min_workers, 0, LOAD_BUDGET).kept
    return None, (
        f"{note} It is not counted, since its outputs are stored: the first attempt has it in memory until then, "
        f"{kept / 2**30:.2f} GiB more on each rank, before the optimizer's state"
    )


def _reward(recipe: Recipe) -> tuple[int, str]:
    """Returns the bytes of a reward model that is a model of its own, and a note on it; 0 and empty if there is
    none."""
    from trainer.artifacts.reward_model import planned_reward
    from trainer.plan.config import REACH_S, read_base
    from trainer.plan.reward_memory import reward_bytes
    from trainer.recipe.tasks import SEQUENCE
    from trainer.storage.limit import limited

    section = recipe.rollout_section
    if section is None or section.reward.model is None:
        return 0, ""
    place = section.reward.model
    try:
        found = limited(lambda _: planned_reward(recipe), REACH_S)
        if found is None or found.shared:
            return 0, f"the reward model {place} shares the policy's base model; its own adapter is not counted"
        base = read_base(found.section, SEQUENCE)
        size = reward_bytes(_typed(found, base), base.config)
    except (MusterError, OSError, TimeoutError) as error:
        return 0, f"the reward model {place} is NOT counted, since it cannot be read from here: {error}"
    return size, f"the reward model {place} is a second model, complete on each rank. {base.note}".strip()


def _typed(found: PlannedModel, base: Base) -> ModelSection:
    """Returns the model's section with the type in which it is loaded."""
    stored = str(getattr(base.config, "dtype", None)).removeprefix("torch.")
    keep = not found.as_stored or stored == "None"
    return found.section if keep else found.section.model_copy(update={"dtype": stored})


def _server(recipe: Recipe, device: int | None) -> str:
    """Returns a note on the servers that muster starts; empty if there are none."""
    from trainer.plan.rollout_memory import has_server

    if recipe.rollout_section is not None and recipe.rollout.servers_beside:
        return _beside(recipe)
    if not has_server(recipe):
        return ""
    vllm = recipe.rollout.vllm
    if not recipe.resources.gpus_per_worker:
        return "the memory of the vLLM server on each node is not counted"
    if device is None:
        return f"the vLLM server takes {vllm.memory_share:.0%} of a GPU; --gpu-memory counts it"
    gpus = f"{vllm.tensor_parallel} GPUs" if vllm.tensor_parallel > 1 else "GPU"
    return f"the vLLM server is on the first {gpus} of each node, and counted on every rank"


def _beside(recipe: Recipe) -> str:
    """Returns a note on servers with GPUs of their own."""
    from trainer.plan.first_estimate import first_estimate, read_numbers
    from trainer.plan.rollout_memory import DTYPE_BYTES

    vllm, count = recipe.rollout.vllm, recipe.rollout.servers_beside
    numbers = read_numbers(recipe.model.path)
    found = None if numbers is None else first_estimate(recipe, numbers, recipe.resources.min_workers)
    need = "the weights"
    if found is not None:
        weights = found.parameters * DTYPE_BYTES[recipe.model.dtype] / vllm.tensor_parallel
        need = f"{weights / 2**30:.1f} GiB of weights"
    kind = "GPU" if recipe.resources.gpus_per_worker else "process"
    servers = f"{count} vLLM server{'' if count == 1 else 's'}"
    return f"{servers} beside the training take nothing from it; each {kind} of theirs holds {need}, and a cache"


def gpu_here() -> tuple[str, int] | None:
    """The name and the bytes of this machine's first GPU, if there is one."""
    import torch

    if not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_properties(0)
    return found.name, found.total_memory
