"""Pictures, video, field files and all of an export together."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_mesh import PEAK, Sphere

from sdi_fast import media
from sdi_fast.config import CameraConfig, Config, ExportConfig, FieldConfig
from sdi_fast.config_io import config_to_yaml
from sdi_fast.export import export_all, export_run, saved_field
from sdi_fast.field import EnvironmentBackground, NeRFField
from sdi_fast.field_file import load_field, save_field
from sdi_fast.mesh import extract_surface
from sdi_fast.types import Camera, RenderOutput, SDIFastError

SMALL = ExportConfig(
    mesh_resolution=24, turntable_frames=5, turntable_size=33, preview_views=2, preview_size=24
)


class FakeEngine(Sphere):
    """A sphere with an engine's other attributes; its images are a disc on a background."""

    def __init__(self, config: Config, peak: float = PEAK) -> None:
        super().__init__(peak)
        self.config, self.global_step = config, 3
        generator = torch.Generator().manual_seed(0)
        self.field = NeRFField(config.field, generator=generator)
        self.background = EnvironmentBackground(generator=generator)
        self.azimuths: list[float] = []

    def render(self, camera: Camera, shading: str = "albedo") -> RenderOutput:
        b, h, w = camera.batch_size, camera.height, camera.width
        self.azimuths += camera.azimuth_deg.tolist()
        y, x = torch.meshgrid(torch.linspace(-1, 1, h), torch.linspace(-1, 1, w), indexing="ij")
        disc = (x**2 + y**2 < 0.5).float().expand(b, h, w)[..., None]
        disc = disc * float(self.peak > 0)
        color = torch.tensor([1.0, 0.5, 0.0])
        depth = disc * (1.5 + 0.5 * y[..., None])  # farther towards the bottom
        return RenderOutput(
            comp_rgb=disc * color + (1 - disc) * 0.25,
            comp_rgb_fg=disc * color,
            comp_rgb_bg=torch.full((b, h, w, 3), 0.25),
            opacity=disc,
            depth=depth,
            z_variance=torch.zeros_like(disc),
            comp_normal=disc * torch.tensor([1.0, 0.5, 0.5]),
            orient=torch.zeros_like(disc),
            n_samples=0,
        )


# ---- pictures -------------------------------------------------------------------------------


