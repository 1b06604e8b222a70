"""The rules by which graphs are counted, each on a graph of its own."""

from __future__ import annotations

from typing import Any

import pytest

from tests.metal.count import Counts, count


class Graph:
    """Writes a graph as shim.cpp does."""

    def __init__(self) -> None:
        self.ops: list[dict[str, Any]] = []
        self._n = 0

    def array(self, *shape: int, dtype: str = "bfloat16", done: bool = True) -> list[Any]:
        """An array of its own number."""
        self._n += 1
        return [self._n, dtype, list(shape), done]

    def op(
        self, name: str, inputs: list[Any], shape: tuple[int, ...], *arguments: int
    ) -> list[Any]:
        """The output of an operation, bfloat16."""
        out = self.array(*shape, done=False)
        self.ops.append(
            {"name": name, "arguments": list(arguments), "inputs": inputs, "outputs": [out]}
        )
        return out

    def counts(self) -> Counts:
        return count({"ops": self.ops})


@pytest.fixture
def graph() -> Graph:
    return Graph()


def test_views_launch_nothing(graph):
    x = graph.array(1, 8, 4, 64)
    x = graph.op("Slice", [x], (1, 8, 2, 64), 1, 1, 1, 1)
    x = graph.op("Transpose", [x], (1, 2, 8, 64), 0, 2, 1, 3)
    x = graph.op("ExpandDims", [x], (1, 2, 8, 1, 64), 3)
    graph.op("Broadcast", [x], (1, 2, 8, 4, 64))
    assert graph.counts().launches == 0


def test_a_concatenation_launches_once_for_each_part_that_is_not_empty(graph):
    parts = [graph.array(1, 2, n, 64) for n in (3, 0, 5)]
    graph.op("Concatenate", parts, (1, 2, 8, 64))
    assert graph.counts().kernels == {"Concatenate": 2}


def test_an_empty_result_launches_nothing(graph):
    graph.op("Add", [graph.array(0, 4), graph.array(0, 4)], (0, 4))
    assert graph.counts().launches == 0


def test_compiled_functions_go_by_one_name(graph):
    x = graph.array(4)
    for name in ("CompiledMultiplySigmoid", "CompiledAddAdd"):
        x = graph.op(name, [x], (4,))
    assert graph.counts().kernels == {"Compiled": 2}


def test_heads_side_by_side_are_reshaped_without_a_copy(graph):
    graph.op("Reshape", [graph.array(1, 7, 512)], (1, 7, 8, 64))
    assert graph.counts().launches == 0


def test_heads_behind_each_other_are_copied_to_be_reshaped(graph):
    x = graph.op("Transpose", [graph.array(1, 8, 7, 64)], (1, 7, 8, 64), 0, 2, 1, 3)
    graph.op("Reshape", [x], (1, 7, 512))
    counts = graph.counts()
    assert counts.hidden == {"reshape": 1}
    assert counts.hidden_bytes == {"reshape": 7 * 512 * 2}
    assert counts.launches == 1


def test_heads_of_a_single_token_are_reshaped_without_a_copy(graph):
    x = graph.op("Transpose", [graph.array(1, 8, 1, 64)], (1, 1, 8, 64), 0, 2, 1, 3)
    graph.op("Reshape", [x], (1, 1, 512))
    assert graph.counts().launches == 0


@pytest.mark.parametrize(("n_tokens", "n_hidden"), [(1, 0), (7, 1)])
def test_a_norm_copies_a_part_of_wider_rows(graph, n_tokens, n_hidden):
    x = graph.op("Split", [graph.array(1, n_tokens, 1024)], (1, n_tokens, 768))
    graph.op("RMSNorm", [x, graph.array(768)], (1, n_tokens, 768))
    counts = graph.counts()
    assert counts.hidden.total() == n_hidden
    assert counts.kernels == {"RMSNorm": 1}


