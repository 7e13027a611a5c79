"""Muon for matrices, AdamW for everything else, as one optimizer.

Muon (https://kellerjordan.github.io/posts/muon/) replaces the momentum of a matrix by an orthogonal matrix close to it.
The rate is multiplied by 0.2 sqrt(max(rows, columns)), so that an update is as large as one of AdamW, and both take the
same learning rate and weight decay (arXiv:2502.16982).
"""

from __future__ import annotations

from typing import Any

import torch


class MuonWithAdamW(torch.optim.Optimizer):
    """``groups``: parameter groups; Muon updates those with ``matrices: True``."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        nesterov: bool = True,
        ns_steps: int = 5,
        adjust_lr_fn: str = "match_rms_adamw",
    ) -> None:
        super().__init__(groups, {"lr": lr})
        for_muon: dict[str, Any] = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        matrices = [group for group in self.param_groups if group.get("matrices")]
        others = [group for group in self.param_groups if not group.get("matrices")]
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, lr=lr, **for_muon))
        if others:
            self.parts.append(torch.optim.AdamW(others, lr=lr, betas=betas, eps=eps))
        for part in self.parts:  # the groups are shared too: torch keeps the dictionaries that it is given
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.parts:
            part.step()
