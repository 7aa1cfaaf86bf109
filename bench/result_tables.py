"""Tables in Markdown, every number from the content of a result file or from the planner's model."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from lorafuse.bench.result import with_adapters
from lorafuse.plan import Problem, cost, find, select

# labels of files before version 2, which have none
LABELS = {
    "frozen": "frozen",
    "full": "full fine-tuning",
    "peft": "PEFT as shipped",
    "peft-half": "PEFT, bf16 adapters",
    "addmm": "GEMM + `addmm_`",
    "split": "split grouped GEMM",
    "lorafuse": "lorafuse",
}
_GRADIENTS = ("dx", "da", "db")
_SIZES = ("M", "E", "k", "H", "I", "N", "K", "R", "routing", "dtype")
_CONDITIONS = ("device", "threads", "cuda", "power limit", "torch", "peft", "date", "commit")
# the model's GPU; its rows, by the variants that measure them
_GPU = "H200"
_MEASURED_AS = {
    "frozen": "frozen",
    "lorafuse, eager": "lorafuse-eager",
    "lorafuse, Triton": "lorafuse-triton",
    "lorafuse, CUDA": "lorafuse",
}
_KERNELS = {
    "lorafuse, eager": ("aten_beta1", "aten_beta1"),
    "lorafuse, Triton": ("two_kernel", "one_pass_backward"),
    "lorafuse, CUDA": ("cuda two_kernel", "cuda one_pass_backward"),
}
_EXPERTS_KERNELS = {"lorafuse, eager": ("grouped_mm", "grouped_mm"), "lorafuse, Triton": ("ragged", "ragged")}
_EXPERTS_AS = {"frozen": "frozen", "lorafuse, Triton": "lorafuse"}

Content = dict[str, Any]
Result = dict[str, Any]


def conditions(content: Content) -> str:
    """The conditions that a reader needs with a number, in one line."""
    found = content["conditions"]
    bare, after = ("device", "date"), ("threads",)
    parts = []
    for name in _CONDITIONS:
        if name in found:
            value = found[name]
            parts.append(value if name in bare else f"{value} {name}" if name in after else f"{name} {value}")
    return ", ".join(parts)


def all_conditions(content: Content, file: str) -> str:
    """The file and every condition in it, in one paragraph."""
    found = content["conditions"]
    return f"`{file}`: " + ", ".join(v if k == "device" else f"{k} {v}" for k, v in found.items()) + "."


def rounds(results: list[Result]) -> str:
    """The number of rounds, or the least and the most of them; whole models count them by variant."""
    numbers = sorted(
        {r["rounds"] for result in results for r in (result, *result["variants"].values()) if "rounds" in r}
    )
    return str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def common(results: list[Result]) -> str:
    """The sizes that all results share: "M 1024, R 16, bfloat16"."""
    shared = [name for name in _SIZES if len({str(result.get(name)) for result in results}) == 1 and name in results[0]]
    return ", ".join(_size(results[0], name) for name in shared)


def _own(result: Result, results: list[Result]) -> str:
    """The case and the sizes in which results differ."""
    differing = [name for name in _SIZES if name in result and len({str(r.get(name)) for r in results}) > 1]
    return ", ".join([result["case"], *(_size(result, name) for name in differing)])


def _size(result: Result, name: str) -> str:
    value = result[name]
    value = " + ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return str(value) if name in ("dtype", "routing") else f"{name} {value}"


def table(head: list[str], rows: list[list[str]], left: int = 1) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * left + "---:|" * (len(head) - left)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def layers(content: Content, cases: tuple[str, ...] = ()) -> str:
    """LoRA tax of the named cases, or of all, a column for each variant with adapters."""
    results = [result for result in content["results"] if not cases or result["case"] in cases]
    names = _variants(results, _with("tax"))
    rows = [
        [_own(result, results), *(_cell(result, name, lambda one, _: f"{one['tax']:.0%}") for name in names)]
        for result in results
    ]
    return table(["layer", *(_label(results, name) for name in names)], rows)


def experts(content: Content) -> str:
    """Time, and LoRA tax over the frozen block, of each result."""
    results = content["results"]
    names = _variants(results, lambda result: [name for name in result["variants"] if name != "frozen"])

    def cell(one: dict[str, Any], result: Result) -> str:
        ms = _ms(one["total"]["median"])
        return f"{ms}, {one['tax']:.0%}" if one.get("trains", "adapters") == "adapters" else ms

    rows = []
    for result in results:
        frozen = _ms(result["variants"]["frozen"]["total"]["median"])
        cells = [
            _cell(result, name, cell if name != "full" else lambda one, _: _ms(one["total"]["median"]))
            for name in names
        ]
        rows.append([f"{_own(result, results)} (frozen {frozen})", *cells])
    return table(["experts", *(_label(results, name) for name in names)], rows)


def training_steps(content: Content) -> str:
    """A table of every variant of training each model; with LoRA tax where the frozen model was measured."""
    columns: dict[str, Callable[[dict[str, Any], Result], str]] = {
        "step": lambda one, _: f"{one['step']['median'] * 1e3:.0f} ms",
        "LoRA tax": lambda one, _: f"{one['tax']:.0%}" if "tax" in one else "",
        "tokens/s": lambda one, _: f"{one['tokens_per_s']:,.0f}",
        "time / full fine-tuning": lambda one, _: f"{one['ratio_to_full']:.2f}" if "ratio_to_full" in one else "",
        "faster than PEFT": _faster_than_peft,
        "MFU": lambda one, _: f"{one['mfu']:.0%}",
        "peak memory": lambda one, _: f"{one['peak_bytes'] / 2**30:.1f} GiB",
    }
    results = content["results"]
    if not any(with_adapters(result, "tax") for result in results):
        del columns["LoRA tax"]
    rows = []
    for result in results:
        rows.append([f"*{_model(result)}*", *[""] * len(columns)])
        for name, one in result["variants"].items():
            rows.append([LABELS[name], *(cell(one, result) for cell in columns.values())])
    return table(["", *columns], rows)


def _faster_than_peft(one: dict[str, Any], result: Result) -> str:
    peft = result["variants"].get("peft")
    if peft is None or one in (result["variants"].get("full"), result["variants"].get("frozen")):
        return ""
    return f"{peft['step']['median'] / one['step']['median']:.2f}×"


def _model(result: Result) -> str:
    layers = f"{result['layers']} of {result['layers_of_model']} layers"
    return f"{result['model']}, {layers}, {result['accumulate']} × {result['batch']} × {result['tokens']} tokens"


def kernel_steps(content: Content, file: str) -> str:
    """The results of bench/hopper.py: a column for each shape, time and share of cuBLAS's rate."""
    results = content["results"]
    names = dict.fromkeys(name for result in results for name in result["calls"])
    rows = [
        [name, *(f"{r['calls'][name]['median'] * 1e6:.0f} µs, {r['calls'][name]['of_cublas']:.2f}" for r in results)]
        for name in names
    ]
    head = ["time, rate / cuBLAS", *(f"M {r['M']}, N {r['N']}, K {r['K']}, R {r['R']}" for r in results)]
    medians = f"Medians of {results[0]['rounds']} rounds, bfloat16."
    return "\n\n".join([all_conditions(content, file), medians, table(head, rows)])


