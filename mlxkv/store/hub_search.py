"""Search the hub for models that mlxkv can run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mlxkv.errors import DownloadError, MlxkvError
from mlxkv.models import family_for
from mlxkv.store.hub_errors import hush, translate
from mlxkv.store.hub_files import check_reachable

MOST = 60
"""Repositories that the hub is asked for, the most downloaded first."""
_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2,
          "I16": 2, "U16": 2}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hit:
    """A repository that a search found.

    Args:
        name: `org/name`.
        model_type: of its config.json.
        weights_bytes: of its safetensors files.
        downloads: last month's.
    """

    name: str
    model_type: str
    weights_bytes: int
    downloads: int


def search(words: Sequence[str]) -> list[Hit]:
    """Repositories with these words and with weights for MLX, or if there are none, any weights.

    Those that mlxkv cannot run, and those of which the hub knows no size, are left out.

    Raises:
        DownloadError: no network, or the hub answers with an error.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HfHubHTTPError

    hush()
    text = " ".join(words)
    try:
        check_reachable(constants.ENDPOINT, offline=constants.HF_HUB_OFFLINE)
        for tag in ("mlx", "safetensors"):
            found = HfApi().list_models(
                search=text,
                filter=tag,
                sort="downloads",
                limit=MOST,
                expand=["config", "downloads", "safetensors"],
            )
            if hits := [hit for info in found if (hit := _hit(info)) is not None]:
                return hits
    except HfHubHTTPError as error:
        raise translate(text, error) from error
    except Exception as error:  # the HTTP client behind it differs from version to version
        reason = f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})"
        offline = constants.HF_HUB_OFFLINE
        raise DownloadError("HF_HUB_OFFLINE is set" if offline else reason) from error
    return []


def _hit(info: Any) -> Hit | None:
    config, sizes = info.config, getattr(info.safetensors, "parameters", None)
    if not isinstance(config, dict) or not isinstance(sizes, dict):
        return None
    try:
        family_for(config, info.id)
    except MlxkvError:
        return None
    n_bytes = sum(n * _BYTES.get(dtype, 1) for dtype, n in sizes.items() if isinstance(n, int))
    return Hit(info.id, str(config["model_type"]), n_bytes, info.downloads or 0)
