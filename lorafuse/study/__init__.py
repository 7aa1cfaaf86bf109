"""What `lorafuse study` is made of: one file for each finding, and what they share.

`tasks`, `model`, `pretrain` make data and base of the small models, `language` those of SmolLM2-135M; `train` and
`policy` one run; `runner` many; `student` and `verdict` test; `finding`, `plots`, `record` and `page` show and keep.
"""

STUDIES = ("equivalence", "capacity", "batch", "layers", "rl", "rate", "rank")

__all__ = ["STUDIES"]
