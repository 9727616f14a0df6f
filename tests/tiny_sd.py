"""A tiny, untrained Stable Diffusion in diffusers' layout, for tests.

16 x 16 x 3 images, 8 x 8 x 4 latents, 24 tokens of width 32. The same seed gives the same
weights. Building it takes well under a second.
"""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CONTEXT_LENGTH = 24
WIDTH = 32
IMAGE_SIZE = 16
SAMPLE_SIZE = 8
START, END = "<|startoftext|>", "<|endoftext|>"
SCHEDULER = {
    "_class_name": "PNDMScheduler",  # as Stable Diffusion 2.1-base ships it
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def byte_alphabet() -> list[str]:
    """The 256 printable stand-ins of bytes in byte-level BPE."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def write_tokenizer(folder: Path) -> int:
    """A CLIP tokenizer of single bytes; returns the size of its vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    alphabet = byte_alphabet()
    vocab = {c: i for i, c in enumerate([*alphabet, *(c + "</w>" for c in alphabet), START, END])}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": END,
    }
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return len(vocab)


def build_models(vocab_size: int, seed: int = 0) -> dict[str, Any]:
    """vae, unet and text_encoder with random weights, f32."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=1,
            norm_num_groups=4,
            sample_size=IMAGE_SIZE,
        )
        unet = UNet2DConditionModel(
            sample_size=SAMPLE_SIZE,
            block_out_channels=(16, 32),
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=WIDTH,
            attention_head_dim=(2, 4),
            norm_num_groups=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=vocab_size,
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=CONTEXT_LENGTH,
                bos_token_id=vocab_size - 2,
                eos_token_id=vocab_size - 1,
                pad_token_id=vocab_size - 1,
            )
        )
    return {"vae": vae, "unet": unet, "text_encoder": text_encoder}


def make_tiny_sd(
    folder: str | Path,
    *,
    prediction_type: str = "epsilon",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    text_prefix: str | None = None,
    seed: int = 0,
) -> Path:
    """Writes a whole pipeline into `folder` and returns it.

    Args:
        prediction_type: written into the scheduler's config; the weights are the same.
        dtype: in which the weights are stored.
        variant: "fp16" puts that into the file names.
        text_prefix: "" or "text_model." names the text encoder's weights as transformers 5 or
            4 would; None as the installed one does.
    """
    folder = Path(folder)
    vocab_size = write_tokenizer(folder / "tokenizer")
    with contextlib.redirect_stderr(io.StringIO()):  # progress bars
        models = build_models(vocab_size, seed)
        for name, model in models.items():
            path = folder / name
            if name == "text_encoder":
                model.config.save_pretrained(path)
            else:
                model.save_config(path)
            stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
            suffix = "" if variant is None else f".{variant}"
            state = {k: v.detach().to(dtype).contiguous() for k, v in model.state_dict().items()}
            if name == "text_encoder" and text_prefix is not None:
                state = {text_prefix + k.removeprefix("text_model."): v for k, v in state.items()}
            save_file(state, path / f"{stem}{suffix}.safetensors", metadata={"format": "pt"})
    scheduler = {**SCHEDULER, "prediction_type": prediction_type}
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {
        "_class_name": "StableDiffusionPipeline",
        "safety_checker": [None, None],
        "feature_extractor": [None, None],
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
