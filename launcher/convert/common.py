"""What the sources share: both are built on transformers' Trainer, and name optimizers and schedules as it does."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from launcher.convert.draft import OFF, Draft, as_number
from trainer.registry import TRACKERS

OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_hf": "adamw",
    "adamw_apex_fused": "adamw",
    "adamw_torch_xla": "adamw",
    "adamw_anyprecision": "adamw",
    "paged_adamw_32bit": "adamw",
    "paged_adamw": "adamw",
    "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_torch_8bit": "adamw_8bit",
    "ao_adamw_8bit": "adamw_8bit",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "adamw_torch_4bit": "adamw_8bit",
    "ao_adamw_4bit": "adamw_8bit",
    "ao_adamw_fp8": "adamw_8bit",
}
OTHER_STATE = ("adamw_torch_4bit", "ao_adamw_4bit", "ao_adamw_fp8", "paged_adamw_32bit", "paged_adamw")
"""Of these, what holds the optimizer's state differs; the update is AdamW's."""

SCHEDULES = {
    "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
    "linear": "linear",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
WRITTEN_NAMES = ("gptq", "awq", "aqlm", "hqq", "eetq", "fp8", "mxfp4", "exl2")
"""Quantisations that bases on the Hub carry in their names."""

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FILES = re.compile(r"\.(jsonl?|csv|tsv|txt|parquet)(\.(gz|zst))?$")


def optimizer(draft: Draft, key: str, default: str) -> None:
    """After the strategy, which decides whether the state may be in 8 bits."""
    name = str(draft.take(key, default))
    if name not in OPTIMIZERS:
        draft.hinder(key, f"{name} is none of AdamW's forms, and its learning rate is its own; choose adamw and a rate")
        return
    ours = OPTIMIZERS[name]
    sharded = draft.recipe["strategy"]["kind"] != "ddp"
    if ours != "adamw" and sharded:
        draft.lose(key, f"{name} keeps its state in 8 bits, which sharded parameters cannot; adamw in 32 bits instead")
        ours = "adamw"
    elif name in OTHER_STATE:
        draft.lose(key, f"the state of {name} is held as {ours} holds it; the update is the same")
    draft.put("optimizer.name", ours)
    draft.put("optimizer.lr", draft.number("learning_rate", 5e-5))
    draft.move("weight_decay", "optimizer.weight_decay")
    betas = [draft.number("adam_beta1"), draft.number("adam_beta2")]
    if any(beta is not None for beta in betas):
        draft.put("optimizer.betas", [float(b or d) for b, d in zip(betas, (0.9, 0.999), strict=True)])
    draft.move("adam_epsilon", "optimizer.eps")


def schedule(draft: Draft, key: str, default: str) -> None:
    name = str(draft.take(key, default))
    if name not in SCHEDULES:
        draft.lose(key, f"{name} is not one of constant, linear, cosine; cosine is taken")
    ours = SCHEDULES.get(name, "cosine")
    draft.put("schedule.name", ours)
    floor = draft.number("cosine_min_lr_ratio")
    extra = draft.take("lr_scheduler_kwargs")
    if isinstance(extra, dict):
        floor = extra.get("min_lr_rate", floor)
        if "min_lr" in extra:
            floor = as_number(extra["min_lr"]) / draft.recipe["optimizer"]["lr"]
        other = [name for name in extra if name not in ("min_lr", "min_lr_rate")]
        if other:
            draft.lose("lr_scheduler_kwargs", f"of it {', '.join(other)}")
    if floor and ours != "constant":
        draft.put("schedule.min_lr_ratio", float(floor))
    warmup(draft)


def warmup(draft: Draft) -> None:
    """In steps, or a share of them; a share given as steps is what Trainer takes it for too."""
    steps, ratio = draft.number("warmup_steps"), draft.number("warmup_ratio")
    if steps and 0 < steps < 1:
        steps, ratio = None, steps
    if steps:
        draft.put("schedule.warmup_steps", int(steps))
        if ratio:
            draft.pass_over("warmup_ratio", "warmup_steps comes first")
    elif ratio:
        draft.put("schedule.warmup_ratio", float(ratio))


def length(draft: Draft, epochs_key: str, default: int) -> None:
    """Steps come before epochs, as in Trainer."""
    steps, epochs = draft.number("max_steps"), draft.number(epochs_key, default)
    if steps and steps > 0:
        draft.put("training.steps", int(steps))
        if epochs_key in draft.settings:
            draft.pass_over(epochs_key, f"max_steps {steps} ends the run")
        return
    whole = -(-epochs // 1)
    draft.put("training.epochs", int(whole))
    if whole != epochs:
        draft.lose(epochs_key, f"{epochs} is no whole number; {int(whole)} is taken")


def batches(draft: Draft, micro: int, accumulation: int, workers: int | None, named: int | None) -> None:
    """Their batch counts per GPU, and the number of GPUs is that of the command that starts them."""
    count = workers or named or 1
    source = "--workers" if workers else "as the file says" if named else "assumed: --workers N says otherwise"
    draft.put("training.global_batch", micro * accumulation * count)
    draft.put("training.micro_batch", micro)
    draft.put("resources", {"workers": count, "gpus_per_worker": 1})
    draft.decisions.append(
        f"global_batch {micro * accumulation * count} = {micro} per GPU x {accumulation} accumulated x {count} "
        f"worker{'s' if count > 1 else ''} ({source}); it stays the same whatever the workers"
    )


def place(draft: Draft, key: str, default: str) -> None:
    """The last part of the output folder names the run, what stands before it is the storage."""
    folder = str(draft.take(key, default)).rstrip("/")
    above, _, last = folder.removeprefix("./").rpartition("/")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-._")[:100] or "converted"
    draft.put("name", name)
    draft.put("storage", above or "runs")


def deepspeed(draft: Draft, given: Any) -> None:
    """A stage, by the file's name or by what it holds, to the file of ours that does the same."""
    held = given if isinstance(given, dict) else _held(str(given))
    text = json.dumps(held["zero_optimization"]) if isinstance(held.get("zero_optimization"), dict) else str(given)
    found = re.search(r"(?:zero|_z|stage\W*)_?([0-3])", text)
    stage = int(found.group(1)) if found else 0
    offloads = '"cpu"' in text if held else "offload" in text
    kind = {0: "ddp", 1: "zero2", 2: "zero2", 3: "zero3"}[stage]
    draft.put("strategy.kind", kind)
    if offloads and stage:
        draft.put("strategy.deepspeed", f"{kind}_offload")
    draft.decisions.append(f"strategy {kind}: DeepSpeed stage {stage} of {given if not held else 'the settings'}")
    if stage == 1:
        draft.decisions.append("stage 1 shards the optimizer's state only; zero2 shards gradients too")


