"""A look at a base model's files: what it is, how large, and what its tokenizer writes."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import InputError
from trainer.parsing import parse_json
from trainer.recipe.sections.model import ModelSection

if TYPE_CHECKING:
    from tokenizers import Tokenizer

DEQUANTISED = ("mxfp4", "fp8")
TURN_ENDS = {
    "<|im_end|>": "chatml",
    "<|eot_id|>": "llama3",
    "<end_of_turn>": "gemma",
    "[/INST]": "mistral",
    "<|end|>": "phi",
}
"""Tokens that end a turn, or a user's, and muster's chat template that writes each."""
UNPACKED = re.compile(
    r"mamba|ssm_|linear_attention|linear_num|conv_dim|rwkv|recurrent|alibi|gpt_oss|bloom|\"mpt|falcon|\"opt\""
)
"""Marks in config.json of models whose samples may see each other in a pack; a run finds out by trying."""
HEIGHT = ("num_hidden_layers", "n_layer", "num_layers")
WIDTH = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "num_heads")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


@dataclass(frozen=True)
class BaseModel:
    """``parameters``: about how many weights, None if config.json does not say. ``stored``: how its weights are
    quantised in the files. ``template``: the tokenizer has a chat template. ``packs``: samples may share a pack.
    ``tokens``: the tokenizer's added tokens."""

    path: str
    kind: str
    encoder: bool
    parameters: int | None
    experts: int
    positions: int | None
    stored: str | None
    template: bool
    packs: bool
    tokens: frozenset[str]
    tokenizer: Tokenizer | None

    @property
    def nearest_template(self) -> str:
        """The shipped chat template whose end of turn the tokenizer knows."""
        return next((name for token, name in TURN_ENDS.items() if token in self.tokens), "chatml")

    def count(self, text: str) -> int:
        """Returns about how many tokens a text has."""
        return len(text) // 3 if self.tokenizer is None else len(self.tokenizer.encode(text).ids)


def look(path: str) -> BaseModel:
    """Raises InputError when there is no such model, or none that muster trains."""
    folder = Path(path)
    if not folder.is_dir():
        from trainer.model import fetch_model

        folder = fetch_model(ModelSection(path=path), weights=False).folder
    if not (folder / "config.json").is_file():
        raise InputError(f"{path} holds no config.json: name a folder in the Hugging Face format")
    config = _json(folder / "config.json")
    text = config["text_config"] if isinstance(config.get("text_config"), dict) else config
    names = " ".join(map(str, config.get("architectures") or [])) + str(config.get("model_type", ""))
    positions = text.get("max_position_embeddings")
    vocabulary = _json(folder / "tokenizer.json") if (folder / "tokenizer.json").is_file() else {}
    settings = _json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    added = [token for token in vocabulary.get("added_tokens", []) if isinstance(token, dict)]
    return BaseModel(
        path=path,
        kind=str(config.get("model_type", "unknown")),
        encoder=bool(re.search(r"MaskedLM|(?<!De)[Bb]ert|ForSequenceClassification|electra", names)),
        parameters=parameters(text),
        experts=_number(text, EXPERTS) or 0,
        positions=positions if isinstance(positions, int) and positions > 1 else None,
        stored=_stored(path, config.get("quantization_config") or text.get("quantization_config")),
        template=bool(settings.get("chat_template")) or any(folder.glob("chat_template.*")),
        packs=UNPACKED.search(json.dumps(config)) is None,
        tokens=frozenset(str(token.get("content")) for token in added),
        tokenizer=_tokenizer(folder / "tokenizer.json"),
    )


def parameters(config: Mapping[str, Any]) -> int | None:
    """Returns about how many weights a decoder of this shape has: its embeddings, attention and (expert) MLPs."""
    height, width, heads = (_number(config, names) for names in (HEIGHT, WIDTH, HEADS))
    vocabulary = _number(config, ("vocab_size",))
    if not (height and width and heads and vocabulary):
        return None
    head = _number(config, ("head_dim",)) or width // heads
    keys = _number(config, ("num_key_value_heads",)) or heads
    attention = 2 * width * head * (heads + keys)
    inner = _number(config, ("intermediate_size", "n_inner", "ffn_dim")) or 4 * width
    experts = _number(config, EXPERTS)
    mlp = 3 * width * ((_number(config, ("moe_intermediate_size",)) or inner) * experts if experts else inner)
    return height * (attention + mlp) + vocabulary * width * (1 if config.get("tie_word_embeddings") else 2)


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    return next((config[name] for name in names if isinstance(config.get(name), int)), None)


def _stored(path: str, settings: Any) -> str | None:
    if not isinstance(settings, dict):
        return None
    method = str(settings.get("quant_method"))
    if method == "bitsandbytes":
        return "nf4" if settings.get("load_in_4bit") else "int8"
    if method not in DEQUANTISED:
        raise InputError(
            f"{path} holds weights that are quantised by {method[:80]!r}, which muster does not train: name the "
            "unquantised model, and keep it in 4 bits with model.quantization: nf4"
        )
    return method


def _json(path: Path) -> dict[str, Any]:
    try:
        found = parse_json(path.read_bytes(), finite=False, unique=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} holds no JSON object")
    return found


def _tokenizer(path: Path) -> Tokenizer | None:
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path)) if path.is_file() else None
    except Exception:  # the library raises nothing narrower
        return None
