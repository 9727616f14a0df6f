"""The guided DDIM step: twin, C++ and Triton against guide.combine and DDIMSchedule in f64.

Through the emulator (tests/emulator) the backend "cpu" is the CUDA kernel.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from analytic import sd_schedule
from conftest import relative_error
from ops_cases import F64, randn
from torch import Tensor

from sdi_fast.diffusion.guide import combine
from sdi_fast.ops import _native
from sdi_fast.ops import guided_step as op_module
from sdi_fast.ops.guided_step import guided_step, is_channels_last
from sdi_fast.reference.philox import philox, philox_normal
from sdi_fast.types import SDIFastError, StepSpec

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T = torch.tensor([-99, 101, 801, 5])
T_NEXT = torch.tensor([1, 201, 950, 250])
LENGTHS = torch.tensor([3, 1, 2, 9])
BATCH = len(T)
# 300 numbers: groups of 4 that end at no part's edge; 147: a last group of 3, nothing aligned;
# 4096: the vector path, more numbers than a Triton block in a part.
SHAPES = [(3, 10, 10), (3, 7, 7), (4, 32, 32)]
SPEC = StepSpec(scale=-7.5, paper_convention=False, eta=0.3)
BACKENDS = ["reference", "cpu", "triton"] + (["cuda"] if DEVICE == "cuda" else [])
# Triton takes scale and eta in f32, and the noise's log and cos differ by an ulp of f32
TOLERANCE = {"reference": 1e-12, "cpu": 1e-12, "cuda": 1e-12, "triton": 1e-7}


def run_on(backend: str) -> str:
    if backend == "triton":
        pytest.importorskip("triton", reason="triton is not installed (pip install triton)")
    if backend == "cpu" and not _native.is_available():
        pytest.skip(f"no extension: {_native.reason_missing()}")
    return "cpu" if backend == "cpu" else DEVICE


def case(shape: tuple[int, int, int], k: int, dtype: torch.dtype = F64) -> dict[str, Tensor]:
    """Conditions that differ little, as a UNet's do, so that Perp-Neg has something to project."""
    common = randn(1, BATCH, *shape, seed=1)
    outputs = common + 0.3 * randn(k, BATCH, *shape, seed=2)
    if k == 4:
        outputs[3] += 0.5 * (outputs[0] - outputs[1])
    return {
        "outputs": outputs.to(dtype),
        "x": randn(BATCH, *shape, seed=3).to(dtype),
        "noise": randn(BATCH, *shape, seed=4).to(dtype),
        "neg_weights": torch.tensor([[-0.5, -1.2], [0.0, -2.0], [-1.5, 0.3], [-0.1, -0.2]]),
    }


def expected(c: dict[str, Tensor], spec: StepSpec, t_next: Tensor | None) -> tuple[Tensor, Tensor]:
    """What diffusion/ computes, in f64."""
    schedule = sd_schedule("v_prediction" if spec.v_prediction else "epsilon")
    outputs, x = c["outputs"].double(), c["x"].double()
    weights = c["neg_weights"] if len(outputs) == 4 else None
    convention = "paper" if spec.paper_convention else "threestudio"
    output = combine(outputs, weights, spec.scale, convention)
    x0, eps = schedule.split(x, output, T)
    if t_next is None:
        return x0, eps
    a, b = (schedule.alpha(i).double().view(-1, 1, 1, 1) for i in (T, t_next))
    variance = (1 - a) / (1 - b) * (1 - b / a)
    moved = schedule.ddim_step(x, output, T, t_next)
    return moved + spec.eta * variance.sqrt() * c["noise"].double(), eps


