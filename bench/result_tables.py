"""Tables in Markdown, every number from the content of a result file."""

from collections.abc import Callable
from typing import Any

from lorafuse.bench.figures import LEAST_ROUNDS, interval, is_noise
from lorafuse.bench.result import with_adapters
from lorafuse.plan import DEVICES

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
# of files before version 3, where a row did not say which projection of a peer it was
_PROJECTIONS = {"unsloth": "Unsloth, o_proj's LoRA_W", "axolotl": "Axolotl, o_proj's apply_lora_o"}
_SIZES = ("M", "E", "k", "H", "I", "N", "K", "R", "routing", "dtype")
_CONDITIONS = ("device", "threads", "cuda", "power limit", "torch", "peft", "date", "commit")
Content = dict[str, Any]
Result = dict[str, Any]


def published(content: Content) -> Content:
    """What of a file may be published, with what is added to it: the share of the data sheet's FLOP/s.

    Figures of fewer than ten rounds are left out and named as such.
    """
    sheet = next((d.bf16_flops for d in DEVICES.values() if d.model in content["conditions"]["device"].split()), None)
    kept, dropped = [], {}
    for result in content.get("results", []):
        variants = result.get("variants", {})
        few = {
            n: c for n, one in variants.items() if (c := one.get("rounds", result.get("rounds"))) and c < LEAST_ROUNDS
        }
        result = result | {"kind": result.get("kind", content.get("kind"))}
        reasons = {
            name: f"{count} rounds, fewer than the {LEAST_ROUNDS} of published numbers" for name, count in few.items()
        }
        if few and few.keys() == variants.keys():
            dropped[_own(result, content["results"])] = next(iter(reasons.values()))
            continue
        result["variants"] = {name: dict(one) for name, one in variants.items() if name not in few}
        if few:
            result["failed"] = result.get("failed", {}) | reasons
        for name, one in result["variants"].items():
            if sheet is not None and result["dtype"] == "bfloat16" and "flops_per_s" in one:
                one["of_sheet"] = one["flops_per_s"] / sheet
            if result["kind"] == "linear" and one.get("label") in ("Unsloth", "Axolotl"):
                one["label"] = _PROJECTIONS[name]
        kept.append(result)
    return content | (
        {"results": kept, "not_run": content.get("not_run", {}) | dropped} if "results" in content else {}
    )


def has_own_floor(result: Result | None) -> bool:
    """Whether a tax is over the fastest frozen, our own products among them."""
    return result is not None and any(name.startswith("frozen-lorafuse") for name in result["variants"])


def label_of(result: Result, name: str) -> str:
    """How tables name a variant of a result."""
    return result["variants"][name].get("label") or LABELS.get(name, name)


def conditions(content: Content) -> str:
    """The conditions that a reader needs with a number, in one line."""
    setting = content["conditions"]
    bare, after = ("device", "date"), ("threads",)
    parts = []
    for name in _CONDITIONS:
        if name in setting:
            value = setting[name]
            parts.append(value if name in bare else f"{value} {name}" if name in after else f"{name} {value}")
    return ", ".join(parts)


def all_conditions(content: Content, file: str) -> str:
    """The file and every condition in it, in one paragraph."""
    setting = content["conditions"]
    return f"`{file}`: " + ", ".join(v if k == "device" else f"{k} {v}" for k, v in setting.items()) + "."


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


def experts(content: Content) -> str:
    """Time of each result, and how many times lorafuse's that is."""
    results = content["results"]
    names = _variants(results, lambda result: list(result["variants"]))

    def cell(one: dict[str, Any], result: Result) -> str:
        own, ours = one["total"]["median"], result["variants"]["lorafuse"]["total"]["median"]
        return milliseconds(own) + ("" if own == ours else f", {own / ours:.2f}×")

    rows = [[_own(result, results), *(_cell(result, name, cell) for name in names)] for result in results]
    return table(["experts", *(_label(results, name) for name in names)], rows)


