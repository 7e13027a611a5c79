"""A table of rules: which values of different sections do not work together. The support matrix is in ``matrix``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from trainer.recipe.base import Conflict, KeyPath
from trainer.recipe.formats import FORMATS, formats_of
from trainer.recipe.rules import matrix
from trainer.recipe.rules.refusal import with_adapter_off
from trainer.recipe.sections.compute import SIXTEEN_BIT
from trainer.recipe.sections.data import SourceSection
from trainer.recipe.sections.rollouts.grpo import GRPOSection
from trainer.recipe.sections.samples import SamplesSection
from trainer.recipe.tasks import TASKS, compared_metrics
from trainer.recipe.trackers import TRACKERS
from trainer.registry import choose_hint, key_of

if TYPE_CHECKING:
    from trainer.recipe.root import Recipe

ON_GPUS = ("flex", "flash")
"""Attention kernels that CPUs do not have, or not with a backward pass."""
NEVER = 1 << 62
"""Steps between events that do not happen."""
MASKLESS_KERNELS = ("varlen", *ON_GPUS)
"""Attention kernels that take the start of each sample instead of a mask."""


SAME_IN_A_SWEEP = ("name", "storage", "cluster", "resources", "plugins", "sweep")
"""Settings that say where and how trials run; their sweep sets them."""


class Rule(NamedTuple):
    """A rule across sections. ``paths``: the values that it compares, the main one first. ``broken``: true if the
    recipe breaks the rule. ``message``: the sentence for the user, which follows the main value's path."""

    paths: tuple[KeyPath, ...]
    broken: Callable[[Recipe], bool]
    message: Callable[[Recipe], str]


