"""`mowe compare` compares the models of an experiment, from text to a report.

It prepares the data, sizes the models, and trains and measures each run (a
model with a seed) in a process of its own. What is finished is not done again,
so that a comparison that was stopped continues where it was.
"""

import dataclasses
import pathlib
import tempfile
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from mowe.comparison import (
  experiments,
  measurements,
  model_sizes,
  planned_runs,
  provenance,
  question_files,
  rate_choice,
  run_process,
  single_run,
)
from mowe.comparison.report import (
  aligned_table,
  answer_comparison,
  report_contents,
  report_files,
  report_tables,
  table_cells,
)
from mowe.model_folders import model_folder
from mowe.words import subword_vocabularies


@dataclasses.dataclass(frozen=True)
class Compared:
  """What a comparison made.

  Attributes:
    results: the results of each model, in the order of the experiment.
    questions: the questions that the report is about.
    tables: the tables of the report.
    page: path of the report's index.html.
  """

  results: list[answer_comparison.ModelResult]
  questions: list[answer_comparison.Question]
  tables: list[table_cells.Table]
  page: pathlib.Path


def compare(
  experiment: experiments.Experiment,
  *,
  dry_run: bool = False,
  as_measured: bool = False,
) -> Compared | None:
  """Does all runs of an experiment that are not done, and writes the report.

  Args:
    experiment: the experiment whose models are compared.
    dry_run: sizes the models, prints what would be run, and stops. Nothing is
      written: data that are not there yet have a stand-in of the same sizes.
    as_measured: trains no model, and takes the measurements that are there,
      though an earlier version or other settings may have made them. The report
      says how many of them are such.

  Returns:
    The results; None after a dry run.

  Raises:
    ValueError: a setting cannot work, before anything is trained; a run
      failed; or one was never measured, with `as_measured`.
    PlaceInUseError: another process is doing an experiment in this output.
    KeyboardInterrupt: a signal was received. The same call continues.
  """
  folder = pathlib.Path(experiment.output)
  if dry_run and not experiment.data.is_prepared(folder / 'data'):
    _say_sizes(experiment)
    return None
  with run_process.only_one(folder) as lock:
    prepared = experiment.data.prepare(folder / 'data')
    plan = planned_runs.Plan(experiment, prepared)
    for tries in plan.tries.values():
      for run in tries:
        single_run.check_folders(run)
    _say(plan)
    if dry_run:
      return None
    if as_measured:
      return _report_as_measured(experiment, prepared, plan)
    chosen = {}
    with run_process.Runner(lock) as runner:
      for name, tries in plan.tries.items():
        _do(runner, tries)
        chosen[name] = _choose(experiment, tries)
      # The other seeds come last, because a run of every model is worth more
      # than all seeds of one.
      for name, choice in chosen.items():
        _do(runner, plan.runs(name, choice.number))
    return _report(experiment, prepared, plan, chosen)


def show(compared: Compared) -> None:
  """Prints the main tables, and where the report is."""
  for table in compared.tables:
    if table.is_main:
      print(f'\n{aligned_table.aligned(table.rows)}')
  print(f'\nTables, figures and page: {compared.page}')


def _do(runner: run_process.Runner, runs: Sequence[planned_runs.Run]) -> None:
  for run in runs:
    if not single_run.is_finished(run):
      runner.do(run)


def _report_as_measured(experiment, prepared, plan) -> Compared:
  """The report of the measurements that are there; see `compare`."""
  asked = set(experiment.questions)
  if experiment.tuning is not None:
    asked |= set(experiment.tuning.questions)
  chosen, taken = {}, {}
  for name, tries in plan.tries.items():
    _check_measured(tries, asked)
    chosen[name] = _choose(experiment, tries)
    of_seeds = plan.runs(name, chosen[name].number)
    _check_measured(of_seeds, asked)
    taken |= {run.folder: run for run in (*tries, *of_seeds)}
  others = sum(not single_run.is_finished(run) for run in taken.values())
  notes = ()
  if others:
    notes = (
      f'{others} of {len(taken)} runs were measured by an earlier version or '
      'with other settings than those of the experiment now.',
    )
  try:
    return _report(experiment, prepared, plan, chosen, notes)
  except KeyError as error:
    raise ValueError(
      'With --as_measured the measurements must have all that is reported now, '
      f'but some lack {error}. Leave the option out to measure again.'
    ) from error


