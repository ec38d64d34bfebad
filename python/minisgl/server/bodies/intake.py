"""Bodies of requests as bytes: read within bounds, whatever is in them."""

import asyncio
import gc
import os
import re
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from mmap import mmap
from typing import Any, TypeVar, cast

from fastapi import Request

from minisgl.config.runtime import ServerConfig
from minisgl.errors import RequestError
from minisgl.server.bodies.fields import Reading
from minisgl.server.errors import shown

T = TypeVar("T")

MAX_BODY_BYTES = 64 * 2**20  # unless MINISGL_MAX_BODY_BYTES says otherwise
_WIDE = re.compile(b"[\xf0-\xf4]")  # begins such a character: with one, each of a text takes four bytes
MOST_PARSED = 6  # times as many bytes a long text may take while it is parsed
SMALL_BODY = 32 << 10  # bytes that are parsed sooner than a thread is told to
# What begins or separates values, also in texts, some of which are parsed too: an object of Python for each takes many
# times its bytes. So do characters that are escaped though they need not be.
MAX_VALUES = 2**21
_VALUES = (b",", b":", b"[", b"{", b"[", b"{", b"[", b"{", b"\\u00", b"\\ud", b"\\uD")

# What a body that cannot be read begins with.
_UNREADABLE = {
    b"\x1f\x8b": "is compressed with gzip",
    b"\x28\xb5\x2f\xfd": "is compressed with zstd",
    b"\xef\xbb\xbf": "begins with a byte order mark (BOM)",
    b"\xff\xfe": "is in UTF-16, with a byte order mark (BOM)",
    b"\xfe\xff": "is in UTF-16, with a byte order mark (BOM)",
    b"\0": "is in UTF-16 or UTF-32",
}


class Bodies:
    """Reads the bodies of requests, however large or hostile they are: at a bounded price in memory, and beside the
    event loop where it takes a while."""

    def __init__(self, config: ServerConfig, limit: int) -> None:
        self._strict, self._limit = config.strict_requests, limit
        self._most_wide = max(limit, MAX_BODY_BYTES) // 4
        self._aside = ThreadPoolExecutor(1, "minisgl-bodies")  # beside the event loop, one body after the other
        sys.setswitchinterval(0.001)  # seconds that the thread may keep the loop waiting, where that is up to Python

    async def read(self, request: Request, parse: Callable[[bytes, Reading], T]) -> T:
        """What `parse` makes of the body. Of what it ignores, whoever sends the answer tells the client.

        Raises: RequestError, also when the body is too long (413) or says that it is no JSON (415).
        """
        request.state.reading = reading = Reading(self._strict)
        declared, too_long = request.headers.get("content-length", "0"), f"the body is longer than {self._limit} bytes"
        if declared.isdigit() and int(declared) > self._limit:
            raise RequestError(too_long, status=413)
        check_content_type(request.headers.get("content-type"))
        encoding = request.headers.get("content-encoding", "").lower()
        if encoding not in ("", "identity"):
            raise _unreadable(f"is compressed (Content-Encoding: {encoding[:50]!r})")
        size, values, wide, data = 0, 0, False, bytearray()
        try:
            async for chunk in request.stream():
                size += len(chunk)
                if size > self._limit:
                    raise RequestError(too_long, status=413)
                wide = wide or b"\\ud" in chunk or b"\\uD" in chunk or _WIDE.search(chunk) is not None
                if wide and size > self._most_wide:
                    message = f"the body is longer than {self._most_wide} bytes, and has characters beyond U+FFFF"
                    raise RequestError(message, status=413)
                values += sum(map(chunk.count, _VALUES))
                if values <= MAX_VALUES:  # else nothing is kept; a client that may not send all sees no answer
                    data += chunk
            for beginning, what in _UNREADABLE.items():
                if data.startswith(beginning) or (beginning == b"\0" and b"\0" in data[:2]):
                    raise _unreadable(what)
            if values > MAX_VALUES:
                message = f"the body has more than {MAX_VALUES} values; what separates them counts, in texts too"
                raise RequestError(message, status=413)
            whole = cast(bytes, data)  # as good to whoever reads it, and not copied
            if size <= SMALL_BODY:
                return parse(whole, reading)
            mmap(-1, MOST_PARSED * size).close()  # the parser would end the process for a lack of memory
            return await asyncio.get_running_loop().run_in_executor(self._aside, uncollected, parse, whole, reading)
        except (MemoryError, OSError):
            raise RequestError("the server has not enough memory for this request", status=503) from None


def uncollected(make: Callable[..., T], *args: Any) -> T:
    """Python would look for garbage in a million new lists again and again, and everybody waits for that."""
    gc.disable()
    try:
        return make(*args)
    finally:
        gc.enable()


def check_content_type(value: str | None) -> None:
    """JSON must be said to be JSON: forms and texts are what any web page may send without asking."""
    media, _, parameters = (value or "").lower().partition(";")
    named = [parameter.strip().partition("=") for parameter in parameters.split(";")]
    charsets = [text.strip('"') for name, _, text in named if name == "charset"]
    if media.strip() != "application/json" or any(charset not in ("utf-8", "utf8") for charset in charsets):
        given = "has none" if value is None else f"is {value[:100]!r}"
        raise RequestError(f"Content-Type must be application/json in UTF-8; it {given}", status=415)


def _unreadable(what: str) -> RequestError:
    return RequestError(f"the body {what}; send plain JSON in UTF-8", status=415)


def check_model(model: str | None, config: ServerConfig) -> None:
    """Raises: RequestError (404) unless it is the model that is served, by one of its names."""
    path = config.engine.model_path
    names = (None, config.served_model_name, path, os.path.basename(path.rstrip("/")))
    if config.model_name_check and model not in names:
        message = f"the model {shown(model)!r} does not exist; this server has {config.served_model_name!r}"
        raise RequestError(message, param="model", code="model_not_found", status=404)
