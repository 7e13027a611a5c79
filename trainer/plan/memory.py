"""Computes every rank's bytes from a recipe and its base's configuration."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.adapters import make_adapter
from trainer.adapters.coverage import adapted_elements
from trainer.model.key_mapping import check_by_shard
from trainer.model.meta import NeedsFullLoad
from trainer.plan.activation_memory import Working, working_set
from trainer.plan.fake_quantized_linear import packed_sizes
from trainer.plan.meta_model import skeleton
from trainer.plan.optimizer_memory import WHOLE, checkpoint_bytes, partition_bytes
from trainer.plan.result import Limits, Plan, RankPlan
from trainer.plan.rollout_memory import RolloutBytes, text_numbers
from trainer.plan.shards import Share, share, weights_of
from trainer.plan.teacher_memory import TeacherBytes, TeacherModel
from trainer.plan.traffic import Traffic, traffic
from trainer.recipe import Recipe
from trainer.recipe.strategies import STRATEGIES, Mesh
from trainer.recipe.zero import zero_settings
from trainer.strategies.shards import Weight

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

LOAD_BUDGET = 150_000_000
"""Bytes of host memory that a sharded load takes in addition to the shard itself."""
DEVICE_RESERVE = 768 * 2**20
"""Bytes of a GPU that tensors cannot use: CUDA's context, NCCL's buffers, and the allocator's fragmentation."""
HOST_RESERVE = 1024 * 2**20
"""Bytes of a rank's process without tensors: the interpreter and its libraries."""


@dataclass(frozen=True)
class Model:
    """The sizes of the full model."""

    weights: Counter[Weight]
    total: int
    trainable: int
    adapted: int
    quantised: int
    quant_state: int
    by_shard: bool
    """True if each rank loads its own part only."""
    mapped: int = 0
    """Bytes of files that are mapped during a whole load, which converts or quantises their values."""

    @property
    def bytes(self) -> int:
        return sum(w.numel * w.itemsize * count for w, count in self.weights.items()) + self.quant_state


def read_model(recipe: Recipe, config: PreTrainedConfig) -> Model:
    # Under full fine-tuning DeepSpeed casts the model; its float32 copy is counted with the optimizer.
    model = skeleton(recipe, config, as_gathered=recipe.strategy.row.zero_stage > 0)
    packed = list(packed_sizes(model))
    hidden = sum(size.elements - size.stored for size in packed)
    weights = weights_of(model)
    total = sum(w.numel * count for w, count in weights.items()) + hidden
    trainable = sum(w.numel * count for w, count in weights.items() if w.trainable)
    return Model(
        weights,
        total,
        trainable,
        adapted=trainable if recipe.adapter.method == "none" else adapted_elements(model),
        quantised=sum(size.elements for size in packed),
        quant_state=sum(size.state_bytes for size in packed),
        by_shard=_by_shard(recipe, model),
        mapped=_mapped(recipe, config, total if recipe.adapter.method == "none" else total - trainable),
    )


def _mapped(recipe: Recipe, config: PreTrainedConfig, elements: int) -> int:
    """Returns the bytes of mapped files: 0 if the model keeps the values and dtype of its files, which it copies.

    The kernel counts mapped pages as the process's memory, but takes them back when memory is short."""
    import torch

    held = "float32" if recipe.adapter.method == "none" else recipe.model.dtype
    stored = getattr(config, "dtype", None) or getattr(torch, held)
    copied = recipe.model.quantization == "none" and stored == getattr(torch, held)
    return 0 if copied else elements * int(stored.itemsize)


def _by_shard(recipe: Recipe, model: torch.nn.Module) -> bool:
    """Returns True for a sharded load."""
    adapter = make_adapter(recipe)
    try:
        from_base = not adapter.loads_by_shard(model)
        check_by_shard(model, recipe.model.quantization, recipe.adapter.label, from_base=from_base)
    except NeedsFullLoad:
        return False
    return bool(STRATEGIES.load(recipe.strategy.kind).loads_sharded(recipe))