def everything(content: Content, file: str) -> str:
    """A file's conditions and a table for each kind of figure; below it what failed or was absent."""
    results = content["results"]
    parts = [all_conditions(content, file)]
    has_rounds = [result for result in results if "rounds" in result]
    sizes = f"{common(results)}; " if common(results) else ""
    if has_rounds:
        parts.append(f"{sizes}medians of {rounds(has_rounds)} rounds, 20th to 80th percentile in brackets.")
    for head, named, cell in _FIGURES:
        names = _variants(results, named)
        if not names:
            continue
        floors = {"LoRA tax": "tax", "time / full fine-tuning": "ratio_to_full"}.get(head)
        shown = "{:.1%}" if floors == "tax" else "{:.2f}"
        with_floor = floors is not None and any("floors" in result for result in results)
        rows = []
        for result in results:
            least = [shown.format(result["floors"][floors]) if "floors" in result else ""] if with_floor else []
            rows.append([_own(result, results), *least, *(_cell(result, name, cell) for name in names)])
        columns = [head, *(["floor"] if with_floor else []), *(_label(results, name) for name in names)]
        parts.append(table(columns, rows))
    notes = dict.fromkeys(
        f"{name}: {reason}"
        for result in results
        for kind in ("failed", "absent")
        for name, reason in result.get(kind, {}).items()
    )
    notes |= dict.fromkeys(f"{name}: {reason}" for name, reason in content.get("not_run", {}).items())
    if notes:
        parts.append("Not measured: " + "; ".join(notes) + ".")
    return "\n\n".join(parts)