def test_previews(tmp_path: Path) -> None:
    engine = FakeEngine(Config())
    paths = media.write_previews(engine, tmp_path, CameraConfig(), SMALL)
    assert [p.name for p in paths] == [
        f"preview_{i:02d}_{kind}.png" for i in range(2) for kind in ("color", "normal", "depth")
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(p.name for p in paths)
    color, normal, depth = (np.asarray(Image.open(p)) for p in paths[:3])
    assert color.shape == (24, 24, 3) and color.dtype == np.uint8
    assert color[12, 12].tolist() == [255, 128, 0] and color[0, 0].tolist() == [64] * 3
    assert normal[12, 12].tolist() == [255, 128, 128] and normal[0, 0].tolist() == [0] * 3
    seen = depth[depth > 0]
    assert depth[0, 0] == 0 and seen.max() == 255 and seen.min() == 55
    assert depth[6, 12] > depth[18, 12], "near is to be brighter than far"
    assert engine.azimuths == [0.0, -180.0]


def test_depth_of_an_empty_view_is_black() -> None:
    zeros = torch.zeros(4, 5)
    assert not media.depth_to_bytes(zeros, zeros).any()


def read_video(path: Path) -> list[np.ndarray]:
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    return [np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in reader]


@pytest.mark.skipif(media.find_ffmpeg() is None, reason="no ffmpeg here")
def test_turntable_video(tmp_path: Path) -> None:
    (tmp_path / "turntable.gif").write_text("of an earlier run")
    engine = FakeEngine(Config())
    path, note = media.write_turntable(engine, tmp_path, CameraConfig(), SMALL)
    assert (path.name, note) == ("turntable.mp4", "")
    assert [p.name for p in tmp_path.iterdir()] == ["turntable.mp4"]
    frames = read_video(path)
    assert len(frames) == 5 and frames[0].shape == (34, 34, 3)  # 33 made even
    assert engine.azimuths == pytest.approx([0.0, 72.0, 144.0, -144.0, -72.0])
    # lossy and with halved chroma: the disc's colour within a tenth
    np.testing.assert_allclose(frames[2][17, 17], [255, 128, 0], atol=25)


def test_turntable_without_ffmpeg_is_a_gif(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(media, "find_ffmpeg", lambda: None)
    (tmp_path / "turntable.mp4").write_text("of an earlier run")
    path, note = media.write_turntable(FakeEngine(Config()), tmp_path, CameraConfig(), SMALL)
    assert path.name == "turntable.gif" and "ffmpeg is missing" in note
    assert [p.name for p in tmp_path.iterdir()] == ["turntable.gif"]
    with Image.open(path) as gif:
        # frames that look the same may be merged by the encoder, so only the start is read
        assert gif.size == (34, 34) and gif.info["loop"] == 0
        pixel = np.asarray(gif.convert("RGB"))[17, 17]
        np.testing.assert_allclose(pixel, [255, 128, 0], atol=8)


@pytest.mark.parametrize("script", ["#!/bin/sh\nexit 1\n", "#!/bin/sh\ncat > /dev/null\n"])
def test_an_ffmpeg_that_fails_gives_a_gif(tmp_path: Path, monkeypatch, script: str) -> None:
    fake = tmp_path / "bin" / "ffmpeg"
    fake.parent.mkdir()
    fake.write_text(script)
    fake.chmod(0o755)
    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    path, note = media.write_turntable(FakeEngine(Config()), out, CameraConfig(), SMALL)
    assert path.name == "turntable.gif" and note
    assert [p.name for p in out.iterdir()] == ["turntable.gif"]


# ---- the field file -------------------------------------------------------------------------

FIELD = FieldConfig(n_levels=4, log2_hashmap_size=8, base_resolution=4, start_level=2, hidden=8,
                    start_step=0, update_steps=2)  # fmt: skip


@pytest.fixture
def field_path(tmp_path: Path) -> Path:
    engine = FakeEngine(Config(prompt="a müg", field=FIELD))
    save_field(saved_field(engine), tmp_path / "field.safetensors")  # type: ignore[arg-type]
    return tmp_path / "field.safetensors"


def test_field_round_trip(field_path: Path) -> None:
    engine = FakeEngine(Config(prompt="a müg", field=FIELD))
    field = load_field(field_path)
    assert field.spec == FIELD.spec() and field.prompt == "a müg"
    assert field.active_levels == FIELD.active_levels(3) == 3
    points = torch.rand(50, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1
    assert torch.equal(field.density(points), engine.field.density(points, 3))
    with torch.no_grad():
        assert torch.equal(field.albedo(points), engine.field(points, 3)[1])
    for name, value in field.background.items():
        assert torch.equal(value, getattr(engine.background, name))


def rewrite(path: Path, change) -> None:
    """Lets `change` loose on the tensors and what the file says about itself."""
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    with safe_open(path, framework="pt") as file:
        (key, text), *_ = file.metadata().items()
    about = json.loads(text)
    replacement = change(tensors, about)
    text = replacement if isinstance(replacement, str) else json.dumps(about)
    save_file(tensors, path, {key: text})


CHANGES = {
    "shape": lambda t, a: t.update({"field.density_w2": torch.zeros(8)}),
    "dtype": lambda t, a: t.update({"background.w3": torch.zeros(3, 16).half()}),
    "missing": lambda t, a: a.update(x=t.pop("background.w1").sum().item()),
    "superfluous": lambda t, a: t.update(extra=torch.zeros(1)),
    "nan": lambda t, a: t.update({"field.table": t["field.table"] * math.nan}),
    "levels": lambda t, a: a.update(active_levels=5),
    "levels-negative": lambda t, a: a.update(active_levels=-1),
    "levels-text": lambda t, a: a.update(active_levels="2"),
    "format": lambda t, a: "null",
    "not-json": lambda t, a: "{",
    "list": lambda t, a: "[]",
    "spec-missing": lambda t, a: a.update(spec=None),
    "spec-key": lambda t, a: a.update(spec={}),
    "spec-larger": lambda t, a: a["spec"].update(n_levels=5),
    "spec-huge": lambda t, a: a["spec"].update(log2_hashmap_size=60),
    "spec-type": lambda t, a: a["spec"].update(hidden="8"),
    "spec-null": lambda t, a: a["spec"].update(radius=None),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_field_that_does_not_fit_is_one_line(field_path: Path, name: str) -> None:
    rewrite(field_path, CHANGES[name])
    with pytest.raises(SDIFastError, match="^field .*cannot be used") as caught:
        load_field(field_path)
    assert "\n" not in str(caught.value)


def test_a_file_without_metadata_is_no_field(field_path: Path) -> None:
    save_file(load_file(field_path), field_path)
    with pytest.raises(SDIFastError, match="not in the format"):
        load_field(field_path)


def test_the_same_field_gives_the_same_bytes(field_path: Path) -> None:
    before = field_path.read_bytes()
    for _ in range(5):  # safetensors' own order of metadata would differ half of the time
        save_field(load_field(field_path), field_path)
        assert field_path.read_bytes() == before


def test_a_damaged_or_missing_field_is_one_line(field_path: Path) -> None:
    field_path.write_bytes(field_path.read_bytes()[:-10])
    with pytest.raises(SDIFastError, match="cannot be used"):
        load_field(field_path)
    field_path.unlink()
    with pytest.raises(SDIFastError, match="no such file"):
        load_field(field_path)


# ---- all together ---------------------------------------------------------------------------


def test_export_all_and_the_same_mesh_again_from_the_folder(tmp_path: Path) -> None:
    config = Config(prompt="a mug", field=FIELD, export=SMALL)
    engine = FakeEngine(config)
    # the field's own volume, so that the mesh of the folder can be compared
    engine.density = lambda x: engine.field.density(x, 3)  # type: ignore[method-assign]
    engine.albedo = lambda x: engine.field(x, 3)[1].detach()  # type: ignore[method-assign]
    files, notes = export_all(engine, tmp_path, SMALL)  # type: ignore[arg-type]
    assert all(p.is_file() for p in files) and set(files) == set(tmp_path.iterdir())
    assert {p.name for p in files} >= {"field.safetensors", "mesh.glb", "preview_01_depth.png"}
    # an untrained field is the blob, whose peak is at the threshold of 10
    assert [n.split(":")[0] for n in notes][0] == "mesh" and "half of its largest" in notes[0]

    (tmp_path / "config.yaml").write_text(config_to_yaml(config))
    first = (tmp_path / "mesh.glb").read_bytes()
    path, _, again = export_run(tmp_path)
    assert path == tmp_path / "mesh.glb" and path.read_bytes() == first
    assert again == notes[:1]
    path, surface, _ = export_run(tmp_path, format="ply", resolution=8)
    assert path.name == "mesh.ply" and len(surface.vertices) < len(
        extract_surface(engine, radius=2.0, resolution=24, threshold=10.0).vertices
    )
    path, _, _ = export_run(tmp_path, out=tmp_path / "my.obj", resolution=8)
    assert path == tmp_path / "my.obj" and path.is_file()


def test_export_all_of_an_empty_volume_writes_the_rest_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "mesh.glb").write_text("of an earlier run")
    engine = FakeEngine(Config(field=FIELD, export=SMALL), peak=0.0)
    files, notes = export_all(engine, tmp_path, SMALL)  # type: ignore[arg-type]
    names = {p.name for p in files}
    assert "mesh.glb" not in names and not (tmp_path / "mesh.glb").exists()
    assert {"field.safetensors", "preview_00_color.png"} <= names
    assert any(n.startswith("turntable.") for n in names)
    assert any(n.startswith("no mesh was written: mesh: no surface") for n in notes)


def test_export_run_refuses_what_is_no_run(tmp_path: Path, field_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, name in (
        (dict(run=tmp_path / "none"), "run"),
        (dict(run=empty), "run"),
        (dict(run=tmp_path, format="stl"), "format"),
        (dict(run=tmp_path, out=tmp_path / "x.stl"), "format"),
        (dict(run=tmp_path, format="ply", out=tmp_path / "x.obj"), "out"),
        (dict(run=tmp_path, out=tmp_path / "none" / "x.obj"), "out"),
        (dict(run=tmp_path, resolution=0), "resolution"),
        (dict(run=tmp_path, threshold=-1.0), "threshold"),
    ):
        with pytest.raises(SDIFastError, match=f"^{name}: ") as caught:
            export_run(**arguments)
        assert "\n" not in str(caught.value)


def test_saved_field_copies_to_a_device(field_path: Path) -> None:
    field = load_field(field_path)
    moved = field.to("cpu")
    assert dataclasses.asdict(moved.spec) == dataclasses.asdict(field.spec)
    assert torch.equal(moved.params.table, field.params.table)
