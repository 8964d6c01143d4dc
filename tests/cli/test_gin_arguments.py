"""Tests how bindings are taken from the command line."""

import pytest

from mowe.cli import gin_arguments


@pytest.mark.parametrize(
  'value, read',
  [
    ('runs/a b', "'runs/a b'"),
    ("it's", '"it\'s"'),
    ('1O0', "'1O0'"),
    ('~/runs', "'/home/of/a user/runs'"),
    ('1,2', "'1,2'"),
    ('+3', "'+3'"),
    ('-3e-4', '-3e-4'),
    ('.5', '.5'),
    ('1_000', '1_000'),
    ('None', 'None'),
    ("'quoted'", "'quoted'"),
    ("{'inputs': 64}", "{'inputs': 64}"),
    ('%DTYPE', '%DTYPE'),
    ('@schedules.constant', '@schedules.constant'),
    # Gin refuses these, and they are no texts that somebody means.
    ('true', 'true'),
    ('[1, 2', '[1, 2'),
    ('', ''),
  ],
)
def test_a_text_needs_no_quotes(value, read, monkeypatch):
  monkeypatch.setenv('HOME', '/home/of/a user')
  rest = ['train', f'--gin.NAME={value}', '--dry_run']
  assert gin_arguments.take_bindings(rest) == [f'NAME = {read}']
  assert rest == ['train', '--dry_run']


@pytest.mark.parametrize(
  'binding, read',
  [
    ('MODEL_DIR = runs/a', "MODEL_DIR = 'runs/a'"),
    ('a/b.C.d=3', 'a/b.C.d = 3'),
    ("NAME = 'x = y'", "NAME = 'x = y'"),
    ('include "a.gin"', 'include "a.gin"'),
  ],
)
def test_bindings_may_have_texts_without_quotes(binding, read):
  assert gin_arguments._read_leniently(binding) == read
