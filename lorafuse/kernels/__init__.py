"""The Triton kernels: `matmul` is the main loop, `lowrank` everything with R columns. Imported when a backend needs them."""
