"""fsspec's file system for S3, which also asks again when a server answered that it is not able to for the moment.

botocore asks five times, within some seconds; s3fs does all that five times, but only for some errors. With this one among them
half a minute without service is outlasted, wherever an `s3://` address is opened. An address where nobody listens is still told
after some seconds.
"""

from __future__ import annotations

from botocore.exceptions import ClientError
from s3fs import S3FileSystem
from s3fs.core import set_custom_error_handler

__all__ = ["S3FileSystem"]

# Answers of a server, or of one before it, that has no fault to find with the request.
PASSING = (500, 502, 503, 504)


def passes(error: Exception) -> bool:
    """Whether the same request may be answered well a little later."""
    return isinstance(error, ClientError) and error.response.get("ResponseMetadata", {}).get("HTTPStatusCode") in PASSING


set_custom_error_handler(passes)
