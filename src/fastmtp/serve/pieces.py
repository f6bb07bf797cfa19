"""The bytes that each token stands for, whole characters or not."""

from __future__ import annotations

import re

from fastmtp.models.tokenizer import Tokenizer

_FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write for bytes: GPT-2's table."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class Pieces:
    """Reads a tokenizer's words; those with `<0x0A>` among them write a space as `▁`, others are byte-level."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._added = {token: entry.content for token, entry in tokenizer.added_tokens_decoder.items()}
        self._words = {token: word for word, token in tokenizer.get_vocab().items()}
        falls_back = any(map(_FALLBACK.fullmatch, self._words.values()))
        self._alphabet = None if falls_back else _byte_alphabet()

    def bytes_of(self, token: int) -> bytes:
        """Of an id that has no word, which a model may have beyond its tokenizer's, nothing."""
        if token in self._added:
            return self._added[token].encode()
        word = self._words.get(token, "")
        if self._alphabet is not None:
            return bytes(self._alphabet[character] for character in word)
        if found := _FALLBACK.fullmatch(word):
            return bytes([int(found[1], 16)])
        return word.replace("▁", " ").encode()

    def name_of(self, token: int) -> str:
        r"""A token's text, or its bytes as in OpenAI's `bytes:\xe6\x9d`, or its id: no two have the same name."""
        piece = self.bytes_of(token)
        if not piece:
            return f"token_id:{token}"
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
