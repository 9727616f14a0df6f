"""Prompts: checks, text embeddings, view suffixes, Perp-Neg interpolation (methods.md C4).

Azimuths and elevations are [B] f32 in degrees, azimuth 0 looks at the front. Text is only ever
given to the tokenizer: it is no path and no template here.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config_io import check_prompt
from ..constants import (
    BACK_AZIMUTH_DEG,
    FRONT_AZIMUTH_DEG,
    OVERHEAD_ELEVATION_DEG,
    PERP_NEG_BACK_FRONT,
    PERP_NEG_FRONT_SIDE,
    PERP_NEG_SIDE_BACK,
    VIEW_NAMES,
)
from ..types import SDIFastError

SIDE, FRONT, BACK, OVERHEAD = range(len(VIEW_NAMES))


def shifted_decay(coefficients: tuple[float, float, float], r: Tensor) -> Tensor:
    """f(A, B, C; r) = A exp(-B r) + C, in r's shape."""
    a, b, c = coefficients
    return a * torch.exp(-b * r) + c


def wrap_azimuth(azimuth_deg: Tensor) -> Tensor:
    """`azimuth_deg` shifted by full turns into [-180, 180)."""
    return (azimuth_deg + 180.0) % 360.0 - 180.0


def view_index(
    azimuth_deg: Tensor,  # [B] f32, degrees
    elevation_deg: Tensor,  # [B] f32, degrees
) -> Tensor:
    """Index into VIEW_NAMES of the discrete choice, [B] i64."""
    azimuth = wrap_azimuth(azimuth_deg).abs()
    view = torch.full_like(azimuth, SIDE, dtype=torch.long)
    view = torch.where(azimuth < FRONT_AZIMUTH_DEG, FRONT, view)
    view = torch.where(azimuth > BACK_AZIMUTH_DEG, BACK, view)
    return torch.where(elevation_deg > OVERHEAD_ELEVATION_DEG, OVERHEAD, view)


@dataclass(frozen=True)
class Condition:
    """What the UNet is told of each of B samples."""

    embeddings: Tensor  # [K, B, T, D]: positive, unconditional(, negative 1, negative 2)
    neg_weights: Tensor | None  # [B, 2] f32 where K = 4 (Perp-Neg), else None

    @property
    def n_conditions(self) -> int:
        return int(self.embeddings.shape[0])

    @property
    def batch_size(self) -> int:
        return int(self.embeddings.shape[1])

    def select(self, rows: Tensor) -> Condition:
        """The condition of the samples `rows` [M] i64 only."""
        weights = None if self.neg_weights is None else self.neg_weights[rows]
        return Condition(self.embeddings[:, rows], weights)


