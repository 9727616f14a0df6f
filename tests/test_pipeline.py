"""What a model folder is loaded to."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file, save_file
from tiny_sd import CONTEXT_LENGTH, IMAGE_SIZE, SAMPLE_SIZE, WIDTH, make_tiny_sd
from torch import Tensor

from sdi_fast.config import GuidanceConfig, ModelConfig
from sdi_fast.diffusion import source
from sdi_fast.diffusion.pipeline import Pipeline, load_pipeline, resolve_dtype
from sdi_fast.guidance import make_guidance
from sdi_fast.types import SDIFastError


@pytest.fixture(scope="module")
def pipeline(tiny: Path) -> Pipeline:
    return load_pipeline(ModelConfig(id=str(tiny)))


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def images_of(batch: int, size: int, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_a_folder_gives_a_whole_frozen_model(tiny, pipeline):
    assert (pipeline.sample_size, pipeline.image_size) == (SAMPLE_SIZE, IMAGE_SIZE)
    assert pipeline.dtype == torch.float32
    modules = [pipeline.denoiser.unet, pipeline.encoder.vae, pipeline.prompts.model]
    for module in modules:
        assert not module.training
        assert all(not p.requires_grad and p.dtype == torch.float32 for p in module.parameters())
    stored = load_file(tiny / "unet" / "diffusion_pytorch_model.safetensors")
    loaded = pipeline.denoiser.unet.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(stored[name], loaded[name]) for name in stored)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("variant", ["threestudio", "paper"])
def test_a_batch_goes_from_image_to_gradient(tmp_path, prediction_type, variant):
    folder = make_tiny_sd(tmp_path / "sd", prediction_type=prediction_type)
    pipeline = load_pipeline(ModelConfig(id=str(folder)))
    assert pipeline.schedule.prediction_type == prediction_type
    prompts = pipeline.prompts.encode("cow")
    guidance = make_guidance(pipeline, GuidanceConfig(variant=variant))
    generator = torch.Generator().manual_seed(0)
    images = images_of(2, 24).requires_grad_()
    latents = pipeline.encoder.encode(images, generator=generator, sample=True)
    condition = prompts.condition(torch.tensor([0.0, 150.0]), torch.tensor([5.0, -5.0]))
    t = torch.tensor([400, 260])
    output = guidance.target(latents.detach(), condition, t, generator)
    guidance.loss(latents, output).backward()
    assert output.target.shape == (2, 4, SAMPLE_SIZE, SAMPLE_SIZE)
    assert bool(output.is_finite())
    assert (images.grad.flatten(1).norm(dim=1) > 0).all()
    decoded = pipeline.decode(output.target)
    assert decoded.shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert decoded.min() >= 0
    assert decoded.max() <= 1
    assert not decoded.requires_grad


def test_denoiser_counts_casts_and_keeps_no_graph(tmp_path, pipeline):
    x, t = torch.randn(3, 4, SAMPLE_SIZE, SAMPLE_SIZE), torch.tensor([-99, 1, 980])
    context = torch.randn(3, CONTEXT_LENGTH, WIDTH)
    before = pipeline.denoiser.n_calls
    output = pipeline.denoiser.predict(x.requires_grad_(), t, context)
    assert pipeline.denoiser.n_calls == before + 1
    assert not output.requires_grad
    expected = pipeline.denoiser.unet(x, t, context).sample
    assert torch.equal(output, expected.detach())
    half = load_pipeline(
        ModelConfig(id=str(make_tiny_sd(tmp_path / "sd")), dtype="bfloat16")
    ).denoiser
    assert half.dtype == torch.bfloat16
    rough = half.predict(x, t, context)
    assert rough.dtype == torch.float32
    assert relative_error(rough, output) < 0.05  # bf16 keeps 8 bits


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_weights_stored_in_f16_run_in_f32(tmp_path, variant):
    folder = make_tiny_sd(tmp_path / "sd", dtype=torch.float16, variant=variant)
    pipeline = load_pipeline(ModelConfig(id=str(folder)), "cpu")
    suffix = "" if variant is None else ".fp16"
    for module, path in [
        (pipeline.denoiser.unet, f"unet/diffusion_pytorch_model{suffix}.safetensors"),
        (pipeline.encoder.vae, f"vae/diffusion_pytorch_model{suffix}.safetensors"),
        (pipeline.prompts.model, f"text_encoder/model{suffix}.safetensors"),
    ]:
        stored = load_file(folder / path)
        assert all(value.dtype == torch.float16 for value in stored.values())
        loaded = module.state_dict()
        assert all(value.dtype == torch.float32 for value in loaded.values())
        assert all(torch.equal(loaded[name], value.float()) for name, value in stored.items())


def test_f16_prefers_weights_stored_so(tmp_path):
    folder = make_tiny_sd(tmp_path / "sd")
    other = make_tiny_sd(tmp_path / "half", dtype=torch.float16, variant="fp16", seed=1)
    shutil.copytree(other, folder, dirs_exist_ok=True)
    for component in ("unet", "vae", "text_encoder"):
        assert source.find_variant(folder, component, torch.float16) == "fp16"
        assert source.find_variant(folder, component, torch.float32) is None
    half = load_pipeline(ModelConfig(id=str(folder), dtype="float16"))
    stored = load_file(other / "unet" / "diffusion_pytorch_model.fp16.safetensors")
    assert half.dtype == torch.float16
    assert torch.equal(half.denoiser.unet.conv_in.weight, stored["conv_in.weight"])


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_text_encoders_of_transformers_4_and_5_load_alike(tmp_path, pipeline, prefix):
    folder = make_tiny_sd(tmp_path / "sd", text_prefix=prefix)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    assert all(name.startswith(prefix) for name in tensors)
    tensors[f"{prefix}embeddings.position_ids"] = torch.arange(CONTEXT_LENGTH)[None]  # old files
    save_file(tensors, path)
    other = load_pipeline(ModelConfig(id=str(folder)))
    assert torch.equal(other.prompts.embed(["cow"]), pipeline.prompts.embed(["cow"]))


def test_text_embeddings_are_those_of_transformers_own_loader(tiny, pipeline):
    from transformers import CLIPTextModel

    theirs = CLIPTextModel.from_pretrained(tiny / "text_encoder")
    ids = pipeline.prompts.tokenizer(
        "cow", padding="max_length", max_length=CONTEXT_LENGTH, return_tensors="pt"
    ).input_ids
    assert torch.equal(pipeline.prompts.embed(["cow"]), theirs(ids).last_hidden_state)


def test_sharded_text_encoders_load(copy, pipeline):
    path = copy / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    names = sorted(tensors)
    for i, part in enumerate((names[:7], names[7:]), start=1):
        shard = path.with_name(f"model-{i:05d}-of-00002.safetensors")
        save_file({name: tensors[name] for name in part}, shard)
    path.unlink()
    other = load_pipeline(ModelConfig(id=str(copy)))
    assert torch.equal(other.prompts.embed(["cow"]), pipeline.prompts.embed(["cow"]))


class Collector(logging.Handler):
    """Keeps what a library logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def test_loading_is_silent_and_leaves_the_libraries_settings(copy, capfd):
    from diffusers import UNet2DConditionModel
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    edit_json(copy / "unet" / "config.json", made_up=1)  # diffusers warns of unknown settings
    libraries = (diffusers_logging, transformers_logging)
    before = [(lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]
    collector = Collector()
    for lib in libraries:
        lib.add_handler(collector)
    try:
        load_pipeline(ModelConfig(id=str(copy)))
        captured = capfd.readouterr()
        assert (captured.out, captured.err, collector.lines) == ("", "", [])
        UNet2DConditionModel.from_pretrained(copy / "unet")
        assert any("made_up" in line for line in collector.lines)  # it would have been seen
    finally:
        for lib in libraries:
            lib.remove_handler(collector)
    assert before == [(lib.get_verbosity(), lib.is_progress_bar_enabled()) for lib in libraries]


def test_auto_dtype_is_half_on_a_gpu_only():
    assert resolve_dtype("auto", torch.device("cpu")) == torch.float32
    assert resolve_dtype("auto", torch.device("cuda", 0)) == torch.float16
    assert resolve_dtype("float32", torch.device("cuda")) == torch.float32
    with pytest.raises(SDIFastError, match="dtype: expected auto, float32, .* got 'int8'"):
        resolve_dtype("int8", torch.device("cpu"))
