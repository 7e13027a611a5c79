"""Models whose files are quantised, made from an unquantised folder, beside the model that they stand for."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

BLOCK = (48, 40)
"""Divides no weight of the small models evenly."""

Tensors = dict[str, torch.Tensor]


def _copy(source: Path, target: Path, tensors: Tensors, settings: dict[str, Any] | None) -> Path:
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("*.safetensors"))
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return target


def with_settings(source: Path, target: Path, settings: dict[str, Any] | None) -> Path:
    """The same weights under a configuration that says that they are quantised."""
    return _copy(source, target, load_file(source / "model.safetensors"), settings)


def in_fp8(source: Path, folder: Path, of: Callable[[str], bool] = lambda name: "proj" in name) -> tuple[Path, Path]:
    """Returns a folder in fp8 with a scale for each `BLOCK`, and one with the weights that it stands for."""
    stored: Tensors = {}
    plain: Tensors = {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.dim() != 2 or not of(name):
            stored[name] = plain[name] = tensor
            continue
        (rows, columns), (high, wide) = tensor.shape, BLOCK
        scale = torch.rand(math.ceil(rows / high), math.ceil(columns / wide), generator=generator) / 100 + 1e-3
        each = torch.tensor([[scale[r // high, c // wide] for c in range(columns)] for r in range(rows)])
        stored[name] = (tensor.float() / each).clamp(-448, 448).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        plain[name] = stored[name].float() * each
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(BLOCK)}
    return _copy(source, folder / "fp8", stored, settings), _copy(source, folder / "plain", plain, None)


def in_mxfp4(source: Path, folder: Path) -> tuple[Path, Path]:
    """Returns a gpt-oss with its experts in mxfp4, and one with the weights that it stands for."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored: Tensors = {}
    plain: Tensors = {}
    generator = torch.Generator().manual_seed(3)
    for name, tensor in load_file(source / "model.safetensors").items():
        if not name.endswith(("gate_up_proj", "down_proj")):
            stored[name] = plain[name] = tensor
            continue
        experts, rows, columns = tensor.shape
        shape = (experts, columns, rows // 32)
        blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    settings = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    return _copy(source, folder / "mxfp4", stored, settings), _copy(source, folder / "plain", plain, None)
