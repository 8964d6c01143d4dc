"""Finds the symbols that the author of a SentencePiece model has defined.

The library tells which pieces are control symbols, bytes or unused, but not
which are user-defined. The file says it, as a message of protocol buffers. The
classes that sentencepiece ships for it work with one major version of protobuf
alone, so that the few fields that count are read here.

Source: sentencepiece_model.proto of SentencePiece, and
https://protobuf.dev/programming-guides/encoding/.
"""

from collections.abc import Iterator

# ModelProto.pieces, ModelProto.SentencePiece.type, and its USER_DEFINED.
_PIECES, _TYPE, _USER_DEFINED = 1, 3, 4
# Kinds of fields: a number, a message or text with its size, and the bytes of
# those that have a fixed size.
_NUMBER, _SIZED, _FIXED = 0, 2, {1: 8, 5: 4}


def find(model: bytes) -> frozenset[int]:
  """Returns the ids of the symbols in a serialized model, which is whole."""
  pieces = (value for number, value in _fields(model) if number == _PIECES)
  return frozenset(
    i
    for i, piece in enumerate(pieces)
    if (_TYPE, _USER_DEFINED) in _fields(piece)
  )


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
  """Yields the number of each field of a message with its value."""
  place = 0
  while place < len(message):
    tag, place = _number(message, place)
    kind = tag & 7
    if kind == _NUMBER:
      value, place = _number(message, place)
    else:
      if kind == _SIZED:
        size, place = _number(message, place)
      else:
        size = _FIXED[kind]
      value = message[place : place + size]
      place += size
    yield tag >> 3, value


def _number(message: bytes, place: int) -> tuple[int, int]:
  """Returns a number of seven bits in each byte, and the place after it."""
  value = shift = 0
  while True:
    byte = message[place]
    value |= (byte & 127) << shift
    place, shift = place + 1, shift + 7
    if byte < 128:
      return value, place
