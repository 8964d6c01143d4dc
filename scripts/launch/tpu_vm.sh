#!/usr/bin/env bash
# Trains on a slice of Cloud TPU VMs: makes the slice if it is not there, installs
# this checkout on every host and starts the run on all of them. The hosts find
# each other. Run in the checkout, the same command again goes on from the newest
# checkpoint, also on a slice that had to be made anew:
#
#   export PROJECT=my-project ZONE=us-west4-a NAME=mowe TYPE=v5litepod-16 \
#     RUNTIME=v2-alpha-tpuv5-lite NFS=10.0.0.2:/share
#   bash scripts/launch/tpu_vm.sh --gin_file=gin_configs/examples/... \
#     --gin.MODEL_DIR=/mnt/share/runs/mowe --gin.CACHE_DIR=/mnt/share/cache ...
#   gcloud compute tpus tpu-vm ssh "$NAME" --project="$PROJECT" --zone="$ZONE" \
#     --worker=0 --command='tail -f mowe.log'
#
# NFS is a share of Filestore in the same network, which all hosts mount as
# /mnt/share: MODEL_DIR and the data must be there, as all processes of a run
# read and write them. The slice costs money until it is deleted:
#
#   gcloud compute tpus tpu-vm delete "$NAME" --project="$PROJECT" --zone="$ZONE"
set -euo pipefail
: "${PROJECT:?is the project of Google Cloud}" "${ZONE:?such as us-west4-a}"
: "${NAME:?is the name of the slice}" "${TYPE:?such as v5litepod-16}"
: "${RUNTIME:?such as v2-alpha-tpuv5-lite, which fits TYPE}"
: "${NFS:?such as 10.0.0.2:/share, which all hosts can mount}"
place=(--project="$PROJECT" --zone="$ZONE")
tpu=(gcloud compute tpus tpu-vm)

on_all() {
  "${tpu[@]}" ssh "$NAME" "${place[@]}" --worker=all --command="$1"
}

if ! "${tpu[@]}" describe "$NAME" "${place[@]}" > /dev/null 2>&1; then
  "${tpu[@]}" create "$NAME" "${place[@]}" --accelerator-type="$TYPE" \
    --version="$RUNTIME"
fi

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git archive --format=tar.gz --prefix=mowe/ HEAD > "$archive"
"${tpu[@]}" scp "$archive" "$NAME":mowe.tar.gz "${place[@]}" --worker=all

# The Python of the hosts may be older than mowe needs, so uv brings one.
on_all "set -e
sudo mkdir -p /mnt/share
mountpoint -q /mnt/share || {
  sudo apt-get install -y -q nfs-common > /dev/null
  sudo mount -o rw '$NFS' /mnt/share
}
tar xzf mowe.tar.gz
python3 -m pip install --quiet --user uv
[ -x venv/bin/python ] || python3 -m uv venv --python 3.12 venv
VIRTUAL_ENV=~/venv python3 -m uv pip install --quiet \\
  --constraint mowe/requirements/ci.txt './mowe[tasks,tpu]'"

# A run that is still there saves first. Words that have spaces or quotes arrive
# on the hosts as they are.
arguments=$(printf ' %q' "$@")
on_all "cd ~/mowe
if [ -e ~/mowe.pid ] && kill \$(cat ~/mowe.pid) 2> /dev/null; then
  while kill -0 \$(cat ~/mowe.pid) 2> /dev/null; do sleep 1; done
fi
nohup ~/venv/bin/mowe train$arguments >> ~/mowe.log 2>&1 < /dev/null &
echo \$! > ~/mowe.pid"
