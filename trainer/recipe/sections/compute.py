"""How it is computed."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from trainer.recipe.base import Section

SIXTEEN_BIT = ("bfloat16", "float16")
SEGMENTING_TASKS = ("sft", "dpo")
"""Tasks whose forwards are told where each sample begins, and need no mask beside that."""
VIRTUAL = ("prefix", "prompt", "p_tuning", "adaption_prompt", "peft")
"""Adapters that may put tokens of their own among those of the samples."""


class ComputeSection(Section):
    """By which kernels it is computed: this decides speed and rounding, never what is learnt, and may change between
    attempts, as machines do."""

    attention: Literal["auto", "sdpa", "varlen", "flex", "flash"] = "auto"
    """Kernel of attention. `sdpa` is torch's scaled dot product, with a mask that keeps the samples of a pack apart:
    it works everywhere, on all pairs of a pack's tokens. The others pass over what the mask leaves out: `varlen` is
    torch's own variable-length FlashAttention on GPUs, in 16 bits, and goes from sample to sample on CPUs; `flash` is
    the same from its package (`pip install 'muster[flash]'`), and `flex` torch's flex_attention, compiled at the first
    step, both on GPUs only. `auto` takes `varlen` where it can be had, and else `sdpa`. Whichever is not `sdpa` is
    compared with it on the model itself before training."""

    compile: bool = False
    """Compile each decoder layer by torch.compile: faster steps after a warm-up of seconds to minutes, which stands in
    the metrics as `compile_s` and in the event `compiled`. One program for all lengths of packs. On CPUs it needs a C++
    compiler."""

    kernels: Literal["none", "liger"] = "none"
    """`liger`: the fused Triton kernels of the package liger-kernel for norms, rotary embeddings and gated units, on
    GPUs (`pip install 'muster[liger]'`). The loss is muster's own in any case."""

    tf32: bool = False
    """With `model.dtype: float32` on GPUs: products of matrices by tensor cores that round to 10 bits of mantissa;
    several times faster."""

    peak_tflops: float | None = Field(default=None, gt=0.0)
    """TFLOP/s (10^12 floating-point operations per second) that one worker's device can do at most, for `mfu` and `hfu`
    in the metrics. null takes those of NVIDIA's data sheets for bfloat16, by the name of the device; where it is not
    known, as on CPUs, there is neither."""
