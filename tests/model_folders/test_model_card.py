"""Tests the model card: what it says, and that it keeps what others wrote."""

import json

import pytest

from mowe.model_folders import model_card, model_folder
from mowe.models.families import costs


@pytest.fixture(scope='module')
def folder(world, tmp_path_factory):
  folder = tmp_path_factory.mktemp('card') / 'mine'
  world.train(folder, 1)
  return folder


def _write(folder, total=1234):
  config, _ = model_folder.load_config(folder)
  model_card.write(folder, config, costs.ModelCosts(total, 1000, 100, 7, 5))
  return (folder / model_card.FILE_NAME).read_text('utf-8')


def test_training_writes_a_card(world, folder):
  card = (folder / model_card.FILE_NAME).read_text()
  assert card.startswith(
    '---\nlibrary_name: mowe\npipeline_tag: text2text-generation\n'
  )
  assert '\n# mine\n' in card and "mowe ask mine 'Who ...?'" in card
  fingerprint = world.data().open_cache('text', world.vocabulary).fingerprint
  assert f'- text, token cache {fingerprint[:12]}\n' in card
  assert '\n1 steps. `config.gin`' in card
  assert 'from step 0, mowe' in card


def test_evaluations_are_in_the_card(folder):
  (folder / 'reported').mkdir(exist_ok=True)
  results = {'em': 41.25, 'is_public': True, 'per_relation': {'x': 1}}
  (folder / 'reported' / 'results.json').write_text(json.dumps(results))
  (folder / 'damaged').mkdir(exist_ok=True)
  (folder / 'damaged' / 'results.json').write_text('{')
  card = _write(folder)
  assert '1,234 parameters, of which a token uses 334.' in card
  assert '| em | 41.25 | `reported/results.json` |' in card
  assert 'is_public' not in card and 'per_relation' not in card


def test_what_others_wrote_stays(folder):
  path = folder / model_card.FILE_NAME
  card = _write(folder)
  path.write_text(card.replace('# mine', '# Mine \\1\n\nBy me.') + '\nThe end.')
  again = _write(folder, total=9999)
  assert '# Mine \\1\n\nBy me.' in again and again.endswith('\nThe end.')
  assert '9,999 parameters' in again and '1,234' not in again
  # A file that is none of ours is left alone; so is one that lost a mark.
  begin = model_card._BEGIN.encode()
  for content in (b'caf\xe9\r\n', b'a\r\n' + begin + b'\nb'):
    path.write_bytes(content)
    config, _ = model_folder.load_config(folder)
    model_card.write(folder, config, costs.ModelCosts(1, 0, 0, 7, 5))
    assert path.read_bytes() == content
