"""Tests the files of scripts/launch with commands that stand in for others'."""

import os
import pathlib
import signal
import subprocess
import time

import pytest
import yaml

_ROOT = pathlib.Path(__file__).resolve().parents[2]
_LAUNCH = _ROOT / 'scripts' / 'launch'
# Words that a shell would change if it read them once more.
_ARGUMENTS = [
  '--gin_file=gin_configs/examples/text_pretrain_t5.gin',
  "--gin.TASK_FEATURE_LENGTHS={'inputs': 64, 'targets': 32}",
  '--gin.MODEL_DIR=/mnt/share/$HOME runs',
]
_PRINT = '#!/bin/bash\nprintf "<%s>\\n" "$(basename "$0")" "$@"\n'


@pytest.fixture
def commands(tmp_path):
  """Writes commands into a folder that is searched before all others."""
  folder = tmp_path / 'bin'
  folder.mkdir()

  def write(**scripts):
    for name, text in scripts.items():
      (folder / name).write_text(text)
      (folder / name).chmod(0o755)
    return os.environ | {'PATH': f'{folder}:{os.environ["PATH"]}'}

  return write


@pytest.mark.parametrize(
  'script', sorted(_ROOT.glob('scripts/**/*.sh')), ids=lambda path: path.name
)
def test_shellcheck_finds_nothing(script):
  subprocess.run(
    ['shellcheck', '--external-sources', '--exclude=SC1091', str(script)],
    cwd=_ROOT,
    check=True,
  )


def test_yamllint_finds_nothing():
  rules = '{extends: relaxed, rules: {line-length: {max: 100}}}'
  subprocess.run(['yamllint', '-s', '-d', rules, str(_LAUNCH)], check=True)


def test_the_jobset_has_a_pod_for_each_host_of_its_slice():
  claim, jobset = yaml.safe_load_all((_LAUNCH / 'gke_tpu.yaml').read_text())
  (job,) = jobset['spec']['replicatedJobs']
  spec = job['template']['spec']
  pod = spec['template']['spec']
  shape = pod['nodeSelector']['cloud.google.com/gke-tpu-topology']
  rows, columns = map(int, shape.split('x'))
  (container,) = pod['containers']
  chips = container['resources']['limits']['google.com/tpu']
  assert spec['parallelism'] == spec['completions'] == rows * columns / chips
  volume = pod['volumes'][0]['persistentVolumeClaim']
  assert volume['claimName'] == claim['metadata']['name']
  assert claim['spec']['accessModes'] == ['ReadWriteMany']
  verb, gin_file, *_ = container['args']
  assert verb == 'train'
  assert (_ROOT / gin_file.partition('=')[2]).is_file()


def test_slurm_starts_a_process_for_each_gpu(commands, tmp_path):
  (tmp_path / '.venv' / 'bin').mkdir(parents=True)
  (tmp_path / '.venv' / 'bin' / 'activate').touch()
  script = _LAUNCH / 'slurm.sh'
  done = subprocess.run(
    ['bash', script, *_ARGUMENTS],
    env=commands(srun=_PRINT),
    cwd=tmp_path,
    stdout=subprocess.PIPE,
    text=True,
    check=True,
  )
  started = ['srun', '--gpu-bind=none', '--kill-on-bad-exit=1', 'mowe', 'train']
  assert done.stdout.split('\n')[:-1] == [
    f'<{word}>' for word in started + _ARGUMENTS
  ]
  asked = dict(
    line.removeprefix('#SBATCH --').split('=', 1)
    for line in script.read_text().splitlines()
    if line.startswith('#SBATCH')
  )
  assert asked['ntasks-per-node'] == asked['gpus-per-node']


# What a host is told is run here, in a home of its own.
_GCLOUD = r"""#!/bin/bash
echo "$*" >> "$HOME/gcloud.log"
case "$4" in
  describe) exit 1 ;;
  scp) cp "$5" "$HOME/mowe.tar.gz" ;;
  ssh) for word; do case "$word" in
    --command=*) cd; bash -c "${word#--command=}" ;;
  esac; done ;;
esac
"""
_PYTHON3 = r"""#!/bin/bash
case "$*" in
  '-m uv venv'*) mkdir -p venv/bin; cp "$HOME/print" venv/bin/mowe ;;
esac
"""


