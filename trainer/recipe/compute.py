"""How it is computed."""

from __future__ import annotations

from pydantic import Field

from trainer.recipe.base import Section


class ComputeSection(Section):
    """By which kernels it is computed: this decides speed and rounding, never what is learnt, and may change between
    attempts, as machines do."""

    peak_tflops: float | None = Field(default=None, gt=0.0)
    """TFLOP/s (10^12 floating-point operations per second) that one worker's device can do at most, for `mfu` and `hfu`
    in the metrics. null takes those of NVIDIA's data sheets for bfloat16, by the name of the device; where it is not
    known, as on CPUs, there is neither."""
