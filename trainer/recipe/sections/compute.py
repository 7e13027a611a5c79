"""The kernels and the precision of the computation."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.recipe.base import Section

SIXTEEN_BIT = ("bfloat16", "float16")


class ComputeSection(Section):
    """The kernels of the computation. They decide speed and rounding, not what is learned, and may change between
    attempts, as machines may."""

    attention: Literal["auto", "sdpa", "varlen", "flex", "flash"] = "auto"
    """Attention kernel. `sdpa` is torch's scaled dot product, with a mask that separates the samples of a pack. It
    works everywhere and computes all pairs of a pack's tokens. The others skip the pairs that the mask excludes.
    `varlen` is torch's own variable-length FlashAttention on GPUs, in 16 bits, and a loop over the samples on CPUs.
    `flash` is the same from its package (`pip install flash-attn --no-build-isolation`), on GPUs only. `flex` is
    torch's flex_attention, compiled at the first step, on GPUs only. `auto` takes `varlen` if it is available, else
    `sdpa`. Before training, every other kernel is compared with `sdpa` on the model itself."""

    compile: bool = False
    """Compile each decoder layer with torch.compile: faster steps after a warm-up of seconds to minutes, which is
    reported as the metric `compile_s` and the event `compiled`. One program serves all lengths of packs. On CPUs it
    needs a C++ compiler."""

    kernels: Literal["none", "liger"] = "none"
    """`liger`: the fused Triton kernels of the package liger-kernel for norms, rotary embeddings and gated units, on
    GPUs (`pip install liger-kernel`). The loss is always muster's own."""

    offload_activations: bool = False
    """Keep the inputs of layers in host memory between forward and backward, copied while other layers compute. Saves
    2 bytes x hidden size x tokens of each layer (in 16 bits) on a GPU, and takes as many of its host. Needs
    `training.gradient_checkpointing`."""

    tile_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a tile. The parts of a layer that treat each token by itself (the MLP, norms) compute one tile after
    the other, and once more in the backward, so that their intermediate values take the memory of one tile. For long
    texts; a few thousand keep a GPU busy. null computes all tokens at once."""

    tf32: bool = False
    """With `model.dtype: float32` on GPUs: matrix products on tensor cores, which round to 10 bits of mantissa; several
    times faster."""

    peak_tflops: float | None = Field(default=None, gt=0.0)
    """Peak TFLOP/s (10^12 floating-point operations per second) of a worker's device, for the metrics `mfu` and `hfu`.
    null takes the value of NVIDIA's data sheets for bfloat16, by the name of the device; for an unknown device, such as
    a CPU, the two metrics are missing."""
