"""Benchmarks: attention kernels (`dit-accel bench kernels`) and whole denoising steps.

A result is proven against an oracle before it is timed, and a wrong one gets no speed.
"""
