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
  """Answers questions; without any, reads them from the standard input.

  Args:
    model: a model folder, or a checkpoint in it.
    questions: what is asked.
    prompt: how a question was put in finetuning.
    num_beams: more than one searches with beams.
    max_length: most tokens of an answer.
    explain: show the experts of the question's words.
    store: where word experts lie; None: on the device, or on disk if their
      tables are large.

  Returns:
    The answers.
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
  try:
    has_question = '?!' in prompt.format(question='?!')
  except (LookupError, ValueError):
    has_question = False
  if not has_question:
    raise ValueError(
      'The prompt must hold {question} and nothing else in braces, but is '
      f'{prompt!r}. The default is "question: {{question}}".'
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
