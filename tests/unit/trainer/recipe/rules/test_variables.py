"""`cluster.env`: variables that a recipe can set, and the sentences for those that it cannot."""

from __future__ import annotations

from typing import Any

import pytest

from tests.unit.trainer.recipe.test_mistakes import GOOD, changed, mistakes
from trainer.recipe import loads, parse
from trainer.recipe.writing import dump


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("NCCL_SOCKET_IFNAME", "eth0"),
        ("HF_HOME", "/scratch/hf"),
        ("HTTPS_PROXY", "http://proxy:3128"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_TOKEN_PATH", "/secrets/token"),
        ("MUSTER_CACHE", "/scratch/muster"),
        ("TORCH_NCCL_BLOCKING_WAIT", "1"),
        ("EMPTY", ""),
    ],
)
def test_a_variable_is_set(name: str, value: str) -> None:
    assert parse(changed("cluster.env", {name: value})).cluster.env == {name: value}


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("RANK", "0", "RANK cannot be set here: each worker gets its own value"),
        ("MASTER_ADDR", "h", "MASTER_ADDR cannot be set here"),
        ("RAY_ADDRESS", "h:6379", "RAY_ADDRESS cannot be set here: Ray reads it where it is started"),
        ("SLURM_JOB_ID", "7", "the scheduler sets it"),
        ("CUDA_VISIBLE_DEVICES", "0", "from the scheduler or from Ray"),
        ("MUSTER_EXIT_FILE", "x", "muster sets it"),
        ("LD_PRELOAD", "x.so", "only where a process is started"),
        ("PYTHONPATH", "x", "only where a process is started"),
        ("1ST", "x", "'1ST' is no name of an environment variable"),
        ("A B", "x", "is no name of an environment variable"),
        ("LINES_OF", "a\nb", "control characters"),
        ("WANDB_API_KEY", "0123456789abcdef", "WANDB_API_KEY holds credentials"),
        ("MY_PASSWORD", "correct horse battery", "MY_PASSWORD has the name of a credential"),
        ("HTTPS_PROXY", "http://user:word@proxy:1", "holds credentials"),
        ("NCCL_IB_DISABLE", 1, "text"),
    ],
)
def test_a_variable_that_cannot_be_set(name: str, value: Any, told: str) -> None:
    ((path, message),) = mistakes(changed("cluster.env", {name: value}))
    assert path.startswith("cluster.env")
    assert told in message
    assert "0123456789abcdef" not in message
    assert "horse" not in message


def test_all_refused_variables_are_named_at_once() -> None:
    ((_, message),) = mistakes(changed("cluster.env", {"RANK": "0", "WORLD_SIZE": "2", "NCCL_DEBUG": "INFO"}))
    assert "RANK" in message
    assert "WORLD_SIZE" in message


def test_an_override_sets_a_text() -> None:
    text = dump(parse(GOOD))
    assert loads(text, overrides=["cluster.env.NCCL_IB_DISABLE=1"]).cluster.env == {"NCCL_IB_DISABLE": "1"}
