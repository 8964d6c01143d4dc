"""Keeps what the data of an output were made of, so that nothing else is mixed in.

A command that is given again finds what it made before. If it is given other
files or options then, it may begin anew as long as nothing was trained; later
the model would be one of both.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from mowe.training import checkpointing
from mowe.words import atomic_files, json_files

_FILE = 'made_of.json'


def has_begun(folder: pathlib.Path) -> bool:
  """Whether a model folder has a checkpoint."""
  if not folder.is_dir():
    return False
  with checkpointing.Checkpoints(folder) as checkpoints:
    return checkpoints.latest_step() is not None


def is_same(folder: pathlib.Path, described: Mapping[str, Any]) -> bool:
  """Compares what an output is made of with what it was made of, and keeps it.

  Args:
    folder: the model folder; its folder `data` keeps the description.
    described: the files and options, as JSON values.

  Returns:
    Whether all is as before; if not, what is there must be made anew.

  Raises:
    ValueError: it is not, and the folder has a checkpoint. Nothing has changed.
  """
  path = folder / 'data' / _FILE
  now = json.loads(json.dumps(described))
  old = None
  if path.exists():
    old = json_files.read_object(path, 'Remove it, or give another --output.')
  if old == now:
    return True
  if has_begun(folder):
    names = [
      name
      for name in sorted({*now, *(old or {})})
      if (old or {}).get(name) != now.get(name)
    ]
    raise ValueError(
      f'The files and options of an output must stay as they were, but {folder} '
      f'has a checkpoint and differs in {", ".join(names)}. Restore them, or '
      'give another --output.'
    )
  content = json.dumps(now, indent=2) + '\n'
  atomic_files.write_atomically(path, content.encode())
  return False
