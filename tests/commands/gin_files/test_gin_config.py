"""Tests gin files and bindings: what is refused, and with which message."""

import sys

import pytest

from mowe.commands import train
from mowe.commands.gin_files import gin_config
from mowe.models.t5 import t5_config

_MODEL = 'gin_configs/models/t5_tiny.gin'
_RUN = 'gin_configs/examples/text_pretrain_t5.gin'


def _write(path, text):
  path.write_text('from __gin__ import dynamic_registration\n' + text)
  return str(path)


def test_later_bindings_win():
  gin_config.parse([_MODEL], ["VOCABULARY_PATH = 'bytes'", 'VOCAB_SIZE = 500'])
  assert gin_config.call(t5_config.T5Config).vocab_size == 500
  gin_config.parse(
    [_MODEL],
    [
      "VOCABULARY_PATH = 'bytes'",
      'mowe.models.t5.t5_config.T5Config.mlp_dim = 77',
    ],
  )
  config = gin_config.call(t5_config.T5Config)
  # The values of the files that were parsed before are forgotten. Of the 359
  # ids of bytes and sentinels the next multiple of 128 follows.
  assert config.vocab_size == 384 and config.mlp_dim == 77


def test_macros_can_be_read():
  gin_config.parse([_RUN], ['BATCH_SIZE = 3'])
  assert gin_config.macro('BATCH_SIZE') == 3
  assert gin_config.macro('TASK_FEATURE_LENGTHS') == {
    'inputs': 128,
    'targets': 32,
  }


def test_files_are_found_from_any_folder(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  gin_config.parse([_MODEL])
  own = tmp_path / 'more'
  own.mkdir()
  _write(own / 'own.gin', f"include '{_MODEL}'\nVOCAB_SIZE = 333\n")
  with pytest.raises(gin_config.GinError, match='own.gin.*--gin_search_paths'):
    gin_config.parse(['own.gin'])
  gin_config.parse(['own.gin'], paths=[str(own)])
  assert gin_config.macro('VOCAB_SIZE') == 333


def test_an_import_says_which_packages_it_needs(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'seqio', None)
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / 'tasks_of_a_user.py').write_text(
    'from mowe.data import seqio_stream\nseqio_stream.import_seqio()\n'
  )
  file = _write(tmp_path / 'own.gin', 'import tasks_of_a_user\n')
  with pytest.raises(gin_config.GinError) as caught:
    gin_config.parse([file])
  first, *_, last = str(caught.value).splitlines()
  assert "`pip install 'mowe[tasks]'`" in first
  assert any(
    'own.gin", line 2' in line for line in str(caught.value).split('\n')
  )
  assert last.endswith('or install what it needs.')


def test_the_working_folder_does_not_replace_shipped_files(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  (tmp_path / _MODEL).parent.mkdir(parents=True)
  _write(tmp_path / _MODEL, 'VOCAB_SIZE = 333\n')
  gin_config.parse([_MODEL])
  assert gin_config.macro('VOCAB_SIZE') != 333
  gin_config.parse([_MODEL], paths=['.'])
  assert gin_config.macro('VOCAB_SIZE') == 333
  _write(tmp_path / 'own.gin', 'VOCAB_SIZE = 444\n')
  gin_config.parse(['own.gin'])
  assert gin_config.macro('VOCAB_SIZE') == 444


@pytest.mark.parametrize(
  ('line', 'name'),
  [
    ('t5_config.T5Config.emb_dimm = 3', 'emb_dimm'),
    ('t5_config.T6Config.emb_dim = 3', 'T6Config'),
    ('from mowe.models.t5 import t6', 't6'),
  ],
)
def test_a_misspelt_name_fails_with_file_and_line(tmp_path, line, name):
  path = _write(
    tmp_path / 'wrong.gin', f'from mowe.models.t5 import t5_config\n\n{line}\n'
  )
  with pytest.raises(gin_config.GinError) as caught:
    gin_config.parse([path])
  text = str(caught.value)
  assert name in text and 'wrong.gin' in text and 'line 4' in text


def test_a_misspelt_macro_suggests_the_right_one():
  with pytest.raises(
    gin_config.GinError, match='--gin.BATCHSIZE .* Did you mean BATCH_SIZE?'
  ):
    gin_config.parse([_RUN], ['BATCHSIZE = 8'])
  with pytest.raises(
    gin_config.GinError, match='Known macros are BATCH_SIZE, '
  ):
    gin_config.parse([_RUN], ['XYZ = 8'])


def test_a_misspelt_field_is_named():
  gin_config.parse(['gin_configs/models/t5_tiny.gin'])
  with pytest.raises(
    gin_config.GinError, match='Did you mean T5Config.emb_dim?'
  ):
    gin_config.parse(
      ['gin_configs/models/t5_tiny.gin'], ['T5Config.emb_dimm = 3']
    )


def test_a_misspelt_shipped_file_is_named():
  with pytest.raises(
    gin_config.GinError, match='Did you mean gin_configs/models/t5_tiny.gin?'
  ):
    gin_config.parse(['gin_configs/models/t5_tniy.gin'])


def test_required_macros_are_named_all_at_once():
  gin_config.parse([_RUN], ["MODEL_DIR = 'runs/a'"])
  with pytest.raises(gin_config.GinError) as caught:
    gin_config.call(train.Training)
  text = str(caught.value)
  assert 'MIXTURE_OR_TASK_NAME, VOCABULARY_PATH.' in text
  assert 'MODEL_DIR,' not in text


def test_a_run_without_a_model_names_the_files_to_add():
  gin_config.parse(
    ['gin_configs/runs/pretrain.gin'],
    [
      "MODEL_DIR = 'a'",
      "MIXTURE_OR_TASK_NAME = 'b'",
      "TASK_FEATURE_LENGTHS = {'inputs': 3, 'targets': 2}",
      'TRAIN_STEPS = 4',
    ],
  )
  with pytest.raises(gin_config.GinError) as caught:
    gin_config.call(train.Training)
  text = str(caught.value)
  assert 'MODEL, OPTIMIZER, ROW_OPTIMIZER, VOCABULARY' in text
  assert 'gin_configs/models/' in text


def test_a_verb_without_its_file_names_it():
  def infer():
    pass

  gin_config.parse([_MODEL])
  with pytest.raises(gin_config.GinError, match='none did.*runs/infer.gin'):
    gin_config.call(infer)


def test_a_value_without_quotes_is_explained():
  with pytest.raises(gin_config.GinError) as caught:
    gin_config.parse([_RUN], ['BATCH_SIZE = 8', 'MODEL_DIR = runs/a'])
  text = str(caught.value)
  assert '--gin.MODEL_DIR' in text and 'quotes' in text
