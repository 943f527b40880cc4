#!/usr/bin/env bash
# Runs one command as a JobSet on Google Kubernetes Engine, one process per TPU host:
#
#   launch/gke/launch.sh --name sd15 --image REGISTRY/sdjax --hosts 4 -- \
#     sdjax train --config configs/sd15.py --workdir /mnt/bucket/run
#
# --hosts N          pods (default 4)
# --chips N          TPU chips of each (default 4)
# --accelerator A    node pool's accelerator (default tpu-v5-lite-podslice)
# --topology T       node pool's topology (default 4x4)
# --dry-run          prints the manifest and applies nothing
set -euo pipefail

fail() {
  echo "gke/launch.sh: error: $1" >&2
  exit 2
}

name="" image="" hosts=4 chips=4 accelerator=tpu-v5-lite-podslice topology=4x4
apply=(kubectl apply -f -)
while (($#)); do
  case "$1" in
    --name | --image | --hosts | --chips | --accelerator | --topology)
      (($# >= 2)) || fail "$1 needs a value"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --dry-run) apply=(cat) && shift ;;
    --) shift && break ;;
    *) fail "unknown option $1; the command comes after --" ;;
  esac
done
[[ -n "$name" && -n "$image" ]] || fail "--name and --image are needed"
[[ "$name" =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || \
  fail "--name $name must be of lower-case letters, digits and hyphens, as Kubernetes asks"
(($#)) || fail "no command: add -- sdjax train --config … --workdir …"

# The command as a YAML list of quoted strings: no shell comes between.
list=""
for word in "$@"; do
  word="${word//\\/\\\\}"
  list+="${list:+, }\"${word//\"/\\\"}\""
done

manifest="$(<"$(dirname "$0")/jobset.yaml")"
manifest="${manifest//ACCELERATOR/"$accelerator"}"
manifest="${manifest//TOPOLOGY/"$topology"}"
manifest="${manifest//HOSTS/"$hosts"}"
manifest="${manifest//CHIPS/"$chips"}"
manifest="${manifest//NAME/"$name"}"
manifest="${manifest//IMAGE/"$image"}"
# Last: its words are the user's own, and may look like any of the above.
manifest="${manifest//COMMAND/"[$list]"}"
"${apply[@]}" <<<"$manifest"
