"""Converts axolotl's data sets: a type and field names become a format and its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from launcher.convert import common
from launcher.convert.axolotl_grpo import FUNCTION
from launcher.convert.draft import Draft, as_mapping
from trainer.recipe.formats import FORMATS
from trainer.recipe.sections.datasets import is_hub_dataset
from trainer.recipe.tasks import TASKS

Source = dict[str, Any]

KNOWN_ROLES = {
    "user": {"user", "human"},
    "assistant": {"assistant", "gpt", "chatgpt", "bing", "bard", "function_call", "model"},
    "system": {"system"},
    "tool": {"tool", "observation", "function_response"},
}
BUILDERS = ("json", "csv", "parquet", "text", "arrow")
"""Paths that name the kind of the data_files and no location."""

UNCHANGED = "prompt and answers are read unchanged, without a template; write the template into the texts"
ANSWERS = "the loss is computed on the assistant's turns, with their ends"
IDLE = {
    "ds_type": "the suffix of a file decides it",
    "trust_remote_code": "no data set is loaded by a script",
    "preprocess_shards": "muster prepare processes the rows in windows",
}


def data(draft: Draft) -> None:
    kind = TASKS[draft.recipe.get("task", "sft")].learns_from[0]
    draft.put("data.train", [])
    parts = list(_parts(draft, "datasets", "data.train"))
    parts += [*_parts(draft, "pretraining_dataset", "data.train"), *_parts(draft, "test_datasets", "data.eval")]
    for part in parts:
        source = _source(part, kind)
        if source is not None:
            draft.recipe["data"].setdefault(part.home.removeprefix("data."), []).append(source)
    for key, home in (("datasets", "train"), ("pretraining_dataset", "train"), ("test_datasets", "eval")):
        if draft.recipe["data"].get(home):
            draft.use(f"data.{home}", key)
    if not draft.recipe["data"]["train"] and not any(key.startswith("datasets[") for key in draft.hindrances):
        draft.hinder("datasets", "no data set is named that a recipe could take")
    _packing(draft, kind)
    if draft.is_on("train_on_inputs"):
        draft.lose("train_on_inputs", "the loss is computed on answers only; format text computes it on every token")
    _template(draft, parts)
    for part in parts:
        if not any(key.startswith(part.place) for key in draft.hindrances):
            part.finish(IDLE)
    _tokens(draft)
    common.hold_out(draft, "val_set_size")


def _parts(draft: Draft, key: str, home: str) -> Iterator[Draft]:
    """Yields a part for each data set that the key names, and for each of its configurations."""
    given = draft.take(key) or []
    for index, entry in enumerate(given if isinstance(given, list) else [given]):
        where = f"{key}[{index}]"
        entry = {"path": entry, "type": "pretrain"} if isinstance(entry, str) else entry
        if not isinstance(entry, dict):
            draft.hinder(where, f"{entry!r} is no data set")
            continue
        if key == "pretraining_dataset":
            entry = {"type": "pretrain", **entry}
        names = entry.get("name")
        for name in names if isinstance(names, list) and names else [names]:
            yield draft.part(where, {**entry, "name": name}, home)


def _packing(draft: Draft, kind: str) -> None:
    draft.put("data.sequence_length", int(draft.number("sequence_len", 512)), "sequence_len")
    texts = any(source["format"] == "text" for source in draft.recipe["data"]["train"])
    packed = draft.is_on("sample_packing") or (draft.is_on("pretraining_dataset") and texts)
    generates = TASKS[draft.recipe.get("task", "sft")].generates
    draft.put("data.packing", packed and kind not in ANSWERED and not generates, "sample_packing")
    if draft.take("excess_length_strategy") == "truncate":
        draft.pass_over("excess_length_strategy", "samples are cut on the right")
    elif draft.is_on("excess_length_strategy"):
        draft.lose("excess_length_strategy", "longer samples are cut on the right, and counted")


def _source(part: Draft, gives: str) -> Source | None:
    """Returns the source. ``gives``: the kind of its samples (`trainer.recipe.formats.FormatRow`)."""
    kind, judged = part.read("type"), ANSWERED.get(gives)
    if not part.is_on("path"):
        part.hinder("path", "is missing")
        return None
    if isinstance(kind, dict):
        own = part.part("type", kind)
        made = _own_answers(own, judged) if judged else _own_prompt(own)
    else:
        name = str(kind).partition(":")[0]
        known = (make for end, make in (judged.types if judged else {}).items() if name.endswith(end))
        maker = next(known, None) if judged else TYPES.get(name)
        made = maker(part) if maker else None
    if made is None and part.recipe.get("task") == "grpo" and FUNCTION.fullmatch(str(kind)):
        part.lose("type", f"{kind} makes the rows by code; write rows with a prompt, and the answer as completion")
        made = {"format": "completion"}
    if made is None:
        part.hinder("type", f"{kind} has no format here; {judged.format if judged else 'completion'} may do")
        return None
    style = str(kind).partition(":")[2] if isinstance(kind, str) else ""
    if style:
        part.lose("type", f"{kind} formats the prompt differently; format instruction uses Alpaca's prompt")
    _conversation(part)
    source = _location(part) | made
    if part.home == "data.eval" and is_hub_dataset(source["path"]):
        source.setdefault("split", "train")
    return source


def _columns(**names: Any) -> Source:
    """Returns ``columns`` with the names that differ from the format's own."""
    found = {ours: theirs for ours, theirs in names.items() if theirs and ours != theirs}
    return {"columns": found} if found else {}


