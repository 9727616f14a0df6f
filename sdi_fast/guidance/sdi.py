"""Score Distillation via Inversion (methods.md B5 to B11, C, G).

kappa, x = inversion of z to level t + delta under negative guidance
target   = x0 predicted from x (threestudio) or from sqrt(a) z + sqrt(1 - a) kappa (paper),
           both labelled t, under positive guidance
loss     = 0.5 mean((z - sg[target])^2) / B
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import GuidanceConfig
from ..diffusion.guide import cfg_convention, guided_output
from ..diffusion.invert import DiffusionModel, ddim_invert, plan_inversion
from ..diffusion.invert_graph import InversionGraphs
from ..diffusion.prompt import Condition
from ..diffusion.schedule import draw_delta
from ..diffusion.shortcuts import check_shortcuts
from ..types import SDIFastError
from .base import GuidanceOutput, check_config, check_inputs, x0_loss

MAX_SHAPES = 2  # batches, say, whose buffers and graphs are kept


class SDI:
    """The method of the paper, in both of its variants.

    Args:
        model: a schedule and a denoiser.
        config: `variant` decides the level mismatch, the entropy noise, tau and the number of
            inversion steps together (methods.md G1 to G3, G5).
        static: compute from fixed buffers, on a GPU as captured graphs; None: as `config` says.
            The noise then comes from a stream of its own, seeded anew by `generator` at every
            target, so that the generator remains all of the state that a run has to keep.
    """

    def __init__(
        self, model: DiffusionModel, config: GuidanceConfig, *, static: bool | None = None
    ) -> None:
        check_config(config)
        self.model = model
        self.config = config
        self.static = bool(config.static if static is None else static)
        check_shortcuts(model.denoiser, config.shortcuts, self.static)
        self._graphs: list[InversionGraphs] = []  # of the shapes seen last, the last one first

    @torch.no_grad()
    def target(
        self,
        latents: Tensor,  # [B, C, h, w] f32
        condition: Condition,
        t: Tensor,  # [B] i64, 2 to T - 1, best on the CPU
        generator: torch.Generator | None,
        *,
        delta: Tensor | None = None,
        eta_noise: Tensor | None = None,
    ) -> GuidanceOutput:
        """The denoised target of z at level t.

        Args:
            delta: [B] i64, how far beyond t to invert; drawn where None.
            eta_noise: the inversion's noise, see ddim_invert; drawn where None.

        Raises:
            SDIFastError: for a t at or below 1, or something to draw without a generator.
        """
        check_inputs(latents, condition, t)
        schedule, config = self.model.schedule, self.config
        if delta is None:
            delta = draw_delta(len(t), _needed(generator), config, schedule.n_train_steps)
        z = latents.detach()
        if self.static:
            return self._static_target(z, condition, t, delta, generator, eta_noise)
        plan = plan_inversion(schedule, t.tolist(), delta.tolist(), config)
        inversion = ddim_invert(
            self.model, z, condition, plan, config, eta_noise=eta_noise, generator=generator
        )
        level = t.to(z.device, non_blocking=True)
        x = inversion.latents_inverted
        if config.variant == "paper":
            x = schedule.add_noise(z, inversion.kappa, level)
        output = guided_output(
            self.model.denoiser,
            x,
            level,
            condition,
            config.guidance_scale,
            cfg_convention(config),
        )
        x0, eps = schedule.split(x, output, level)
        return GuidanceOutput(
            target=x0,
            kappa=inversion.kappa,
            latents_inverted=inversion.latents_inverted,
            noise_pred=eps,
            t=t,
            delta=delta,
            n_unet_calls=inversion.n_unet_calls + 1,
        )

    def _graphs_of(self, z: Tensor, condition: Condition) -> InversionGraphs:
        fitting = [g for g in self._graphs if g.fits(z, condition)]
        others = [g for g in self._graphs if g not in fitting][: MAX_SHAPES - 1]
        self._graphs = []  # lets go of the oldest before a new one takes memory
        if not fitting:
            with torch.inference_mode(False):  # buffers of that mode could not be written later
                fitting = [InversionGraphs(self.model, self.config, z, condition)]
        self._graphs = [*fitting, *others]
        return fitting[0]

    def _static_target(
        self,
        z: Tensor,
        condition: Condition,
        t: Tensor,
        delta: Tensor,
        generator: torch.Generator | None,
        eta_noise: Tensor | None,
    ) -> GuidanceOutput:
        graphs = self._graphs_of(z, condition)
        if eta_noise is None and self.config.inversion_eta != 0.0:
            graphs.reseed(_needed(generator, "the inversion's noise"))
        out = graphs.target(z, condition, t.tolist(), delta.tolist(), eta_noise=eta_noise)
        return GuidanceOutput(
            target=out.target,
            kappa=out.kappa,
            latents_inverted=out.latents_inverted,
            noise_pred=out.noise_pred,
            t=t,
            delta=delta,
            n_unet_calls=out.n_unet_calls,
        )

    def loss(
        self,
        latents: Tensor,  # [B, C, h, w] f32, with a gradient
        output: GuidanceOutput,
    ) -> Tensor:
        """Methods.md C8, scalar."""
        return x0_loss(latents, output.target)


def _needed(generator: torch.Generator | None, what: str = "delta") -> torch.Generator:
    if generator is None:
        raise SDIFastError(f"generator: expected a torch.Generator to draw {what}, got None")
    return generator
