"""The fast UNet against diffusers' own forward.

Tolerance 1e-5 in f32: the two add the same terms in another order; measured 1e-7 to 6e-7. Every
bias and norm weight is random here (diffusers initialises many to 0 or 1), and the output's bias is
zero lest it hide the rest.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import relative_error
from tiny_sd import build_models
from torch import Tensor, nn
from unets import SD21, build, inputs, randomise, sd15_topology, sd21_topology

from sdi_fast.diffusion.denoiser import Denoiser, make_denoiser
from sdi_fast.diffusion.fast_unet import CapturedUNet, FastUNet, FastUNetOptions, GraphedUNet
from sdi_fast.diffusion.fast_unet.packing import pack, phase_weights
from sdi_fast.diffusion.guide import guided_output
from sdi_fast.diffusion.prompt import Condition
from sdi_fast.ops.unet_ops import interleave_phases
from sdi_fast.types import SDIFastError

TOLERANCE = 1e-5


def toyworld() -> Any:
    from diffusers import UNet2DConditionModel

    from sdi_fast.toyworld.models import WEIGHTS

    return UNet2DConditionModel.from_pretrained(str(WEIGHTS / "unet"))


UNETS = {
    "tiny": lambda: randomise(build_models(10)["unet"]),
    "sd21 topology": lambda: randomise(sd21_topology()),
    "sd15 topology": lambda: randomise(sd15_topology()),
    "no attention at the first level": lambda: randomise(
        sd21_topology(
            down_block_types=("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
            up_block_types=("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        )
    ),
    "toyworld": toyworld,
}


@pytest.fixture(scope="module", params=UNETS)
def unet(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    return UNETS[request.param]().eval().requires_grad_(False)


@pytest.mark.parametrize("upsample", ["phase", "nearest", "measured"])
def test_agrees_with_diffusers(unet: Any, upsample: str) -> None:
    x, t, context = inputs(unet, 3, 1)
    fast = FastUNet(unet, FastUNetOptions(upsample=upsample))
    expected = Denoiser(unet).predict(x, t, context)
    ours = fast.predict(x, t, context)
    assert ours.dtype == torch.float32 and ours.is_contiguous()
    assert relative_error(ours, expected) < TOLERANCE
    other = fast.predict(x, t.flip(0), context.flip(0))
    assert relative_error(other, expected) > 1e-3, "time and text matter"


@pytest.mark.parametrize("n_conditions", [1, 2, 4])
def test_conditions_may_share_a_latent(unet: Any, n_conditions: int) -> None:
    x, t, context = inputs(unet, 2, n_conditions)
    fast = FastUNet(unet)
    ours = fast.predict(x, t, context)
    expected = Denoiser(unet).predict(
        x.repeat(n_conditions, 1, 1, 1), t.repeat(n_conditions), context
    )
    assert relative_error(ours, expected) < TOLERANCE


def test_inputs_and_weights_are_left_alone(unet: Any) -> None:
    x, t, context = inputs(unet, 2, 2)
    kept = [v.clone() for v in (x, t, context)]
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    fast = FastUNet(unet)
    cache = fast.prepare(context)
    first = fast.predict_prepared(x, t, cache)
    assert torch.equal(first, fast.predict_prepared(x, t, cache)), "nothing is consumed"
    assert all(torch.equal(a, b) for a, b in zip(kept, (x, t, context), strict=True))
    assert all(torch.equal(weights[n], v) for n, v in unet.state_dict().items())


@pytest.fixture(scope="module")
def small() -> Any:
    torch.manual_seed(0)
    return randomise(sd21_topology()).eval().requires_grad_(False)


def test_a_cache_is_updated_in_place(small: Any) -> None:
    x, t, context = inputs(small, 2, 2)
    fast = FastUNet(small)
    cache = fast.prepare(torch.zeros_like(context))
    address = cache.projected.data_ptr()
    assert fast.prepare(context, cache) is cache and cache.projected.data_ptr() == address
    fresh = fast.predict_prepared(x, t, fast.prepare(context))
    assert torch.equal(fast.predict_prepared(x, t, cache), fresh)


def test_rows_do_not_depend_on_their_batch(small: Any) -> None:
    x, t, context = inputs(small, 3, 1)
    fast = FastUNet(small)
    together = fast.predict(x, t, context)
    for i in range(3):
        alone = fast.predict(x[i : i + 1], t[i : i + 1], context[i : i + 1])
        assert relative_error(together[i : i + 1], alone) < TOLERANCE


interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is for machines without a GPU"
)


@pytest.mark.parametrize("kernels", ["auto", pytest.param("triton", marks=interpreted)])
def test_half_precision_rule(small: Any, kernels: str) -> None:
    """Error of bf16 against f32 at most twice that of diffusers' own bf16 (style.md 4)."""
    if kernels == "triton":
        pytest.importorskip("triton")
    x, t, context = inputs(small, 2, 1, size=8)  # small, since Triton's interpreter is slow
    exact = Denoiser(small).predict(x, t, context)
    half = sd21_topology().eval()
    half.load_state_dict(small.state_dict())
    half = half.to(torch.bfloat16)
    theirs = relative_error(Denoiser(half).predict(x, t, context), exact)
    fast = FastUNet(half, FastUNetOptions(kernels=kernels))
    assert fast.dtype == torch.bfloat16
    assert relative_error(fast.predict(x, t, context), exact) <= 2.0 * theirs


