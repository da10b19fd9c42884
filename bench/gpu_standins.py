"""Stands in for google-re2 where it is not installed, which a machine with a GPU but no network may lack.

coserve needs it only for the patterns of rank_pattern and alpha_pattern, and nothing here sets any. Importing this module, also
as a pytest plugin, puts the stand-in in place; where the package is installed it does nothing.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import types
from typing import Any


class Options:
    """Takes any setting."""


def _compile(expression: str, options: Any = None) -> re.Pattern[str]:
    return re.compile(expression)


if importlib.util.find_spec("re2") is None:
    module: Any = types.ModuleType("re2")
    module.Options, module.compile, module.error = Options, _compile, re.error
    module.__spec__ = importlib.util.spec_from_loader("re2", loader=None)
    sys.modules["re2"] = module