def _check_measured(
  runs: Sequence[planned_runs.Run], asked: Collection[str]
) -> None:
  """Raises ValueError unless all runs have answered these questions."""
  for run in runs:
    folder = pathlib.Path(run.folder)
    if not single_run.is_measured(run):
      names = f'{measurements.RESULTS} and {measurements.QUESTIONS}'
      raise ValueError(
        f'With --as_measured every run must have been measured, but {folder} '
        f'does not have {names}. Leave the option out to train it, or copy them '
        'there.'
      )
    answered = {line['task'] for line in measurements.read_answers(folder)}
    if not asked <= answered:
      raise ValueError(
        f'With --as_measured every run must have answered {sorted(asked)}, but '
        f'{folder} has answers to {sorted(answered)} alone. Leave the option '
        'out to ask again.'
      )


def _choose(experiment, tries) -> rate_choice.Choice:
  tuning = experiment.tuning
  choice = rate_choice.choose(tries, tuning.questions if tuning else ())
  for one in choice.tries:
    print(
      f'{tries[0].name}, {one.label}: EM {one.em:.1f}  F1 {one.f1:.1f} on the '
      f'questions for choosing{", chosen" if one.is_chosen else ""}',
      flush=True,
    )
  return choice


def _say(plan: planned_runs.Plan) -> None:
  print('\nModels:')
  for sized in plan.sized:
    tries = plan.tries[sized.model.name]
    # The runs with other seeds are not known before all tries are done.
    done = sum(map(single_run.is_finished, tries))
    runs = f'{done} of {plan.num_runs(sized.model.name)} runs finished'
    print(_size_in_words(sized, len(tries), runs), flush=True)


def _say_sizes(experiment: experiments.Experiment) -> None:
  """Prints the models as `_say` does, when none of their data is there."""
  with tempfile.TemporaryDirectory() as folder:
    stand_in = experiment.data.stand_in(pathlib.Path(folder))
    sizes = model_sizes.Sizes(experiment, stand_in)
    print('\nModels:')
    for sized in sizes.all:
      number = sizes.num_runs(sized.model)
      runs = f'{number} run{"s" if number > 1 else ""} to do'
      print(_size_in_words(sized, sizes.num_tries(sized.model), runs))
  print(
    'No data were made. Sizes that follow from counts of the text, as those of '
    'banks do, will be others.'
  )


def _size_in_words(
  sized: model_sizes.SizedModel, num_tries: int, runs: str
) -> str:
  cost = sized.cost
  note = sized.note and f'; {sized.note}'
  tried = f' {num_tries} learning rates,' if num_tries > 1 else ''
  return (
    f'  {sized.model.name}: {cost.total_parameters:,} parameters, '
    f'{cost.active_parameters:,} per token{note};{tried} {runs}'
  )


def _report(experiment, prepared, plan, chosen, notes=()) -> Compared:
  vocabulary = subword_vocabularies.load_subwords(prepared.vocabulary)
  runs = {
    name: plan.runs(name, choice.number) for name, choice in chosen.items()
  }
  first = next(iter(runs.values()))[0]
  questions = question_files.questions_of(
    first, experiment.questions, vocabulary
  )
  results = [
    _result(sized, runs[sized.model.name], questions, chosen[sized.model.name])
    for sized in plan.sized
  ]
  many = 's' if len(experiment.seeds) > 1 else ''
  seeds = ', '.join(map(str, experiment.seeds))
  made = report_contents.Report(
    title=experiment.title,
    results=results,
    questions=questions,
    notes=(
      *prepared.notes,
      *notes,
      f'{len(questions):,} questions; seed{many} {seeds}.',
    ),
    word_experts=_word_experts(runs, results, questions, vocabulary),
    num_bins=experiment.num_bins,
    provenance=provenance.lines(
      [
        measurements.read_results(pathlib.Path(run.folder))
        for of_model in runs.values()
        for run in of_model
      ],
      _tuned(experiment, results),
    ),
  )
  page = report_files.write_report(
    made, pathlib.Path(experiment.output) / experiment.report
  )
  return Compared(results, questions, report_tables.tables(made), page)


def _tuned(experiment, results) -> str:
  """What was tried for each model."""
  if experiment.tuning is None:
    return 'those of the gin files; none were tried'
  numbers = sorted({len(result.tries) for result in results})
  return (
    f'the best of {" to ".join(map(str, numbers))} tries for each model, by '
    f'questions that are not reported ({", ".join(experiment.tuning.questions)})'
  )


