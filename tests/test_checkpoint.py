"""Checkpoints survive a kill at any moment, and damage is found."""

from __future__ import annotations

import dataclasses
import json
import pickle
import struct
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import CHILD_CWD

from sdi_fast.checkpoint import (
    check_same_run,
    list_checkpoints,
    load_checkpoint,
    load_latest,
    prune_checkpoints,
    save_checkpoint,
    write_checkpoint,
)
from sdi_fast.config import Config, EngineConfig, ExportConfig, GuidanceConfig
from sdi_fast.types import SDIFastError


def make_state(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "field.table": torch.randn(1000, generator=generator),
        "half": torch.randn(7, 3, generator=generator).half(),
        "brain": torch.randn(5, generator=generator).bfloat16(),
        "rng": generator.get_state(),
        "mask": torch.rand(4, 4, 4, generator=generator) > 0.5,
        "step": torch.tensor(step),
        "empty": torch.zeros(0, 5, dtype=torch.float64),
    }


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype and a[name].shape == b[name].shape, name
        assert torch.equal(a[name], b[name]), name


def test_round_trip_of_every_kind_of_tensor(tmp_path: Path) -> None:
    state = make_state(3)
    whole = torch.arange(20.0)
    state.update(view=whole[3:7], strided=whole.reshape(4, 5).t(), shared=whole, again=whole)
    write_checkpoint(tmp_path, 3, state, Config(prompt="a mug"))
    loaded = load_latest(tmp_path)
    assert loaded is not None and loaded.step == 3
    assert_same(loaded.tensors, state)
    assert json.loads(loaded.metadata["config"])["prompt"] == "a mug"
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000003.safetensors"]


def test_folder_without_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-12.safetensors.bak").write_text("x")
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "missing") is None


def test_keeps_the_last_two_by_number_not_by_name(tmp_path: Path) -> None:
    for step in (999_998, 999_999, 1_000_000):
        write_checkpoint(tmp_path, step, make_state(step), Config())
    assert [p.name for p in list_checkpoints(tmp_path)] == [
        "checkpoint-999999.safetensors",
        "checkpoint-1000000.safetensors",
    ]


def test_a_run_resumed_from_an_older_one_removes_the_damaged_newer(tmp_path: Path) -> None:
    for step in (10, 20):
        write_checkpoint(tmp_path, step, make_state(step), Config())
    list_checkpoints(tmp_path)[-1].write_bytes(b"")
    write_checkpoint(tmp_path, 15, make_state(15), Config())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        latest = load_latest(tmp_path)
    assert latest is not None and latest.step == 15
    prune_checkpoints(tmp_path, 15, keep=1)
    assert len(list_checkpoints(tmp_path)) == 1


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def truncate_in_header(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 8)


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(bytes(data))


def flip_data(path: Path) -> None:
    flip(path, -1)


def flip_metadata(path: Path) -> None:
    flip(path, path.read_bytes().index(b'"step"') + len('"step":"1'))


def drop_metadata(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_file({k: v.clone() for k, v in load_file(path).items()}, path)


def rename_tensor(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b'"mask"', b'"musk"'))


def make_pickle(path: Path) -> None:
    torch.save(make_state(1), path)


def make_bare_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps({"a": 1}))


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 62) + b"{}")


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGES = [
    truncate, truncate_in_header, empty, append, flip_data, flip_metadata, drop_metadata,
    rename_tensor, make_pickle, make_bare_pickle, huge_header, make_folder,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda f: f.__name__)
def test_damage_is_found_and_the_previous_one_is_used(tmp_path: Path, damage) -> None:
    for step in (100, 120):
        write_checkpoint(tmp_path, step, make_state(step), Config())
    first, second = list_checkpoints(tmp_path)
    damage(second)
    with pytest.warns(UserWarning, match=r"checkpoint-000120.*using checkpoint-000100"):
        latest = load_latest(tmp_path)
    assert latest is not None and latest.step == 100
    assert_same(latest.tensors, make_state(100))

    damage(first)
    with pytest.raises(SDIFastError, match="checkpoint .*000120.safetensors") as caught:
        load_latest(tmp_path)
    assert "\n" not in str(caught.value) and "1 older" in str(caught.value)


