# shellcheck shell=bash
# The other scripts source this file, which makes an environment with this
# checkout installed. The variable `extras` names extras to install, such as
# '[test]'. It is no argument, because a sourced script without arguments sees
# those of its caller.
if [ -z "${VIRTUAL_ENV:-}" ]; then
  if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "mowe needs Python 3.11 or newer, but ${PYTHON:-python3} is" \
        "$("${PYTHON:-python3}" --version). Name another: PYTHON=python3.11" >&2
      exit 1
    }
    "${PYTHON:-python3}" -m venv .venv
  fi
  source .venv/bin/activate
fi
echo "Installing mowe and what it needs in $VIRTUAL_ENV"
# These are the versions with which all tests ran. CONSTRAINTS names another file
# of versions; empty, it takes the newest that setup.py allows.
constraints="${CONSTRAINTS-requirements/ci.txt}"
# Python writes the compiled form of a module when it is first imported, also
# where that is turned off: each test that starts a process imports hundreds.
unset PYTHONDONTWRITEBYTECODE
# uv installs in a third of pip's time. It does not know pip's settings, such as
# the address of a mirror, so pip does the work where uv fails or is not there.
wanted=(${constraints:+--constraint "$constraints"} -e ".${extras:-}")
pip=(python -m pip install --quiet --disable-pip-version-check)
{ "${pip[@]}" uv && python -m uv pip install --quiet "${wanted[@]}"; } ||
  "${pip[@]}" "${wanted[@]}"
