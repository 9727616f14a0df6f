"""Score distillation methods, one file each."""

from __future__ import annotations

from ..config import GuidanceConfig
from ..diffusion.invert import DiffusionModel
from ..types import SDIFastError
from .base import Guidance, GuidanceOutput, x0_loss
from .sdi import SDI
from .sds import SDS, SDSLoss

__all__ = ["SDI", "SDS", "Guidance", "GuidanceOutput", "make_guidance", "x0_loss"]


def make_guidance(
    pipeline: DiffusionModel,
    config: GuidanceConfig,
    *,
    sds_loss: SDSLoss = "x0",
) -> Guidance:
    """The method that `config.method` names.

    Args:
        sds_loss: "x0" puts SDS on SDI's loss, so that the two differ in their noise alone and
            the other losses' weights keep their meaning; "latent" is threestudio's SDS.

    Raises:
        SDIFastError: for a method of no known name, or a setting out of range.
    """
    if config.method == "sdi":
        return SDI(pipeline, config)
    if config.method == "sds":
        if config.static:
            raise SDIFastError('static: expected false with method "sds", which inverts nothing')
        return SDS(pipeline, config, loss=sds_loss)
    raise SDIFastError(f"method: expected 'sdi' or 'sds', got {config.method!r}")
