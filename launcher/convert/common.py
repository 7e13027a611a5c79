"""Conversions shared by the sources: both use transformers' Trainer and its names for optimizers and schedules."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

from launcher.convert.draft import OFF, Draft, as_mapping, as_number, is_number
from trainer.parsing import parse_json
from trainer.recipe import formats, optimizers, synonyms
from trainer.recipe.dpo_losses import DPO_LOSSES
from trainer.recipe.sections.datasets import is_hub_dataset
from trainer.recipe.strategies import STRATEGIES
from trainer.recipe.tasks import PREFIX, TASKS
from trainer.recipe.trackers import TRACKERS
from trainer.registry import Registry


def _names(table: Registry[Any], more: Mapping[str, str]) -> dict[str, str]:
    return {**{name: name for name in table.names()}, **table.also, **more}


OPTIMIZERS = _names(optimizers.OPTIMIZERS, synonyms.OPTIMIZERS)
OTHER_RATES = {
    "adafactor": "torch's Adafactor multiplies the rate by the size of each weight, which Trainer's does not",
    "muon": "the rate of muon is AdamW's here, for matrices and everything else",
}
"""Optimizers whose learning rate has another meaning in the sources."""

SCHEDULES = _names(optimizers.SCHEDULES, synonyms.SCHEDULES)
DECAYS = {"1-sqrt": "sqrt", "linear": "linear", "cosine": "cosine"}
RATES = {
    "evals_per_epoch": "training.eval_every counts steps; without it, evaluation runs after the last step",
    "saves_per_epoch": "checkpoint.every_steps counts steps: 100 by default",
}
"""Settings that decide when something happens, each with what a recipe does."""
TASKS_ARE = f"the tasks are {', '.join(TASKS.names())}"
ANSWERED = 64
"""Questions of an evaluation by generated answers; the sources answer all of the evaluation data."""
WRITTEN_NAMES = ("gptq", "awq", "aqlm", "hqq", "eetq", "fp8", "mxfp4", "exl2")
"""Quantisations that base models on the Hub have in their names."""

CHAT_TEMPLATES = {name: name for name in formats.CHAT_TEMPLATES if name != "deepseek"} | dict(synonyms.CHAT_TEMPLATES)
"""The sources' names of chat templates, and muster's. LLaMA-Factory's deepseek is another form than muster's."""

FILES = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet)(\.(gz|zst))?$")


def one_method(draft: Draft, requested: dict[str, str]) -> str:
    """Returns the first of the requested methods, since a recipe has one. ``requested``: method to its key."""
    first = next(iter(requested), "lora")
    for method, key in requested.items():
        if method == first:
            draft.use("adapter.method", key)
        else:
            draft.lose(key, f"{method} with {first}: a recipe has one method")
    ratio = draft.number("loraplus_lr_ratio") if first == "loraplus" else None
    if ratio is not None:
        draft.put("adapter.lr_ratio", float(ratio), "loraplus_lr_ratio")
    return first


def dpo_loss(draft: Draft, name: str, *keys: str) -> None:
    """Sets the loss of task dpo that trl knows by this name, and its label smoothing."""
    loss = DPO_LOSSES.also.get(name, name)
    if loss not in DPO_LOSSES:
        draft.hinder(keys[0], f"{name} is no loss of task dpo; {', '.join(DPO_LOSSES.names())} are")
        return
    draft.put("dpo.loss", loss, *keys)
    smoothing = draft.number("dpo_label_smoothing")
    if smoothing and "label_smoothing" in DPO_LOSSES[loss].uses:
        draft.put("dpo.label_smoothing", float(smoothing), "dpo_label_smoothing")
    else:
        draft.pass_over("dpo_label_smoothing", f"{loss} does not use it")


def weights_of_answers(draft: Draft, desirable: str, undesirable: str) -> None:
    """Sets the weights of task kto. ``desirable``, ``undesirable``: their keys."""
    for key, name in ((desirable, "desirable_weight"), (undesirable, "undesirable_weight")):
        weight = draft.number(key)
        if weight is not None:
            draft.put(f"kto.{name}", float(weight), key)
    draft.decisions.append(
        "kto estimates the divergence over all answers of a step; trl estimates it for each micro-batch"
    )


def noise_and_smoothing(draft: Draft) -> None:
    """Sets what transformers' Trainer does for every task, and muster for task sft."""
    task = draft.recipe.get("task", "sft")
    for key, path in (("neftune_noise_alpha", "sft.neftune_alpha"), ("label_smoothing_factor", "sft.label_smoothing")):
        value = draft.number(key)
        if value and task == "sft":
            draft.put(path, float(value), key)
        elif value:
            draft.lose(key, f"task {task} has no such setting, only sft")
    if "sft.neftune_alpha" in draft.used.values():
        draft.decisions.append(
            "sft.neftune_alpha counts the tokens of each sample; transformers counts those of a pack or a padded row, "
            "so that its noise is smaller"
        )


