"""Kernels in C for the CPU and in Triton for NVIDIA GPUs, compiled on the machine that runs them."""
