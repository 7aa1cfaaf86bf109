"""What `lorafuse study` is made of: one file for each finding, and what they share.

`tasks`, `model`, `pretrain` make data and base; `train` and `policy` one run; `runner` many; `verdict`, `finding`,
`plots` and `record` what comes of them.
"""

STUDIES = ("equivalence", "capacity", "batch", "layers", "rl", "rate", "rank")

__all__ = ["STUDIES"]
