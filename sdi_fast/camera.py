"""Cameras: random ones for training, an orbit for evaluation (methods.md D, Camera and Light).

World frame: z up, azimuth 0 looks from +x, azimuth 90 from +y. Camera frame: x right, y up,
looking along -z. Everything is drawn and computed on the CPU in f32 and moved at the end, so that
a generator gives the same cameras on every device.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .config import CameraConfig, Range
from .types import Camera, SDIFastError


def sample_cameras(
    config: CameraConfig, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Camera:
    """`config.batch_size` random cameras with a random light each.

    Each view's elevation is, with probability 1/2 each, uniform in angle or uniform in its sine.
    Azimuths are stratified over the batch as the official code does (view i is drawn from the
    i-th of B equal parts of the range); for one view that is the uniform law. The angles and the
    distance in the result are those before the perturbations: they are what the prompt is told.

    Args:
        generator: on the CPU; the only source of randomness.

    Raises:
        SDIFastError: for a setting out of range.
    """
    _check(config)
    n = config.batch_size

    def uniform(bounds: Range, *shape: int) -> Tensor:
        return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(*shape, generator=generator)

    def normal(std: float) -> Tensor:  # [B, 3]
        return std * torch.randn(n, 3, generator=generator)

    elevation = _sample_elevation(config.elevation_range, n, generator)
    part = (torch.rand(n, generator=generator) + torch.arange(n)) / n
    azimuth = config.azimuth_range[0] + part * (config.azimuth_range[1] - config.azimuth_range[0])
    distance = uniform(config.distance_range, n)
    fovy = torch.deg2rad(uniform(config.fovy_range, n))

    shake = (-config.camera_perturb, config.camera_perturb)
    position = spherical_to_cartesian(azimuth, elevation, distance) + uniform(shake, n, 3)
    center = normal(config.center_perturb)
    up = torch.tensor([0.0, 0.0, 1.0]) + normal(config.up_perturb)
    to_light = F.normalize(position + normal(config.light_position_perturb), dim=-1)
    light = to_light * uniform(config.light_distance_range, n)[:, None]
    camera = Camera(
        c2w=look_at(position, center, up),
        fovy=fovy,
        light_positions=light,
        azimuth_deg=azimuth,
        elevation_deg=elevation,
        distance=distance,
        height=config.height,
        width=config.width,
    )
    return camera_to(camera, device)


def orbit_cameras(
    config: CameraConfig,
    n_views: int,
    *,
    height: int | None = None,  # pixels; default: the config's
    width: int | None = None,
    elevation_deg: float | None = None,
    distance: float | None = None,  # scene units
    fovy_deg: float | None = None,
    azimuth_offset_deg: float = 0.0,
    device: torch.device | str = "cpu",
) -> Camera:
    """`n_views` cameras on a circle around the origin, each with its light at the camera.

    View i looks from azimuth offset + 360 i / n, wrapped to [-180, 180).

    Raises:
        SDIFastError: for a setting out of range.
    """
    elevation_deg = config.eval_elevation if elevation_deg is None else elevation_deg
    distance = config.eval_distance if distance is None else distance
    fovy_deg = config.eval_fovy if fovy_deg is None else fovy_deg
    height = config.height if height is None else height
    width = config.width if width is None else width
    if n_views < 1:
        raise SDIFastError(f"n_views: expected at least 1, got {n_views}")
    if not -90.0 < elevation_deg < 90.0:
        raise SDIFastError(
            f"elevation_deg: expected between -90 and 90, both excluded, got {elevation_deg}"
        )
    if not math.isfinite(azimuth_offset_deg):
        raise SDIFastError(
            f"azimuth_offset_deg: expected a finite number, got {azimuth_offset_deg}"
        )
    _check_size(height, width)
    _check_range("distance", (distance, distance), 0.0, math.inf)
    _check_range("fovy_deg", (fovy_deg, fovy_deg), 0.0, 180.0)

    turn = torch.arange(n_views, dtype=torch.float64) * (360.0 / n_views) + azimuth_offset_deg
    azimuth = (torch.remainder(turn + 180.0, 360.0) - 180.0).float()
    elevation = torch.full((n_views,), float(elevation_deg))
    distances = torch.full((n_views,), float(distance))
    position = spherical_to_cartesian(azimuth, elevation, distances)
    up = torch.tensor([0.0, 0.0, 1.0]).expand(n_views, 3)
    camera = Camera(
        c2w=look_at(position, torch.zeros(n_views, 3), up),
        fovy=torch.full((n_views,), math.radians(fovy_deg)),
        light_positions=position,
        azimuth_deg=azimuth,
        elevation_deg=elevation,
        distance=distances,
        height=height,
        width=width,
    )
    return camera_to(camera, device)


def camera_to(camera: Camera, device: torch.device | str) -> Camera:
    """`camera` with its tensors on `device`."""
    return _map_tensors(camera, lambda tensor: tensor.to(device))


def select_views(camera: Camera, indices: Sequence[int] | slice | Tensor) -> Camera:
    """The views at `indices`, in that order."""
    if isinstance(indices, Sequence):
        indices = torch.tensor(list(indices), dtype=torch.int64)
    return _map_tensors(camera, lambda tensor: tensor[indices])


def spherical_to_cartesian(
    azimuth_deg: Tensor,  # [B]
    elevation_deg: Tensor,  # [B]
    distance: Tensor,  # [B] scene units
) -> Tensor:  # [B, 3] scene units
    """Points seen from the origin under these angles."""
    azimuth, elevation = torch.deg2rad(azimuth_deg), torch.deg2rad(elevation_deg)
    level = distance * elevation.cos()
    return torch.stack(
        [level * azimuth.cos(), level * azimuth.sin(), distance * elevation.sin()], dim=-1
    )


def look_at(
    position: Tensor,  # [B, 3] scene units
    center: Tensor,  # [B, 3] scene units
    up: Tensor,  # [B, 3], not parallel to center - position
) -> Tensor:  # [B, 3, 4]
    """Camera-to-world matrices with columns right, up, -look, position."""
    look = F.normalize(center - position, dim=-1)
    right = F.normalize(torch.linalg.cross(look, up), dim=-1)
    true_up = torch.linalg.cross(right, look)  # unit length: right and look are orthonormal
    return torch.stack([right, true_up, -look, position], dim=-1)


def _sample_elevation(bounds: Range, n: int, generator: torch.Generator) -> Tensor:  # [n] degrees
    low, high = bounds
    in_angle = torch.rand(n, generator=generator) < 0.5
    u = torch.rand(n, generator=generator)
    sin_low, sin_high = math.sin(math.radians(low)), math.sin(math.radians(high))
    by_sine = torch.rad2deg(torch.asin((sin_low + u * (sin_high - sin_low)).clamp(-1.0, 1.0)))
    return torch.where(in_angle, low + u * (high - low), by_sine)


def _map_tensors(camera: Camera, function: Callable[[Tensor], Tensor]) -> Camera:
    changed: dict[str, Any] = {
        f.name: function(getattr(camera, f.name))
        for f in dataclasses.fields(camera)
        if isinstance(getattr(camera, f.name), Tensor)
    }
    return dataclasses.replace(camera, **changed)


def _check(config: CameraConfig) -> None:
    if config.batch_size < 1:
        raise SDIFastError(f"camera.batch_size: expected at least 1, got {config.batch_size}")
    _check_size(config.height, config.width)
    _check_range("camera.elevation_range", config.elevation_range, -90.0, 90.0, closed=True)
    _check_range("camera.azimuth_range", config.azimuth_range, -180.0, 180.0, closed=True)
    _check_range("camera.distance_range", config.distance_range, 0.0, math.inf)
    _check_range("camera.fovy_range", config.fovy_range, 0.0, 180.0)
    _check_range("camera.light_distance_range", config.light_distance_range, 0.0, math.inf)


def _check_size(height: int, width: int) -> None:
    for name, value in (("height", height), ("width", width)):
        if value < 1:
            raise SDIFastError(f"{name}: expected at least 1 pixel, got {value}")


def _check_range(
    name: str, bounds: Range, low: float, high: float, *, closed: bool = False
) -> None:
    """Raise unless low < bounds[0] <= bounds[1] < high (<= where `closed`)."""
    a, b = bounds
    good = a <= b and ((low <= a and b <= high) if closed else (low < a and b < high))
    if not good:
        limits = f"{'[' if closed else '('}{low:g}, {high:g}{']' if closed else ')'}"
        given = f"{a:g}" if a == b else f"({a:g}, {b:g})"
        raise SDIFastError(f"{name}: expected {limits}, smaller number first, got {given}")
