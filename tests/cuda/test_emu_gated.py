"""Gate and up with their activation, each way in one launch (csrc/kernels/gated_sm90.cuh), emulated (T5).

Every gradient of a gated MLP by name against fp64; bit for bit in every tiling and under every schedule.
"""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from emu_launches import gated, gated_ha, gated_masked, masked, words_are_zero
from group_reference import Case, check, make, mlp, plain_mlp
from test_emu_linear import TILINGS

from lorafuse.activation import ACTIVATIONS, GATES, gate_forward
from lorafuse.backends import cuda_siblings
from lorafuse.plan import configs_cuda, override
from lorafuse.plan.devices import find
from lorafuse.plan.problem import Problem

pytest_plugins = "emu_fixtures"
pytestmark = pytest.mark.usefixtures("emu")

HALF = torch.float16
# columns off the tile, ranks that end within eight, biases of one and not of the other
PLAIN = Case(N=(72, 72, 40), K=136, R=(13, 6, 8), p=(0.0,) * 3, bias=(True, False, True), leading=(2, 18), dtype=HALF)
CASES = {
    "several tiles": replace(PLAIN, N=(264, 264, 24), K=72, leading=(140,)),
    "fp32 adapters": replace(PLAIN, R=(8, 16, 24), dtype=torch.bfloat16, adapter_dtype=torch.float32),
    "many ranks": replace(PLAIN, R=(40, 80, 72), bias=(False, True, False)),
    "one step each": replace(PLAIN, R=(8, 8, 16), dtype=torch.bfloat16, bias=(True,) * 3),
    "down off eight": replace(PLAIN, R=(8, 16, 13), adapter_dtype=torch.bfloat16, dtype=torch.bfloat16),
    "no adapter of gate": replace(PLAIN, R=(0, 24, 8)),
    "no adapter of up": replace(PLAIN, R=(70, 0, 8)),
    "one row": replace(PLAIN, N=(8, 8, 8), K=8, leading=(1,)),
}


@pytest.fixture(autouse=True)
def _together():
    with override(force_kernel="cuda siblings"):
        yield


def run(o, activation="silu", **more):
    return mlp(o, activation, backend="emu", **more)


def counted(launched):
    kinds = "project", "gated", "siblings", "linear", "reduce"
    return Counter(name for name, _ in launched if name.startswith(kinds) and not name.endswith("_partials"))


@pytest.mark.parametrize("name", CASES)
def test_every_gradient(name, launched):
    check(run, plain_mlp, make(CASES[name], of_mlp=True))
    # y of down is a product by itself
    launches = {"project_x": 2, "gated_forward": 1, "linear": 1, "gated_backward": 1, "siblings_dx": 1, "reduce_x": 2}
    actual = counted(launched)
    assert {key: n for key, n in actual.items() if not key.endswith("_workspace")} == launches | {"reduce_each": 2}


@pytest.mark.parametrize("name", CASES)
def test_xa_of_down_with_h(name, launched):
    """Of up to 32 ranks down reads h once: project_x runs for gate and up alone."""
    with override(force_kernel="cuda siblings_ha"):
        check(run, plain_mlp, make(CASES[name], of_mlp=True))
    (one,) = (arguments for key, arguments in launched if key == "gated_forward")
    gives = CASES[name].R[2] <= 32
    actual = counted(launched)
    assert (bool(one.get("ha")), actual["project_x"], actual["linear"]) == (gives, 1 if gives else 2, 1)
    # b of down, of ranks that fill rows, is rounded with the other adapters
    rounded = Counter(key for key, _ in launched)["round_adapter"]
    assert rounded == (1 if gives and CASES[name].R[2] % 8 else 0)
    assert actual["gated_backward"] == actual["siblings_dx"] == 1