def _with(figure: str) -> Callable[[Result], list[str]]:
    return lambda result: with_adapters(result, figure)


def _having(*figures: str) -> Callable[[Result], list[str]]:
    """The variants, adapters or not, that have all of those figures."""
    return lambda result: [name for name, one in result["variants"].items() if one.keys() >= set(figures)]


def _spread(one: dict[str, Any], _: Result) -> str:
    if "tax_p20" not in one:
        return f"{one['tax']:.0%}"
    return f"{one['tax']:.0%} ({one['tax_p20'] * 100:.0f} to {one['tax_p80'] * 100:.0f})"


def _time(taken: dict[str, float]) -> str:
    low, high = (_ms(taken[end], taken["median"]).removesuffix(" ms") for end in ("p20", "p80"))
    return f"{_ms(taken['median'])} ({low} to {high})"


def _over_frozen(key: str) -> Callable[[dict[str, Any], Result], str]:
    def cell(one: dict[str, Any], result: Result) -> str:
        frozen = result["variants"]["frozen"]
        if one is frozen:
            return f"{one[key] / 2**20:.1f}"
        return f"{(one[key] - frozen[key]) / 2**20:+.1f}"

    return cell


# head of the first column, the variants that have the figure, a cell's text; whole models have steps
_FIGURES: tuple[tuple[str, Callable[[Result], list[str]], Callable[[dict[str, Any], Result], str]], ...] = (
    ("LoRA tax", _with("tax"), _spread),
    ("time / full fine-tuning", _with("ratio_to_full"), lambda one, _: f"{one['ratio_to_full']:.2f}"),
    ("time", _having("total"), lambda one, _: _time(one["total"])),
    ("time of a step", _having("step"), lambda one, _: _time(one["step"])),
    ("TFLOP/s, of the measured peak", _having("of_peak"),
     lambda one, _: f"{one['flops_per_s'] / 1e12:.3g}, {one['of_peak']:.0%}"),
    ("peak MiB", _having("peak_bytes", "step"), lambda one, _: f"{one['peak_bytes'] / 2**20:.0f}"),
    ("peak MiB, over frozen", lambda result: _over_frozen_of(result, "peak_bytes"), _over_frozen("peak_bytes")),
    ("MiB between forward and backward, over frozen", lambda result: _over_frozen_of(result, "between_bytes"),
     _over_frozen("between_bytes")),
)  # fmt: skip


def _over_frozen_of(result: Result, figure: str) -> list[str]:
    if "frozen" not in result["variants"]:
        return []
    return [name for name in _having(figure)(result) if "step" not in result["variants"][name]]


def _variants(results: list[Result], named: Callable[[Result], list[str]]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in named(result)))


def _cell(result: Result, name: str, cell: Callable[[dict[str, Any], Result], str]) -> str:
    return cell(result["variants"][name], result) if name in result["variants"] else "not run"


def _label(results: list[Result], name: str) -> str:
    labels = (result["variants"][name].get("label") for result in results if name in result["variants"])
    return next(labels) or LABELS.get(name, name)


def _ms(seconds: float, like: float = 0.0) -> str:
    """Milliseconds with three significant digits of `like`, or of the value itself."""
    size = like or seconds
    digits = 2 if size < 0.01 else 1 if size < 0.1 else 0
    return f"{seconds * 1e3:.{digits}f} ms"


def demo(full: Content, half: Content) -> str:
    """The results of `make demo` in fp32 and bf16, in one sentence."""
    found, figures = half["conditions"], half["figures"]
    both = [figures[name] for name in ("PEFT as shipped", "patched by lorafuse")]
    steps = " → ".join(f"{one['step_seconds_median'] * 1e3:.0f}" for one in both)
    peaks = " → ".join(f"{one['peak_bytes_of_a_step'] / 2**20:.0f}" for one in both)
    return (
        f"`make demo`: {found['model']} fine-tuned, r {found['rank']} on all linear layers, {found['batch_size']} × "
        f"{found['seq_len']} tokens a step, PEFT as shipped → patched: **bf16 step {steps} ms "
        f"({figures['speedup']:.2f}×), peak memory {peaks} MiB**; fp32 step {full['figures']['speedup']:.2f}×, loss "
        f"curves equal within {full['figures']['largest_loss_difference']:.0e}; {conditions(half)}"
    )


