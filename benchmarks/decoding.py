"""Times answers to short questions against `generate` of transformers.

  python -m benchmarks.decoding
  python -m benchmarks.decoding --vocab_size 32128

A tiny T5 1.1 with random parameters answers greedily; EOS is never the most
probable token, so that every answer has its full length. The model of
transformers reads the same weights from a folder that `mowe convert` would
write, and gets its questions as one tensor for each batch; ours goes the whole
way from lists of tokens to lists of tokens. All contenders take turns. Answers
must be equal, token by token. Beam search, word experts (each token id stands
for a word) and Switch are timed for ours alone. The last line is the time of
theirs over ours, each with its best batch.
"""

import argparse
import dataclasses
import functools
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mowe.evaluation import inference
from mowe.interop import huggingface
from mowe.layers.memory import word_experts
from mowe.layers.mixtures import moe
from mowe.layers.routers import tokens_choose
from mowe.models import decoding, initialization, threefry
from mowe.models.families import families
from mowe.models.t5 import t5, t5_config
from mowe.words import base_vocabulary

# A function from questions <int32>[questions, length] to answers of this shape.
Answer = Callable[[np.ndarray], np.ndarray]

_NUM_WORD_EXPERTS = 2048
_NUM_SWITCH_EXPERTS = 8


@dataclasses.dataclass(frozen=True)
class EachTokenAWord:
  """A `model_config.Routing` in which a token id stands for a word."""

  num_experts: int

  def encoder_ids(self, tokens, segment_ids=None):
    del segment_ids
    return tokens % self.num_experts

  def decoder_ids(self, tokens, segment_ids=None):
    return self.encoder_ids(tokens, segment_ids)

  def decoder_step(self, tokens, state):
    return self.encoder_ids(tokens), state

  def initial_state(self, batch):
    return jnp.zeros((batch, 2), jnp.uint32)


def configs(vocab_size: int) -> dict[str, t5_config.T5Config]:
  """Returns T5 tiny, and the same with sparse middle blocks of equal width."""
  dense = t5_config.T5Config(
    vocab_size=vocab_size,
    emb_dim=64,
    num_heads=4,
    head_dim=16,
    mlp_dim=128,
    num_encoder_layers=3,
    num_decoder_layers=3,
  )
  sparse = functools.partial(
    dataclasses.replace,
    dense,
    sparse_encoder_layers=(1,),
    sparse_decoder_layers=(1,),
  )
  word_layer = functools.partial(
    word_experts.MoweLayer, num_experts=_NUM_WORD_EXPERTS, expert_dim=128
  )
  switch_layer = functools.partial(
    moe.MoeLayer,
    _NUM_SWITCH_EXPERTS,
    128,
    routing=tokens_choose.TokensChoose(k=1),
  )
  return {
    't5': dense,
    'mowe': sparse(
      sparse_feed_forward=word_layer,
      routing=EachTokenAWord(_NUM_WORD_EXPERTS),
    ),
    'switch': sparse(sparse_feed_forward=switch_layer),
  }


def random_parameters(model: t5.T5) -> dict[str, Any]:
  """Returns parameters with which EOS is never the most probable token."""
  params = initialization.initial_parameters(model, threefry.key(0))
  kernel = params['decoder']['logits_dense']['kernel']
  # The logit of EOS is 0, which is below the greatest of many random ones.
  changed = {'kernel': kernel.at[:, base_vocabulary.EOS_ID].set(0)}
  decoder = params['decoder'] | {'logits_dense': changed}
  return params | {'decoder': decoder}


def our_answer(
  model: t5.T5,
  params: Any,
  batch_size: int,
  targets_length: int,
  strategy: decoding.Strategy = decoding.Greedy(),
) -> Answer:
  """Returns a function that answers as an evaluation does."""

  def answer(questions):
    generator = inference.Generator(
      model,
      params,
      strategy=strategy,
      batch_size=batch_size,
      max_target_length=targets_length,
      input_lengths=(questions.shape[1],),
    )
    return np.stack(generator(list(questions)).tokens)

  return answer


def load_transformers(
  config: t5_config.T5Config, params: Any, targets_length: int
) -> Callable[[int], Answer]:
  """Converts the model, and returns a function from batch sizes to Answers.

  Raises:
    ImportError: transformers or torch is not installed.
  """
  try:
    import torch
    import transformers
  except ImportError as error:
    raise ImportError(
      'The comparison needs transformers and torch, but one of them cannot be '
      f'imported ({error}). Run `pip install torch transformers`, or pass '
      '--ours_only.'
    ) from error
  with tempfile.TemporaryDirectory() as parent:
    folder = pathlib.Path(parent) / 'model'
    huggingface.save(folder, config, params)
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder)
  model.eval()
  print(
    f'transformers {transformers.__version__}, torch {torch.__version__}, '
    f'{torch.get_num_threads()} threads'
  )

  def answer(questions, batch_size):
    outputs = []
    with torch.inference_mode():
      for batch in torch.from_numpy(questions).long().split(batch_size):
        outputs.append(
          model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=targets_length,
            do_sample=False,
            num_beams=1,
          )
        )
    # Their answers begin with the decoder's first input.
    return torch.cat(outputs)[:, 1:].numpy()

  return lambda batch_size: functools.partial(answer, batch_size=batch_size)