RULES = (
    Rule(
        (("optimizer", "name"), ("strategy", "kind")),
        lambda r: r.strategy.row.zero_stage > 0 and r.optimizer.row.against_zero() is not None,
        lambda r: (
            f"{r.optimizer.name} does not work with strategy.kind {r.strategy.kind}: it "
            f"{r.optimizer.row.against_zero()}; use fsdp or ddp with it, or adamw"
        ),
    ),
    Rule(
        (("optimizer", "name"), ("strategy", "offload")),
        lambda r: r.strategy.offload and r.optimizer.row.holds in ("complete", "matrices"),
        lambda r: (
            f"{r.optimizer.name} updates complete matrices on the GPU, and strategy.offload keeps them on the host; "
            "turn it off, or use adamw"
        ),
    ),
    Rule(
        (("optimizer", "name"), ("strategy", "offload")),
        lambda r: r.strategy.offload and r.optimizer.row.paged,
        lambda r: f"{r.optimizer.name} moves GPU memory to the host, where strategy.offload keeps it; drop one of them",
    ),
    Rule(
        (("optimizer", "name"), ("model", "dtype")),
        lambda r: r.model.dtype == "float16" and r.strategy.kind == "fsdp" and r.optimizer.row.holds != "any",
        lambda r: (
            f"{r.optimizer.name} gets parts of the gradient under fsdp, and float16 skips an update if any part "
            "overflows; use bfloat16, or adamw"
        ),
    ),
    Rule(
        (("optimizer", "name"), ("resources", "gpus_per_worker")),
        lambda r: r.optimizer.row.paged and r.resources.gpus_per_worker == 0,
        lambda r: (
            f"{r.optimizer.name} moves GPU memory to the host, and gpus_per_worker is 0; use "
            f"{r.optimizer.name.removeprefix('paged_').removesuffix('_32bit')}"
        ),
    ),
    Rule(
        (("schedule", "name"), ("optimizer", "name")),
        lambda r: r.optimizer.row.averages and r.schedule.name != "constant",
        lambda r: (
            f"{r.schedule.name} lowers the rate, and the average of {r.optimizer.name} takes the place of that; "
            "use constant, with a warm-up"
        ),
    ),
    Rule(
        (("model", "dtype"), ("strategy", "kind")),
        lambda r: r.model.dtype == "float16" and r.strategy.row.zero_stage > 0,
        lambda r: (
            f"float16 scales the loss, and {r.strategy.kind} cannot skip an update whose gradients overflow; "
            "use bfloat16 or float32, or fsdp"
        ),
    ),
    Rule(
        (("adapter", "method"), ("training", "gradient_checkpointing")),
        lambda r: r.adapter.method == "prefix" and r.training.gradient_checkpointing,
        lambda r: "prefix is lost when layers are computed again; set training.gradient_checkpointing to false",
    ),
    Rule(
        (("adapter", "method"), ("model", "dtype")),
        lambda r: r.adapter.method == "adalora" and r.model.dtype == "float16",
        lambda r: "adalora scores weights by their gradients, and float16's overflow; use bfloat16 or float32",
    ),
    Rule(
        (("strategy", "context_parallel"), ("resources", "workers")),
        lambda r: any(n % r.strategy.context_parallel for n in (r.resources.min_workers, r.resources.max_workers)),
        lambda r: (
            f"is {r.strategy.context_parallel}, which does not divide resources.workers {_workers(r)}; change one of "
            "them"
        ),
    ),
    Rule(
        (("strategy", "replicas"), ("resources", "workers")),
        lambda r: r.resources.max_workers % (r.strategy.replicas * r.strategy.context_parallel) > 0,
        lambda r: f"is {r.strategy.replicas}, which does not divide {_groups(r)}; change one of them",
    ),
    Rule(
        (("exact",), ("strategy", "context_parallel")),
        lambda r: r.exact and r.strategy.context_parallel > 1,
        lambda r: "cannot hold with context_parallel, whose ranks add parts of a sample's gradient; set it to 1",
    ),
    Rule(
        (("strategy", "context_parallel"), ("task",)),
        lambda r: r.strategy.context_parallel > 1 and not TASKS[r.task].divides_texts,
        lambda r: (
            f"works with {', '.join(name for name, row in TASKS.items() if row.divides_texts)}, whose loss can be "
            f"computed from parts of a text, and not with {r.task}; set it to 1"
        ),
    ),
    Rule(
        (("strategy", "context_parallel"), ("adapter", "method")),
        lambda r: r.strategy.context_parallel > 1 and r.adapter.row.own_vectors != "none",
        lambda r: (
            f"divides the tokens of a text, and {r.adapter.method} may add tokens of its own; set it to 1, or use "
            "another method"
        ),
    ),
    Rule(
        (("strategy", "context_parallel"), ("training", "router_aux_loss_coef")),
        lambda r: r.strategy.context_parallel > 1 and r.training.router_aux_loss_coef is not None,
        lambda r: (
            "would balance the experts within a part of a text only; set it to 1, or leave router_aux_loss_coef out"
        ),
    ),
    Rule(
        (("strategy", "context_parallel"), ("compute", "compile")),
        lambda r: r.strategy.context_parallel > 1 and r.compute.compile,
        lambda r: "exchanges tokens in every layer, which torch.compile does not capture; turn one of the two off",
    ),
    Rule(
        (("compute", "offload_activations"), ("training", "gradient_checkpointing")),
        lambda r: r.compute.offload_activations and not r.training.gradient_checkpointing,
        lambda r: (
            "moves the inputs of checkpointed layers; set training.gradient_checkpointing to true, or leave it out"
        ),
    ),
    Rule(
        (("compute", "tile_tokens"), ("compute", "compile")),
        lambda r: r.compute.tile_tokens is not None and r.compute.compile,
        lambda r: "computes parts of a layer again, which torch.compile does not capture; turn one of the two off",
    ),
    Rule(
        (("compute", "tile_tokens"), ("training", "router_aux_loss_coef")),
        lambda r: r.compute.tile_tokens is not None and r.training.router_aux_loss_coef is not None,
        lambda r: "would balance the experts within a tile only; leave tile_tokens or router_aux_loss_coef out",
    ),
    Rule(
        (("compute", "attention"), ("strategy", "context_parallel")),
        lambda r: r.strategy.context_parallel > 1 and r.compute.attention == "flex",
        lambda r: "flex does not work with context_parallel; use auto, varlen, flash or sdpa",
    ),
    Rule(
        (("exact",), ("strategy", "kind")),
        lambda r: r.exact and r.strategy.kind != "ddp",
        lambda r: f"cannot hold under {r.strategy.kind}, which adds gradients shard by shard; use strategy.kind ddp",
    ),
    Rule(
        (("exact",), ("resources", "gpus_per_worker")),
        lambda r: r.exact and r.resources.gpus_per_worker > 0,
        lambda r: "cannot hold on GPUs, whose kernels add in an order of their own; set gpus_per_worker to 0",
    ),
    Rule(
        (("exact",), ("model", "dtype")),
        lambda r: r.exact and r.model.dtype == "float16",
        lambda r: "needs gradients that are not scaled, and float16 scales them; use float32 or bfloat16",
    ),
    Rule(
        (("adapter", "bias"), ("task",)),
        lambda r: with_adapter_off(TASKS[r.task]) and r.adapter.bias not in (None, "none"),
        lambda r: (
            f"{r.adapter.bias} trains biases of the base, which stay changed when the adapter is switched off for the "
            f"reference of {r.task}; use none"
        ),
    ),
    Rule(
        (("data", "packing"), ("task",)),
        lambda r: TASKS[r.task].generates and r.data.packing,
        lambda r: f"cannot be used with task {r.task}, whose packs are prompts; write packing: false",
    ),
    Rule(
        (("rollout", "engine"), ("adapter", "method")),
        lambda r: r.rollout.row.serves and not r.adapter.is_plain_lora,
        lambda r: (
            f"{r.rollout.engine} takes LoRA's matrices only, and method {r.adapter.label}, bias, modules_to_save or "
            "trainable_tokens add something else; use method lora without them, or engine transformers"
        ),
    ),
    Rule(
        (("distill", "teacher"), ("task",)),
        lambda r: TASKS[r.task].has_teacher and r.distill.teacher is None,
        lambda r: f"task {r.task} needs a teacher: a run, the folder of an adapter, or a causal language model",
    ),
    Rule(
        (("schedule", "warmup_steps"), ("training", "steps")),
        lambda r: r.training.steps is not None and r.schedule.warmup_steps > r.training.steps,
        lambda r: (
            f"{r.schedule.warmup_steps} warm-up steps are more than training.steps {r.training.steps}, "
            "so that the learning rate is never reached; lower one or raise the other"
        ),
    ),
    Rule(
        (("compute", "attention"), ("resources", "gpus_per_worker")),
        lambda r: r.compute.attention in ON_GPUS and r.resources.gpus_per_worker == 0,
        lambda r: f"{r.compute.attention} runs on GPUs only, and gpus_per_worker is 0; use auto or sdpa",
    ),
    Rule(
        (("compute", "attention"), ("model", "dtype")),
        lambda r: (
            r.compute.attention in ("varlen", "flash")
            and r.resources.gpus_per_worker > 0
            and r.model.dtype not in SIXTEEN_BIT
        ),
        lambda r: (
            f"{r.compute.attention} computes in 16 bits on GPUs, and model.dtype is {r.model.dtype}; use flex or sdpa"
        ),
    ),
    Rule(
        (("compute", "attention"), ("task",)),
        lambda r: r.compute.attention in MASKLESS_KERNELS and not TASKS[r.task].segments,
        lambda r: (
            f"{r.compute.attention} takes no mask; "
            f"{' and '.join(name for name, row in TASKS.items() if row.segments)} need none, but {r.task} "
            "does; use auto or sdpa"
        ),
    ),
    Rule(
        (("compute", "attention"), ("adapter", "method")),
        lambda r: r.compute.attention in MASKLESS_KERNELS and r.adapter.row.inserts_tokens,
        lambda r: (
            f"{r.compute.attention} needs the start of each sample, which {r.adapter.method} may move with its own "
            "tokens; use auto or sdpa"
        ),
    ),
    Rule(
        (("compute", "kernels"), ("resources", "gpus_per_worker")),
        lambda r: r.compute.kernels == "liger" and r.resources.gpus_per_worker == 0,
        lambda r: "liger runs on GPUs only, and gpus_per_worker is 0; use none",
    ),
    Rule(
        (("compute", "tf32"), ("resources", "gpus_per_worker")),
        lambda r: r.compute.tf32 and r.resources.gpus_per_worker == 0,
        lambda r: "has no effect on CPUs, and gpus_per_worker is 0; set it to false",
    ),
    Rule(
        (("compute", "tf32"), ("model", "dtype")),
        lambda r: r.compute.tf32 and r.model.dtype != "float32",
        lambda r: f"has no effect on products in {r.model.dtype}; set it to false, or model.dtype to float32",
    ),
    Rule(
        (("compute", "attention"), ("compute", "compile")),
        lambda r: r.compute.attention == "varlen" and r.compute.compile and r.resources.gpus_per_worker == 0,
        lambda r: "varlen loops over the samples on CPUs, which does not compile; use auto or sdpa",
    ),
    Rule(
        (("compute", "compile"), ("strategy", "kind")),
        lambda r: r.compute.compile and r.strategy.row.zero_stage == 3,
        lambda r: "would be repeated for each module that zero3 gathers parameters for; use fsdp, or zero2",
    ),
    Rule(
        (("compute", "compile"), ("task",)),
        lambda r: r.compute.compile and TASKS[r.task].generates,
        lambda r: f"does not work with task {r.task}, which writes texts token by token with a cache; set it to false",
    ),
    Rule(
        (("compute", "compile"), ("exact",)),
        lambda r: r.compute.compile and r.exact,
        lambda r: "gives ranks programs that may add in different orders, and exact promises the same bytes; drop one",
    ),
    Rule(
        (("profile", "steps"), ("training", "steps")),
        lambda r: bool(r.profile.steps) and r.training.steps is not None and r.profile.steps[0] > r.training.steps,
        lambda r: f"begins at step {r.profile.steps[0]}, and the run has {r.training.steps} steps; name earlier ones",
    ),
    Rule(
        (("profile", "ranks"), ("resources", "workers")),
        lambda r: bool(r.profile.steps) and any(rank >= r.resources.max_workers for rank in r.profile.ranks),
        lambda r: (
            f"names rank {max(r.profile.ranks)}, and ranks count from 0 to {r.resources.max_workers - 1} here; "
            "lower it, or raise resources.workers"
        ),
    ),
    Rule(
        (("training", "router_aux_loss_coef"), ("task",)),
        lambda r: r.training.router_aux_loss_coef is not None and not TASKS[r.task].router_loss,
        lambda r: (
            f"cannot be added to the loss of task {r.task}, only to that of "
            f"{' and '.join(name for name, row in TASKS.items() if row.router_loss)}; leave it out"
        ),
    ),
    Rule(
        (("training", "router_aux_loss_coef"), ("adapter", "method")),
        lambda r: r.training.router_aux_loss_coef is not None and r.adapter.row.inserts_tokens,
        lambda r: f"would count the tokens that {r.adapter.method} inserts; leave it out",
    ),
    Rule(
        (("samples",), ("data", "eval")),
        lambda r: _writes_samples(r) and not r.data.evaluates,
        lambda r: (
            "has no effect without data.eval or data.eval_fraction, whose prompts it takes; add one, or leave it out"
        ),
    ),
    Rule(
        (("samples",), ("task",)),
        lambda r: _writes_samples(r) and TASKS[r.task].has_head,
        lambda r: f"has no effect with task {r.task}, whose model writes no texts; leave it out",
    ),
    Rule(
        (("generative_eval", "count"), ("data", "eval")),
        lambda r: bool(r.generative_eval.count) and not _asks(r),
        lambda r: (
            "needs questions with answers, and the evaluation data are texts only; leave it out"
            if r.data.evaluates
            else "has no effect without data.eval or data.eval_fraction, whose questions it takes; add one, or leave "
            "it out"
        ),
    ),
    Rule(
        (("generative_eval", "count"), ("task",)),
        lambda r: bool(r.generative_eval.count) and TASKS[r.task].has_head,
        lambda r: f"has no effect with task {r.task}, whose model writes no texts; leave it out",
    ),
    Rule(
        (("generative_eval", "count"), ("adapter", "method")),
        lambda r: bool(r.generative_eval.count) and r.adapter.row.inserts_tokens,
        lambda r: (
            f"generates with a key-value cache, which {r.adapter.method} may fill itself; leave it out, and measure "
            "with `muster evaluate` after training"
        ),
    ),
    Rule(
        (("generative_eval", "every"), ("training", "eval_every")),
        lambda r: bool((r.generative_eval.every or 0) % (r.training.eval_every or NEVER)),
        lambda r: (
            "needs training.eval_every, since answers are part of an evaluation; set that to the same number of steps, "
            "or to a part of it"
            if r.training.eval_every is None
            else f"is {r.generative_eval.every}, which is no multiple of training.eval_every {r.training.eval_every}: "
            "answers are part of an evaluation; change one of them"
        ),
    ),
    Rule(
        (("training", "eval_every"), ("data", "eval")),
        lambda r: r.training.eval_every is not None and not r.data.evaluates,
        lambda r: "has no effect without data.eval or data.eval_fraction; add a source there, or leave it out",
    ),
    Rule(
        (("checkpoint", "keep_best"), ("training", "eval_every"), ("data", "eval")),
        lambda r: r.checkpoint.keep_best is not None and not _evaluates_often(r),
        lambda r: f"compares evaluations: {WITH_EVALUATIONS}",
    ),
    Rule(
        (("training", "early_stop"), ("training", "eval_every"), ("data", "eval")),
        lambda r: r.training.early_stop is not None and not _evaluates_often(r),
        lambda r: f"compares evaluations: {WITH_EVALUATIONS}",
    ),
    Rule(
        (("checkpoint", "keep_best"), ("task",)),
        lambda r: r.checkpoint.keep_best is not None and r.checkpoint.keep_best not in compared_metrics(r),
        lambda r: _no_metric(r, r.checkpoint.keep_best),
    ),
    Rule(
        (("training", "early_stop", "metric"), ("task",)),
        lambda r: r.training.early_stop is not None and r.training.early_stop.metric not in compared_metrics(r),
        lambda r: _no_metric(r, r.training.early_stop.metric if r.training.early_stop else None),
    ),
    Rule(
        (("sweep", "metric"), ("task",)),
        lambda r: r.sweep is not None and r.sweep.metric not in compared_metrics(r),
        lambda r: _no_metric(r, r.sweep.metric if r.sweep else None),
    ),
    Rule(
        (("sweep", "metric"), ("data", "eval")),
        lambda r: r.sweep is not None and not r.data.evaluates,
        lambda r: "is never measured: give data.eval or data.eval_fraction",
    ),
    Rule(
        (("sweep", "stop"), ("training", "eval_every")),
        lambda r: r.sweep is not None and r.sweep.stop != "none" and r.training.eval_every is None,
        lambda r: "compares evaluations during training: give training.eval_every",
    ),
    Rule(
        (("sweep", "parameters"), ("training", "stop_after")),
        lambda r: r.sweep is not None and r.training.stop_after is not None,
        lambda r: "trains each trial to its end, and training.stop_after interrupts it; leave that out",
    ),
    Rule(
        (("adapters",), ("sweep",)),
        lambda r: r.sweep is not None and bool(r.adapters),
        lambda r: "are several runs, and so is a sweep; leave one of them out (adapters={})",
    ),
    Rule(
        (("rollout", "vllm", "servers"), ("sweep",)),
        lambda r: r.sweep is not None and r.rollout.servers_beside > 0,
        lambda r: "cannot be placed for the trials of a sweep; set it to null, for a server on each node's own GPUs",
    ),
    Rule(
        (("adapter", "from"), ("task",)),
        lambda r: r.adapter.begins_from is not None and with_adapter_off(TASKS[r.task]),
        lambda r: (
            f"does not work with task {r.task}, whose reference is the model without that adapter; merge it into the "
            "model (muster merge) and name the result in model.path"
        ),
    ),
)

