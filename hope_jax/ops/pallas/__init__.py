"""Kernels written in Pallas: refs in, refs out."""
