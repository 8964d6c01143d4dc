"""Pages must have no fault that axe-core finds, and nothing that is cut off.

They are opened in a headless Chromium: that of `playwright install chromium`,
or the one that the environment variable MOWE_CHROMIUM names.
"""

import os
import pathlib
import sys
import threading

import pytest

from mowe.commands.serving import server
from mowe.comparison.report import report_files
from mowe.words import routing_vocabulary

sys.path.append(str(pathlib.Path(__file__).parent / 'comparison' / 'report'))
import made_up_answers  # noqa: E402

_axe = pytest.importorskip(
  'axe_playwright_python.sync_playwright',
  reason='needs the extra [browser]',
)


@pytest.fixture(scope='module')
def browser():
  from playwright import sync_api

  with sync_api.sync_playwright() as playwright:
    try:
      browser = playwright.chromium.launch(
        executable_path=os.environ.get('MOWE_CHROMIUM'), args=['--no-sandbox']
      )
    except sync_api.Error as error:
      pytest.skip(f'no Chromium can be started: {str(error).splitlines()[0]}')
    yield browser
    browser.close()


@pytest.fixture(scope='module')
def report(tmp_path_factory):
  return report_files.write_report(
    made_up_answers.whole_report(provenance=[('Command', 'mowe compare x')]),
    tmp_path_factory.mktemp('report'),
  )


class _Answerer:
  """Answers with what would be HTML, if the page took it for that."""

  step = 7

  def __call__(self, question):
    return f'{question} <b>'

  def explain(self, question):
    word = routing_vocabulary.ExplainedPiece
    return [
      word('\u2581who', 'who', 3, 5, None, 'skipped'),
      word('\u2581curie', 'curie', 8, 2, 17, 'ok'),
    ]


@pytest.fixture
def served():
  with server.Server(0) as running:
    limits = server.Limits(questions=3, characters=90, seconds=5.0)
    running.service = server.Service(_Answerer(), 'runs/a', limits)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield f'http://127.0.0.1:{running.server_port}/'
    running.shutdown()
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize('width', [390, 1280])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_served_model_can_be_asked(browser, served, width, scheme):
  page = browser.new_page(
    viewport={'width': width, 'height': 900}, color_scheme=scheme
  )
  page.goto(served)
  page.get_by_role('heading', name='runs/a').wait_for()
  page.get_by_label('Question').fill('Who was Curie?')
  page.get_by_role('button', name='Ask').click()
  page.get_by_text('Who was Curie? <b>').wait_for()
  page.get_by_role('cell', name='17', exact=True).wait_for()
  found = _axe.Axe().run(page)
  assert found.violations_count == 0, found.generate_report()
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  page.close()


@pytest.mark.slow
@pytest.mark.parametrize('width', [390, 1280])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_a_report_has_no_fault(browser, report, width, scheme):
  page = browser.new_page(
    viewport={'width': width, 'height': 900}, color_scheme=scheme
  )
  page.goto(report.as_uri())
  found = _axe.Axe().run(page)
  assert found.violations_count == 0, found.generate_report()
  assert page.evaluate('document.documentElement.scrollWidth') <= width
  # Texts of figures lie within their figures.
  cut = page.evaluate(
    """[...document.querySelectorAll('figure svg')].flatMap(svg => {
      const whole = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('text')].filter(text => {
        const part = text.getBoundingClientRect();
        return part.left < whole.left - 1 || part.right > whole.right + 1;
      }).map(text => text.textContent);
    })"""
  )
  assert cut == []
  page.close()
