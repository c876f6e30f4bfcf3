"""Lamina: the parts of the milestone attention papers. Layers, blocks and models on fused kernels."""

__version__ = "0.1.0"