@interpreted
def test_triton_kernels_agree_with_the_twins_in_the_whole(small: Any) -> None:
    pytest.importorskip("triton")
    x, t, context = inputs(small, 1, 2, size=8)
    results = []
    for kernels in ("reference", "triton"):
        fast = FastUNet(small, FastUNetOptions(kernels=kernels, geglu="fused"))
        results.append(fast.predict_prepared(x, t, fast.prepare(context)))
    assert relative_error(results[1], results[0]) < TOLERANCE


def test_phases_are_the_doubled_image_convolved() -> None:
    x, weight = torch.randn(2, 5, 3, 4), torch.randn(6, 5, 3, 3)
    doubled = nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
    expected = nn.functional.conv2d(doubled, weight, padding=1)
    phases = nn.functional.conv2d(x, phase_weights(weight), padding=1)
    ours = interleave_phases(phases.permute(0, 2, 3, 1).contiguous()).permute(0, 3, 1, 2)
    assert relative_error(ours, expected) < 1e-6


def test_channels_may_be_padded(small: Any) -> None:
    """As on a GPU, whose tensor cores take them in eights."""
    x, t, context = inputs(small, 2, 1)
    fast = FastUNet(small)
    expected = fast.predict(x, t, context)
    padded = pack(small, multiple=8)
    assert padded.conv_in.shape[1] == padded.conv_out.shape[0] == 8
    fast.packed = padded
    fast._forward.unet = padded
    assert relative_error(fast.predict(x, t, context), expected) < TOLERANCE


UNSUPPORTED = {
    "class_embed_type": dict(class_embed_type="timestep"),
    "time_cond_proj_dim": dict(time_cond_proj_dim=8),
    "resnet_time_scale_shift": dict(resnet_time_scale_shift="scale_shift"),
    "dual_cross_attention": dict(dual_cross_attention=True),
    "only_cross_attention": dict(only_cross_attention=True),
    "AttnDownBlock2D": dict(
        down_block_types=("AttnDownBlock2D", *("CrossAttnDownBlock2D",) * 3),
    ),
    "act_fn": dict(act_fn="gelu"),
    "addition_embed_type": dict(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=32,
    ),
    "mid_block_type": dict(mid_block_type="UNetMidBlock2D"),
}


@pytest.mark.parametrize("feature", UNSUPPORTED)
def test_unsupported_features_are_named(feature: str) -> None:
    with pytest.raises(SDIFastError, match=feature):
        FastUNet(sd21_topology(**UNSUPPORTED[feature]))


def test_attention_processors_hooks_and_freeu_are_refused() -> None:
    class Custom:
        def __call__(self, *args: Any, **kwargs: Any) -> None: ...

    unet = sd21_topology()
    unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Custom())
    with pytest.raises(SDIFastError, match="Custom"):
        FastUNet(unet)
    assert isinstance(make_denoiser(unet), Denoiser), "diffusers' module is the fallback"
    unet = sd21_topology()
    unet.enable_freeu(0.9, 0.2, 1.2, 1.4)
    with pytest.raises(SDIFastError, match="FreeU"):
        FastUNet(unet)
    unet = sd21_topology()
    unet.conv_in.register_forward_hook(lambda *args: None)
    with pytest.raises(SDIFastError, match="hook"):
        FastUNet(unet)


def test_wrong_arguments_are_named(small: Any) -> None:
    x, t, context = inputs(small, 2, 1)
    fast = FastUNet(small)
    cache = fast.prepare(context)
    for message, call in {
        "x: .*divisible by 8": lambda: fast.predict(x[..., :12], t, context),
        "x: expected shape": lambda: fast.predict(x[:, :3], t, context),
        "t: expected": lambda: fast.predict(x, t[:1], context),
        "context: expected shape": lambda: fast.prepare(context[..., :5]),
        "context: expected a multiple": lambda: fast.predict(x, t, context[:1]),
        "in the cache": lambda: fast.prepare(context[:, :3], cache),
        "attention: expected": lambda: FastUNetOptions(attention="fast"),
        "geglu: expected auto": lambda: FastUNetOptions(geglu="default"),
        "on a GPU to capture": lambda: CapturedUNet(fast, 2, (16, 16), cache),
        "kind: expected": lambda: make_denoiser(small, "fastest"),
    }.items():
        with pytest.raises(SDIFastError, match=message):
            call()


@pytest.mark.parametrize("t", [-1001, 1000])
def test_steps_outside_of_the_table_fail(small: Any, t: int) -> None:
    x, _, context = inputs(small, 1, 1)
    with pytest.raises((IndexError, RuntimeError)):
        FastUNet(small).predict(x, torch.tensor([t]), context)


