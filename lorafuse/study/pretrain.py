"""The base that the studies fine-tune: pretrained once on a mixture of tasks and kept in the user's cache directory."""

import ast
import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from lorafuse import env
from lorafuse.study import model as _model
from lorafuse.study import tasks
from lorafuse.study.model import Size, Transformer
from lorafuse.study.tasks import Data
from lorafuse.study.train import loss_of, single_thread

__all__ = ["STEPS", "base", "path", "shape_of_code"]

# enough for all facts by heart, and for most sums to be right
STEPS = {"facts": 1500, "arithmetic": 2500}
_BATCH, _RATE, _WARMUP = 64, 3e-3, 50


def path(kind: str, size: Size, steps: int, seed: int) -> Path:
    """The file of a base; its name holds what the base depends on, the code included."""
    code = [shape_of_code(Path(str(file))) for file in (_model.__file__, tasks.__file__, __file__)]
    what = json.dumps([kind, asdict(size), steps, seed, torch.__version__, code])
    return env.cache_dir() / "study" / f"{kind}-{hashlib.sha256(what.encode()).hexdigest()[:16]}.pt"


def shape_of_code(file: Path) -> str:
    """A source file without comments, docstrings and layout."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [line for line in body if not _is_text(line)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_text(line: ast.AST) -> bool:
    return isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant) and isinstance(line.value.value, str)


def base(kind: str, size: Size, steps: int, seed: int) -> Transformer:
    """The model, on the CPU; from the cache, or trained now (the same bits each time) and put there.

    Raises ValueError for a file of the cache that cannot be read.
    """
    file = path(kind, size, steps, seed)
    model = Transformer(size)
    if file.exists():
        try:
            model.load_state_dict(torch.load(file, weights_only=True))
            return model
        except Exception as error:
            # whatever torch raises for bytes that are not its own
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            raise ValueError(
                f"{file}: it is no base of a study ({reason}); delete it, and it is trained anew"
            ) from error
    with single_thread():
        model = _pretrain(kind, size, steps, seed)
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.{os.getpid()}")
    torch.save(model.state_dict(), unfinished)
    os.replace(unfinished, file)
    return model


def _pretrain(kind: str, size: Size, steps: int, seed: int) -> Transformer:
    torch.manual_seed(seed)
    model = Transformer(size)
    data = tasks.lessons(kind, _BATCH * steps, seed)
    adam = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: min(1, (step + 1) / _WARMUP) * (1 - step / steps))
    for tokens, labels in zip(data.tokens.split(_BATCH), data.labels.split(_BATCH), strict=True):
        adam.zero_grad()
        loss_of(model, Data(tokens, labels)).backward()
        adam.step()
        schedule.step()
    return model
