"""Where a model's files are: in the package, in a folder or on the hub.

Everything is checked here, from file names and configs, before a weight is read. Weights are
only ever .safetensors: pickles can run code and are refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

from ..config import ModelConfig
from ..constants import BUNDLED_MODEL_ID, DEFAULT_MODEL_ID
from ..types import SDIFastError

BUNDLED_FOLDER = Path(__file__).resolve().parent.parent / "toyworld" / "weights"
PICKLE_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
# component -> class in model_index.json that this package can drive (None: any)
COMPONENTS: dict[str, tuple[str, ...] | None] = {
    "scheduler": None,
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    "text_encoder": ("CLIPTextModel",),
    "vae": ("AutoencoderKL",),
    "unet": ("UNet2DConditionModel",),
}
CONFIG_FILES = {
    "scheduler": "scheduler_config.json",
    "text_encoder": "config.json",
    "vae": "config.json",
    "unet": "config.json",
}
WEIGHT_STEMS = {
    "text_encoder": "model",
    "vae": "diffusion_pytorch_model",
    "unet": "diffusion_pytorch_model",
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def show(value: object) -> str:
    """`value` for an error message: quoted, on one line, not longer than a path needs."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}...'"


def first_line(error: BaseException) -> str:
    """The first line of an error, or its class where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises SDIFastError where the file holds none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SDIFastError(
            f"model: {show(str(path))} is not readable JSON: {first_line(error)}"
        ) from error
    if not isinstance(content, dict):
        raise SDIFastError(f"model: {show(str(path))}: expected a JSON object")
    return content


def find_model(config: ModelConfig, dtype: torch.dtype) -> Path:
    """The folder of `config.id`, checked; downloads it where it is a hub id.

    Args:
        dtype: f16 prefers weights that are stored so.

    Raises:
        SDIFastError: for a model that is not there, incomplete, of another kind, or pickled.
    """
    folder = _locate(config, dtype)
    check_folder(folder)
    return folder


def _locate(config: ModelConfig, dtype: torch.dtype) -> Path:
    model_id = config.id
    if model_id == BUNDLED_MODEL_ID:
        if not (BUNDLED_FOLDER / "model_index.json").is_file():
            raise SDIFastError(
                f"model: the bundled model {BUNDLED_MODEL_ID!r} is not in this installation "
                f"(expected in {show(str(BUNDLED_FOLDER))}); reinstall the package, or give the "
                "folder or hub id of a Stable Diffusion model"
            )
        return BUNDLED_FOLDER
    if not isinstance(model_id, str) or not model_id.strip():
        raise SDIFastError(
            f"model: expected {BUNDLED_MODEL_ID!r}, a folder or a hub id, got {show(model_id)}"
        )
    folder = Path(model_id).expanduser() if model_id.startswith("~") else Path(model_id)
    if _exists(folder):
        if not folder.is_dir():
            raise SDIFastError(f"model: expected a folder, got the file {show(model_id)}")
        return folder
    if not HUB_ID.fullmatch(model_id) or model_id.startswith((".", "~")):
        raise SDIFastError(f"model: the folder {show(model_id)} does not exist")
    return _fetch(config, dtype)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name too long for the file system, or with a zero byte
        return False


def weight_patterns(component: str, variant: str | None) -> tuple[str, ...]:
    """File names, as glob patterns, under which a component's weights may be stored."""
    stem = f"{component}/{WEIGHT_STEMS[component]}"
    shard = "-?????-of-?????"
    names: tuple[str, ...]
    if variant is None:
        names = (".safetensors", f"{shard}.safetensors", ".safetensors.index.json")
    else:
        names = (
            f".{variant}.safetensors",
            f".{variant}{shard}.safetensors",
            f"{shard}.{variant}.safetensors",
            f".safetensors.index.{variant}.json",
        )
    return tuple(stem + name for name in names)


def weight_files(folder: Path, component: str, variant: str | None) -> list[Path]:
    """The .safetensors files of a component in one variant, shards in order."""
    found = {p for name in weight_patterns(component, variant) for p in folder.glob(name)}
    return sorted(p for p in found if p.suffix == ".safetensors")


