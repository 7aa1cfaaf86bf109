"""Plots of result files: the right ones for the data, the right numbers in each, conditions on all."""

import math
import sys

import pytest
from bench_content import CONDITIONS, COPY, LAYERS, PEAK, VARIANTS, content, floors, tax

from lorafuse.bench import peaks, plots
from lorafuse.cli import main
from lorafuse.errors import MissingDependency

pytestmark = pytest.mark.no_poison

ADAPTED = [name for name, (_, trains) in VARIANTS.items() if trains == "adapters"]
EVERYTHING = {"layers": ("wide", "narrow"), "ms": (64, 256), "ranks": (4, 16, 64)}


def lines(axes):
    return {line.get_label(): line for line in axes.get_lines()}


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ({}, {"roofline"}),
        ({"ms": (64, 256)}, {"roofline", "tax-by-m"}),
        ({"ranks": (4, 16)}, {"roofline", "tax-by-rank", "full-by-rank"}),
        ({"layers": ("wide", "narrow")}, {"roofline", "tax-by-case"}),
        (EVERYTHING, {"roofline", "tax-by-m", "tax-by-rank", "full-by-rank", "tax-by-case"}),
        ({"kind": "memory"}, {"memory"}),
        ({"layers": ()}, set()),
        ({"layers": (), "kind": "memory"}, set()),
    ],
)
def test_only_what_the_data_supports_is_drawn(sizes, expected):
    assert plots.figures(content(**sizes)).keys() == expected


def test_one_size_by_different_layers_is_no_line():
    """Two layers that were measured at one M each."""
    actual = content(("wide",), (64,)), content(("narrow",), (256,))
    assert "tax-by-m" not in plots.figures(actual[0] | {"results": actual[0]["results"] + actual[1]["results"]})


def test_figures_that_are_missing_are_left_out():
    """Files of an older version have no peaks, a whole model no tax, and no run that left it out a ratio to full."""
    given = content(**EVERYTHING)
    for result in given["results"]:
        for one in result["variants"].values():
            del one["of_peak"], one["tax"], one["tax_p20"], one["tax_p80"]
    assert plots.figures(given).keys() == {"full-by-rank"}
    for result in given["results"]:
        for one in result["variants"].values():
            del one["ratio_to_full"]
    assert plots.figures(given) == {}


@pytest.mark.parametrize(("name", "by", "values"), [("tax-by-m", "M", (64, 256, 1024)), ("tax-by-rank", "R", (4, 16))])
def test_lines_bands_and_floor_hold_the_data(name, by, values):
    given = content(**{"ms" if by == "M" else "ranks": values})
    # files are not sorted, and what trains no adapter has no line
    given["results"].reverse()
    for result in given["results"]:
        result["variants"]["other"] = result["variants"]["frozen"] | {"label": "no adapter"}
    (axes,) = plots.figures(given)[name].axes
    sizes = [(value, 16) if by == "M" else (64, value) for value in values]
    drawn = lines(axes)
    assert drawn.keys() == {*(VARIANTS[one][0] for one in ADAPTED), "arithmetic floor"}
    for index, one in enumerate(ADAPTED):
        line = drawn[VARIANTS[one][0]]
        assert tuple(line.get_xdata()) == values
        assert list(line.get_ydata()) == [tax(one, *size) for size in sizes]
        band = axes.collections[index].get_paths()[0].vertices
        for value, size in zip(values, sizes, strict=True):
            ends = {y for x, y in band if x == value}
            assert ends == {tax(one, *size) - 0.1, tax(one, *size) + 0.2}
    floor = drawn["arithmetic floor"]
    assert list(floor.get_ydata()) == [floors(*LAYERS["wide"], r)["tax"] for _, r in sizes]
    assert floor.get_linestyle() == "--"
    assert axes.get_xscale() == "log"
    assert axes.xaxis.get_transform().base == 2
    assert [tick.get_text() for tick in axes.get_xticklabels()] == [str(value) for value in values]


def test_ratio_to_full_by_rank():
    ranks = 4, 16, 64
    (axes,) = plots.figures(content(ranks=ranks))["full-by-rank"].axes
    drawn = lines(axes)
    assert drawn.keys() == {*(VARIANTS[one][0] for one in ADAPTED), "arithmetic floor", "full fine-tuning"}
    for one in ADAPTED:
        assert list(drawn[VARIANTS[one][0]].get_ydata()) == [(1 + tax(one, 64, r)) / 1.5 for r in ranks]
    assert list(drawn["arithmetic floor"].get_ydata()) == [floors(*LAYERS["wide"], r)["ratio_to_full"] for r in ranks]
    assert set(drawn["full fine-tuning"].get_ydata()) == {1}


def test_a_panel_for_each_case_with_its_sizes():
    titles = [axes.get_title() for axes in plots.figures(content(**EVERYTHING))["tax-by-m"].axes]
    assert len(titles) == 6
    assert "narrow: N 512, K 1024, R 64, bfloat16" in titles


def test_roofline_has_the_measured_roofs_and_every_point():
    given = content(("wide", "narrow"), (64, 4096))
    (axes,) = plots.figures(given)["roofline"].axes
    drawn = lines(axes)
    copy, product = drawn.pop("copy: 20 GB/s"), drawn.pop("product: 2 TFLOP/s")
    for x, y in zip(copy.get_xdata(), copy.get_ydata(), strict=True):
        assert math.isclose(y, x * COPY)
    assert all(math.isclose(y, PEAK) for y in product.get_ydata())
    assert copy.get_xdata()[1] == product.get_xdata()[0]
    assert drawn.keys() == {label for label, _ in VARIANTS.values()}
    for name, (label, _) in VARIANTS.items():
        points = [result["variants"][name] for result in given["results"]]
        assert list(drawn[label].get_xdata()) == [one["flops_per_byte"] for one in points]
        assert list(drawn[label].get_ydata()) == [one["flops_per_s"] for one in points]
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")


