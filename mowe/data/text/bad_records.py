"""What is done about records that cannot be read: an error, or a count."""


class BadRecordError(ValueError):
  """A record cannot be read; the message has its file and its line."""


class BadRecords:
  """Takes the errors of records: raises the first one, or counts them all.

  Attributes:
    skip: whether records that cannot be read are left out.
    number: how many were left out.
    first: the messages of the first three of them.
    last: the message of the last one; '' if there is none.
  """

  _SHOWN = 3

  def __init__(self, skip: bool = False):
    self.skip = skip
    self.number = 0
    self.first: list[str] = []
    self.last = ''

  def take(self, error: BadRecordError) -> None:
    """Counts a record, or raises its error if none is to be left out."""
    if not self.skip:
      raise error
    self.number += 1
    self.last = str(error)
    if len(self.first) < self._SHOWN:
      self.first.append(str(error))

  def say(self) -> None:
    """Prints how many records were left out, if any, and why."""
    if self.number:
      what = 'record was' if self.number == 1 else 'records were'
      print(f'{self.number:,} {what} left out. The first of them:')
      print(*(f'  {message}' for message in self.first), sep='\n', flush=True)
