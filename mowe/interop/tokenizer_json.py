"""Reads the vocabulary of a tokenizer.json as a SentencePiece model.

Folders that transformers 5 saves have no spiece.model: their tokenizer.json has
the pieces of a Unigram model with their scores, and the table by which
SentencePiece normalises text. Written as the file that they once came from,
they serve like any other.

Source: sentencepiece_model.proto of SentencePiece, the encoding of
https://protobuf.dev/programming-guides/encoding/, and tokenizer.json files of
the package tokenizers.
"""

import base64
import binascii
import math
import os
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from mowe.words import base_vocabulary, json_files

# ModelProto.SentencePiece.Type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM = 1
_SENTINEL = '<extra_id_'
_ADVICE = 'Copy the file again from where it was whole.'


def sentencepiece_model(path: str | os.PathLike) -> bytes:
  """Returns what a spiece.model with the same pieces would hold.

  Sentinels at the end of the pieces are left out, as in the files of T5: they
  are added when the model is read. Tokens that were added to the tokenizer later
  are not pieces, and are left out as well; see `with_added_tokens`.

  Args:
    path: the tokenizer.json.

  Raises:
    ValueError: the file is damaged, or its tokenizer is of another kind than
      those of T5.
  """
  content = json_files.read_object(path, _ADVICE)
  model = content.get('model')
  kind = model.get('type') if isinstance(model, Mapping) else None
  if kind != 'Unigram':
    raise ValueError(
      f'The model of {os.fspath(path)} must be Unigram, as those of T5 are, but '
      f'is {kind!r}. Give another subword vocabulary with --vocabulary.'
    )
  pieces = _pieces(path, model, content.get('added_tokens'))
  trainer = (
    _number(3, _UNIGRAM)
    + _number(35, bool(model.get('byte_fallback')))
    + _number(40, base_vocabulary.UNK_ID)
    + _number(41, -1)
    + _number(42, base_vocabulary.EOS_ID)
    + _number(43, base_vocabulary.PAD_ID)
    + _text(48, pieces[base_vocabulary.PAD_ID][0])
    + _text(45, pieces[base_vocabulary.UNK_ID][0])
    + _text(47, pieces[base_vocabulary.EOS_ID][0])
  )
  messages = [_piece_message(*piece) for piece in pieces]
  normalizer = _normalizer(path, content)
  return b''.join([*messages, _sized(2, trainer), _sized(3, normalizer)])


def with_added_tokens(
  model: bytes, extra_ids: int, added: Sequence[str]
) -> bytes:
  """Returns a spiece.model in which sentinels and added tokens are pieces.

  Their ids follow those of the pieces, as in transformers: the sentinels, the
  first of them last, and then the tokens that somebody added. No text is read as
  a sentinel.

  Args:
    model: the spiece.model.
    extra_ids: number of sentinels.
    added: the texts of the tokens.
  """
  sentinels = [f'{_SENTINEL}{i}>' for i in reversed(range(extra_ids))]
  kinds = dict.fromkeys(sentinels, _CONTROL) | dict.fromkeys(
    added, _USER_DEFINED
  )
  # Two messages one behind the other are one, with the pieces of both.
  return model + b''.join(
    _piece_message(text, 0.0, kind) for text, kind in kinds.items()
  )


def _piece_message(text: str, score: float, kind: int) -> bytes:
  return _sized(1, _text(1, text) + _float(2, score) + _number(3, kind))


