"""What can be chosen about the fast UNet."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...types import SDIFastError

CHOICES: dict[str, tuple[str, ...]] = {
    "kernels": ("auto", "triton", "reference"),
    "attention": ("measured", "default", "flash", "cudnn", "efficient", "math"),
    "geglu": ("auto", "measured", "separate", "fused"),
    "norms": ("auto", "measured"),
    "upsample": ("phase", "nearest", "measured"),
    "linears": ("exact", "fp8"),
}


@dataclass(frozen=True)
class FastUNetOptions:
    """How the fast UNet computes.

    "auto" measures nothing: of `geglu` and `norms` it takes the choice stored for the shape on such
    a GPU, where there is one and it runs, and else the safe default ("separate"; launches by the
    image's size). "measured" times some candidates per shape in `warm_up` where none is stored.
    """

    kernels: str = "auto"  # norms, GEGLU and interleaving
    attention: str = "measured"  # backend of scaled_dot_product_attention
    geglu: str = "auto"  # after the matrix product ("separate"), or inside of it ("fused")
    norms: str = "auto"  # one launch a group norm or two, and the shares of two
    upsample: str = "phase"  # 4 convolutions of 2 x 2 taps in place of 9 taps on the large image
    # "fp8": the linear layers of the transformer blocks in e4m3 (fp8.py), an approximation, where
    # `geglu` plays no part; "exact": all in the UNet's dtype
    linears: str = "exact"
    stored: bool = True  # begin with the choices that were measured on such a GPU
    cudnn_benchmark_limit: int = 10  # algorithms that cuDNN tries a shape; 0: all
    graphs: bool = True  # make_denoiser captures the calls on a GPU, one graph a shape
    n_train_steps: int = 1000
    # an inversion of n steps asks for t down to 1 - 1000 // n (methods.md G9): all n are served,
    # by 40 KB a step of SD 2.1's size in f16
    n_negative_steps: int = 1000

    def __post_init__(self) -> None:
        for field in fields(self):
            allowed = CHOICES.get(field.name)
            value = getattr(self, field.name)
            if allowed is not None and value not in allowed:
                raise SDIFastError(f"{field.name}: expected {', '.join(allowed)}, got {value!r}")
