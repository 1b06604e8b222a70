"""What POST /v1/audio/transcriptions takes: the fields of a form, all of them text but the file."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import UploadFile
from pydantic import BaseModel, ConfigDict, Field, model_validator

from mlxkv.server.fields import MAX_REAL, NoEffect, Refused

Format = Literal["json", "text", "srt", "verbose_json", "vtt"]


class TranscriptionForm(BaseModel):
    """A recording, and how its text is wanted."""

    model_config = ConfigDict(extra="allow")

    file: UploadFile
    model: str
    language: Annotated[str, Field(max_length=100)] | None = Field(
        None, description="A code such as `de`, or a name; left out: the recording's own."
    )
    prompt: Annotated[str, Field(max_length=10_000)] | None = Field(
        None, description="Names and words that occur, or a style."
    )
    response_format: Format | None = None
    temperature: Annotated[float, Field(ge=0, le=MAX_REAL, allow_inf_nan=False)] | None = Field(
        None, description="0 if left out."
    )
    stream: bool | None = Field(None, description="With response_format json or text.")
    granularities: Annotated[list[Literal["segment"]], Field(fail_fast=True)] | None = Field(
        None, alias="timestamp_granularities[]", description="With verbose_json; of segments only."
    )
    include: Refused = Field(None, alias="include[]")
    adapter: Refused = Field(None, description="Not here: name it in `model`, as MODEL+NAME.")
    chunking_strategy: Annotated[Any, NoEffect()] = None

    @model_validator(mode="after")
    def _fit_together(self) -> TranscriptionForm:
        if self.stream and self.format not in ("json", "text"):
            raise ValueError(f"stream is for response_format json and text, not {self.format}")
        if self.granularities and self.format != "verbose_json":
            raise ValueError("timestamp_granularities is for response_format verbose_json")
        return self

    @property
    def format(self) -> Format:
        """Of the response."""
        return self.response_format or "json"
