#!/usr/bin/env bash
# 1 x v4-32: 4 hosts of 4 chips. What is there already stays as it is: the same
# script goes on with a run that was stopped. The command outlives this script and its connection.
set -euo pipefail

state="$(gcloud compute tpus tpu-vm describe sd15 --zone us-central2-b \
  --format 'value(state)' 2>/dev/null || true)"
if [[ -z "$state" ]]; then
  gcloud compute tpus tpu-vm create sd15 --zone us-central2-b \
    --accelerator-type v4-32 --version tpu-ubuntu2204-base
elif [[ "$state" != READY ]]; then
  echo sd15 "is $state, not READY: wait, or delete it, then start again" >&2
  exit 1
fi

gcloud compute tpus tpu-vm scp --recurse . sd15:sdjax --zone us-central2-b --worker=all
gcloud compute tpus tpu-vm ssh sd15 --zone us-central2-b --worker=all \
  --command 'cd sdjax && python3 -m pip install --quiet uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv && python3 -m uv pip install --quiet --python .venv/bin/python -e . '"'"'jax[tpu]'"'"' && sudo sh -c '"'"'echo always >/sys/kernel/mm/transparent_hugepage/enabled'"'"''
gcloud compute tpus tpu-vm ssh sd15 --zone us-central2-b --worker=all \
  --command 'cd sdjax || exit; SDJAX_COORDINATOR=auto nohup launch/run.sh v4-32 sdjax train --config configs/sd15.py:res=256 --workdir '"'"'/mnt/bucket/a run'"'"' '"'"'--config.data.caption_column=it'"'"'"'"'"'"'"'"'s $HOME & "IMAGE"'"'"' </dev/null >>run.log 2>&1 &'
gcloud compute tpus tpu-vm ssh sd15 --zone us-central2-b --worker=0 \
  --command 'tail -n 100 -F sdjax/run.log'
