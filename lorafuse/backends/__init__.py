"""How operators run. `protocol` states the primitives, `base` is the registry, `problems` makes what is planned; `aten`,
`triton`, `cuda` and `emulator` are the backends, each one class.
"""
