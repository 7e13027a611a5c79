"""The base model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.recipe.base import Location, Section


class ModelSection(Section):
    """The base model: its source and the type of its frozen weights. A text in place of the section is its `path`."""

    shorthand = "path"

    path: Location = Field(examples=["Qwen/Qwen3-8B"])
    """Causal language model: a Hugging Face Hub id, a local folder, or an fsspec URL of a folder (`s3://models/llama`)."""

    revision: str = "main"
    """Branch, tag or commit on the Hub; no effect for folders and URLs. Give a commit to make a run repeatable."""

    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Type of the forward and backward pass and of unquantised frozen weights: 2 bytes per parameter for bfloat16 and
    float16, 4 for float32. float16 scales the loss to keep small gradients."""

    quantization: Literal["none", "nf4", "int8"] = "none"
    """Type of the frozen linear weights: `nf4` about 0.52 bytes per parameter (double quantisation), `int8` 1 byte,
    `none` the type `dtype`. Needs an adapter: quantised weights are not trained."""

    trust_remote_code: bool = False
    """Run Python code that comes with the model. Only for repositories that you have read. In a recipe that is
    read from a storage it has no effect by itself: see [after.md](after.md#code-that-comes-with-a-model)."""
