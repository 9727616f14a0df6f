"""The fast VAE encoder against diffusers': outputs and gradients of the image."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from torch import Tensor

import sdi_fast
from sdi_fast.diffusion.encoder import LatentEncoder
from sdi_fast.diffusion.encoder_graph import EncoderGraph, EncoderGraphs
from sdi_fast.diffusion.fast_encoder import FastEncoder, power_of_two_scale
from sdi_fast.diffusion.vae_pack import pack_encoder
from sdi_fast.types import SDIFastError

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOYWORLD = Path(sdi_fast.__file__).parent / "toyworld" / "weights" / "vae"
# f32: sums in another order, biases added at another place
TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4
FORMS: dict[str, dict[str, Any]] = {
    "two levels": dict(block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1),
    "three levels": dict(block_out_channels=(32, 64, 64), layers_per_block=2),
    "no attention": dict(
        block_out_channels=(16, 24), norm_num_groups=8, mid_block_add_attention=False
    ),
    "no quant_conv": dict(
        block_out_channels=(16, 16), norm_num_groups=2, use_quant_conv=False, latent_channels=6
    ),
}


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    """f32 convolutions in f32 on a GPU too, so that f32's tolerances hold there."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def vae_of(**kwargs: Any) -> Any:
    """Random weights, with biases and norms far from their initialisation."""
    from diffusers import AutoencoderKL

    n = len(kwargs["block_out_channels"])
    torch.manual_seed(3)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * n,
        up_block_types=("UpDecoderBlock2D",) * n,
        **kwargs,
    )
    with torch.no_grad():
        for parameter in vae.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return vae.eval().requires_grad_(False).to(DEVICE)


def toyworld() -> Any:
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(TOYWORLD)
    return vae.eval().requires_grad_(False).to(DEVICE)


def random_image(*shape: int, seed: int = 0) -> Tensor:
    return 2 * torch.rand(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) - 1


def by_diffusers(vae: Any, x: Tensor, grad: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Its result, a random cotangent of it, and the image's gradient for that."""
    leaf = x.clone().requires_grad_()
    dtype = next(vae.parameters()).dtype
    out = vae.encode(leaf.to(dtype)).latent_dist.parameters
    if grad is None:
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    out.backward(grad)
    assert leaf.grad is not None
    return out.detach(), grad, leaf.grad


def by_us(graphs: EncoderGraphs, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = graphs(leaf)
    out.backward(grad)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


@pytest.mark.parametrize("form", [*FORMS, "toyworld"])
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 32, 32), (1, 16, 64)])
def test_value_and_gradient_are_diffusers(form, batch, height, width):
    vae = toyworld() if form == "toyworld" else vae_of(**FORMS[form])
    x = random_image(batch, 3, height, width)
    out, grad, grad_x = by_diffusers(vae, x)
    ours, ours_x = by_us(EncoderGraphs(FastEncoder(pack_encoder(vae)), DEVICE == "cuda"), x, grad)
    assert relative_error(ours, out) < TOLERANCE
    assert relative_error(ours_x, grad_x) < GRADIENT_TOLERANCE
    assert grad_x.norm() > 0


@pytest.mark.parametrize("form", [*FORMS, "toyworld"])
def test_in_f64_nothing_but_rounding_is_left(form):
    if DEVICE == "cuda":
        pytest.skip("checks the formulas; the GPU has the test above")
    vae = (toyworld() if form == "toyworld" else vae_of(**FORMS[form])).double()
    x = random_image(1, 3, 16, 16).double()
    out, grad, grad_x = by_diffusers(vae, x)
    ours, ours_x = by_us(EncoderGraphs(FastEncoder(pack_encoder(vae)), False), x, grad)
    assert relative_error(ours, out) < 1e-12
    assert relative_error(ours_x, grad_x) < 1e-12


def test_triton_runs_in_it():
    """All of the encoder with the kernel, interpreted where there is no GPU."""
    pytest.importorskip("triton")
    vae = vae_of(**FORMS["two levels"])
    x = random_image(1, 3, 16, 16)
    out, grad, grad_x = by_diffusers(vae, x)
    encoder = FastEncoder(pack_encoder(vae), backend="triton")
    y, tape = encoder.forward(x)
    assert relative_error(y, out) < TOLERANCE
    assert relative_error(encoder.backward(grad, tape), grad_x) < GRADIENT_TOLERANCE


def test_a_late_backward_finds_its_own_activations():
    vae = vae_of(**FORMS["two levels"])
    graphs = EncoderGraphs(FastEncoder(pack_encoder(vae)), DEVICE == "cuda")
    images = [random_image(1, 3, 16, 16, seed=s).requires_grad_() for s in range(2)]
    outs = [graphs(x) for x in images]
    kept = outs[0].detach().clone()
    cotangents = [torch.ones_like(o) for o in outs]
    for i in (0, 1):  # 0's activations are those of image 1 by now, then 1's those of image 0
        outs[i].backward(cotangents[i])
    assert torch.equal(outs[0].detach(), kept)
    for x, g in zip(images, cotangents, strict=True):
        _, _, expected = by_diffusers(vae, x.detach(), g)
        assert relative_error(x.grad, expected) < GRADIENT_TOLERANCE


