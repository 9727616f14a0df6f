"""What is measured: a config, its model, and the time steps at which a step is looked at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import torch

from ..config import SPEEDS, Component, Config, ModelConfig, toyworld_config
from ..diffusion.pipeline import Pipeline, load_pipeline
from .models import random_pipeline

Speed = Literal["exact", "balanced", "turbo"]
SPEED_NAMES: tuple[Speed, ...] = ("exact", "balanced", "turbo")
T_STEPS = (980, 615, 250)  # 12, 9 and 5 UNet calls with the official settings
ANNEALING = (980, 250)
# From here one view of 512 x 512 keeps about 8 million samples of the initial blob.
DISTANCE, FOVY_DEG, ELEVATION_DEG, AZIMUTH_DEG = 1.768, 55.0, 15.0, 30.0


@dataclass(frozen=True)
class Workload:
    """One thing to measure; results of the same name can be compared."""

    name: str
    config: Config  # real cameras, schedules and learning rates
    pipeline: Callable[[ModelConfig, torch.device], Pipeline]
    t_steps: tuple[int, ...] = T_STEPS
    n_annealing: int = 40  # time steps spread over the annealing

    def annealing(self) -> list[int]:
        """Time steps from the first to the last one of a run, evenly."""
        first, last = ANNEALING
        n = self.n_annealing
        return [round(first + (last - first) * i / max(n - 1, 1)) for i in range(n)]


def choose_workload(device: torch.device, *, quick: bool = False) -> Workload:
    """The full-size model on a GPU, the bundled one elsewhere; `quick` there: as little as can be.

    On a GPU `quick` leaves the workload as it is, so that results stay comparable.
    """
    if device.type == "cuda":
        return Workload("sd21-512", Config(prompt="a benchmark"), random_pipeline)
    config = dataclasses.replace(toyworld_config(), prompt="a red mushroom")
    if not quick:
        return Workload("toyworld-64", config, load_pipeline, n_annealing=10)
    return Workload("tiny", _tiny(config), load_pipeline, t_steps=(250,), n_annealing=2)


def _tiny(config: Config) -> Config:
    return dataclasses.replace(
        config,
        camera=dataclasses.replace(config.camera, height=16, width=16),
        field=dataclasses.replace(config.field, n_levels=4, start_level=2, log2_hashmap_size=10),
        render=dataclasses.replace(config.render, n_samples_per_ray=48, occupancy_resolution=16),
        guidance=dataclasses.replace(config.guidance, inversion_n_steps=2),
    )


def with_speed(config: Config, speed: str, device: torch.device) -> Config:
    """`config` as `--speed` runs it: on a GPU on our own UNet, encoder and graphs."""
    if speed not in SPEEDS:
        raise ValueError(f"speed: expected {', '.join(SPEEDS)}, got {speed!r}")
    ours = device.type == "cuda" or speed != "exact"
    kind: Component = "fast" if ours else "diffusers"
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, denoiser=kind, encoder=kind),
        guidance=dataclasses.replace(config.guidance, static=ours, speed=cast(Speed, speed)),
        engine=dataclasses.replace(config.engine, device=str(device)),
    )


def all_levels(config: Config) -> Config:
    """With every level of the hash grid from the first step."""
    field = dataclasses.replace(config.field, start_level=config.field.n_levels)
    return dataclasses.replace(config, field=field)


def frozen(config: Config) -> Config:
    """With learning rates of 0: the scene stays as it is, and with it the number of samples."""
    optim = dataclasses.replace(config.optim, lr_field=0.0, lr_background=0.0)
    return dataclasses.replace(config, optim=optim)


def one_camera(config: Config) -> Config:
    """With the same view in every step, whoever draws the cameras."""
    camera = dataclasses.replace(
        config.camera,
        elevation_range=(ELEVATION_DEG, ELEVATION_DEG),
        azimuth_range=(AZIMUTH_DEG, AZIMUTH_DEG),
        distance_range=(DISTANCE, DISTANCE),
        fovy_range=(FOVY_DEG, FOVY_DEG),
        camera_perturb=0.0,
        center_perturb=0.0,
        up_perturb=0.0,
        light_distance_range=(1.0, 1.0),
        light_position_perturb=0.0,
    )
    return dataclasses.replace(config, camera=camera)


def still(config: Config) -> Config:
    """One scene, one view, all levels: what a step's time is measured on."""
    return one_camera(frozen(all_levels(config)))


def without_noise(config: Config) -> Config:
    """Nothing drawn in guidance and rendering, so that two implementations compute the same."""
    guidance = dataclasses.replace(config.guidance, inversion_eta=0.0, sample_posterior=False)
    render = dataclasses.replace(config.render, randomized=False)
    return dataclasses.replace(config, guidance=guidance, render=render)
