"""Makes transformers know halfbyte's checkpoints, at no cost for who never imports transformers."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

# The module of transformers that holds its table of quantizers. The classes to enter there derive from its own, so
# they can be made only once it is loaded.
TABLE = "transformers.quantizers.auto"
QUANTIZER = "halfbyte.runtime.transformers_quantizer"


def register_with_transformers() -> None:
    """Enter halfbyte into transformers' table of quantizers: now if it is loaded, else as soon as it is."""
    if TABLE in sys.modules:
        import_module(QUANTIZER)
    elif not any(isinstance(finder, _Watcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watcher())


class _Watcher(MetaPathFinder):
    """Finds nothing by itself: waits for one module, and is gone when that has been loaded."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def load_and_register(module: ModuleType) -> None:
                load(module)
                import_module(QUANTIZER)

            spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec
