"""Backends whose kernels other libraries keep: FlashAttention 4, and torch's FlexAttention."""
