"""Tests `mowe convert`: every format becomes every other without loss.

Also tests `huggingface_tokenizer`.
"""

import dataclasses
import functools
import json
import re
import shutil

import flax
import ml_dtypes
import numpy as np
import pytest
import small_runs

from mowe.cli import main
from mowe.commands import convert
from mowe.interop import huggingface, mowe_safetensors, weights
from mowe.interop.t5x import t5x_checkpoint, t5x_legacy, t5x_tree
from mowe.layers.memory import word_experts
from mowe.layers.memory.payloads import lookup_experts
from mowe.layers.mixtures import moe
from mowe.layers.routers import tokens_choose
from mowe.model_folders import model_folder
from mowe.models import token_memories
from mowe.training.optimization import optimizers
from mowe.words import subword_vocabularies
from mowe.words.addresses import piece_address


def _params(config, seed=0):
  """Parameters as `Weights` holds them, without two equal numbers."""
  rng = np.random.default_rng(seed)
  return {
    path: rng.normal(size=leaf.shape).astype(leaf.dtype)
    for path, leaf in weights.shapes(config).items()
  }


def _assert_same(actual, expected):
  assert set(actual) == set(expected)
  for path, array in expected.items():
    found, wanted = np.asarray(actual[path][...]), np.asarray(array[...])
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape), path
    assert found.tobytes() == wanted.tobytes(), path


def _model(world, kind):
  if kind == 'dense':
    return world.config(sparse=False)
  if kind == 'switch':
    return world.config(
      sparse=True,
      sparse_feed_forward=functools.partial(
        moe.MoeLayer, 3, 5, routing=tokens_choose.TokensChoose()
      ),
      routing=None,
    )
  # The layers have a table each, or share one.
  dtype, share = kind
  layer = functools.partial(
    word_experts.MoweLayer,
    small_runs.NUM_EXPERTS,
    4,
    table_dtype=dtype,
    share_experts=share,
  )
  return world.config(sparse_feed_forward=layer)


_KINDS = ('dense', 'switch', ('bfloat16', True), ('float32', False))


@pytest.mark.slow
@pytest.mark.parametrize('kind', _KINDS, ids=str)
def test_models_come_back_through_safetensors(kind, world, tmp_path):
  config = _model(world, kind)
  given = weights.Weights(
    config, _params(config), 7, vocabulary=world.vocabulary
  )
  mowe_safetensors.save(tmp_path / 'a', given, max_file_bytes=2000)
  assert len(list((tmp_path / 'a').glob('model-*.safetensors'))) > 3
  convert.convert(str(tmp_path / 'a'), str(tmp_path / 'b'), 'mowe')
  convert.convert(str(tmp_path / 'b'), str(tmp_path / 'c'), 'safetensors')
  again = mowe_safetensors.load(tmp_path / 'c')
  assert again.step == 7
  assert again.vocabulary.sha256 == world.vocabulary.sha256
  _assert_same(again.params, given.params)
  # The converted model folder has the same parameters.
  loaded = model_folder.load(str(tmp_path / 'b'))
  assert loaded.step == 7
  found = flax.traverse_util.flatten_dict(loaded.params)
  _assert_same(
    {
      path: np.asarray(array).view(given.params[path].dtype)
      for path, array in found.items()
    },
    given.params,
  )


@pytest.mark.slow
@pytest.mark.parametrize('to', ['t5x', 't5x-orbax'])
@pytest.mark.parametrize('kind', ['switch', ('bfloat16', True)], ids=str)
def test_sparse_models_come_back_through_t5x(kind, to, world, tmp_path):
  config = _model(world, kind)
  given = weights.Weights(
    config, _params(config), 7, vocabulary=world.vocabulary
  )
  a, b, c = (str(tmp_path / name) for name in 'abc')
  mowe_safetensors.save(a, given)
  convert.convert(a, b, to)
  with pytest.raises(ValueError, match='say which one it is with --like'):
    convert.convert(b, c, 'safetensors')
  convert.convert(b, c, 'safetensors', like=a)
  again = mowe_safetensors.load(c)
  assert again.step == 7
  _assert_same(again.params, given.params)


