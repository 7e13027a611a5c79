"""axolotl's data sets: a type and field names to a format and its columns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from launcher.convert import common
from launcher.convert.draft import OFF, Draft, as_mapping

Source = dict[str, Any]

OWN_TEMPLATE = "the tokenizer's own template is taken; data.chat_template names another"
KNOWN_ROLES = {
    "user": {"user", "human"},
    "assistant": {"assistant", "gpt", "chatgpt", "bing", "bard", "function_call", "model"},
    "system": {"system"},
    "tool": {"tool", "observation", "function_response"},
}
KEYS = {
    "path",
    "type",
    "name",
    "split",
    "revision",
    "data_files",
    "ds_type",
    "field",
    "text_column",
    "field_messages",
    "field_tools",
    "field_chosen",
    "field_rejected",
    "message_field_role",
    "message_field_content",
    "message_property_mappings",
    "roles",
    "chat_template",
    "chat_template_jinja",
    "conversation",
    "trust_remote_code",
}
"""What is read of an entry; any other key that is set is named."""


def data(draft: Draft) -> None:
    pairs = draft.recipe.get("task") in ("dpo", "reward")
    draft.put("data.train", [])
    for key in ("datasets", "pretraining_dataset"):
        _sources(draft, key, "data.train", pairs)
    if draft.settings.get("test_datasets"):
        _sources(draft, "test_datasets", "data.eval", pairs)
    if not draft.recipe["data"]["train"] and not any(key.startswith("datasets[") for key in draft.hindrances):
        draft.hinder("datasets", "no data set is named that a recipe could take")
    draft.put("data.sequence_length", int(draft.number("sequence_len", 512)))
    texts = any(source["format"] == "text" for source in draft.recipe["data"]["train"])
    packed = draft.take("sample_packing") not in OFF or ("pretraining_dataset" in draft.settings and texts)
    draft.put("data.packing", packed and not pairs)
    if draft.take("train_on_inputs"):
        draft.lose("train_on_inputs", "the loss is taken on answers alone; format text takes it on every token")
    _template(draft)
    _tokens(draft)
    common.hold_out(draft, "val_set_size")


def _sources(draft: Draft, key: str, path: str, pairs: bool) -> None:
    given = draft.take(key) or []
    found = []
    for index, entry in enumerate(given if isinstance(given, list) else [given]):
        where = f"{key}[{index}]"
        entry = {"path": entry, "type": "pretrain"} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            draft.hinder(where, f"{entry!r} is no data set")
            continue
        source = _source(draft, where, {k: v for k, v in entry.items() if v is not None}, pairs)
        if source is not None:
            if path == "data.eval" and common.is_named(source["path"]):
                source.setdefault("split", "train")
            found.append(source)
    if path == "data.train":
        found = [*draft.recipe["data"]["train"], *found]
    draft.put(path, found)


def _source(draft: Draft, where: str, entry: Source, pairs: bool) -> Source | None:
    kind = entry.get("type")
    if isinstance(kind, dict):
        made = None if pairs else _own_prompt(draft, where, kind)
    else:
        make = _maker(str(kind), pairs)
        made = make(entry) if make else None
    if not entry.get("path"):
        draft.hinder(where, "names no path")
        return None
    if made is None:
        draft.hinder(f"{where}.type", f"{kind} has no format here; {'preference' if pairs else 'completion'} may do")
        return None
    style = str(kind).partition(":")[2]
    if style:
        draft.lose(f"{where}.type", f"{kind} words the prompt otherwise; format instruction words it as Alpaca did")
    _conversation(draft, where, entry)
    for key in [key for key in entry if key not in KEYS and entry[key] not in OFF]:
        draft.lose(f"{where}.{key}", "no such setting of a source")
    return _where_it_lies(draft, where, entry) | made


def _maker(kind: str, pairs: bool) -> Callable[[Source], Source] | None:
    name = kind.partition(":")[0]
    if pairs:
        return next((make for end, make in PAIRS.items() if name.endswith(end)), None)
    return TYPES.get(name)


def _columns(**names: Any) -> Source:
    """Those that differ from the format's own."""
    found = {ours: theirs for ours, theirs in names.items() if theirs and ours != theirs}
    return {"columns": found} if found else {}


def _messages(entry: Source) -> Source:
    default = "conversations" if str(entry["type"]).startswith("sharegpt") else "messages"
    named = _columns(messages=entry.get("field_messages", default), tools=entry.get("field_tools"))
    return {"format": "messages", **named}


def _text(entry: Source) -> Source:
    return {"format": "text", **_columns(text=entry.get("field") or entry.get("text_column"))}


def _chosen(entry: Source, prompt: str | None) -> Source:
    names = _columns(prompt=prompt, chosen=entry.get("field_chosen"), rejected=entry.get("field_rejected"))
    return {"format": "preference", **names}


