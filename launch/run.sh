#!/usr/bin/env bash
# The one entry of every host: sets the environment of a target, then runs a command again and
# again for as long as that makes sense.
#
#   launch/run.sh v5e-16 sdjax train --config configs/sd15.py --workdir /mnt/bucket/run
#
# The targets and their settings, with a reason for each, are in targets.py; which exit codes start
# the command again is in babysit.py. Options of the training belong to the command.
set -euo pipefail

if (($# < 2)); then
  echo "run.sh: error: launch/run.sh TARGET COMMAND …; python launch/targets.py lists targets" >&2
  exit 2
fi
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
# Where the rendered scripts install sdjax; elsewhere the environment that is active serves.
if [[ -d "$here/../.venv/bin" ]]; then
  PATH="$here/../.venv/bin:$PATH"
fi
settings="$(python3 "$here/targets.py" "$1")"
eval "$settings"
exec python3 "$here/babysit.py" "${@:2}"