def optimizer(draft: Draft, key: str, default: str) -> None:
    # Called after the strategy is set: some optimizers do not work under ZeRO.
    name = str(draft.take(key, default))
    if name not in OPTIMIZERS:
        draft.hinder(key, f"there is no {name}; choose one of {', '.join(optimizers.OPTIMIZERS.names())}, and a rate")
        return
    ours = OPTIMIZERS[name]
    row = optimizers.OPTIMIZERS[ours]
    kind, against = draft.recipe["strategy"]["kind"], row.against_zero()
    if STRATEGIES[kind].zero_stage and against and "betas" in row.uses:
        draft.lose(key, f"{name} does not work under {kind}: it {against}; adamw instead")
        ours, row = "adamw", optimizers.OPTIMIZERS["adamw"]
    if ours in OTHER_RATES:
        draft.lose(key, OTHER_RATES[ours])
    draft.put("optimizer.name", ours, key)
    draft.put("optimizer.lr", draft.number("learning_rate", 5e-5), "learning_rate")
    draft.move("weight_decay", "optimizer.weight_decay")
    if "momentum" in row.uses and ours == "sgd":
        draft.put("optimizer.momentum", 0.0)  # Trainer's SGD has none
    _betas(draft, row)


def _betas(draft: Draft, row: optimizers.OptimizerRow) -> None:
    betas = {"adam_beta1": 0.9, "adam_beta2": 0.999}
    if "betas" not in row.uses:
        for key in (*betas, "adam_epsilon"):
            draft.pass_over(key, "the optimizer does not use it")
        return
    if any(beta in draft.settings for beta in betas) or row.uses["betas"] != tuple(betas.values()):
        draft.put("optimizer.betas", [float(draft.number(beta, usual)) for beta, usual in betas.items()], *betas)
    if "eps" in row.uses:
        draft.move("adam_epsilon", "optimizer.eps")
    else:
        draft.pass_over("adam_epsilon", "the optimizer does not use it")


def clipping(draft: Draft) -> None:
    norm = draft.number("max_grad_norm")
    if norm is not None:
        draft.put("training.max_grad_norm", norm or None, "max_grad_norm")  # 0 means no clipping in Trainer


def schedule(draft: Draft, key: str, default: str, steps_first: bool = False) -> None:
    """Sets the schedule. ``steps_first``: ``warmup_steps: 0`` means no warm-up, even if a ratio is given too."""
    name = str(draft.take(key, default))
    if name not in SCHEDULES:
        draft.lose(key, f"{name} is not one of {', '.join(optimizers.SCHEDULES.names())}; cosine is taken")
    ours = SCHEDULES.get(name, "cosine")
    draft.put("schedule.name", ours, key)
    _shape(draft, name, ours)
    if name == "constant":
        for other in ("warmup_steps", "warmup_ratio"):
            draft.pass_over(other, "constant has no warm-up in Trainer; constant_with_warmup has one")
    else:
        _warmup(draft, steps_first)