def test_tables_have_no_state_of_adafactor(world, tmp_path, capsys):
  config = _model(world, ('float32', True))
  params = _params(config)
  given = weights.Weights(
    config,
    params,
    # For t5x tables are ordinary parameters, so its optimizer state has them
    # too.
    moments={
      name: params
      if name == 'v'
      else {path: np.zeros(1, np.float32) for path in params}
      for name in t5x_tree.MOMENTS
    },
    vocabulary=world.vocabulary,
  )
  a, b, c = (str(tmp_path / name) for name in 'abc')
  mowe_safetensors.save(a, given)
  t5x_checkpoint.save(b, given, t5x_legacy)
  convert.convert(b, c, 'mowe', like=a)
  assert 'state of Adafactor, left out' in capsys.readouterr().out
  with convert.FORMATS['mowe'].opened(c) as again:
    _assert_same(again.params, params)
    assert again.moments is None


@pytest.fixture(scope='module')
def pretrained(world, tmp_path_factory):
  """A dense T5 after two steps of training with Adafactor."""
  folder = tmp_path_factory.mktemp('pretrained') / 'run'
  world.train(
    folder,
    2,
    model=world.config(sparse=False),
    optimizer=optimizers.Adafactor(1e-2, min_dim_size_to_factor=6),
  )
  return folder


@pytest.mark.slow
def test_a_run_goes_through_all_formats(pretrained, tmp_path, capsys):
  with convert.FORMATS['mowe'].opened(pretrained) as given:
    params = {path: array[...] for path, array in given.params.items()}
    moments = {
      name: {path: array[...] for path, array in arrays.items()}
      for name, arrays in given.moments.items()
    }
  assert given.step == 2
  vocabulary = str(pretrained / 'vocabulary.model')
  names = 't5x', 't5x-orbax', 'mowe', 'huggingface', 'safetensors', 'mowe'
  source = pretrained
  for number, to in enumerate(names):
    target = tmp_path / str(number)
    arguments = [str(source), str(target), '--to', to]
    if number == 2:
      arguments += ['--vocabulary', vocabulary]
    assert main.main(['convert', *arguments]) == 0, capsys.readouterr().err
    with convert.FORMATS[to].opened(target) as again:
      _assert_same(again.params, params)
      if number <= 2:
        assert again.step == 2
        for name in t5x_tree.MOMENTS:
          _assert_same(again.moments[name], moments[name])
    source = target
  said = capsys.readouterr().out
  digest = re.findall(r'sha256 (\w{64}) of all weights', said)
  assert len(digest) == 12
  assert set(digest) == {weights.digest(params)}
  assert 'encoder/layers_*/mlp/wi_0/kernel' in said
  assert 'state of Adafactor, kept' in said
  assert 'state of Adafactor, left out' in said
  with pytest.raises(FileExistsError, match='must not be there yet'):
    convert.convert(str(pretrained), str(source), 't5x')
  assert {one.name for one in tmp_path.iterdir()} == set('012345')


@pytest.mark.slow
@pytest.mark.parametrize('to', ['safetensors', 'huggingface', 't5x'])
def test_bfloat16(to, pretrained, tmp_path):
  target = tmp_path / 'half'
  convert.convert(str(pretrained), str(target), to, dtype='bfloat16')
  with convert.FORMATS[to].opened(target) as again:
    found = {path: array[...] for path, array in again.params.items()}
  with convert.FORMATS['mowe'].opened(pretrained) as given:
    _assert_same(
      found,
      {
        path: array[...].astype(ml_dtypes.bfloat16).astype(np.float32)
        for path, array in given.params.items()
      },
    )
  with pytest.raises(ValueError, match='model folder must be float32, but'):
    convert.convert(str(target), str(tmp_path / 'no'), 'mowe', dtype='bfloat16')


