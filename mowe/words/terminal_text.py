"""Shows texts of others without letting them steer the terminal.

A text, the name of a weight or an answer of a model may hold control characters,
which could move the cursor, overwrite what was shown, or set the window's title.
"""

import contextlib
import io
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# All control characters but line feed and tab; those that turn the direction of
# writing around; those that end a line for some programs; half characters.
_UNSAFE = re.compile(
  '[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069'
  '\ud800-\udfff]'
)


def escaped(text: str) -> str:
  r"""Returns a text with what could steer a terminal written out, as `\x1b`."""
  return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


class Harmless(io.TextIOBase):
  """A stream to which texts are written escaped.

  Attributes:
    beneath: the stream to which they go.
  """

  def __init__(self, beneath: TextIO):
    self.beneath = beneath

  def write(self, text: str) -> int:
    """Writes a text; see `escaped`."""
    shown = escaped(text)
    # What the encoding of the stream has no bytes for is written out as well.
    encoding = self.encoding or 'utf-8'
    shown = shown.encode(encoding, 'backslashreplace').decode(encoding)
    self.beneath.write(shown)
    return len(text)

  def flush(self) -> None:
    """See `io.IOBase`."""
    self.beneath.flush()

  def isatty(self) -> bool:
    """See `io.IOBase`."""
    return self.beneath.isatty()

  def fileno(self) -> int:
    """See `io.IOBase`."""
    return self.beneath.fileno()

  def writable(self) -> bool:
    """See `io.IOBase`."""
    return True

  @property
  def encoding(self) -> str:
    """See `io.TextIOBase`."""
    return self.beneath.encoding

  @property
  def buffer(self) -> Any:
    """The stream of bytes, to which nothing is written here."""
    return self.beneath.buffer


@contextlib.contextmanager
def harmless_output() -> Iterator[None]:
  """Context in which the standard output and errors are written escaped."""
  with _redirected(Harmless):
    yield


def steerable(stream: TextIO) -> TextIO:
  """Returns the stream to which a bar may write codes for a terminal."""
  return stream.beneath if isinstance(stream, Harmless) else stream


@contextlib.contextmanager
def steerable_output() -> Iterator[None]:
  """Context in which a library may show bars of its own on a terminal."""
  with _redirected(steerable):
    yield


@contextlib.contextmanager
def _redirected(change: Callable[[TextIO], Any]) -> Iterator[None]:
  """Context in which both streams are what a function makes of them."""
  with (
    contextlib.redirect_stdout(change(sys.stdout)),
    contextlib.redirect_stderr(change(sys.stderr)),
  ):
    yield
