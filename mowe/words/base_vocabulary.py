"""What all kinds of vocabulary share: ids, sentinels and kinds of pieces."""

from collections.abc import Iterator, Sequence

# What a piece says about words. A word is a STARTS or CONTINUES piece and the
# CONTINUES pieces after it; ALONE and SPECIAL pieces are words of their own,
# so a CONTINUES piece after one of them starts a word.
CONTINUES, STARTS, ALONE, SPECIAL = range(4)


PAD_ID, EOS_ID, UNK_ID = range(3)


BYTE_OFFSET = 3


class Vocabulary:
  """What all kinds of vocabulary share: sentinels and batches."""

  pad_id, eos_id, unk_id = PAD_ID, EOS_ID, UNK_ID
  size: int
  extra_ids: int

  def sentinel_id(self, index: int) -> int:
    """Returns the id of `<extra_id_{index}>`: size - 1 - index, as in T5."""
    if not 0 <= index < self.extra_ids:
      raise ValueError(
        f'A sentinel index must be in 0..{self.extra_ids - 1}, but is {index}. '
        'Load the subwords with more extra_ids, or mask fewer spans.'
      )
    return self.size - 1 - index

  def encode(self, text: str) -> list[int]:
    raise NotImplementedError

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the ids of each text."""
    return [self.encode(text) for text in texts]

  def _runs(self, ids: Sequence[int]) -> Iterator[list[int] | str]:
    """Yields runs of text ids and the names of the sentinels between them."""
    first_sentinel = self.size - self.extra_ids
    run: list[int] = []
    for i in ids:
      i = int(i)
      if i == EOS_ID:
        break
      if i == PAD_ID:
        continue
      if first_sentinel <= i < self.size:
        yield run
        yield f'<extra_id_{self.size - 1 - i}>'
        run = []
      elif 0 <= i < first_sentinel:
        run.append(i)
    yield run


def byte_kind(byte: int) -> int:
  return CONTINUES if byte >= 128 or chr(byte).isalnum() else ALONE
