"""Loads a Stable Diffusion model's parts, frozen, without diffusers' pipeline around them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..types import SDIFastError
from .denoiser import AnyDenoiser, choose_denoiser
from .encoder import LatentEncoder
from .fast_unet import FastUNetOptions
from .prompt import TextEncoder
from .schedule import DDIMSchedule
from .source import find_model, find_variant, first_line, read_json, show, weight_files

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


@dataclass(frozen=True)
class Pipeline:
    """A frozen latent diffusion model."""

    schedule: DDIMSchedule
    denoiser: AnyDenoiser
    encoder: LatentEncoder
    prompts: TextEncoder
    latent_channels: int
    sample_size: int  # side of a latent
    image_size: int  # side of an image, pixels
    dtype: torch.dtype  # of UNet and VAE; the text encoder runs in f32
    device: torch.device
    notes: tuple[str, ...] = ()  # of a component that "auto" could not take the fast one for

    @property
    def components(self) -> dict[str, str]:
        """Whose code runs: "diffusers" or "fast", by component."""
        return {"denoiser": self.denoiser.kind, "encoder": self.encoder.kind}

    def decode(
        self,
        latents: Tensor,  # [B, C, h, w] f32
    ) -> Tensor:
        """Images [B, 3, H, W] f32 in [0, 1], for display."""
        return self.encoder.decode(latents)


def load_pipeline(config: ModelConfig, device: torch.device | str = "cpu") -> Pipeline:
    """The model that `config` names, on `device`.

    Raises:
        SDIFastError: for a model that is not there, incomplete, broken or of another kind, or that
            a component asked for as "fast" does not support, or for fp8 on a GPU without it.
    """
    device = torch.device(device)
    dtype = resolve_dtype(config.dtype, device)
    folder = find_model(config, dtype)
    schedule = DDIMSchedule.from_config(
        read_json(folder / "scheduler" / "scheduler_config.json"), device
    )
    with quiet_libraries():
        from diffusers import AutoencoderKL, UNet2DConditionModel

        text_model = _guard(folder, "text_encoder", load_text_model)
        tokenizer = _guard(folder, "tokenizer", _load_tokenizer)
        vae = _guard(folder, "vae", _diffusers_loader(AutoencoderKL, dtype))
        unet = _guard(folder, "unet", _diffusers_loader(UNet2DConditionModel, dtype))
    _check_fit(unet.config, vae.config, text_model.config)
    prompts = TextEncoder(text_model, tokenizer, device)
    return assemble(config, schedule, unet.to(device), vae.to(device), prompts)


def assemble(
    config: ModelConfig, schedule: DDIMSchedule, unet: Any, vae: Any, prompts: TextEncoder
) -> Pipeline:
    """A pipeline of diffusers' modules, with the denoiser and the encoder that `config` names.

    Raises:
        SDIFastError: for a latent that is no square, or a component asked for as "fast" that does
            not support the module, or for fp8 on a GPU without it.
    """
    sample_size = _sample_size(unet.config)
    image_size = sample_size * 2 ** (len(vae.config.block_out_channels) - 1)
    options = FastUNetOptions(linears=config.unet_linears)
    dtype, device = unet.dtype, unet.device
    denoiser, why = choose_denoiser(unet, config.denoiser, options)
    encoder = LatentEncoder(vae, image_size, config.encoder)
    notes = {"model.denoiser": why, "model.encoder": encoder.note}
    return Pipeline(
        schedule=schedule,
        denoiser=denoiser,
        encoder=encoder,
        prompts=prompts,
        latent_channels=int(unet.config.in_channels),
        sample_size=sample_size,
        image_size=image_size,
        dtype=dtype,
        device=device,
        notes=tuple(f"{key}: {note}" for key, note in notes.items() if note),
    )


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype called `name`; "auto" is f16 on a GPU and f32 elsewhere."""
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise SDIFastError(f"dtype: expected auto, {', '.join(DTYPES)}, got {show(name)}")
    return DTYPES[name]


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """No progress bars, log lines or deprecation warnings from diffusers and transformers."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries: list[Any] = [diffusers_logging, transformers_logging]
    before = [(lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]
    for lib in libraries:
        lib.set_verbosity_error()
        lib.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for lib, (verbosity, bar) in zip(libraries, before, strict=True):
            lib.set_verbosity(verbosity)
            if bar:
                lib.enable_progress_bar()


def _guard(folder: Path, component: str, load: Callable[[Path, str], Any]) -> Any:
    """load(folder, component) with whatever goes wrong told in one line."""
    try:
        return load(folder, component)
    except SDIFastError:
        raise
    except Exception as error:  # the loaders raise OSError, ValueError, RuntimeError and others
        raise SDIFastError(
            f"model: component {component!r} of {show(str(folder))} could not be loaded: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _diffusers_loader(cls: Any, dtype: torch.dtype) -> Callable[[Path, str], Any]:
    def load(folder: Path, component: str) -> Any:
        model, info = cls.from_pretrained(
            str(folder / component),
            variant=find_variant(folder, component, dtype),
            torch_dtype=dtype,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
        # A missing weight is left at its random initialisation by diffusers, with a warning.
        _check_complete(folder, component, sorted(info["missing_keys"]))
        return model

    return load


def _check_complete(folder: Path, component: str, missing: list[str]) -> None:
    if missing:
        raise SDIFastError(
            f"model: component {component!r} of {show(str(folder))} lacks {len(missing)} "
            f"weights, the first of them {missing[0]!r}"
        )


def _load_tokenizer(folder: Path, component: str) -> Any:
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder / component), local_files_only=True)


def load_text_model(folder: Path, component: str = "text_encoder") -> Any:
    """The CLIPTextModel of a pipeline folder, f32 on the CPU.

    Its weights are placed here rather than by transformers, whose versions 4 and 5 name them
    with and without the prefix "text_model." and do not all read each other's.
    """
    from safetensors.torch import load_file
    from transformers import CLIPTextConfig, CLIPTextModel

    variant = find_variant(folder, component, torch.float32)
    stored: dict[str, Tensor] = {}
    for path in weight_files(folder, component, variant):
        stored.update(load_file(path))
    config = CLIPTextConfig.from_pretrained(str(folder / component), local_files_only=True)
    with torch.device("meta"):  # the initialisation of a large text model takes seconds
        model = CLIPTextModel(config)
    model.to_empty(device="cpu")
    own = model.state_dict()
    state = {_own_name(name, own): value for name, value in stored.items()}
    state = {name: value for name, value in state.items() if name in own}
    _check_complete(folder, component, sorted(own.keys() - state.keys()))
    model.load_state_dict(state)
    for name, buffer in model.named_buffers():
        if not name.endswith("position_ids"):
            raise SDIFastError(f"model: the text encoder has the unknown buffer {name!r}")
        buffer.copy_(torch.arange(buffer.shape[-1]).expand_as(buffer))
    return model


def _own_name(name: str, own: dict[str, Tensor]) -> str:
    """`name` as this version of transformers calls the weight."""
    bare = name.removeprefix("text_model.")
    return bare if bare in own else f"text_model.{bare}"


def _sample_size(unet_config: Any) -> int:
    size = unet_config.sample_size
    if isinstance(size, list | tuple) and len(set(size)) == 1:
        size = size[0]
    if not isinstance(size, int):
        raise SDIFastError(f"model: unet: expected a square sample_size, got {show(size)}")
    return size


def _check_fit(unet: Any, vae: Any, text: Any) -> None:
    """Raises SDIFastError where the parts do not make one text-to-image latent model."""
    channels = vae.latent_channels
    for name in ("in_channels", "out_channels"):
        if unet[name] != channels:
            raise SDIFastError(
                f"model: unet: expected {name} = {channels}, the latent channels of its VAE, "
                f"got {unet[name]}"
            )
    width = unet.cross_attention_dim
    if isinstance(width, list | tuple):
        width = width[0]
    if width != text.hidden_size:
        raise SDIFastError(
            f"model: unet: expected cross_attention_dim = {text.hidden_size}, the width of its "
            f"text encoder, got {width}"
        )
    for name in ("addition_embed_type", "class_embed_type", "encoder_hid_dim_type"):
        if unet.get(name) is not None:
            raise SDIFastError(
                f"model: unet: expected a model conditioned on text alone, got {name} = "
                f"{show(unet.get(name))}"
            )
