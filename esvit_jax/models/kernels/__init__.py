"""Kernels written by hand, for what a compiler does badly."""
