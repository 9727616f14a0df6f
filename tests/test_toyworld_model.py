"""toyworld's trainer, the folder that it writes, and the bundled weights."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from sdi_fast.camera import select_views
from sdi_fast.config import ModelConfig
from sdi_fast.constants import VIEW_NAMES
from sdi_fast.diffusion.pipeline import Pipeline, load_pipeline
from sdi_fast.toyworld import train as training
from sdi_fast.toyworld.dataset import camera_ranges, view_index
from sdi_fast.toyworld.evaluate import EVAL_PROMPTS, evaluate_run, held_out_cameras
from sdi_fast.toyworld.models import (
    WEIGHT_FILES,
    WEIGHTS,
    ToyPipeline,
    load_pipeline_folder,
    load_weights,
    new_pipeline,
)
from sdi_fast.toyworld.phases import alphas_cumprod
from sdi_fast.toyworld.renderer import render_scene
from sdi_fast.toyworld.scenes import COLOURS, KINDS, Scene, parse_caption
from sdi_fast.toyworld.score import Scorer
from sdi_fast.toyworld.tokenizer import token_ids
from sdi_fast.types import Camera, SDIFastError

PARTS = set(WEIGHT_FILES)
FOLDER_FILES = (
    "model_index.json",
    "README.md",
    "train_log.json",
    "samples.png",
    "scheduler/scheduler_config.json",
    "tokenizer/vocab.json",
    "tokenizer/merges.txt",
    "tokenizer/tokenizer_config.json",
    "unet/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "scorer/config.json",
    *WEIGHT_FILES.values(),
)
MAX_TOTAL_BYTES = 25_000_000
GREY = (0.5, 0.5, 0.5)


# ---- the trainer, on a few pictures ---------------------------------------------------------


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder from two steps of each phase."""
    folder = tmp_path_factory.mktemp("train") / "flat"
    precision = torch.get_float32_matmul_precision()
    benchmark = torch.backends.cudnn.benchmark
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            training,
            "SMOKE",
            replace(training.SMOKE, n_images=48, n_holdout=8, unet_batch=4, max_steps=2),
        )
        argv = ["--out", str(folder), "--smoke", "--flat", "--device", "cpu"]
        assert training.main(argv) == 0
    torch.set_float32_matmul_precision(precision)
    torch.backends.cudnn.benchmark = benchmark
    return folder


