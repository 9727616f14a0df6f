"""What can be chosen about the fast UNet."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ...types import SDIFastError

CHOICES: dict[str, tuple[str, ...]] = {
    "mode": ("eager", "compile"),
    "kernels": ("auto", "triton", "reference"),
    "attention": ("measured", "default", "flash", "cudnn", "efficient", "math"),
    "conv": ("cudnn", "measured", "triton", "padded"),
    "geglu": ("separate", "measured", "fused"),
    "norms": ("auto", "measured"),
    "upsample": ("phase", "nearest", "measured"),
}


@dataclass(frozen=True)
class FastUNetOptions:
    """How the fast UNet computes.

    "measured" times some candidates per shape in `warm_up`, where no choice for the GPU is stored.
    """

    mode: str = "eager"  # "compile": torch.compile; leave CUDA graphs to CapturedUNet
    compile_mode: str | None = None  # torch.compile's mode
    kernels: str = "auto"  # norms, GEGLU and interleaving; in compile mode "auto" is "reference"
    attention: str = "measured"  # backend of scaled_dot_product_attention
    conv: str = "cudnn"  # the resnets' convolutions; "padded": Hopper's copy engine
    geglu: str = "separate"  # after the matrix product, or inside of it
    norms: str = "auto"  # one launch a group norm or two, and the shares of two
    upsample: str = "phase"  # 4 convolutions of 2 x 2 taps in place of 9 taps on the large image
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
        if self.mode == "compile" and self.kernels == "triton":
            raise SDIFastError(
                'kernels: expected "auto" or "reference" with mode = "compile", whose compiler '
                'fuses on its own, got "triton"'
            )
