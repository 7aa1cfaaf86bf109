"""The operators, one file each: schema, fake kernel, autograd, and the forward and backward over primitives."""
