"""Tests that settings which an include takes back are told."""

import pytest

from mowe.commands.gin_files import gin_order

_RUN = """
STEPS = 128
RATE = 0.5
LAYER = @module.Layer
module.Layer.width = 7
"""


@pytest.fixture
def told(tmp_path):
  """Returns what is told of a file that includes another one in its middle."""
  (tmp_path / 'run.gin').write_text(_RUN)
  (tmp_path / 'outer.gin').write_text("include 'run.gin'\nOTHER = 1\n")

  def tell(above, below='', included='run.gin'):
    path = tmp_path / 'mine.gin'
    path.write_text(f"{above}\ninclude '{included}'\n{below}\n")
    return gin_order.taken_back([str(path)], [str(tmp_path)])

  return tell


def test_a_setting_above_an_include_is_told(told, tmp_path):
  (sentence,) = told('STEPS = 8')
  assert sentence.startswith(f'{tmp_path}/mine.gin:1: STEPS = 8 has no effect')
  assert 'run.gin, which is included below it in line 2' in sentence
  assert sentence.endswith('sets it to 128. Put it below the include.')


@pytest.mark.parametrize(
  ('above', 'shown'),
  [
    ('module.Layer.width = 3', 'module.Layer.width = 3 has no'),
    ('LAYER = @module.Other()', 'LAYER = @module.Other() has no'),
    ('RATE = %STEPS', 'RATE = %STEPS has no'),
  ],
)
def test_all_kinds_of_settings(told, above, shown):
  (sentence,) = told(above)
  assert shown in sentence
  # Also by way of another file, which sets nothing of it itself.
  assert len(told(above, included='outer.gin')) == 1


def test_classes_are_told_apart_by_their_modules(told):
  assert not told('import other\nother.Layer.width = 3')
  # The same class by another name.
  (sentence,) = told('import module as own\nown.Layer.width = 3')
  assert 'sets it to 7' in sentence


def test_what_has_an_effect_is_not_told(told):
  assert not told('UNKNOWN = 8', below='STEPS = 8')
  # The included file says the same.
  assert not told('STEPS = 128\nLAYER = @module.Layer')
  # A scope makes it another value.
  assert not told('scope/module.Layer.width = 3')


def test_a_file_that_is_included_again_takes_back_what_is_between(told):
  assert len(told("include 'run.gin'\nSTEPS = 8")) == 1