def take_turns(
  contenders: dict[str, tuple[Answer, np.ndarray]], repeats: int
) -> tuple[dict[str, list[float]], dict[str, np.ndarray]]:
  """Returns seconds per question, and the answers, of every contender.

  Args:
    contenders: for each name how it answers, and its questions.
    repeats: number of rounds that are timed, after one that is not.
  """
  times = {name: [] for name in contenders}
  answers = {}
  for round_number in range(repeats + 1):
    names = list(contenders)
    # Every other round is reversed, so that nobody always follows the same one.
    for name in names if round_number % 2 else reversed(names):
      answer, questions = contenders[name]
      start = time.perf_counter()
      answers[name] = answer(questions)
      seconds = time.perf_counter() - start
      if round_number:
        times[name].append(seconds / len(questions))
      else:
        print(f'{name}: first call {seconds:.1f} s')
  return times, answers


def check_answers(
  ours: np.ndarray, theirs: np.ndarray, name: str, targets_length: int
) -> None:
  """Raises ValueError if answers differ, or are not of full length."""
  ours = ours[: len(theirs)]
  expected = (len(theirs), targets_length)
  if ours.shape != expected or not np.array_equal(ours, theirs):
    num_equal = sum(map(np.array_equal, ours, theirs))
    raise ValueError(
      f'Answers must be equal to those of {name}, of shape {expected}, but '
      f'ours have shape {ours.shape}, theirs {theirs.shape}, and '
      f'{len(theirs) - num_equal} of them differ. Look for another --seed if '
      'it is a tie of two tokens, and for a bug otherwise.'
    )
  print(f'all {len(theirs)} answers equal to those of {name}')


def make_ours(
  arguments: argparse.Namespace, questions: np.ndarray
) -> tuple[dict[str, tuple[Answer, np.ndarray]], tuple]:
  """Returns our contenders by name, and the dense model's config and params."""
  contenders, dense = {}, None
  for kind, config in configs(arguments.vocab_size).items():
    model = families.build(config)
    params = random_parameters(model)
    make = functools.partial(
      our_answer, model, params, targets_length=arguments.targets_length
    )
    first, *others = arguments.batch_sizes
    contenders[f'{kind}, batch {first}'] = make(first), questions
    if kind != 't5':
      continue
    dense = config, params
    for size in others:
      contenders[f'{kind}, batch {size}'] = make(size), questions
    contenders[f'{kind}, batch 1'] = make(1), questions[: arguments.singles]
    beams = make(first, strategy=decoding.BeamSearch(num_beams=4))
    contenders[f'{kind}, 4 beams, batch {first}'] = beams, questions
  return contenders, dense


def main(argv: Sequence[str] | None = None) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--vocab_size', type=int, default=1000)
  parser.add_argument('--inputs_length', type=int, default=32)
  parser.add_argument('--targets_length', type=int, default=16)
  parser.add_argument('--batch_sizes', type=int, nargs='+', default=[128, 64])
  parser.add_argument('--their_batch_size', type=int, default=128)
  parser.add_argument('--questions', type=int, default=512)
  parser.add_argument(
    '--singles', type=int, default=16, help='questions asked one by one'
  )
  parser.add_argument('--repeats', type=int, default=5)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--ours_only', action='store_true')
  arguments = parser.parse_args(argv)
  rng = np.random.default_rng(arguments.seed)
  shape = arguments.questions, arguments.inputs_length
  questions = rng.integers(3, arguments.vocab_size, shape, np.int32)
  questions[:, -1] = base_vocabulary.EOS_ID
  contenders, dense = make_ours(arguments, questions)
  theirs = []
  if not arguments.ours_only:
    make_theirs = load_transformers(*dense, arguments.targets_length)
    for size in (arguments.their_batch_size, 1):
      theirs.append(f'transformers, batch {size}')
      asked = questions if size > 1 else questions[: arguments.singles]
      contenders[theirs[-1]] = make_theirs(size), asked
  times, answers = take_turns(contenders, arguments.repeats)
  ours = [f't5, batch {size}' for size in arguments.batch_sizes]
  for name in theirs:
    check_answers(
      answers[ours[0]], answers[name], name, arguments.targets_length
    )
  medians = {name: statistics.median(values) for name, values in times.items()}
  for name, seconds in medians.items():
    print(
      f'{name}: {1 / seconds:,.0f} questions/s '
      f'(best turn {1 / min(times[name]):,.0f})'
    )
  if theirs:
    best = min(medians[name] for name in ours)
    print(f'ratio={min(medians[name] for name in theirs) / best:.2f}')


if __name__ == '__main__':
  main()
