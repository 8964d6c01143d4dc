"""`mowe ask`: a trained model answers questions at the prompt."""

from collections.abc import Iterator, Sequence

from mowe.evaluation import inference
from mowe.model_folders import model_folder
from mowe.models import decoding
from mowe.stores import expert_stores
from mowe.words import routing_vocabulary


def ask(
  model: str,
  questions: Sequence[str] = (),
  *,
  prompt: str = 'question: {question}',
  num_beams: int = 1,
  max_length: int = 32,
  explain: bool = False,
  store: expert_stores.Store | None = None,
) -> list[str]:
  """Answers questions and prints the answers.

  Args:
    model: a model folder, or a checkpoint in it.
    questions: the questions. If there are none, they are read from the
      standard input, one a line, until it ends.
    prompt: the text that finetuning put around a question; `{question}` stands
      for the question.
    num_beams: number of beams of the search; 1 decodes greedily.
    max_length: maximum number of tokens of an answer, EOS included.
    explain: whether to print the expert of each word of a question, if the
      model has word experts.
    store: where the word experts lie. None: on the device, or on disk if they
      are larger than 4 GiB.

  Returns:
    The answers, in the order of the questions.

  Raises:
    ValueError: `prompt` has no `{question}`, or another name in braces.
  """
  _check_prompt(prompt)
  loaded = model_folder.load(model, store)
  vocabulary = loaded.vocabulary
  strategy = (
    decoding.Greedy()
    if num_beams == 1
    else decoding.BeamSearch(num_beams=num_beams)
  )
  generator = inference.Generator(
    loaded.model,
    loaded.params,
    strategy,
    batch_size=1,
    max_target_length=max_length,
  )
  routing = loaded.model.config.routing
  answers = []
  for question in questions or _read_lines():
    inputs = prompt.format(question=question)
    tokens = [*vocabulary.encode(inputs), vocabulary.eos_id]
    answer = vocabulary.decode(generator([tokens]).tokens[0])
    answers.append(answer)
    if questions:
      print(question)
    print(f'  {answer}')
    if explain and routing is not None:
      rows = routing.explain(inputs, vocabulary)
      print(routing_vocabulary.format_explanation(rows))
  return answers


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
