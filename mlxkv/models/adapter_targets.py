"""What each target of an adapter changes of a model: its projection, or the rows of a fused one.

A target that the model does not have is refused with its key, and so is one of another shape.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxkv.checkpoint.adapter import Adapter, Target
from mlxkv.checkpoint.tensor_names import text_name, tower_of
from mlxkv.errors import UnsupportedModel, WeightsError
from mlxkv.models import Family
from mlxkv.nn.layers import Fusing
from mlxkv.nn.lora import LowRank
from mlxkv.nn.model import CausalLM
from mlxkv.nn.moe import ExpertLinear, GatedExperts
from mlxkv.nn.sigmoid_moe import Router

_EXPERT = re.compile(r"^(.*\.)experts\.(\d+)\.(gate_proj|up_proj|down_proj)$")
_KV_B = "kv_b_proj"


@dataclass(frozen=True, slots=True)
class Weighted:
    """An adapter, and how much of its change is added."""

    adapter: Adapter
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Place:
    """Rows of a module.

    Args:
        parent: the module, or list of modules, that has it.
        name: of the module in its parent.
        start: the first row.
        stop: the one behind the last.
        order: which row of the checkpoint's projection each of them is; None for all in order.
    """

    parent: Any
    name: Any
    start: int
    stop: int
    order: mx.array | None = None

    @property
    def module(self) -> Any:
        return self.parent[self.name]


@dataclass(frozen=True, slots=True)
class Change:
    """What is added to a weight.

    Args:
        place: which.
        change: without the adapter's weight, in the file's dtype.
        weight: the adapter's.
        magnitude: DoRA's norms of the rows of the sum; None for plain LoRA.
        of_rows: of the rows that an embedding gives for tokens, not of its product as a head.
    """

    place: Place
    change: LowRank
    weight: float
    magnitude: mx.array | None = None
    of_rows: bool = False


class Changes:
    """The changes of one adapter to a model, whose projections may be fused or not."""

    def __init__(self, model: CausalLM, family: Family, each: Weighted):
        self._model, self._family = model, family
        self._root: Any = model.weights_root()
        self._adapter, self._weight = each.adapter, each.weight

    def __iter__(self) -> Iterator[Change]:
        """What each target changes; raises as `adapters.attach`."""
        experts: dict[tuple[str, str], dict[int, Target]] = {}
        for path, target in self._adapter.targets.items():
            if tower_of(path) is not None:
                self._check_tower(path, target)
            elif (match := _EXPERT.match(text_name(path))) is not None:
                stem, number, part = match.groups()
                experts.setdefault((stem, part), {})[int(number)] = target
            elif target.kind == "experts":
                yield from self._of_parameters(path, target)
            else:
                yield from self._of_target(path, target)
        for (stem, part), targets in experts.items():
            yield self._stacked(stem, part, targets)

    def _check_tower(self, path: str, target: Target) -> None:
        """Refuse a change of an encoder, which is left out where the model does not have it."""
        if path.removeprefix("model.").partition(".")[0] in self._root:
            raise UnsupportedModel(
                self._says(target, "changes an encoder of pictures or sound: only text is adapted")
            )

    def _of_target(self, path: str, target: Target) -> Iterator[Change]:
        place = self.find(path)
        if place is not None:
            yield from self._of_place(place, path, target)
        elif path.endswith("lm_head") and (tied := self.find("model.embed_tokens")) is not None:
            self._check(target, tied.stop, columns(tied.module))
            if target.magnitude is not None:
                raise UnsupportedModel(self._says(target, "is DoRA of a tied head: only LoRA is"))
            yield self._change(tied, target)
        elif path.endswith(_KV_B):
            yield from self._halves(path, target)
        elif not self._is_left_out(path):
            raise WeightsError(
                self._says(target, f"is for {text_name(path)}, which this model does not have")
            )

    def _of_place(self, place: Place, path: str, target: Target) -> Iterator[Change]:
        module = place.module
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding):
            yield from self._of_embedding(place, target)
            return
        if not _is_projection(module):
            raise UnsupportedModel(self._says(target, f"changes {path}, which is no projection"))
        n_experts = module["weight"].shape[0] if module["weight"].ndim == 3 else None
        if target.a.ndim != (2 if n_experts is None else 3):
            raise self._misfit(target, "of experts" if n_experts else "a single matrix")
        self._check(target, place.stop - place.start, columns(module), n_experts)
        if target.magnitude is not None and (n_experts is not None or isinstance(module, Router)):
            raise UnsupportedModel(self._says(target, "is DoRA of experts: only LoRA is"))
        yield self._change(place, target)

    def _of_embedding(self, place: Place, target: Target) -> Iterator[Change]:
        n_tokens, dims = place.stop - place.start, columns(place.module)
        if target.a.shape[0] != n_tokens or target.b.shape[-1] != dims:
            raise self._misfit(target, f"{n_tokens} tokens of {dims} values")
        if target.magnitude is not None:
            raise UnsupportedModel(self._says(target, "is DoRA of an embedding: only LoRA is"))
        change, w = _plain(target).folded(), self._weight
        yield Change(place, change, w, of_rows=True)
        if target.kind == "tied" and place.name == "embed_tokens":
            yield Change(place, LowRank(change.b.T, change.a.T), w)

    def _halves(self, path: str, target: Target) -> Iterator[Change]:
        """Of latent attention: `kv_b_proj`, whose rows are each head's keys and then values, is two
        modules here, the first of them transposed."""
        stem = path.removesuffix(_KV_B)
        keys, values = self.find(f"{stem}embed_q"), self.find(f"{stem}unembed_out")
        if keys is None or values is None:
            raise WeightsError(self._says(target, f"is for {path}, which this model does not have"))
        if target.magnitude is not None:
            raise UnsupportedModel(self._says(target, f"is DoRA of {_KV_B}: only LoRA is"))
        n_heads, rank, n_keys = keys.module["weight"].shape[0], keys.stop, columns(keys.module)
        self._check(target, n_heads * (n_keys + values.stop), rank)
        plain, w = _plain(target).folded(), self._weight
        heads = plain.b.reshape(plain.b.shape[0], n_heads, -1).swapaxes(0, 1)  # [H, r, keys + v]
        of_keys, of_values = heads[..., :n_keys], heads[..., n_keys:]
        yield Change(keys, LowRank(of_keys.swapaxes(-1, -2), plain.a.T[None]), w)
        yield Change(values, LowRank(plain.a[None], of_values), w)

    def _stacked(self, stem: str, part: str, targets: dict[int, Target]) -> Change:
        """Targets of single experts as one; those without are not changed."""
        first = next(iter(targets.values()))
        place = self.find(f"{stem}switch_mlp.{part}") or self.find(f"{stem}experts.{part}")
        if place is None or place.module["weight"].ndim != 3:
            raise WeightsError(
                self._says(first, f"is for {stem}experts, which this model does not have")
            )
        n_experts = place.module["weight"].shape[0]
        ranks = {target.b.shape[-2] for target in targets.values()}
        if max(targets) >= n_experts or len(ranks) > 1:
            raise self._misfit(first, f"{n_experts} experts, which must have one rank")
        for target in targets.values():
            self._check(target, place.stop - place.start, columns(place.module))
            if target.magnitude is not None:
                raise UnsupportedModel(self._says(target, "is DoRA of experts: only LoRA is"))
        plain = {i: _plain(target).folded() for i, target in targets.items()}
        one = next(iter(plain.values()))
        zero = LowRank(mx.zeros_like(one.a), mx.zeros_like(one.b))
        all_of = [plain.get(i, zero) for i in range(n_experts)]
        a, b = mx.stack([c.a for c in all_of]), mx.stack([c.b for c in all_of])
        return Change(place, LowRank(a, b), self._weight)

    def _of_parameters(self, path: str, target: Target) -> Iterator[Change]:
        """PEFT's `target_parameters`: one pair of matrices for all experts of a layer.

        A's rows are those of the experts one after the other, B's columns take turns.
        """
        block = self._experts_block(path.removesuffix(".base_layer"))
        if block is None:
            raise WeightsError(self._says(target, f"is for {path}, which has no experts here"))
        down = self._place(block, "down_proj")
        assert down is not None
        E, out, hidden = down.module["weight"].shape[0], down.stop, columns(down.module)
        if target.a.shape[0] % E or target.b.shape[1] != target.a.shape[0]:
            raise self._misfit(target, f"{E} experts")
        a = _float(target.a).reshape(E, -1, target.a.shape[1]).swapaxes(-1, -2)
        b = _float(target.b).reshape(target.b.shape[0], -1, E).transpose(2, 1, 0)
        shapes = {(out, 2 * hidden): "gate_up", (hidden, out): "down"}
        if (a.shape[1], b.shape[2]) not in shapes:  # as earlier versions of PEFT took rows
            a, b = b.swapaxes(-1, -2), a.swapaxes(-1, -2)
        if (shape := (a.shape[1], b.shape[2])) not in shapes:
            raise self._misfit(target, f"experts of {out} and {hidden} values")
        b = b * target.scale
        if shapes[shape] == "down":
            yield Change(down, LowRank(a, b), self._weight)
            return
        turns = self._family.name == "gpt_oss"  # rows of gate and up take turns
        halves = (b[..., 0::2], b[..., 1::2]) if turns else mx.split(b, 2, axis=-1)
        for name, half in zip(("gate_proj", "up_proj"), halves, strict=True):
            place = self._place(block, name)
            assert place is not None
            yield Change(place, LowRank(a, half), self._weight)

    def _experts_block(self, path: str) -> GatedExperts | None:
        stem = text_name(path).removesuffix("experts")
        for name in ("switch_mlp", "experts", "experts.switch_glu"):
            found = self._walk(f"{stem}{name}".split("."))
            if isinstance(found, GatedExperts):
                return found
        return None

    def _is_left_out(self, path: str) -> bool:
        """Whether the family leaves this out of a checkpoint, as nothing reads what it computes."""
        if not self._family.native:
            return False
        dummy = {f"{path}.weight": mx.zeros((1, 1))}
        return bool(self._family.remap(dummy, self._model.config)[1])

    def find(self, path: str) -> Place | None:
        """Where a projection of the checkpoint is."""
        for spelled in (path, text_name(path), f"language_model.{path}"):
            *parents, name = spelled.split(".")
            parent = self._walk(parents)
            if parent is not None and (place := self._place(parent, name)) is not None:
                return place
        return None

    def _place(self, parent: Any, name: str) -> Place | None:
        if isinstance(parent, list):
            if not name.isdecimal() or int(name) >= len(parent):
                return None
            return Place(parent, int(name), 0, parent[int(name)]["weight"].shape[-2])
        if isinstance(parent, Fusing) and (fused := parent.place_of(name)) is not None:
            return Place(parent, *fused, parent.order_of(name))
        module = parent.get(name)
        if not isinstance(module, nn.Module):
            return None
        weight = module.get("weight")
        return Place(parent, name, 0, 1 if weight is None or weight.ndim < 2 else weight.shape[-2])

    def _walk(self, names: Sequence[str]) -> Any:
        node = self._root
        for name in names:
            if isinstance(node, list):
                node = node[int(name)] if name.isdecimal() and int(name) < len(node) else None
            else:
                node = node.get(name) if isinstance(node, dict) else None
            if node is None:
                return None
        return node

    def _change(self, place: Place, target: Target) -> Change:
        plain, magnitude, order = _plain(target), target.magnitude, place.order
        if order is not None:
            plain = replace(plain, b=mx.take(plain.b, order, axis=-1))
            magnitude = None if magnitude is None else mx.take(magnitude, order)
        return Change(place, plain, self._weight, magnitude)

    def _check(self, target: Target, out: int, in_dim: int, n_experts: int | None = None) -> None:
        """Raise WeightsError for a target of other sizes than its projection's."""
        a, b = target.a, target.b
        fits = a.shape[-2] == in_dim and b.shape[-1] == out and a.shape[-1] == b.shape[-2]
        if n_experts is not None:
            fits = fits and a.shape[0] == b.shape[0] == n_experts
        if target.magnitude is not None:
            fits = fits and target.magnitude.shape == (b.shape[-1],)
        if not fits:
            raise self._misfit(target, f"{in_dim} values to {out}")

    def _misfit(self, target: Target, what: str) -> WeightsError:
        got = f"{list(target.a.shape)} and {list(target.b.shape)}"
        return WeightsError(self._says(target, f"is {got}; the model's has {what}"))

    def _says(self, target: Target, text: str) -> str:
        base = f"; it was trained on {self._adapter.base}" if self._adapter.base else ""
        return f"{self._adapter.source}: {target.key} {text}{base}"


def _is_projection(module: Any) -> bool:
    """Whether it is one that `adapters` knows; mlx-lm's experts are known by their class's name."""
    if isinstance(module, nn.Linear | nn.QuantizedLinear | ExpertLinear | Router):
        return True
    return type(module).__name__ in ("SwitchLinear", "QuantizedSwitchLinear")


def _plain(target: Target) -> LowRank:
    return LowRank(target.a, target.b, scales=(target.scale,))


def _float(array: mx.array) -> mx.array:
    return array.astype(mx.float32)


def columns(module: Any) -> int:
    """Values of a row of a projection's weight."""
    weight = module["weight"]
    return weight.shape[-1] * 32 // module.bits if "scales" in module else weight.shape[-1]
