"""Every dependency has a range of versions, and the tested ones are in it."""

import importlib.metadata
import pathlib

import pytest
from packaging import requirements, utils

_ROOT = pathlib.Path(__file__).resolve().parent.parent


def _pinned(name):
  """The versions of a file, by the normalised names of packages."""
  lines = (_ROOT / 'requirements' / name).read_text().splitlines()
  found = {}
  for line in lines:
    if line and not line.startswith('#'):
      one = requirements.Requirement(line)
      (version,) = one.specifier
      assert version.operator == '==', line
      found.setdefault(utils.canonicalize_name(one.name), []).append(
        version.version
      )
  return found


@pytest.mark.parametrize('name', ['ci.txt', 'lowest.txt'])
def test_tested_versions_are_in_the_ranges(name):
  pinned = _pinned(name)
  for line in importlib.metadata.requires('mowe'):
    wanted = requirements.Requirement(line)
    if wanted.name == 'jax' and wanted.extras:
      # Of an accelerator, which CI does not have.
      continue
    for version in pinned[utils.canonicalize_name(wanted.name)]:
      assert version in wanted.specifier, (line, version)


def test_every_range_has_both_ends():
  for line in importlib.metadata.requires('mowe'):
    wanted = requirements.Requirement(line)
    if wanted.extras and wanted.name == 'jax':
      continue
    ends = {one.operator for one in wanted.specifier}
    assert ends == {'>=', '<'}, line
