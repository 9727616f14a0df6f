"""One clear line for each way in which a model can be missing or wrong; the hub."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_sd import IMAGE_SIZE, make_tiny_sd

from sdi_fast.config import ModelConfig
from sdi_fast.constants import DEFAULT_MODEL_ID
from sdi_fast.diffusion import source
from sdi_fast.diffusion.pipeline import load_pipeline
from sdi_fast.types import SDIFastError


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def one_line(caught: pytest.ExceptionInfo[SDIFastError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


# ---- what is not there ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model_id", "message"),
    [
        ("./no/such/folder", "the folder './no/such/folder' does not exist"),
        ("/no/such", "the folder '/no/such' does not exist"),
        ("~/no_such_folder", "does not exist"),
        ("nothing", "the folder 'nothing' does not exist"),
        ("../../x", "does not exist"),
        ("", "expected 'toyworld', a folder or a hub id, got ''"),
        ("a\0b", "does not exist"),
        ("x" * 100_000, "does not exist"),
        (__file__, "expected a folder, got the file"),
        (str(Path(__file__).parent), "is no diffusers pipeline: it has no model_index.json"),
    ],
    ids=lambda value: value[:20].replace("\0", "0"),
)
def test_a_model_that_is_not_there_is_told_in_one_line(model_id, message):
    with pytest.raises(SDIFastError) as caught:
        load_pipeline(ModelConfig(id=model_id))
    text = one_line(caught)
    assert text.startswith("model: ")
    assert message in text


def test_a_missing_bundled_model_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr(source, "BUNDLED_FOLDER", tmp_path / "weights")
    with pytest.raises(SDIFastError, match="bundled model 'toyworld' is not in this install") as c:
        load_pipeline(ModelConfig(id="toyworld"))
    one_line(c)


def test_the_bundled_model_is_loaded_from_the_package(monkeypatch, tiny):
    monkeypatch.setattr(source, "BUNDLED_FOLDER", tiny)
    assert load_pipeline(ModelConfig(id="toyworld")).image_size == IMAGE_SIZE


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_is_named(copy, component):
    shutil.rmtree(copy / component)
    with pytest.raises(SDIFastError, match=f"lacks the component '{component}'") as caught:
        load_pipeline(ModelConfig(id=str(copy)))
    one_line(caught)


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("unet", "config.json"),
        ("vae", "config.json"),
        ("text_encoder", "config.json"),
        ("scheduler", "scheduler_config.json"),
        ("tokenizer", "vocab.json"),
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
    ],
)
def test_a_missing_file_is_named(copy, component, name):
    (copy / component / name).unlink()
    what = "no .safetensors weights" if name.endswith("safetensors") else f"has no {name}"
    with pytest.raises(SDIFastError, match=f"component '{component}' of .*{what}") as caught:
        load_pipeline(ModelConfig(id=str(copy)))
    one_line(caught)


class Bomb:
    """Leaves a mark if it is ever unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize(
    ("component", "safe", "pickled"),
    [
        ("unet", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("vae", "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"),
        ("text_encoder", "model.safetensors", "pytorch_model.bin"),
    ],
)
def test_pickled_weights_are_refused_and_never_read(copy, tmp_path, component, safe, pickled):
    import pickle

    (copy / component / safe).unlink()
    mark = tmp_path / "exploded"
    (copy / component / pickled).write_bytes(pickle.dumps(Bomb(mark)))
    with pytest.raises(SDIFastError, match=f"only the pickled weights {pickled}") as caught:
        load_pipeline(ModelConfig(id=str(copy)))
    one_line(caught)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("path", "changes", "message"),
    [
        (
            "scheduler/scheduler_config.json",
            {"prediction_type": "flow"},
            "prediction_type: expected",
        ),
        ("scheduler/scheduler_config.json", {"beta_schedule": "x"}, "config that DDIM can read"),
        ("vae/config.json", {"latent_channels": 16}, "vae"),
        ("unet/config.json", {"in_channels": 9}, "unet"),
        ("unet/config.json", {"cross_attention_dim": 64}, "unet"),
        ("unet/config.json", {"sample_size": [8, 16]}, "expected a square sample_size"),
        ("model_index.json", {"unet": ["diffusers", "FluxTransformer2DModel"]}, "expected UNet2D"),
        ("model_index.json", {"text_encoder": [None, None]}, "lacks the component 'text_encoder'"),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "CLIPTextModel"),
    ],
)
def test_models_of_another_kind_are_refused(copy, path, changes, message):
    edit_json(copy / path, **changes)
    with pytest.raises(SDIFastError, match=message) as caught:
        load_pipeline(ModelConfig(id=str(copy)))
    one_line(caught)