class PromptEmbeddings:
    """The embeddings of one prompt's four views and of the unconditional text.

    Args:
        views: [4, T, D] f32, in the order of VIEW_NAMES.
        uncond: [T, D] f32, of the negative prompt, "" by default.
    """

    def __init__(self, views: Tensor, uncond: Tensor) -> None:
        if views.shape != (len(VIEW_NAMES), *uncond.shape):
            raise SDIFastError(
                f"views: expected shape {(len(VIEW_NAMES), *uncond.shape)}, "
                f"got {tuple(views.shape)}"
            )
        self.views = views
        self.uncond = uncond

    @classmethod
    def encode(
        cls, text_encoder: TextEncoder, prompt: str, negative_prompt: str = ""
    ) -> PromptEmbeddings:
        """Runs the text encoder once for all that a run needs."""
        return text_encoder.encode(prompt, negative_prompt=negative_prompt)

    def condition(
        self,
        azimuth_deg: Tensor,  # [B] f32, degrees
        elevation_deg: Tensor,  # [B] f32, degrees
        perp_neg: bool = True,
    ) -> Condition:
        """The condition for B views, by lookup and interpolation; no host sync."""
        if azimuth_deg.ndim != 1 or azimuth_deg.shape != elevation_deg.shape:
            raise SDIFastError(
                "azimuth_deg, elevation_deg: expected two [B] tensors, got shapes "
                f"{tuple(azimuth_deg.shape)} and {tuple(elevation_deg.shape)}"
            )
        device = self.views.device
        azimuth = azimuth_deg.to(device, torch.float32, non_blocking=True)
        elevation = elevation_deg.to(device, torch.float32, non_blocking=True)
        if perp_neg:
            return self._perp_neg(azimuth, elevation)
        positive = self.views[view_index(azimuth, elevation)]
        return Condition(torch.stack([positive, self._uncond_like(positive)]), None)

    def _uncond_like(self, embeddings: Tensor) -> Tensor:
        return self.uncond.expand_as(embeddings)

    def _perp_neg(self, azimuth: Tensor, elevation: Tensor) -> Condition:
        """Interpolated positive, two negatives and their weights (methods.md C4)."""
        azimuth = wrap_azimuth(azimuth).abs()
        is_front = azimuth < 90.0
        is_overhead = elevation > OVERHEAD_ELEVATION_DEG
        r = torch.where(is_front, 1.0, 2.0) - azimuth / 90.0

        near = torch.where(is_front, FRONT, SIDE)
        far = torch.where(is_front, SIDE, BACK)
        blend = r.view(-1, 1, 1)
        positive = blend * self.views[near] + (1.0 - blend) * self.views[far]
        overhead = is_overhead.view(-1, 1, 1)
        positive = torch.where(overhead, self.views[OVERHEAD], positive)

        uncond = self._uncond_like(positive)
        # From the front the negatives are front and side; from behind, side and front. Overhead
        # they are the unconditional text with weight zero, as in the official code.
        first = torch.where(overhead, uncond, self.views[near])
        second = torch.where(overhead, uncond, self.views[torch.where(is_front, SIDE, FRONT)])
        weights = -torch.stack(
            [
                torch.where(
                    is_front,
                    shifted_decay(PERP_NEG_FRONT_SIDE, r),
                    shifted_decay(PERP_NEG_SIDE_BACK, r),
                ),
                torch.where(
                    is_front,
                    shifted_decay(PERP_NEG_FRONT_SIDE, 1.0 - r),
                    shifted_decay(PERP_NEG_BACK_FRONT, r),
                ),
            ],
            dim=-1,
        )
        weights = torch.where(is_overhead[:, None], 0.0, weights)
        return Condition(torch.stack([positive, uncond, first, second]), weights)


class TextEncoder:
    """A frozen CLIP text model with its tokenizer.

    It is needed once a run, so it lives on the CPU and visits `device` only while it encodes.

    Args:
        model: a CLIPTextModel.
        tokenizer: its CLIPTokenizer.
        device: where embeddings are computed and left.
    """

    def __init__(self, model: Any, tokenizer: Any, device: torch.device | str = "cpu") -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        self.n_tokens = min(
            int(tokenizer.model_max_length), int(model.config.max_position_embeddings)
        )
        self._warned = False

    @property
    def embedding_dim(self) -> int:
        return int(self.model.config.hidden_size)

    def encode(self, prompt: str, negative_prompt: str = "") -> PromptEmbeddings:
        """The embeddings of `prompt` seen from four sides and of the unconditional text.

        Raises:
            SDIFastError: for a prompt that check_prompt refuses.
        """
        text = check_prompt(prompt)
        negative = check_prompt(negative_prompt, "negative_prompt", allow_empty=True)
        embeddings = self.embed([*(f"{text}, {view} view" for view in VIEW_NAMES), negative])
        return PromptEmbeddings(embeddings[:-1], embeddings[-1])

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """The last hidden states of `texts`, [n, T, D] f32, padded to the full length.

        No attention mask is passed: Stable Diffusion was trained with the padding attended to.
        """
        longest = max(
            len(ids) for ids in self.tokenizer(texts, truncation=False, verbose=False).input_ids
        )
        if longest > self.n_tokens and not self._warned:
            self._warned = True
            warnings.warn(
                f"the prompt with its view has {longest} tokens; the text encoder reads the first "
                f"{self.n_tokens} and ignores the rest, the view included",
                stacklevel=3,
            )
        ids = self.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=self.n_tokens,
            return_tensors="pt",
        ).input_ids
        self.model.to(self.device)
        try:
            hidden = self.model(ids.to(self.device)).last_hidden_state.float()
        finally:
            self.model.to("cpu")
        if not math.isfinite(float(hidden.sum())):
            raise SDIFastError("text encoder: expected finite embeddings, got NaN or infinity")
        return hidden
