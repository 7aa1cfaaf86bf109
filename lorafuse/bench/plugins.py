"""The baselines: one file each in `bench/baselines/`.

This process imports a baseline even when it runs in a process of its own, so it imports the package that it compares
with inside its functions. A file may define:

    LABEL       its name in tables, or one for each kind
    TRAINS      "adapters" (the default), "base" or "nothing": selects the reference and the counted work
    REQUIRES    top-level modules that must be importable. Without it the baseline is this project's own: a wrong result
                stops the run, while a peer's is reported and not counted
    ISOLATED    True: run it in a process of its own, because of its licence, imports or patches, or because it writes
                into its inputs, which all variants of a process share
    FORMS       {suffix: options}: several variants of one file; the options go to its functions ({"": {}}), but for
                "kernel", a candidate that plans take in the passes which have it; with "backend" or that, plans
                follow no measured table
    DTYPES      of bases that it can run on (all)
    unavailable(kind, device, **options) -> str   why it cannot run there, "" when it can
    linear(given, **options), quantized(given, **options), group(given, **options), mlp(given, **options),
    multi(given, **options), experts(given, **options)
                build it for the inputs of `lorafuse.bench.linear`, `quantized`, `group`, `multi` or `moe`: the call,
                and the trained tensors by the names of their gradients. A file without the function of a kind is no
                baseline of that kind; without `group` or `mlp`, its `linear` runs once per layer. A decoder layer runs
                all three.
    layer(call)
                a decoder layer's call as this baseline runs it, for what holds for more than its linear layers
    model(given, **options)
                the whole model of `lorafuse.bench.transformer.Given` in training mode, and what else is to be noted of
                it in results; {"autocast": True} runs its steps under autocast.
"""

import importlib.util
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from lorafuse.bench.problem import Problem, Variant

__all__ = ["Baseline", "folder", "load", "load_file"]

_FUNCTIONS = {
    "linear": ("linear",),
    "quantized": ("quantized",),
    "group": ("group", "linear"),
    "mlp": ("mlp", "linear"),
    "layer": ("group", "linear"),
    "multi": ("multi",),
    "moe": ("experts",),
    "model": ("model",),
}
# the order of tables: first the references, last this project's own
_FIRST, _LAST = ("frozen", "full", "frozen-lorafuse"), "lorafuse"


@dataclass(frozen=True)
class Baseline:
    """One variant of one file. `absent` is "" or why it cannot run here."""

    name: str
    label: str
    trains: str
    file: Path
    module: ModuleType = field(repr=False, compare=False)
    options: dict[str, Any] = field(default_factory=dict)
    isolated: bool = False
    peer: bool = False
    absent: str = ""

    def variant(self, problem: Problem, given: Any) -> Variant:
        """The variant that its file builds for the inputs of a problem."""
        options = {name: value for name, value in self.options.items() if name != "kernel"}
        kernel = self.options.get("kernel", "" if "backend" in options else None)
        return replace(problem.variant(self.name, self.module, given, **options), kernel=kernel)


def folder() -> Path:
    """The folder of baselines: `bench/baselines/` of a checkout, or the copy in an installed package.

    Raises FileNotFoundError when neither is there.
    """
    package = Path(__file__).parents[1]
    for place in (package.parent / "bench" / "baselines", package / "_baselines"):
        if (place / "frozen.py").is_file():
            return place
    raise FileNotFoundError(f"there are no baselines next to {package}: run from a checkout, or install lorafuse again")


def load(kind: str, device: torch.device, place: Path | None = None, dtype: str = "") -> list[Baseline]:
    """The baselines of a kind ("linear", "group", "layer", "model", ...), including those that cannot run
    here, or not on a base of that dtype.

    Raises ValueError for a folder without frozen.py, and for a file that does not load.
    """
    place = folder() if place is None else place
    if not (place / "frozen.py").is_file():
        raise ValueError(f"--baselines {place}: it holds no frozen.py, from which the others are measured")
    baselines = [one for file in place.glob("*.py") for one in load_file(file, kind, device, dtype)]
    return sorted(baselines, key=_rank)


def _rank(one: Baseline) -> tuple[int, str]:
    rank = next(
        (
            i
            for i, name in enumerate(_FIRST)
            if one.name in (name, *(f"{name}-{end}" for end in ("cuda", "group", "triton")))
        ),
        None,
    )
    return len(_FIRST) + one.name.startswith(_LAST) if rank is None else rank, one.name


@cache
def _module(file: Path, changed: int) -> ModuleType:
    """A file as a module, cached until it changes."""
    spec = importlib.util.spec_from_file_location(f"_lorafuse_baseline_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        # foreign code may raise anything
        raise ValueError(f"{file}: it cannot be loaded ({type(error).__name__}: {error})") from error
    return module


def load_file(file: Path, kind: str, device: torch.device, dtype: str = "") -> list[Baseline]:
    """The variants of one file for a kind; none when it has no function for it."""
    module = _module(file, file.stat().st_mtime_ns)
    if not any(hasattr(module, name) for name in _FUNCTIONS[kind]):
        return []
    requires = getattr(module, "REQUIRES", ())
    missing = [name for name in requires if importlib.util.find_spec(name) is None]
    label = module.LABEL if isinstance(module.LABEL, str) else module.LABEL[kind]
    dtypes = getattr(module, "DTYPES", (dtype,))
    baselines = []
    for suffix, options in getattr(module, "FORMS", {"": {}}).items():
        absent = f"{', '.join(missing)} not installed" if missing else ""
        if not absent and hasattr(module, "unavailable"):
            absent = module.unavailable(kind, device, **options)
        if not absent and dtype and dtype not in dtypes:
            absent = f"needs a base in {' or '.join(dtypes)}"
        baselines.append(
            Baseline(
                name=file.stem.replace("_", "-") + (f"-{suffix}" if suffix else ""),
                label=label + (f", {suffix}" if suffix else ""),
                trains=getattr(module, "TRAINS", "adapters"),
                file=file,
                module=module,
                options=options,
                isolated=getattr(module, "ISOLATED", False),
                peer=bool(requires),
                absent=absent,
            )
        )
    return baselines