def _pieces(
  path: str | os.PathLike, model: Mapping[str, Any], added: Any
) -> list[tuple[str, float, int]]:
  """The text, the score and the kind of each piece."""
  vocab = model.get('vocab')
  if not isinstance(vocab, list) or not all(map(_is_piece, vocab)):
    raise ValueError(
      f'The vocab of {os.fspath(path)} must be a list of pieces with their '
      f'scores, such as ["a", -3.5], but is not. {_ADVICE}'
    )
  texts = [text for text, _ in vocab]
  while texts and texts[-1].startswith(_SENTINEL):
    texts.pop()
  first = {base_vocabulary.PAD_ID, base_vocabulary.EOS_ID}
  if (
    len(texts) <= base_vocabulary.UNK_ID
    or model.get('unk_id') != base_vocabulary.UNK_ID
  ):
    raise ValueError(
      f'The pieces of {os.fspath(path)} must begin with those for padding, EOS '
      f'and unknown, but there are {len(texts)}, and unk_id is '
      f'{model.get("unk_id")}. Only tokenizers like those of T5 can be read.'
    )
  is_bytes = bool(model.get('byte_fallback'))
  named = {
    token.get('content')
    for token in (added if isinstance(added, list) else [])
    if isinstance(token, Mapping)
  }

  def kind(i, text):
    if i == base_vocabulary.UNK_ID:
      return _UNKNOWN
    if i in first or text.startswith(_SENTINEL):
      return _CONTROL
    if is_bytes and len(text) == 6 and text.startswith('<0x'):
      return _BYTE
    return _USER_DEFINED if text in named else _NORMAL

  return [
    (text, float(vocab[i][1]), kind(i, text)) for i, text in enumerate(texts)
  ]


def _is_piece(entry: Any) -> bool:
  return (
    isinstance(entry, list)
    and len(entry) == 2
    and isinstance(entry[0], str)
    and type(entry[1]) in (int, float)
    and math.isfinite(entry[1])
  )


def _normalizer(path: str | os.PathLike, content: Mapping[str, Any]) -> bytes:
  """The message that says how a text is normalised before it is cut."""
  steps = _steps(content.get('normalizer'), 'normalizers')
  table = b''
  for step in steps:
    if step.get('type') == 'Precompiled':
      try:
        table = base64.b64decode(step['precompiled_charsmap'], validate=True)
      except (KeyError, TypeError, ValueError, binascii.Error) as error:
        raise ValueError(
          f'precompiled_charsmap of {os.fspath(path)} must be a table in '
          f'base64, but cannot be read ({error}). {_ADVICE}'
        ) from error
    elif not _cuts_spaces(step):
      raise _other(path, 'normalizer', step)
  cuts = _steps(content.get('pre_tokenizer'), 'pretokenizers')
  is_cut = is_marked = False
  for step in cuts:
    if step.get('type') == 'WhitespaceSplit':
      is_cut = True
    elif (
      step.get('type') == 'Metaspace' and step.get('replacement') == '\u2581'
    ):
      never = step.get('prepend_scheme') == 'never'
      is_marked = not (never or step.get('add_prefix_space') is False)
    else:
      raise _other(path, 'pre_tokenizer', step)
  is_cut = is_cut or any(map(_cuts_spaces, steps))
  return (
    _sized(2, table)
    + _number(3, is_marked)
    + _number(4, is_cut)
    + _number(5, True)
  )


def _steps(value: Any, name: str) -> list[Mapping[str, Any]]:
  """The steps of a sequence, or the one step that there is."""
  if not isinstance(value, Mapping):
    return []
  if value.get('type') != 'Sequence':
    return [value]
  return [one for one in value.get(name) or [] if isinstance(one, Mapping)]


def _cuts_spaces(step: Mapping[str, Any]) -> bool:
  """Whether a step of normalising makes one space of several."""
  return step.get('type') == 'Replace' and step.get('pattern') == {
    'Regex': ' {2,}'
  }


def _other(path, name, step) -> ValueError:
  return ValueError(
    f'The {name} of {os.fspath(path)} must be of the kinds that T5 has, but has '
    f'{step.get("type")!r}, which a SentencePiece model cannot hold as it is. '
    'Give another subword vocabulary with --vocabulary.'
  )


def _varint(value: int) -> bytes:
  """A number in parts of seven bits; negative ones as if they had 64 bits."""
  value &= 2**64 - 1
  parts = bytearray()
  while value > 127:
    parts.append(value & 127 | 128)
    value >>= 7
  return bytes([*parts, value])


def _number(field: int, value: int) -> bytes:
  return _varint(field << 3) + _varint(int(value))


def _float(field: int, value: float) -> bytes:
  return _varint(field << 3 | 5) + struct.pack('<f', value)


def _sized(field: int, value: bytes) -> bytes:
  return _varint(field << 3 | 2) + _varint(len(value)) + value


def _text(field: int, value: str) -> bytes:
  return _sized(field, value.encode('utf-8', 'replace'))