def test_a_roofline_for_each_dtype():
    both = content()["results"] + content(dtype="float32")["results"]
    titles = [axes.get_title() for axes in plots.figures(content() | {"results": both})["roofline"].axes]
    assert titles == ["bfloat16, 1 result", "float32, 1 result"]


def test_bars_by_case():
    (axes,) = plots.figures(content(("wide", "narrow")))["tax-by-case"].axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["wide", "narrow"]
    assert [bars.get_label() for bars in axes.containers] == [VARIANTS[one][0] for one in ADAPTED]
    for one, bars in zip(ADAPTED, axes.containers, strict=True):
        assert [bar.get_width() for bar in bars] == [tax(one, 64, 16)] * 2
    whiskers = {tuple(line.get_xdata()) for line in axes.get_lines()}
    assert {(tax(one, 64, 16) - 0.1, tax(one, 64, 16) + 0.2) for one in ADAPTED} <= whiskers
    assert {(floors(*LAYERS[case], 16)["tax"],) * 2 for case in LAYERS} <= whiskers


def test_a_routing_is_a_case():
    given = content(("wide", "wide"))
    for result, routing in zip(given["results"], ("balanced", "zipf"), strict=True):
        result["routing"] = routing
    (axes,) = plots.figures(given)["tax-by-case"].axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["wide balanced", "wide zipf"]


def test_bars_of_memory_are_mib_over_frozen():
    given = content(("wide", "narrow"), (64, 256), kind="memory")
    wide, narrow = plots.figures(given)["memory"].axes
    assert wide.get_title() == "wide: N 4096, K 1024, bfloat16"
    assert [tick.get_text() for tick in narrow.get_yticklabels()] == ["M 64, R 16", "M 256, R 16"]
    for bars, name in zip(wide.containers, [one for one in VARIANTS if one != "frozen"], strict=True):
        assert bars.get_label() == VARIANTS[name][0]
        for bar, m in zip(bars, (64, 256), strict=True):
            assert bar.get_width() == pytest.approx(tax(name, m, 16), abs=1e-5)


def test_a_variant_looks_the_same_everywhere_and_unlike_the_others():
    given = content(**EVERYTHING)
    for result in given["results"]:
        result["variants"] |= {name: result["variants"]["peft"] | {"label": name} for name in ("unsloth", "liger")}
    made = plots.figures(given)
    looks: dict[str, set] = {}
    for name in ("tax-by-m", "tax-by-rank", "full-by-rank", "roofline"):
        for axes in made[name].axes:
            for label, line in lines(axes).items():
                if line.get_marker() != "None":
                    looks.setdefault(label, set()).add((line.get_color(), line.get_marker()))
    assert {"unsloth", "liger", "lorafuse"} <= looks.keys()
    assert all(len(actual) == 1 for actual in looks.values()), looks
    assert len({marker for actual in looks.values() for _, marker in actual}) == len(looks)
    bars = {bars.get_label(): bars[0].get_facecolor() for bars in made["tax-by-case"].axes[0].containers}
    from matplotlib.colors import to_rgba

    assert all(to_rgba(next(iter(looks[label]))[0]) == colour for label, colour in bars.items())


@pytest.mark.parametrize("given", [content(**EVERYTHING), content(kind="memory")], ids=["timed", "memory"])
def test_every_plot_says_its_conditions(given):
    for name, figure in plots.figures(given).items():
        footer = figure.get_supxlabel()
        for key in ("device", "torch", "commit", "date"):
            assert CONDITIONS[key] in footer, (name, key)
        assert figure.get_suptitle(), name


@pytest.mark.parametrize("missing", ["device", "torch", "date"])
def test_no_plot_without_its_conditions(missing):
    with pytest.raises(ValueError, match=missing):
        plots.figures(content(**{missing: ""}))


def test_files_are_written_and_no_state_is_left(tmp_path):
    from matplotlib import pyplot

    files = plots.draw(content(ms=(64, 256)), tmp_path / "new" / "folder")
    assert sorted(file.name for file in files) == ["roofline.png", "tax-by-m.png"]
    assert all(file.read_bytes().startswith(b"\x89PNG") for file in files)
    assert pyplot.get_fignums() == []


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"roofline.png cannot be written: .*name another folder"):
        plots.draw(content(), tmp_path / "file" / "folder")


def test_without_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependency, match=r"pip install 'lorafuse\[cli\]'"):
        plots.figures(content())


def test_bench_draws_what_it_measured(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peaks, "matmul_flops", lambda dtype, device: PEAK)
    monkeypatch.setattr(peaks, "copy_bytes", lambda device: COPY)
    command = ["bench", "linear", "--shape", "24,40", "--m", "8", "16", "--rank", "3", "--rounds", "3"]
    command += ["--device", "cpu", "--dtype", "float32", "--only", "lorafuse", "--plot", str(tmp_path)]
    assert main(command) == 0
    assert {file.name for file in tmp_path.iterdir()} == {"roofline.png", "tax-by-m.png"}
    assert "tax-by-m.png" in capsys.readouterr().out.replace("\n", "")
