"""Converts LLaMA-Factory's data sets: names whose location and columns are in its ``dataset_info.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launcher.convert import common
from launcher.convert.draft import Draft, as_mapping
from trainer.recipe.formats import FORMATS
from trainer.recipe.sections.datasets import is_hub_dataset

Source = dict[str, Any]
MEDIA = ("images", "videos", "audios")
KEYS = {("from", "value"), ("role", "content")}
"""The pairs of keys for a turn's speaker and text that are read."""

ROLE_TAGS = {
    "user_tag": {"human", "user"},
    "assistant_tag": {"gpt", "assistant"},
    "observation_tag": {"observation", "tool", "function_response"},
    "function_tag": {"function_call"},
    "system_tag": {"system"},
}
ANSWERS = "the loss is computed on answers only; format text computes it on every token"


def data(draft: Draft, file: Path, stage: str) -> None:
    registry = common.beside(f"{draft.take('dataset_dir', 'data')}/dataset_info.json", file)
    folder, info = registry.parent, common.read_json(registry) or None
    for key, path in (("dataset", "data.train"), ("eval_dataset", "data.eval")):
        found = [_source(draft, key, name, folder, info, stage) for name in draft.names(key)]
        if found or key == "dataset":
            draft.put(path, [source for source in found if source], key)
            draft.use(path, "dataset_dir")
    if "dataset" not in draft.settings:
        draft.hinder("dataset", "is missing: nothing is trained here")
    draft.put("data.sequence_length", int(draft.number("cutoff_len", 2048)), "cutoff_len")
    _packing(draft, stage)
    _template(draft)
    _cut(draft)
    common.hold_out(draft, "val_size")
    for source in draft.recipe["data"].get("eval", []):
        if is_hub_dataset(source["path"]):
            source.setdefault("split", "train")
    if draft.is_on("train_on_prompt"):
        draft.lose("train_on_prompt", ANSWERS)


def _packing(draft: Draft, stage: str) -> None:
    """Sets data.packing. Stage pt packs by default. Both kinds of packing become muster's, which is neat packing."""
    neat = draft.is_on("neat_packing")
    packed = neat or (draft.is_on("packing") if "packing" in draft.settings else stage == "pt")
    draft.put("data.packing", packed and stage in ("sft", "pt"), "packing", "neat_packing")
    if packed and not neat:
        draft.decisions.append("samples of a pack never see each other, as with neat_packing")


def _source(draft: Draft, key: str, name: str, folder: Path, info: dict[str, Any] | None, stage: str) -> Source | None:
    if info is None:
        draft.hinder(key, f"{name} needs {folder}/dataset_info.json, which is missing; run convert where it exists")
        return None
    if not isinstance(info.get(name), dict):
        draft.hinder(key, f"{name} is not in {folder}/dataset_info.json")
        return None
    entry = draft.part(f"{key}.{name}", info[name], "data.train" if key == "dataset" else "data.eval")
    columns = entry.part("columns", as_mapping(entry.take("columns")))
    entry.use(entry.home, "columns")
    if any(columns.is_on(column) for column in MEDIA):
        draft.hinder(key, f"{name} has images or sound; muster trains on text")
        return None
    reason, made = _format(entry, columns, stage)
    place = _location(entry, folder)
    if reason:
        draft.hinder(key, f"{name} {reason}")
    if place is None:
        draft.hinder(key, f"{name} is loaded by a script or from another hub; put its rows into files")
    if not made or place is None:
        return None
    for column in ("system", "history"):
        if columns.is_on(column):
            columns.lose(column, "no format reads this column; put it into the messages")
    columns.finish({})
    entry.finish({"ms_hub_url": "hf_hub_url comes first", "om_hub_url": "hf_hub_url comes first"})
    return place | made


def _format(entry: Draft, columns: Draft, stage: str) -> tuple[str, Source]:
    """Returns the reason why a data set cannot be converted (empty if it can), and the format with its columns."""
    talks, ranks = entry.read("formatting", "alpaca") != "alpaca", entry.read("ranking")
    reason = _tags(entry) if talks else ""
    messages = "messages", "conversations"
    first = messages if talks else ("prompt", "instruction")
    if stage in ("rm", "dpo", "kto") and not talks and columns.is_on("query"):
        columns.lose("query", "answers have a prompt alone; write it into the prompt")
    if stage in ("rm", "dpo"):
        if not ranks:
            reason = "is no data set of pairs (ranking)"
        return reason, _read(columns, "preference", prompt=first, chosen=("chosen", ""), rejected=("rejected", ""))
    if ranks:
        reason = f"is a data set of pairs (ranking), which stage {stage} does not learn from"
    if stage == "kto":
        if not columns.is_on("kto_tag"):
            reason = "has no column kto_tag, which says if an answer is good"
        # A conversation contains the prompt and the answer.
        names = {"completion": messages} if talks else {"prompt": first, "completion": ("response", "output")}
        return reason, _read(columns, "unpaired_preference", **names, label=("kto_tag", ""))
    if stage == "pt" and not talks:
        return reason, _read(columns, "text", text=("prompt", "instruction"))
    if talks:
        return reason, _read(columns, "messages", messages=messages, tools=("tools", ""))
    names = {"instruction": ("prompt", "instruction"), "input": ("query", "input"), "output": ("response", "output")}
    return reason, _read(columns, "instruction", **names)


