"""The run folder, its name, its lock and its files; configs from and to YAML."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import CHILD_CWD

from sdi_fast.checkpoint import write_checkpoint
from sdi_fast.config import Config, ModelConfig, config_to_dict, toyworld_config
from sdi_fast.config_io import (
    BOUNDS,
    check_config,
    check_prompt,
    config_from_dict,
    config_from_yaml,
    config_to_yaml,
    parse_assignment,
)
from sdi_fast.constants import SLUG_CHARS
from sdi_fast.runs import build_metrics, open_run, prompt_slug, thin
from sdi_fast.types import SDIFastError

HOSTILE = [
    "../../x", "/etc/passwd", "${oc.env:HOME}", "{0.__class__}", "%s%n", "$(rm -rf /)", "`id`",
    "a\nb", "a\0b", "\x1b[31mred", "🍄🍄", "日本語", "", " ", ".", "..", "-rf", "~", "CON", "nul",
    "com1.txt", "a" * 1_000_000, "🍄" * 500_000, "\u202ekcab", "\udcff", "a:b", "x\\y", "C:\\x",
]  # fmt: skip


def one_line(error: pytest.ExceptionInfo[SDIFastError]) -> str:
    text = str(error.value)
    assert "\n" not in text and len(text) < 500, text[:500]
    return text


# ---- names ----------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", HOSTILE, ids=lambda p: ascii(p[:12]))
def test_a_slug_is_a_plain_name(prompt: str) -> None:
    slug = prompt_slug(prompt)
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*-[0-9a-f]{8}", slug) and len(slug) <= SLUG_CHARS


def test_slugs_tell_prompts_apart_and_can_be_read() -> None:
    assert len({prompt_slug(p) for p in HOSTILE}) == len(HOSTILE)
    assert prompt_slug("A red Mushroom!").startswith("a-red-mushroom-")
    assert prompt_slug("Café") != prompt_slug("Cafe")
    assert prompt_slug("a mug") == prompt_slug("a mug")


def test_without_out_the_folder_is_below_outputs(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    with open_run(None, "../../x") as run:
        assert run.path.resolve().parent == tmp_path / "outputs"


def test_a_given_out_is_taken_as_it_is(tmp_path: Path) -> None:
    with open_run(tmp_path / "${HOME}", "../../x") as run:
        assert run.path == tmp_path / "${HOME}" and run.path.is_dir()


# ---- existing folders -----------------------------------------------------------------------


def test_an_existing_run_is_refused_without_resume_or_overwrite(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SDIFastError, match="not empty") as caught, open_run(tmp_path, "a mug"):
        pass
    assert "--resume" not in one_line(caught) and "--overwrite" in one_line(caught)
    with pytest.raises(SDIFastError, match="no run to resume") as caught:
        with open_run(tmp_path, "a mug", resume=True):
            pass
    write_checkpoint(tmp_path, 1, {"x": torch.zeros(1)}, Config())
    with pytest.raises(SDIFastError, match="--resume") as caught, open_run(tmp_path, "a mug"):
        pass
    with open_run(tmp_path, "a mug", resume=True):
        pass


def test_a_folder_with_only_a_lock_is_empty(tmp_path: Path) -> None:
    for _ in range(2):  # the first leaves its lock there
        with open_run(tmp_path, "a mug") as run:
            pass
    assert [p.name for p in run.path.iterdir()] == [".lock"]


def test_overwrite_removes_only_what_a_run_writes_and_only_at_the_start(tmp_path: Path) -> None:
    outside = tmp_path / "outside.glb"
    outside.write_text("theirs")
    out = tmp_path / "out"
    out.mkdir()
    ours = [
        "config.yaml", "metrics.json", "mesh.glb", "mesh.obj", "field.safetensors", "turntable.gif",
        "preview_00_color.png", "preview_11_depth.png", "checkpoint-000010.safetensors",
        ".tmp-1-mesh.glb",
    ]  # fmt: skip
    theirs = ["notes.txt", "mesh.glb.bak", "preview_00_colour.png", "checkpoint-1.safetensors"]
    for name in ours + theirs:
        (out / name).write_text("x")
    (out / "turntable.mp4").mkdir()  # a folder of one of our names is not ours
    (out / "mesh.ply").symlink_to(outside)
    with open_run(out, "a mug", overwrite=True) as run:
        assert (out / "mesh.glb").exists(), "cleared before everything was checked"
        run.start(Config(prompt="a mug"))
    left = {p.name for p in out.iterdir()}
    assert left == {*theirs, "turntable.mp4", "config.yaml", ".lock"}
    assert outside.read_text() == "theirs"


@pytest.mark.parametrize("out", ["", "  ", "a\0b", "x" * 5000])
def test_a_useless_out_is_one_line(tmp_path: Path, monkeypatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SDIFastError, match="^out: ") as caught, open_run(out, "a mug"):
        pass
    one_line(caught)


def test_an_out_that_is_a_file_or_below_one(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    for out in (file, file / "below"):
        with pytest.raises(SDIFastError, match="^out: ") as caught, open_run(out, "a mug"):
            pass
        one_line(caught)
    assert file.read_text() == "x"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_that_cannot_be_written(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SDIFastError, match="^out: "), open_run(tmp_path, "a mug"):
        pass


def test_resume_and_overwrite_exclude_each_other(tmp_path: Path) -> None:
    with pytest.raises(SDIFastError, match="both"):
        with open_run(tmp_path, "a mug", resume=True, overwrite=True):
            pass


HOLD = """
import sys
from sdi_fast.runs import open_run
with open_run(sys.argv[1], "a mug"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no fcntl there")
def test_two_processes_cannot_write_one_folder_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=CHILD_CWD,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "locked\n"
        with pytest.raises(SDIFastError, match=f"another process .pid {holder.pid}.") as caught:
            with open_run(tmp_path, "a mug", overwrite=True):
                pass
        one_line(caught)
    finally:
        holder.kill()
        holder.wait()
    with open_run(tmp_path, "a mug"):
        pass


# ---- metrics --------------------------------------------------------------------------------


def test_metrics_are_valid_json_with_a_thinned_history(tmp_path: Path) -> None:
    history = [{"loss": 1.0 / (i + 1), "t": 980.0 - i, "skipped": 0.0} for i in range(2000)]
    history[-1]["loss"] = math.nan
    history[7]["skipped"] = 1.0
    metrics = build_metrics(
        toyworld_config(), history, seconds=12.5, device=torch.device("cpu"), scores={"iou": 0.7},
        notes=["no surface"],
    )  # fmt: skip
    with open_run(tmp_path, "a mug") as run:
        path = run.write_metrics(metrics)

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(path.read_text(), parse_constant=refuse)
    assert read["steps"] == 2000 and read["skipped_steps"] == 1 and read["scores"] == {"iou": 0.7}
    assert len(read["history"]) == 500 and read["history"][0]["loss"] == 1.0
    assert read["history"][-1]["step"] == 1999 and read["final"]["loss"] is None
    assert read["versions"]["torch"] == torch.__version__ and read["peak_memory_mib"]["host"] > 10
    assert read["model"] == "toyworld" and read["notes"] == ["no surface"]


def test_metrics_of_a_run_without_steps() -> None:
    metrics = build_metrics(Config(), [], seconds=0.0, device=torch.device("cpu"))
    assert metrics["steps"] == 0 and metrics["final"] is None and metrics["history"] == []


def test_thinning_keeps_order_and_ends() -> None:
    assert thin(range(3)) == [0, 1, 2]
    rows = thin(range(501))
    assert len(rows) == 500 and rows[0] == 0 and rows[-1] == 500 and rows == sorted(set(rows))


# ---- configs --------------------------------------------------------------------------------


VALID = [p for p in HOSTILE if len(p) < 1000 and p.strip() and "\0" not in p and p != "\udcff"]


@pytest.mark.parametrize("prompt", VALID, ids=ascii)
def test_yaml_round_trip_with_any_prompt(tmp_path: Path, prompt: str) -> None:
    for config in (Config(), toyworld_config(), Config(model=ModelConfig(revision="main"))):
        config = dataclasses.replace(config, prompt=prompt.strip())
        path = tmp_path / "config.yaml"
        path.write_text(config_to_yaml(config), encoding="utf-8")
        assert config_from_yaml(path) == config
        assert yaml.safe_load(path.read_text(encoding="utf-8")) == config_to_dict(config)


def test_a_part_of_a_config_is_laid_over_the_base() -> None:
    base = toyworld_config()
    config = config_from_dict({"camera": {"height": 32}, "loss": {"convex": [0, 1, 2, 30]}}, base)
    assert config.camera.height == 32 and config.camera.width == base.camera.width
    assert config.loss.convex == (0.0, 1.0, 2.0, 30.0) and config.field == base.field


def test_max_steps_in_a_file_stretches_the_schedules_it_does_not_give() -> None:
    config = config_from_dict({"engine": {"max_steps": 1000}, "loss": {"sparsity": 0.5}})
    assert config == dataclasses.replace(
        Config().with_steps(1000),
        loss=dataclasses.replace(Config().with_steps(1000).loss, sparsity=0.5),
    )


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("camera.foo=3", "camera.foo"),
        ("nonsense=1", "nonsense"),
        ("camera=3", "camera"),
        ("camera.height=64.5", "camera.height"),
        ("camera.height=true", "camera.height"),
        ("camera.height=0", "camera.height"),
        ("camera.fovy_range=[70, 40]", "camera.fovy_range"),
        ("camera.fovy_range=[40]", "camera.fovy_range"),
        ("camera.fovy_range=40", "camera.fovy_range"),
        ("guidance.method=foo", "guidance.method"),
        ("guidance.guidance_scale=.nan", "guidance.guidance_scale"),
        ("guidance.guidance_scale=.inf", "guidance.guidance_scale"),
        ("guidance.guidance_scale=1" + "0" * 400, "guidance.guidance_scale"),
        ("guidance.t_range=[0.1, 1.1]", "guidance.t_range"),
        ("guidance.t_anneal=1", "guidance.t_anneal"),
        ("engine.max_steps=0", "engine.max_steps"),
        ("engine.seed=-1", "engine.seed"),
        ("loss.convex=[1, 2]", "loss.convex"),
        ("loss.convex=fast", "loss.convex"),
        ("render.albedo_prob=0.9", "render.textureless_prob"),
        ("model.id=", "model.id"),
        ("prompt=" + "a" * 1001, "prompt"),
        ("prompt=[[1]]", "prompt"),
        ("=3", "set"),
        ("camera.height", "set"),
        ("camera.height=[1", "set"),
        ("camera.height=!!python/object/apply:os.system [id]", "set"),
        ("camera.height=" + "[" * 100_000, "set"),
    ],
    ids=lambda v: v[:40],
)
def test_bad_settings_name_their_key(text: str, names: str) -> None:
    with pytest.raises(SDIFastError, match=rf"^'?{re.escape(names)}'?: ") as caught:
        config_from_dict(parse_assignment(text))
    one_line(caught)


