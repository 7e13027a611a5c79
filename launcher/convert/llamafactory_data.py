"""LLaMA-Factory's data sets: names, which its ``dataset_info.json`` says the place and the columns of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from launcher.convert import common
from launcher.convert.draft import OFF, Draft

Source = dict[str, Any]
MEDIA = ("images", "videos", "audios")


def data(draft: Draft, file: Path) -> None:
    stage = str(draft.settings.get("stage", "sft"))
    folder, info = _registry(draft, file)
    for key, path in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        found = [_source(draft, key, name, folder, info, stage) for name in draft.names(key)]
        if found or key == "dataset":
            draft.put(path, [source for source in found if source])
    if "dataset" not in draft.settings:
        draft.hinder("dataset", "is missing: nothing is trained here")
    draft.put("data.sequence_length", int(draft.number("cutoff_len", 2048)))
    packed = draft.take("packing", stage == "pt")
    draft.put("data.packing", packed not in OFF and stage in ("sft", "pt"))
    _wording(draft)
    _cut(draft)
    common.hold_out(draft, "val_size")
    for source in draft.recipe["data"].get("eval", []):
        if common.is_named(source["path"]):
            source.setdefault("split", "train")
    if draft.take("train_on_prompt"):
        draft.lose("train_on_prompt", "the loss is taken on answers alone; format text takes it on every token")


def _registry(draft: Draft, file: Path) -> tuple[Path, dict[str, Any] | None]:
    """Looked for from the working folder, and from every folder above the file, as it may be called from any."""
    name = str(draft.take("dataset_dir", "data"))
    for above in (Path(), *file.resolve().parents):
        path = above / name / "dataset_info.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(found, dict):
            return path.parent, found
    return Path(name), None


def _source(draft: Draft, key: str, name: str, folder: Path, info: dict[str, Any] | None, stage: str) -> Source | None:
    if info is None:
        draft.hinder(key, f"what {name} is stands in {folder}/dataset_info.json, which is not there; convert beside it")
        return None
    entry = info.get(name)
    if not isinstance(entry, dict):
        draft.hinder(key, f"{name} does not stand in {folder}/dataset_info.json")
        return None
    columns = entry.get("columns") or {}
    if any(column in columns for column in MEDIA):
        draft.hinder(key, f"{name} has images or sound; muster trains on text")
        return None
    made = _format(draft, key, name, entry, stage)
    place = _where_it_lies(entry, folder)
    if place is None:
        draft.hinder(key, f"{name} is loaded by a script or from another hub; put its rows into files")
        return None
    for column in ("system", "history"):
        if column in columns:
            draft.lose(f"{key}.{name}.{column}", "no format reads that column; put it into the messages")
    return place | made


def _format(draft: Draft, key: str, name: str, entry: dict[str, Any], stage: str) -> Source:
    columns = entry.get("columns") or {}
    talks = entry.get("formatting", "alpaca") != "alpaca"
    tags = entry.get("tags") or {}
    if talks and (tags.get("role_tag", "from"), tags.get("content_tag", "value")) not in (
        ("from", "value"),
        ("role", "content"),
    ):
        draft.hinder(key, f"turns of {name} have other keys than role and content, or from and value")
    messages = columns.get("messages", "conversations")
    if stage in ("rm", "dpo"):
        if not entry.get("ranking"):
            draft.hinder(key, f"{name} is not one of pairs (ranking)")
        first = messages if talks else columns.get("prompt", "instruction")
        return _read("preference", prompt=first, chosen=columns.get("chosen"), rejected=columns.get("rejected"))
    if stage == "pt" and not talks:
        return _read("text", text=columns.get("prompt", "instruction"))
    if talks:
        return _read("messages", messages=messages, tools=columns.get("tools"))
    names = {"instruction": "prompt", "input": "query", "output": "response"}
    return _read("instruction", **{ours: columns.get(theirs) for ours, theirs in names.items()})


def _read(kind: str, **columns: str | None) -> Source:
    named = {ours: theirs for ours, theirs in columns.items() if theirs and theirs != ours}
    return {"format": kind} | ({"columns": named} if named else {})


def _where_it_lies(entry: dict[str, Any], folder: Path) -> Source | None:
    split = {"split": entry["split"]} if entry.get("split", "train") != "train" else {}
    if entry.get("file_name"):
        return {"path": str(folder / entry["file_name"])}
    if entry.get("cloud_file_name"):
        return {"path": entry["cloud_file_name"]}
    if entry.get("hf_hub_url"):
        subset = f"/{entry['subset']}" if entry.get("subset") else ""
        return {"path": f"hf://{entry['hf_hub_url']}{subset}"} | split
    return None


def _wording(draft: Draft) -> None:
    """Its template words every row, Alpaca's too; ours words turns, by the tokenizer's own."""
    name = draft.take("template")
    formats = {source["format"] for source in draft.recipe["data"]["train"]}
    if name and "messages" in formats | {"messages" for f in formats if f == "preference"}:
        draft.lose(
            "template", f"{name}: turns are worded by the tokenizer's template; data.chat_template names another"
        )
    elif name and "instruction" in formats:
        draft.lose("template", f"{name}: rows of instructions are worded as Alpaca's prompt, or by their template")
    elif name:
        draft.pass_over("template", "texts are taken as they are")
    for key in ("default_system", "enable_thinking", "tool_format"):
        if draft.take(key) not in OFF:
            draft.lose(key, "the chat template says it; data.chat_template names another")


def _cut(draft: Draft) -> None:
    """The first rows of each set: a part of its split, where it has splits."""
    rows = draft.number("max_samples")
    if rows is None:
        return
    sources = draft.recipe["data"]["train"]
    if sources and all(common.is_named(source["path"]) for source in sources):
        for source in sources:
            source["split"] = f"{source.get('split', 'train')}[:{rows}]"
    else:
        draft.lose("max_samples", f"{rows}: files are read whole; cut them, or lower training.steps")