def _messages(part: Draft) -> Source:
    default = "conversations" if str(part.take("type")).startswith("sharegpt") else "messages"
    named = _columns(messages=part.read("field_messages", default), tools=part.read("field_tools"))
    return {"format": "messages", **named}


def _text(part: Draft) -> Source:
    return {"format": "text", **_columns(text=part.read("field") or part.read("text_column"))}


def _turns(prompt: str | None) -> Callable[[Draft], Source]:
    """Returns a converter for pairs whose answers are turns, which the chat template formats."""

    def make(part: Draft) -> Source:
        before = part.read("field_messages", "messages") if prompt == "messages" else prompt
        names = _columns(prompt=before, chosen=part.read("field_chosen"), rejected=part.read("field_rejected"))
        _named_template(part)
        return {"format": "preference", **names}

    return make


def _texts(prompt: str | None, format: str = "preference") -> Callable[[Draft], Source]:
    """Returns a converter for answers that are texts, which axolotl formats with a template of its own."""

    def make(part: Draft) -> Source:
        if part.take("type") != "passthrough":
            part.lose("type", f"{part.take('type')}: {UNCHANGED}")
        return {"format": format, **_columns(prompt=prompt)}

    return make


def _rated_turns(part: Draft) -> Source:
    """Converts conversations whose last turn is rated."""
    _named_template(part)
    return {"format": "unpaired_preference"}


def _named_template(part: Draft) -> None:
    """Handles a template named in the type, before the dot, which axolotl uses instead of the tokenizer's."""
    name = str(part.take("type")).partition(".")[0]
    if name in common.CHAT_TEMPLATES:
        part.put("data.chat_template", common.CHAT_TEMPLATES[name], "type")
    elif name not in ("chat_template", "bradley_terry"):
        part.lose("type", f"{name}'s format of turns: {OWN_TEMPLATE}")


