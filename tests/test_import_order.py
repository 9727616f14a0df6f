"""Imports go one way (design.md, the house): every module has a rank and imports only lower ones.

Modules are parsed, not imported, so lazy imports inside functions count as well.
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "sdi_fast"

# Lowest first. Within a layer nothing imports anything else, but for what WITHIN allows. A name
# that ends in .* stands for a folder's files (its __init__ included).
LAYERS: list[tuple[str, tuple[str, ...]]] = [
    ("version", ("",)),  # sdi_fast/__init__.py, which loads its names lazily
    ("constants", ("constants",)),
    ("types", ("types", "files")),
    ("config", ("config",)),
    ("config files", ("config_io",)),
    ("kernels", ("reference.*", "kernels.*", "ops._native", "ops._checks")),
    ("ops", ("ops.*",)),
    ("stages", ("camera", "occupancy", "field", "render", "losses", "optim", "diffusion.*")),
    ("guidance", ("guidance.*",)),
    ("devices", ("placement", "readback")),
    ("step", ("step",)),
    ("engine", ("engine", "checkpoint")),
    ("results", ("runs", "media", "mesh", "field_file")),
    ("export", ("export", "toyworld.*")),
    ("run loop", ("run_loop",)),
    ("batch", ("batch",)),
    ("api", ("api",)),
    ("text", ("cli_text",)),
    ("command line", ("progress", "doctor", "batch_file", "bench.*")),
    ("options", ("cli_options",)),
    ("commands", ("cli_batch",)),
    ("cli", ("cli", "__main__")),
    ("integrations", ("integrations.*",)),
]

# Folders whose files may import each other; () where only what the tuple lists, lowest first.
WITHIN: dict[str, tuple[str, ...]] = {
    "diffusion": (
        "source", "schedule", "prompt", "modules",
        "fast_unet.support", "fast_unet.options", "fast_unet.choices", "fast_unet.packing",
        "fast_unet.fp8", "fast_unet.layers", "fast_unet.forward", "fast_unet.fp8_forward",
        "fast_unet.work", "fast_unet.model", "fast_unet.graph", "fast_unet", "denoiser",
        "vae_pack", "fast_encoder", "encoder_graph", "encoder", "guide",
        "invert", "shortcuts", "invert_graph", "pipeline",
    ),
    "guidance": (),
    "bench": ("machine", "models", "workload", "timing", "stored", "command"),
    "ops": (),
    "toyworld": (),
    "reference": (),
    "kernels": (),
}  # fmt: skip
EXTENSION = f"{PACKAGE}._C"
THIRD_PARTY_OF_REFERENCE = {"torch"}


def module_name(path: Path) -> str:
    """sdi_fast/ops/rays.py -> "ops.rays"; the package itself -> ""."""
    parts = list(path.relative_to(ROOT / PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(p): p for p in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imported_names(path: Path, name: str) -> set[str]:
    """Absolute dotted names that a file imports, e.g. "torch.nn", "sdi_fast.types.Camera"."""
    package = [PACKAGE, *(name.split(".") if name else [])]
    if path.name != "__init__.py":
        package = package[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            found.update(f"{prefix}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            function = ast.unparse(node.func)
            text = node.args[0] if node.args else None
            if function.endswith(("import_module", "__import__")) and isinstance(
                text, ast.Constant
            ):
                found.add(str(text.value))
    return found


def imported_modules(name: str) -> set[str]:
    """Our own modules that module `name` imports, by short name."""
    found: set[str] = set()
    for full in imported_names(MODULES[name], name):
        if full != PACKAGE and not full.startswith(f"{PACKAGE}."):
            continue
        parts = full.split(".")[1:]
        while parts and ".".join(parts) not in MODULES:  # a name inside of a module
            parts.pop()
        found.add(".".join(parts))
    found.discard(name)
    return found


def rank(name: str) -> int:
    """Position of the module's layer; exact names go before patterns."""
    for exact in (True, False):
        for i, (_, names) in enumerate(LAYERS):
            for pattern in names:
                folder = pattern.removesuffix(".*")
                if exact and name == pattern:
                    return i
                if not exact and pattern.endswith(".*"):
                    if name == folder or name.startswith(f"{folder}."):
                        return i
    raise AssertionError(f"{name} has no rank: add it to LAYERS in {Path(__file__).name}")


