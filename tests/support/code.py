"""Models, adapters and rewards that bring code, which leaves a mark when it runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

CONFIGURATION = """
from pathlib import Path
from transformers import LlamaConfig

Path({mark!r}).touch()

class OwnConfig(LlamaConfig):
    model_type = {kind!r}
"""
MODEL = """
from transformers import LlamaForCausalLM

from .configuration_own import OwnConfig

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast

Path({mark!r}).touch()

class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
REWARD = """
from pathlib import Path

Path({mark!r}).touch()

def rate(prompts, completions, references):
    return [0.0] * len(completions)
"""


def model_with_code(model: Path, folder: Path, mark: Path, kind: str = "of_its_own") -> Path:
    """A copy of a Llama in ``folder`` that only code beside it builds, unless ``kind`` is one of transformers' own."""
    shutil.copytree(model, folder)
    (folder / "configuration_own.py").write_text(CONFIGURATION.format(mark=str(mark), kind=kind))
    (folder / "modeling_own.py").write_text(MODEL)
    config = json.loads((folder / "config.json").read_text())
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    classes["AutoModel"] = classes["AutoModelForCausalLM"]
    config |= {"model_type": kind, "auto_map": classes, "architectures": ["OwnForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tokenizer_with_code(folder: Path, mark: Path) -> None:
    """Makes the tokenizer that lies in ``folder`` one that only code beside it builds."""
    (folder / "tokenization_own.py").write_text(TOKENIZER.format(mark=str(mark)))
    told = json.loads((folder / "tokenizer_config.json").read_text())
    told |= {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(told))


def reward_with_code(path: Path, mark: Path) -> str:
    """Writes a reward function; returns the words by which a recipe names it."""
    path.write_text(REWARD.format(mark=str(mark)))
    return f"{path}:rate"
