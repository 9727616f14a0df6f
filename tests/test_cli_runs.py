"""Whole runs from the command line with a tiny model: finished, refused, stopped, killed."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import yaml
from small_runs import small_run, start, wait_for

from sdi_fast import cli
from sdi_fast.checkpoint import list_checkpoints
from sdi_fast.config_io import config_from_yaml
from sdi_fast.engine import Engine, StepMetrics
from sdi_fast.runs import prompt_slug

FILES = {
    "config.yaml", "metrics.json", "field.safetensors", "mesh.glb", "preview_00_color.png",
    "preview_00_normal.png", "preview_00_depth.png",
}  # fmt: skip


def read_glb_magic(path: Path) -> bytes:
    return path.read_bytes()[:4]


# ---- whole runs, in this process ------------------------------------------------------------


def test_a_run_its_refusal_overwrite_and_export(tiny, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    arguments = small_run(tiny, "a red mushroom", "--out", str(out), "--steps", "2")
    assert cli.main(arguments) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[0] == f"model: {tiny} (as asked for)"
    assert "done: " in said.out and str(out) in said.out
    names = {p.name for p in out.iterdir()}
    assert names >= FILES and names & {"turntable.mp4", "turntable.gif"}
    assert all(p.stat().st_size for p in out.iterdir())
    assert not any(n.startswith(".tmp") for n in names)
    assert read_glb_magic(out / "mesh.glb") == b"glTF"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["steps"] == 2 and metrics["prompt"] == "a red mushroom"
    assert config_from_yaml(out / "config.yaml").engine.max_steps == 2

    (out / "notes.txt").write_text("mine")
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert "--resume" in error and "--overwrite" in error and error.count("\n") == 1
    assert cli.main([*arguments, "--overwrite", "--seed", "1"]) == 0
    assert (out / "notes.txt").read_text() == "mine"
    assert config_from_yaml(out / "config.yaml").engine.seed == 1

    capsys.readouterr()
    assert cli.main(["export", str(out), "--format", "ply", "--resolution", "8"]) == 0
    assert (out / "mesh.ply").is_file() and "done: " in capsys.readouterr().out


def test_resume_of_a_finished_run_and_refusals(tiny, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out"
    assert cli.main(small_run(tiny, "a mug", "--out", str(out), "--steps", "2", "--quiet")) == 0
    field = (out / "field.safetensors").read_bytes()
    (out / "mesh.glb").unlink()
    assert cli.main(["generate", "--resume", "--out", str(out)]) == 0  # nothing else to repeat
    assert (out / "mesh.glb").is_file() and (out / "field.safetensors").read_bytes() == field

    capsys.readouterr()
    for options, key in (
        (["--steps", "3"], "engine.max_steps"),
        (["--seed", "3"], "engine.seed"),
        (["another prompt"], "prompt"),
        (["--set", "optim.lr_field=1"], "optim.lr_field"),
    ):
        assert cli.main(["generate", *options, "--resume", "--out", str(out)]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"sdi-fast: error: {key}: ") and error.count("\n") == 1
    free = ["--set", "export.mesh_resolution=8", "--set", "engine.checkpoint_every=1"]
    assert cli.main(["generate", *free, "--resume", "--out", str(out)]) == 0

    for path in list_checkpoints(out):
        path.write_bytes(path.read_bytes()[:-1])
    capsys.readouterr()
    assert cli.main(["generate", "--resume", "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdi-fast: error: checkpoint ") and error.count("\n") == 1
    assert "is corrupted" in error


@pytest.mark.parametrize("prompt", ["../../x", "${oc.env:HOME}", "🍄 {0} %s", "CON", "[b]x[/b]"])
def test_hostile_prompts_are_only_text(prompt: str, tiny, tmp_path, monkeypatch, capsys) -> None:
    work = tmp_path / "a" / "b"
    work.mkdir(parents=True)
    monkeypatch.chdir(work)
    assert cli.main(small_run(tiny, prompt, "--steps", "1", "--quiet")) == 0
    assert [p.name for p in work.iterdir()] == ["outputs"]
    assert [p.name for p in (work / "outputs").iterdir()] == [prompt_slug(prompt)]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    out = work / "outputs" / prompt_slug(prompt)
    assert yaml.safe_load((out / "config.yaml").read_text())["prompt"] == prompt
    assert json.loads((out / "metrics.json").read_text())["prompt"] == prompt
    assert prompt in capsys.readouterr().out


# ---- whole runs, killed ---------------------------------------------------------------------


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_interrupted_killed_and_resumed_equals_an_unbroken_run(tiny, tmp_path, capsys) -> None:
    """SIGINT, then SIGKILL, then to the end: the same files, byte by byte."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    # checkpoint_every has no effect on what is computed, and lets the kill come early
    run = small_run(
        tiny, "a red mushroom", "--steps", "60", "--deterministic",
        "--set", "engine.checkpoint_every=10",
    )  # fmt: skip
    assert cli.main([*run, "--quiet", "--out", str(whole)]) == 0

    process = start([*run, "--out", str(broken)])
    assert process.stdout is not None
    while not process.stdout.readline().startswith("step "):
        assert process.poll() is None
    capsys.readouterr()
    process.send_signal(signal.SIGSTOP)  # so that it still holds the lock
    assert cli.main([*run, "--overwrite", "--out", str(broken)]) == 2
    assert f"another process (pid {process.pid})" in capsys.readouterr().err
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, error = process.communicate(timeout=90)
    assert process.returncode == 130, error
    assert f"resume with: sdi-fast generate --resume --out {broken}" in error
    assert "Traceback" not in error
    first = list_checkpoints(broken)[-1]
    assert not (broken / "mesh.glb").exists() and first.name < "checkpoint-000060"

    process = start(["generate", "--resume", "--out", str(broken)])
    wait_for(process, lambda: list_checkpoints(broken)[-1] != first)
    process.kill()
    process.communicate()
    second = list_checkpoints(broken)[-1]
    assert first.name < second.name < "checkpoint-000060"

    # the command as it was, with --resume added
    assert cli.main([*run, "--quiet", "--resume", "--out", str(broken)]) == 0
    for name in ("field.safetensors", "mesh.glb", "preview_00_color.png"):
        assert (whole / name).read_bytes() == (broken / name).read_bytes(), name
    losses = [
        [
            (row["step"], row["loss"])
            for row in json.loads((p / "metrics.json").read_text())["history"]
        ]
        for p in (whole, broken)
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 60


def test_sigterm_saves_and_exits_with_143(tiny, tmp_path, monkeypatch, capsys) -> None:
    out = tmp_path / "out"
    original = Engine.step

    def step(self: Engine) -> StepMetrics:
        if self.global_step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    monkeypatch.setattr(Engine, "step", step)
    assert cli.main(small_run(tiny, "a mug", "--steps", "50", "--out", str(out))) == 143
    assert "resume with: " in capsys.readouterr().err
    assert [p.name for p in list_checkpoints(out)] == ["checkpoint-000004.safetensors"]
    assert not (out / "mesh.glb").exists() and not (out / "metrics.json").exists()
