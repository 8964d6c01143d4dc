"""Tests what the files for Docker name; nothing is built, as that downloads."""

import fnmatch
import importlib.metadata
import pathlib
import re

import pytest

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_FILES = sorted((_ROOT / 'scripts' / 'docker').glob('*.Dockerfile'))
_INSTRUCTIONS = {
  'FROM', 'RUN', 'COPY', 'USER', 'WORKDIR', 'ENTRYPOINT', 'CMD',
}  # fmt: skip


@pytest.mark.parametrize('file', _FILES, ids=lambda file: file.stem)
def test_a_file_installs_what_there_is(file):
  lines = [line for line in file.read_text().splitlines() if line[0] != '#']
  words = [line.partition(' ') for line in lines]
  assert {name for name, _, _ in words} <= _INSTRUCTIONS
  of = lambda name: [rest for one, _, rest in words if one == name]
  (base,) = of('FROM')
  version = re.fullmatch(r'python:(3\.\d+)-slim', base)[1]
  classifiers = importlib.metadata.metadata('mowe').get_all('Classifier')
  assert f'Programming Language :: Python :: {version}' in classifiers
  # The last commands are not those of root.
  assert of('USER') == ['user'] and 'useradd' in of('RUN')[0]
  install = of('RUN')[-1]
  constraints = re.search(r'--constraint /src/(\S+)', install)[1]
  assert (_ROOT / constraints).is_file()
  extras = re.search(r"'/src\[(.*)\]'", install)[1].split(',')
  known = importlib.metadata.metadata('mowe').get_all('Provides-Extra')
  assert set(extras) <= set(known)
  assert of('ENTRYPOINT') == ['["mowe"]']


def test_what_an_image_needs_is_sent_to_docker():
  ignored = (_ROOT / '.dockerignore').read_text().splitlines()
  # `**/` stands for any folder, and without it a pattern begins at the root.
  patterns = [pattern.removeprefix('**/') for pattern in ignored]
  anywhere = [pattern.startswith('**/') for pattern in ignored]
  needed = [_ROOT / 'setup.py', _ROOT / 'README.md']
  for folder in ('mowe', 'gin_configs', 'tasks', 'requirements'):
    needed += (_ROOT / folder).rglob('*.[gpth]*')
  assert len(needed) > 300
  for path in needed:
    parts = path.relative_to(_ROOT).parts
    if '__pycache__' in parts:
      continue
    for pattern, is_anywhere in zip(patterns, anywhere, strict=True):
      places = parts if is_anywhere else parts[:1]
      assert not fnmatch.filter(places, pattern), (path, pattern)