def ours(
    c: dict[str, Tensor], spec: StepSpec, t_next: Tensor | None, backend: str, **kwargs
) -> list[Tensor]:
    device = run_on(backend)

    def move(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    weights = c["neg_weights"] if len(c["outputs"]) == 4 else None
    levels = sd_schedule().levels
    outputs, x, levels, t, t_next, weights = map(
        move, (c["outputs"], c["x"], levels, T, t_next, weights)
    )
    kwargs = {k: move(v) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    if not {"noise", "rng"} & kwargs.keys():
        kwargs["noise"] = move(c["noise"])
    both = guided_step(outputs, x, levels, t, t_next, weights, spec, backend=backend, **kwargs)
    return [value.cpu() for value in both]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("v_prediction", [False, True])
@pytest.mark.parametrize("paper", [False, True])
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("shape", SHAPES)
def test_step_and_prediction_are_those_of_the_schedule(backend, v_prediction, paper, k, shape):
    spec = dataclasses.replace(SPEC, paper_convention=paper, v_prediction=v_prediction)
    c = case(shape, k)
    for t_next in (T_NEXT, None):
        for mine, theirs in zip(
            ours(c, spec, t_next, backend), expected(c, spec, t_next), strict=True
        ):
            assert relative_error(mine, theirs) < TOLERANCE[backend]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_f32_arithmetic_on_any_outputs_and_layout(backend, k, dtype, shape):
    c = case(shape, k, torch.float32)
    c["outputs"] = c["outputs"].to(dtype)
    memory = c["outputs"].permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    assert is_channels_last(memory) and not is_channels_last(c["outputs"])
    plain = ours(c, SPEC, T_NEXT, backend)
    turned = ours({**c, "outputs": memory}, SPEC, T_NEXT, backend)
    yardstick = ours({**c, "outputs": c["outputs"].float()}, SPEC, T_NEXT, "reference")
    exact = expected(c, SPEC, T_NEXT)
    for mine, also, twin, truth in zip(plain, turned, yardstick, exact, strict=True):
        assert mine.dtype == torch.float32
        # style.md 4: twice plain PyTorch's error
        allowed = 2 * relative_error(twin, truth) + 2e-7
        assert relative_error(mine, truth) < allowed
        assert relative_error(also, truth) < allowed


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("k", [2, 4])
def test_who_has_arrived_keeps_x_whatever_the_noise(backend, k):
    c = case(SHAPES[0], k)
    c["noise"][1] = float("nan")
    c["outputs"][:, 2] = float("inf")
    moved, _ = ours(c, SPEC, T_NEXT, backend, lengths=LENGTHS, step=2)
    assert torch.equal(moved[1:3], c["x"][1:3])
    truth, _ = expected(c, SPEC, T_NEXT)
    for b in (0, 3):
        assert relative_error(moved[b], truth[b]) < TOLERANCE[backend]
    assert not torch.equal(moved[0], c["x"][0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_conditions_project_onto_nothing(backend):
    """<d, d> = 0 is floored (constants.PERP_EPS): u + scale sum w_i (n_i - u), and no NaN."""
    c = case(SHAPES[0], 4)
    c["outputs"][0] = c["outputs"][1]
    moved, _ = ours(c, SPEC, T_NEXT, backend)
    assert relative_error(moved, expected(c, SPEC, T_NEXT)[0]) < TOLERANCE[backend]


# ---- noise ----------------------------------------------------------------------------------


def test_philox_has_the_published_answers():
    """Known answers of the Random123 library for philox4x32-10."""
    ones = 0xFFFFFFFF
    answers = [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ones] * 4, [ones] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ]
    for counter, key, words in answers:
        got = philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
        assert [int(w) for w in got] == words


def drawn(backend: str, seed: int, offset: int, draw: int = 0, shape=(3, 7, 7)) -> Tensor:
    """The noise that a step adds: of unit spread, since nothing else moves x."""
    c = case(shape, 2, torch.float32)
    c["outputs"].zero_()
    c["x"].zero_()
    rng = torch.tensor([seed, offset])
    moved, _ = ours(c, SPEC, T_NEXT, backend, rng=rng, draw=draw)
    schedule = sd_schedule()
    a, b = (schedule.alpha(i).double().view(-1, 1, 1, 1) for i in (T, T_NEXT))
    return moved / (SPEC.eta * ((1 - a) / (1 - b) * (1 - b / a)).sqrt())


BIG_SEED, BIG_OFFSET = -(2**62) - 12345, 2**40 + 7


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("seed", "offset", "draw"), [(0, 0, 0), (BIG_SEED, BIG_OFFSET, 3), (7, 2**32 - 1, 1)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_backend_draws_the_twins_noise(backend, seed, offset, draw, shape):
    noise = drawn(backend, seed, offset, draw, shape)
    n = noise[0].numel()
    twin = philox_normal(torch.tensor([seed, offset]), draw, BATCH, n).view(noise.shape)
    # log, sqrt, cos and V in f32: some ulp each, more on a GPU
    torch.testing.assert_close(noise, twin.double(), rtol=4e-6, atol=4e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_stream_goes_on_where_it_was_left(backend):
    shape = SHAPES[0]
    assert torch.equal(drawn(backend, 5, 10, 2, shape), drawn(backend, 5, 12, 0, shape))
    assert torch.equal(drawn(backend, 5, 12, 0, shape), drawn(backend, 5, 12, 0, shape))
    assert not torch.equal(drawn(backend, 5, 12, 0, shape), drawn(backend, 6, 12, 0, shape))
    assert not torch.equal(drawn(backend, 5, 12, 0, shape), drawn(backend, 5, 13, 0, shape))


def test_the_noise_is_normal_and_independent():
    noise = philox_normal(torch.tensor([3, 9]), 0, 4, 1 << 16)
    # of n = 262144 numbers; 5 standard deviations each
    assert abs(float(noise.mean())) < 0.01
    assert abs(float(noise.square().mean()) - 1) < 0.014
    assert abs(float(noise.pow(4).mean()) - 3) < 0.1
    others = [
        philox_normal(torch.tensor(rng), draw, 4, 1 << 16)
        for rng, draw in (((3, 10), 0), ((4, 9), 0), ((3, 9), 2))
    ]
    quads = noise.view(4, -1, 4)
    pairs = [(noise[0], noise[1]), *((noise, o) for o in others)]
    pairs += [(quads[..., i], quads[..., j]) for i, j in itertools.combinations(range(4), 2)]
    for a, b in pairs:
        assert abs(float((a * b).mean())) < 5 / a.numel() ** 0.5


# ---- the op ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [2, 4])
def test_opcheck(k):
    if not _native.is_available():
        pytest.skip(f"no extension: {_native.reason_missing()}")
    c = case(SHAPES[0], k, torch.float32)
    weights = c["neg_weights"] if k == 4 else None
    args = (c["outputs"], c["x"], sd_schedule().levels, T, T_NEXT, weights, LENGTHS, c["noise"])
    torch.library.opcheck(op_module._step, (*args, None, [0, 0, 1, 0], [7.5, 0.3], "cpu"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outputs": torch.zeros(3, 4, 3, 7, 7)}, r"outputs: expected shape \[2, 4, 3, 7, 7\]"),
        ({"outputs": torch.zeros(2, 4, 3, 7, 7, dtype=F64)}, "outputs: expected dtype float32"),
        ({"t": torch.zeros(4)}, "t: expected dtype int64, got float32"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths: expected shape \[4\]"),
        ({"neg_weights": torch.zeros(4, 2)}, r"outputs: expected shape \[4, 4, 3, 7, 7\]"),
        ({"rng": torch.zeros(2)}, "rng: expected dtype int64"),
        ({"rng": torch.zeros(2, dtype=torch.int64), "noise": torch.zeros(4, 3, 7, 7)}, "got both"),
    ],
)
def test_bad_arguments_are_named(change, message):
    given = {
        "outputs": torch.zeros(2, 4, 3, 7, 7), "x": torch.zeros(4, 3, 7, 7),
        "levels": sd_schedule().levels, "t": T, "t_next": T_NEXT, "neg_weights": None,
        "spec": SPEC, **change,
    }  # fmt: skip
    with pytest.raises(SDIFastError, match=message):
        guided_step(**given)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_graph_replays_with_new_noise_and_new_levels(backend, dtype):
    c = {k: v.cuda() for k, v in case((4, 64, 64), 4, torch.float32).items()}
    outputs, levels = c["outputs"].to(dtype), sd_schedule().levels.cuda()
    t, t_next, rng = T.cuda(), T_NEXT.cuda(), torch.tensor([3, 40]).cuda()
    lengths = LENGTHS.cuda()

    def step() -> Tensor:
        moved, _ = guided_step(
            outputs, c["x"], levels, t, t_next, c["neg_weights"], SPEC,
            lengths=lengths, step=2, rng=rng, draw=1, backend=backend,
        )  # fmt: skip
        return moved

    step()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
        rng[1:].add_(2)
    seen = []
    for _ in range(2):
        graph.replay()
        seen.append(result.clone())
    assert rng.tolist() == [3, 44] and not torch.equal(seen[0], seen[1])
    rng[1] = 42  # resume
    graph.replay()
    assert torch.equal(result, seen[1])
    rng[1] = 42
    assert torch.equal(step(), seen[1])
    t_next.add_(7)
    rng[1] = 42
    graph.replay()
    rng[1] = 42
    assert torch.equal(step(), result) and not torch.equal(result, seen[1])