def _shape(draft: Draft, name: str, ours: str) -> None:
    """Sets what `lr_scheduler_kwargs` says of the schedule's form, and the final learning rate."""
    extra = dict(as_mapping(draft.take("lr_scheduler_kwargs")))
    key, steps = "lr_scheduler_kwargs", draft.recipe["training"].get("steps")
    if ours == "wsd":
        decay, shape = as_number(extra.pop("num_decay_steps", None)), str(extra.pop("decay_type", "cosine"))
        extra.pop("num_stable_steps", None)
        if shape in DECAYS:
            draft.put("schedule.decay_shape", DECAYS[shape], key)
        if is_number(decay) and steps:
            draft.put("schedule.decay_ratio", decay / steps, key)
        else:
            draft.lose(key, "num_decay_steps of a number of steps that is not known; schedule.decay_ratio is 0.1")
    if ours == "polynomial" and is_number(power := as_number(extra.pop("power", 1.0))):
        draft.put("schedule.power", float(power), key)
        extra.setdefault("min_lr", extra.pop("lr_end", 1e-7))
    if name == "cosine_with_restarts" and is_number(cycles := as_number(extra.pop("num_cycles", 1))):
        draft.put("schedule.cycles", int(cycles), key)
    _floor(draft, ours, extra)


def _floor(draft: Draft, ours: str, extra: dict[str, Any]) -> None:
    """Sets the final learning rate of a falling schedule."""
    floor, key = draft.number("cosine_min_lr_ratio"), "cosine_min_lr_ratio"
    lr = draft.recipe.get("optimizer", {}).get("lr")
    for name, unit in (("min_lr_rate", 1), ("min_lr_ratio", 1), ("min_lr", lr)):
        if name in extra:
            floor, key = as_number(extra[name]), "lr_scheduler_kwargs"
            if not is_number(floor) or not is_number(unit) or not unit:
                draft.hinder(key, f"{name}: {extra[name]!r} over the learning rate {lr!r} is no number")
                return
            floor = floor / unit
    other = [name for name in extra if name not in ("min_lr", "min_lr_rate", "min_lr_ratio")]
    if other:
        draft.lose("lr_scheduler_kwargs", f"without counterpart: {', '.join(map(str, other))}")
    if not floor:
        return
    if ours in ("cosine", "wsd", "polynomial"):
        draft.put("schedule.min_lr_ratio", float(floor), key)
    else:
        draft.pass_over(key, f"{ours} does not use it in Trainer")


def _warmup(draft: Draft, steps_first: bool) -> None:
    steps, ratio = draft.number("warmup_steps"), draft.number("warmup_ratio")
    # As in Trainer, warmup_steps below 1 is a fraction of the steps.
    if steps and 0 < steps < 1:
        draft.put("schedule.warmup_ratio", float(steps), "warmup_steps")
    elif steps:
        draft.put("schedule.warmup_steps", int(steps), "warmup_steps")
    elif ratio and not (steps_first and steps == 0):
        draft.put("schedule.warmup_ratio", float(ratio), "warmup_ratio")
        return
    draft.pass_over("warmup_ratio", "warmup_steps comes first")


