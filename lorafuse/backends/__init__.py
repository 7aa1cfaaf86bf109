"""The ways to run an operator. `base` is the registry; each other file is one backend."""