def test_latent_channels_and_text_width_must_fit(copy):
    """Consistent weights of a model of another shape, such as an inpainting UNet."""
    from diffusers import UNet2DConditionModel

    config = {
        k: v
        for k, v in json.loads((copy / "unet" / "config.json").read_text()).items()
        if k[0] != "_"
    }
    for changes, message in [
        (
            {"in_channels": 9},
            "unet: expected in_channels = 4, the latent channels of its VAE, got 9",
        ),
        (
            {"out_channels": 8},
            "unet: expected out_channels = 4, the latent channels of its VAE, got 8",
        ),
        ({"cross_attention_dim": 64}, "expected cross_attention_dim = 32, .* got 64"),
        ({"class_embed_type": "timestep"}, "conditioned on text alone, got class_embed_type"),
    ]:
        shutil.rmtree(copy / "unet")
        unet = UNet2DConditionModel.from_config({**config, **changes})
        unet.save_pretrained(copy / "unet", safe_serialization=True)
        with pytest.raises(SDIFastError, match=message) as caught:
            load_pipeline(ModelConfig(id=str(copy)))
        one_line(caught)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_weights_that_lack_a_tensor_are_refused(copy, component):
    stem = "model" if component == "text_encoder" else "diffusion_pytorch_model"
    path = copy / component / f"{stem}.safetensors"
    tensors = load_file(path)
    dropped = next(name for name in tensors if name.endswith("norm1.weight") or "norm" in name)
    del tensors[dropped]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(SDIFastError, match=f"component '{component}' .* lacks 1 weights") as caught:
        load_pipeline(ModelConfig(id=str(copy)))
    assert dropped.removeprefix("text_model.") in one_line(caught)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("damage", ["truncated", "noise", "empty"])
def test_broken_weights_are_told_in_one_line(copy, component, damage):
    path = next((copy / component).glob("*.safetensors"))
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "noise": b"\x93" * 999, "empty": b""}[damage]
    )
    with pytest.raises(
        SDIFastError, match=f"component '{component}' .*could not be loaded"
    ) as caught:
        load_pipeline(ModelConfig(id=str(copy)))
    one_line(caught)


def test_broken_json_is_told_in_one_line(copy):
    for name in ("model_index.json", "scheduler/scheduler_config.json"):
        whole = (copy / name).read_text()
        for text in ("{", "[1]", "\x00"):
            (copy / name).write_text(text)
            with pytest.raises(SDIFastError, match="JSON") as caught:
                load_pipeline(ModelConfig(id=str(copy)))
            one_line(caught)
        (copy / name).write_text(whole)
    (copy / "unet" / "config.json").write_text("{")
    with pytest.raises(SDIFastError, match="component 'unet' .*could not be loaded") as caught:
        load_pipeline(ModelConfig(id=str(copy)))
    one_line(caught)


# ---- the hub --------------------------------------------------------------------------------


class FakeHub:
    """snapshot_download over a local folder; notes what was asked for."""

    def __init__(self, remote: Path, cache: Path) -> None:
        self.remote, self.cache = remote, cache
        self.requests: list[dict[str, Any]] = []

    def __call__(self, repo_id: str, *, allow_patterns: list[str], **kwargs: Any) -> str:
        self.requests.append({"repo_id": repo_id, **kwargs})
        for path in self.remote.rglob("*"):
            name = path.relative_to(self.remote).as_posix()
            if path.is_file() and any(fnmatch.fnmatch(name, p) for p in allow_patterns):
                (self.cache / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, self.cache / name)
        return str(self.cache)

    def downloaded(self) -> set[str]:
        return {p.relative_to(self.cache).as_posix() for p in self.cache.rglob("*.safetensors")}


@pytest.fixture
def hub(tiny, tmp_path, monkeypatch) -> FakeHub:
    hub = FakeHub(Path(shutil.copytree(tiny, tmp_path / "remote")), tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


def test_a_hub_id_downloads_only_what_is_needed(hub):
    for extra in ("v1-5-pruned.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors"):
        (hub.remote / extra).write_bytes(b"large")
    (hub.remote / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    config = ModelConfig(id="owner/model", revision="abc", local_files_only=True)
    assert load_pipeline(config).image_size == IMAGE_SIZE
    assert hub.requests == [{"repo_id": "owner/model", "revision": "abc", "local_files_only": True}]
    assert len(hub.downloaded()) == 3
    assert not (hub.cache / "unet" / "diffusion_pytorch_model.bin").exists()


@pytest.mark.parametrize("has_half", [True, False])
def test_f16_asks_the_hub_for_the_fp16_variant_first(hub, tmp_path, has_half):
    if has_half:
        half = make_tiny_sd(tmp_path / "half", dtype=torch.float16, variant="fp16")
        shutil.copytree(half, hub.remote, dirs_exist_ok=True)
    pipeline = load_pipeline(ModelConfig(id="owner/model", dtype="float16"))
    assert pipeline.denoiser.dtype == torch.float16
    assert len(hub.requests) == (1 if has_half else 2)
    assert len(hub.downloaded()) == 3
    assert all((".fp16." in name) is has_half for name in hub.downloaded())


def test_a_hub_model_without_safetensors_is_refused(hub):
    path = hub.remote / "unet" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(SDIFastError, match="'unet' .* has no .safetensors weights") as caught:
        load_pipeline(ModelConfig(id="owner/model"))
    one_line(caught)


@pytest.mark.parametrize(
    "error",
    [OSError("offline\nsecond line"), ValueError("x"), RuntimeError(), ConnectionError("no")],
)
def test_a_hub_that_cannot_be_reached_is_told(monkeypatch, error):
    def fail(*args: Any, **kwargs: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(SDIFastError) as caught:
        load_pipeline(ModelConfig(id="owner/model"))
    message = one_line(caught)
    for part in ("'owner/model'", DEFAULT_MODEL_ID, "offline", "folder", type(error).__name__):
        assert part in message


def test_local_files_only_reads_the_cache_and_never_the_network(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    config = ModelConfig(id="owner/model", local_files_only=True)
    with pytest.raises(
        SDIFastError, match="not in the local cache, and local_files_only"
    ) as caught:
        load_pipeline(config)
    one_line(caught)
    repo = tmp_path / "models--owner--model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    shutil.copytree(tiny, repo / "snapshots" / commit)
    assert load_pipeline(config).image_size == IMAGE_SIZE
