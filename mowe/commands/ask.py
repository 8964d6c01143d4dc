"""`mowe ask`: a trained model answers questions, in Python or at the prompt."""

from collections.abc import Iterator, Sequence

from mowe.evaluation import inference
from mowe.model_folders import model_folder
from mowe.models import decoding
from mowe.stores import expert_stores
from mowe.words import routing_vocabulary

PROMPT = 'question: {question}'


class Answerer:
  """A trained model that answers one question after the other.

  Args:
    model: a model folder, or a checkpoint in it.
    prompt: the text that finetuning put around a question; `{question}` stands
      for the question.
    num_beams: number of beams of the search; 1 decodes greedily.
    max_length: maximum number of tokens of an answer, EOS included.
    store: where the word experts lie. None: on the device, or on disk if they
      are larger than 4 GiB.

  Call: takes a question, returns the answer.

  Raises:
    ValueError: `prompt` has no `{question}`, or another name in braces.
  """

  def __init__(
    self,
    model: str,
    *,
    prompt: str = PROMPT,
    num_beams: int = 1,
    max_length: int = 32,
    store: expert_stores.Store | None = None,
  ):
    _check_prompt(prompt)
    self._prompt = prompt
    self._loaded = model_folder.load(model, store)
    self._generate = inference.Generator(
      self._loaded.model,
      self._loaded.params,
      decoding.Greedy()
      if num_beams == 1
      else decoding.BeamSearch(num_beams=num_beams),
      batch_size=1,
      max_target_length=max_length,
    )

  def __call__(self, question: str) -> str:
    vocabulary = self._loaded.vocabulary
    tokens = vocabulary.encode(self._prompt.format(question=question))
    generated = self._generate([[*tokens, vocabulary.eos_id]])
    return vocabulary.decode(generated.tokens[0])

  @property
  def step(self) -> int:
    """The step of the checkpoint that answers."""
    return self._loaded.step

  def explain(
    self, question: str
  ) -> list[routing_vocabulary.ExplainedPiece] | None:
    """Returns the pieces of a question with their experts, prompt included.

    It is None for a model without word experts.
    """
    routing = self._loaded.model.config.routing
    if routing is None:
      return None
    inputs = self._prompt.format(question=question)
    return routing.explain(inputs, self._loaded.vocabulary)


def ask(
  model: str,
  questions: Sequence[str],
  *,
  prompt: str = PROMPT,
  num_beams: int = 1,
  max_length: int = 32,
  store: expert_stores.Store | None = None,
) -> list[str]:
  """Returns the answers to questions, in their order.

  The arguments besides the questions, and the errors, are those of `Answerer`.
  """
  answer = Answerer(
    model,
    prompt=prompt,
    num_beams=num_beams,
    max_length=max_length,
    store=store,
  )
  return list(map(answer, questions))


def converse(
  answer: Answerer, questions: Sequence[str] = (), explain: bool = False
) -> None:
  """Answers questions, and prints each answer at once.

  Args:
    answer: the trained model.
    questions: the questions. If there are none, they are read from the
      standard input, one a line, until it ends.
    explain: whether to print the expert of each word of a question, if the
      model has word experts.
  """
  for question in questions or _read_lines():
    if questions:
      print(question)
    print(f'  {answer(question)}')
    rows = answer.explain(question) if explain else None
    if rows is not None:
      print(routing_vocabulary.format_explanation(rows))


def _check_prompt(prompt: str) -> None:
  # A prompt that ignores the question would not contain this one.
  try:
    has_question = '?!' in prompt.format(question='?!')
  except (LookupError, ValueError):
    has_question = False
  if not has_question:
    raise ValueError(
      'The prompt must hold {question} and nothing else in braces, but is '
      f'{prompt!r}. Give one like the default, "question: {{question}}".'
    )


def _read_lines() -> Iterator[str]:
  while True:
    try:
      line = input('question> ').strip()
    except EOFError:
      print()
      return
    if line:
      yield line
