"""Configs from and to YAML, and what is a valid one. Values are data: nothing is interpolated."""

from __future__ import annotations

import dataclasses
import math
import reprlib
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from .config import Config, Shortcuts, config_to_dict, schedule_value
from .constants import MAX_PROMPT_CHARS
from .types import SDIFastError

MAX_CONFIG_BYTES = 1 << 20  # a config is a few KB; more is a wrong file
_INF = math.inf

# Key -> inclusive bounds of the number, or of each number of a range.
BOUNDS: dict[str, tuple[float, float]] = {
    "camera.height": (1, 4096),
    "camera.width": (1, 4096),
    "camera.batch_size": (1, 4096),
    "camera.elevation_range": (-90, 90),
    "camera.distance_range": (1e-3, _INF),
    "camera.fovy_range": (1, 170),
    "camera.camera_perturb": (0, _INF),
    "camera.center_perturb": (0, _INF),
    "camera.up_perturb": (0, _INF),
    "camera.light_distance_range": (1e-3, _INF),
    "camera.light_position_perturb": (0, _INF),
    "camera.eval_elevation": (-90, 90),
    "camera.eval_distance": (1e-3, _INF),
    "camera.eval_fovy": (1, 170),
    "camera.n_eval_views": (1, 10_000),
    "field.n_levels": (1, 32),
    "field.n_features": (1, 8),
    "field.log2_hashmap_size": (3, 28),
    "field.base_resolution": (2, 4096),
    "field.per_level_scale": (1, 16),
    "field.start_level": (0, 32),
    "field.start_step": (0, _INF),
    "field.update_steps": (1, _INF),
    "field.radius": (1e-3, _INF),
    "field.blob_std": (1e-3, _INF),
    "field.hidden": (1, 256),
    "render.n_samples_per_ray": (1, 65_536),
    "render.near": (0, _INF),
    "render.early_stop_eps": (0, 1),
    "render.alpha_threshold": (0, 1),
    "render.occupancy_resolution": (1, 512),
    "render.occupancy_decay": (0, 1),
    "render.occupancy_threshold": (0, _INF),
    "render.occupancy_every": (1, _INF),
    "render.occupancy_warmup": (0, _INF),
    "render.ambient_only_steps": (0, _INF),
    "render.albedo_prob": (0, 1),
    "render.textureless_prob": (0, 1),
    "guidance.inversion_n_steps": (1, 1000),
    "guidance.inversion_eta": (0, _INF),
    "guidance.t_range": (0, 1),
    "guidance.deep_cache": (0, 3),
    "guidance.reuse_negatives": (0, 1000),
    "guidance.even_steps": (0, 1000),
    "optim.lr_field": (0, _INF),
    "optim.lr_background": (0, _INF),
    "optim.betas": (0, 1 - 1e-9),
    "optim.eps": (0, _INF),
    "engine.max_steps": (1, 10_000_000),
    "engine.seed": (0, 2**63 - 1),
    "engine.checkpoint_every": (0, _INF),
    "engine.threads": (0, 1024),
    "export.mesh_resolution": (2, 1024),
    "export.density_threshold": (1e-6, _INF),
    "export.turntable_frames": (1, 10_000),
    "export.turntable_size": (16, 4096),
    "export.preview_views": (1, 100),
    "export.preview_size": (1, 4096),
    "export.fps": (1, 240),
}


