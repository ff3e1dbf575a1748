"""Precision, memory format, micro-batches and workarounds for slow CPU kernels."""
