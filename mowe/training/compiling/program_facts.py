"""What a compiled program needs and does, read from the program itself."""

import collections
import re
from collections.abc import Collection
from typing import NamedTuple

import jax
import numpy as np

# What XLA calls the exchanges between devices. An asynchronous one begins with
# an instruction whose name ends with `-start`, and has its results from one whose
# name ends with `-done`; only the latter is counted.
_KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
)
_COLLECTIVE = re.compile(
  r'^\s*(?:ROOT )?%?\S+ = (?P<shapes>.*?) '
  rf'(?P<kind>{"|".join(_KINDS)})(?:-done)?\('
)
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\]')
_CHANNEL = re.compile(r'channel_id=(\d+)')
_INSTRUCTION = re.compile(
  r'^\s*(?:ROOT )?%?\S+ = \w+\[([\d,]+)\]\S* ([\w-]+)\('
)
# Instructions that give an array of the size of a table but copy nothing. A
# fusion may be a scatter; if it is a copy, temporary memory tells it.
_NO_COPY = {'parameter', 'scatter', 'bitcast', 'get-tuple-element', 'fusion'}
_BITS = {'pred': 8, 'bf16': 16}


class Memory(NamedTuple):
  """Bytes that a program needs on each device.

  Attributes:
    arguments: what it is given: parameters, state of the optimizer, the batch.
    results: those results that are not written in place of an argument.
    temporary: what it needs only while it runs.
    program: its code.
  """

  arguments: int
  results: int
  temporary: int
  program: int

  @property
  def peak(self) -> int:
    """All of it together."""
    return sum(self)


class Collectives(NamedTuple):
  """All exchanges between devices of one kind.

  Attributes:
    number: how many there are. One in a loop counts once.
    result_bytes: the bytes of what each device has afterwards, in all.
  """

  number: int
  result_bytes: int


def memory(program: jax.stages.Compiled) -> Memory:
  """Returns the memory that a program needs on each device."""
  found = program.memory_analysis()
  return Memory(
    arguments=found.argument_size_in_bytes,
    results=max(0, found.output_size_in_bytes - found.alias_size_in_bytes),
    temporary=found.temp_size_in_bytes,
    program=found.generated_code_size_in_bytes,
  )


def collectives(text: str) -> dict[str, Collectives]:
  """Returns the exchanges between devices, by their kind.

  Args:
    text: the text of a compiled program.
  """
  numbers, sizes = collections.Counter(), collections.Counter()
  seen = set()
  for line in text.splitlines():
    found = _COLLECTIVE.match(line)
    if found is None:
      continue
    kind = found['kind']
    # XLA for TPU writes one exchange several times, where it is overlapped with
    # steps of a computation.
    channel = _CHANNEL.search(line)
    if channel is not None:
      if (kind, channel[1]) in seen:
        continue
      seen.add((kind, channel[1]))
    numbers[kind] += 1
    sizes[kind] += sum(
      _num_bytes(*one) for one in _ARRAY.findall(found['shapes'])
    )
  return {k: Collectives(numbers[k], sizes[k]) for k in sorted(numbers)}


def table_copies(text: str, table_sizes: Collection[int]) -> list[str]:
  """Returns the instructions that make an array as large as a table.

  Args:
    text: the text of a compiled program.
    table_sizes: how many numbers the tables have on one device.
  """
  copies = []
  for line in text.splitlines():
    found = _INSTRUCTION.match(line)
    if found is None or found[2] in _NO_COPY:
      continue
    # A view has another shape than its table, but as many numbers.
    if np.prod([int(size) for size in found[1].split(',')]) in table_sizes:
      copies.append(line.strip())
  return copies


def flops_and_bytes(
  program: jax.stages.Compiled,
) -> tuple[float | None, float | None]:
  """Returns FLOPs, and bytes read and written, as XLA counts them.

  What is in a loop counts once. They are those of one device; None where XLA
  does not count for the platform, as on GPU.
  """
  counted = program.cost_analysis() or {}
  return counted.get('flops'), counted.get('bytes accessed')


def _num_bytes(dtype: str, shape: str) -> int:
  digits = re.search(r'\d+', dtype)
  bits = _BITS.get(dtype) or int(digits[0] if digits else 0)
  number = np.prod([int(size) for size in shape.split(',') if size])
  return int(number) * bits // 8