def length(draft: Draft, epochs_key: str, default: int) -> None:
    """Sets the length of the run; steps take precedence over epochs, as in Trainer."""
    steps, epochs = draft.number("max_steps"), draft.number(epochs_key, default)
    if steps and steps > 0:
        draft.put("training.steps", int(steps), "max_steps")
        draft.pass_over(epochs_key, f"max_steps {steps} decides the length")
        return
    draft.pass_over("max_steps", "sets no limit")
    whole = -(-epochs // 1)
    draft.put("training.epochs", int(whole), epochs_key)
    if whole != epochs:
        draft.lose(epochs_key, f"{epochs} is no whole number; {int(whole)} is taken")


def every(draft: Draft, key: str, path: str, otherwise: str) -> bool:
    """Sets a number of steps between two events; returns true if the setting gives one. A fraction of the run's steps
    can be converted only if their number is known."""
    steps, total = draft.number(key), draft.recipe["training"].get("steps")
    if not steps or steps < 0:
        draft.pass_over(key, otherwise)
        return False
    if steps >= 1 or total:
        draft.put(path, max(1, int(steps if steps >= 1 else steps * total)), key)
    else:
        draft.lose(key, f"{steps} of the run's steps, whose number is not known here; {otherwise}")
    return True


def comparisons(draft: Draft, patience: str) -> None:
    """Sets what Trainer compares evaluations for: the best checkpoint, and an early end after ``patience`` of them.
    Called after the evaluations are set."""
    keys = [key for key in ("load_best_model_at_end", patience) if draft.is_on(key)]
    known: dict[str, str] = {f"{PREFIX}{n}": b for n, b in TASKS[draft.recipe.get("task", "sft")].evaluates.items()}
    given = str(draft.take("metric_for_best_model", "loss"))
    metric = given if given.startswith(PREFIX) else f"{PREFIX}{given}"
    better = "max" if draft.take("greater_is_better", known.get(metric) == "max") else "min"
    seldom = "training.eval_every" if "eval_every" not in draft.recipe["training"] else ""
    if keys and seldom:
        for key in keys:
            draft.lose(key, "evaluations are compared at steps that training.eval_every counts, which is not given")
    elif keys and known.get(metric) != better:
        for key in keys:
            draft.lose(key, f"{given} ({better}) compares no evaluations here; the metrics are {', '.join(known)}")
    elif keys:
        draft.use("checkpoint.keep_best", "metric_for_best_model", "greater_is_better")
        if draft.is_on("load_best_model_at_end"):
            draft.put("checkpoint.keep_best", metric, "load_best_model_at_end")
        if draft.is_on(patience):
            draft.put("training.early_stop", {"metric": metric, "patience": int(draft.number(patience))}, patience)
    for key in ("metric_for_best_model", "greater_is_better"):
        draft.pass_over(key, "evaluations are not compared")


def begin_from(draft: Draft, key: str) -> None:
    """Sets the trained adapter that the run begins from."""
    given = draft.take(key)
    names = given if isinstance(given, list) else str(given).split(",") if draft.is_on(key) else []
    if len(names) > 1:
        draft.hinder(key, "names several adapters; merge all but the last (muster merge), and train on the result")
    elif names:
        draft.put("adapter.from", str(names[0]).strip(), key)


def kept(draft: Draft) -> None:
    count = draft.number("save_total_limit")
    if count and count > 0:
        draft.put("checkpoint.keep_last", int(count), "save_total_limit")
    else:
        draft.pass_over("save_total_limit", "no limit in Trainer; checkpoint.keep_last always has one")


def batches(draft: Draft, micro: int, accumulation: int, workers: int | None, named: int | None) -> None:
    """Sets the batches. The sources count per GPU, and take the number of GPUs from the command that starts them."""
    count = max(1, int(workers or named or 1))
    source = "--workers" if workers else "from the file" if named else "assumed; set it with --workers N"
    draft.put("training.global_batch", micro * accumulation * count)
    draft.put("training.micro_batch", micro)
    draft.put("resources", {"workers": count, "gpus_per_worker": 1})
    draft.decisions.append(
        f"global_batch {micro * accumulation * count} = {micro} per GPU x {accumulation} accumulated x {count} "
        f"worker{'s' if count > 1 else ''} ({source}); it is the same for any number of workers"
    )


def place(draft: Draft, key: str, default: str) -> None:
    """Sets name and storage: the last part of the output folder is the run's name, the part before it the storage."""
    given = str(draft.take(key, default))
    scheme, mark, folder = given.rpartition("://")
    above, slash, last = folder.rstrip("/").removeprefix("./").rpartition("/")
    if mark and not slash:
        above, last = last, ""  # a bucket alone is a storage
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:100] or "converted"
    draft.put("name", name, key)
    draft.put("storage", f"{scheme}{mark}{above}" if above else "/" if slash else "runs", key)


