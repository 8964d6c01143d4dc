"""Runs the notebook in docs, cell after cell, as a reader does."""

import json
import pathlib

import jax
import pytest

_DOCS = pathlib.Path(__file__).resolve().parent.parent / 'docs'


@pytest.mark.slow
def test_the_notebook_answers_most_questions(tmp_path, monkeypatch):
  # A reader's machine has one device.
  here = jax.devices()[:1]
  monkeypatch.setattr(jax, 'devices', lambda: here)
  monkeypatch.chdir(tmp_path)
  notebook = json.loads((_DOCS / 'tiny_world.ipynb').read_text('utf-8'))
  names = {}
  for number, cell in enumerate(notebook['cells']):
    if cell['cell_type'] == 'code':
      source = ''.join(cell['source'])
      exec(compile(source, f'cell {number}', 'exec'), names)
  # One in ten would be right by chance.
  assert names['result'].em > 40
  assert 'step 100' in repr(names['loaded'])