def test_every_flipped_byte_of_a_small_checkpoint_is_found(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-000001.safetensors"
    save_checkpoint(path, {"x": torch.arange(3.0)}, {"step": "1"})
    good = path.read_bytes()
    size = struct.unpack("<Q", good[:8])[0]
    header = good[8 : 8 + size]
    padding = range(8 + len(header.rstrip()), 8 + size)  # spaces: say nothing
    for position in range(len(good)):
        flip(path, position)
        try:
            loaded = load_checkpoint(path)
        except SDIFastError as error:
            assert "\n" not in str(error)
        else:
            assert position in padding, position
            assert torch.equal(loaded.tensors["x"], torch.arange(3.0))
        path.write_bytes(good)


# A process that imports torch once and forks the ones that get killed.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
import sdi_fast.checkpoint as checkpoint, sdi_fast.files as files
from sdi_fast.config import Config

torch.set_num_threads(1)
folder, mode, config = Path(sys.argv[1]), sys.argv[2], Config()
real_write, real_replace, real_fsync = Path.write_bytes, os.replace, files._fsync
real_unlink = Path.unlink

def state(step):
    return {"x": torch.full((40_000,), float(step)), "step": torch.tensor(step)}

def die_at(n):
    # the n-th call of a kind below is the last thing the process does: before it, or half done
    count = [0]
    def dies():
        count[0] += 1
        return count[0] == n
    def write(path, data):
        if dies():
            real_write(path, data[:1000])
            os._exit(9)
        return real_write(path, data)
    def wrap(call):
        def wrapped(*args, **kwargs):
            if dies():
                os._exit(9)
            return call(*args, **kwargs)
        return wrapped
    Path.write_bytes = write
    os.replace, files._fsync, Path.unlink = wrap(real_replace), wrap(real_fsync), wrap(real_unlink)

def write_from(step, until):
    while step < until:
        step += 1
        checkpoint.write_checkpoint(folder, step, state(step), config)

chances, n, last = random.Random(0), 0, 2
write_from(0, last)
while True:
    n += 1
    pid = os.fork()
    if pid == 0:
        if mode == "calls":
            die_at(n)
        write_from(last, last + 2 if mode == "calls" else 1 << 40)
        os._exit(0)
    if mode == "random":
        time.sleep(chances.uniform(0.001, 0.04))
        os.kill(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    loaded = checkpoint.load_latest(folder)
    assert loaded is not None and loaded.step >= last, (n, loaded and loaded.step, last)
    assert (loaded.tensors["x"] == loaded.step).all() and int(loaded.tensors["step"]) == loaded.step
    last = loaded.step
    if (mode == "calls" and status == 0) or (mode == "random" and n == 60):
        break
files.sweep_temporary(folder)
write_from(last, last + 1)
assert len(os.listdir(folder)) == 2, os.listdir(folder)
print(n, last)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.parametrize("mode", ["random", "calls"])
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path: Path, mode: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", KILLED, str(tmp_path), mode],
        cwd=CHILD_CWD,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    n_kills, last_step = map(int, done.stdout.split())
    assert last_step > 2, "no checkpoint was written between the kills"
    assert n_kills >= 10, "the calls to die at were not wrapped"


def test_resume_is_refused_where_the_run_would_differ(tmp_path: Path) -> None:
    config = Config(prompt="a mug")
    write_checkpoint(tmp_path, 1, make_state(1), config)
    checkpoint = load_latest(tmp_path)
    assert checkpoint is not None
    check_same_run(config, checkpoint)
    free = dataclasses.replace(
        config,
        export=ExportConfig(mesh_resolution=17),
        engine=EngineConfig(checkpoint_every=7, threads=2),
    )
    check_same_run(free, checkpoint)
    for other, key in (
        (dataclasses.replace(config, prompt="a jug"), "prompt"),
        (dataclasses.replace(config, engine=EngineConfig(max_steps=7)), "engine.max_steps"),
        (dataclasses.replace(config, engine=EngineConfig(seed=1)), "engine.seed"),
        (dataclasses.replace(config, guidance=GuidanceConfig(variant="paper")), "guidance.variant"),
    ):
        with pytest.raises(SDIFastError, match=f"^{key}: ") as caught:
            check_same_run(other, checkpoint)
        assert "\n" not in str(caught.value)


def test_a_checkpoint_without_a_config_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint-000001.safetensors"
    save_checkpoint(path, make_state(1), {"step": "1", "config": "[1]"})
    with pytest.raises(SDIFastError, match="its config cannot be read"):
        check_same_run(Config(), load_checkpoint(path))