def deepspeed(draft: Draft, key: str, file: Path) -> None:
    """Sets the strategy by the ZeRO stage, which is read from the file, or taken from its name if it is missing."""
    given = draft.take(key)
    held = given if isinstance(given, dict) else read_json(beside(str(given), file))
    text = json.dumps(held["zero_optimization"]) if isinstance(held.get("zero_optimization"), dict) else str(given)
    found = re.search(r"(?:zero|_z|stage\W*)_?([0-3])", text)
    if not found:
        draft.hinder(key, f"{given} cannot be read, and its name contains no stage; run convert where it exists")
    stage = int(found.group(1)) if found else 0
    offloads = '"cpu"' in text if held else "offload" in text
    kind = {0: "ddp", 1: "zero2", 2: "zero2", 3: "zero3"}[stage]
    draft.put("strategy.kind", kind, key)
    if offloads and stage:
        draft.put("strategy.deepspeed", f"{kind}_offload")
    draft.decisions.append(f"strategy {kind}: DeepSpeed stage {stage} of {given if not held else 'the settings'}")
    if stage == 1:
        draft.decisions.append("stage 1 shards the optimizer's state only; zero2 shards gradients too")


def beside(name: str, file: Path) -> Path:
    """Returns a path that the settings name, relative to the working folder or to a folder above the settings' file,
    since both programs may be started from any of these."""
    return next((above / name for above in (Path(), *file.resolve().parents) if exists(above / name)), Path(name))


def exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a text that is too long for a path
        return False


def read_json(path: Path) -> dict[str, Any]:
    """Returns the mapping in a JSON file; empty if the file cannot be read or contains no mapping."""
    try:
        found = parse_json(path.read_bytes(), finite=False, unique=False)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def rates(draft: Draft) -> None:
    for key, otherwise in RATES.items():
        draft.decide(key, f"{draft.take(key)}: {otherwise}")


def attention(draft: Draft, *keys: str) -> None:
    """Sets compute.attention by the first of the keys that is on. The kernel's own name, or the key's, decides."""
    for key in keys:
        value = str(draft.take(key)).lower()
        word = key if value == "true" else value
        ours = synonyms.VALUES["compute.attention"].get(word)
        kernel = ours.value if ours else word
        if not draft.is_on(key) or kernel not in ("flash", "flex", "sdpa"):
            continue
        unmasked = TASKS[draft.recipe.get("task", "sft")].segments and draft.recipe["model"]["dtype"] != "float32"
        if kernel == "sdpa" or unmasked:
            draft.put("compute.attention", kernel, key)
        else:
            draft.decide(key, f"{value}: compute.attention auto; {kernel} takes 16 bits, and no masks")
        return


def liger(draft: Draft, *keys: str) -> None:
    named = [key for key in keys if draft.is_on(key)]
    if named:
        draft.put("compute.kernels", "liger", *named)


def recomputation(draft: Draft, key: str) -> None:
    """Enters that checkpointed activations are moved to host memory."""
    if str(draft.take(key)).startswith("offload"):
        draft.put("compute.offload_activations", True, key)


def trackers(draft: Draft, wanted: dict[str, str]) -> None:
    """Sets tracking. ``wanted``: muster's name of each requested tracker to the key that requests it."""
    there = [name for name in wanted if name in TRACKERS]
    if there:
        draft.put("tracking", there, *(wanted[name] for name in there))
    missing = [name for name in wanted if name not in there]
    for name in missing:
        others = ", ".join(other for other in missing if wanted[other] == wanted[name])
        draft.pass_over(wanted[name], f"there is no tracker {others}")