def _result(
  sized: model_sizes.SizedModel,
  runs: Sequence[planned_runs.Run],
  questions: Sequence[answer_comparison.Question],
  choice: rate_choice.Choice,
) -> answer_comparison.ModelResult:
  """Joins the runs of a model; curves and loads are those of the first seed."""
  of_seeds = [
    measurements.read_results(pathlib.Path(run.folder)) for run in runs
  ]
  measured = of_seeds[0]
  loads = [
    answer_comparison.Load(**(load | {'shares': tuple(load['shares'])}))
    for load in measured['loads']
  ]
  mean = lambda name: _mean([one[name] for one in of_seeds])
  return answer_comparison.ModelResult(
    name=sized.model.name,
    total_parameters=measured['total_parameters'],
    active_parameters=measured['active_parameters'],
    frozen_parameters=measured['frozen_parameters'],
    flops_formula=measured['flops_formula'],
    flops_compiled=measured['flops_compiled'],
    is_flops_least=measured['flops_has_loops'],
    answers=[question_files.answers_of(run, questions) for run in runs],
    tokens_per_second=mean('tokens_per_second'),
    peak_memory=measured['peak_memory'],
    memory_of=measured['memory_of'],
    held_out_loss=mean('held_out_loss'),
    text_loss=mean('text_loss'),
    seconds=mean('seconds'),
    curve=[tuple(point) for point in measured['curve']],
    held_out_curve=[tuple(point) for point in measured['held_out_curve']],
    recall=_recall([one['recall'] for one in of_seeds]),
    loads=loads,
    note=sized.note,
    tries=choice.tries,
    cell=sized.model.cell,
    silenced=_silenced(of_seeds, questions),
    # Runs that were measured before these numbers existed lack them.
    reads=measured.get('reads')
    and answer_comparison.Reads(**measured['reads']),
  )


def _recall(of_seeds) -> dict[str, tuple[int, ...]]:
  """Adds up what was recalled with each seed.

  Each seed masks other spans, and one may have met none of a rare kind.
  """
  return {
    kind: tuple(
      sum(one.get(kind, {}).get(name, 0) for one in of_seeds)
      for name in ('right', 'spans')
    )
    for kind in dict.fromkeys(k for one in of_seeds for k in one)
  }


def _silenced(
  of_seeds: Sequence[Mapping[str, Any]],
  questions: Sequence[answer_comparison.Question],
) -> answer_comparison.Silenced | None:
  found = [one.get('silenced') for one in of_seeds]
  if None in found:
    return None
  # The mean over all questions, of which each task has some.
  em = [[one['em'][question.task] for question in questions] for one in found]
  return answer_comparison.Silenced(
    em=float(np.mean(em)),
    text_loss=_mean([one['text_loss'] for one in found]),
    recall=_recall([one['recall'] for one in found]),
  )


def _mean(values: Sequence[float | None]) -> float | None:
  """Returns the mean of values, or None if one was not measured."""
  return None if None in values else sum(values) / len(values)


def _word_experts(
  runs, results, questions, vocabulary
) -> dict[int, Mapping[str, report_contents.WordExperts]]:
  """Returns the experts of the words of the questions that the report shows."""
  shown = answer_comparison.differing_questions(results, questions)
  experts: dict[int, dict[str, report_contents.WordExperts]] = {
    i: {} for i in shown
  }
  for name, of_model in runs.items():
    routing = _routing_of(of_model)
    if routing is None:
      continue
    for index in shown:
      rows = routing.explain(questions[index].text, vocabulary)
      # All pieces of a known word have one entry, which is shown once. Pieces
      # of other words have an entry each.
      words = dict.fromkeys(
        (routing.word(row.word_id), row.expert)
        for row in rows
        if row.word_id is not None
      )
      experts[index][name] = [
        (word.strip('▁'), expert) for word, expert in words
      ]
  return experts


def _routing_of(runs: Sequence[planned_runs.Run]):
  """The routing vocabulary of a model, which is that of all of its runs.

  None for a model without one. The measurements of a run may be all that is
  left of it; if that is so of all runs, the result is None, too.
  """
  for run in runs:
    folder, _ = model_folder.split_checkpoint_path(run.finetuned)
    if model_folder.exists(folder):
      return model_folder.load_config(folder)[0].routing
  return None
