"""Which modules an adapter takes, on several architectures: the heads only when they are meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from trainer.adapters.targets import heads, linear_modules, matched_linear, resolve
from trainer.errors import InputError

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
HEADS = {"num_attention_heads": 2}
GPT2 = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, num_labels=3, pad_token_id=0)
CLASSIFIER, CAUSAL = AutoModelForSequenceClassification, AutoModelForCausalLM


def model_of(auto: Any, config: PreTrainedConfig) -> torch.nn.Module:
    with torch.device("meta"):
        model: torch.nn.Module = auto.from_config(config)
    return model


MODELS = [
    (CAUSAL, LlamaConfig(**SIZES, **HEADS), {"lm_head"}, 7),
    (CLASSIFIER, LlamaConfig(**SIZES, **HEADS, num_labels=3), {"score"}, 7),
    (CAUSAL, GPT2, {"lm_head"}, 4),
    (CLASSIFIER, GPT2, {"score"}, 4),
    (CLASSIFIER, BertConfig(**SIZES, **HEADS, num_labels=3), {"classifier"}, 7),
    (CLASSIFIER, RobertaConfig(**SIZES, **HEADS, num_labels=3), {"classifier.dense", "classifier.out_proj"}, 6),
]


@pytest.mark.parametrize(("auto", "config", "head", "layers"), MODELS)
def test_all_linear_leaves_the_heads_out(auto: Any, config: PreTrainedConfig, head: set[str], layers: int) -> None:
    model = model_of(auto, config)
    assert heads(model) == head
    found = resolve(model, "all-linear")
    assert len(found) == layers
    assert set(found) == set(linear_modules(model)) - head


def test_an_ending_that_the_head_shares_with_other_layers_does_not_reach_it() -> None:
    model = model_of(CLASSIFIER, RobertaConfig(**SIZES, **HEADS, num_labels=3))
    found = resolve(model, ["dense"])
    assert len(found) == 3
    assert not any("classifier" in name for name in found)


@pytest.mark.parametrize("targets", [["out_proj"], ["classifier.dense"], r"classifier\.dense", ["query", "out_proj"]])
def test_a_head_that_is_named_is_taken(targets: Any) -> None:
    model = model_of(CLASSIFIER, RobertaConfig(**SIZES, **HEADS, num_labels=3))
    found = resolve(model, targets)
    assert found == targets
    assert any(name.startswith("classifier") for name in matched_linear(model, found))


@pytest.mark.parametrize("targets", [r"[a-z_.0-9]*_(proj|head)", r".*(proj|h..d)"])
def test_a_pattern_that_does_not_spell_the_head_does_not_reach_it(targets: str) -> None:
    model = model_of(CAUSAL, LlamaConfig(**SIZES, **HEADS))
    spelled = "head" in targets and "lm_head" in targets
    assert not spelled
    assert "lm_head" not in resolve(model, targets)
    assert len(resolve(model, targets)) == 7


def test_a_pattern_without_a_head_stays_as_it_is_written() -> None:
    model = model_of(CAUSAL, GPT2)
    assert resolve(model, r".*\.c_(attn|proj)") == r".*\.c_(attn|proj)"
    assert resolve(model, ["c_attn"]) == ["c_attn"]
    with pytest.raises(InputError, match="match no linear layer of this model; there are c_attn, c_fc, c_proj"):
        resolve(model, ["q_proj"])
