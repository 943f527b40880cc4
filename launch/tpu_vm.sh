#!/usr/bin/env bash
# Runs one command on all workers of a Cloud TPU slice:
#
#   launch/tpu_vm.sh --name my-v4-32 --zone us-central2-b -- \
#     sdjax train --config configs/sd15.py --workdir /mnt/bucket/run
#
# --project P   the Google Cloud project, if not gcloud's default
# --dry-run     prints the gcloud command and runs nothing
#
# The workers must have sdjax in ~/sdjax (see launch/README.md). They find each other by what
# the TPU machine knows of its slice: SDJAX_COORDINATOR=auto leaves it to JAX.
set -euo pipefail

fail() {
  echo "tpu_vm.sh: error: $1" >&2
  exit 2
}

show() {                              # prints words as a shell would read them back
  local word
  for word in "$@"; do
    if [[ "$word" =~ ^[[:alnum:]_./:=,@%+-]+$ ]]; then printf '%s ' "$word"; else printf '%s ' "${word@Q}"; fi
  done
  echo
}

name="" zone="" project=() run=()
while (($#)); do
  case "$1" in
    --name | --zone | --project)
      (($# >= 2)) || fail "$1 needs a value"
      case "$1" in
        --name) name="$2" ;;
        --zone) zone="$2" ;;
        --project) project=(--project "$2") ;;
      esac
      shift 2
      ;;
    --dry-run) run=(show) && shift ;;
    --) shift && break ;;
    *) fail "unknown option $1; the command comes after --" ;;
  esac
done
[[ -n "$name" && -n "$zone" ]] || fail "--name and --zone are needed"
(($#)) || fail "no command: add -- sdjax train --config … --workdir …"

printf -v command '%q ' "$@"
"${run[@]}" gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" "${project[@]}" --worker=all \
  --command "cd sdjax && SDJAX_COORDINATOR=auto ${command% }"