def test_xa_of_down_is_that_of_h_as_it_is_stored(emu):
    """Whole numbers add up without rounding: every element of h in ha once, for any ranks, and zeros behind them."""
    M, I, K = 140, 136, 8
    x, (gate, h) = torch.eye(K, dtype=HALF).repeat(18, 1)[:M], (torch.empty(M, I, dtype=HALF) for _ in range(2))
    generator, word = torch.Generator().manual_seed(3), torch.zeros(1, dtype=torch.int32)

    def whole(*sizes):
        return torch.randint(-2, 3, sizes, generator=generator).to(HALF)

    for block_n, R in ((128, 1), (128, 16), (256, 13), (256, 24), (256, 40), (128, 64)):
        w, a, ha = (whole(I, K), whole(I, K)), whole(R, I), torch.empty(M, -(-R // 8) * 8, dtype=HALF)
        given = {"type": 1, "activation": 3, "M": M, "N": I, "K": K, "x": x.data_ptr(), "stride_x": K}
        given |= {"w": tuple(t.data_ptr() for t in w), "stride_w": (K, K), "gate": gate.data_ptr(), "stride_gate": I}
        given |= {"h": h.data_ptr(), "stride_h": I, "R_down": R, "a_down": a.data_ptr(), "stride_a_down": I}
        given |= {"ha": ha.data_ptr(), "stride_ha": ha.shape[1], "tiling": (block_n, 3, 1)}
        given["workspace"] = word.data_ptr()
        partials = torch.empty(emu.gated_forward_partials(**given), dtype=torch.uint8)
        assert partials.numel() == 4 * -(-I // (block_n // 2)) * M * -(-R // 16) * 16
        emu.gated_forward(**given, partials=partials.data_ptr())
        expected = torch.relu(x.double() @ w[0].double().T) * (x.double() @ w[1].double().T)
        assert torch.equal(h.double(), expected)
        assert torch.equal(ha[:, :R].double(), expected @ a.double().T)
        assert not ha[:, R:].any()


def test_where_xa_of_down_is_a_pass_over_h(launched):
    """With a mask on h, without an adapter, and where the partial sums would take more than 64 MiB."""
    with override(force_kernel="cuda siblings_ha"):
        check(run, plain_mlp, make(replace(PLAIN, p=(0.0, 0.0, 0.4)), of_mlp=True))
        check(run, plain_mlp, make(replace(PLAIN, R=(8, 8, 0)), of_mlp=True))
    assert not any(one.get("ha") for name, one in launched if name == "gated_forward")
    problem = Problem(8192, 28672, 4096, 32, "bfloat16", "float32")
    for block_n, R, rows in ((256, 16, 8192), (128, 16, 4096), (256, 32, 4096)):
        (config,) = configs_cuda.matmuls(problem, find("H200"), [(block_n, 3, 1)])
        assert configs_cuda.gives_ha(config, rows, R, 14336)
        assert not configs_cuda.gives_ha(config, rows * 5 // 4, R, 14336)
    assert not configs_cuda.gives_ha(config, 1, 33, 14336)


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATES])
def test_every_activation(activation, launched):
    case = replace(PLAIN, N=(40, 40, 16), K=24, leading=(64,))
    check(lambda o: run(o, activation), lambda o: plain_mlp(o, activation), make(case, of_mlp=True))
    numbers = {one["activation"] for name, one in launched if name.startswith("gated")}
    assert numbers == {cuda_siblings.ACTIVATIONS[activation]}


@pytest.mark.parametrize("activation", [*ACTIVATIONS, *GATES])
def test_large_and_small_numbers(emu, activation):
    """h of gates and ups that the identity hands through, from where it vanishes to where it overflows."""
    x = torch.cat([torch.linspace(-30, 30, 504), torch.tensor([-6e4, 6e4, -200.0, 200.0, -0.0, 0.0, 1e-7, -1e-7])])
    x, w = x.to(HALF).view(-1, 8).contiguous(), torch.eye(8, dtype=HALF)
    gate, up, h = (torch.empty_like(x) for _ in range(3))
    flipped, word = -w, torch.zeros(1, dtype=torch.int32)
    emu.gated_forward(
        type=1, activation=cuda_siblings.ACTIVATIONS[activation], M=len(x), N=8, K=8, x=x.data_ptr(), stride_x=8,
        w=(w.data_ptr(), flipped.data_ptr()), stride_w=(8, 8), gate=gate.data_ptr(), stride_gate=8, up=up.data_ptr(),
        stride_up=8, h=h.data_ptr(), stride_h=8, tiling=(128, 4, 1), workspace=word.data_ptr(),
    )  # fmt: skip
    assert torch.equal(gate, x)
    assert torch.equal(up, -x)
    exact = gate_forward(activation, gate.double(), up.double()).to(HALF)
    # one rounding, and what fp32 loses of a vanishing 1 + erf(x)
    torch.testing.assert_close(h, exact, rtol=2**-10, atol=2e-6, equal_nan=True)


def test_up_is_not_stored(launched):
    """It is computed again: forward writes gate and h alone."""
    check(lambda o: run(o, recompute_up=True), plain_mlp, make(PLAIN, of_mlp=True))
    (one,) = (arguments for name, arguments in launched if name == "gated_forward")
    assert one["up"] == 0
    assert counted(launched)["gated_backward"] == 1


def test_masks(launched):
    """Those of gate and up are drawn before the launch, that of down in its backward too."""
    check(run, plain_mlp, make(replace(PLAIN, p=(0.3, 0.5, 0.0)), of_mlp=True))
    assert counted(launched)["gated_forward"] == counted(launched)["gated_backward"] == 1


@pytest.mark.parametrize(
    "case",
    [
        replace(PLAIN, p=(0.0, 0.0, 0.4)),
        # several tiles, of one step of ranks, of two and of more than a block
        replace(CASES["several tiles"], p=(0.0, 0.3, 0.5), R=(8, 8, 16)),
        replace(CASES["fp32 adapters"], p=(0.5, 0.0, 0.9)),
        replace(CASES["many ranks"], p=(0.0, 0.0, 0.2)),
    ],
)
def test_mask_of_down(case, launched):
    check(run, plain_mlp, make(case, of_mlp=True))
    assert counted(launched)["gated_backward"] == 1
    (one,) = (arguments for name, arguments in launched if name == "gated_backward")
    assert one["seed"] != 0


@pytest.mark.parametrize(("names", "backward"), [(("x", "a 2"), 1), (("a 0", "a 2", "b 2"), 1), (("x", "b 2"), 0)])
def test_some_gradients(names, backward, launched):
    """h is computed again where da of down reads it; db of down alone is of ha."""
    check(run, plain_mlp, make(PLAIN, of_mlp=True), names=names)
    assert counted(launched)["gated_backward"] == backward


def test_down_without_an_adapter(launched):
    check(run, plain_mlp, make(replace(PLAIN, R=(8, 8, 0)), of_mlp=True))
    assert (counted(launched)["gated_forward"], counted(launched)["gated_backward"]) == (1, 0)


@pytest.mark.parametrize("launch", [gated, gated_masked, masked])
def test_every_tiling(launch, launched):
    """No bit depends on it, since each tile sums in the same order."""
    first, *others = [launch(config) for config in TILINGS]
    for config, actual in zip(TILINGS[1:], others, strict=True):
        assert all(map(torch.equal, actual, first)), config
    assert {one["tiling"][:3] for _, one in launched if "tiling" in one} == set(TILINGS)


def test_xa_of_down_in_every_tiling():
    """Sums end where tiles do: bits are those of tiles of as many columns."""
    first = {}
    for config in TILINGS:
        *rest, ha = gated_ha(config)
        of_all, of_columns = first.setdefault(0, rest), first.setdefault(config[0], ha)
        assert all(map(torch.equal, (*rest, ha), (*of_all, of_columns))), config


@pytest.mark.parametrize("launch", [gated, gated_ha, gated_masked, masked])
def test_many_schedules(launch, emu, request):
    """No bit depends on the order in which blocks run, or on how many do at a time: late ones leave tiles to others."""
    emu.configure()
    first, configs = launch(TILINGS[0]), [config for config in TILINGS if config[0] == 128]
    for i in range(max(6, request.config.getoption("--seeds") // 8)):
        config = configs[i % len(configs)]
        emu.configure(seed=i, resident=config[2] * (1 + i % 3), multiprocessors=config[2] * (1 + i % 4))
        assert all(map(torch.equal, launch(config), first)), i
        assert words_are_zero()


def test_what_is_refused(emu):
    given = {"type": 0, "activation": 0, "M": 1, "N": 8, "K": 64, "x": 64, "stride_x": 64, "w": (64, 64)}
    given |= {"stride_w": (64, 64), "gate": 64, "stride_gate": 8, "h": 64, "stride_h": 8, "tiling": (128, 4, 1)}
    given["workspace"], down = 64, {"ha": 64, "stride_ha": 8, "a_down": 64, "stride_a_down": 8}
    for message, change in {
        "workspace is null": {"workspace": 0},
        "activation 6 is not in 0 … 5": {"activation": 6},
        "N of 12 is not a positive multiple of 8": {"N": 12},
        "w is null": {"w": (64,)},
        "stride 60 of w is below its 64 columns": {"stride_w": (64, 60)},
        "xa is null": {"R": (0, 8), "b": (0, 64), "stride_b": (0, 8)},
        "b is null": {"R": (0, 8)},
        "h is null": {"h": 0},
        "stride 4 of up is below": {"up": 64, "stride_up": 4},
        "R_down of 0; ha has 1 to 64": {"ha": 64},
        "R_down of 65; ha has 1 to 64": {"ha": 64, "R_down": 65},
        "a_down is null": {"ha": 64, "R_down": 8},
        "stride 8 of ha is below its 16": down | {"stride_ha": 8, "R_down": 16},
        "partials is null": down | {"R_down": 8},
        "clusters of 3 blocks": {"tiling": (128, 4, 3)},
        "block_n of 64 has no kernel": {"tiling": (64, 4, 1)},
    }.items():
        with pytest.raises(ValueError, match=message):
            emu.gated_forward(**given | change)
    with pytest.raises(ValueError, match="block_n of 64 has no kernel"):
        emu.gated_forward_partials(**given | down | {"tiling": (64, 4, 1)})
    names = "dy", "w", "dyb", "a", "gate", "up", "dgate", "dup", "h"
    given = {"type": 0, "activation": 0, "M": 1, "N": 8, "K": 8, "R": 8, **dict.fromkeys(names, 64)}
    given |= {f"stride_{name}": 8 for name in names} | {"tiling": (128, 4, 1), "workspace": 64}
    for message, change in {
        "workspace at .* is not on a 4-byte boundary": {"workspace": 66},
        "activation -1 is not in 0": {"activation": -1},
        "R of 0: dh has a low-rank product": {"R": 0},
        "K of 4 is not a positive multiple of 8": {"K": 4},
        "dup at .* is not on a 16-byte boundary": {"dup": 72},
        "a ring of 1 stages": {"tiling": (128, 1, 1)},
    }.items():
        with pytest.raises(ValueError, match=message):
            emu.gated_backward(**given | change)
