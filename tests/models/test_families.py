"""What holds for every family's file."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect

import pytest

from mlxkv.models import NATIVE
from mlxkv.nn.decoder_model import DecoderConfig, DecoderModel
from mlxkv.nn.embedder import Embedder
from tests.support.paths import ROOT

FAMILIES = sorted(set(NATIVE.values()))
FOLDER = ROOT / "mlxkv" / "models"
ENCODERS = ("mlxkv.models.gemma_vision", "mlxkv.models.gemma_audio")
"""What several Gemmas' encoders of pictures and sound share."""


@pytest.mark.parametrize("file", [*sorted(FOLDER.glob("g*.py")), FOLDER / "llama.py"])
def test_a_family_imports_no_other_family(file):
    family = next(name for name in (*FAMILIES[::-1], "") if file.stem.startswith(name))
    imported = [
        node.module or ""
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom)
    ]
    of_models = [name for name in imported if name.startswith("mlxkv.models")]
    own = (f"mlxkv.models.{family}_", *ENCODERS)
    assert family and [name for name in of_models if not name.startswith(own)] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_declares_no_field_that_every_decoder_has(family):
    module = importlib.import_module(f"mlxkv.models.{family}")
    shared = {field.name for field in dataclasses.fields(DecoderConfig)}
    assert issubclass(module.Config, DecoderConfig)
    assert issubclass(module.Model, DecoderModel | Embedder)
    assert shared.isdisjoint(inspect.get_annotations(module.Config))