def test_half_precision_is_as_good_as_diffusers():
    """Both in f16 against f32, with a gradient as small as the loss's (methods.md G11)."""
    vae = vae_of(**FORMS["three levels"])
    x = random_image(1, 3, 32, 32)
    out, grad, grad_x = by_diffusers(vae, x)
    half = vae_of(**FORMS["three levels"]).half()
    theirs, _, theirs_x = by_diffusers(half, x, grad.half())
    graphs = EncoderGraphs(FastEncoder(pack_encoder(half)), DEVICE == "cuda")
    assert graphs.encoder.packed.conv_in.weight.shape[1] == 8  # padded for tensor cores
    for scale in (1.0, 6e-5, 1e-9):
        ours, ours_x = by_us(graphs, x, grad * scale)
        assert relative_error(ours, out) < 2 * relative_error(theirs, out)
        assert relative_error(ours_x / scale, grad_x) < 2 * relative_error(theirs_x, grad_x)


@pytest.mark.parametrize("sample", [True, False])
def test_the_latent_encoder_takes_it(sample):
    vae = toyworld()
    images = (random_image(2, 3, 50, 50) + 1) / 2  # to be resized
    both = []
    for kind in ("diffusers", "fast"):
        x = images.clone().requires_grad_()
        encoder = LatentEncoder(vae, 64, kind)
        assert (encoder.fast is not None) == (kind == "fast")
        latents = encoder.encode(x, torch.Generator().manual_seed(1), sample)
        latents.square().mean().backward()
        both.append((latents.detach(), x.grad))
    for ours, theirs, allowed in zip(*both[::-1], (TOLERANCE, GRADIENT_TOLERANCE), strict=True):
        assert relative_error(ours, theirs) < allowed


def test_a_gradient_that_is_not_finite_stays_visible():
    vae = vae_of(**FORMS["two levels"]).half()
    graphs = EncoderGraphs(FastEncoder(pack_encoder(vae)), DEVICE == "cuda")
    for value, finite in ((0.0, True), (float("nan"), False), (float("inf"), False)):
        x = random_image(1, 3, 16, 16).requires_grad_()
        out = graphs(x)
        out.backward(torch.full_like(out, value))
        assert bool(torch.isfinite(x.grad).all()) is finite


def test_the_scale_is_a_power_of_two_near_the_largest_entry():
    for largest in (6e-5, 3.0, 1e-20):
        scale = power_of_two_scale(torch.tensor([0.1 * largest, -largest]))
        assert float(torch.log2(scale)).is_integer()
        assert 0.7 < float(scale) * largest < 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vae: vae.enable_tiling(), "tiling and slicing"),
        (lambda vae: setattr(vae.encoder, "conv_act", torch.nn.ReLU()), "the activation ReLU"),
        (lambda vae: setattr(vae.encoder.mid_block.attentions[0], "heads", 2), "the attention"),
        (
            lambda vae: setattr(vae.encoder.down_blocks[0].resnets[0], "output_scale_factor", 2.0),
            "the block ResnetBlock2D",
        ),
        (
            lambda vae: setattr(vae.encoder.conv_in, "dilation", (2, 2)),
            "the convolution Conv2d",
        ),
    ],
)
def test_a_vae_of_another_kind_is_refused_or_left_to_diffusers(change, message):
    vae = vae_of(**FORMS["two levels"])
    change(vae)
    with pytest.raises(SDIFastError, match=f"vae: the fast encoder does not support {message}"):
        LatentEncoder(vae, 16, "fast")
    assert LatentEncoder(vae, 16, "auto").fast is None


def test_changed_modules_are_refused():
    """Each computes something else than its class says."""

    class Processor:
        def __call__(self, *args: Any, **kwargs: Any) -> None:
            raise NotImplementedError

    class Conv(torch.nn.Conv2d):
        pass

    def hooked(vae: Any) -> None:
        vae.encoder.conv_in.register_forward_hook(lambda *args: None)

    def processed(vae: Any) -> None:
        vae.encoder.mid_block.attentions[0].processor = Processor()

    def derived(vae: Any) -> None:
        vae.encoder.down_blocks[0].resnets[0].conv1.__class__ = Conv

    for change, message in (
        (hooked, "forward hooks at 'conv_in'"),
        (processed, "the processor Processor at"),
        (derived, "the layer Conv at"),
    ):
        vae = vae_of(**FORMS["two levels"])
        change(vae)
        with pytest.raises(SDIFastError, match=message):
            pack_encoder(vae)


def test_buffers_made_in_inference_mode_serve_later():
    graphs = EncoderGraphs(FastEncoder(pack_encoder(vae_of(**FORMS["two levels"]))), capture=False)
    x = torch.rand(1, 3, 16, 16) * 2 - 1
    with torch.inference_mode():
        first = graphs(x)
    leaf = x.clone().requires_grad_()
    assert torch.equal(graphs(leaf).detach(), first)
    graphs(leaf).sum().backward()
    assert leaf.grad is not None and leaf.grad.isfinite().all()


def test_bad_images_are_named():
    graphs = EncoderGraphs(FastEncoder(pack_encoder(vae_of(**FORMS["two levels"]))), False)
    with pytest.raises(SDIFastError, match=r"images: expected \[B, 3, H, W\]"):
        graphs(torch.zeros(1, 4, 16, 16))
    with pytest.raises(SDIFastError, match="images: expected sides divisible by 2"):
        graphs(torch.zeros(1, 3, 15, 16))
    with pytest.raises(SDIFastError, match="kind: expected diffusers, fast, auto"):
        LatentEncoder(vae_of(**FORMS["two levels"]), 16, "quick")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_replays_are_what_is_computed_outside_of_the_graphs(dtype):
    vae = vae_of(**FORMS["three levels"]).to(dtype)
    x = random_image(1, 3, 64, 64)
    graph = EncoderGraph(FastEncoder(pack_encoder(vae)), x, capture=True)
    for seed in range(2):
        x = random_image(1, 3, 64, 64, seed=seed)
        grad = torch.randn(1, 8, 16, 16, device="cuda") * 1e-4
        assert graph.check(x, grad) < 1e-3
