"""Merging adapters into the base, and undoing that bit for bit.

PEFT unmerges by subtracting what it added: in bf16 each cycle rounds twice, and a quantized base is quantized anew, so
that the weights drift. Here the storage of before the merge is kept, and put back.
"""

from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor, nn

from lorafuse.errors import MissingDependency
from lorafuse.formats.codec import is_of

__all__ = ["ExactMerge", "merge_exact"]


class _Kept(NamedTuple):
    """A parameter as it was: the object, its data where PEFT's merge would write into it, and its attributes."""

    parameter: Tensor
    data: Tensor | None
    attributes: dict[str, Any]


class ExactMerge:
    """A merge that `undo` reverts bit for bit; the end of a `with` block undoes it too. See `merge_exact`."""

    def __init__(self, layers: list[Any]) -> None:
        self._layers = [(layer, dict(layer._caches)) for layer in layers]
        self._bases = list({id(base): base for base in (layer.get_base_layer() for layer in layers)}.values())
        reasons = [reason for base in self._bases for p in base._parameters.values() if (reason := _why_not(p))]
        if reasons:
            raise ValueError(f"merge_exact cannot undo a merge into a base parameter that {reasons[0]}")
        # by the identity of the parameter: two layers may be tied to one
        self._kept: dict[int, _Kept] = {}
        self._parameters = [(base, dict(base._parameters)) for base in self._bases]
        for _, parameters in self._parameters:
            for p in parameters.values():
                if p is not None and id(p) not in self._kept:
                    self._kept[id(p)] = _keep(p)
        # where bitsandbytes' int8 layers hold their weight after the first forward
        states = [base.state for base in self._bases if is_of(base, "bitsandbytes", "Linear8bitLt")]
        self._states = [(state, dict(vars(state))) for state in states]

    def __enter__(self) -> "ExactMerge":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def undo(self) -> None:
        """Put what there was before the merge back; a second call does nothing.

        Raises ValueError, changing nothing, for a model that was moved to another device since.
        """
        for base, parameters in self._parameters:
            for name, p in parameters.items():
                present = base._parameters.get(name)
                if p is not None and present is not None:
                    kept = self._kept[id(p)].data
                    device = p.device if kept is None else kept.device
                    if present.device != device:
                        raise ValueError(
                            f"the {name} of a merged {type(base).__name__} is on {present.device}, what was kept of it "
                            f"on {device}: move the model back before the merge is undone"
                        )
        for p, data, attributes in self._kept.values():
            if data is not None:
                p.data = data
            _replace(vars(p), attributes)
        for base, parameters in self._parameters:
            base._parameters.update(parameters)
            if is_of(base, "bitsandbytes", "Linear4bit"):
                base.quant_state = getattr(parameters["weight"], "quant_state", None) or base.quant_state
        for state, attributes in self._states:
            _replace(vars(state), attributes)
        for layer, caches in self._layers:
            layer.merged_adapters.clear()
            _replace(layer._caches, caches)
        self._layers, self._parameters, self._states = [], [], []
        self._kept.clear()


def _why_not(p: Tensor | None) -> str:
    """Why what a merge does to a parameter cannot be undone, or ""."""
    if p is None:
        return ""
    if p.device.type == "meta":
        return "is on the meta device: load or onload the model first"
    if type(p) in (nn.Parameter, Tensor) or is_of(p, "bitsandbytes", "Params4bit", "Int8Params"):
        return ""
    # PEFT makes a new parameter of these too
    if type(p).__module__.partition(".")[0] == "torchao":
        return ""
    return f"is a {type(p).__name__}: gather its shards first, or use PEFT's merge_adapter"


def _keep(p: Tensor) -> _Kept:
    data = None
    if type(p) in (nn.Parameter, Tensor):
        # PEFT adds in place: it writes into a copy, and what is kept stays where it is
        data, p.data = p.data, p.data.clone()
    return _Kept(p, data, dict(vars(p)))


def _replace(present: dict[str, Any], former: dict[str, Any]) -> None:
    present.clear()
    present.update(former)


def merge_exact(model: nn.Module, adapter_names: list[str] | None = None, *, safe_merge: bool = False) -> ExactMerge:
    """Merge adapters into the base as PEFT does, in a form that can be undone bit for bit, any number of times:

        with lorafuse.integrations.merge_exact(model):
            ...                 # generate, evaluate, hand the merged weights over

    or `merge = merge_exact(model)` and later `merge.undo()`. Undone, the base has its former parameters, at their
    former addresses. In between there are two copies of what is adapted: as it was, and merged.

    Args:
        model: a `PeftModel`, patched or not, over a dense or quantized base that PEFT merges into.
        adapter_names, safe_merge: as PEFT's `merge_adapter` takes them; None means the active adapters.

    Raises ValueError for a model without LoRA layers, with merged adapters, or with a base that is sharded or not
    loaded. What PEFT raises leaves the model as it was.
    """
    try:
        from peft.tuners.lora import LoraLayer
    except ImportError as error:
        raise MissingDependency("merge_exact merges PEFT's adapters: pip install 'peft>=0.21'") from error
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    if not layers or not hasattr(model, "merge_adapter"):
        raise ValueError(f"merge_exact got a {type(model).__name__}; it takes a PeftModel with LoRA layers")
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged:
        raise ValueError(f"merge_exact got a model with merged adapters ({', '.join(merged)}): unmerge them first")
    made = ExactMerge(layers)
    try:
        model.merge_adapter(adapter_names, safe_merge=safe_merge)  # type: ignore[operator]
    except BaseException:
        made.undo()
        raise
    return made
