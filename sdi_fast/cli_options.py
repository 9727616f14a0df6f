"""The options that the commands which optimise share, and the config that they make.

torch is imported only when a command runs, so that --help and --version are quick.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from .config import Config

# In the help, "(default: None)" says less than nothing: texts name their defaults themselves.
PLAIN = tyro.conf.arg(help_behavior_hint="")


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Options of a run, or of every run of a batch."""

    out: Annotated[Path | None, PLAIN] = None
    """Folder for the results; each command says of what and which it takes by itself."""
    model: Annotated[str | None, PLAIN] = None
    """toyworld (bundled, small), a diffusers folder or a hub id (default: toyworld where no CUDA
    device is, else Stable Diffusion 2.1 base)."""
    steps: Annotated[int | None, PLAIN] = None
    """Length of the run; all schedules follow it (default: 600 for toyworld, else 10000)."""
    seed: Annotated[int | None, PLAIN] = None
    """Fixes every random draw (default: 0)."""
    size: Annotated[int | None, PLAIN] = None
    """Side of the training images, pixels (default: 64 for toyworld, else 512)."""
    method: Annotated[Literal["sdi", "sds"] | None, PLAIN] = None
    """Score distillation via inversion (default), or plain score distillation sampling."""
    variant: Annotated[Literal["threestudio", "paper"] | None, PLAIN] = None
    """Which to follow where the official code (default) and the paper differ."""
    guidance_scale: Annotated[float | None, PLAIN] = None
    """Classifier-free guidance scale (default: 7.5)."""
    denoiser: Annotated[Literal["diffusers", "fast", "auto"] | None, PLAIN] = None
    """Whose UNet: diffusers', ours on packed weights (fast), or that on a GPU where it can be
    (auto, default)."""
    encoder: Annotated[Literal["diffusers", "fast", "auto"] | None, PLAIN] = None
    """Whose VAE encoder, likewise."""
    static: Annotated[bool, PLAIN] = False
    """SDI's target from fixed buffers, on a GPU as CUDA graphs (there the default); other noise
    than without."""
    speed: Annotated[Literal["exact", "balanced", "turbo"] | None, PLAIN] = None
    """exact (default), or approximate inversions: balanced computes 1.6 to 1.7 times less, turbo
    2.5 to 4 times; their loss is measured on the bundled model alone."""
    device: Annotated[str | None, PLAIN] = None
    """auto (default), cpu, cuda or cuda:N."""
    backend: Annotated[Literal["auto", "reference", "cpu", "cuda"] | None, PLAIN] = None
    """Which kernels render: PyTorch (reference), C++ (cpu), CUDA, or the best there (auto)."""
    threads: Annotated[int | None, PLAIN] = None
    """CPU threads."""
    deterministic: Annotated[bool, PLAIN] = False
    """The same numbers in every run on this machine."""
    config: Annotated[Path | None, PLAIN] = None
    """YAML file with settings, e.g. another run's config.yaml; options given here win over it."""
    set: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]],
        tyro.conf.arg(metavar="KEY=VALUE", help_behavior_hint=""),
    ] = ()
    """Any setting of config.yaml, e.g. --set camera.batch_size=2; may be repeated."""
    resume: Annotated[bool, PLAIN] = False
    """Continue the run in --out from its last checkpoint."""
    overwrite: Annotated[bool, PLAIN] = False
    """Replace the run in --out."""
    quiet: Annotated[bool, PLAIN] = False
    """No progress."""

    def config_for(
        self, prompt: str, folder: Path | None = None, settings: dict[str, Any] | None = None
    ) -> tuple[Config, str]:
        """A run's config and why it has its model: defaults, then file, then options.

        Args:
            prompt: may be empty where a file or an earlier run has one.
            folder: of the run; with --resume, its config.yaml stands in for --config.
            settings: a part of a config that wins over the options.
        """
        from .api import base_config
        from .config_io import check_prompt, config_from_dict, merge, read_yaml

        data = read_yaml(self.config) if self.config else self._settings_of_earlier_run(folder)
        prompt = prompt or data.get("prompt") or ""
        check_prompt(prompt)
        options = self._options(prompt)
        merge(options, settings or {})
        model, why = self._choose_model(data, options)
        config = config_from_dict(data, base_config(prompt, model))
        return config_from_dict(options, config), why

    def _settings_of_earlier_run(self, folder: Path | None) -> dict[str, Any]:
        """The config.yaml that --resume continues, so that options need not be repeated."""
        from .config_io import read_yaml
        from .runs import CONFIG_NAME

        if not self.resume or folder is None:
            return {}
        path = folder / CONFIG_NAME
        return read_yaml(path) if path.is_file() else {}

    def _options(self, prompt: str) -> dict[str, Any]:
        """What was given on the command line, as a part of a config."""
        from .config_io import merge, parse_assignment

        tree: dict[str, Any] = {"prompt": prompt}
        given: dict[str, dict[str, Any]] = {
            "model": {
                "id": self.model,
                "denoiser": self.denoiser,
                "encoder": self.encoder,
            },
            "camera": {"height": self.size, "width": self.size},
            "guidance": {
                "method": self.method,
                "variant": self.variant,
                "guidance_scale": self.guidance_scale,
                "static": self.static or None,
                "speed": self.speed,
            },
            "engine": {
                "max_steps": self.steps,
                "seed": self.seed,
                "device": self.device,
                "backend": self.backend,
                "threads": self.threads,
                "deterministic": self.deterministic or None,
            },
        }
        for stage, settings in given.items():
            tree[stage] = {k: v for k, v in settings.items() if v is not None}
        for text in self.set:
            merge(tree, parse_assignment(text))
        return tree

    def _choose_model(self, data: dict[str, Any], options: dict[str, Any]) -> tuple[str, str]:
        """The model's id and why it is that one."""
        import torch

        from .constants import BUNDLED_MODEL_ID, DEFAULT_MODEL_ID

        for source, why in ((options, "as asked for"), (data, "as in the settings")):
            model = source.get("model")
            if isinstance(model, dict) and "id" in model:
                return str(model["id"]), why
        engine = options.get("engine")
        device = engine.get("device") if isinstance(engine, dict) else None
        if device == "cpu":
            return BUNDLED_MODEL_ID, "bundled; the default on the CPU"
        if torch.cuda.is_available():
            return DEFAULT_MODEL_ID, "the default with a CUDA device"
        return BUNDLED_MODEL_ID, "bundled; the default without a CUDA device"
