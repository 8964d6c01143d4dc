"""`mowe serve`: a page and a JSON endpoint of this machine that answer questions.

It is for looking at a model, and for programs on the same machine: one question
is answered at a time, and nobody else can reach it.
"""

import dataclasses
import http
import http.server
import importlib.resources
import json
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

from mowe.commands import ask

_HOST = '127.0.0.1'
# Names under which a browser of this machine may ask. A page of another site
# could point its own name to this address, so other names are refused.
_NAMES = (_HOST, 'localhost')
_ASK, _MODEL = '/ask', '/model'
# Digits of the length of a request; more are no length of anything.
_MOST_DIGITS = 9
# The page loads nothing, and has one script and one style of its own.
_POLICY = (
  "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
  "connect-src 'self'; base-uri 'none'; form-action 'none'; "
  "frame-ancestors 'none'"
)


@dataclasses.dataclass(frozen=True)
class Limits:
  """What one request may ask for.

  Attributes:
    questions: number of questions.
    characters: number of characters of a question.
    seconds: how long a request may wait for those before it, and for its own
      answers. An answer that has begun is finished.
  """

  questions: int = 32
  characters: int = 2000
  seconds: float = 60.0

  @property
  def num_bytes(self) -> int:
    """The largest body: JSON may write a character with 12 bytes."""
    return 1000 + self.questions * (20 + 12 * self.characters)


class RefusedError(ValueError):
  """A request that is not answered.

  Attributes:
    status: the status of HTTP that says why.
  """

  def __init__(self, status: http.HTTPStatus, text: str):
    super().__init__(text)
    self.status = status


class Service:
  """Answers the questions of requests, one after the other.

  Args:
    answer: the trained model.
    name: the name of the model that the page shows.
    limits: what one request may ask for.

  Call: takes a request as JSON has it, `{"questions": [...], "explain": true}`,
    and returns `{"answers": [{"question", "answer", "pieces"}]}`. `pieces` are
    there if `explain` is true and the model has word experts.

  Raises:
    RefusedError: the request has another form, exceeds a limit, or took too
      long.
  """

  def __init__(
    self, answer: ask.Answerer, name: str, limits: Limits = Limits()
  ):
    self._answer = answer
    self.name = name
    self.limits = limits
    self._lock = threading.Lock()

  def __call__(self, request: Any) -> dict[str, Any]:
    questions, explain = self._checked(request)
    deadline = time.monotonic() + self.limits.seconds
    if not self._lock.acquire(timeout=self.limits.seconds):
      raise self._too_long(0, len(questions))
    answers = []
    try:
      for question in questions:
        if time.monotonic() > deadline:
          raise self._too_long(len(answers), len(questions))
        answers.append(self._answered(question, explain))
    finally:
      self._lock.release()
    return {'answers': answers}

  def about(self) -> dict[str, Any]:
    """Returns what is known of the model, for the page."""
    return {
      'model': self.name,
      'step': self._answer.step,
      'limits': dataclasses.asdict(self.limits),
    }

  def _answered(self, question: str, explain: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
      'question': question,
      'answer': self._answer(question),
    }
    pieces = self._answer.explain(question) if explain else None
    if pieces is not None:
      found['pieces'] = list(map(dataclasses.asdict, pieces))
    return found

  def _checked(self, request: Any) -> tuple[list[str], bool]:
    """The questions of a request, and whether they are explained."""
    limits = self.limits
    fields = request if isinstance(request, dict) else {}
    questions, explain = fields.get('questions'), fields.get('explain', False)
    is_list = isinstance(questions, list) and isinstance(explain, bool)
    if not is_list or not set(fields) <= {'questions', 'explain'}:
      raise RefusedError(
        http.HTTPStatus.BAD_REQUEST,
        'A request must be {"questions": ["..."], "explain": true or false}, but '
        f'is {json.dumps(request)[:80]}. Correct it.',
      )
    if not 1 <= len(questions) <= limits.questions:
      raise RefusedError(
        http.HTTPStatus.BAD_REQUEST,
        f'A request must have 1 to {limits.questions} questions, but has '
        f'{len(questions)}. Send several requests.',
      )
    for number, question in enumerate(questions):
      is_text = isinstance(question, str) and question.strip()
      if not is_text or len(question) > limits.characters:
        raise RefusedError(
          http.HTTPStatus.BAD_REQUEST,
          f'A question must be a text of 1 to {limits.characters:,} characters, '
          f'but number {number} is {json.dumps(question)[:80]}. Correct it.',
        )
    return questions, explain

  def _too_long(self, done: int, wanted: int) -> RefusedError:
    return RefusedError(
      http.HTTPStatus.SERVICE_UNAVAILABLE,
      f'A request must be answered within {self.limits.seconds:g} s, but {done} '
      f'of {wanted} questions were. Ask fewer, or ask again later.',
    )


