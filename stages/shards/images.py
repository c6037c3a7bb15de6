"""How images are stored, and what is said of each: what every stage that writes image shards has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from stages.runner.contract import NodeConfig

# What is known of a row afterwards; sizes are pixels, `sha256` is that of the bytes as they came.
RESULT = pa.schema(
    [
        ("status", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
    ]
)
MEASURED = tuple(name for name in RESULT.names if name != "status")


class ImageConfig(NodeConfig):
    """LAION's own settings by default."""

    image_size: int = Field(512, ge=16, description="side that images are resized to, in pixels")
    resize_mode: Literal["no", "keep_ratio", "keep_ratio_largest", "center_crop", "border"] = Field(
        "keep_ratio", description="keep_ratio: the shorter side becomes image_size"
    )
    resize_only_if_bigger: bool = Field(True, description="never enlarge")
    skip_reencode: bool = Field(True, description="keep the bytes as they came where nothing changes the image")
    encode_format: Literal["jpg", "png", "webp"] = Field("jpg", description="of images that are written anew")
    encode_quality: int = Field(95, ge=0, le=100, description="0 to 100; for png the compression level, 0 to 9")
    min_image_size: int = Field(0, ge=0, description="pixels of the shorter side as it came")
    max_pixels: int = Field(
        100_000_000,
        ge=1,
        le=178_956_970,
        description="width x height as it came and as stored, judged before decoding; at most Pillow's limit",
    )
    max_bytes: int = Field(50_000_000, ge=1, description="of one file")

    @model_validator(mode="after")
    def _png_quality(self) -> ImageConfig:
        if self.encode_format == "png" and self.encode_quality > 9:
            raise ValueError("encode_quality is the compression level for png; expected 0 to 9")
        return self


@dataclass(frozen=True)
class Outcome:
    """What became of one row. `reason` is empty for a success.

    Sizes are pixels: `width` and `height` of the stored image, `original_width` and `original_height` as it came. `sha256` and
    `md5` (only where it was asked for) are those of the bytes as they came; `hash_matches` says whether they have the digest that
    the metadata lists, None where it lists none. `offset` and `length` say where in the writer's spool the stored bytes lie.
    """

    reason: str
    width: int | None = None
    height: int | None = None
    original_width: int | None = None
    original_height: int | None = None
    sha256: str | None = None
    md5: str | None = None
    hash_matches: bool | None = None
    offset: int = 0
    length: int = 0

    def measured(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in MEASURED}
