"""Compiled programs are kept in the user's cache, unless told otherwise."""

import os
import subprocess
import sys

import pytest

from mowe.cli import program_cache

_NAME = 'JAX_COMPILATION_CACHE_DIR'


@pytest.fixture
def environment(monkeypatch, tmp_path):
  """The environment of a user without settings, with a cache in tmp_path."""
  for name in [name for name in os.environ if name.startswith('JAX_')]:
    monkeypatch.delenv(name)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
  # `use` sets variables, which monkeypatch must know to remove.
  monkeypatch.setattr(os, 'environ', dict(os.environ))
  return os.environ


def test_a_folder_of_this_processor_is_used(environment, tmp_path, monkeypatch):
  program_cache.use()
  first = environment.pop(_NAME)
  assert first.startswith(str(tmp_path / 'mowe' / 'programs'))
  assert os.path.isdir(first)
  assert float(environment['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS']) < 1
  monkeypatch.setattr(program_cache, '_processor', lambda: 'another one')
  program_cache.use()
  assert environment[_NAME] != first


def test_settings_of_the_user_are_left_alone(environment):
  environment[_NAME] = 'elsewhere'
  before = dict(environment)
  program_cache.use()
  assert environment == before


def test_no_folder_can_be_made(environment, tmp_path):
  (tmp_path / 'mowe').write_text('a file')
  program_cache.use()
  assert _NAME not in environment


@pytest.mark.slow
def test_a_command_keeps_its_programs(world, environment, tmp_path):
  run = tmp_path / 'run'
  world.train(run, 1)
  environment['JAX_PLATFORMS'] = 'cpu'
  command = ['ask', str(run), 'Who met Zorblat?', '--max_length', '3']

  def kept(*options):
    done = subprocess.run(
      [sys.executable, '-m', 'mowe.cli.main', *command, *options],
      env=environment,
      capture_output=True,
      text=True,
      check=True,
    )
    programs = [p for p in (tmp_path / 'mowe').rglob('*') if p.is_file()]
    return done.stdout, programs

  answer, programs = kept('--no_program_cache')
  assert not programs
  for _ in range(2):
    again, programs = kept()
    assert again == answer and programs
