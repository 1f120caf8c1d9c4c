"""``import finllm_prune`` makes ``from_pretrained`` read its checkpoints, and imports neither transformers nor torch for it."""

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLES = "transformers.quantizers.auto"
METHOD = "finllm_prune"


class Late:
    """Stands in transformers' tables for a class of quantizer.py, which is imported when a checkpoint asks for it."""

    def __init__(self, name: str) -> None:
        self._name = name

    def _meant(self) -> Any:
        return getattr(importlib.import_module("finllm_prune.checkpoints.quantizer"), self._name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._meant()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._meant(), name)


class WhenImported(MetaPathFinder):
    """Waits for transformers to be imported."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TABLES:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _enter(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def register() -> None:
    """Now, or as soon as transformers is imported."""
    if TABLES in sys.modules:
        _enter(sys.modules[TABLES])
    else:
        sys.meta_path.insert(0, WhenImported())


def _enter(tables: ModuleType) -> None:
    tables.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = Late("PrunedConfig")
    tables.AUTO_QUANTIZER_MAPPING[METHOD] = Late("PrunedQuantizer")