WITH_EVALUATIONS = "give data.eval or data.eval_fraction, and training.eval_every; or leave it out"


def _evaluates_often(recipe: Recipe) -> bool:
    return recipe.data.evaluates and recipe.training.eval_every is not None


def _no_metric(recipe: Recipe, name: str | None) -> str:
    known = tuple(compared_metrics(recipe))
    hint = choose_hint(str(name), known)
    return f"{name!r} is no metric that compares evaluations of task {recipe.task}: {', '.join(known)}{hint}"


def _workers(recipe: Recipe) -> str:
    bounds = recipe.resources.workers
    return str(bounds if isinstance(bounds, int) else list(bounds))


def _groups(recipe: Recipe) -> str:
    workers, context = recipe.resources.max_workers, recipe.strategy.context_parallel
    of_context = f"the {workers // context} groups of {context} (context_parallel) of " if context > 1 else ""
    return f"{of_context}{workers} workers (resources.workers)"


def _writes_samples(recipe: Recipe) -> bool:
    # A frozen recipe contains every default, so defaults do not count as a request.
    return recipe.samples.count > 0 and recipe.samples != SamplesSection()


def _asks(recipe: Recipe) -> bool:
    """Returns True if the evaluation data may have prompts with answers."""
    sources = recipe.data.eval or (recipe.data.train if recipe.data.evaluates else ())
    # Formats of another kind than the task's are a mistake of their own.
    return any(FORMATS[source.format].gives != "text" for source in sources)