def test_the_factory(small: Any) -> None:
    x, t, context = inputs(small, 2, 1)
    fast = make_denoiser(small, "fast")
    assert isinstance(fast, FastUNet) and fast.device.type == "cpu"
    assert isinstance(make_denoiser(small, "auto"), Denoiser), "on the CPU nothing changes"
    plain = make_denoiser(small)
    assert relative_error(fast.predict(x, t, context), plain.predict(x, t, context)) < TOLERANCE
    assert fast.n_calls == plain.n_calls == 1


def test_guidance_gives_a_shared_latent_once(small: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four conditions of two samples: two latents and eight texts; diffusers gets eight of both."""
    x, t, context = inputs(small, 2, 4)
    embeddings = context.unflatten(0, (4, 2))
    condition = Condition(embeddings, torch.tensor([[-0.5, -1.0], [-2.0, 0.3]]))
    seen: list[tuple[int, int]] = []
    fast, plain = FastUNet(small), Denoiser(small)
    for denoiser in (fast, plain):
        predict = denoiser.predict

        def watched(x: Tensor, t: Tensor, context: Tensor, predict: Any = predict) -> Tensor:
            seen.append((len(x), len(context)))
            return predict(x, t, context)

        monkeypatch.setattr(denoiser, "predict", watched)
    ours, theirs = (guided_output(d, x, t, condition, 7.5, "threestudio") for d in (fast, plain))
    assert seen == [(2, 8), (8, 8)]
    assert relative_error(ours, theirs) < 10 * TOLERANCE  # guidance enlarges differences


@pytest.fixture(scope="module")
def full_size() -> Any:
    """SD 2.1-base with random weights, scaled so that activations stay sane; its inputs; f32's
    result; and the error of diffusers in f16."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        unet = randomise(build(**SD21), 0.1).eval().requires_grad_(False).half()
    x, t = torch.randn(1, 4, 64, 64, device="cuda"), torch.tensor([-99], device="cuda")
    context = torch.randn(4, 77, 1024, device="cuda")
    rows = (x.repeat(4, 1, 1, 1), t.repeat(4), context)
    theirs = Denoiser(unet).predict(*rows)
    with torch.backends.cudnn.flags(allow_tf32=False):
        exact = Denoiser(copy.deepcopy(unet).float()).predict(*rows)
    return unet, (x, t, context), exact, relative_error(theirs, exact)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [FastUNetOptions(), FastUNetOptions(stored=False), FastUNetOptions(geglu="fused")],
    ids=["stored choices", "no choices", "fused GEGLU"],
)
def test_half_precision_rule_at_full_size(full_size: Any, options: FastUNetOptions) -> None:
    unet, (x, t, context), exact, error = full_size
    fast = FastUNet(unet, options)
    cache = fast.prepare(context)
    captured = CapturedUNet(fast, 1, (64, 64), cache)
    assert captured.check() < 1e-3
    for ours in (fast.predict_prepared(x, t, cache), captured(x, t)):
        assert relative_error(ours, exact) <= 2.0 * error


@pytest.mark.gpu
def test_fp8_at_full_size(full_size: Any) -> None:
    """The kernels and torch's product, eager and replayed, against the twins and against f32.

    Last bits that differ turn roundings to e4m3 over, and these others after them: at the end two
    ways to compute the same are as far apart as each is from f32 (on the CPU, f16 from f32: 0.2 to
    0.8 times as far), or 1.4 times, were their errors independent. test_rows8.py compares layer by
    layer.
    """
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("the GPU has no fp8")
    unet, (x, t, context), exact, _ = full_size
    twin = FastUNet(unet, FastUNetOptions(linears="fp8", kernels="reference"))
    expected = twin.predict(x, t, context)
    error = relative_error(expected, exact)
    assert error < 0.01, "on the CPU, f32 but for the linear layers, 0.003"
    fast = FastUNet(unet, FastUNetOptions(linears="fp8"))
    cache = fast.prepare(context)
    captured = CapturedUNet(fast, 1, (64, 64), cache)
    assert captured.check(tolerance=error) < error
    for ours in (fast.predict_prepared(x, t, cache), captured(x, t)):
        assert relative_error(ours, exact) < 1.2 * error
        assert relative_error(ours, expected) < 1.5 * error


@pytest.mark.gpu
def test_graphs_follow_their_inputs() -> None:
    """Two shapes that share memory, replayed in turn, against diffusers."""
    unet = randomise(sd21_topology()).cuda().eval().requires_grad_(False)
    graphed = make_denoiser(unet, "fast")
    assert isinstance(graphed, GraphedUNet)
    plain = Denoiser(unet)
    for seed in range(3):
        torch.manual_seed(seed)
        for batch, k in ((2, 1), (1, 4)):
            x, t, context = (v.cuda() for v in inputs(unet, batch, k))
            t = t + seed
            expected = plain.predict(x.repeat(k, 1, 1, 1), t.repeat(k), context)
            assert relative_error(graphed.predict(x, t, context), expected) < 1e-3  # TF32
    assert len(graphed.graphs) == 2 and graphed.n_calls == 6