def test_a_norm_keeps_the_strides_of_what_it_reads(graph):
    heads = graph.op("Transpose", [graph.array(1, 7, 8, 64)], (1, 8, 7, 64), 0, 2, 1, 3)
    normed = graph.op("RMSNorm", [heads, graph.array(64)], (1, 8, 7, 64))
    back = graph.op("Transpose", [normed], (1, 7, 8, 64), 0, 2, 1, 3)
    graph.op("Reshape", [back], (1, 7, 512))
    # Its rows do not follow each other, so it is copied once; the reshape then copies it back.
    assert graph.counts().hidden == {"norm of a strided array": 1, "reshape": 1}


@pytest.mark.parametrize(("n_rotated", "n_hidden"), [(64, 0), (32, 1)])
def test_a_rotation_of_a_part_of_each_head_copies_the_head(graph, n_rotated, n_hidden):
    graph.op("RoPE", [graph.array(1, 8, 7, 64)], (1, 8, 7, 64), n_rotated)
    assert graph.counts().hidden.total() == n_hidden


@pytest.mark.parametrize(("heads_of_qkv", "n_hidden"), [(8, 0), (12, 1)])
def test_a_rotation_takes_heads_inside_tokens_unless_others_lie_between(
    graph, heads_of_qkv, n_hidden
):
    x = graph.array(2, 7, heads_of_qkv, 64)
    x = graph.op("Transpose", [x], (2, heads_of_qkv, 7, 64), 0, 2, 1, 3)
    x = graph.op("Slice", [x], (2, 8, 7, 64), 1, 1, 1, 1)
    graph.op("RoPE", [x], (2, 8, 7, 64), 64)
    assert graph.counts().hidden.total() == n_hidden


def test_a_quantized_product_copies_a_split_input(graph):
    x = graph.op("Split", [graph.array(1, 7, 1024)], (1, 7, 512))
    weight = [graph.array(64, 64, dtype="uint32"), graph.array(64, 8), graph.array(64, 8)]
    graph.op("QuantizedMatmul", [x, *weight], (1, 7, 64))
    assert graph.counts().hidden_bytes.total() == 7 * 512 * 2


def test_a_product_takes_a_transposed_weight_as_it_is(graph):
    weight = graph.op("Transpose", [graph.array(64, 512)], (512, 64), 1, 0)
    graph.op("Matmul", [graph.array(7, 512), weight], (7, 64))
    assert graph.counts().hidden.total() == 0


def test_attention_of_one_query_takes_keys_with_room_behind_them(graph):
    keys, values = (
        graph.op("Slice", [graph.array(1, 2, 256, 64)], (1, 2, 9, 64), 1, 1, 1, 1) for _ in "kv"
    )
    graph.op("ScaledDotProductAttention", [graph.array(1, 8, 1, 64), keys, values], (1, 8, 1, 64))
    assert graph.counts().hidden.total() == 0


def test_attention_of_a_chunk_is_laid_out_token_by_token(graph):
    q, k = graph.array(1, 8, 32, 64), graph.array(1, 2, 32, 64)
    out = graph.op("ScaledDotProductAttention", [q, k, k], (1, 8, 32, 64))
    out = graph.op("Transpose", [out], (1, 32, 8, 64), 0, 2, 1, 3)
    graph.op("Reshape", [out], (1, 32, 512))
    assert graph.counts().hidden.total() == 0


def test_float32_is_listed_by_operation_and_width_and_views_and_scalars_are_not(graph):
    x = graph.array(1, 7, 64)
    for name, shape in (("AsType", (1, 7, 64)), ("Reshape", (7, 64)), ("Divide", ())):
        graph.op(name, [x], shape)[1] = "float32"
    assert graph.counts().float32() == {"AsType [.., 64]": 1}


def test_rows_of_a_width_are_those_that_one_operation_makes(graph):
    x = graph.array(1, 7, 64)
    graph.op("Matmul", [x, graph.array(64, 500)], (1, 7, 500))
    graph.op("Broadcast", [graph.array(1, 500)], (900, 500))
    assert graph.counts().rows_of(500) == 7
