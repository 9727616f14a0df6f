"""What a run leaves to look at: field, previews, mesh, turntable."""

from __future__ import annotations

from pathlib import Path

import torch

from .config import Config, ExportConfig
from .config_io import config_from_yaml
from .engine import Engine
from .field_file import FIELD_NAME, SavedField, load_field, save_field
from .media import write_previews, write_turntable
from .mesh import MESH_FORMATS, Surface, Volume, extract_surface, write_mesh
from .runs import CONFIG_NAME
from .types import SDIFastError


def export_all(engine: Engine, folder: Path, config: ExportConfig) -> tuple[list[Path], list[str]]:
    """Writes field.safetensors, previews, mesh.glb and the turntable.

    An empty volume has no mesh; the rest is written all the same, and the notes say so.

    Returns:
        The files, and notes for the user.
    """
    files, notes = [folder / FIELD_NAME], []
    save_field(saved_field(engine), files[0])
    files += write_previews(engine, folder, engine.config.camera, config)
    mesh = folder / "mesh.glb"
    try:
        surface = export_mesh(
            engine,
            mesh,
            radius=engine.config.field.radius,
            resolution=config.mesh_resolution,
            threshold=config.density_threshold,
        )
        files.append(mesh)
        notes += level_notes(surface, config.density_threshold)
    except SDIFastError as error:
        mesh.unlink(missing_ok=True)  # one of an earlier run would belong to another field
        notes.append(f"no mesh was written: {error}")
    video, note = write_turntable(engine, folder, engine.config.camera, config)
    files.append(video)
    return files, notes + [note] * bool(note)


def export_mesh(
    volume: Volume, path: Path, *, radius: float, resolution: int, threshold: float
) -> Surface:
    """Meshes the volume and writes it by the path's suffix: .glb, .ply or .obj.

    See `mesh.extract_surface` for the arguments and errors.
    """
    surface = extract_surface(volume, radius=radius, resolution=resolution, threshold=threshold)
    write_mesh(surface, path)
    return surface


def export_run(
    run: Path,
    *,
    format: str | None = None,
    resolution: int | None = None,
    threshold: float | None = None,
    out: Path | None = None,
) -> tuple[Path, Surface, list[str]]:
    """Meshes the field that a finished run left in its folder; needs no diffusion model.

    Args:
        run: the folder of a run.
        format: "glb", "ply" or "obj"; None: what `out` ends in, else "glb".
        resolution, threshold: the run's own where None.
        out: the file; RUN/mesh.<format> where None.

    Returns:
        The file, what is in it, and notes for the user.

    Raises:
        SDIFastError: for a folder without a usable field, or a field without a surface.
    """
    path = _mesh_path(run, format, out)
    if not run.is_dir():
        raise SDIFastError(f"run: expected the folder of a run, got {run}")
    if not (run / FIELD_NAME).is_file():
        raise SDIFastError(
            f"run: {run} has no {FIELD_NAME}; a run that was stopped early gets one when "
            "`sdi-fast generate --resume` ends"
        )
    field = load_field(run / FIELD_NAME).to("cuda" if torch.cuda.is_available() else "cpu")
    has_config = (run / CONFIG_NAME).is_file()
    config = (config_from_yaml(run / CONFIG_NAME) if has_config else Config()).export
    threshold = config.density_threshold if threshold is None else threshold
    resolution = config.mesh_resolution if resolution is None else resolution
    surface = export_mesh(
        field, path, radius=field.spec.radius, resolution=resolution, threshold=threshold
    )
    return path, surface, level_notes(surface, threshold)


def _mesh_path(run: Path, format: str | None, out: Path | None) -> Path:
    """The file to write, checked."""
    ending = out.suffix[1:].lower() if out else ""
    kind = format or ending or "glb"
    if kind not in MESH_FORMATS:
        raise SDIFastError(f"format: expected one of {', '.join(MESH_FORMATS)}, got {kind!r}")
    if out is None:
        return run / f"mesh.{kind}"
    if ending != kind:
        raise SDIFastError(f"out: expected a file that ends in .{kind}, got {out}")
    if out.is_dir() or not out.parent.is_dir():
        raise SDIFastError(f"out: expected a file in an existing folder, got {out}")
    return out


def level_notes(surface: Surface, threshold: float) -> list[str]:
    """What the user should know of the level that was taken."""
    if surface.level == threshold:
        return []
    return [
        f"mesh: the surface is where the density is {surface.level:.3g} per scene unit, half of "
        f"its largest value, instead of {threshold:g}"
    ]


def saved_field(engine: Engine) -> SavedField:
    """The engine's field as it stands."""
    background = {name: getattr(engine.background, name) for name in ("w1", "w2", "w3")}
    return SavedField(
        params=engine.field.params(),
        spec=engine.field.spec,
        active_levels=engine.field.active_levels(engine.global_step),
        background=background,
        prompt=engine.config.prompt,
    )
