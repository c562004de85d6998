# SPDX-License-Identifier: Apache-2.0
"""Parts of a file, on a disk or in a bucket, without fetching the whole."""

import io
from typing import IO, Any

from dcae_jax.files import buckets

AHEAD = 2**23  # bytes that `opened` reads of an object by one request


def read_part(path: str, first: int, size: int) -> bytes:
    """`size` bytes of a file from byte `first` on; fewer at its end. Raises OSError."""
    if buckets.is_url(path):
        return buckets.read_range(path, first, size)
    with open(path, "rb") as file:
        file.seek(first)
        return file.read(size)


def opened(path: str, size: int) -> IO[bytes]:
    """A file to be read in order. size: its bytes."""
    if buckets.is_url(path):
        return io.BufferedReader(Reader(path, size), AHEAD)
    return open(path, "rb")


class Reader(io.RawIOBase):
    """An object of `size` bytes as a file. Each `read` is one request, and returns all it asks."""

    def __init__(self, url: str, size: int):
        super().__init__()
        self._url, self._size, self._place = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + (0, self._place, self._size)[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._place))
        data = buckets.read_range(self._url, self._place, size)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)

    def readall(self) -> bytes:
        return self.read(max(0, self._size - self._place)) or b""
