"""A small image-text scorer for toyworld, trained contrastively as CLIP is.

Images [B, 3, 64, 64] in [0, 1] and captions go to unit vectors of EMBED numbers; their product is
the CLIP-like score. It knows toyworld only: it tells captions apart, it does not judge beauty.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..types import SDIFastError
from .tokenizer import CONTEXT_LENGTH, load_tokenizer, token_ids

EMBED = 128
TEXT_DIM = 96
IMAGE_PIXELS = 64
SCORER_FILES = ("scorer/config.json", "scorer/model.safetensors", "tokenizer/vocab.json")
_WEIGHTS = Path(__file__).parent / "weights"


class _Block(nn.Module):
    """Two convolutions round a skip, after a strided one."""

    def __init__(self, n_in: int, n_out: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(n_in, n_out, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(8, n_out)
        self.conv = nn.Conv2d(n_out, n_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.conv(F.silu(self.norm(x)))


class Scorer(nn.Module):
    """Image and text towers and the temperature between them."""

    def __init__(self, vocab_size: int, tokenizer: Any = None) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer
        widths = (3, 32, 64, 96, 128)
        self.blocks = nn.ModuleList(_Block(a, b) for a, b in zip(widths, widths[1:], strict=False))
        self.image_norm = nn.GroupNorm(8, widths[-1])
        self.image_head = nn.Linear(widths[-1] * 16, EMBED)  # 4 x 4 cells: left and right matter
        self.words = nn.Embedding(vocab_size, TEXT_DIM)
        self.positions = nn.Parameter(torch.randn(CONTEXT_LENGTH, TEXT_DIM) * 0.02)
        self.mixer = nn.TransformerEncoderLayer(
            TEXT_DIM, 4, 2 * TEXT_DIM, dropout=0.0, batch_first=True, norm_first=True
        )
        self.text_head = nn.Linear(TEXT_DIM, EMBED)
        self.log_scale = nn.Parameter(torch.tensor(2.3))

    def embed_images(self, images: Tensor) -> Tensor:
        """[B, EMBED] unit vectors of `images` [B, 3, 64, 64] in [0, 1]."""
        x = images * 2.0 - 1.0
        for block in self.blocks:
            x = block(x)
        x = F.silu(self.image_norm(x)).flatten(1)
        return F.normalize(self.image_head(x), dim=-1)

    def embed_tokens(self, ids: Tensor) -> Tensor:
        """[B, EMBED] unit vectors of token `ids` [B, CONTEXT_LENGTH] i64."""
        # the first end-of-text token, and what pads after it, is the vocabulary's last entry
        real = ids != self.vocab_size - 1  # [B, L]; the start token makes each row non-empty
        x = self.words(ids) + self.positions
        x = self.mixer(x, src_key_padding_mask=~real)
        weight = real.to(x.dtype)[..., None]
        pooled = (x * weight).sum(1) / weight.sum(1)
        return F.normalize(self.text_head(pooled), dim=-1)

    @torch.no_grad()
    def image_features(self, images: Tensor) -> Tensor:
        """[B, EMBED] unit vectors of `images` [B, 3, H, W] in [0, 1], resized to 64 x 64."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise SDIFastError(f"images: expected [B, 3, H, W], got {list(images.shape)}")
        size = (IMAGE_PIXELS, IMAGE_PIXELS)
        if images.shape[-2:] != size:
            images = F.interpolate(images, size, mode="bilinear", antialias=True)
        return self.embed_images(images.float())

    @torch.no_grad()
    def text_features(self, texts: list[str]) -> Tensor:
        """[len(texts), EMBED] unit vectors of captions."""
        ids = token_ids(self.tokenizer, texts).to(self.positions.device)
        return self.embed_tokens(ids)

    def similarity(self, images: Tensor, texts: list[str]) -> Tensor:
        """[len(texts)] mean cosine between `images` [B, 3, H, W] and each text."""
        return self.text_features(texts) @ self.image_features(images).mean(0)

    def rank(self, images: Tensor, caption: str, candidates: list[str]) -> int:
        """Place of `caption` among `candidates` (it is one of them), 1 is best."""
        if caption not in candidates:
            raise SDIFastError(f"candidates: expected the caption {caption!r} among them")
        scores = self.similarity(images, candidates)
        return 1 + int((scores > scores[candidates.index(caption)]).sum())

    @classmethod
    def load(cls, path: str | Path | None = None) -> Scorer:
        """The scorer of a toyworld folder; None: the bundled one."""
        from safetensors.torch import load_file

        folder = _WEIGHTS if path is None else Path(path)
        missing = [f for f in SCORER_FILES if not (folder / f).is_file()]
        if missing:
            raise SDIFastError(f"scorer: expected weights in {str(folder)!r}, missing {missing[0]}")
        config = json.loads((folder / "scorer" / "config.json").read_text())
        scorer = cls(int(config["vocab_size"]), load_tokenizer(folder / "tokenizer"))
        weights = load_file(folder / "scorer" / "model.safetensors")
        scorer.load_state_dict({k: v.float() for k, v in weights.items()})
        return scorer.eval().requires_grad_(False)


def write_scorer_config(scorer: Scorer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "sdi_fast.toyworld.Scorer", "vocab_size": scorer.vocab_size}
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
