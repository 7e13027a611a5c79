"""LoRA that starts from a part of the weight itself: PiSSA and OLoRA.

The weight W of shape [out, in] is decomposed into s B0 A0 + R with s = alpha / r. R replaces W, frozen (and quantised:
the residual has a smaller range than W, hence a smaller quantisation error), and A, B start from A0, B0.
PiSSA (Meng et al. 2024, arXiv:2404.02948): s B0 A0 is the best approximation of rank r, by singular values.
OLoRA (Büyükakyüz 2024, arXiv:2406.01775): B0 holds the first r columns of Q, A0 the first r rows of R in W = Q R.

The saved file is a plain LoRA of rank 2r for the original base, since s B A + R = W + s (B A - B0 A0):
A' = [A; A0], B' = [B, -B0]. Training resumes from the same file: it contains A and B, and the A0 and B0 that define R.

The factors are computed in float64 and rounded to 8 bits, and R absorbs the rounding error. So every machine gets the
same factors, in whatever order it adds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch

from trainer.adapters.lora import Lora
from trainer.adapters.peft_method import ADAPTER_NAME, seeded
from trainer.errors import InputError

if TYPE_CHECKING:
    from trainer.adapters.base import Read, ShapeOf

LARGEST_FULL_SVD = 1024
POWER_ITERATIONS = 16
"""Iterations of the randomised SVD (Halko et al. 2009, arXiv:0909.4061); PiSSA reports no difference to the full SVD
with 16."""
OVERSAMPLING = 16


class Residual(Lora):
    reads_base = True
    adapts_experts = False

    @abstractmethod
    def factors(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns A of shape [r, in] and B of shape [out, r] for a float64 ``weight`` of shape [out, in]. B A is the
        part of the weight that will be trained."""

    def initialise(self, model: Any, plain: Callable[[], torch.nn.Module] | None) -> None:
        self._plain = plain
        self._first: dict[str, torch.Tensor] = {}
        if any(p.is_meta for p in model.parameters()):
            return  # a plan needs shapes only; a run never shards the load of these methods' base
        originals = model
        if self.recipe.model.quantization != "none":
            # Factors of the quantised weights would keep the quantisation error that the method exists to reduce.
            assert self._plain is not None, "a quantised base needs its unquantised weights"
            originals = self._plain()
        with torch.no_grad(), seeded(self.recipe.seed):
            for name, layer in lora_layers(model):
                weight = original_weight(originals, name).to(layer.weight.device)
                a, b = self._rounded_factors(name, weight, layer.scaling[ADAPTER_NAME])
                for part, value in (("lora_A", a), ("lora_B", b)):
                    linear = getattr(layer, part)[ADAPTER_NAME]
                    linear.weight.data = value.to(linear.weight.device, torch.float32).contiguous()
                    self._first[f"{name}.{part}.{ADAPTER_NAME}.weight"] = linear.weight.detach().cpu().clone()
                put_weight(layer.get_base_layer(), weight - layer.scaling[ADAPTER_NAME] * (b @ a))

    def _rounded_factors(self, name: str, weight: torch.Tensor, scaling: float) -> tuple[torch.Tensor, torch.Tensor]:
        rank = self.recipe.adapter.rank
        assert rank is not None
        if rank > min(weight.shape):
            raise InputError(f"adapter.rank {rank} is too large for {name} of shape {list(weight.shape)}; lower it")
        a, b = self.factors(weight / scaling, rank)
        return a.to(torch.bfloat16).double(), b.to(torch.bfloat16).double()

    def peft_state_dict(self, model: torch.nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors = super().peft_state_dict(model, weights)
        for name, first in self._first.items():
            trained = weights[name]
            tensors[self._names[name]] = torch.cat([trained, -first], 1) if _is_b(name) else torch.cat([trained, first])
        return tensors

    def saved_shapes(self, model: torch.nn.Module, shape_of: ShapeOf) -> dict[str, tuple[int, ...]]:
        shapes = super().saved_shapes(model, shape_of)
        for name, (rows, columns) in ((n, t.shape) for n, t in self._first.items()):
            shapes[self._names[name]] = (rows, 2 * columns) if _is_b(name) else (2 * rows, columns)
        return shapes

    def saved_config(self, model: Any) -> Any:
        config = super().saved_config(model)
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        return config

    def read_parameter(self, model: torch.nn.Module, name: str, read: Read) -> torch.Tensor:
        saved = super().read_parameter(model, name, read)
        return self._halves(name, saved)[0] if name in self._first else saved

    def _halves(self, name: str, saved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Splits a saved tensor of rank 2r into the trained factor and the initial one."""
        trained, first = saved.chunk(2, dim=1 if _is_b(name) else 0)
        return trained.contiguous(), (-first if _is_b(name) else first).contiguous()

    def after_restore(self, model: torch.nn.Module, read: Read) -> None:
        super().after_restore(model, read)
        stored = {n: self._halves(n, read(self._names[n]))[1] for n in self._first}
        if any(not torch.equal(stored[n], mine) for n, mine in self._first.items()):
            self._rebuild(model, stored)

    def _rebuild(self, model: Any, stored: dict[str, torch.Tensor]) -> None:
        """Recomputes the frozen residual from the stored initial factors. Raises InputError for a sharded model."""
        if self._plain is None or any(hasattr(p, "placements") or hasattr(p, "ds_tensor") for p in model.parameters()):
            raise InputError(
                f"adapter.method {self.recipe.adapter.label}: this machine computes other initial factors than the "
                "machine on which the run began, and sharded weights cannot be recomputed; resume with "
                "strategy.kind=ddp, or on the same kind of machine"
            )
        plain = self._plain()
        for name, layer in lora_layers(model):
            a, b = (stored[f"{name}.{part}.{ADAPTER_NAME}.weight"].double() for part in ("lora_A", "lora_B"))
            put_weight(layer.get_base_layer(), original_weight(plain, name) - layer.scaling[ADAPTER_NAME] * (b @ a))
        self._first = stored

    def starts_at_zero(self, saved_name: str) -> bool:
        return False


class Pissa(Residual):
    def factors(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        if min(weight.shape) <= LARGEST_FULL_SVD:
            u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        else:
            u, s, v = torch.svd_lowrank(weight, rank + OVERSAMPLING, POWER_ITERATIONS)
            vh = v.T
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
        # The sign of a singular vector is arbitrary: its largest entry is made positive.
        sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
        root = s.sqrt()
        return (root[:, None] * vh) * sign.T, (u * root) * sign


class Olora(Residual):
    def factors(self, weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        q, r = torch.linalg.qr(weight[:, :rank])
        q = q * torch.where(r.diagonal() < 0, -1.0, 1.0)
        return q.T @ weight, q


def lora_layers(model: torch.nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.lora import LoraLayer

    yield from ((n, m) for n, m in model.named_modules() if isinstance(m, LoraLayer))


def original_weight(model: torch.nn.Module, name: str) -> torch.Tensor:
    """Returns the base weight of the layer ``name`` of the adapted model, as [out, in] in float64. ``model`` is the
    adapted model or its plain base."""
    plain = name.removeprefix("base_model.model.")
    layer: Any = model.get_submodule(name if hasattr(model, "peft_config") else plain)
    layer = getattr(layer, "base_layer", layer)
    weight: torch.Tensor = layer.weight.detach().double()
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def put_weight(layer: Any, weight: torch.Tensor) -> None:
    """Sets the weight of a layer from a float64 ``weight`` [out, in], in the layer's dtype; a packed (4-bit) weight is
    packed again."""
    old = layer.weight
    if hasattr(old, "quant_type"):
        layer.weight = type(old)(
            weight.to(layer.quant_state.dtype).contiguous().to(old.device),
            requires_grad=False,
            quant_type=old.quant_type,
            blocksize=old.blocksize,
            compress_statistics=old.compress_statistics,
            quant_storage=old.quant_storage,
            module=layer,
        ).to(old.device)
        layer.quant_state = layer.weight.quant_state
        return
    layer.weight.data = (weight.T if type(layer).__name__ == "Conv1D" else weight).to(old).contiguous()


def _is_b(name: str) -> bool:
    return ".lora_B." in name
