"""Batches: files and what is refused, results beside single runs, failures, stops, resume."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import signal
import sys
import weakref
from collections import deque
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from small_runs import small_config, small_run, start, wait_for

import sdi_fast
from sdi_fast import batch, cli
from sdi_fast.api import generate, generate_batch
from sdi_fast.batch import Asset, Batch, BatchItem
from sdi_fast.batch_file import read_batch
from sdi_fast.checkpoint import CheckpointWriter, list_checkpoints
from sdi_fast.config import Config
from sdi_fast.config_io import config_from_yaml
from sdi_fast.engine import Engine, StepMetrics
from sdi_fast.progress import BatchReporter, StopOnSignal, Stopped
from sdi_fast.run_loop import memory_line
from sdi_fast.runs import open_run, prompt_slug
from sdi_fast.types import SDIFastError

PROMPTS = ["a red mushroom", "a blue house", "a green car"]
RESULTS = ("field.safetensors", "mesh.glb", "preview_00_color.png", "preview_00_normal.png")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.50 GiB. GPU 0 has a total\ncapacity of 2"


def prompt_file(folder: Path, prompts: list[str] = PROMPTS) -> str:
    path = folder / "prompts.txt"
    path.write_text("\n".join(prompts), encoding="utf-8")
    return str(path)


def folder_of(out: Path, prompt: str) -> Path:
    return out / prompt_slug(prompt)


def report(out: Path) -> dict[str, dict[str, Any]]:
    """The rows of batch.json by prompt."""
    return {row["prompt"]: row for row in json.loads((out / "batch.json").read_text())["assets"]}


def same_results(a: Path, b: Path) -> None:
    for name in RESULTS:
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    losses = [
        [(row["step"], row["loss"], row["t"]) for row in json.loads(text)["history"]]
        for text in ((p / "metrics.json").read_text() for p in (a, b))
    ]
    assert losses[0] == losses[1]


@pytest.fixture
def in_step(monkeypatch):
    """Has something happen before chosen steps: in_step(prompt, step, action)."""
    actions: dict[tuple[str, int], Any] = {}
    original = Engine.step

    def step(self: Engine) -> StepMetrics:
        actions.get((self.config.prompt, self.global_step), lambda: None)()
        return original(self)

    monkeypatch.setattr(Engine, "step", step)

    def add(prompt: str, at: int, action: Any) -> None:
        actions[prompt, at] = action

    return add


def throw(error: BaseException) -> Any:
    def action() -> None:
        raise type(error)(*error.args)  # a new one, since errors hold on to frames

    return action


# ---- files ----------------------------------------------------------------------------------


def test_a_text_file_is_a_prompt_a_line(tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_bytes(b"\xef\xbb\xbfa mug \r\n\r\n  # a note\r\n\t\xf0\x9f\x8d\x84\r\n- a jug: red")
    entries = read_batch(str(path))
    assert [e.prompt for e in entries] == ["a mug", "🍄", "- a jug: red"]
    assert [e.where for e in entries] == [f"{path}, line {n}" for n in (1, 4, 5)]
    assert all(e.out is None and not e.settings for e in entries)


def test_a_dash_is_standard_input(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a mug\n[a jug]\n")))
    entries = read_batch("-")
    assert [(e.prompt, e.where) for e in entries] == [
        ("a mug", "standard input, line 1"),
        ("[a jug]", "standard input, line 2"),
    ]


def test_a_yaml_file_gives_settings(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(
        "- a mug\n"
        "- {prompt: a jug, out: jugs/1, seed: 7, set: {camera.batch_size: 2, optim.lr_field: 1}}\n"
        "- prompt: '${HOME}: x'\n"
        "  set:\n"
        "    camera: {height: 8}\n"
        "    camera.width: 9\n"
    )
    mug, jug, home = read_batch(str(path))
    assert (mug.prompt, mug.out, mug.settings) == ("a mug", None, {})
    assert (jug.prompt, jug.out, jug.where) == ("a jug", "jugs/1", f"{path}, line 2")
    assert jug.settings == {
        "engine": {"seed": 7}, "camera": {"batch_size": 2}, "optim": {"lr_field": 1},
    }  # fmt: skip
    assert home.prompt == "${HOME}: x" and home.settings == {"camera": {"height": 8, "width": 9}}


BAD = {
    "empty": ("p.txt", b"\n# nothing\n", "expected at least one prompt"),
    "long": ("p.txt", b"a mug\n\n" + b"a" * 1001, "line 3: prompt: expected at most 1000"),
    "not UTF-8": ("p.txt", b"a mug\na \xff\n", "line 2: expected UTF-8"),
    "null": ("p.txt", b"a\0b\n", "line 1: prompt: expected valid Unicode"),
    "twice": ("p.txt", b"a mug\na jug\na mug \n", "line 3: out: "),
    "large": ("p.txt", b"a\n" * 600_000, "1 MiB"),
    "no list": ("p.yaml", b"prompt: a mug\n", "expected a list"),
    "nothing": ("p.yaml", b"", "expected a list"),
    "broken": ("p.yml", b"- [a\n", "not valid YAML"),
    "deep": ("p.yaml", b"[" * 50_000, "not valid YAML"),
    "code": ("p.yaml", b"- !!python/object/apply:os.system [id]\n", "not valid YAML"),
    "number": ("p.yaml", b"- a mug\n- 7\n", "line 2: prompt: expected text, got int"),
    "colon": ("p.yaml", b"- a mug\n- a jug: red\n", "line 2: 'a jug': no such key"),
    "no prompt": ("p.yaml", b"- {seed: 1}\n", "line 1: prompt: expected a description"),
    "seed": ("p.yaml", b"- {prompt: a, seed: x}\n", "line 1: engine.seed: expected an integer"),
    "out": ("p.yaml", b"- {prompt: a, out: 7}\n", "line 1: out: expected the name"),
    "out null": ("p.yaml", b'- {prompt: a, out: "a\\0b"}\n', "line 1: out: expected a folder"),
    "set": ("p.yaml", b"- {prompt: a, set: [1]}\n", "line 1: set: expected a mapping"),
    "key": (
        "p.yaml",
        b"- a\n- {prompt: b, set: {camera.hight: 3}}\n",
        "2: 'camera.hight': no such",
    ),
    "prompt": ("p.yaml", b"- {prompt: a, set: {prompt: b}}\n", "line 1: set: expected no prompt"),
    "same out": ("p.yaml", b"- {prompt: a, out: x}\n- {prompt: b, out: y/../x}\n", "line 2: out:"),
    "inside": ("p.yaml", b"- {prompt: a, out: x/y}\n- {prompt: b, out: x}\n", "line 1: out:"),
    "models": ("p.yaml", b"- a\n- {prompt: b, set: {model.id: c}}\n", "line 2: model: expected"),
    "threads": ("p.yaml", b"- a\n- {prompt: b, set: {engine.threads: 3}}\n", "line 2: engine.thr"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_before_anything_is_run(name, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    file, content, says = BAD[name]
    Path(file).write_bytes(content)
    assert cli.main(["batch", file, "--model", "toyworld"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdi-fast: error: ") and error.count("\n") == 1 and len(error) < 500
    assert file in error and says in error, error
    assert [p.name for p in tmp_path.iterdir()] == [file]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--per-gpu", "0"], "per_gpu: expected at least 1"),
        (["--steps", "0"], "error: engine.max_steps"),
        (["--model", "/nonexistent"], "error: model"),
        (["--resume", "--overwrite"], "both"),
        (["--set", "prompt=x"], "set: expected no prompt"),
        (["--out", "prompts.txt"], "cannot be made"),
    ],
)
def test_bad_options_are_refused(options, says, tiny, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    prompt_file(tmp_path)
    arguments = small_run(tiny, "prompts.txt", "--steps", "2", command="batch")
    code = cli.main([*arguments, *options])
    said = capsys.readouterr()
    assert code in (1, 2) and says in said.out + said.err and "Traceback" not in said.err
    assert [p.name for p in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_missing_file_and_argument_errors(capsys) -> None:
    assert cli.main(["batch", "/nonexistent/p.txt"]) == 2
    assert "cannot be read" in capsys.readouterr().err
    for arguments in (["batch"], ["batch", "a", "b"], ["batch", "a", "--per-gpu", "x"]):
        with pytest.raises(SystemExit) as caught:
            cli.main(arguments)
        assert caught.value.code == 2


def test_python_calls_that_make_no_batch(tiny, tmp_path: Path) -> None:
    for prompts, says in (
        ([], "at least one"),
        ("a mug", "expected a list"),
        (["a mug", " "], r"^prompts\[1\]: prompt: "),
        (["a mug", "a jug", "a mug"], r"^prompts\[2\]: out: .* is the folder of prompts\[0\]"),
    ):
        with pytest.raises(SDIFastError, match=says):
            generate_batch(prompts, out=tmp_path / "out", model=str(tiny))
    assert not (tmp_path / "out").exists()


# ---- results --------------------------------------------------------------------------------


@pytest.mark.parametrize("fast", [False, True])
def test_an_asset_of_a_batch_is_the_same_bit_by_bit_as_alone(
    fast: bool, tiny, tmp_path: Path, monkeypatch
) -> None:
    """With everything shared that can be: the model, and the guidance with its fixed buffers."""
    parts = ["model.denoiser=fast", "model.encoder=fast", "guidance.static=true"] if fast else []
    configs = [
        small_config(tiny, PROMPTS[0], 5, *parts),
        small_config(tiny, PROMPTS[1], 3, *parts, "engine.seed=3"),
        small_config(tiny, PROMPTS[2], 4, *parts, "guidance.guidance_scale=5"),
    ]
    loads, order = [], []
    original = batch.load_pipeline
    monkeypatch.setattr(batch, "load_pipeline", lambda *args: loads.append(args) or original(*args))
    shared: list[tuple[object, object]] = []

    def watch(engine: Engine, metrics: StepMetrics) -> None:
        order.append((PROMPTS.index(engine.config.prompt), metrics.step))
        shared.append((engine.pipeline, engine.guidance))

    items = generate_batch(configs, out=tmp_path / "batch", per_gpu=2, callbacks=[watch])
    assert [(i.status, i.error) for i in items] == [("done", "")] * 3 and len(loads) == 1
    assert order == [
        (0, 0), (1, 0), (0, 1), (1, 1), (0, 2), (1, 2), (0, 3), (2, 0), (0, 4), (2, 1), (2, 2),
        (2, 3),
    ]  # fmt: skip
    assert len({id(p) for p, _ in shared}) == 1
    turns = list(zip(order, shared, strict=True))
    guidances = [{id(g) for (n, _), (_, g) in turns if n == i} for i in range(3)]
    assert guidances[0] == guidances[1] != guidances[2]
    for config, item in zip(configs, items, strict=True):
        assert item.config == config and item.seconds > 0 and item.result is not None
        assert item.out == folder_of(tmp_path / "batch", config.prompt)
        assert item.result.completed and item.result.metrics["steps"] == config.engine.max_steps
        alone = generate(config, out=tmp_path / "alone" / item.out.name)
        same_results(alone.out, item.out)
    assert {(p, row["status"]) for p, row in report(tmp_path / "batch").items()} == {
        (p, "done") for p in PROMPTS
    }


def test_the_command_with_a_yaml_file(tiny, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(
        "- a mug\n- {prompt: a mug, out: b, seed: 5, set: {loss.orient: 0}}\n"
    )
    arguments = small_run(tiny, "p.yaml", "--steps", "2", "--seed", "1", command="batch")
    assert cli.main(arguments) == 0
    out = tmp_path / "outputs"
    said = capsys.readouterr().out.splitlines()
    assert said[:3] == [
        f"model: {tiny} (as asked for)",
        "prompts: 2, 1 at a time",
        "output: outputs",
    ]
    assert "step 4/4 of the batch  1 done of 2  0 s left" in said
    assert said[-3].startswith(f"done: a mug: {Path('outputs') / prompt_slug('a mug')} (")
    assert said[-1] == f"2 done: {Path('outputs') / 'batch.json'}"
    first, second = (
        config_from_yaml(p / "config.yaml") for p in (out / prompt_slug("a mug"), out / "b")
    )
    assert (first.engine.seed, second.engine.seed) == (1, 5) and first.prompt == second.prompt
    assert second.loss.orient == 0 and first.loss.orient != 0
    assert {p.name for p in out.iterdir()} == {"batch.json", "b", prompt_slug("a mug")}

    assert cli.main(arguments) == 1  # nothing is overwritten unasked
    assert "--overwrite" in capsys.readouterr().out
    assert cli.main([*arguments, "--overwrite", "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 6


def test_names_load_lazily() -> None:
    assert sdi_fast.generate_batch is generate_batch and sdi_fast.BatchItem is BatchItem


# ---- failures -------------------------------------------------------------------------------


def test_one_that_fails_does_not_stop_the_others(tiny, tmp_path: Path, in_step, capsys) -> None:
    """Bad folder, divergence, memory and disk, beside two that are well."""
    out = tmp_path / "out"
    prompts = ["a folder", "a nan", "a gpu", "a disk", *PROMPTS[:2]]
    out.mkdir()
    folder_of(out, "a folder").write_text("not a folder")
    path = tmp_path / "p.yaml"
    lines = [f"- {p}" for p in prompts if p != "a nan"]
    lines.insert(1, "- {prompt: a nan, set: {guidance.guidance_scale: 1.0e+38}}")
    path.write_text("\n".join(lines))
    in_step("a gpu", 2, throw(torch.OutOfMemoryError(OUT_OF_MEMORY)))
    in_step("a disk", 3, throw(OSError(28, "No space left on device")))
    arguments = small_run(
        tiny, str(path), "--steps", "24", "--per-gpu", "3", "--out", str(out),
        "--set", "engine.checkpoint_every=2", command="batch",
    )  # fmt: skip
    assert cli.main(arguments) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    assert said.out.splitlines()[-1] == f"4 failed, 2 done: {out / 'batch.json'}"
    rows = report(out)
    assert list(rows) == prompts
    assert [rows[p]["status"] for p in prompts] == ["failed"] * 4 + ["done"] * 2
    for prompt, says in (
        ("a folder", "expected a folder, got a file"),
        ("a nan", "not finite in 20 steps in a row"),
        ("a gpu", "asked for 20.50 GiB"),
        ("a disk", "No space left on device"),
    ):
        assert says in rows[prompt]["error"] and "\n" not in rows[prompt]["error"]
        assert f"failed: {prompt}: {rows[prompt]['error']}" in said.out
    assert "3 assets at a time; lower --size, camera.batch_size or --per-gpu" in said.out
    for prompt in prompts[1:]:
        folder = folder_of(out, prompt)
        assert rows[prompt]["folder"] == str(folder) and rows[prompt]["seconds"] > 0
        with open_run(folder, prompt, resume=True):  # its lock was given back
            pass
    kept = [p.name for p in list_checkpoints(folder_of(out, "a gpu"))]
    assert kept == ["checkpoint-000002.safetensors"]
    assert not list_checkpoints(folder_of(out, "a nan"))


def test_a_failed_asset_gives_its_memory_back(tiny, tmp_path: Path, in_step) -> None:
    seen: list[weakref.ref[Engine]] = []
    gone: list[bool] = []

    def watch(engine: Engine, metrics: StepMetrics) -> None:
        if engine.config.prompt == PROMPTS[0] and metrics.step == 0:
            seen.append(weakref.ref(engine))
        if engine.config.prompt == PROMPTS[1] and metrics.step == 3:
            gone.append(seen[0]() is None)

    in_step(PROMPTS[0], 1, throw(torch.OutOfMemoryError(OUT_OF_MEMORY)))
    configs = [small_config(tiny, p) for p in PROMPTS]
    items = generate_batch(configs, out=tmp_path, per_gpu=2, callbacks=[watch])
    assert [i.status for i in items] == ["failed", "done", "done"] and gone == [True]


def test_what_torch_raises_is_the_assets_own(tiny, tmp_path: Path, in_step) -> None:
    in_step(PROMPTS[0], 1, throw(RuntimeError("CUDA error:\n launch failed")))
    items = generate_batch([small_config(tiny, p) for p in PROMPTS], out=tmp_path, per_gpu=2)
    assert [i.status for i in items] == ["failed", "done", "done"]
    assert items[0].error == "RuntimeError: CUDA error: launch failed"


def test_a_checkpoint_that_fails_as_well_does_not_stop_the_others(
    tiny, tmp_path: Path, in_step, monkeypatch
) -> None:
    """As on a GPU: the thread meets a full disk while the loop meets something else."""

    class Threaded(CheckpointWriter):
        def __init__(self, folder: Path, config: Config, *, threaded: bool) -> None:
            super().__init__(folder, config, threaded=True)

        def _write(self, *args: Any) -> None:
            if self.config.prompt == PROMPTS[0]:
                raise OSError(28, "No space left on device")
            super()._write(*args)

    monkeypatch.setattr(sdi_fast.run_loop, "CheckpointWriter", Threaded)
    in_step(PROMPTS[0], 2, throw(SDIFastError("something else")))
    configs = [small_config(tiny, p, 4, "engine.checkpoint_every=2") for p in PROMPTS[:2]]
    items = generate_batch(configs, out=tmp_path, per_gpu=2)
    assert [(i.status, i.error) for i in items] == [("failed", "something else"), ("done", "")]
    assert len(list_checkpoints(items[1].out)) == 2 and not list_checkpoints(items[0].out)


def test_a_bug_is_no_failure_of_an_asset(tiny, tmp_path: Path, in_step) -> None:
    in_step(PROMPTS[1], 1, throw(ZeroDivisionError()))
    configs = [small_config(tiny, p) for p in PROMPTS]
    with pytest.raises(ZeroDivisionError):
        generate_batch(configs, out=tmp_path, per_gpu=2)
    with open_run(folder_of(tmp_path, PROMPTS[0]), PROMPTS[0], overwrite=True):
        pass


def test_generate_out_of_memory_is_one_line(tiny, tmp_path: Path, in_step, capsys) -> None:
    out = tmp_path / "out"
    in_step("a mug", 3, throw(torch.OutOfMemoryError(OUT_OF_MEMORY)))
    more = ["--steps", "9", "--out", str(out), "--set", "engine.checkpoint_every=2"]
    assert cli.main(small_run(tiny, "a mug", *more)) == 1
    error = capsys.readouterr().err
    assert error == (
        "sdi-fast: error: GPU out of memory (asked for 20.50 GiB) with 1 view of 16 x 16 a step; "
        "lower --size or camera.batch_size; the last checkpoint, if there is one, stays\n"
    )
    assert [p.name for p in list_checkpoints(out)] == ["checkpoint-000002.safetensors"]
    with pytest.raises(torch.OutOfMemoryError, match="^GPU out of memory"):
        generate(small_config(tiny, "a mug", 9), out=tmp_path / "other")


def test_memory_that_does_not_say_how_much() -> None:
    line = memory_line(torch.OutOfMemoryError("CUDA out of memory."), Config(), 4)
    assert line.startswith("GPU out of memory with 1 view of 512 x 512 a step, 4 assets at a time")


# ---- stopped and resumed --------------------------------------------------------------------


def test_resume_passes_over_what_is_done_and_continues_the_rest(
    tiny, tmp_path: Path, in_step, capsys
) -> None:
    """SIGTERM within a step of one of two; two more are waiting or done."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    file = prompt_file(tmp_path)
    run = small_run(tiny, file, "--steps", "9", "--per-gpu", "2", "--seed", "2", command="batch")
    assert cli.main([*run, "--out", str(whole)]) == 0
    first = small_run(tiny, PROMPTS[0], "--steps", "9", "--seed", "2")
    assert cli.main([*first, "--out", str(folder_of(out, PROMPTS[0]))]) == 0
    capsys.readouterr()

    in_step(PROMPTS[1], 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert cli.main([*run, "--out", str(out), "--resume"]) == 143
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].endswith("stopped: the same command with --resume goes on")
    rows = report(out)
    assert [rows[p]["status"] for p in PROMPTS] == ["skipped", "stopped", "stopped"]
    assert f"stopped: {PROMPTS[1]}: after 5 of 9 steps" in said.out
    assert f"stopped: {PROMPTS[2]}: after 4 of 9 steps" in said.out
    steps = [[p.name[11:17] for p in list_checkpoints(folder_of(out, q))] for q in PROMPTS[1:]]
    assert steps == [["000005"], ["000004"]]
    field = (folder_of(out, PROMPTS[0]) / "field.safetensors").stat().st_mtime_ns

    in_step(PROMPTS[1], 4, lambda: None)
    assert cli.main(["batch", file, "--out", str(out), "--resume"]) == 0  # options not repeated
    said = capsys.readouterr()
    assert [row["status"] for row in report(out).values()] == ["skipped", "done", "done"]
    assert (folder_of(out, PROMPTS[0]) / "field.safetensors").stat().st_mtime_ns == field
    for prompt in PROMPTS:
        same_results(folder_of(whole, prompt), folder_of(out, prompt))

    assert cli.main([*run, "--out", str(out), "--resume", "--seed", "3"]) == 1
    assert "engine.seed: the run in" in capsys.readouterr().out
    assert [row["status"] for row in report(out).values()] == ["failed"] * 3


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_a_killed_batch_resumes_to_the_same_results(tiny, tmp_path: Path, capsys) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    file = prompt_file(tmp_path, PROMPTS[:2])
    run = small_run(
        tiny, file, "--steps", "30", "--per-gpu", "2", "--set", "engine.checkpoint_every=4",
        command="batch",
    )  # fmt: skip
    assert cli.main([*run, "--quiet", "--out", str(whole)]) == 0
    process = start([*run, "--out", str(out)])
    wait_for(process, lambda: all(list_checkpoints(folder_of(out, p)) for p in PROMPTS[:2]))
    process.kill()
    process.communicate()
    assert cli.main([*run, "--quiet", "--out", str(out), "--resume"]) == 0
    for prompt in PROMPTS[:2]:
        same_results(folder_of(whole, prompt), folder_of(out, prompt))