class Server(http.server.ThreadingHTTPServer):
  """An HTTP server of this machine alone.

  Args:
    port: where it listens; 0 takes any free port.

  Attributes:
    service: answers the requests; it must be set before the first one.

  Raises:
    OSError: another program listens there.
  """

  daemon_threads = True
  service: Service

  def __init__(self, port: int):
    super().__init__((_HOST, port), _Handler)

  @property
  def address(self) -> str:
    """What to type into a browser."""
    return f'http://{_HOST}:{self.server_port}/'

  def handle_error(self, request, client_address):
    """A client that left before its answer is no error."""
    if not isinstance(sys.exception(), ConnectionError | TimeoutError):
      super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
  """Answers one request of a browser or a program."""

  server: Server
  protocol_version = 'HTTP/1.1'
  # Seconds that a client may be silent while it sends its request.
  timeout: ClassVar[float] = 10.0
  server_version, sys_version = 'mowe', ''

  def do_GET(self):
    if self._is_elsewhere():
      return
    if self.path == '/':
      page = importlib.resources.files(__package__) / 'page.html'
      self._send(http.HTTPStatus.OK, 'text/html', page.read_bytes())
    elif self.path == _MODEL:
      self._send_json(http.HTTPStatus.OK, self.server.service.about())
    else:
      self._refuse(
        http.HTTPStatus.NOT_FOUND,
        f'There is a page at / and there are {_MODEL} and {_ASK}, but not '
        f'{self.path[:80]}. Correct the address.',
      )

  def do_POST(self):
    if self._is_elsewhere():
      return
    try:
      answers = self.server.service(self._request())
    except RefusedError as error:
      self._refuse(error.status, str(error))
      return
    # Whoever asked learns of it, and the server goes on.
    except Exception as error:
      self._refuse(
        http.HTTPStatus.INTERNAL_SERVER_ERROR,
        f'The model must answer, but failed with: {error!r}. Try another '
        'question, or start the server again.',
      )
      return
    self._send_json(http.HTTPStatus.OK, answers)

  def log_message(self, format, *arguments):
    """Questions are nobody else's business: nothing is logged."""

  def _is_elsewhere(self) -> bool:
    """Refuses a request that was meant for another name than this machine's."""
    name = self.headers.get('Host', '').partition(':')[0]
    if name in _NAMES:
      return False
    self._refuse(
      http.HTTPStatus.FORBIDDEN,
      f'This server must be asked as {_HOST}, but was asked as {name[:80]!r}. '
      f'Open {self.server.address}.',
    )
    return True

  def _request(self) -> Any:
    """The JSON of a request to answer questions."""
    if self.path != _ASK:
      raise RefusedError(
        http.HTTPStatus.NOT_FOUND,
        f'Questions are answered at {_ASK}, but were sent to '
        f'{self.path[:80]}. Correct the address.',
      )
    # A page of another site cannot send this type without being allowed to.
    if self.headers.get_content_type() != 'application/json':
      raise RefusedError(
        http.HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
        'A request must be of type application/json, but is of '
        f'{self.headers.get_content_type()}. Set the header Content-Type.',
      )
    most = self.server.service.limits.num_bytes
    length = self.headers.get('Content-Length', '')
    is_number = length.isascii() and length.isdecimal()
    is_short = len(length) <= _MOST_DIGITS
    if not (is_number and is_short and int(length) <= most):
      raise RefusedError(
        http.HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
        f'A request must say its length, at most {most:,} bytes, but says '
        f'{length[:20] or "nothing"}. Ask fewer questions.',
      )
    try:
      return json.loads(self.rfile.read(int(length)))
    except (ValueError, RecursionError) as error:
      raise RefusedError(
        http.HTTPStatus.BAD_REQUEST,
        f'A request must be JSON, but led to: {error}. Correct it.',
      ) from error

  def _refuse(self, status, text):
    # What is left of the request was not read.
    self.close_connection = True
    self._send_json(status, {'error': text})

  def _send_json(self, status, value):
    content = json.dumps(value, ensure_ascii=False).encode('utf-8', 'replace')
    self._send(status, 'application/json', content)

  def _send(self, status, kind, content):
    self.send_response(status)
    self.send_header('Content-Type', f'{kind}; charset=utf-8')
    self.send_header('Content-Length', str(len(content)))
    self.send_header('Content-Security-Policy', _POLICY)
    self.send_header('X-Content-Type-Options', 'nosniff')
    if self.close_connection:
      self.send_header('Connection', 'close')
    self.end_headers()
    self.wfile.write(content)


def serve(load: Callable[[], ask.Answerer], name: str, port: int) -> None:
  """Answers questions until Ctrl-C or SIGTERM.

  Args:
    load: returns the trained model; called when the port is known to be free.
    name: the name of the model that the page shows.
    port: where to listen; 0 takes any free port.

  Raises:
    ValueError: another program listens there.
  """
  try:
    server = Server(port)
  except (OSError, OverflowError) as error:
    raise ValueError(
      f'The port of the server must be free, but {port} led to: {error}. Give '
      'another --port, or 0 for any that is free.'
    ) from error
  with server:
    answer = load()
    server.service = Service(answer, name)
    print('Compiling the first answer ...', flush=True)
    answer('Who?')
    print(
      f'{name}, step {answer.step}, answers at {server.address} (this machine '
      'alone). Stop it with Ctrl-C.',
      flush=True,
    )
    server.serve_forever()