def _tags(entry: Draft) -> str:
    """Returns a reason if muster does not read the names of the turns' keys or speakers; else an empty text."""
    tags = entry.part("tags", as_mapping(entry.take("tags")))
    entry.use(entry.home, "tags")
    if (str(tags.read("role_tag", "from")), str(tags.read("content_tag", "value"))) not in KEYS:
        return "has turns with other keys than role and content, or from and value"
    strange = [
        tags.read(tag) for tag, usual in ROLE_TAGS.items() if tags.is_on(tag) and str(tags.take(tag)) not in usual
    ]
    tags.finish(dict.fromkeys(ROLE_TAGS, "a usual name"))
    return f"has speakers of other names than usual ({', '.join(map(str, strange))})" if strange else ""


def _read(columns: Draft, kind: str, **names: tuple[str, str]) -> Source:
    """Returns a format with its columns. ``names``: our column to (their key for it, the default name)."""
    named = {}
    for ours, (key, usual) in names.items():
        theirs = columns.read(key, usual)
        if theirs and theirs != ours:
            named[ours] = theirs
    return {"format": kind} | ({"columns": named} if named else {})


def _location(entry: Draft, folder: Path) -> Source | None:
    """Returns the path of a data set; None for one that is loaded by a script or from another hub."""
    # LLaMA-Factory's order of precedence: the Hub, a file in a bucket, a file next to the registry.
    if entry.is_on("hf_hub_url"):
        subset = f"/{entry.read('subset')}" if entry.is_on("subset") else ""
        split = entry.read("split", "train")
        return {"path": f"hf://{entry.read('hf_hub_url')}{subset}"} | ({"split": split} if split != "train" else {})
    for key in ("split", "subset"):
        if entry.is_on(key):
            entry.lose(key, "files are read completely; name the files in path")
    if any(entry.is_on(key) for key in ("ms_hub_url", "om_hub_url", "script_url")):
        return None
    if entry.is_on("cloud_file_name"):
        return {"path": str(entry.read("cloud_file_name"))}
    return {"path": str(folder / str(entry.read("file_name")))} if entry.is_on("file_name") else None


def _template(draft: Draft) -> None:
    """Sets the chat template. LLaMA-Factory formats every row with it, Alpaca's rows too."""
    name = draft.take("template")
    known = common.CHAT_TEMPLATES.get(str(name))
    if known and known != "alpaca":
        for source in [*draft.recipe["data"]["train"], *draft.recipe["data"].get("eval", [])]:
            source |= {"as": "chat"} if source["format"] == "instruction" else {}
    rows = draft.recipe["data"]["train"]
    formats = {source["format"] for source in rows}
    framed = any("as" in source or FORMATS[source["format"]].chats for source in rows)
    answers = "turns are formatted with the tokenizer's template, and plain texts are read unchanged"
    ways = {
        "messages": "turns are formatted with the tokenizer's template; data.chat_template sets another",
        "preference": answers,
        "unpaired_preference": answers,
        "instruction": "rows of instructions get Alpaca's prompt; format completion with a template can format them as "
        "the base model expects",
    }
    ways = {kind: way for kind, way in ways.items() if kind in formats}
    if known and framed:
        draft.put("data.chat_template", known, "template")
    elif name and ways:
        draft.lose("template", f"{name}: {'; '.join(ways.values())}")
    else:
        draft.pass_over("template", "texts are read unchanged")
    for key in ("default_system", "enable_thinking", "preserve_thinking", "tool_format"):
        if key in draft.settings:
            draft.lose(key, f"{draft.take(key)}: the chat template decides it; data.chat_template sets another")


def _cut(draft: Draft) -> None:
    """Limits each data set to its first rows."""
    rows = draft.number("max_samples")
    if not rows:
        return
    for source in [*draft.recipe["data"]["train"], *draft.recipe["data"].get("eval", [])]:
        source["limit"] = int(rows)
    draft.use("data.train", "max_samples")
