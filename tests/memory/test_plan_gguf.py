"""A plan holds where a GGUF file gave the projections several widths."""

from __future__ import annotations

import mlx.core as mx
import pytest

import mlxkv
from mlxkv.convert import convert
from mlxkv.generation.session import Session
from mlxkv.llm.plan import plan
from mlxkv.nn.linear import QuantizedEmbedding
from tests.convert.test_convert_gguf_blocks import gemma_config, k_quant_model
from tests.memory.test_plan import N_DECODED, TOLERANCE, peak_of, weights_of
from tests.support.tiny import llama_config


@pytest.mark.usefixtures("totals_alone")
@pytest.mark.parametrize("make_config", [llama_config, gemma_config], ids=["llama", "gemma3"])
def test_a_plan_holds_where_modules_have_several_widths(make_config, tmp_path):
    """Weights to the byte, but for what kernels keep of an embedding in 16 bits where its values,
    which no plan reads, are 16-bit numbers. Of the peak only that it is not above: the models have
    no vocabulary that would give their weights some size, see `TOLERANCE`.
    """
    path = convert(k_quant_model(tmp_path, make_config)[0], tmp_path / "out").path
    assert path is not None
    model = mlxkv.load_model(path, dtype=mx.float32)
    needs = plan(path, context=700 + N_DECODED, chunk=256, dtype="float32")
    narrowed = sum(
        array.nbytes
        for module in model.modules()
        if isinstance(module, QuantizedEmbedding)
        for array in (module.scales, module.biases)
        if array.dtype == mx.float16
    )
    assert needs.weights_bytes - weights_of(model) in (0, narrowed)
    peak = max(peak_of(Session(model), 700, 256) for _ in range(3))
    assert weights_of(model) + peak <= needs.total_bytes * (1 + TOLERANCE)
