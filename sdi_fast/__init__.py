"""Score Distillation via Inversion on fused kernels: text in, 3D asset out.

    import sdi_fast
    result = sdi_fast.generate("a red mushroom", model="toyworld", out="mushroom")

`Engine` is the loop for one's own use, `Config` its settings; `sdi_fast.ops` holds the stages'
kernels as differentiable ops. Names load on first use, so that `import sdi_fast` stays quick.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import GenerateResult as GenerateResult
    from .api import generate as generate
    from .api import generate_batch as generate_batch
    from .batch import BatchItem as BatchItem
    from .config import Config as Config
    from .engine import Engine as Engine
    from .engine import StepMetrics as StepMetrics
    from .types import SDIFastError as SDIFastError

__version__ = "0.1.0"

_HOMES = {
    "BatchItem": "batch",
    "Config": "config",
    "Engine": "engine",
    "StepMetrics": "engine",
    "GenerateResult": "api",
    "SDIFastError": "types",
    "generate": "api",
    "generate_batch": "api",
}
__all__ = [
    "BatchItem",
    "Config",
    "Engine",
    "GenerateResult",
    "SDIFastError",
    "StepMetrics",
    "generate",
    "generate_batch",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