def across_sections(recipe: Recipe) -> Iterator[Conflict]:
    """Yields the conflicts between values of different sections."""
    yield from (Conflict(rule.paths, rule.message(recipe)) for rule in RULES if rule.broken(recipe))
    yield from matrix.conflicts(recipe)
    yield from _formats_of_task(recipe)
    yield from _of_rollouts(recipe)
    yield from _unused_sections(recipe)
    yield from _parameters_of_sweep(recipe)
    for path, source in _sources(recipe):
        task = TASKS[recipe.task]
        if task.generates and source.loss_weight != 1.0:
            paths = ((*path, "loss_weight"), ("task",))
            message = f"has no effect with task {recipe.task}, which learns from its own texts; leave it out"
            yield Conflict(paths, message)
        if "margin" in source.columns and not task.margins and not task.generates:
            paths = ((*path, "columns", "margin"), ("task",))
            yield Conflict(paths, f"has no effect with task {recipe.task}, whose loss knows no margin; leave it out")


def _parameters_of_sweep(recipe: Recipe) -> Iterator[Conflict]:
    """Yields the parameters of a sweep that are no settings of a recipe, or that have to be the same for all trials."""
    from trainer.recipe.overrides import path_of, wrong_key

    for key in recipe.sweep.parameters if recipe.sweep else ():
        path = path_of(key)
        if said := wrong_key(path):
            yield Conflict((("sweep", "parameters", key),), said)
        elif path[0] in SAME_IN_A_SWEEP:
            yield Conflict((("sweep", "parameters", key),), f"cannot vary: {path[0]} is the same for all trials")