def training_steps(content: Content) -> str:
    """A table of every variant of training each model; with LoRA tax where the frozen model was measured."""
    columns: dict[str, Callable[[dict[str, Any], Result], str]] = {
        "step": lambda one, _: f"{one['step']['median'] * 1e3:.0f} ms",
        "LoRA tax": lambda one, _: tax_text(one) if "tax" in one else "",
        "tokens/s": lambda one, _: f"{one['tokens_per_s']:,.0f}",
        "time / full fine-tuning": lambda one, _: f"{one['ratio_to_full']:.2f}" if "ratio_to_full" in one else "",
        "time / lorafuse": _over_ours,
        "MFU of the measured peak, of the data sheet": _utilization,
        "peak memory": lambda one, _: f"{one['peak_bytes'] / 2**30:.1f} GiB",
    }
    results = content["results"]
    if not any(with_adapters(result, "tax") for result in results):
        del columns["LoRA tax"]
    rows = []
    for result in results:
        rows.append([f"*{_model(result)}*", *[""] * len(columns)])
        for name, one in result["variants"].items():
            rows.append([label_of(result, name), *(cell(one, result) for cell in columns.values())])
    return table(["", *columns], rows)


def evidence(content: Content) -> str:
    """What the losses of a file's models say: curves of real weights on real data, or a check on random ones."""
    curves = [(result, result.get("curves", {}).get("lorafuse", {})) for result in content["results"]]
    lines = [
        f"{result['model']}, {len(one['losses'])} steps on {result['data']}: the loss fell by {one['learned']:.3f}; "
        f"lorafuse's is {_apart(one)} from PEFT's."
        for result, one in curves
        if "from_peft" in one
    ]
    if lines:
        return " ".join(lines)
    fused = all("optimizer" in result for result in content["results"])
    verdict = "The losses agreed with PEFT's, which is a check and no evidence: weights and tokens were random."
    return verdict + ("" if fused else " AdamW was torch's default, not the fused one.")


def _apart(one: dict[str, Any]) -> str:
    return "{median:+.1e} ({low:+.1e} to {high:+.1e})".format(**one["from_peft"])


def _curves(results: list[Result]) -> str:
    """A row for each loss curve; "" where there is none."""
    rows = []
    for result in results:
        for name, one in result.get("curves", {}).items():
            held = f"{one['held_out']:.4f}" if "held_out" in one else ""
            label = label_of(result, name) if name in result["variants"] else name
            ends = (f"{one['losses'][at]:.4f}" for at in (0, -1))
            cells = [f"{len(one['losses'])}", *ends, held, _apart(one) if "from_peft" in one else ""]
            rows.append([f"{_own(result, results)}, {label}", *cells])
    head = ["losses from PEFT's initialization", "steps", "first", "last", "held out", "from PEFT's, by step"]
    return table(head, rows) if rows else ""


def _over_ours(one: dict[str, Any], result: Result) -> str:
    ours = result["variants"].get("lorafuse")
    return "" if ours is None else f"{one['step']['median'] / ours['step']['median']:.2f}×"


def _utilization(one: dict[str, Any], _: Result) -> str:
    return f"{one['mfu']:.0%}" + (f", {one['of_sheet']:.0%}" if "of_sheet" in one else "")


def tax_text(one: dict[str, Any], figure: str = "tax") -> str:
    """A tax; one that is negative within its interval is no advantage."""
    return "≈ 0" if is_noise(one, figure) else f"{one[figure]:.0%}"


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


def probes(content: Content, file: str) -> str:
    """The results of bench/hopper.py --probes: what each is for."""
    rows = [[name, f"{value:.3f}"] for one in content["results"] for name, value in one["figures"].items()]
    medians = f"From medians of {content['results'][0]['rounds']} rounds, bfloat16."
    return "\n\n".join([all_conditions(content, file), medians, table(["", "measured"], rows)])


def everything(content: Content, file: str) -> str:
    """A file's conditions and a table for each kind of figure; below it what failed or was absent."""
    results = content["results"]
    parts = [all_conditions(content, file)]
    has_rounds = [result for result in results if "rounds" in result]
    sizes = f"{common(results)}; " if common(results) else ""
    if has_rounds:
        taxed = f" {_floor(content, results)}" if _variants(results, _with("tax")) else ""
        parts.append(f"{sizes}medians of {rounds(has_rounds)} rounds, 20th to 80th percentile in brackets.{taxed}")
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
    if curves := _curves(results):
        parts.append(curves)
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
    ends = interval(one)
    return tax_text(one) + (f" ({ends[0] * 100:.0f} to {ends[1] * 100:.0f})" if ends else "")


