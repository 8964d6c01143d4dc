"""Tests the server of `mowe serve` over HTTP, with a model that is no model."""

import http.client
import json
import socket
import struct
import threading

import pytest

from mowe.cli import main
from mowe.commands.serving import server
from mowe.words import routing_vocabulary

_LIMITS = server.Limits(questions=3, characters=20, seconds=0.2)


class _Answerer:
  """Repeats the question; waits before each answer if it is told to."""

  step = 7

  def __init__(self):
    self.may_answer = threading.Event()
    self.may_answer.set()

  def __call__(self, question):
    assert self.may_answer.wait(10)
    if question == 'fail':
      raise RuntimeError('no memory')
    return f'{question} <b>'

  def explain(self, question):
    return [
      routing_vocabulary.ExplainedPiece('\u2581a', 'a', 3, 5, None, 'skipped')
    ]


@pytest.fixture
def answerer():
  return _Answerer()


@pytest.fixture
def running(answerer):
  with server.Server(0) as one:
    one.service = server.Service(answerer, 'runs/a', _LIMITS)
    thread = threading.Thread(target=one.serve_forever, args=(0.01,))
    thread.start()
    yield one
    one.shutdown()
    thread.join()


def _ask(running, body, path='/ask', method='POST', **headers):
  """Sends a request, and returns the status and the JSON of the response."""
  headers = {'Content-Type': 'application/json'} | {
    name.replace('_', '-'): value for name, value in headers.items()
  }
  connection = http.client.HTTPConnection('127.0.0.1', running.server_port)
  try:
    text = body if isinstance(body, str) else json.dumps(body)
    connection.request(method, path, text, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())
  finally:
    connection.close()


def test_questions_are_answered(running):
  status, found = _ask(running, {'questions': ['a?', '\u00fc\ud83d?']})
  assert status == 200
  assert found['answers'][0] == {'question': 'a?', 'answer': 'a? <b>'}
  # Half of a surrogate pair, which JSON may hold, has no UTF-8.
  assert found['answers'][1]['answer'] == '\u00fc?? <b>'
  status, found = _ask(running, {'questions': ['a?'], 'explain': True})
  (piece,) = found['answers'][0]['pieces']
  assert piece['piece'] == '\u2581a' and piece['expert'] is None
  assert _ask(running, '', '/model', 'GET')[1] == {
    'model': 'runs/a',
    'step': 7,
    'limits': {'questions': 3, 'characters': 20, 'seconds': 0.2},
  }


def test_the_page_loads_nothing_from_elsewhere(running):
  connection = http.client.HTTPConnection('127.0.0.1', running.server_port)
  connection.request('GET', '/')
  response = connection.getresponse()
  page = response.read().decode()
  connection.close()
  assert response.status == 200
  assert response.headers['Content-Type'] == 'text/html; charset=utf-8'
  assert "default-src 'none'" in response.headers['Content-Security-Policy']
  assert '<title>' in page and '//' not in page.replace('// ', '')
  assert 'innerHTML' not in page


@pytest.mark.parametrize(
  'body, said',
  [
    ('{', 'must be JSON'),
    ('[' * 1100, 'must be JSON'),
    ('[]', 'but is []. Correct'),
    ({'questions': 'a?'}, 'but is {"questions": "a?"}'),
    ({'questions': ['a?'], 'explain': 1}, '"explain": 1}'),
    ({'questions': ['a?'], 'beams': 2}, '"beams": 2}'),
    ({'questions': []}, '1 to 3 questions, but has 0'),
    ({'questions': ['a?'] * 4}, 'but has 4. Send several'),
    ({'questions': ['a?', ' ']}, 'but number 1 is " "'),
    ({'questions': ['a' * 21]}, '1 to 20 characters, but number 0 is "aaa'),
  ],
)
def test_other_requests_are_refused(running, body, said):
  status, found = _ask(running, body)
  assert status == 400 and said in found['error']


def test_other_addresses_types_and_names_are_refused(running):
  questions = {'questions': ['a?']}
  status, found = _ask(running, questions, '/else')
  assert status == 404 and 'but were sent to /else' in found['error']
  status, found = _ask(running, '', '/else', 'GET')
  assert status == 404 and 'but not /else' in found['error']
  status, found = _ask(running, questions, Content_Type='text/plain')
  assert status == 415 and 'but is of text/plain' in found['error']
  status, found = _ask(running, questions, Host='evil.example:80')
  assert status == 403 and "asked as 'evil.example'" in found['error']
  status, found = _ask(running, ' ' * 2000)
  assert status == 413 and 'but says 2000' in found['error']
  for length in ('9' * 5000, '-1', '\u00b2'.encode().decode('latin-1')):
    status, found = _ask(running, '', Content_Length=length)
    assert status == 413 and 'at most' in found['error']


def test_an_error_of_the_model_is_told(running):
  status, found = _ask(running, {'questions': ['fail']})
  assert status == 500 and 'no memory' in found['error']
  assert _ask(running, {'questions': ['a?']})[0] == 200


def test_a_client_that_leaves_is_no_error(running, answerer, capsys):
  answerer.may_answer.clear()
  connection = http.client.HTTPConnection('127.0.0.1', running.server_port)
  headers = {'Content-Type': 'application/json'}
  connection.request('POST', '/ask', json.dumps({'questions': ['a?']}), headers)
  while not running.service._lock.locked():
    pass
  # Closing with unread bytes resets the connection.
  connection.sock.setsockopt(
    socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0)
  )
  connection.close()
  answerer.may_answer.set()
  assert _ask(running, {'questions': ['b?']})[0] == 200
  assert not capsys.readouterr().err


def test_a_request_that_waits_too_long_is_refused(running, answerer):
  answerer.may_answer.clear()
  results = []
  first = threading.Thread(
    target=lambda: results.append(_ask(running, {'questions': ['a', 'b']}))
  )
  first.start()
  try:
    while not running.service._lock.locked():
      pass
    status, found = _ask(running, {'questions': ['c?']})
    assert status == 503 and '0 of 1 questions were' in found['error']
  finally:
    answerer.may_answer.set()
    first.join()
  # The first request used up its time as well, after one answer.
  ((status, found),) = results
  assert status == 503 and '1 of 2 questions were' in found['error']


def test_a_port_that_is_taken_is_refused(running, answerer):
  for port in (running.server_port, 70_000):
    with pytest.raises(ValueError, match=f'must be free, but {port} led to'):
      server.serve(lambda: answerer, 'runs/a', port)


def test_a_model_must_be_there(tmp_path, capsys):
  assert main.main(['serve', str(tmp_path / 'none')]) == 1
  assert 'must have a model.json' in capsys.readouterr().err