def _unused_sections(recipe: Recipe) -> Iterator[Conflict]:
    """Yields settings of tasks and trackers that this run does not use."""
    for task, section in ((task, row.section) for task, row in TASKS.items() if task != recipe.task):
        for name in getattr(recipe, key_of(task)).given() if section else ():
            yield Conflict(((key_of(task), name), ("task",)), f"has no effect with task {recipe.task}; leave it out")
    for tracker, section in ((name, row.section) for name, row in TRACKERS.items() if name not in recipe.tracking):
        for name in getattr(recipe, key_of(tracker)).given() if section else ():
            message = f"has no effect without {tracker} in tracking; add it there, or leave this out"
            yield Conflict(((key_of(tracker), name), ("tracking",)), message)


def _of_rollouts(recipe: Recipe) -> Iterator[Conflict]:
    """Yields what a task cannot use that learns from texts of the model."""
    key, task = key_of(recipe.task), recipe.task
    section = recipe.rollout_section
    if section is None:
        for name in recipe.rollout.given():
            yield Conflict((("rollout", name), ("task",)), f"has no effect with task {task}; leave it out")
        return
    if not section.weights:
        sources = f"{key}.reward.function, {key}.reward.functions or {key}.reward.model, or {key}.environment"
        message = f"task {task} needs a reward: {sources}"
        yield Conflict(((key, "reward"), ("task",)), message)
    texts = recipe.training.global_batch * section.answers
    if section.minibatches > texts:
        message = f"{section.minibatches} minibatches cannot be made of the {texts} texts of a step"
        yield Conflict(((key, "minibatches"), ("training", "global_batch")), message)
    if recipe.model.dtype == "float16":
        message = f"float16 skips updates whose scaled gradients overflow, and {task} needs every one; use bfloat16"
        yield Conflict((("model", "dtype"), ("task",)), message)
    if isinstance(section, GRPOSection) and section.kl_coef > 0:
        yield from _of_reference(recipe)