def config_to_yaml(config: Config) -> str:
    """The whole config as plain YAML."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def config_from_yaml(path: Path | str, base: Config | None = None) -> Config:
    """The config of a YAML file, laid over `base` (default: the official values)."""
    return config_from_dict(read_yaml(Path(path)), base)


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML mapping, read with the safe loader; raises SDIFastError with one line."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise SDIFastError(f"config: expected a file under 1 MiB, got {path}")
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SDIFastError(f"config: {path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        why = " ".join(str(error).split())[:200]
        raise SDIFastError(f"config: {path} is not valid YAML: {why}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise SDIFastError(f"config: expected a mapping in {path}, got {type(data).__name__}")
    return data


def config_from_dict(data: dict[str, Any], base: Config | None = None) -> Config:
    """`data` laid over `base` (default: the official values), checked.

    A max_steps in `data` first stretches `base`'s schedules to that length, as `with_steps` does;
    schedules that `data` itself gives are then taken as they are.

    Raises:
        SDIFastError: for an unknown key, a wrong type or a value out of bounds; it names the key.
    """
    config = base or Config()
    engine = data.get("engine")
    if isinstance(engine, dict) and "max_steps" in engine:
        steps = _convert(int, engine["max_steps"], "engine.max_steps")
        _check_bounds("engine.max_steps", steps)
        config = config.with_steps(steps)
    config = _overlay(config, data, "")
    check_config(config)
    return config


def parse_assignment(text: str) -> dict[str, Any]:
    """The text a.b=value as {"a": {"b": value}}; the value is a YAML scalar or list."""
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise SDIFastError(f"set: expected key=value, got {_short(text)}")
    try:
        tree: Any = yaml.safe_load(value)
    except (yaml.YAMLError, RecursionError) as error:
        raise SDIFastError(f"set: the value of {_short(text)} is not valid YAML") from error
    return nest(key.strip(), tree)


def nest(key: str, value: Any) -> dict[str, Any]:
    """The value at a dotted key: "a.b" makes {"a": {"b": value}}."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def merge(tree: dict[str, Any], other: dict[str, Any]) -> None:
    """Lays `other` over `tree`, mapping by mapping."""
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(tree.get(key), dict):
            merge(tree[key], value)
        else:
            tree[key] = value


def check_prompt(prompt: object, name: str = "prompt", *, allow_empty: bool = False) -> str:
    """`prompt` without surrounding white space.

    Raises:
        SDIFastError: naming `name`, where it is no text, empty, longer than MAX_PROMPT_CHARS, or
            not Unicode.
    """
    if not isinstance(prompt, str):
        raise SDIFastError(f"{name}: expected text, got {type(prompt).__name__}")
    text = prompt.strip()
    if not text and not allow_empty:
        raise SDIFastError(f'{name}: expected a description such as "a red mushroom", got nothing')
    if len(prompt) > MAX_PROMPT_CHARS:
        raise SDIFastError(
            f"{name}: expected at most {MAX_PROMPT_CHARS} characters, got {len(prompt)}"
        )
    if "\0" in prompt or any("\ud800" <= c <= "\udfff" for c in prompt):
        raise SDIFastError(f"{name}: expected valid Unicode text, got bytes that are none")
    return text


def check_config(config: Config) -> None:
    """Raises SDIFastError naming the first key whose value no run could use.

    An empty prompt passes: a config may be completed later.
    """
    if config.prompt:
        check_prompt(config.prompt)
    for stage in dataclasses.fields(config):
        if stage.name == "prompt":
            continue
        settings = getattr(config, stage.name)
        for field in dataclasses.fields(settings):
            key, value = f"{stage.name}.{field.name}", getattr(settings, field.name)
            if key in BOUNDS and value is not None:
                _check_bounds(key, value)
            if field.name.endswith("_range") and value[0] > value[1]:
                raise SDIFastError(f"{key}: expected [low, high], got {list(value)}")
            if stage.name == "loss" and field.name != "convex_frame":
                _check_schedule(key, value)
    total = config.render.albedo_prob + config.render.textureless_prob
    if total > 1 + 1e-9:
        raise SDIFastError(
            f"render.textureless_prob: expected at most 1 - albedo_prob, got a sum of {total:g}"
        )
    if not config.model.id.strip():
        raise SDIFastError("model.id: expected a name or a folder, got nothing")
    if config.model.unet_linears == "fp8" and config.model.denoiser == "diffusers":
        raise SDIFastError(
            'model.unet_linears: fp8 needs model.denoiser "fast" or "auto", got "diffusers"'
        )
    _check_guidance(config)