class Planner:
    """Plans recipes that share a base, and caches their common parts. ``teacher``: a second model that they have.
    ``reward``: bytes of the weights of a reward model that is a model of its own."""

    def __init__(
        self, config: PreTrainedConfig, limits: Limits, teacher: TeacherModel | None = None, reward: int = 0
    ) -> None:
        self.config, self.limits, self.teacher, self.reward = config, limits, teacher, reward
        self._models: dict[str, Model] = {}
        self._working: dict[str, Working] = {}

    def plan(self, recipe: Recipe, ranks: int, notes: tuple[str, ...] = ()) -> Plan:
        """Raises InputError when no such model can be built, or the adapter does not fit it."""
        return self._plan(recipe, ranks, gathered(recipe, self._model(recipe), self._computing(recipe, ranks)), notes)

    def may_fit(self, recipe: Recipe, ranks: int) -> bool:
        """Returns False if the bytes kept between steps do not fit. Much faster than `plan`, which may fail later."""
        return self._plan(recipe, ranks, Working(0, 0), ()).fits is not False

    def traffic_by_strategy(self, recipe: Recipe, ranks: int) -> dict[str, Traffic]:
        """Returns what each rank would send in a step under each strategy with the recipe's other values."""
        found = {}
        for kind in STRATEGIES.names():
            if recipe.strategy.context_parallel > 1 and "context_parallel" not in STRATEGIES[kind].settings:
                continue
            section = recipe.strategy.model_copy(update={"kind": kind, "replicas": 1})
            other = recipe.model_copy(update={"strategy": section, "exact": False})
            found[kind] = self._traffic(other, self._model(recipe), ranks)
        return found

    def _traffic(self, recipe: Recipe, model: Model, ranks: int) -> Traffic:
        sent = traffic(recipe, self.config, model.weights, ranks)
        return sent._replace(inside=sent.inside + (self.teacher.sent(recipe, ranks) if self.teacher else 0))

    def _model(self, recipe: Recipe) -> Model:
        key = _key(recipe, recipe.strategy.kind)
        if key not in self._models:
            self._models[key] = read_model(recipe, self.config)
        return self._models[key]

    def _computing(self, recipe: Recipe, ranks: int) -> Working:
        strategy, training = recipe.strategy, recipe.training
        mesh = Mesh.of(recipe, ranks)
        divided = (mesh.context, mesh.ranks_per_replica if strategy.row.plan_runs_wrap else 0)
        sharded = (strategy.kind, strategy.reshard_after_forward, *divided)
        tiles, kept = recipe.compute.tile_tokens, recipe.compute.offload_activations
        packs = (training.micro_batch, training.gradient_checkpointing, recipe.data.sequence_length, tiles, kept)
        key = _key(recipe, *sharded, *packs)
        if key not in self._working:
            self._working[key] = working_set(recipe, self.config, ranks)
        return self._working[key]

    def _plan(self, recipe: Recipe, ranks: int, working: Working, notes: tuple[str, ...]) -> Plan:
        model = self._model(recipe)
        stored = checkpoint_bytes(recipe, model.weights)
        on_host = recipe.resources.gpus_per_worker == 0
        text = text_numbers(self.config.get_text_config())
        rollouts = RolloutBytes.of(recipe, text, self.limits.device, self.reward)
        # The first rank's host holds a checkpoint while it is uploaded.
        each = (
            _rank(
                recipe,
                model,
                working,
                ranks,
                rank,
                0 if rank else stored,
                self.teacher.bytes(recipe, ranks, rank, LOAD_BUDGET) if self.teacher else TeacherBytes(),
                rollouts,
            )
            for rank in range(ranks)
        )
        return Plan(
            world_size=ranks,
            total_parameters=model.total,
            trainable_parameters=model.trainable,
            adapted_parameters=model.adapted,
            quantised_parameters=model.quantised,
            ranks=tuple(each),
            traffic=self._traffic(recipe, model, ranks),
            checkpoint_bytes=stored,
            tokens_per_step=recipe.training.global_batch * recipe.data.sequence_length,
            limits=self.limits,
            on_host=on_host,
            device_reserve_bytes=HOST_RESERVE if on_host else DEVICE_RESERVE,
            host_reserve_bytes=HOST_RESERVE,
            notes=notes,
        )


def _key(recipe: Recipe, *more: object) -> str:
    return repr((recipe.model, recipe.adapter, recipe.task, recipe.distill.top_k, recipe.distill.ce_coef > 0, *more))


def gathered(recipe: Recipe, model: Model, working: Working) -> Working:
    """Returns ``working`` with DeepSpeed's unsharded bytes, which its settings bound (in elements)."""
    strategy = recipe.strategy
    if not strategy.row.zero_stage:
        return working
    settings = zero_settings(strategy.kind, strategy.deepspeed)
    bucket = min(model.trainable, int(settings.get("reduce_bucket_size", 5e8)))
    buckets = (2 if settings.get("overlap_comm", True) else 1) * bucket * WHOLE
    if strategy.row.shards != "parameters":
        return working._replace(unsharded=buckets)
    elements: Counter[int] = Counter()  # by their bytes
    for weight, count in model.weights.items():
        elements[weight.itemsize] += weight.numel * count
    live = min(elements.total(), int(settings.get("stage3_max_live_parameters", 1e9)))
    ahead = min(elements.total(), int(settings.get("stage3_prefetch_bucket_size", 5e7)))
    most_common = max(elements, key=elements.__getitem__)
    return working._replace(unsharded=buckets + (live + ahead) * most_common)