OWN_TEMPLATE = "turns are formatted with the tokenizer's own template; data.chat_template sets another"
TYPES: dict[str, Callable[[Draft], Source]] = {
    "alpaca": lambda part: {"format": "instruction"},
    "gpteacher": lambda part: {"format": "instruction", "columns": {"output": "response"}},
    "completion": _text,
    "pretrain": _text,
    "chat_template": _messages,
    "sharegpt": _messages,
    "messages.chat": _messages,
}
PAIRS: dict[str, Callable[[Draft], Source]] = {
    "chat_template.default": _turns("messages"),
    "bradley_terry.chat_template": _texts("input"),
    ".argilla_chat": _turns(None),
    "chat_template.argilla": _turns(None),
    ".ultra": _turns(None),
    ".intel": _texts("question"),
    ".icr": _texts("input"),
    ".prompt_pairs": _texts(None),
    "passthrough": _texts(None),
}
"""Converters by the end of a type's name; the part before it is the chat template."""
RATED: dict[str, Callable[[Draft], Source]] = {
    ".argilla_chat": _rated_turns,
    ".argilla": _texts("instruction", "unpaired_preference"),
    ".intel": _texts("question", "unpaired_preference"),
    ".prompt_pairs": _texts(None, "unpaired_preference"),
    ".ultra": _texts(None, "unpaired_preference"),
}


class Judged(NamedTuple):
    """Answers that are judged: their format, the columns that axolotl's own types name, and its types."""

    format: str
    columns: tuple[str, ...]
    types: dict[str, Callable[[Draft], Source]]


ANSWERED = {
    "preference": Judged("preference", ("prompt", "chosen", "rejected"), PAIRS),
    "rated": Judged("unpaired_preference", ("prompt", "completion", "label"), RATED),
}
"""By the kind of the samples."""


def _own_prompt(kind: Draft) -> Source:
    """Converts a type that contains its own prompt to a completion with that template."""
    names = {name: kind.read(f"field_{name}") or name for name in ("instruction", "input", "output", "system")}
    if kind.is_on("field"):
        made: Source = {"format": "text", **_columns(text=kind.read("field"))}
        kind.finish({})
        return made
    wording = str(kind.read("format") or "{instruction} {input} ")
    if kind.take("no_input_format") == wording:
        kind.pass_over("no_input_format", "the same as format")
    elif kind.is_on("no_input_format"):
        kind.lose("no_input_format", "rows without input get the template with an empty one")
    frame = str(kind.read("system_format") or "{system}")
    if kind.is_on("field_system"):
        wording = frame + wording
        if kind.is_on("system_prompt"):
            kind.lose("system_prompt", "for rows without one; write it into their column")
    elif kind.is_on("system_prompt"):
        spoken = str(kind.read("system_prompt")).replace("{", "{{").replace("}", "}}")
        wording = frame.replace("{system}", spoken) + wording
    for name in ("instruction", "input", "system"):
        wording = wording.replace("{" + name + "}", "{" + str(names[name]) + "}")
    kind.finish({})
    return {"format": "completion", "template": wording, **_columns(completion=names["output"])}


def _own_answers(kind: Draft, judged: Judged) -> Source | None:
    """Converts a type with its own column names; returns None if its formats add text."""
    for name in judged.columns:
        if kind.take(f"{name}_format", f"{{{name}}}") != f"{{{name}}}":
            return None
        kind.pass_over(f"{name}_format", "adds nothing")
    columns = {name: kind.read(f"field_{name}") for name in judged.columns}
    kind.finish({})
    return {"format": judged.format, **_columns(**columns)}


def _location(part: Draft) -> Source:
    path = str(part.read("path"))
    files = part.take("data_files")
    files = [str(file) for file in files] if isinstance(files, list) else [str(files)] if files else []
    if files:
        part.read("data_files")
        here = common.is_elsewhere(path) or path in BUILDERS
        path = files[0] if here else f"hf://datasets/{path}/{files[0]}"
        if len(files) > 1:
            part.lose("data_files", f"the first of {len(files)} is taken; add a source for each, or a glob")
    elif not common.is_elsewhere(path):
        revision, config = part.read("revision"), part.read("name")
        path = f"hf://{path}{f'@{revision}' if revision else ''}{f'/{config}' if config else ''}"
    for key in ("name", "revision"):
        if not is_hub_dataset(path) and part.is_on(key):
            part.lose(key, "belongs to data sets of the Hub; files are named by path")
    split = part.take("split", "train")
    if is_hub_dataset(path):
        part.read("split")
        return {"path": path} | ({"split": split} if split != "train" else {})
    if split == "train":
        part.pass_over("split", "files are read completely")
    else:
        part.lose("split", f"{split}: files are read completely; name those of the split in path")
    return {"path": path}


