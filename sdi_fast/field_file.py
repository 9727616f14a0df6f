"""field.safetensors: the optimised field by itself, without optimiser and diffusion model."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from . import __version__
from .config import Config
from .config_io import config_from_dict
from .files import atomic_path
from .ops.field import density as density_op
from .ops.field import field as field_op
from .types import FieldParams, FieldSpec, SDIFastError

FORMAT = "sdi_fast.field.1"
FIELD_NAME = "field.safetensors"
BACKGROUND_SHAPES = {"w1": (16, 9), "w2": (16, 16), "w3": (3, 16)}


@dataclass(frozen=True)
class SavedField:
    """A field that can be queried; see mesh.Volume."""

    params: FieldParams
    spec: FieldSpec
    active_levels: int
    background: dict[str, Tensor]  # w1 [16, 9], w2 [16, 16], w3 [3, 16]
    prompt: str = ""

    @torch.no_grad()
    def density(self, x: Tensor) -> Tensor:
        """Density [M] in 1/scene unit at world points x [M, 3]."""
        return density_op(self._here(x), self.params, self.spec, self.active_levels)

    @torch.no_grad()
    def albedo(self, x: Tensor) -> Tensor:
        """Albedo [M, 3] in [0, 1] at world points x [M, 3]."""
        return field_op(self._here(x), self.params, self.spec, self.active_levels)[1]

    def to(self, device: torch.device | str) -> SavedField:
        """A copy on `device`."""
        return dataclasses.replace(
            self,
            params=FieldParams(*(t.to(device) for t in self.params.tensors())),
            background={k: v.to(device) for k, v in self.background.items()},
        )

    def _here(self, x: Tensor) -> Tensor:
        return x.to(self.params.table.device)


def save_field(field: SavedField, path: Path) -> None:
    """Writes parameters and spec, atomically."""
    tensors = {f"field.{f.name}": getattr(field.params, f.name) for f in _param_fields()}
    tensors.update({f"background.{k}": v for k, v in field.background.items()})
    plain = {k: v.detach().float().cpu().contiguous().clone() for k, v in tensors.items()}
    about = {
        "version": __version__,
        "spec": _spec_to_dict(field.spec),
        "active_levels": field.active_levels,
        "prompt": field.prompt,
    }
    with atomic_path(path) as temp:
        # one entry: safetensors writes several in a random order, and equal runs should be equal
        temp.write_bytes(save(plain, {FORMAT: json.dumps(about)}))


def load_field(path: Path) -> SavedField:
    """Reads a field on the CPU; names, shapes, dtypes and values are checked against its spec.

    Raises:
        SDIFastError: with one line, for anything that `save_field` did not write.
    """
    if not path.is_file():
        raise SDIFastError(f"field {path}: no such file")
    tensors: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensors[name] = file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, TypeError, RuntimeError) as error:
        raise _bad(path, " ".join(str(error).split())) from error
    if not isinstance(about, dict) or not isinstance(about.get("spec"), dict):
        raise _bad(path, f"not in the format {FORMAT}")
    spec, levels = _spec_from_dict(path, about["spec"]), about.get("active_levels")
    if type(levels) is not int or not 0 <= levels <= spec.grid.n_levels:
        raise _bad(path, f"active_levels: expected 0 to {spec.grid.n_levels}, got {levels!r:.20}")
    _check_tensors(path, tensors, spec)
    params = FieldParams(*(tensors[f"field.{f.name}"] for f in _param_fields()))
    background = {k: tensors[f"background.{k}"] for k in BACKGROUND_SHAPES}
    return SavedField(params, spec, levels, background, str(about.get("prompt", "")))


def _param_fields() -> tuple[dataclasses.Field[Any], ...]:
    return dataclasses.fields(FieldParams)


def _spec_to_dict(spec: FieldSpec) -> dict[str, Any]:
    """Flat, with the names of FieldConfig."""
    flat = dataclasses.asdict(spec)
    return {**flat.pop("grid"), **flat}


def _spec_from_dict(path: Path, data: dict[str, Any]) -> FieldSpec:
    """Through the config's checks, so that a hostile file cannot ask for a terabyte table."""
    expected = _spec_to_dict(FieldSpec()).keys()
    if data.keys() != expected:
        raise _bad(path, f"its spec has to have {', '.join(expected)}")
    try:
        return config_from_dict({"field": data}, Config()).field.spec()
    except SDIFastError as error:
        raise _bad(path, str(error)) from error


def _check_tensors(path: Path, tensors: dict[str, Tensor], spec: FieldSpec) -> None:
    n_in, hidden = spec.grid.n_output_dims, spec.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "field.table": (spec.grid.n_params,),
        "field.density_w1": (hidden, n_in),
        "field.density_w2": (1, hidden),
        "field.color_w1": (hidden, n_in),
        "field.color_w2": (3, hidden),
        **{f"background.{k}": v for k, v in BACKGROUND_SHAPES.items()},
    }
    for name in [*shapes, *(n for n in tensors if n not in shapes)]:
        if name not in tensors or name not in shapes:
            raise _bad(path, f"tensor {name!r} is {'missing' if name in shapes else 'unknown'}")
        value, want = tensors[name], shapes[name]
        if tuple(value.shape) != want or value.dtype != torch.float32:
            got = f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
            raise _bad(path, f"{name}: expected float32 {list(want)}, got {got}")
        if not bool(torch.isfinite(value).all()):
            raise _bad(path, f"{name}: has numbers that are not finite")


def _bad(path: Path, why: str) -> SDIFastError:
    return SDIFastError(f"field {path} cannot be used: {why}")
