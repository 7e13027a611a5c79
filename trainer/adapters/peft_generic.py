"""``method: {peft: MISS, r: 8}``: any other method of the installed peft, by peft's name and with peft's fields.

muster does not check what such a method computes. It accepts a method if its trained parameters are saved one by one,
so that a run can resume from them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer.adapters.peft_method import PeftMethod
from trainer.errors import InputError
from trainer.registry import choose_hint

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

NOT_TAKEN = {
    "PREFIX_TUNING": "write method: prefix",
    "PROMPT_TUNING": "write method: prompt",
    "P_TUNING": "write method: p_tuning",
    "ADALORA": "write method: adalora, whose budget follows the training",
    "CARTRIDGE": "it counts the positions of a row itself",
    "CPT": "it has a loss of its own",
    "MULTITASK_PROMPT_TUNING": "it takes the number of a task with every row",
    "POLY": "it takes the number of a task with every row",
    "SHADOW": "it has a loss of its own",
    "XLORA": "it mixes adapters that were trained before",
}
CODE = ("megatron_config", "megatron_core")
"""Fields that name a module to import."""
OURS = ("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "inference_mode")
"""Fields that are set from the rest of the recipe."""
PLAIN_STARTS = (True, False, "gaussian", "orthogonal")
"""Values of ``init_lora_weights`` that do not change the base model."""


class ByName(PeftMethod):
    reads_base = True  # unknown, so the safe value

    @property
    def peft_type(self) -> str:  # type: ignore[override]
        return str(self._given()["peft"])

    def _given(self) -> dict[str, Any]:
        method = self.recipe.adapter.method
        assert isinstance(method, dict)
        return method

    def config_class(self) -> type[PeftConfig]:
        """Raises InputError for a name that peft does not have, or that muster does not support."""
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

        known = {t.value: c for t, c in PEFT_TYPE_TO_CONFIG_MAPPING.items() if t.value not in NOT_TAKEN}
        if self.peft_type in NOT_TAKEN:
            raise InputError(f"adapter.method: {self.peft_type} is not taken by name: {NOT_TAKEN[self.peft_type]}")
        if self.peft_type not in known:
            hint = choose_hint(self.peft_type.upper(), tuple(known))
            raise InputError(f"adapter.method: peft has no {self.peft_type!r}, but {', '.join(known)}{hint}")
        return known[self.peft_type]

    def settings(self, base: torch.nn.Module) -> dict[str, Any]:
        """Raises InputError for a field that the method does not have."""
        given = {k: v for k, v in self._given().items() if k not in ("peft", "target_modules")}
        fields = tuple(f for f in self._fields() if f not in (*OURS, *CODE, "revision"))
        for name in self._given().keys() - {"peft"}:
            if name not in fields:
                hint = choose_hint(name, fields)
                have = ", ".join(fields)
                raise InputError(f"adapter.method: {self.peft_type} has no field {name!r}, but {have}{hint}")
        start = given.get("init_lora_weights", True)
        if start not in PLAIN_STARTS:
            raise InputError(
                f"adapter.method: init_lora_weights {start!r} changes the base; write method: pissa or olora"
            )
        return given

    def targets(self, base: torch.nn.Module) -> Any:
        # The method's own field is passed unchanged: it may name modules that are not linear layers.
        return self._given().get("target_modules") or super().targets(base)