TYPES: dict[str, Callable[[Source], Source]] = {
    "alpaca": lambda entry: {"format": "instruction"},
    "gpteacher": lambda entry: {"format": "instruction", "columns": {"output": "response"}},
    "completion": _text,
    "pretrain": _text,
    "chat_template": _messages,
    "sharegpt": _messages,
    "messages.chat": _messages,
}
PAIRS: dict[str, Callable[[Source], Source]] = {
    "chat_template.default": lambda entry: _chosen(entry, entry.get("field_messages", "messages")),
    "bradley_terry.chat_template": lambda entry: _chosen(entry, "input"),
    ".argilla_chat": lambda entry: _chosen(entry, None),
    "chat_template.argilla": lambda entry: _chosen(entry, None),
    ".ultra": lambda entry: _chosen(entry, None),
    ".intel": lambda entry: _chosen(entry, "question"),
    ".icr": lambda entry: _chosen(entry, "input"),
    "passthrough": lambda entry: _chosen(entry, None),
}
"""By the end of a type's name; what stands before it is the chat template."""


def _own_prompt(draft: Draft, where: str, kind: Source) -> Source | None:
    """A type that spells its prompt out becomes a completion with that template."""
    names = {name: kind.get(f"field_{name}") or name for name in ("instruction", "input", "output", "system")}
    wording = kind.get("format") or "{instruction}"
    if kind.get("no_input_format"):
        draft.lose(f"{where}.type.no_input_format", "rows without input get the template with an empty one")
    if kind.get("system_prompt") or kind.get("system_format"):
        draft.lose(f"{where}.type.system_prompt", "write it into data.train.template")
    if "field" in kind:
        return {"format": "text", **_columns(text=kind["field"])}
    for name in ("instruction", "input", "system"):
        wording = wording.replace("{" + name + "}", "{" + names[name] + "}")
    return {"format": "completion", "template": wording, **_columns(completion=names["output"])}


def _where_it_lies(draft: Draft, where: str, entry: Source) -> Source:
    path = common.located(str(entry["path"]), entry.get("name"), entry.get("revision"))
    files = entry.get("data_files")
    if files:
        files = [files] if isinstance(files, str) else files
        path = f"hf://datasets/{entry['path']}/{files[0]}" if path.startswith("hf://") else files[0]
        if len(files) > 1:
            draft.lose(f"{where}.data_files", f"of {len(files)} the first; add a source for each, or a glob")
    split = entry.get("split", "train")
    return {"path": path} | ({"split": split} if common.is_named(path) and split != "train" else {})


def _conversation(draft: Draft, where: str, entry: Source) -> None:
    mapping = as_mapping(entry.get("message_property_mappings"))
    role = mapping.get("role", entry.get("message_field_role", "role"))
    content = mapping.get("content", entry.get("message_field_content", "content"))
    if (role, content) not in (("role", "content"), ("from", "value")):
        message = f"turns of {role} and {content}; muster reads role and content, or from and value"
        draft.hinder(f"{where}.message_property_mappings", message)
    for target, names in as_mapping(entry.get("roles")).items():
        strange = {str(name) for name in names} - KNOWN_ROLES.get(target, {target})
        if strange:
            draft.lose(f"{where}.roles", f"{', '.join(sorted(strange))} stand{'s' * (len(strange) == 1)} for {target}")


def _template(draft: Draft) -> None:
    """One template for all; a data set's own comes first where the file has none."""
    given = draft.settings.get("datasets")
    entries = [e for e in given if isinstance(e, dict)] if isinstance(given, list) else []
    own = [e for e in entries if e.get("chat_template") or e.get("chat_template_jinja")]
    name = draft.take("chat_template") or (own[0].get("chat_template") if own else None)
    jinja = draft.take("chat_template_jinja") or (own[0].get("chat_template_jinja") if own else None)
    talks = any(source["format"] in ("messages", "preference") for source in draft.recipe["data"]["train"])
    if jinja:
        draft.put("data.chat_template", jinja)
    elif name == "chatml" and talks:
        draft.put("data.chat_template", common.CHATML)
    elif name and not str(name).startswith("tokenizer_default"):
        text = "the tokenizer's own template is taken; data.chat_template names another"
        (draft.lose if talks else draft.pass_over)(
            "chat_template", f"{name}: {text}" if talks else "no turns in the data"
        )


def _tokens(draft: Draft) -> None:
    special = draft.take("special_tokens")
    if isinstance(special, dict):
        others = {name: token for name, token in special.items() if name != "pad_token" and token}
        if others:
            given = ", ".join(f"{name} {token}" for name, token in others.items())
            draft.lose("special_tokens", f"{given}: the tokenizer's own are taken")
        else:
            draft.pass_over("special_tokens", "a pad is never seen")
    if draft.take("tokens"):
        draft.lose("tokens", "new tokens belong into the base's tokenizer and embedding before it is trained")
    if draft.take("eot_tokens"):
        draft.pass_over("eot_tokens", "the chat template writes the ends of turns, and they are targets")
