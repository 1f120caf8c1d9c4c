"""What lies in the folder of a finished run, as its pages need it; a run of an older version has less."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from finllm_prune.checkpoints import LOSSY
from finllm_prune.checkpoints.manifest import REPORT, of_oneshot
from finllm_prune.errors import InputError, one_line
from finllm_prune.evaluation.evidence import FLIPS
from finllm_prune.staging import UNFINISHED
from finllm_prune.training import RECORD_FILE

# What a report says of itself where it is of a version that did not tell.
_UNTOLD: dict[str, Any] = {
    "evidence": None, "exported": {}, "gates": {}, "target": None, "per_class": {}, "unit": "row", "warnings": [],
    "commit": None, "collapsed": False, "paired_test": "", "paired_p": None,
}  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A run.

    Args:
        folder: where it lies.
        report: ``report.json``.
        record: the flight recorder's table, where there is one.
        flips: texts whose answers changed, where they are there and wanted.
    """

    folder: Path
    report: dict[str, Any]
    record: pd.DataFrame | None
    flips: list[dict[str, Any]] | None

    @classmethod
    def read(cls, folder: Path, *, texts: bool = True) -> "Finished":
        """Raises InputError where there is no report, or a file is damaged."""
        if not (folder / REPORT).is_file():
            raise InputError(f"{folder} holds no {REPORT}; name the folder of a finished run")
        record, flips = folder / RECORD_FILE, folder / FLIPS
        with readable(folder):
            report = json.loads((folder / REPORT).read_text(encoding="utf-8"))
            if of_oneshot(report):
                raise InputError(
                    f"{folder} is the output of finllm-prune oneshot, which has no course to draw; read its README.md"
                )
            return cls(
                folder,
                _UNTOLD | report,
                pd.read_parquet(record) if record.is_file() else None,
                json.loads(flips.read_text(encoding="utf-8")) if texts and flips.is_file() else None,
            )

    @property
    def name(self) -> str:
        return self.folder.resolve().name.removesuffix(UNFINISHED[0])

    @cached_property
    def metrics(self) -> dict[str, dict[str, Any]]:
        """Name -> what was measured."""
        found = {
            name: value for name, value in self.report.items() if isinstance(value, dict) and "pruned_interval" in value
        }
        if not found:
            raise ValueError("no metric")
        return found

    @property
    def evidence(self) -> dict[str, Any] | None:
        evidence: dict[str, Any] | None = self.report.get("evidence")
        return evidence

    @property
    def headline(self) -> str:
        """The metric to look at first: one that a gate asks for, or what the test of the evidence is about, or the first."""
        asked = [str(name).removesuffix("_retention") for name in self.report["gates"]]
        tested = [str(self.evidence["headline"])] if self.evidence else []
        return next(name for name in [*asked, *tested, *self.metrics] if name in self.metrics)

    def quality_of(self, format_name: str) -> dict[str, dict[str, Any]] | None:
        """The metrics of a format, as ``metrics``; None where they were not measured."""
        if format_name in LOSSY:
            quality = self.report["exported"].get(format_name)
            return None if quality is None else dict(quality["metrics"])
        return self.metrics

    @property
    def kept(self) -> float:
        """The part of the encoder's linear weights that is left."""
        return 1.0 - float(self.report["sparsity"]["encoder_linear"])

    @property
    def exact(self) -> dict[str, float]:
        """Format -> its size as a part of the dense model's, of those that are the pruned model itself."""
        sizes = self.report["bytes"]
        return {name: size / sizes["dense"] for name, size in sizes.items() if name not in ("dense", *LOSSY)}

    @property
    def smallest(self) -> str | None:
        """Of these formats, where there are some."""
        return min(self.exact, key=lambda name: self.exact[name], default=None)


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raise InputError where what lies in ``folder`` is not what a run writes."""
    try:
        yield
    except InputError:
        raise
    except (
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        IndexError,
        ZeroDivisionError,
        OSError,
        jinja2.UndefinedError,
    ) as error:
        raise InputError(
            f"{folder}: its files are not those that a run writes ({type(error).__name__}: {one_line(error)}); bring them back"
        ) from error
