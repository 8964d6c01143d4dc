"""Reads the rows of tables: CSV, TSV, Parquet, Arrow and Feather.

Parquet, Arrow and Feather need the package pyarrow.
"""

import csv
import hashlib
import importlib.util
import os
from collections.abc import Iterator
from typing import Any

from mowe.data.text import bad_records
from mowe.words import json_files

# What stands between the cells of a line.
SEPARATORS = {'.csv': ',', '.tsv': '\t'}
ARROW_ENDINGS = ('.parquet', '.arrow', '.feather')
# The bytes with which Arrow's files begin, but not its streams.
_ARROW_FILE = b'ARROW1'
_ROWS_AT_ONCE = 1024
# The module `csv` refuses longer cells; it takes no more than this.
_LONGEST_CELL = 2**31 - 1
_AGAIN = 'Save the data set again.'


def of_lines(
  path: str,
  lines: Iterator[str],
  separator: str,
  bad: bad_records.BadRecords,
) -> Iterator[tuple[int, dict[str, str]]]:
  """Yields the rows of a CSV or TSV file, each with the number of its last line.

  The first line has the names of the columns. A cell that holds a separator, a
  line break or quotes stands in double quotes, in which quotes are doubled.

  Args:
    path: the file, for messages.
    lines: its lines, with their line breaks.
    separator: what stands between cells.
    bad: takes the errors of rows that cannot be read.

  Raises:
    ValueError: the header has a name twice, or quotes are not closed.
    BadRecordError: a row has more or fewer cells than the header.
  """
  csv.field_size_limit(_LONGEST_CELL)
  reader = csv.reader(lines, delimiter=separator, strict=True)
  try:
    names = next(reader, [])
    if len(set(names)) < len(names):
      raise ValueError(
        'The first line of a table must give its columns different names, but '
        f'that of {path} is {names}. Write a header.'
      )
    for cells in reader:
      if not cells:
        continue
      if len(cells) != len(names):
        bad.take(
          bad_records.BadRecordError(
            f'Every row must have the {len(names)} columns of the header, but '
            f'{path}, line {reader.line_num}, has {len(cells)}. Put cells with '
            'separators or line breaks in double quotes.'
          )
        )
        continue
      yield reader.line_num, dict(zip(names, cells, strict=True))
  except csv.Error as error:
    raise ValueError(
      f'Quotes of a cell must be closed, and doubled inside of it, but {path}, '
      f'line {reader.line_num}, has an error: {error}. Correct the file.'
    ) from None


def of_arrow(path: str, sha256: str | None) -> Iterator[tuple[int, dict]]:
  """Yields the rows of a Parquet, Arrow or Feather file, numbered from 1 on.

  Args:
    path: the file.
    sha256: the digest that the file must have; None reads it as it is.

  Raises:
    ModuleNotFoundError: pyarrow is not installed.
    ValueError: the file is damaged, or has another digest.
  """
  if importlib.util.find_spec('pyarrow') is None:
    raise ModuleNotFoundError(
      f'Reading {path} needs the package pyarrow, which is not installed. '
      "Install it with: pip install 'mowe[parquet]'"
    )
  import pyarrow

  if sha256 is not None:
    with open(path, 'rb') as file:
      if hashlib.file_digest(file, 'sha256').hexdigest() != sha256:
        raise ValueError(
          f'A file must stay as it is while it is read, but {path} was changed. '
          'Run the command again when nothing writes to it.'
        )
  number = 0
  try:
    for batch in _batches(path):
      for row in batch.to_pylist():
        number += 1
        yield number, row
  except (pyarrow.ArrowException, EOFError, OSError, UnicodeError) as error:
    if isinstance(error, OSError) and error.errno is not None:
      raise
    raise ValueError(
      f'A table must be whole, and its texts UTF-8, but {path} breaks off after '
      f'row {number}: '
      f'{error}. Copy or download it again.'
    ) from None


def _batches(path: str) -> Iterator[Any]:
  """Yields the record batches of a file, without having all in memory."""
  import pyarrow
  from pyarrow import parquet

  if path.lower().endswith('.parquet'):
    with parquet.ParquetFile(path) as table:
      yield from table.iter_batches(_ROWS_AT_ONCE)
    return
  with pyarrow.memory_map(path) as source:
    is_file = source.read(len(_ARROW_FILE)) == _ARROW_FILE
    source.seek(0)
    if is_file:
      table = pyarrow.ipc.open_file(source)
      batches = map(table.get_batch, range(table.num_record_batches))
    else:
      batches = pyarrow.ipc.open_stream(source)
    for batch in batches:
      for start in range(0, batch.num_rows, _ROWS_AT_ONCE):
        yield batch.slice(start, _ROWS_AT_ONCE)


def files_of_dataset(folder: str) -> list[str]:
  """Returns the Arrow files of a data set that `datasets` saved to a folder.

  The library Hugging Face `datasets` writes such folders with `save_to_disk`.

  Args:
    folder: the folder of one split; 'state.json' in it names the files.

  Raises:
    ValueError: the folder is none of a data set, or one of several splits.
  """
  state = os.path.join(folder, 'state.json')
  splits = os.path.join(folder, 'dataset_dict.json')
  if os.path.isfile(splits):
    found = json_files.read_object(splits, _AGAIN).get('splits')
    raise ValueError(
      f'One split of a data set must be named, but {folder} has several: '
      f'{found}. Give the folder of one, such as '
      f'{os.path.join(folder, str((found or ["train"])[0]))}.'
    )
  if not os.path.isfile(state):
    raise ValueError(
      'What is read must be a file, or a folder that `datasets` saved, but '
      f'{folder} is a folder without state.json. Name the files in it, such as '
      f'{os.path.join(folder, "*.jsonl")}.'
    )
  return [
    os.path.join(folder, one['filename'])
    for one in json_files.read_object(state, _AGAIN).get('_data_files', [])
  ]
