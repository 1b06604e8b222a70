"""Blocks of content: what messages of Anthropic's API are made of.

Blocks of tools that Anthropic's server runs are left out, and named (`ignored`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from mlxkv.server.fields import LeftOut, NoEffect, Part, Refused
from mlxkv.server.media.content import Given, Place
from mlxkv.server.tools import Name


class CacheControl(Part):
    """A mark for a cache that needs none."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Part):
    """What all blocks may have."""

    cache_control: Annotated[CacheControl | None, NoEffect()] = None


class TextBlock(Block):
    """Text."""

    type: Literal["text"]
    text: str
    citations: Refused = None


class ThinkingBlock(Block):
    """What the model thought."""

    type: Literal["thinking"]
    thinking: str
    signature: Annotated[str | None, NoEffect()] = None


class ToolUseBlock(Block):
    """A call that the model made."""

    type: Literal["tool_use"]
    id: Annotated[str, Field(min_length=1, max_length=256)]
    name: Name
    input: dict[str, Any]
    caller: Annotated[dict[str, Any] | None, NoEffect()] = None


class RedactedThinking(LeftOut):
    """Thinking that only Anthropic's server can read."""

    type: Literal["redacted_thinking"]


class ServerBlock(LeftOut):
    """What a tool of another server did."""

    type: Literal[
        "server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "tool_reference",
        "code_execution_tool_result", "bash_code_execution_tool_result", "container_upload",
        "text_editor_code_execution_tool_result", "tool_search_tool_result", "mcp_tool_use",
        "mcp_tool_result", "compaction",
    ]  # fmt: skip


class PlainText(Part):
    """The text of a document."""

    type: Literal["text"]
    data: str


class BlocksOf(Part):
    """The text of a document, in blocks."""

    type: Literal["content"]
    content: str | list[TextBlock]


class DocumentBlock(Block):
    """A document of text; PDFs are refused."""

    type: Literal["document"]
    source: Annotated[PlainText | BlocksOf, Field(discriminator="type")]
    title: str | None = None
    context: str | None = None

    @property
    def text(self) -> str:
        """What the model reads of it."""
        if isinstance(self.source, PlainText):
            body = self.source.data
        else:
            content = self.source.content
            body = content if isinstance(content, str) else "".join(t.text for t in content)
        return "\n".join(part for part in (self.title, self.context, body) if part)


class SearchResultBlock(Block):
    """A result of the client's own search."""

    type: Literal["search_result"]
    source: str
    title: str
    content: list[TextBlock]

    @property
    def text(self) -> str:
        """What the model reads of it."""
        return "\n".join([self.title, self.source, *(block.text for block in self.content)])


class Base64Source(Part):
    """A file in base64. What it is its content says, not `media_type`."""

    type: Literal["base64"]
    data: str
    media_type: str | None = None


class URLSource(Part):
    """A file on a server that the operator allows."""

    type: Literal["url"]
    url: str


class ImageBlock(Block):
    """A picture."""

    type: Literal["image"]
    source: Annotated[Base64Source | URLSource, Field(discriminator="type")]

    def given(self, place: Place, is_result: bool = False) -> Given:
        """The picture, for the prompt.

        Args:
            place: of this block.
            is_result: whether a tool gave it.
        """
        is_url = isinstance(self.source, URLSource)
        data = self.source.url if isinstance(self.source, URLSource) else self.source.data
        return Given("image", (*place, self.type), data, is_url, is_result=is_result)


ResultContent = Annotated[
    TextBlock | DocumentBlock | SearchResultBlock | ImageBlock | ServerBlock,
    Field(discriminator="type"),
]


class ToolResultBlock(Block):
    """What a call gave."""

    type: Literal["tool_result"]
    tool_use_id: str
    content: str | list[ResultContent] | None = None
    is_error: bool | None = None


ContentBlock = Annotated[
    TextBlock
    | ThinkingBlock
    | ToolUseBlock
    | ToolResultBlock
    | DocumentBlock
    | SearchResultBlock
    | ImageBlock
    | RedactedThinking
    | ServerBlock,
    Field(discriminator="type"),
]
