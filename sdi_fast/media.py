"""Preview pictures and the turntable video."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image
from torch import Tensor

from .camera import orbit_cameras, select_views
from .config import CameraConfig, ExportConfig
from .files import atomic_path
from .types import Camera, RenderOutput

DEPTH_MIN_OPACITY = 0.5  # a pixel that is more background than object shows no depth


class Renderable(Protocol):
    """What can be looked at: an Engine."""

    def render(self, camera: Camera, shading: str = "albedo") -> RenderOutput:
        """Images of the camera's views, on its device."""


def write_previews(
    scene: Renderable, folder: Path, cameras: CameraConfig, config: ExportConfig
) -> list[Path]:
    """preview_NN_{color,normal,depth}.png for views around the object; the paths, in order.

    Normals are in the world frame, encoded as (n + 1) / 2, black on the background. Depth is
    scaled within each view: white is near, dark grey far, black background.
    """
    orbit = _orbit(cameras, config.preview_views, config.preview_size)
    paths = []
    for i in range(config.preview_views):
        output = scene.render(select_views(orbit, [i]))
        images = {
            "color": to_bytes(output.comp_rgb[0]),
            "normal": to_bytes(output.comp_normal[0]),
            "depth": depth_to_bytes(output.depth[0, ..., 0], output.opacity[0, ..., 0]),
        }
        for name, image in images.items():
            path = folder / f"preview_{i:02d}_{name}.png"
            with atomic_path(path) as temp:
                Image.fromarray(image).save(temp, format="PNG")
            paths.append(path)
    return paths


def write_turntable(
    scene: Renderable, folder: Path, cameras: CameraConfig, config: ExportConfig
) -> tuple[Path, str]:
    """turntable.mp4, or turntable.gif where no encoder is; with a note on the latter, else "".

    The video of the other kind, from an earlier run, is removed, so that what is there belongs
    together.
    """
    size = config.turntable_size + config.turntable_size % 2  # H.264's chroma wants even sizes
    orbit = _orbit(cameras, config.turntable_frames, size)
    frames = [
        to_bytes(scene.render(select_views(orbit, [i])).comp_rgb[0])
        for i in range(config.turntable_frames)
    ]
    mp4, gif = folder / "turntable.mp4", folder / "turntable.gif"
    problem = write_mp4(frames, mp4, config.fps)
    if not problem:
        gif.unlink(missing_ok=True)
        return mp4, ""
    write_gif(frames, gif, config.fps)
    mp4.unlink(missing_ok=True)
    return gif, f"turntable: a GIF instead of an MP4 ({problem})"


def find_ffmpeg() -> str | None:
    """Path of the ffmpeg that imageio-ffmpeg would use, or None."""
    try:
        import imageio_ffmpeg

        return str(imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError):
        return None


def write_mp4(
    frames: Sequence[np.ndarray],  # each [H, W, 3] u8, H and W even
    path: Path,
    fps: int,
) -> str:
    """Writes H.264; returns what went wrong, or "" when nothing did."""
    if find_ffmpeg() is None:
        return "ffmpeg is missing"
    import imageio_ffmpeg

    height, width = frames[0].shape[:2]
    try:
        with atomic_path(path) as temp:
            writer = imageio_ffmpeg.write_frames(
                str(temp),
                (width, height),
                fps=fps,
                codec="libx264",
                quality=8,
                macro_block_size=2,
                ffmpeg_log_level="error",
            )
            writer.send(None)
            try:
                for frame in frames:
                    writer.send(np.ascontiguousarray(frame))
            finally:
                writer.close()
            if not temp.stat().st_size:
                raise OSError("it wrote nothing")
    except OSError as error:  # an ffmpeg without that encoder, or one that died
        reason = (str(error).strip().splitlines() or ["it failed"])[0]
        return f"ffmpeg: {reason}"
    return ""


def write_gif(frames: Sequence[np.ndarray], path: Path, fps: int) -> None:
    """Writes a looping GIF; its frame times are whole hundredths of a second."""
    images = [Image.fromarray(f).quantize(128) for f in frames]
    duration = max(round(100 / fps), 2) * 10  # ms; browsers slow down anything below 20
    with atomic_path(path) as temp:
        images[0].save(
            temp,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=duration,
            loop=0,
        )


def to_bytes(image: Tensor) -> np.ndarray:
    """[H, W, 3] in [0, 1] as u8; what is not finite becomes 0."""
    values = image.detach().float().cpu().nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0)
    return (values * 255.0).round().byte().numpy()


def depth_to_bytes(
    depth: Tensor,  # [H, W] sum of w t, scene units
    opacity: Tensor,  # [H, W]
) -> np.ndarray:  # [H, W] u8
    """Near white to far dark grey over the object, black elsewhere."""
    seen = opacity > DEPTH_MIN_OPACITY
    out = np.zeros(tuple(depth.shape), np.uint8)
    if not bool(seen.any()):
        return out
    distance = depth[seen] / opacity[seen]
    near, far = distance.min(), distance.max()
    nearness = (1.0 - (distance - near) / (far - near).clamp_min(1e-6)).nan_to_num(0.0)
    out[seen.cpu().numpy()] = (55.0 + 200.0 * nearness).round().byte().cpu().numpy()
    return out


def _orbit(cameras: CameraConfig, n_views: int, size: int) -> Camera:
    return orbit_cameras(cameras, n_views, height=size, width=size)
