#!/usr/bin/env bash
# Trains on all GPUs of one machine. One process has all of them, so nothing
# needs to be told about processes. It goes on when the connection ends, and if
# it fails it starts again, up to RESTARTS times, from its newest checkpoint.
#
#   bash scripts/launch/gpu_node.sh --gin_file=gin_configs/examples/... \
#     --gin.MODEL_DIR=runs/mowe ...
#   tail -f mowe.log
#   kill "$(cat mowe.pid)"      # saves, and ends
#
# LOG (mowe.log), PID_FILE (mowe.pid) and RESTARTS (3) may be set.
set -euo pipefail
log=${LOG:-mowe.log}
pid_file=${PID_FILE:-mowe.pid}
restarts=${RESTARTS:-3}

nvidia-smi --list-gpus > /dev/null || {
  echo 'nvidia-smi finds no GPU here. Install the driver, or use mowe train.' >&2
  exit 1
}
command -v mowe > /dev/null || {
  echo "mowe is not installed here: pip install '.[gpu]'" >&2
  exit 1
}

run() {
  local child status attempt
  trap '' HUP
  # A run that has just begun may not be in `child` yet.
  trap 'stopped=yes; pkill -TERM -P "$BASHPID" || true' TERM INT
  stopped=no
  for ((attempt = 0; attempt <= restarts; attempt++)); do
    mowe train "$@" &
    child=$!
    status=0
    wait "$child" || status=$?
    # A signal ends `wait`, but not yet the run, which saves first.
    if [ "$stopped" = yes ]; then
      status=0
      wait "$child" || status=$?
    fi
    if [ "$status" = 0 ] || [ "$stopped" = yes ]; then
      break
    fi
    echo "The run ended with status $status."
  done
  return "$status"
}

touch "$log"
run "$@" >> "$log" 2>&1 < /dev/null &
echo $! > "$pid_file"
echo "Process $(cat "$pid_file") writes to $log."
