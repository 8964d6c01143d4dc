"""Tests how bindings are taken from the command line."""

import pytest

from mowe.cli import gin_arguments


@pytest.mark.parametrize(
  'value, read',
  [
    ('runs/a b', "'runs/a b'"),
    ("it's", '"it\'s"'),
    ('1O0', "'1O0'"),
    ('-3e-4', '-3e-4'),
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
def test_a_text_needs_no_quotes(value, read):
  rest = ['train', f'--gin.NAME={value}', '--dry_run']
  assert gin_arguments.take_bindings(rest) == [f'NAME = {read}']
  assert rest == ['train', '--dry_run']
