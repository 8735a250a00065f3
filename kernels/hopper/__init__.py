"""The Hopper backend, in Triton's Gluon: kernel, work lists, launch, self-test."""
