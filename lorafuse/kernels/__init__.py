"""The Triton kernels: the main loop in `matmul`, low-rank products in `lowrank`. Imported when a backend needs them."""