def _held(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def trackers(draft: Draft, wanted: dict[str, str]) -> None:
    """``wanted``: trackers by our names, each with the key that asks for it."""
    there = [name for name in wanted if name in TRACKERS]
    if there:
        draft.put("tracking", there)
    for name in wanted:
        if name not in there:
            draft.pass_over(wanted[name], f"the tracker {name} is not there")


def refuse_quantised(draft: Draft, key: str) -> None:
    name = str(draft.settings.get(key, ""))
    kind = next((kind for kind in WRITTEN_NAMES if re.search(rf"(?i)(^|[^a-z]){kind}", name)), None)
    if kind:
        draft.hinder(key, f"{name} looks like a base in {kind}; muster takes unquantised ones, or bitsandbytes' NF4")


def located(path: str, config: str | None = None, revision: str | None = None) -> str:
    """Where a data set lies: on this machine, at a URL, or on the Hub."""
    if "://" in path:
        return path
    if path.startswith((".", "/", "~")) or FILES.search(path) or Path(path).exists():
        return path
    return f"hf://{path}{f'@{revision}' if revision else ''}{f'/{config}' if config else ''}"


def is_named(path: str) -> bool:
    """Whether the datasets library loads it, which knows splits and parts of them."""
    return path.startswith("hf://") and not path.startswith("hf://datasets/")


def hold_out(draft: Draft, key: str) -> None:
    """A share, or a number of rows, of the training data for evaluation: off the end of each split of the Hub."""
    size = draft.number(key)
    if size in OFF or draft.recipe["data"].get("eval"):
        return
    sources = draft.recipe["data"]["train"]
    if not all(is_named(s["path"]) and "[" not in s.get("split", "") for s in sources):
        draft.lose(key, f"{size}: muster holds nothing out of files; name some under data.eval")
        return
    percent = max(1, round(size * 100))
    first, last = (f":{100 - percent}%", f"{100 - percent}%:") if size < 1 else (f":-{size}", f"-{size}:")
    split = [source.get("split", "train") for source in sources]
    evaluated = [{**source, "split": f"{name}[{last}]"} for source, name in zip(sources, split, strict=True)]
    for source, name in zip(sources, split, strict=True):
        source["split"] = f"{name}[{first}]"
    draft.put("data.eval", evaluated)
    part = f"{percent} %" if size < 1 else f"{size} rows"
    draft.decisions.append(f"data.eval is the last {part} of each training split; {key} took them at random")