def _check_guidance(config: Config) -> None:
    guidance, shortcuts = config.guidance, config.guidance.shortcuts
    if guidance.static and guidance.method != "sdi":
        raise SDIFastError(
            'guidance.static: expected false with guidance.method "sds", which inverts nothing'
        )
    for field in dataclasses.fields(shortcuts):
        name = field.name
        if Shortcuts(**{name: getattr(shortcuts, name)}).exact:
            continue
        key = "guidance.speed" if getattr(guidance, name) is None else f"guidance.{name}"
        value = guidance.speed if key == "guidance.speed" else str(getattr(guidance, name)).lower()
        if guidance.method != "sdi":
            raise SDIFastError(f'{key}: {value} needs guidance.method "sdi", got "sds"')
        if guidance.static is False:
            raise SDIFastError(f"{key}: {value} needs guidance.static true, got false")
        if name == "deep_cache" and config.model.denoiser == "diffusers":
            raise SDIFastError(f'{key}: {value} needs model.denoiser "fast", got "diffusers"')


def _check_bounds(key: str, value: float | tuple[float, ...]) -> None:
    low, high = BOUNDS[key]
    for number in value if isinstance(value, tuple) else (value,):
        if not low <= number <= high:
            wanted = f"at least {low:g}" if high == _INF else f"{low:g} to {high:g}"
            raise SDIFastError(f"{key}: expected {wanted}, got {number:g}")


def _check_schedule(key: str, value: Any) -> None:
    try:
        schedule_value(value, 0)
    except SDIFastError as error:
        raise SDIFastError(f"{key}: {error}") from error


def _overlay(base: Any, data: Any, prefix: str) -> Any:
    """The dataclass `base` with the values of the mapping `data`."""
    if not isinstance(data, dict):
        raise SDIFastError(f"{prefix[:-1]}: expected a mapping, got {_short(data)}")
    hints = get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for name, value in data.items():
        key = f"{prefix}{name}"
        if name not in hints:
            raise SDIFastError(f"{_short(key)}: no such setting; known: {', '.join(hints)}")
        if dataclasses.is_dataclass(hints[name]):
            changes[name] = _overlay(getattr(base, name), value, f"{key}.")
        else:
            changes[name] = _convert(hints[name], value, key)
    return dataclasses.replace(base, **changes)


def _convert(hint: Any, value: Any, key: str) -> Any:
    converted = _match(hint, value)
    if converted is _NO_MATCH:
        raise SDIFastError(f"{key}: expected {_describe(hint)}, got {_short(value)}")
    return converted


_NO_MATCH = object()


def _match(hint: Any, value: Any) -> Any:
    """`value` as the type `hint`, or _NO_MATCH."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return value if isinstance(value, str) and value in args else _NO_MATCH
    if origin in (Union, types.UnionType):
        matches = (_match(arg, value) for arg in args)
        return next((m for m in matches if m is not _NO_MATCH), _NO_MATCH)
    if origin is tuple:
        return _match_tuple(args, value)
    if hint is float:
        return _match_float(value)
    if hint is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _NO_MATCH
    return value if isinstance(value, hint) else _NO_MATCH  # bool, str, None


def _match_tuple(args: tuple[Any, ...], value: Any) -> Any:
    if not isinstance(value, list | tuple) or len(value) > 100:
        return _NO_MATCH
    if args[-1] is not Ellipsis and len(value) != len(args):
        return _NO_MATCH
    items = tuple(_match(args[0], v) for v in value)
    return _NO_MATCH if any(i is _NO_MATCH for i in items) else items


def _match_float(value: Any) -> Any:
    if isinstance(value, str):  # YAML 1.1 reads 1e-2, without a dot, as text
        try:
            value = float(value)
        except ValueError:
            return _NO_MATCH
    if isinstance(value, bool) or not isinstance(value, int | float):
        return _NO_MATCH
    if isinstance(value, int) and abs(value) > 2**1000:  # beyond float's range
        return _NO_MATCH
    return float(value) if math.isfinite(value) else _NO_MATCH


def _describe(hint: Any) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return " or ".join(f'"{a}"' for a in args)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is tuple:
        return "a list of numbers" if args[-1] is Ellipsis else f"a list of {len(args)} numbers"
    names = {float: "a finite number", int: "an integer", bool: "true or false", str: "text"}
    return names.get(hint, "null")


def _short(value: Any) -> str:
    """A bounded, one-line repr."""
    return reprlib.repr(value)[:100]
