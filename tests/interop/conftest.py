"""Golden checkpoints of t5x, unpacked."""

import dataclasses
import pathlib
import zipfile

import pytest


@dataclasses.dataclass(frozen=True)
class T5xGolden:
  """Unpacks checkpoints that the real t5x wrote.

  Call: 'legacy' or 'orbax' to a new copy of the folder of the run.
  """

  folder: pathlib.Path
  place: pathlib.Path

  def __call__(self, name: str) -> pathlib.Path:
    out = self.place / name
    if not out.exists():
      with zipfile.ZipFile(self.folder / f'{name}.zip') as packed:
        packed.extractall(out)
    return out


@pytest.fixture
def t5x_golden(golden_dir, tmp_path_factory) -> T5xGolden:
  return T5xGolden(golden_dir / 't5x', tmp_path_factory.mktemp('t5x'))
