"""Attention that keeps packed samples apart, and fused kernels."""
