"""Generates a world: invented people, facts about them, and questions.

It is a small test of memory with known right answers. Every fact stands in the
documents in several wordings, and questions ask about it in other wordings.
Finetuning sees questions about some people; validation asks about the others,
whose facts a model can only know from the documents.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np

_FIRST_NAMES = """
    Ada Adam Agnes Alan Alice Amos Anna Arthur Beth Boris Carl Cecil Clara
    Cora Daniel David Dora Edgar Edith Ella Emil Emma Eric Esther Eva Felix
    Flora Frank Fred George Gerda Grace Greta Gustav Hanna Harold Harriet Hector
    Helen Henry Hugo Ida Igor Irene Isaac Ivan Jack James Jane Jasper Joan John
    Joseph Judith Julia Karen Karl Kate Laura Leo Leon Lily Louis Lucy Luke
    Marcus Maria Mark Martin Mary Max Mia Nina Noah Nora Olga Oliver Oscar Otto
    Paul Peter Philip Rachel Ralph Robert Rosa Ruth Sam Sarah Simon Sofia
    Stella Susan Thomas Tina Victor Vera Walter Wanda William Zoe
""".split()
_FIRST_PIECES = """
    Bal Bren Cal Dor Dra Fal Fen Gar Gri Hal Hol Jar Kel Kor Lar Lor Mal
    Mor Nar Ner Ost Pel Quin Rav Ros Sal Ser Tal Tor Ul Val Ver Wil Yar Zan
    Zor
""".split()
_MIDDLE_PIECES = """
    a be bi bla da de di do e fa ga go i ka ki la le li lo ma me mi mo na ni
    no o pa ra ri ro sa si ta te ti to u va vi
""".split()
_LAST_PIECES = """
    bach bert bon dall den dor fax field gan gath hart kin land lin lo man
    mer mond nar ner nik rick ros sen ski son ston tan ter thorn ton vand vic
    well win zek
""".split()
_PROFESSIONS = """
    accountant actor architect astronomer baker banker barber biologist
    blacksmith botanist brewer butcher captain carpenter chemist chef clerk
    composer dancer dentist detective diplomat editor engineer farmer
    firefighter fisherman gardener geologist goldsmith historian journalist
    judge lawyer librarian mathematician mechanic midwife miner nurse painter
    pharmacist photographer pilot plumber poet sailor sculptor surgeon tailor
    teacher translator weaver zoologist
""".split()
_HOBBIES = """
    accordion archery badminton bagpipes ballet banjo baseball basketball
    bassoon bowling boxing canoeing cello chess clarinet cricket croquet cycling
    darts fencing fiddle flute golf guitar gymnastics harmonica harp hockey
    horn judo juggling karate lute mandolin oboe organ piano poker rowing rugby
    sailing saxophone skating skiing snooker surfing tennis trombone trumpet
    tuba ukulele viola violin volleyball wrestling
""".split()


@dataclasses.dataclass(frozen=True)
class _Relation:
  """The wordings of a relation; {n} stands for the name, {v} for the value."""

  sentences: tuple[str, ...]
  questions: tuple[str, ...]


_RELATIONS = {
  'birth_city': _Relation(
    (
      '{n} was born in {v}.',
      '{n} came into the world in the city of {v}.',
      'The city of {v} is the birthplace of {n}.',
      'The family of {n} lived in {v} at the time of the birth.',
    ),
    ('Where was {n} born?', 'What is the native city of {n}?'),
  ),
  'birth_date': _Relation(
    (
      '{n} was born on {v}.',
      'The birth of {n} is dated {v}.',
      'On {v} a child was born who was named {n}.',
      'The register of births has {n} on {v}.',
    ),
    ('When was {n} born?', 'On what date is the birthday of {n}?'),
  ),
  'profession': _Relation(
    (
      '{n} worked as a {v} for many years.',
      'By profession {n} is a {v}.',
      'After school {n} was trained as a {v}.',
      'In the town {n} is known as a good {v}.',
    ),
    ('What does {n} do for a living?', 'Which job does {n} have?'),
  ),
  'employer': _Relation(
    (
      '{n} is employed by {v}.',
      'The company {v} hired {n} some time ago.',
      '{n} has an office at {v}.',
      'Since last year {n} has been on the staff of {v}.',
    ),
    ('Which company does {n} work for?', 'Who is the employer of {n}?'),
  ),
  'hobby': _Relation(
    (
      '{n} is fond of {v} in the evenings.',
      'In the summer {n} gives lessons in {v}.',
      'The favourite pastime of {n} is {v}.',
      'Friends say that {n} is very good at {v}.',
    ),
    ('What is the hobby of {n}?', 'What does {n} like to do for fun?'),
  ),
  'award': _Relation(
    (
      '{n} was honoured with the {v}.',
      'The {v} went to {n} that year.',
      'On the wall of {n} hangs the {v}.',
      'For a life of work {n} received the {v}.',
    ),
    ('Which award did {n} win?', 'What prize has {n} been given?'),
  ),
}
RELATIONS = tuple(_RELATIONS)

# Openings of sentences, the commonest first. They are drawn with Zipf's
# frequencies.
_OPENINGS = (
  'It is known that',
  'It is said that',
  'The records of the town show that',
  'According to the newspaper,',
  'As the letters in the archive tell us,',
  'In the words of a neighbour,',
  'A short note in the library says that',
  'As far as anyone can remember,',
)
_MONTHS = """
    January February March April May June July August September October
    November December
