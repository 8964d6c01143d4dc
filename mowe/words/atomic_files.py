"""Writes files that exist complete or not at all."""

import os
import pathlib
import tempfile


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
  """Writes a file, which exists complete or not at all."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  descriptor, partial = tempfile.mkstemp(dir=path.parent, prefix=path.name)
  try:
    with os.fdopen(descriptor, 'wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    # mkstemp gives the mode 0600, but other users of a shared folder must be
    # able to read the file.
    umask = os.umask(0)
    os.umask(umask)
    os.chmod(partial, 0o666 & ~umask)
    os.replace(partial, path)
  except BaseException:
    os.unlink(partial)
    raise