@pytest.mark.slow
def test_finetuning_starts_from_other_weights(world, tmp_path, capsys):
  config = world.config(sparse=False)
  params = _params(config)
  their, ours, back = (tmp_path / name for name in ('their', 'ours', 'back'))
  huggingface.save(their, config, flax.traverse_util.unflatten_dict(params))
  convert.convert(
    str(their), str(ours), 'mowe', vocabulary=world.vocabulary_path
  )
  # With a learning rate of zero the run ends with the weights it began with.
  world.train(
    tmp_path / 'finetuned',
    2,
    model=config,
    data=world.data('questions'),
    optimizer=optimizers.AdamW(0.0),
    initial_checkpoint_path=str(ours),
  )
  assert f'Started from {ours}, step 0.' in capsys.readouterr().out
  convert.convert(str(tmp_path / 'finetuned'), str(back), 'huggingface')
  _, again = huggingface.load(back)
  _assert_same(flax.traverse_util.flatten_dict(again), params)
  spiece = (back / 'spiece.model').read_bytes()
  assert spiece == (world.folder / 'vocabulary.model').read_bytes()


def test_lookup_experts_are_baked(world, tmp_path):
  memory = token_memories.Memory(
    'mole',
    piece_address.Pieces(world.vocabulary.size),
    functools.partial(lookup_experts.LookupExperts, 2, expert_dim=3),
    token_memories.BesideFeedForward((0,), (0,)),
  )
  config = world.config(sparse=False, memories=(memory,))
  given = weights.Weights(
    config, _params(config), 7, vocabulary=world.vocabulary
  )
  a, b = (str(tmp_path / name) for name in 'ab')
  mowe_safetensors.save(a, given)
  assert main.main(['convert', a, b, '--to', 'mowe', '--bake']) == 0
  baked = model_folder.load(b)
  (memory,) = baked.model.config.memories
  payload = memory.make_payload(parent=None)
  assert type(payload) is lookup_experts.LookupMixture
  # Two blocks have two vectors of the model's width each.
  assert baked.params['mole']['memory_rows'].shape[1:] == (
    2,
    2 * config.emb_dim,
  )
  assert main.main(
    ['convert', b, str(tmp_path / 'c'), '--to', 'mowe', '--bake']
  )


@pytest.mark.slow
def test_a_trained_mowe_answers_as_before(world, tmp_path):
  run = tmp_path / 'run'
  world.train(run, 2)
  convert.convert(str(run), str(tmp_path / 'a'), 'safetensors')
  convert.convert(str(tmp_path / 'a'), str(tmp_path / 'b'), 'mowe')
  ids = np.asarray([world.vocabulary.encode('Zorblat of Delft met Karl')])
  batch = {
    'encoder_input_tokens': ids,
    'decoder_input_tokens': ids[:, :3],
    'decoder_target_tokens': ids[:, :3],
  }
  logits = [
    loaded.model.apply(
      {'params': loaded.params}, batch, enable_dropout=False, method='of_batch'
    )
    for loaded in (
      model_folder.load(str(tmp_path / 'b')),
      model_folder.load(str(run)),
    )
  ]
  np.testing.assert_array_equal(*logits)


def test_what_is_unknown_says_what_is_there(world, pretrained, tmp_path):
  folder = tmp_path / 'a'
  out = str(tmp_path / 'out')

  def refused(match, error=ValueError, **settings):
    with pytest.raises(error, match=match):
      convert.convert(str(folder), out, 'mowe', **settings)
    assert {one.name for one in tmp_path.iterdir()} <= {'a'}

  refused('must exist, but', FileNotFoundError)
  folder.mkdir()
  (folder / 'model.ckpt-1.index').touch()
  refused(r"has \['model.ckpt-1.index'\]. Give the folder of a complete one")
  (folder / 'pytorch_model.bin').touch()
  refused('pytorch_model.bin: a pickle, which can run any code')
  (folder / 'config.json').write_text('{"model_type": "mowe"}')
  refused('a pickle, which can run any code')
  (folder / 'model.safetensors').write_bytes(b'\x80\x04')
  refused('must be a safetensors file, but is a pickle')
  with pytest.raises(ValueError, match='--like is for checkpoints of T5X'):
    convert.convert(str(pretrained), out, 'mowe', like=str(pretrained))