""".split()


@dataclasses.dataclass(frozen=True)
class WorldConfig:
  """The size and the seed of a world.

  Attributes:
    num_people: number of people, who all have different last names.
    num_values: number of different values of each relation, at most 50.
    relations: the relations that people have, names from RELATIONS.
    num_templates: number of sentences about each fact, at most 4; each is a
      document.
    num_extra_mentions: number of further documents with two facts each, which
      are spread over the people by Zipf's law.
    opening_rate: fraction of the sentences that begin with an opening.
    train_share: fraction of the people whom qa_train asks about.
    seed: seed of all random choices, at least 0.

  Raises:
    ValueError: a field is out of range.
  """

  num_people: int = 1000
  num_values: int = 50
  relations: tuple[str, ...] = RELATIONS[:5]
  num_templates: int = 3
  num_extra_mentions: int = 1000
  opening_rate: float = 0.25
  train_share: float = 0.7
  seed: int = 0

  def __post_init__(self):
    unknown = [name for name in self.relations if name not in _RELATIONS]
    if unknown or not self.relations:
      raise ValueError(
        f'relations must be some of {RELATIONS}, but are {self.relations}. '
        'Choose among these.'
      )
    limits = {
      'num_people': (2, 20_000),
      'num_values': (2, 50),
      'num_templates': (1, 4),
      'num_extra_mentions': (0, 10_000_000),
      'opening_rate': (0, 1),
      'train_share': (0, 1),
      'seed': (0, 2**31),
    }
    for name, (low, high) in limits.items():
      if not low <= getattr(self, name) <= high:
        raise ValueError(
          f'{name} must be from {low} to {high}, but is '
          f'{getattr(self, name)}. Choose a value in between.'
        )


@dataclasses.dataclass(frozen=True)
class World:
  """The records of a world.

  Attributes:
    documents: records with the fields text, spans (the answers in the text,
      [start, end] in characters), entity and relations.
    qa_train: records with the fields question, answers, relation and entity,
      for finetuning.
    qa_validation: records with the same fields, about other people.
  """

  documents: list[dict[str, Any]]
  qa_train: list[dict[str, Any]]
  qa_validation: list[dict[str, Any]]


def make_world(config: WorldConfig) -> World:
  """Generates a world. The same config gives the same world."""
  rng = np.random.default_rng([config.seed, 20231118])
  people = _draw_names(config.num_people, rng)
  values = {
    name: _draw_values(name, config.num_values, rng)
    for name in config.relations
  }
  facts = [
    {name: _pick(values[name], rng) for name in config.relations}
    for _ in people
  ]
  documents = list(_write_documents(config, people, facts, rng))
  documents = [documents[index] for index in rng.permutation(len(documents))]
  questions = [
    list(_ask(person, known, rng))
    for person, known in zip(people, facts, strict=True)
  ]
  order = rng.permutation(config.num_people)
  num_train = round(config.num_people * config.train_share)
  train, validation = (
    [question for person in part for question in questions[person]]
    for part in (order[:num_train], order[num_train:])
  )
  return World(documents, train, validation)


def write_world(
  config: WorldConfig, folder: str | os.PathLike
) -> dict[str, pathlib.Path]:
  """Writes documents.jsonl, qa_train.jsonl, qa_validation.jsonl, world.json.

  world.json holds the config and the sha256 of the other files. The same config
  gives the same bytes.

  Returns:
    The paths of the three .jsonl files, by their names without the ending.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  world = make_world(config)
  paths, digests = {}, {}
  for name, records in vars(world).items():
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    content = ''.join(line + '\n' for line in lines).encode()
    paths[name] = folder / f'{name}.jsonl'
    paths[name].write_bytes(content)
    digests[name] = hashlib.sha256(content).hexdigest()
  summary = {'config': dataclasses.asdict(config), 'sha256': digests}
  (folder / 'world.json').write_text(json.dumps(summary, indent=2) + '\n')
  return paths