def _conversation(part: Draft) -> None:
    mapping = as_mapping(part.take("message_property_mappings"))
    role = mapping.get("role", part.take("message_field_role", "role"))
    content = mapping.get("content", part.take("message_field_content", "content"))
    for key in ("message_property_mappings", "message_field_role", "message_field_content"):
        part.use(part.home, key)
    if (role, content) not in (("role", "content"), ("from", "value")):
        message = f"turns of {role} and {content}; muster reads role and content, or from and value"
        part.hinder("message_property_mappings", message)
    other = [f"{ours} from {theirs}" for ours, theirs in mapping.items() if ours not in ("role", "content", theirs)]
    if other:
        part.lose("message_property_mappings", f"{', '.join(other)}: other keys of a turn keep their names")
    strange = [
        f"{name} for {target}"
        for target, names in as_mapping(part.take("roles")).items()
        for name in (names if isinstance(names, list) else [names])
        if str(name) not in KNOWN_ROLES.get(target, {target})
    ]
    if strange:
        part.lose("roles", f"{', '.join(strange)}; roles are read by their usual names")
    else:
        part.pass_over("roles", "they are read by these names")
    if not set(part.names("roles_to_train")) - KNOWN_ROLES["assistant"]:
        part.pass_over("roles_to_train", ANSWERS)
    for key in ("train_on_eos", "train_on_eot"):
        if part.take(key) == "turn":
            part.pass_over(key, ANSWERS)
        elif key in part.settings:
            part.lose(key, f"{part.take(key)}: {ANSWERS}")
    if part.take("field_thinking") == part.take("template_thinking_key"):
        for key in ("field_thinking", "template_thinking_key"):
            part.pass_over(key, "other keys of a turn reach the chat template under their names")


def _template(draft: Draft, parts: list[Draft]) -> None:
    """Sets the chat template. A recipe has one for all its data: that of the first data set that has one, else the
    file's."""
    keys = ("chat_template", "chat_template_jinja")
    owners = [one for one in (*parts, draft) if any(one.is_on(key) for key in keys)]
    if not owners:
        return
    name, jinja = (owners[0].take(key) for key in keys)
    known = common.CHAT_TEMPLATES.get(str(name))
    talks = any(FORMATS[source["format"]].chats for source in draft.recipe["data"]["train"])
    for one in owners:
        if [one.take(key) for key in keys] != [name, jinja]:
            for key in keys:
                if one.is_on(key):
                    one.lose(key, f"with {name or 'another'}: a recipe has one template for all its data")
        elif jinja or (known and talks):
            one.put("data.chat_template", jinja or known, *keys)
        elif not talks:
            one.pass_over("chat_template", f"{name}: no turns in the data")
        elif name == "tokenizer_default":
            one.pass_over("chat_template", "the tokenizer's own template is taken")
        elif str(name).startswith("tokenizer_default_fallback_"):
            one.lose("chat_template", f"{name}: the tokenizer's own is taken; if it has none, that is an error")
        else:
            one.lose("chat_template", f"{name}: {OWN_TEMPLATE}")


def _tokens(draft: Draft) -> None:
    special = draft.take("special_tokens")
    if isinstance(special, dict):
        others = {name: token for name, token in special.items() if name != "pad_token" and token}
        if others:
            given = ", ".join(f"{name} {token}" for name, token in others.items())
            draft.lose("special_tokens", f"{given}: the tokenizer's own are taken")
        else:
            draft.pass_over("special_tokens", "the model never sees padding")
    if draft.is_on("tokens"):
        draft.lose("tokens", "add new tokens to the base model's tokenizer and embedding before training")
    draft.pass_over("eot_tokens", "the chat template writes the ends of turns, and they are targets")
