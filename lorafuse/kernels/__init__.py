"""Triton kernels, one file per direction of an operator. Nothing here is imported before a backend needs it."""
