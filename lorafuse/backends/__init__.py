"""How operators run: `aten`, `triton`, `cuda` and `emulator` are the backends, one class each.

`protocol` states their primitives, `base` is the registry, `problems` makes what is planned.
"""