def test_a_slice_of_tpus_is_made_and_started(commands, tmp_path):
  quiet = '#!/bin/bash\n'
  environment = commands(
    gcloud=_GCLOUD, python3=_PYTHON3, sudo=quiet, mountpoint=quiet
  ) | {
    'HOME': str(tmp_path),
    'PROJECT': 'project',
    'ZONE': 'us-west4-a',
    'NAME': 'mowe',
    'TYPE': 'v5litepod-16',
    'RUNTIME': 'v2-alpha-tpuv5-lite',
    'NFS': '10.0.0.2:/share',
  }
  (tmp_path / 'print').write_text(_PRINT)
  (tmp_path / 'print').chmod(0o755)
  subprocess.run(['git', 'init', '-q', tmp_path / 'code'], check=True)
  (tmp_path / 'code' / 'setup.py').touch()
  of_git = ['git', '-c', 'user.name=a', '-c', 'user.email=a@b.c']
  for verb in (['add', '.'], ['commit', '-q', '-m', 'first']):
    subprocess.run([*of_git, *verb], cwd=tmp_path / 'code', check=True)
  subprocess.run(
    ['bash', _LAUNCH / 'tpu_vm.sh', *_ARGUMENTS],
    cwd=tmp_path / 'code',
    env=environment,
    check=True,
  )
  log, end = tmp_path / 'mowe.log', time.monotonic() + 20
  expected = [f'<{word}>' for word in ['mowe', 'train', *_ARGUMENTS]]
  while not log.exists() or log.read_text().count('\n') < len(expected):
    assert time.monotonic() < end
    time.sleep(0.01)
  assert log.read_text().split('\n')[:-1] == expected
  assert int((tmp_path / 'mowe.pid').read_text()) > 0
  assert (tmp_path / 'mowe' / 'setup.py').exists()
  asked = (tmp_path / 'gcloud.log').read_text()
  assert '--accelerator-type=v5litepod-16' in asked

  del environment['NFS']
  refused = subprocess.run(
    ['bash', _LAUNCH / 'tpu_vm.sh'],
    env=environment,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert refused.returncode != 0
  assert 'NFS: such as 10.0.0.2:/share, which all hosts' in refused.stderr


_FAILS_ONCE = r"""#!/bin/bash
if [ ! -e begun ]; then touch begun; echo failed; exit 3; fi
trap 'echo saved; exit 130' TERM
echo waiting
while true; do sleep 0.05; done
"""


def test_a_node_starts_again_and_stops_when_told(commands, tmp_path):
  environment = commands(
    mowe=_FAILS_ONCE, **{'nvidia-smi': '#!/bin/bash\necho GPU 0\n'}
  )
  subprocess.run(
    ['bash', _LAUNCH / 'gpu_node.sh', *_ARGUMENTS],
    env=environment,
    cwd=tmp_path,
    check=True,
    stdout=subprocess.DEVNULL,
  )
  log, end = tmp_path / 'mowe.log', time.monotonic() + 20

  def wait_for(word):
    while word not in log.read_text():
      assert time.monotonic() < end, log.read_text()
      time.sleep(0.01)

  wait_for('waiting')
  os.kill(int((tmp_path / 'mowe.pid').read_text()), signal.SIGTERM)
  wait_for('saved')
  assert log.read_text().split('\n')[:-1] == [
    'failed',
    'The run ended with status 3.',
    'waiting',
    'saved',
  ]


def test_a_node_without_gpus_says_so(commands, tmp_path):
  refused = subprocess.run(
    ['bash', _LAUNCH / 'gpu_node.sh'],
    env=commands(**{'nvidia-smi': '#!/bin/bash\nexit 9\n'}),
    cwd=tmp_path,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert refused.returncode == 1
  assert 'nvidia-smi finds no GPU here.' in refused.stderr