@pytest.fixture(scope="module")
def packed(flat: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("train") / "packed"
    assert training.main(["--pack", str(flat), "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def toy(packed: Path) -> ToyPipeline:
    return load_pipeline_folder(packed)


@pytest.fixture(scope="module")
def pipeline(packed: Path) -> Pipeline:
    return load_pipeline(ModelConfig(id=str(packed), dtype="float32"))


def test_training_leaves_weights_a_log_and_samples(flat: Path) -> None:
    names = {path.name for path in flat.iterdir()}
    assert names == {*(f"{p}.safetensors" for p in PARTS), "train_log.json", "samples.png"}
    log = json.loads((flat / "train_log.json").read_text())
    assert [log[phase]["steps"] for phase in ("vae", "unet", "scorer")] == [2, 2, 2]
    assert log["resumed"] == [] and log["earlier_runs"] == []
    assert all(0 < loss < 10 for loss in log["unet"]["loss_holdout"].values())
    tensors = load_file(flat / "unet.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert all(t.isfinite().all() for t in tensors.values())


def test_packing_completes_the_folder(flat: Path, packed: Path) -> None:
    assert {str(p.relative_to(packed)) for p in packed.rglob("*") if p.is_file()} == {*FOLDER_FILES}
    for part, name in WEIGHT_FILES.items():
        before, after = load_file(flat / f"{part}.safetensors"), load_file(packed / name)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    with safe_open(flat / "vae.safetensors", "pt") as file:
        factor = float(file.metadata()["scaling_factor"])
    assert json.loads((packed / "vae/config.json").read_text())["scaling_factor"] == factor
    assert factor not in (1.0, 0.18215), "measured, not a default"


def test_both_loaders_read_the_same_model(toy: ToyPipeline, pipeline: Pipeline) -> None:
    assert pipeline.image_size == 64 and pipeline.sample_size == 16
    latents, t = torch.randn(2, 4, 16, 16), torch.tensor([1, 700])
    texts = [f"a red mushroom, {view} view" for view in VIEW_NAMES[:2]]
    with torch.no_grad():
        context = toy.text_encoder(token_ids(toy.tokenizer, texts)).last_hidden_state
        noise = toy.unet(latents, t, context).sample
        images = torch.rand(2, 3, 64, 64)
        posterior = toy.vae.encode(images * 2 - 1).latent_dist
    # the same modules on the same inputs: equal but for the order of sums
    torch.testing.assert_close(pipeline.prompts.embed(texts), context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        pipeline.denoiser.predict(latents, t, context), noise, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        pipeline.encoder.encode(images, sample=False),
        posterior.mode() * toy.vae.config.scaling_factor,
        rtol=1e-5,
        atol=1e-5,
    )
    a = pipeline.schedule.alphas_cumprod
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(a.double().cpu(), (1 - betas).cumprod(0), rtol=1e-5, atol=1e-7)


def test_resuming_starts_from_the_weights(flat: Path, tmp_path: Path) -> None:
    fresh = new_pipeline(tmp_path / "new")
    before = fresh.unet.state_dict()["conv_in.weight"].clone()
    assert set(load_weights(fresh, flat)) == PARTS
    loaded = fresh.unet.state_dict()["conv_in.weight"]
    assert not torch.equal(before, loaded)
    assert torch.equal(loaded.half(), load_file(flat / "unet.safetensors")["conv_in.weight"])
    with safe_open(flat / "vae.safetensors", "pt") as file:
        assert fresh.vae.config.scaling_factor == float(file.metadata()["scaling_factor"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--pack", "/no/such", "--out", "{tmp}/x"], "error: resume: expected a folder"),
        (["--pack", "{tmp}", "--out", "{tmp}/x"], "error: pack: expected four weight files"),
        (["--smoke", "--images", "20", "--out", "{tmp}/x"], "error: images: expected more than"),
        (["--smoke", "--resume", "/no/such", "--out", "{tmp}/x"], "error: resume: expected a"),
    ],
)
def test_bad_arguments_give_one_line(
    argv: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = [a.format(tmp=tmp_path) for a in argv]
    assert training.main([*argv, "--device", "cpu"]) == 2
    out = capsys.readouterr().out
    assert out.startswith(message) and out.count("\n") == 1


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    new_pipeline(tmp_path)
    with pytest.raises(SDIFastError, match="toyworld: expected weights in .*, missing unet/"):
        load_pipeline_folder(tmp_path)


# ---- the bundled weights --------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundled() -> ToyPipeline:
    return load_pipeline_folder()


TRUTH_VIEWS = ((0, 3), (2, 5))  # held-out views that an even and an odd kind is seen from


def truth_scene(i: int) -> Scene:
    return Scene(((KINDS[i], list(COLOURS)[i % len(COLOURS)]),))


def truth_views(i: int) -> list[int]:
    """The views of kind i as indices into VIEW_NAMES."""
    camera = held_out_cameras(64, 64)
    picked = list(TRUTH_VIEWS[i % 2])
    return view_index(camera.azimuth_deg[picked], camera.elevation_deg[picked]).tolist()


@pytest.fixture(scope="module")
def truths() -> Tensor:
    """Ground truth of each kind from two held-out views, flat on grey, [34, 3, 64, 64]."""
    camera = held_out_cameras(64, 64)
    images = []
    for i in range(len(KINDS)):
        views = select_views(camera, TRUTH_VIEWS[i % 2])
        images.append(render_scene(truth_scene(i), views, background=GREY)[0])
    return torch.cat(images).permute(0, 3, 1, 2)


def test_bundled_folder_is_complete() -> None:
    files = {str(path.relative_to(WEIGHTS)): path for path in WEIGHTS.rglob("*") if path.is_file()}
    assert set(files) == set(FOLDER_FILES)
    total = sum(path.stat().st_size for path in files.values())
    assert total <= MAX_TOTAL_BYTES, f"{total} bytes"
    for name in WEIGHT_FILES.values():
        tensors = load_file(files[name])
        assert {t.dtype for t in tensors.values()} == {torch.float16}
        assert all(t.isfinite().all() for t in tensors.values())


def test_bundled_model_card_tells_what_is_needed() -> None:
    card = (WEIGHTS / "README.md").read_text()
    for word in ("## Data", "## Training", "python -m sdi_fast.toyworld.train", "samples.png"):
        assert word in card
    for word in (*KINDS, *COLOURS):
        assert word in card


def test_bundled_log_and_card_cover_every_training() -> None:
    """No part's training is missing, so that the card's one command makes all of them again."""
    log = json.loads((WEIGHTS / "train_log.json").read_text())
    runs = [*log["earlier_runs"], log]
    for phase in ("vae", "unet", "scorer"):
        steps = sum(run[phase]["steps"] for run in runs if phase in run)
        assert steps > 500, f"{phase}: {steps} steps logged"
    seconds = re.findall(r"--(vae|unet|scorer)-seconds (\d+)", (WEIGHTS / "README.md").read_text())
    assert [name for name, _ in seconds] == ["vae", "unet", "scorer"]
    assert all(int(number) > 0 for _, number in seconds), seconds


def test_bundled_denoiser_was_last_trained_for_the_cameras_of_its_runs() -> None:
    log = json.loads((WEIGHTS / "train_log.json").read_text())
    assert "unet" in log and log["cameras"] == json.loads(json.dumps(camera_ranges()))
    low, high = log["cameras"]["distance_range"]
    assert f"distance {low} to {high}" in (WEIGHTS / "README.md").read_text()


def test_training_options_reach_the_settings() -> None:
    settings = [
        training.settings_of(training.parse_args(["--out", "x", "--device", "cpu", *more]))
        for more in ([], ["--precision", "bfloat16", "--unet-lr", "1e-4", "--unet-batch", "64"])
    ]
    assert [s.low_precision for s in settings] == [False, True]
    assert [s.unet_lr for s in settings] == [training.UNET_LR, 1e-4]
    assert settings[1].unet_batch == 64


def test_bundled_pipeline_loads_by_name() -> None:
    pipeline = load_pipeline(ModelConfig(id="toyworld", dtype="float32"))
    assert pipeline.image_size == 64 and pipeline.latent_channels == 4
    embeddings = pipeline.prompts.embed(["a red mushroom, front view", "a red mushroom, back view"])
    assert (embeddings[0] - embeddings[1]).norm() > 0.1 * embeddings[0].norm()


def test_bundled_scorer_puts_the_truth_first() -> None:
    scorer = Scorer.load()
    ranks = {}
    for prompt in EVAL_PROMPTS:
        scene = parse_caption(prompt)

        def truth(camera: Camera, scene: Scene = scene) -> tuple[Tensor, Tensor]:
            return render_scene(scene, camera, background=GREY)

        ranks[prompt] = evaluate_run(truth, prompt, scorer=scorer)["rank"]
    assert sum(rank == 1 for rank in ranks.values()) >= 9, ranks


def test_bundled_scorer_is_not_fooled() -> None:
    """Another colour or another kind than the caption's does not come first."""
    scorer = Scorer.load()
    for shown, told in (
        ("a blue mushroom", "a red mushroom"),
        ("a red rocket", "a red mushroom"),
        ("a yellow penguin", "a yellow duck"),
    ):
        scene = parse_caption(shown)

        def render(camera: Camera, scene: Scene = scene) -> tuple[Tensor, Tensor]:
            return render_scene(scene, camera, background=GREY)

        assert evaluate_run(render, told, scorer=scorer)["rank"] > 1, (shown, told)


def test_bundled_autoencoder_keeps_the_pictures(bundled: ToyPipeline, truths: Tensor) -> None:
    with torch.no_grad():
        posterior = bundled.vae.encode(truths * 2 - 1).latent_dist
        decoded = (bundled.vae.decode(posterior.mode()).sample * 0.5 + 0.5).clamp(0, 1)
    psnr = -10 * torch.log10((decoded - truths).square().mean())
    assert psnr > 24.0, f"{psnr:.1f} dB"
    # scaled latents have unit spread over the training set, which is more varied than this one
    spread = (posterior.mode() * bundled.vae.config.scaling_factor).std()
    assert 0.5 < spread < 1.5


def test_bundled_denoiser_heeds_the_caption(bundled: ToyPipeline, truths: Tensor) -> None:
    """At t = 500 the right caption predicts the noise better than a wrong one, for most images."""
    right, wrong = [], []
    for i in range(len(KINDS)):
        other = truth_scene((i + 5) % len(KINDS))
        for view in truth_views(i):
            suffix = f", {VIEW_NAMES[view]} view"
            right.append(truth_scene(i).caption + suffix)
            wrong.append(other.caption + suffix)
    a, t = alphas_cumprod("cpu")[500], torch.full((len(right),), 500)
    losses = []
    with torch.no_grad():
        z = bundled.vae.encode(truths * 2 - 1).latent_dist.mode()
        z = z * bundled.vae.config.scaling_factor
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(7))
        noisy = a.sqrt() * z + (1 - a).sqrt() * noise
        for texts in (right, wrong):
            ids = token_ids(bundled.tokenizer, texts)
            context = bundled.text_encoder(ids).last_hidden_state
            out = bundled.unet(noisy, t, context).sample
            losses.append((out - noise).square().mean(dim=(1, 2, 3)))
    better = float((losses[0] < losses[1]).float().mean())
    assert better > 0.9, f"{better:.2f}"
    assert losses[0].mean() < 0.1, "noise at t = 500 is far from random to a trained denoiser"


def test_nothing_of_toyworld_is_pickled() -> None:
    suffixes = {path.suffix for path in WEIGHTS.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".txt", ".md", ".png", ".safetensors"}
    for name in WEIGHT_FILES.values():
        head = (WEIGHTS / name).read_bytes()[:9]
        assert head[8:9] == b"{", "a safetensors header: 8 bytes of length, then JSON"


def test_parameters_fit_the_limit(tmp_path: Path) -> None:
    """Two bytes a parameter: what a training writes stays below the limit too."""
    parts: dict[str, Any] = new_pipeline(tmp_path).parts()
    total = sum(p.numel() for part in parts.values() for p in part.parameters())
    assert 2 * total < MAX_TOTAL_BYTES - 500_000  # the rest: buffers, tokenizer, samples, card
