"""Kernels in Triton: paged attention and mixture of experts. Imported on demand, as Triton is not everywhere."""