def _floor(content: Content, results: list[Result]) -> str:
    """What the taxes of a file are over, and how they were taken."""
    kind = "transformers' block" if results[0]["kind"] == "moe" else "frozen"
    if content.get("version", 0) < 3:
        return (
            f"LoRA tax over {kind} as torch runs it, not over the fastest frozen; a ratio of medians, which can lie "
            "outside the bracket of the rounds' ratios. Raw rounds were not kept."
        )
    floors = dict.fromkeys(", ".join(f"{name} {part}" for part, name in one["floor"].items()) for one in results)
    many = max((one["processes"] for one in results if "tax_low" in one["variants"]["frozen"]), default=1)
    return f"LoRA tax over the fastest frozen ({'; '.join(floors)}), the median of the rounds' ratios" + (
        f"; its bracket is the 95 % interval over {many} processes." if many > 1 else "."
    )


def _time(spread: dict[str, float]) -> str:
    low, high = (milliseconds(spread[end], spread["median"]).removesuffix(" ms") for end in ("p20", "p80"))
    return f"{milliseconds(spread['median'])} ({low} to {high})"


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
    ("LoRA tax, x warm", lambda result: with_adapters({"variants": _warm(result)}, "tax"),
     lambda one, result: _spread(one["warm_x"], result)),
    ("TFLOP/s, of the measured peak, of the data sheet", _having("of_peak"),
     lambda one, _: f"{one['flops_per_s'] / 1e12:.3g}, {one['of_peak']:.0%}"
     + (f", {one['of_sheet']:.0%}" if "of_sheet" in one else "")),
    ("peak MiB", _having("peak_bytes", "step"), lambda one, _: f"{one['peak_bytes'] / 2**20:.0f}"),
    ("peak MiB, over frozen", lambda result: _over_frozen_of(result, "peak_bytes"), _over_frozen("peak_bytes")),
    ("MiB between forward and backward, over frozen", lambda result: _over_frozen_of(result, "between_bytes"),
     _over_frozen("between_bytes")),
)  # fmt: skip


def _warm(result: Result) -> dict[str, Any]:
    """What the variants were with x just written."""
    return {n: {"trains": one["trains"], **one["warm_x"]} for n, one in result["variants"].items() if "warm_x" in one}


def _over_frozen_of(result: Result, figure: str) -> list[str]:
    if "frozen" not in result["variants"]:
        return []
    return [name for name in _having(figure)(result) if "step" not in result["variants"][name]]


def _variants(results: list[Result], named: Callable[[Result], list[str]]) -> list[str]:
    return list(dict.fromkeys(name for result in results for name in named(result)))


def _cell(result: Result, name: str, cell: Callable[[dict[str, Any], Result], str]) -> str:
    return cell(result["variants"][name], result) if name in result["variants"] else "not run"


def _label(results: list[Result], name: str) -> str:
    return next(label_of(result, name) for result in results if name in result["variants"])


def milliseconds(seconds: float, like: float = 0.0) -> str:
    """Milliseconds with three significant digits of `like`, or of the value itself."""
    size = like or seconds
    digits = 3 if size < 0.001 else 2 if size < 0.01 else 1 if size < 0.1 else 0
    return f"{seconds * 1e3:.{digits}f} ms"


def demo(full: Content, half: Content) -> str:
    """The results of `make demo` in fp32 and bf16, in one sentence."""
    setting, figures = half["conditions"], half["figures"]
    both = [figures[name] for name in ("PEFT as shipped", "patched by lorafuse")]
    steps = " → ".join(f"{one['step_seconds_median'] * 1e3:.0f}" for one in both)
    peaks = " → ".join(f"{one['peak_bytes_of_a_step'] / 2**20:.0f}" for one in both)
    return (
        f"`make demo`: {setting['model']} fine-tuned, r {setting['rank']} on all linear layers, "
        f"{setting['batch_size']} × {setting['seq_len']} tokens a step, "
        f"PEFT as shipped → patched: **bf16 step {steps} ms ({figures['speedup']:.2f}×), "
        f"peak memory {peaks} MiB**; "
        f"fp32 step {full['figures']['speedup']:.2f}×, "
        f"loss curves equal within {full['figures']['largest_loss_difference']:.0e}; {conditions(half)}"
    )


def demo_steps(content: Content) -> str:
    """A row for each run of the demo: median step, tokens a second, peak memory, last loss."""
    rows = [
        [
            name,
            milliseconds(one["step_seconds_median"]),
            f"{one['tokens_per_second']:.0f}",
            f"{one['peak_bytes_of_a_step'] / 2**20:.0f}",
            f"{one['final_loss']:.4f}",
        ]
        for name, one in content["figures"].items()
        if isinstance(one, dict)
    ]
    return table(["", "median step", "tokens/s", "peak MiB of a step", "last loss"], rows)