def refuse_quantised(draft: Draft, key: str) -> None:
    name = str(draft.take(key, ""))
    kind = next((kind for kind in WRITTEN_NAMES if re.search(rf"(?i)(^|[^a-z]){kind}", name)), None)
    if kind:
        draft.hinder(key, f"{name} looks like a model in {kind}; muster takes unquantised ones, or bitsandbytes' NF4")


def is_elsewhere(path: str) -> bool:
    """Returns true if a data set is on this machine or at a URL, and not on the Hub."""
    return "://" in path or path.startswith((".", "/", "~")) or bool(FILES.search(path)) or exists(Path(path))


def has_evaluation(draft: Draft) -> bool:
    """Returns True if the recipe has sources of evaluation data, or holds rows out for it."""
    return any(draft.recipe["data"].get(key) for key in ("eval", "eval_fraction"))


def answers(draft: Draft, key: str, tokens_key: str, tokens: int, theirs: str) -> None:
    """Sets evaluation by generated answers. ``tokens_key``: the limit of an answer's tokens, with its default.
    ``theirs``: the source's metrics."""
    if not draft.is_on(key):
        return
    recipe = draft.recipe
    sources = recipe["data"].get("eval") or recipe["data"].get("train", [])
    asks = any(formats.FORMATS[source["format"]].asks for source in sources)
    if not has_evaluation(draft) or not asks or TASKS[recipe.get("task", "sft")].has_head:
        draft.pass_over(key, "there are no evaluation data with questions")
        return
    draft.put("generative_eval.count", ANSWERED, key)
    draft.put("generative_eval.max_new_tokens", int(draft.number(tokens_key, tokens)), tokens_key)
    draft.decisions.append(
        f"generative_eval answers {ANSWERED} questions and scores them by exact match and F1, or by their number; for "
        f"{theirs}, name a function of your own in generative_eval.metric"
    )


def hold_out(draft: Draft, key: str) -> None:
    """Sets evaluation data: held-out rows for a fraction, or a number of rows at the end of each split on the Hub."""
    size = draft.number(key)
    if size in OFF:
        return
    if draft.recipe["data"].get("eval"):
        draft.pass_over(key, "data.eval is named")
        return
    if 0 < size < 1:
        draft.put("data.eval_fraction", size, key)
        draft.decisions.append(
            f"data.eval_fraction holds out {size:g} of the rows by their hash; {key} took them at random"
        )
        return
    sources = draft.recipe["data"]["train"]
    parts = [_parts(one.get("split", "train"), size) if is_hub_dataset(one["path"]) else None for one in sources]
    cut = [part for part in parts if part]
    if size < 0 or len(cut) < len(sources) or not cut:
        draft.lose(
            key, f"{size}: rows can be counted off complete splits of the Hub only; give a fraction, data.eval_fraction"
        )
        return
    evaluated = [{**deepcopy(source), "split": held} for source, (_, held) in zip(sources, cut, strict=True)]
    for source, (rest, _) in zip(sources, cut, strict=True):
        source["split"] = rest
    draft.put("data.eval", evaluated, key)
    shares = ", ".join(dict.fromkeys(held for _, held in cut))
    draft.decisions.append(f"data.eval is the end of each training split ({shares}); {key} {size} took it at random")


def _parts(split: str, size: float) -> tuple[str, str] | None:
    """Divides a split, or its first rows, in two: the rest, and ``size`` (a fraction, or rows from 1 on) at the end.
    Returns None for any other slice, or if nothing would be left."""
    first = re.fullmatch(r"(\w+)\[:(\d+)\]", split)
    if first:
        rows = int(first.group(2))
        end = rows - (max(1, round(rows * size)) if size < 1 else int(size))
        return (f"{first.group(1)}[:{end}]", f"{first.group(1)}[{end}:{rows}]") if end > 0 else None
    if "[" in split:
        return None
    percent = max(1, round(size * 100))
    if size >= 1:
        return f"{split}[:-{int(size)}]", f"{split}[-{int(size)}:]"
    return f"{split}[:{100 - percent}%]", f"{split}[{100 - percent}%:]"
