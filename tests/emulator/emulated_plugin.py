"""pytest -p emulated_plugin: the ops run SDI_FAST_EMULATED, the module with emulated kernels."""

from __future__ import annotations

import importlib.util
import os
import sys

_spec = importlib.util.spec_from_file_location("sdi_fast._C", os.environ["SDI_FAST_EMULATED"])
assert _spec and _spec.loader
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
sys.modules["sdi_fast._C"] = _module