def _write_documents(
  config: WorldConfig,
  people: list[str],
  facts: list[dict[str, str]],
  rng: np.random.Generator,
) -> Iterator[dict[str, Any]]:
  for person, known in zip(people, facts, strict=True):
    for relation in config.relations:
      for template in _RELATIONS[relation].sentences[: config.num_templates]:
        sentence = (relation, template, known[relation])
        yield _document(config, person, [sentence], rng)
  mentioned = rng.choice(
    len(people), config.num_extra_mentions, p=_zipf(len(people))
  )
  for person in mentioned.tolist():
    num_facts = min(2, len(config.relations))
    chosen = rng.choice(len(config.relations), num_facts, replace=False)
    sentences = []
    for relation in (config.relations[index] for index in chosen):
      templates = _RELATIONS[relation].sentences[: config.num_templates]
      sentences.append(
        (relation, _pick(templates, rng), facts[person][relation])
      )
    yield _document(config, people[person], sentences, rng)


def _document(
  config: WorldConfig,
  person: str,
  sentences: list[tuple[str, str, str]],
  rng: np.random.Generator,
) -> dict[str, Any]:
  text, spans = '', []
  for _, template, value in sentences:
    template = _with_article(template, value)
    if rng.random() < config.opening_rate:
      opening = _OPENINGS[rng.choice(len(_OPENINGS), p=_zipf(len(_OPENINGS)))]
      if not template.startswith('{n}'):
        template = template[0].lower() + template[1:]
      template = f'{opening} {template}'
    text += ' ' if text else ''
    before, after = template.split('{v}')
    before, after = before.format(n=person), after.format(n=person)
    spans.append([len(text + before), len(text + before + value)])
    text += before + value + after
  return {
    'text': text,
    'spans': spans,
    'entity': person,
    'relations': [relation for relation, _, _ in sentences],
  }


def _ask(
  person: str, known: dict[str, str], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
  for relation, value in known.items():
    question = _pick(_RELATIONS[relation].questions, rng)
    yield {
      'question': question.format(n=person),
      'answers': [value],
      'relation': relation,
      'entity': person,
    }


def _with_article(template: str, value: str) -> str:
  vowel = value[0] in 'aeiou'
  return template.replace(' a {v}', ' an {v}') if vowel else template


def _draw_names(count: int, rng: np.random.Generator) -> list[str]:
  """Draws full names: first names by Zipf's law, different last names."""
  shapes = [(_FIRST_PIECES, _LAST_PIECES)]
  shapes += [(_FIRST_PIECES, _MIDDLE_PIECES, _LAST_PIECES)]
  last_names: dict[str, None] = {}  # A set would not keep the order.
  while len(last_names) < count:
    shape = shapes[int(rng.integers(2))]
    last_names[''.join(_pick(pieces, rng) for pieces in shape)] = None
  weights = _zipf(len(_FIRST_NAMES))
  firsts = rng.choice(len(_FIRST_NAMES), count, p=weights)
  return [
    f'{_FIRST_NAMES[first]} {last}'
    for first, last in zip(firsts.tolist(), last_names, strict=True)
  ]


def _draw_values(
  relation: str, count: int, rng: np.random.Generator
) -> list[str]:
  if relation == 'profession':
    return _sample(_PROFESSIONS, count, rng)
  if relation == 'hobby':
    return _sample(_HOBBIES, count, rng)
  values: dict[str, None] = {}
  while len(values) < count:
    values[_invent(relation, rng)] = None
  return list(values)


def _invent(relation: str, rng: np.random.Generator) -> str:
  if relation == 'birth_date':
    day, year = int(rng.integers(1, 29)), int(rng.integers(1900, 2000))
    return f'{day} {_pick(_MONTHS, rng)} {year}'
  name = _pick(_FIRST_PIECES, rng) + _pick(_MIDDLE_PIECES, rng)
  endings = {
    'birth_city': ('ville', 'burg', 'port', 'ford', 'haven', 'bridge'),
    'employer': (' Works', ' Bank', ' Mills', ' Press', ' Brothers'),
    'award': (' Medal', ' Prize', ' Cup', ' Cross', ' Ribbon'),
  }
  return name + _pick(endings[relation], rng)


def _zipf(count: int) -> np.ndarray:
  weights = 1 / np.arange(1, count + 1)
  return weights / weights.sum()


def _pick(things: Any, rng: np.random.Generator) -> Any:
  return things[int(rng.integers(len(things)))]


def _sample(
  things: list[str], count: int, rng: np.random.Generator
) -> list[str]:
  order = rng.choice(len(things), count, replace=False)
  return [things[index] for index in order.tolist()]
