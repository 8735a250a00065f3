"""The portable Triton kernels: the forward pass, and the passes around it."""
