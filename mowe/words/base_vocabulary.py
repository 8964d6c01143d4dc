"""The base of all subword vocabularies: ids, sentinels, kinds of pieces."""

from collections.abc import Iterator, Sequence

# The kinds of pieces. A word is a STARTS or CONTINUES piece and the CONTINUES
# pieces after it. ALONE and SPECIAL pieces are words of their own, so that a
# CONTINUES piece after one of them starts a word.
CONTINUES, STARTS, ALONE, SPECIAL = range(4)

# The ids of padding, end of sequence, and what is unknown, as in T5.
PAD_ID, EOS_ID, UNK_ID = range(3)

# How many sentinels a vocabulary gets that has none of its own, as in T5.
NUM_SENTINELS = 100

# The id of byte 0 in a vocabulary of bytes, as in ByT5.
BYTE_OFFSET = 3


class Vocabulary:
  """Base of all subword vocabularies.

  Attributes:
    size: number of ids, sentinels included.
    extra_ids: number of sentinels that were added as the last ids.
    sha256: hex digest of the file or the description of the vocabulary.
  """

  pad_id, eos_id, unk_id = PAD_ID, EOS_ID, UNK_ID
  size: int
  extra_ids: int
  sha256: str

  @property
  def sentinels(self) -> range:
    """The ids of `<extra_id_0>`, `<extra_id_1>`, and so on.

    They fall from the last id, as in T5. A vocabulary to which none are added
    may have some of its own.
    """
    return range(self.size - 1, self.size - 1 - self.extra_ids, -1)

  def sentinel_id(self, index: int) -> int:
    """Returns the id of `<extra_id_{index}>`."""
    if not 0 <= index < len(self.sentinels):
      raise ValueError(
        f'A sentinel index must be in 0..{len(self.sentinels) - 1}, but is '
        f'{index}. Load the subwords with more extra_ids, or mask fewer spans.'
      )
    return self.sentinels[index]

  def encode(self, text: str) -> list[int]:
    """Returns the ids of a text, without EOS."""
    raise NotImplementedError

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text, without EOS."""
    return [self.encode(text) for text in texts]

  def encode_after_space(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids that each text has where it stands after a space.

    They are those of the texts alone, unless a vocabulary marks the beginning
    of a text in another way than that of a word.
    """
    return self.encode_batch(texts)

  def _runs(self, ids: Sequence[int]) -> Iterator[list[int] | str]:
    """Yields runs of text ids and the names of the sentinels between them."""
    sentinels = self.sentinels
    run: list[int] = []
    for i in ids:
      i = int(i)
      if i == EOS_ID:
        break
      if i == PAD_ID:
        continue
      if i in sentinels:
        yield run
        yield f'<extra_id_{sentinels.index(i)}>'
        run = []
      elif 0 <= i < self.size - self.extra_ids:
        run.append(i)
    yield run


def byte_kind(byte: int) -> int:
  """Returns the kind of a piece that is one byte of UTF-8."""
  return CONTINUES if byte >= 128 or chr(byte).isalnum() else ALONE
