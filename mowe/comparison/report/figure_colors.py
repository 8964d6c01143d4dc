"""The colours of figures, on light and on dark pages."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Theme:
  """The colours of a page.

  Attributes:
    text: colour of titles.
    faint: colour of labels.
    grid: colour of the grid lines.
    page: colour of the background.
    card: colour of the background of figures.
    models: colours of the models. Each has a contrast of at least 4.5 to both
      backgrounds, and any two differ by at least 14 in CAM02-UCS, for all
      readers and for those who do not see green or red (found by a search from
      the first three).
  """

  text: str
  faint: str
  grid: str
  page: str
  card: str
  models: tuple[str, ...]

  def variables(self) -> dict[str, str]:
    """Returns the colours of figures by the names that style sheets use."""
    names = {'text': self.text, 'faint': self.faint, 'grid': self.grid}
    models = {f'model-{i}': color for i, color in enumerate(self.models)}
    return names | models


LIGHT = Theme(
  text='#1b1f24',
  faint='#59636e',
  grid='#e1e5e9',
  page='#ffffff',
  card='#f6f8fa',
  models=(
    *('#0072b2', '#bf4600', '#00704f', '#550c79', '#3d616d', '#6d0000'),
    *('#0000e7', '#55243d'),
  ),
)
DARK = Theme(
  text='#e6edf3',
  faint='#9198a1',
  grid='#2a313a',
  page='#0d1117',
  card='#151b23',
  models=(
    *('#56b4e9', '#f0803c', '#2fc69b', '#ceff18', '#5579ff', '#b6ffb6'),
    *('#499292', '#b6f3ff'),
  ),
)