def demo_steps(content: Content) -> str:
    """A row for each run of the demo: median step, tokens a second, peak memory, last loss."""
    rows = [
        [
            name,
            _ms(one["step_seconds_median"]),
            f"{one['tokens_per_second']:.0f}",
            f"{one['peak_bytes_of_a_step'] / 2**20:.0f}",
            f"{one['final_loss']:.4f}",
        ]
        for name, one in content["figures"].items()
        if isinstance(one, dict)
    ]
    return table(["", "median step", "tokens/s", "peak MiB of a step", "last loss"], rows)


def layers_model(contents: list[Content], absent: str) -> str:
    """What the model says of one layer on an H200, and what was measured of it on one, or `absent`."""
    forward = Problem(8192, 4096, 4096, 16, "bfloat16", "float32")
    rows = _modelled([(forward,), (replace(forward, gradients=_GRADIENTS),)], _KERNELS)
    wanted = {"M": forward.M, "N": forward.N, "K": forward.K, "R": forward.R, "dtype": forward.dtype}
    return _beside(rows, _measured(contents, "linear", wanted, _MEASURED_AS), absent)


def experts_model(contents: list[Content], absent: str) -> str:
    """What the model says of one block's experts on an H200, and what was measured of it on one, or `absent`."""
    T, E, k, H, I, R = 8192, 128, 8, 2048, 768, 16  # noqa: E741
    up = Problem(T * k, 2 * I, H, R, "bfloat16", "float32", groups=E, is_ragged=True, choices=k)
    down = replace(up, N=H, K=I)
    forward = replace(up, epilogue="gated"), down
    backward = replace(up, gradients=_GRADIENTS), replace(down, gradients=_GRADIENTS, epilogue="gated")
    rows = _modelled([forward, backward], _EXPERTS_KERNELS)
    wanted = {"M": T, "E": E, "k": k, "H": H, "I": I, "R": R, "routing": "balanced"}
    return _beside(rows, _measured(contents, "moe", wanted, _EXPERTS_AS), absent)


def _modelled(operators: list[tuple[Problem, ...]], named: dict[str, tuple[str, str]]) -> dict[str, list[float]]:
    """Modelled seconds of forward and backward: of the frozen operator, and of candidates by their kernels' names."""
    device = find(_GPU)
    plans = [select(problems, device, (("eager", ""), ("triton", ""), ("cuda", ""))) for problems in operators]
    seconds = [{one.name: one.seconds for one in plan.candidates} for plan in plans]
    rows = {"frozen": [cost.frozen(problems, device).seconds for problems in operators]}
    return rows | {name: [of[k] for of, k in zip(seconds, kernels, strict=True)] for name, kernels in named.items()}


def _measured(
    contents: list[Content], kind: str, wanted: dict[str, Any], named: dict[str, str]
) -> dict[str, tuple[float, float]]:
    """Seconds of forward and backward by the model's names, the first that was measured on the model's GPU."""
    found: dict[str, tuple[float, float]] = {}
    for content in contents:
        if _GPU in content["conditions"]["device"] and content["kind"] == kind:
            for result in content["results"]:
                if all(result[key] == value for key, value in wanted.items()):
                    for name, variant in named.items():
                        if (one := result["variants"].get(variant)) is not None:
                            found.setdefault(name, (one["forward"]["median"], one["backward"]["median"]))
    return found


def _beside(rows: dict[str, list[float]], measured: dict[str, tuple[float, float]], absent: str) -> str:
    """The model's seconds and LoRA tax, and the measured ones beside them."""

    def tax(own: float, base: float) -> str:
        return f"{own / base - 1:.1%}".replace("%", " %")

    base, measured_base = sum(rows["frozen"]), sum(measured.get("frozen", (0.0,)))
    head = ["way", "forward", "backward", "tax", "forward, measured", "backward, measured", "tax, measured"]
    lines = []
    for name, times in rows.items():
        cells = [*(f"{1e6 * t:.0f}" for t in times), tax(sum(times), base)]
        if name in measured and measured_base:
            cells += [*(f"{1e6 * t:.0f}" for t in measured[name]), tax(sum(measured[name]), measured_base)]
        else:
            cells += [absent] * 3
        lines.append([name, *cells])
    return table(head, lines)
