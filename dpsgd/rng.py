"""Random bits that carry privacy: AES-256-CTR streams, addressed by purpose, step and position.

PyTorch's own generators are not used for privacy: the CPU one takes only 32 bits of its seed.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from typing import Any

import torch
from torch import Tensor

KEY_BYTES = 32
_AES_BLOCK = 16
_PIECE = 1 << 16
_ZEROS = memoryview(bytes(_PIECE))


def fresh_key() -> bytes:
    """Returns 32 random bytes from the operating system."""
    return secrets.token_bytes(KEY_BYTES)


def check_key(key: bytes) -> bytes:
    """Returns the key when it has 32 bytes.

    Raises:
        ValueError: If it has not. The message does not show the key.
    """
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        got = f"{len(key)} bytes" if isinstance(key, bytes) else type(key).__name__
        raise ValueError(f"Expected a key of {KEY_BYTES} bytes, got {got}.")
    return key


def derive(key: bytes, purpose: str, *numbers: int) -> bytes:
    """Returns a key of its own for a purpose and numbers such as the step (HMAC-SHA-256)."""
    message = purpose.encode() + b"\0" + b"".join(n.to_bytes(8, "big") for n in numbers)
    return hmac.new(check_key(key), message, hashlib.sha256).digest()


class Words:
    """A place in memory for parts of AES-256-CTR streams, one at a time, and used again.

    Args:
        count: The most words that are read at once.
        dtype: A type of 4 or 8 bytes that the words are read as, torch.int32 for example.
    """

    def __init__(self, count: int, dtype: torch.dtype) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        def encryptor(key: bytes, counter: bytes) -> Any:
            return Cipher(algorithms.AES(key), modes.CTR(counter)).encryptor()

        self._encryptor = encryptor
        self._dtype = dtype
        self._stream = memoryview(bytearray(count * dtype.itemsize + 2 * _AES_BLOCK))

    def read(self, key: bytes, start: int, count: int) -> Tensor:
        """Returns the words [start, start + count) of the key's stream, valid until the next call.

        Any part of the stream can be had without the rest.

        Args:
            key: 32 bytes, used for one stream only (see `derive`).
            start: First word.
            count: Number of words.
        """
        first, size = start * self._dtype.itemsize, count * self._dtype.itemsize
        block, skipped = divmod(first, _AES_BLOCK)
        encryptor = self._encryptor(check_key(key), block.to_bytes(_AES_BLOCK, "big"))
        for at in range(0, skipped + size, _PIECE):
            zeros = _ZEROS[: min(_PIECE, skipped + size - at)]
            encryptor.update_into(zeros, self._stream[at : at + len(zeros) + _AES_BLOCK])
        return torch.frombuffer(self._stream, dtype=self._dtype, count=count, offset=skipped)


def uniforms(key: bytes, start: int, count: int) -> Tensor:
    """Returns float64 numbers in (0, 1] from the 64-bit words [start, start + count)."""
    if count == 0:
        return torch.empty(0, dtype=torch.float64)
    words = Words(count, torch.uint64).read(key, start, count)
    return words.to(torch.float64).add_(0.5).mul_(2.0**-64)
