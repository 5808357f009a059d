"""Decompression that stops at a limit, whatever the sender promised."""

from __future__ import annotations

import zlib


class TooLarge(Exception):
    """More bytes than the limit."""


class NotDecodable(Exception):
    """A content coding that nobody offered, or data that is not what it says."""


class Body:
    """Collects one body of at most ``limit`` bytes after decompression.

    Codings (RFC 9110 8.4.1): identity, gzip and deflate, one of them; a chain is how bombs are nested.
    """

    def __init__(self, coding: str, limit: int) -> None:
        self._coding = coding.strip().lower()
        self._limit = limit
        self._inflater: zlib._Decompress | None = None
        if self._coding not in ("", "identity", "gzip", "x-gzip", "deflate"):
            raise NotDecodable(f"it is encoded as {coding[:100]!r}, which was not asked for")
        self._plain = self._coding in ("", "identity")
        self.data = bytearray()

    def feed(self, chunk: bytes) -> None:
        """Take more raw bytes. Raises TooLarge, NotDecodable."""
        if self._plain:
            self._keep(chunk)
            return
        while chunk:
            if self._inflater is None:
                self._inflater = self._start(chunk)
            try:
                # One byte more than may be kept, so that too much is noticed and never held.
                self._keep(self._inflater.decompress(chunk, self._limit - len(self.data) + 1))
            except zlib.error as error:
                raise NotDecodable(f"it is not {self._coding} data: {error}") from error
            if not self._inflater.eof:
                chunk = self._inflater.unconsumed_tail
                continue
            chunk = self._inflater.unused_data
            if not chunk.startswith(b"\x1f\x8b"):  # only gzip has further members; padding is ignored
                return
            self._inflater = None

    def finish(self) -> bytes:
        """The whole body. Raises NotDecodable if the compressed data ended too early."""
        if self._inflater is not None and not self._inflater.eof:
            raise NotDecodable(f"its {self._coding} data is cut short")
        return bytes(self.data)

    def _start(self, chunk: bytes) -> zlib._Decompress:
        if self._coding != "deflate":
            return zlib.decompressobj(zlib.MAX_WBITS | 16)
        # "deflate" means zlib's format, but some send the bare stream: a zlib header is divisible by 31.
        wrapped = chunk[0] & 0x0F == 8 and (len(chunk) < 2 or int.from_bytes(chunk[:2], "big") % 31 == 0)
        return zlib.decompressobj(zlib.MAX_WBITS if wrapped else -zlib.MAX_WBITS)

    def _keep(self, data: bytes) -> None:
        if len(self.data) + len(data) > self._limit:
            self.data += data[: self._limit - len(self.data)]
            raise TooLarge
        self.data += data