def may_import(importer: str, imported: str) -> bool:
    if rank(imported) < rank(importer):
        return True
    if rank(imported) > rank(importer):
        return False
    folder, _, leaf = importer.partition(".")
    other_folder, _, other_leaf = imported.partition(".")
    if folder != other_folder or folder not in WITHIN:
        return False
    order = WITHIN[folder]
    if not order or not leaf or not other_leaf:
        return True
    return order.index(other_leaf) < order.index(leaf)


@pytest.mark.parametrize("name", MODULES)
def test_every_module_has_a_rank(name: str) -> None:
    rank(name)
    folder, _, leaf = name.partition(".")
    if leaf and WITHIN.get(folder):
        assert leaf in WITHIN[folder], f"add {name} to WITHIN in {Path(__file__).name}"


@pytest.mark.parametrize("name", [n for n in MODULES if n])
def test_imports_go_one_way(name: str) -> None:
    wrong = sorted(m for m in imported_modules(name) if not may_import(name, m))
    layer = LAYERS[rank(name)][0]
    assert not wrong, f"{name} ({layer}) imports {wrong}, which are not below it"


def test_the_package_itself_imports_nothing_of_its_own_at_run_time() -> None:
    tree = ast.parse(MODULES[""].read_text())
    for node in tree.body:  # the top level only: names for type checkers stand inside an `if`
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "import sdi_fast has to stay quick"


def test_only_native_imports_the_extension() -> None:
    importers = {
        name for name, path in MODULES.items()
        if any(n == EXTENSION or n.startswith(f"{EXTENSION}.") for n in imported_names(path, name))
    }  # fmt: skip
    assert importers == {"ops._native"}


def test_nobody_imports_integrations() -> None:
    for name in MODULES:
        if name.partition(".")[0] != "integrations":
            found = {m for m in imported_modules(name) if m.partition(".")[0] == "integrations"}
            assert not found, f"{name} imports {found}"


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("reference")])
def test_reference_imports_only_constants_types_torch(name: str) -> None:
    ours = {m for m in imported_modules(name) if m.partition(".")[0] != "reference"}
    assert ours <= {"constants", "types"}, f"{name} imports {ours}"
    others = {n.partition(".")[0] for n in imported_names(MODULES[name], name)} - {PACKAGE}
    odd = others - THIRD_PARTY_OF_REFERENCE - sys.stdlib_module_names
    assert not odd, f"{name} imports {odd}"


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("kernels")])
def test_kernels_know_no_autograd(name: str) -> None:
    text = MODULES[name].read_text()
    assert "autograd" not in {
        node.attr for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Attribute)
    }
    assert not any("autograd" in n for n in imported_names(MODULES[name], name))


def test_no_pickle_anywhere() -> None:
    for name, path in MODULES.items():
        assert not {n.partition(".")[0] for n in imported_names(path, name)} & {
            "pickle", "dill", "cloudpickle", "joblib",
        }, name  # fmt: skip
        calls = {
            ast.unparse(n.func) for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Call)
        }  # fmt: skip
        assert not calls & {"torch.load", "torch.save"}, f"{name} uses pickles"


def test_the_checks_find_what_they_are_for(tmp_path: Path) -> None:
    assert not may_import("camera", "render") and not may_import("camera", "engine")
    assert not may_import("reference.rays", "ops.rays") and may_import("ops.rays", "reference.rays")
    assert may_import("diffusion.guide", "diffusion.denoiser")
    assert not may_import("diffusion.denoiser", "diffusion.guide")
    assert not may_import("diffusion.guide", "camera")
    assert not may_import("toyworld.scenes", "export") and may_import("cli", "api")
    file = tmp_path / "x.py"
    file.write_text(
        "from ..types import Camera\nfrom . import _C\nimport torch.nn as nn\n"
        "def f():\n    from .. import engine\n    importlib.import_module('sdi_fast._C')\n"
    )
    assert imported_names(file, "ops.x") == {
        "sdi_fast.types.Camera", "sdi_fast.ops._C", "torch.nn", "sdi_fast.engine", "sdi_fast._C",
    }  # fmt: skip
