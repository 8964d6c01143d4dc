"""Tests JSON files: written whole, and damage named.

Also tests `atomic_files`.
"""

import pytest

from mowe.words import json_files


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (b'', 'x.json must be JSON, but is not: Expecting value.* Restore it'),
    (b'{"a": 1', 'must be JSON, but is not'),
    (b'\xff{}', 'must be JSON, but is not'),
    (b'[' * 100_000, 'must be JSON, but is not'),
    (b'[1]', 'must be a JSON object, but is a list. Restore it.'),
  ],
)
def test_damage_is_named(tmp_path, content, message):
  (tmp_path / 'x.json').write_bytes(content)
  with pytest.raises(ValueError, match=message):
    json_files.read_object(tmp_path / 'x.json', 'Restore it.')


def test_objects_are_read(tmp_path):
  (tmp_path / 'x.json').write_text('{"a": ["\u00e9"]}', 'utf-8')
  assert json_files.read_object(tmp_path / 'x.json', '') == {'a': ['\u00e9']}
