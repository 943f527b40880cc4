#!/usr/bin/env bash
# 1 x v6e-256: 64 hosts of 4 chips. What is there already stays as it is: the same
# script goes on with a run that was stopped. The command outlives this script and its connection.
set -euo pipefail

gcloud compute tpus queued-resources describe sd15 --zone us-east5-b >/dev/null 2>&1 ||
  gcloud compute tpus queued-resources create sd15 --zone us-east5-b --node-id sd15 \
    --accelerator-type v6e-256 --runtime-version v2-alpha-tpuv6e
state=""
until [[ "$state" == ACTIVE ]]; do
  if [[ "$state" == FAILED || "$state" == SUSPENDED ]]; then
    echo sd15 "is $state: delete it, then start again" >&2
    exit 1
  fi
  sleep 20
  state="$(gcloud compute tpus queued-resources describe sd15 --zone us-east5-b \
    --format 'value(state.state)')"
done

gcloud compute tpus queued-resources scp --recurse . sd15:sdjax --zone us-east5-b --worker=all --node=all
gcloud compute tpus queued-resources ssh sd15 --zone us-east5-b --worker=all --node=all \
  --command 'cd sdjax && python3 -m pip install --quiet uv && python3 -m uv venv --quiet --allow-existing --python 3.12 .venv && python3 -m uv pip install --quiet --python .venv/bin/python -e . '"'"'jax[tpu]'"'"' && sudo sh -c '"'"'echo always >/sys/kernel/mm/transparent_hugepage/enabled'"'"''
gcloud compute tpus queued-resources ssh sd15 --zone us-east5-b --worker=all --node=all \
  --command 'cd sdjax || exit; SDJAX_COORDINATOR=auto nohup launch/run.sh v6e-256 sdjax train --config configs/sd15.py:res=256 --workdir '"'"'/mnt/bucket/a run'"'"' '"'"'--config.data.caption_column=it'"'"'"'"'"'"'"'"'s $HOME & "IMAGE"'"'"' </dev/null >>run.log 2>&1 &'
gcloud compute tpus queued-resources ssh sd15 --zone us-east5-b --worker=0 --node=0 \
  --command 'tail -n 100 -F sdjax/run.log'
