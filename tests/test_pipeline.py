"""Loading models, the VAE's gradient, and one clear line for each thing that can be wrong."""

from __future__ import annotations

import fnmatch
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from conftest import relative_error
from safetensors.torch import load_file, save_file
from tiny_sd import CONTEXT_LENGTH, IMAGE_SIZE, SAMPLE_SIZE, WIDTH, make_tiny_sd
from torch import Tensor

from sdi_fast.config import GuidanceConfig, ModelConfig
from sdi_fast.constants import DEFAULT_MODEL_ID
from sdi_fast.diffusion import source
from sdi_fast.diffusion.encoder import LatentEncoder
from sdi_fast.diffusion.pipeline import Pipeline, load_pipeline, resolve_dtype
from sdi_fast.diffusion.schedule import draw_normal
from sdi_fast.guidance import make_guidance
from sdi_fast.types import SDIFastError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_tiny_sd(tmp_path_factory.mktemp("tiny") / "sd")


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


def one_line(caught: pytest.ExceptionInfo[SDIFastError]) -> str:
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 1000
    return message


# ---- what is loaded -------------------------------------------------------------------------


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


# ---- the VAE --------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [IMAGE_SIZE, 24])
@pytest.mark.parametrize("sample", [True, False])
def test_encoder_and_its_gradient_are_diffusers_own(pipeline, size, sample):
    vae = pipeline.encoder.vae
    images = images_of(2, size)
    cotangent = torch.randn(
        2, 4, SAMPLE_SIZE, SAMPLE_SIZE, generator=torch.Generator().manual_seed(1)
    )

    ours = images.clone().requires_grad_()
    latents = pipeline.encoder.encode(ours, torch.Generator().manual_seed(7), sample)
    latents.backward(cotangent)

    theirs = images.clone().requires_grad_()
    resized = F.interpolate(theirs, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    posterior = vae.encode(resized * 2 - 1).latent_dist
    expected = posterior.mode()
    if sample:
        noise = draw_normal(posterior.mean.shape, torch.Generator().manual_seed(7), images)
        expected = posterior.mean + posterior.std * noise
    expected = expected * vae.config.scaling_factor
    expected.backward(cotangent)
    # the same operations in another order
    assert relative_error(latents, expected) < 1e-6
    assert relative_error(ours.grad, theirs.grad) < 1e-5
    assert ours.grad.norm() > 0
    assert all(p.grad is None for p in vae.parameters())


def test_encoding_is_fixed_by_its_generator(pipeline):
    images = images_of(1, IMAGE_SIZE)
    torch.manual_seed(0)
    a = pipeline.encoder.encode(images, torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    b = pipeline.encoder.encode(images, torch.Generator().manual_seed(0))
    c = pipeline.encoder.encode(images, torch.Generator().manual_seed(1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_shift_factor_is_honoured_both_ways(pipeline):
    vae = pipeline.encoder.vae
    shifted = LatentEncoder(vae, IMAGE_SIZE)
    shifted.shift_factor, shifted.scaling_factor = 0.25, 2.0
    images = images_of(1, IMAGE_SIZE)
    plain = pipeline.encoder.encode(images, sample=False) / vae.config.scaling_factor
    latents = shifted.encode(images, sample=False)
    torch.testing.assert_close(latents, (plain - 0.25) * 2.0)
    expected = (vae.decode(plain).sample * 0.5 + 0.5).clamp(0, 1)
    torch.testing.assert_close(shifted.decode(latents), expected, rtol=1e-4, atol=1e-5)


def test_f16_gradients_do_not_underflow(tmp_path):
    """methods.md G11. The yardstick is plain f16 with a cotangent of a good size."""
    folder = make_tiny_sd(tmp_path / "sd", dtype=torch.float16)
    full = load_pipeline(ModelConfig(id=str(folder))).encoder
    half = load_pipeline(ModelConfig(id=str(folder), dtype="float16")).encoder
    images = images_of(2, IMAGE_SIZE)
    cotangent = torch.randn(
        2, 4, SAMPLE_SIZE, SAMPLE_SIZE, generator=torch.Generator().manual_seed(1)
    )

    def gradient(encoder: LatentEncoder, scale: float) -> Tensor:
        x = images.clone().requires_grad_()
        encoder.encode(x, sample=False).backward(cotangent * scale)
        return x.grad / scale

    x = images.clone().requires_grad_()
    mean = half.vae.encode((2 * x - 1).half()).latent_dist.mean.float() * half.scaling_factor
    mean.backward(cotangent)
    exact = gradient(full, 1.0)
    plain_error = relative_error(x.grad, exact)
    for scale in (1.0, 6e-5, 1e-9):
        error = relative_error(gradient(half, scale), exact)
        assert error < 2 * plain_error, (scale, error, plain_error)
    tiny_x = images.clone().requires_grad_()
    mean = half.vae.encode((2 * tiny_x - 1).half()).latent_dist.mean.float()
    mean.backward(cotangent * 1e-9)
    assert tiny_x.grad.abs().max() == 0  # without the scaling nothing is left


def test_a_gradient_that_is_not_finite_stays_visible(tmp_path):
    folder = make_tiny_sd(tmp_path / "sd", dtype=torch.float16)
    half = load_pipeline(ModelConfig(id=str(folder), dtype="float16")).encoder
    for value, finite in ((0.0, True), (float("nan"), False), (float("inf"), False)):
        x = images_of(1, IMAGE_SIZE).requires_grad_()
        latents = half.encode(x, sample=False)
        latents.backward(torch.full_like(latents, value))
        assert bool(torch.isfinite(x.grad).all()) is finite


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"images": torch.zeros(3, 8, 8), "sample": False}, r"images: expected \[B, 3, H, W\]"),
        ({"images": torch.zeros(1, 4, 8, 8), "sample": False}, r"got \(1, 4, 8, 8\)"),
        ({"images": torch.zeros(1, 3, 8, 8)}, "generator: expected a torch.Generator"),
    ],
)
def test_bad_images_are_refused(pipeline, kwargs, message):
    with pytest.raises(SDIFastError, match=message):
        pipeline.encoder.encode(**kwargs)


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
