"""The bytes of UTF-8 as a vocabulary, as in ByT5."""

import hashlib
from collections.abc import Sequence

import numpy as np

from mowe.words import base_vocabulary

# The bytes from this one on stand in no text in UTF-8.
_FIRST_UNUSED = 0xF5


class ByteVocabulary(base_vocabulary.Vocabulary):
  """The 256 bytes of UTF-8 as ids 3..258, then sentinels, as in ByT5.

  A space is a word of its own, and the byte after it starts a word. Bytes from
  128 on count as letters, since one byte does not tell which character it is
  in. Without added sentinels, the ids of bytes that no text has are sentinels,
  258 first, as in ByT5.

  Attributes:
    size: number of ids, 259 and the sentinels.
    extra_ids: number of sentinels.
    sha256: hex digest of a description of the ids, since there is no file.
  """

  def __init__(self, extra_ids: int = 100):
    self.extra_ids = extra_ids
    self.size = 256 + base_vocabulary.BYTE_OFFSET + extra_ids
    description = (
      f'mowe bytes: pad 0, eos 1, unk 2, byte + 3, {extra_ids} extra'
    )
    self.sha256 = hashlib.sha256(description.encode()).hexdigest()

  @property
  def sentinels(self) -> range:
    """See `Vocabulary.sentinels`."""
    if self.extra_ids:
      return super().sentinels
    last = base_vocabulary.BYTE_OFFSET + 255
    return range(last, base_vocabulary.BYTE_OFFSET + _FIRST_UNUSED - 1, -1)

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    return [
      byte + base_vocabulary.BYTE_OFFSET
      for byte in text.encode('utf-8', 'replace')
    ]

  def encode_with_offsets(
    self, text: str
  ) -> tuple[list[int], list[int], list[int]]:
    """Returns the ids of a text, and the character that each is a byte of.

    Id i is a byte of the character `text[starts[i]:ends[i]]`.
    """
    starts = [
      index
      for index, char in enumerate(text)
      for _ in char.encode('utf-8', 'replace')
    ]
    return self.encode(text), starts, [start + 1 for start in starts]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text up to EOS, without padding, sentinels by name."""
    return ''.join(
      run if isinstance(run, str) else self.spell(run)
      for run in self._runs(ids)
    )

  def piece(self, i: int) -> str:
    """Returns the written form of one id."""
    if i in self.sentinels:
      return f'<extra_id_{self.sentinels.index(i)}>'
    if i < base_vocabulary.BYTE_OFFSET:
      return ('<pad>', '</s>', '<unk>')[i]
    byte = i - base_vocabulary.BYTE_OFFSET
    return chr(byte) if 32 < byte < 127 else f'<0x{byte:02X}>'

  def spell(self, ids: Sequence[int]) -> str:
    """Returns the text of the bytes of a word, without broken characters."""
    kept = bytes(
      i - base_vocabulary.BYTE_OFFSET
      for i in ids
      if i >= base_vocabulary.BYTE_OFFSET
    )
    return kept.decode('utf-8', 'ignore')

  def piece_kinds(self) -> np.ndarray:
    """Returns the kind of each id, <uint8>[size]; no id is STARTS."""
    kinds = np.full(self.size, base_vocabulary.SPECIAL, np.uint8)
    kinds[base_vocabulary.UNK_ID] = base_vocabulary.ALONE
    for byte in range(256):
      kinds[byte + base_vocabulary.BYTE_OFFSET] = base_vocabulary.byte_kind(
        byte
      )
    kinds[self.sentinels] = base_vocabulary.SPECIAL
    return kinds