def _of_reference(recipe: Recipe) -> Iterator[Conflict]:
    """Yields what keeps the model with its adapter off from being the reference of `grpo.kl_coef`."""
    method, bias = recipe.adapter.method, recipe.adapter.bias
    if recipe.adapter.changes_base:
        message = f"needs the model with its adapter off as reference, which method {method} does not give; write 0"
        yield Conflict((("grpo", "kl_coef"), ("adapter", "method")), message)
    if bias not in (None, "none"):
        message = f"{bias} changes the model with its adapter off, the reference of grpo.kl_coef; use none"
        yield Conflict((("adapter", "bias"), ("grpo", "kl_coef")), message)


def _formats_of_task(recipe: Recipe) -> Iterator[Conflict]:
    """Yields the sources that the task cannot learn from."""
    known = formats_of(recipe.task)
    for path, source in _sources(recipe):
        if source.format not in known:
            message = f"task {recipe.task} does not learn from format {source.format}; it takes {', '.join(known)}"
            yield Conflict(((*path, "format"), ("task",)), message)


def _sources(recipe: Recipe) -> Iterator[tuple[KeyPath, SourceSection]]:
    for part, sources in (("train", recipe.data.train), ("eval", recipe.data.eval)):
        for index, source in enumerate(sources):
            yield ("data", part, index), source