def _rank(
    recipe: Recipe,
    model: Model,
    working: Working,
    ranks: int,
    rank: int,
    snapshot: int,
    teacher: TeacherBytes,
    rollouts: RolloutBytes,
) -> RankPlan:
    kept = _kept(recipe, model, ranks, rank)
    update, on_host = _update_bytes(recipe, model, kept), _states_on_host(recipe)
    offloaded, on_cpus = _offloaded(recipe, kept) + teacher.on_host, recipe.resources.gpus_per_worker == 0
    steady = kept.frozen + kept.trainable + kept.gradient + kept.optimizer + kept.padding + teacher.kept
    steady += rollouts.reward + rollouts.server
    # The teacher's forward comes before the student's, and texts are written before anything is learned from them.
    computing = max(max(working.activations, rollouts.writing) + working.unsharded, teacher.gathered)
    peak = steady - offloaded + model.quant_state + max(computing, 0 if on_host else update)
    load = model.bytes + model.mapped
    if model.by_shard:
        load = kept.frozen + kept.trainable + kept.padding + model.quant_state + LOAD_BUDGET
    load += teacher.kept + rollouts.reward if on_cpus else teacher.on_host
    load = max(teacher.load, rollouts.reward, load)
    host = offloaded + snapshot + max(working.on_host, update if on_host else 0)
    host += peak if on_cpus else 0
    return RankPlan(
        rank=rank,
        frozen_bytes=kept.frozen,
        trainable_bytes=kept.trainable,
        gradient_bytes=kept.gradient,
        optimizer_bytes=kept.optimizer,
        quant_state_bytes=model.quant_state,
        padding_bytes=kept.padding,
        teacher_bytes=teacher.kept,
        reward_bytes=rollouts.reward,
        server_bytes=rollouts.server,
        activation_bytes=working.activations,
        unsharded_bytes=working.unsharded,
        writing_bytes=rollouts.writing,
        update_bytes=update,
        offloaded_bytes=offloaded + working.on_host,
        peak_device_bytes=peak,
        peak_host_load_bytes=load,
        peak_host_bytes=max(load, host),
    )


def _kept(recipe: Recipe, model: Model, ranks: int, rank: int) -> Share:
    return share(
        recipe.strategy.kind,
        model.weights,
        Mesh.of(recipe, ranks),
        rank,
        gradient_size=WHOLE + (8 if recipe.exact else 0),
        state=lambda weight, elements: partition_bytes(recipe, weight, elements),
    )


def _offloaded(recipe: Recipe, kept: Share) -> int:
    """Returns the bytes, of those kept between steps, that are in the host's memory."""
    everything = kept.frozen + kept.trainable + kept.padding
    if recipe.optimizer.row.paged and not recipe.strategy.row.zero_stage:
        return kept.optimizer
    states = kept.gradient + kept.optimizer if _states_on_host(recipe) else 0
    return states + (everything if recipe.strategy.offload or _zero_offloads(recipe, "offload_param") else 0)


def _states_on_host(recipe: Recipe) -> bool:
    """Returns True when gradients and optimizer state are offloaded, and the update runs on the host."""
    return recipe.strategy.offload or _zero_offloads(recipe, "offload_optimizer")


def _zero_offloads(recipe: Recipe, part: str) -> bool:
    strategy = recipe.strategy
    if not strategy.row.zero_stage:
        return False
    return bool(zero_settings(strategy.kind, strategy.deepspeed).get(part, {}).get("device") == "cpu")


def _update_bytes(recipe: Recipe, model: Model, kept: Share) -> int:
    row = recipe.optimizer.row
    if row.codec:  # its kernels need no temporaries
        return 0
    elements = kept.gradient // (WHOLE + (8 if recipe.exact else 0))
    largest = max((w.numel for w in model.weights if w.trainable), default=0)
    at_once = recipe.resources.gpus_per_worker and not _states_on_host(recipe)
    if row.holds in ("complete", "matrices"):  # one matrix at a time, with its gradient and two temporaries
        return 4 * WHOLE * largest
    # On GPUs torch updates all tensors at once, with one temporary of their size; on CPUs one after the other.
    return WHOLE * (elements if at_once else min(elements, 2 * largest))