def find_variant(folder: Path, component: str, dtype: torch.dtype) -> str | None:
    """Which stored variant of a component to load: "fp16" or None for the plain one.

    Raises:
        SDIFastError: where there are no safetensors of it, naming pickles where it has those.
    """
    order: tuple[str | None, ...] = ("fp16", None) if dtype == torch.float16 else (None, "fp16")
    for variant in order:
        if weight_files(folder, component, variant):
            return variant
    pickles = sorted(p for p in (folder / component).iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles:
        raise SDIFastError(
            f"model: component {component!r} of {show(str(folder))} has only the pickled weights "
            f"{pickles[0].name}, which are never loaded since they can run code; convert them "
            "to .safetensors"
        )
    raise SDIFastError(
        f"model: component {component!r} of {show(str(folder))} has no .safetensors weights"
    )


def check_folder(folder: Path) -> None:
    """Raises SDIFastError where `folder` is no complete Stable Diffusion pipeline."""
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise SDIFastError(
            f"model: {show(str(folder))} is no diffusers pipeline: it has no model_index.json"
        )
    index = read_json(index_path)
    for component, classes in COMPONENTS.items():
        entry = index.get(component)
        name = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if name is None or not (folder / component).is_dir():
            raise SDIFastError(f"model: {show(str(folder))} lacks the component {component!r}")
        if classes is not None and name not in classes:
            raise SDIFastError(
                f"model: component {component!r} of {show(str(folder))}: expected "
                f"{' or '.join(classes)}, as Stable Diffusion 1 and 2 have, got {show(name)}"
            )
        config_file = CONFIG_FILES.get(component)
        if config_file is not None and not (folder / component / config_file).is_file():
            raise SDIFastError(
                f"model: component {component!r} of {show(str(folder))} has no {config_file}"
            )
    tokenizer = folder / "tokenizer"
    if not (tokenizer / "vocab.json").is_file() and not (tokenizer / "tokenizer.json").is_file():
        raise SDIFastError(f"model: component 'tokenizer' of {show(str(folder))} has no vocab.json")
    for component in WEIGHT_STEMS:
        find_variant(folder, component, torch.float32)


def _fetch(config: ModelConfig, dtype: torch.dtype) -> Path:
    """The hub's model in the local cache; only the files that are needed are downloaded.

    f16 asks for weights stored so first, the others for the plain ones; where the first kind is
    not complete the second is fetched.
    """
    from huggingface_hub import snapshot_download

    wanted = ["model_index.json", "tokenizer/*.json", "tokenizer/merges.txt"]
    wanted += [f"{component}/{name}" for component, name in CONFIG_FILES.items()]
    order = ("fp16", None) if dtype == torch.float16 else (None, "fp16")
    folder, failure = None, None
    for variant in order:
        patterns = [p for component in WEIGHT_STEMS for p in weight_patterns(component, variant)]
        try:
            folder = Path(
                snapshot_download(
                    config.id,
                    revision=config.revision,
                    local_files_only=config.local_files_only,
                    allow_patterns=wanted + patterns,
                )
            )
        except Exception as error:  # the hub's errors share no base class across its versions
            failure = error
            continue
        if all(weight_files(folder, component, variant) for component in WEIGHT_STEMS):
            break
    if folder is None:
        assert failure is not None
        raise SDIFastError(_fetch_message(config, failure)) from failure
    return folder


def _fetch_message(config: ModelConfig, error: Exception) -> str:
    at = "" if config.revision is None else f" at revision {show(config.revision)}"
    how = (
        "is not in the local cache, and local_files_only forbids to fetch it"
        if config.local_files_only
        else "could not be fetched from the hub: is this machine offline, or the name wrong?"
    )
    reason = f"{type(error).__name__}: {first_line(error)[:120]}"
    return (
        f"model: {show(config.id)}{at} is no folder here and {how} ({reason}); give a folder in "
        f"diffusers' layout, {BUNDLED_MODEL_ID!r} for the bundled model, or a hub id such as "
        f"{DEFAULT_MODEL_ID!r}"
    )
