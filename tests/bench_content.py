"""Contents of result files as `lorafuse bench --json` writes them, with figures that a test can compute again."""

VARIANTS = {
    "frozen": ("frozen", "nothing"),
    "full": ("full fine-tuning", "base"),
    "addmm": ("GEMM + addmm_", "adapters"),
    "peft": ("PEFT as shipped", "adapters"),
    "lorafuse": ("lorafuse", "adapters"),
}
CONDITIONS = {
    "device": "a CPU", "threads": "2", "torch": "2.13.0", "peft": "0.21.2", "commit": "0123456789ab",
    "date": "2026-11-26 12:00 UTC",
}  # fmt: skip
LAYERS = {"wide": (4096, 1024), "narrow": (512, 1024)}
PEAK, COPY = 2e12, 2e10


def tax(name, m, r):
    """Frozen 0, full 0.5; adapters more with rank, less with tokens, each variant its own."""
    if name in ("frozen", "full"):
        return 0.5 * (name == "full")
    return (2 + list(VARIANTS).index(name)) * r / 64 + 8 / m


def floors(n, k, r):
    return {"tax": 3 * r * (n + k) / (2 * n * k), "ratio_to_full": 2 / 3 + r * (n + k) / (n * k)}


def figure(name, m, n, k, r):
    label, trains = VARIANTS[name]
    value = tax(name, m, r)
    frozen = 4 * m * n * k / 1e12
    seconds = frozen * (1 + value)
    flops, moved = 4 * m * n * k, 4 * (m * n + n * k + m * k)
    return {
        "label": label,
        "trains": trains,
        "total": {"median": seconds, "p20": seconds * 0.9, "p80": seconds * 1.2},
        "tax": value,
        "tax_p20": value - 0.1,
        "tax_p80": value + 0.2,
        "ratio_to_full": (1 + value) / 1.5,
        "flops_per_s": flops / seconds,
        "bytes_per_s": moved / seconds,
        "flops_per_byte": flops / moved,
        "of_peak": flops / seconds / PEAK,
        "of_copy": moved / seconds / COPY,
        "peak_bytes": int((1 + value) * 2**20),
        "between_bytes": 2**20,
    }


def content(layers=("wide",), ms=(64,), ranks=(16,), kind="linear", dtype="bfloat16", **conditions):
    """One result for each layer, M and rank; of kind "memory" with bytes alone."""
    results = []
    for case, m, r in ((case, m, r) for case in layers for m in ms for r in ranks):
        n, k = LAYERS[case]
        variants = {name: figure(name, m, n, k, r) for name in VARIANTS}
        result = {"kind": "linear", "case": case, "M": m, "N": n, "K": k, "R": r, "dtype": dtype}
        if kind == "memory":
            kept = ("label", "peak_bytes", "between_bytes")
            variants = {name: {key: one[key] for key in kept} for name, one in variants.items()}
        else:
            result |= {"rounds": 40, "floors": floors(n, k, r), "absent": {"unsloth": "unsloth not installed"}}
        results.append(result | {"variants": variants, "failed": {}})
    return {"version": 2, "kind": kind, "conditions": CONDITIONS | conditions, "results": results, "not_run": {}}
