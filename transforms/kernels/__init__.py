"""Triton kernels for NVIDIA GPUs; a CUDA tensor is the first to import them."""