def test_good_settings() -> None:
    def get(text: str) -> Config:
        return config_from_dict(parse_assignment(text))

    assert get("optim.lr_field=1e-2").optim.lr_field == 0.01
    assert get("guidance.guidance_scale=10").guidance.guidance_scale == 10.0
    assert get("prompt=${oc.env:HOME}").prompt == "${oc.env:HOME}"
    assert get("model.revision=null").model.revision is None
    assert get("loss.orient=0").loss.orient == 0.0
    assert get("guidance.t_range=[0.2, 0.9]").guidance.t_range == (0.2, 0.9)


def test_bounds_name_real_settings_and_hold_for_the_defaults() -> None:
    for config in (Config(), toyworld_config()):
        check_config(config)
        for key in BOUNDS:
            stage, name = key.split(".")
            assert hasattr(getattr(config, stage), name), key


@pytest.mark.parametrize(
    "content",
    [
        b"camera: [1", b"\xff\xfe\x00", b"- 1", b"prompt: !!python/object/apply:os.system [id]",
        b"{" * 50_000, b"x" * 2_000_000, b"a: &a [*a]", b"a: b: c",
        b"a: &a [1,1,1]\nb: &b [*a,*a,*a]\nc: &c [*b,*b,*b]\nprompt: *c",
    ],
)  # fmt: skip
def test_a_bad_config_file_is_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content)
    with pytest.raises(SDIFastError) as caught:
        config_from_yaml(path)
    one_line(caught)


def test_a_missing_config_file_is_one_line(tmp_path: Path) -> None:
    for path in (tmp_path / "none.yaml", tmp_path):
        with pytest.raises(SDIFastError, match="^config: ") as caught:
            config_from_yaml(path)
        one_line(caught)


@pytest.mark.parametrize("prompt", ["", "  \n", "a" * 1_000_000, "a\0b", "\udcff"])
def test_prompts_that_no_model_can_be_asked_for(prompt: str) -> None:
    with pytest.raises(SDIFastError, match="^prompt: ") as caught:
        check_prompt(prompt)
    one_line(caught)
