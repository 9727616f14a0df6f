"""Score Distillation Sampling (methods.md B4, E).

    x = sqrt(a) z + sqrt(1 - a) eps,  eps ~ N(0, I)
    "latent": dL/dz = w(t) (e - eps) / B; w = 1 - a (threestudio) or s(t) (paper, eq. 4)
    "x0":     L = 0.5 mean((z - sg[x0hat])^2) / B, SDI's loss: its enable_sdi=false

z - x0hat = s(t) (e - eps), so "x0" has the paper's weight; its mean over N = C h w numbers where
"latent" sums makes it 1 / (B N) of that, the scale that SDI's other loss weights are made for.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..config import GuidanceConfig
from ..diffusion.guide import cfg_convention, guided_output
from ..diffusion.invert import DiffusionModel
from ..diffusion.prompt import Condition
from ..diffusion.schedule import draw_normal
from ..types import SDIFastError
from .base import GuidanceOutput, check_config, check_inputs, x0_loss

SDSLoss = Literal["latent", "x0"]


class SDS:
    """The baseline, with the same prompts and guidance options as SDI.

    Args:
        model: a schedule and a denoiser.
        config: the inversion's settings are not used.
        loss: which loss; see above. "latent" turns NaN gradients to zero, as threestudio does.
    """

    def __init__(
        self, model: DiffusionModel, config: GuidanceConfig, loss: SDSLoss = "latent"
    ) -> None:
        check_config(config)
        if loss not in ("latent", "x0"):
            raise SDIFastError(f"loss: expected 'latent' or 'x0', got {loss!r}")
        self.model = model
        self.config = config
        self.loss_name = loss

    @torch.no_grad()
    def target(
        self,
        latents: Tensor,  # [B, C, h, w] f32
        condition: Condition,
        t: Tensor,  # [B] i64, 0 to T - 1
        generator: torch.Generator | None,
        *,
        noise: Tensor | None = None,
    ) -> GuidanceOutput:
        """x0hat ("x0"), or z less the gradient ("latent").

        Args:
            noise: [B, C, h, w], used instead of drawing.
        """
        check_inputs(latents, condition, t)
        schedule, config = self.model.schedule, self.config
        z = latents.detach()
        if noise is None:
            if generator is None:
                raise SDIFastError("generator: expected a torch.Generator to draw noise, got None")
            noise = draw_normal(z.shape, generator, z)
        level = t.to(z.device, non_blocking=True)
        x = schedule.add_noise(z, noise, level)
        output = guided_output(
            self.model.denoiser, x, level, condition, config.guidance_scale, cfg_convention(config)
        )
        x0, eps = schedule.split(x, output, level)
        target = x0 if self.loss_name == "x0" else z - self._gradient(eps, noise, level)
        return GuidanceOutput(
            target=target,
            kappa=noise,
            latents_inverted=x,
            noise_pred=eps,
            t=t,
            delta=torch.zeros_like(t),
            n_unet_calls=1,
        )

    def _gradient(self, eps: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        schedule = self.model.schedule
        if self.config.variant == "paper":
            weight = schedule.sigma(level)
        else:
            weight = 1.0 - schedule.alpha(level)
        return torch.nan_to_num(weight.to(eps.dtype).view(-1, 1, 1, 1) * (eps - noise))

    def loss(
        self,
        latents: Tensor,  # [B, C, h, w] f32, with a gradient
        output: GuidanceOutput,
    ) -> Tensor:
        """Scalar; "latent" is 0.5 sum((z - target)^2) / B, whose gradient is the one above."""
        if self.loss_name == "x0":
            return x0_loss(latents, output.target)
        return 0.5 * (latents - output.target.detach()).square().sum() / latents.shape[0]
