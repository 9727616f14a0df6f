"""The networks of the bundled pipeline, at sizes made for a 2-core CPU, and their folder.

diffusers' and transformers' own classes in the layout of a Stable Diffusion folder:
64 x 64 x 3 images, 16 x 16 x 4 latents, epsilon prediction, text context CONTEXT_LENGTH x 160.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..types import SDIFastError
from .score import SCORER_FILES, Scorer, write_scorer_config
from .tokenizer import CONTEXT_LENGTH, load_tokenizer, write_tokenizer

IMAGE_SIZE = 64  # pixels
LATENT_SIZE = 16
TEXT_WIDTH = 160
WEIGHTS = Path(__file__).parent / "weights"
# Stable Diffusion's schedule (tests/golden/guidance/scheduler_config.json).
SCHEDULER: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "prediction_type": "epsilon",
}
# part of the pipeline -> its weights inside the folder, and the name of its flat copy
WEIGHT_FILES = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "scorer": "scorer/model.safetensors",
}


@dataclass
class ToyPipeline:
    """The trained parts together."""

    vae: Any  # AutoencoderKL
    unet: Any  # UNet2DConditionModel
    text_encoder: Any  # CLIPTextModel
    tokenizer: Any  # CLIPTokenizer
    scorer: Scorer

    def parts(self) -> dict[str, Any]:
        return {
            "unet": self.unet,
            "vae": self.vae,
            "text_encoder": self.text_encoder,
            "scorer": self.scorer,
        }


def build_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        block_out_channels=(32, 48, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        mid_block_add_attention=False,
    )


def build_unet() -> Any:
    from diffusers import UNet2DConditionModel

    widths = (80, 128, 160)
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        block_out_channels=widths,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(2, 4, 5),  # diffusers reads this as the number of heads
        use_linear_projection=True,
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT_WIDTH,
        intermediate_size=4 * TEXT_WIDTH,
        num_hidden_layers=3,
        num_attention_heads=5,
        max_position_embeddings=CONTEXT_LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def build_scheduler() -> Any:
    from diffusers import DDIMScheduler

    return DDIMScheduler(**SCHEDULER)


def new_pipeline(folder: str | Path) -> ToyPipeline:
    """Untrained networks; writes the folder's files other than weights."""
    folder = Path(folder)
    write_tokenizer(folder / "tokenizer")
    tokenizer = load_tokenizer(folder / "tokenizer")
    pipeline = ToyPipeline(
        build_vae(),
        build_unet(),
        build_text_encoder(tokenizer),
        tokenizer,
        Scorer(len(tokenizer)),
    )
    write_configs(pipeline, folder)
    return pipeline


def write_configs(pipeline: ToyPipeline, folder: Path) -> None:
    """Every file of the folder but the weights and the tokenizer."""
    import diffusers

    build_scheduler().save_pretrained(folder / "scheduler")
    for name in ("unet", "vae"):
        part = pipeline.parts()[name]
        part.save_config(folder / name)
    pipeline.text_encoder.config.architectures = ["CLIPTextModel"]
    pipeline.text_encoder.config.save_pretrained(folder / "text_encoder")
    write_scorer_config(pipeline.scorer, folder / "scorer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": diffusers.__version__,
        "feature_extractor": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=1) + "\n")


def save_weights(pipeline: ToyPipeline, folder: str | Path, flat: bool = False) -> None:
    """fp16 safetensors of every part, with the configs; `flat`: four files side by side.

    The flat form is for carrying: few files, and `vae.safetensors` keeps the scaling factor.
    """
    folder = Path(folder)
    if not flat:
        write_configs(pipeline, folder)
    for name, part in pipeline.parts().items():
        path = folder / (f"{name}.safetensors" if flat else WEIGHT_FILES[name])
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            key: value.detach()
            .to("cpu", torch.float16 if value.is_floating_point() else None)
            .contiguous()
            for key, value in part.state_dict().items()
        }
        metadata = {"format": "pt"}
        if name == "vae":
            metadata["scaling_factor"] = repr(float(part.config.scaling_factor))
        save_file(tensors, path, metadata=metadata)
        path.chmod(0o644)  # safetensors leaves its temporary file's 0600


def load_weights(pipeline: ToyPipeline, folder: str | Path) -> list[str]:
    """Loads every part that `folder` holds (either form); returns their names."""
    from safetensors import safe_open

    folder = Path(folder)
    if not folder.is_dir():
        raise SDIFastError(f"resume: expected a folder with weights, got {str(folder)!r}")
    loaded = []
    for name, part in pipeline.parts().items():
        paths = [folder / f"{name}.safetensors", folder / WEIGHT_FILES[name]]
        path = next((p for p in paths if p.is_file()), None)
        if path is None:
            continue
        part.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        if name == "vae":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            if "scaling_factor" in metadata:
                part.register_to_config(scaling_factor=float(metadata["scaling_factor"]))
        loaded.append(name)
    return loaded


def load_pipeline_folder(folder: str | Path = WEIGHTS) -> ToyPipeline:
    """The trained parts of a toyworld folder, fp32 on the CPU, for the grid and for tests."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    folder = Path(folder)
    missing = [f for f in (*WEIGHT_FILES.values(), *SCORER_FILES) if not (folder / f).is_file()]
    if missing:
        raise SDIFastError(f"toyworld: expected weights in {str(folder)!r}, missing {missing[0]}")
    load: dict[str, Any] = {"torch_dtype": torch.float32}
    return ToyPipeline(
        AutoencoderKL.from_pretrained(folder / "vae", **load),
        UNet2DConditionModel.from_pretrained(folder / "unet", **load),
        CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32),
        load_tokenizer(folder / "tokenizer"),
        Scorer.load(folder),
    )
