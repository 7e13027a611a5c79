"""Mixtures of experts: where a model keeps its experts, their packed form, and their products."""

from trainer.experts.compute import compute_by_expert, expert_layers
from trainer.experts.conversion import fused_names
from trainer.experts.find import ExpertWeight, expert_counts, expert_weights, experts_per_token, is_mixture, routers
from trainer.experts.packed import PackedExperts, pack_experts, packed_experts, unpacked_shapes

__all__ = [
    "ExpertWeight",
    "PackedExperts",
    "compute_by_expert",
    "expert_counts",
    "expert_layers",
    "expert_weights",
    "experts_per_token",
    "fused_names",
    "is_mixture",
    "pack_experts",
    "packed_experts",
    "routers",
    "unpacked_shapes",
]
