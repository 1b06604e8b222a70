"""Models made from other models on this machine: renamed, quantized, or with other settings.

A copy shares its weights with the original by hard links, if the file system has them; weights are
never written to. All other files are copied.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from mlxkv.base import regular
from mlxkv.base.paths import models_dir, slug
from mlxkv.checkpoint import mlxkv_json
from mlxkv.checkpoint.mlxkv_json import RECORD, Record, read_record
from mlxkv.errors import ConfigError, UsageError
from mlxkv.sampling.params import GENERATION_CONFIG, SamplingParams
from mlxkv.store import settings
from mlxkv.store.adapters import OWN, AdapterRef, keep
from mlxkv.store.refs import is_model
from mlxkv.store.resolve import Report, silent, work_folder

GENERATION = "generation_config.json"


def derive(
    source: Path,
    name: str,
    *,
    quantize: str | None = None,
    chosen: Mapping[str, Any] | None = None,
    sampling: SamplingParams | None = None,
    adapters: Sequence[AdapterRef] = (),
    report: Report = silent,
) -> Path:
    """Make a model from another, and return its directory.

    Args:
        source: the other's directory.
        name: of the new model.
        quantize: quantize its weights, see `mlxkv.convert`; None copies them. Not "auto", which
            would run the whole model beside those that a server has loaded.
        chosen: settings that it runs with, see `settings`.
        sampling: what it recommends; unset parameters are the source's.
        adapters: that it is always loaded with, beside those of the source.
        report: called with the progress.

    Raises:
        UsageError: the name is taken, or a setting or quantization is not allowed.
        CheckpointError: the source is damaged.
        OutputError: there is no space.
    """
    if quantize == "auto":
        raise UsageError("auto measures the model: use `mlxkv convert`", field="quantize")
    with work_folder(name, report) as work:
        target, made = models_dir() / slug(name), work / "model"
        if is_model(target):
            raise UsageError(f"model {name!r} exists already; delete it first")
        if quantize is None:
            _copy(source, made)
        else:
            _quantize(source, made, name, quantize, report)
            if (source / OWN).is_dir():
                shutil.copytree(source / OWN, made / OWN)
        if adapters:
            keep(adapters, made)
        _write_record(source, made, name, chosen or {})
        if sampling is not None:
            _write_sampling(made / GENERATION, sampling)
        made.replace(target)
        return target


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        if file.is_dir():
            shutil.copytree(file, target / file.name)
        elif file.suffix != ".safetensors" or not _link(file, target / file.name):
            shutil.copyfile(file, target / file.name)


def _link(file: Path, target: Path) -> bool:
    with contextlib.suppress(OSError):
        os.link(file.resolve(), target)
        return True
    return False


def _quantize(source: Path, target: Path, name: str, quantize: str, report: Report) -> None:
    from mlxkv.convert import convert  # pyright: ignore[reportMissingImports]

    label = f"converting {name}"
    convert(
        source,
        target,
        quantize=quantize,
        progress=lambda step: report(label, step.done_bytes, step.total_bytes),
    )


def _write_record(source: Path, made: Path, name: str, chosen: Mapping[str, Any]) -> None:
    record = read_record(source) or Record(name, "converted", source.name)
    # No fingerprint: it does not depend on the file that the source was made from.
    record = replace(record, name=name, fingerprint="")
    kept = {**mlxkv_json.of_model(source), **mlxkv_json.checked(chosen)}
    (made / RECORD).write_text(json.dumps(asdict(record) | kept, indent=2) + "\n", "utf-8")
    try:
        settings.effective(made)
    except ConfigError as error:
        raise UsageError(str(error).removeprefix(f"{made / RECORD}: ")) from None


def _write_sampling(file: Path, sampling: SamplingParams) -> None:
    raw = json.loads(regular.read_text(file)) if file.is_file() else {}
    said = {key: getattr(sampling, name) for key, name in GENERATION_CONFIG.items()}
    raw |= {key: value for key, value in said.items() if value is not None}
    if sampling.temperature is not None:
        raw["do_sample"] = sampling.temperature > 0
    file.write_text(json.dumps(raw, indent=2) + "\n", "utf-8")
