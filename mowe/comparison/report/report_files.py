"""Writes a report to files: numbers, tables, figures and one page."""

import json
import math
import os
import pathlib
from typing import Any

from mowe.comparison.report import (
  answer_comparison,
  headline,
  report_contents,
  report_figure,
  report_markdown,
  report_page,
  report_tables,
)


def write_report(
  report: report_contents.Report, folder: str | os.PathLike[str]
) -> pathlib.Path:
  """Writes the four files and returns the path of `index.html`.

  Args:
    report: the report to be written.
    folder: the folder for the files, which is made if it does not exist. Files
      of an older report are replaced.
  """
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  tables = report_tables.tables(report)
  examples = report_tables.examples(report)
  numbers = _finite(
    answer_comparison.as_json(report.results, report.questions, report.num_bins)
  )
  text = json.dumps(numbers, indent=2, ensure_ascii=False)
  _write(folder / 'results.json', text + '\n')
  report_figure.write_png(report, folder / 'comparison.png')
  said = headline.headline(report.results)
  _write(
    folder / 'report.md',
    report_markdown.render(report, said, tables, examples, 'comparison.png'),
  )
  page = report_page.render(report, said, tables, examples, numbers)
  path = folder / 'index.html'
  _write(path, page)
  return path


def _write(path: pathlib.Path, text: str) -> None:
  # A prediction may hold a lone surrogate, which UTF-8 cannot encode.
  path.write_bytes(text.encode('utf-8', 'replace'))


def _finite(tree: Any) -> Any:
  """Replaces numbers that JSON lacks, as of a diverged run, by None."""
  if isinstance(tree, dict):
    return {key: _finite(value) for key, value in tree.items()}
  if isinstance(tree, list | tuple):
    return [_finite(value) for value in tree]
  if isinstance(tree, float) and not math.isfinite(tree):
    return None
  return tree