def test_a_model_needs_its_vocabulary(pretrained, tmp_path):
  source, out = str(tmp_path / 't5x'), str(tmp_path / 'out')
  convert.convert(str(pretrained), source, 't5x')
  for to in ('mowe', 'safetensors'):
    with pytest.raises(ValueError, match='Give it with --vocabulary'):
      convert.convert(source, out, to)
    with pytest.raises(ValueError, match='at most the 143 ids of the model'):
      convert.convert(source, out, to, vocabulary='bytes')
  assert [one.name for one in tmp_path.iterdir()] == ['t5x']


def test_damage_leaves_nothing(world, tmp_path):
  config = _model(world, ('bfloat16', True))
  given = weights.Weights(config, _params(config), vocabulary=world.vocabulary)
  a, b = tmp_path / 'a', tmp_path / 'b'
  mowe_safetensors.save(a, given)
  convert.convert(str(a), str(b), 'mowe')
  content = bytearray((b / 'experts.0.rows').read_bytes())
  content[len(content) // 2] ^= 1
  (b / 'experts.0.rows').write_bytes(content)
  with pytest.raises(ValueError, match='must be in .* as it was written'):
    convert.convert(str(b), str(tmp_path / 'c'), 'safetensors')
  file = a / 'config.json'
  described = json.loads(file.read_text())
  for name, value, text in (
    ('subwords', None, 'must describe a model of mowe, but reading it failed'),
    ('config', {'vocab_size': 3}, 'family of a saved model must be one of'),
    ('step', -1, 'must be a number of updates, .* but is -1. Take'),
    ('step', 2**31, 'must be a number of updates, .* but is 2147483648. Take'),
    ('step', 1.5, 'must be a number of updates, .* but is 1.5. Take'),
    ('step', True, 'must be a number of updates, .* but is True. Take'),
    ('step', [3], r'must be a number of updates, .* but is \[1\] of int'),
    ('version', 9, 'must have version 1, but has 9'),
    ('model_type', 't5', 'must be a number from 1 to'),
  ):
    file.write_text(json.dumps(described | {name: value}))
    with pytest.raises(ValueError, match=text):
      convert.convert(str(a), str(tmp_path / 'c'), 'mowe')
  file.write_text(json.dumps(described))
  (a / 'routing_vocabulary.npz').unlink()
  with pytest.raises(FileNotFoundError):
    convert.convert(str(a), str(tmp_path / 'c'), 'mowe')
  assert {one.name for one in tmp_path.iterdir()} == {'a', 'b'}


def test_what_is_read_again_must_be_what_was_written(
  pretrained, tmp_path, monkeypatch
):
  save = t5x_checkpoint.save

  def spoilt(folder, given, layout):
    other = {path: array[...] + 1 for path, array in given.params.items()}
    save(folder, dataclasses.replace(given, params=other), layout)

  monkeypatch.setattr(t5x_checkpoint, 'save', spoilt)
  with pytest.raises(ValueError, match='reading it again gave something else'):
    convert.convert(str(pretrained), str(tmp_path / 'a'), 't5x')
  assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_unchecked(
  pretrained, tmp_path, monkeypatch
):
  def interrupted(params):
    raise KeyboardInterrupt('by hand')

  monkeypatch.setattr(weights, 'digest', interrupted)
  with pytest.raises(KeyboardInterrupt, match='by hand'):
    convert.convert(str(pretrained), str(tmp_path / 'a'), 't5x')
  assert not list(tmp_path.iterdir())


def test_a_target_must_be_a_place_to_read_from(pretrained, tmp_path):
  inside = pretrained / 'checkpoint_9'
  for to in ('safetensors', 't5x'):
    with pytest.raises(ValueError, match='must not be in another model folder'):
      convert.convert('not there', str(inside), to)
  named = tmp_path / 'checkpoint_5'
  with pytest.raises(ValueError, match='not be that of a checkpoint, but is'):
    convert.convert('not there', str(named), 'mowe')
  assert not list(tmp_path.iterdir())
  assert not inside.exists()


def test_checkpoints_of_others_are_named(pretrained, tmp_path):
  source, out = tmp_path / 'a', tmp_path / 'out'
  source.mkdir()
  (source / 'checkpoint').write_text('model_checkpoint_path: "model.ckpt-9"')
  (source / 'model.ckpt-9.index').touch()
  with pytest.raises(ValueError, match='checkpoint of TensorFlow with t5x'):
    convert.convert(str(source), str(out), 'mowe')
  shutil.copytree(pretrained / 'checkpoint_2', tmp_path / 'b' / 'checkpoint_2')
  for path in ('b', 'b/checkpoint_2'):
    with pytest.raises(ValueError, match='must have the model.json of its'):
      convert.convert(str(tmp_path / path), str(out), 'mowe')


def test_a_model_keeps_its_vocabulary(world, pretrained, tmp_path):
  out = str(tmp_path / 'out')
  with pytest.raises(
    ValueError, match='must be the same as that in the source'
  ):
    convert.convert(str(pretrained), out, 'safetensors', vocabulary='bytes')
  own = world.vocabulary_path
  with pytest.raises(
    ValueError, match='must be the same as that in the source'
  ):
    convert.convert(
      str(pretrained), out, 'safetensors', vocabulary=own, extra_ids=3
    )
  with pytest.raises(ValueError, match='there is neither for'):
    convert.convert(str(pretrained), out, 'safetensors', extra_ids=3)
  assert not list(tmp_path.iterdir())
  convert.convert(str(pretrained), out, 'safetensors', vocabulary=own)


def test_routing_must_be_that_of_the_vocabulary(world):
  config = _model(world, ('float32', True))
  given = weights.Weights(config, {})
  with pytest.raises(ValueError, match='must be built for the subword voc'):
    convert._with_vocabulary(given, 'bytes', None)


def test_sentinels_of_a_spiece_model(world, pretrained, tmp_path):
  theirs, out = tmp_path / 'theirs', tmp_path / 'out'
  convert.convert(str(pretrained), str(theirs), 'huggingface')
  convert.convert(str(theirs), str(out), 'safetensors', extra_ids=2)
  assert mowe_safetensors.load(out).vocabulary.extra_ids == 2
  with pytest.raises(ValueError, match='must be 0 or more, but is -1'):
    convert.convert(str(theirs), str(tmp_path / 'no'), 'mowe', extra_ids=-1)


def test_what_a_tokenizer_says_of_its_tokens(
  world, pretrained, tmp_path, capsys
):
  theirs = tmp_path / 'theirs'
  convert.convert(str(pretrained), str(theirs), 'huggingface')
  own = subword_vocabularies.load_subwords(theirs / 'spiece.model')
  piece = {'id': 5, 'content': own.piece(5)}
  added = [piece, {'id': 1200, 'content': '<ORG>'}, 'damaged', {'id': 1201}]
  added.append({'id': 1203, 'content': ['no text']})
  settings = {
    'extra_ids': 100,
    'added_tokens_decoder': {
      '1': {'content': '</s>'},
      '1202': {'content': '{'},
      '1100': {'content': '<extra_id_0>'},
    },
  }
  (theirs / 'tokenizer.json').write_text(json.dumps({'added_tokens': added}))
  (theirs / 'tokenizer_config.json').write_text(json.dumps(settings))
  capsys.readouterr()
  convert.convert(str(theirs), str(tmp_path / 'whole'), 'safetensors')
  told = capsys.readouterr().out
  assert "added to the tokenizer are lost ('<ORG>', '{'), as their ids" in told
  settings = {'extra_ids': 3}
  (theirs / 'tokenizer_config.json').write_text(json.dumps(settings))
  (theirs / 'tokenizer.json').unlink()
  convert.convert(str(theirs), str(tmp_path / 'few'), 'safetensors')
  assert mowe_safetensors.load(tmp_path / 'few').vocabulary.extra_ids == 3
  assert 'lost' not in capsys.readouterr().out
  for wrong in (-1, True, 10**12, '100'):
    settings = {'extra_ids': wrong}
    (theirs / 'tokenizer_config.json').write_text(json.dumps(settings))
    with pytest.raises(
      ValueError, match=r'tokenizer_config\.json must be a num'
    ):
      convert.convert(str(theirs), str(tmp_path / 'no'), 'safetensors')
  (theirs / 'tokenizer_config.json').write_text('{')
  with pytest.raises(ValueError, match=r'tokenizer_config\.json must be JSON'):
    convert.convert(str(theirs), str(tmp_path / 'no'), 'safetensors')


def test_tokens_that_were_added_to_a_tokenizer_are_read(
  pretrained, tmp_path, capsys
):
  theirs, out = tmp_path / 'theirs', tmp_path / 'out'
  convert.convert(str(pretrained), str(theirs), 'huggingface')
  own = subword_vocabularies.load_subwords(theirs / 'spiece.model')
  rows = json.loads((theirs / 'config.json').read_text())['vocab_size']
  texts = [f'<NAME{i}>' for i in range(rows - own.size)]
  decoder = {
    str(own.size + i): {'content': text} for i, text in enumerate(texts)
  }
  path = theirs / 'tokenizer_config.json'
  path.write_text(json.dumps({'added_tokens_decoder': decoder}))
  capsys.readouterr()
  convert.convert(str(theirs), str(out), 'safetensors')
  assert 'lost' not in capsys.readouterr().out
  read = mowe_safetensors.load(out).vocabulary
  assert read.size == rows and read.extra_ids == 0
  # The sentinels keep their ids, and so do all pieces.
  assert list(read.sentinels) == list(own.sentinels)
  assert all(read.piece(i) == own.piece(i) for i in range(7))
  ids = read.encode(f'they saw {texts[1]} there.')
  assert ids.count(own.size + 1) == 1
  assert read.decode(ids) == f'they saw{texts[1]} there.'
  # They cut a text in parts, and stand for what they stood for in it.
  text = f'they {texts[1]}{texts[2]}  saw'
  ids, starts, ends = read.encode_with_offsets(text)
  assert ids == read.encode_batch([text])[0]
  assert ids == [
    *own.encode('they'),
    own.size + 1,
    own.size + 2,
    *own.encode('saw'),
  ]
  places = dict(zip(ids, zip(starts, ends, strict=True), strict=True))
  end = 5 + len(texts[1])
  assert places[own.size + 1] == (5, end)
  assert places[own.size + 2] == (end, end + len(texts[2]))
  assert (starts[-1] >= end + len(texts[2])) and ends[-1] == len(text)
  # A text is no sentinel.
  assert not set(read.encode('<extra_id_0>')) & set(read.sentinels)
  # One more has no embedding.
  decoder[str(rows)] = {'content': '<MORE>'}
  path.write_text(json.dumps({'added_tokens_decoder': decoder}))
  convert.convert(str(theirs), str(tmp_path / 'few'), 'safetensors')
  assert 'no embeddings for them' in capsys.readouterr().out.replace('\n', ' ')


def test_a_folder_of_transformers_5_has_no_spiece_model(
  pretrained, tmp_path, capsys
):
  theirs, out = tmp_path / 'theirs', tmp_path / 'out'
  convert.convert(str(pretrained), str(theirs), 'huggingface')
  spiece = tmp_path / 'spiece.model'
  shutil.move(theirs / 'spiece.model', spiece)
  own = subword_vocabularies.load_subwords(spiece)
  pieces = [[own.piece(i), -i / 8] for i in range(own.size - own.extra_ids)]
  tokenizer = {
    'model': {'type': 'Unigram', 'unk_id': 2, 'vocab': pieces},
    'added_tokens': [{'id': 1200, 'content': '<ORG>'}],
  }
  path = theirs / 'tokenizer.json'
  path.write_text(json.dumps(tokenizer))
  convert.convert(str(theirs), str(out), 'safetensors')
  assert "are lost ('<ORG>'), as" in capsys.readouterr().out
  read = mowe_safetensors.load(out).vocabulary
  assert (read.size, read.extra_ids) == (own.size, own.extra_ids)
  assert read.piece(7) == own.piece(7)
  few = tmp_path / 'few'
  convert.convert(str(theirs), str(few), 'safetensors', extra_ids=2)
  assert mowe_safetensors.load(few).vocabulary.extra_ids == 2
  # Another kind of tokenizer is refused, unless a vocabulary is given.
  tokenizer['model']['type'] = 'BPE'
  path.write_text(json.dumps(tokenizer))
  again = tmp_path / 'again'
  with pytest.raises(ValueError, match=r'tokenizer\.json must be Unigram'):
    convert.convert(str(theirs), str(again), 'safetensors')
  convert.convert(
    str(theirs), str(again), 'safetensors', vocabulary=str(spiece)
  )
  assert mowe_safetensors.load(again).vocabulary.sha256 == own.sha256


@pytest.mark.parametrize(
  'content', ['[]', 'null', '"x"', '3', '{', '[' * 100_000]
)
def test_what_is_no_description(content, pretrained, tmp_path):
  out = str(tmp_path / 'out')
  for name, other in (
    ('model.json', None),
    ('config.json', 'model.safetensors'),
  ):
    folder = tmp_path / name
    folder.mkdir()
    (folder / name).write_text(content)
    if other:
      (folder / other).touch()
    with pytest.raises(ValueError, match=f'{name} must be (a )?JSON.* but is'):
      convert.convert(str(folder), out, 't5x')


@pytest.mark.parametrize('size', [None, '2', 1.5, 0, -3, True, 2**40, [2]])
def test_sizes_must_be_numbers(size, pretrained, tmp_path):
  described = json.loads((pretrained / 'model.json').read_text())
  (tmp_path / 'vocabulary.model').write_bytes(
    (pretrained / 'vocabulary.model').read_bytes()
  )
  for name in ('vocab_size', 'num_heads', 'num_encoder_layers'):
    config = described['config'] | {name: size}
    (tmp_path / 'model.json').write_text(
      json.dumps(described | {'config': config})
    )
    with pytest.raises(ValueError, match=f'{name} of .* must be a number from'):
      convert.convert(str(tmp_path), str(tmp_path.parent / 'no'), 't5x')


def test_a_state_that_is_left_out_is_named(world, tmp_path, capsys):
  config = world.config(sparse=False)
  given = weights.Weights(config, _params(config))
  state = t5x_tree.from_weights(given)
  state['state', 'param_states', 'mu'] = np.zeros(3, np.float32)
  t5x_legacy.write(tmp_path / 'a', state)
  convert.convert(str(tmp_path / 'a'), str(tmp_path / 'b'), 't5x')
  assert 'Optimizer  state of another kind, left out' in capsys.readouterr().out


def test_moments_are_read_again_too(pretrained, tmp_path, monkeypatch):
  save = t5x_checkpoint.save

  def spoilt(folder, given, layout):
    ones = {path: np.ones(1, np.float32) for path in given.params}
    moments = given.moments | {'m': ones}
    save(folder, dataclasses.replace(given, moments=moments), layout)

  monkeypatch.setattr(t5x_checkpoint, 'save', spoilt)
  with pytest.raises(ValueError, match='reading it again gave something else'):
    convert.convert(str(pretrained), str(tmp_path / 'a'), 't5x')
  assert not list(tmp_path.iterdir())