def test_a_signal_between_steps_saves_all(tiny, tmp_path: Path, monkeypatch) -> None:
    """While the first one's results are written, the second one is in the making."""
    configs = [small_config(tiny, PROMPTS[0], 2), small_config(tiny, PROMPTS[1], 9)]
    assets = [Asset(c, tmp_path / str(i), str(i)) for i, c in enumerate(configs)]
    monkeypatch.setattr(
        sdi_fast.run_loop, "export_all", lambda *_: os.kill(os.getpid(), signal.SIGINT)
    )
    made = Batch(assets, tmp_path, per_gpu=2)
    with StopOnSignal(), pytest.raises(Stopped):
        made.run()
    assert [i.status for i in made.items] == ["stopped"] * 2
    steps = [[p.name[11:17] for p in list_checkpoints(a.out)] for a in assets]
    assert steps == [["000002"], ["000001"]]


def test_an_interrupt_within_a_step_saves_only_the_others(tiny, tmp_path: Path, in_step) -> None:
    """Without the command's handler: what the step has changed is not known."""
    configs = [small_config(tiny, p, 9) for p in PROMPTS]
    in_step(PROMPTS[1], 2, throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        generate_batch(configs, out=tmp_path, per_gpu=2)
    steps = [[p.name[11:17] for p in list_checkpoints(folder_of(tmp_path, q))] for q in PROMPTS]
    assert steps == [["000003"], [], []] and not folder_of(tmp_path, PROMPTS[2]).exists()
    assert [row["status"] for row in report(tmp_path).values()] == ["stopped"] * 3


def test_a_callback_may_end_the_batch(tiny, tmp_path: Path) -> None:
    def stop(engine: Engine, metrics: StepMetrics) -> None:
        if metrics.step == 3:  # the last
            engine.request_stop()

    items = generate_batch(
        [small_config(tiny, p) for p in PROMPTS], out=tmp_path, per_gpu=2, callbacks=[stop]
    )
    assert [i.status for i in items] == ["stopped"] * 3
    results = [i.result for i in items]
    assert results[0] is not None and (results[0].completed, results[0].step) == (False, 4)
    assert results[1] is not None and results[1].step == 3 and results[2] is None
    again = generate_batch([i.config for i in items], out=tmp_path, resume=True)
    assert [i.status for i in again] == ["done"] * 3


def test_a_signal_while_loading_leaves_nothing(tmp_path, monkeypatch, capsys) -> None:
    def load(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(batch, "load_pipeline", load)
    out = tmp_path / "out"
    arguments = ["batch", prompt_file(tmp_path), "--out", str(out), "--model", "toyworld"]
    assert cli.main(arguments) == 143
    assert not out.exists() and "Traceback" not in capsys.readouterr().err


# ---- progress -------------------------------------------------------------------------------


def items_of(n: int, steps: int) -> list[BatchItem]:
    configs = [dataclasses.replace(Config(), prompt=f"p{i}").with_steps(steps) for i in range(n)]
    return [BatchItem(c, Path(c.prompt), "done") for c in configs]


class Steps(Engine):
    """An engine whose steps do nothing but count."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.global_step = 0
        self._pending = deque()
        self.pipeline: Any = type("Loaded", (), {"notes": ("encoder: another one",)})

    def step(self) -> StepMetrics:
        self.global_step += 1
        return StepMetrics(self.global_step - 1, 1.5, 500, {}, 0, 0, False, 0.01)


def show(console: Console, items: list[BatchItem], **options: Any) -> None:
    with BatchReporter(console, **options) as reporter:
        reporter.expect([item.config for item in items])
        for item in items:
            if item.status == "done":
                Steps(item.config).run(callbacks=[reporter])
            reporter.tell(item)


@pytest.mark.parametrize(("n", "steps"), [(4, 100), (1, 3), (30, 1)])
def test_plain_progress_of_a_batch_is_about_ten_lines(n: int, steps: int) -> None:
    stream = io.StringIO()
    show(Console(file=stream, width=40), items_of(n, steps))
    lines = stream.getvalue().splitlines()
    marks = [line for line in lines if line.startswith("step ")]
    assert 1 <= len(marks) <= 11 and marks[-1].startswith(f"step {n * steps}/{n * steps} of the")
    assert marks[0].startswith(f"step 1/{n * steps} of the batch  0 done of {n}")
    assert len([line for line in lines if line.startswith("[")]) == n
    assert lines[-1] == f"[{n}/{n}] done: p{n - 1}"
    assert lines.count("note: encoder: another one") == 1


def test_progress_counts_what_will_not_be_done() -> None:
    stream = io.StringIO()
    items = items_of(4, 50)
    items[0] = dataclasses.replace(items[0], status="skipped")
    items[2] = dataclasses.replace(items[2], status="failed", error="no\x1b[2J memory")
    show(Console(file=stream, width=40), items)
    lines = stream.getvalue().splitlines()
    assert "[1/4] skipped: p0" in lines and "[3/4] failed: p2: no\\x1b[2J memory" in lines
    assert lines[1] == "step 50/200 of the batch  1 skipped of 4"  # no time is known yet
    assert lines[-2] == "step 200/200 of the batch  1 skipped, 1 done, 1 failed of 4  0 s left"


def test_the_bar_and_quiet() -> None:
    stream = io.StringIO()
    show(Console(file=stream, force_terminal=True, width=120), items_of(2, 5))
    assert "10/10" in stream.getvalue() and "[2/2] done: p1" in stream.getvalue()
    stream = io.StringIO()
    show(Console(file=stream), items_of(2, 5), quiet=True)
    assert stream.getvalue() == ""
