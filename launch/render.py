"""Prints what starts a command on a target: a script, a manifest or one line, to read and to run.

  python launch/render.py local cpu-2x4 -- sdjax train --config configs/shapes.py --workdir RUN
  python launch/render.py slurm h100-8 --count 4 --name sd15 -- sdjax train … | sbatch
  python launch/render.py tpu-vm v5e-16 --name sd15 --zone ZONE -- sdjax train … | bash
  python launch/render.py queued-resources v5e-16 --count 2 --name sd15 --zone ZONE -- … | bash
  python launch/render.py jobset v5e-16 --name sd15 --image IMAGE -- … | kubectl apply -f -
  python launch/render.py xpk v5e-16 --name sd15 --image IMAGE --cluster CLUSTER -- … | bash
  python launch/render.py skypilot h100-8 --count 2 --name sd15 -- … >task.yaml

Nothing is started. On every host the command runs under launch/run.sh; what it trains is its own
affair. `python launch/targets.py` lists the targets.
"""

import argparse
import dataclasses
import re
import shlex
import sys
from collections.abc import Callable

import manifests
import targets
from manifests import MAX_RESTARTS, SAVE_S, Job

SLURM = """\
#!/usr/bin/env bash
#SBATCH --job-name={name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node=1{gpus}
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={name}-%j.out
#SBATCH --signal=B:USR1@{save_s}
#
# Nodes as a whole, with all of their memory (0). One process per node drives all of its GPUs; sdjax
# finds the others by what srun sets. A requeued job goes on from its last checkpoint. {save_s} s
# before its time is up, it requeues itself: the tasks get SIGTERM, and save.
set -euo pipefail

trap 'scontrol requeue "$SLURM_JOB_ID"' USR1
srun --kill-on-bad-exit=1 {entry} &
wait "$!" || wait "$!"                # the trap ends the first
"""

TPU = """\
#!/usr/bin/env bash
# {count} x {target}: {hosts} hosts of {chips} chips. What is there already stays as it is: the same
# script goes on with a run that was stopped. The command outlives this script and its connection.
set -euo pipefail

{create}

{tool} scp --recurse . {name}:sdjax --zone {zone} {everywhere}
{tool} ssh {name} --zone {zone} {everywhere} \\
  --command {install}
{tool} ssh {name} --zone {zone} {everywhere} \\
  --command {run}
{tool} ssh {name} --zone {zone} {first} \\
  --command 'tail -n 100 -F sdjax/run.log'
"""

# One slice, now or never.
CREATE = """\
state="$(gcloud compute tpus tpu-vm describe {name} --zone {zone} \\
  --format 'value(state)' 2>/dev/null || true)"
if [[ -z "$state" ]]; then
  gcloud compute tpus tpu-vm create {name} --zone {zone} \\
    --accelerator-type {accelerator} --version {version}{spot}
elif [[ "$state" != READY ]]; then
  echo {name} "is $state, not READY: wait, or delete it, then start again" >&2
  exit 1
fi"""

# As many slices as wanted, when Google has them.
QUEUE = """\
gcloud compute tpus queued-resources describe {name} --zone {zone} >/dev/null 2>&1 ||
  gcloud compute tpus queued-resources create {name} --zone {zone} {nodes} \\
    --accelerator-type {accelerator} --runtime-version {version}{spot}
state=""
until [[ "$state" == ACTIVE ]]; do
  if [[ "$state" == FAILED || "$state" == SUSPENDED ]]; then
    echo {name} "is $state: delete it, then start again" >&2
    exit 1
  fi
  sleep 20
  state="$(gcloud compute tpus queued-resources describe {name} --zone {zone} \\
    --format 'value(state.state)')"
done"""

# What xpk 1.16 does not know, or cuts to two hosts of four chips.
NOT_IN_XPK = ("v5e-4", "v5e-8", "v6e-8")

# Without huge pages the TPU's runtime is slow to start and to stop, as JAX warns.
HUGE_PAGES = "sudo sh -c 'echo always >/sys/kernel/mm/transparent_hugepage/enabled'"


def local(job: Job) -> str:
  command = job.command
  if job.processes > 1:
    command = ["python3", "launch/local_multiprocess.py", "--processes", str(job.processes),
               "--devices", str(job.target.chips_per_host), "--", *command]
  # In place of the shell, so that signals reach it.
  return "exec " + shlex.join(["launch/run.sh", job.target_name, *command]) + "\n"


def slurm(job: Job) -> str:
  gpus = f"\n#SBATCH --gpus-per-node={job.target.chips_per_host}"
  return SLURM.format(
      name=job.name, nodes=job.processes, gpus=gpus if job.target.platform == "gpu" else "",
      save_s=SAVE_S, entry=shlex.join(job.entry))


def tpu_script(job: Job, create: str, tool: str, everywhere: str, first: str) -> str:
  one_or_more = f"--node-id {job.name}" if job.count == 1 else (
      f"--node-count {job.count} --node-prefix {job.name}")
  zone = shlex.quote(job.zone)
  create = create.format(
      name=job.name, zone=zone, nodes=one_or_more, accelerator=job.target.accelerator,
      version=job.target.runtime_version, spot=" --spot" if job.spot else "")
  # A TPU machine knows its slice, and JAX asks it.
  auto = "SDJAX_COORDINATOR=auto " if job.processes > 1 else ""
  run = f"{auto}nohup {shlex.join(job.entry)} </dev/null >>run.log 2>&1 &"
  return TPU.format(
      count=job.count, target=job.target_name, hosts=job.processes,
      chips=job.target.chips_per_host, name=job.name, zone=zone, create=create, tool=tool,
      everywhere=everywhere, first=first,
      install=shlex.quote(f"cd sdjax && {manifests.install('tpu')} && {HUGE_PAGES}"),
      run=shlex.quote(f"cd sdjax || exit; {run}"))


def tpu_vm(job: Job) -> str:
  return tpu_script(job, CREATE, "gcloud compute tpus tpu-vm", "--worker=all", "--worker=0")


def queued_resources(job: Job) -> str:
  return tpu_script(
      job, QUEUE, "gcloud compute tpus queued-resources", "--worker=all --node=all",
      "--worker=0 --node=0")


def xpk(job: Job) -> str:
  words = {
      "--cluster": job.cluster, "--workload": job.name, "--tpu-type": job.target.accelerator,
      "--num-slices": str(job.count), "--docker-image": job.image,
      # Beyond 42 and 127 to 255, on which xpk starts again by itself.
      "--max-restarts": str(MAX_RESTARTS), "--restart-on-exit-codes": "1",
      "--termination-grace-period-seconds": str(SAVE_S),
      "--command": ("SDJAX_COORDINATOR=auto " if job.processes > 1 else "") + shlex.join(job.entry),
  }
  lines = [f"{option} {shlex.quote(value)}" for option, value in words.items()]
  return " \\\n  ".join(["xpk workload create", *lines]) + "\n"


@dataclasses.dataclass(frozen=True)
class Launcher:
  """How to start on one kind of place: what prints it, for which platforms, with which options."""
  render: Callable[[Job], str]
  platforms: tuple[str, ...]
  needs: tuple[str, ...] = ()
  takes: tuple[str, ...] = ()


LAUNCHERS = {
    "local": Launcher(local, ("cpu", "gpu", "tpu")),
    "slurm": Launcher(slurm, ("cpu", "gpu"), ("name",), ("count",)),
    "tpu-vm": Launcher(tpu_vm, ("tpu",), ("name", "zone"), ("spot",)),
    "queued-resources": Launcher(
        queued_resources, ("tpu",), ("name", "zone"), ("count", "spot")),
    "jobset": Launcher(
        manifests.jobset, ("tpu", "gpu"), ("name", "image"), ("count", "spot", "bucket")),
    "xpk": Launcher(xpk, ("tpu",), ("name", "image", "cluster"), ("count",)),
    "skypilot": Launcher(manifests.skypilot, ("tpu", "gpu"), ("name",), ("count", "spot")),
}


def parse(argv: list[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
      prog="render.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("launcher", choices=LAUNCHERS)
  parser.add_argument("target", help="one of those that launch/targets.py lists")
  parser.add_argument("--name", default="", help="of the job, and of what is created for it")
  parser.add_argument("--count", type=int, default=1, help="TPU slices, or GPU nodes (1)")
  parser.add_argument("--zone", default="", help="Google Cloud's")
  parser.add_argument("--image", default="", help="made with launch/Dockerfile")
  parser.add_argument("--cluster", default="", help="xpk's")
  parser.add_argument("--bucket", default="", help="mounted as /mnt/BUCKET in every pod")
  parser.add_argument("--spot", action="store_true", help="machines that may be taken away")
  if "--" not in argv:
    parser.error("no command: add -- sdjax train --config … --workdir …")
  cut = argv.index("--")
  args = parser.parse_args(argv[:cut])
  args.command = argv[cut + 1:]
  return args


def complaint(args: argparse.Namespace) -> str:
  """Returns what is wrong with the arguments, "" where nothing is."""
  launcher, given = LAUNCHERS[args.launcher], vars(args)
  if args.target not in targets.TARGETS:
    return f"there is no target {args.target!r}; choose one of {', '.join(targets.TARGETS)}"
  target = targets.TARGETS[args.target]
  if target.platform not in launcher.platforms:
    others = [name for name, other in LAUNCHERS.items() if target.platform in other.platforms]
    return f"{args.launcher} has no {args.target}; choose one of {', '.join(others)}"
  if missing := [name for name in launcher.needs if not given[name]]:
    return f"{args.launcher} needs {', '.join(f'--{name}' for name in missing)}"
  known = launcher.needs + launcher.takes
  defaults = {"name": "", "zone": "", "image": "", "cluster": "", "bucket": "", "spot": False,
              "count": 1}
  for name, default in defaults.items():
    if given[name] != default and name not in known:
      return f"{args.launcher} takes no --{name}; leave it out"
  if args.count < 1:
    return f"--count {args.count} must be 1 or more"
  # Kubernetes adds up to 22 characters to make the names of pods, of 63 at most.
  if args.name and not re.fullmatch("[a-z]([-a-z0-9]{0,38}[a-z0-9])?", args.name):
    return (f"--name {args.name!r} must be of lower-case letters, digits and hyphens, 40 at most, "
            "and begin with a letter")
  if args.launcher == "local" and target.platform != "cpu" and target.hosts > 1:
    return f"{args.target} has {target.hosts} hosts, of which this is one; choose tpu-vm"
  if args.launcher == "slurm" and target.platform == "cpu" and target.hosts > 1:
    return f"{args.target} is one machine; choose cpu --count {target.hosts}, or local"
  if args.launcher == "xpk" and args.target in NOT_IN_XPK:
    return f"xpk has no {args.target} that is one host; choose jobset"
  if args.launcher == "skypilot" and target.platform == "tpu" and args.count > 1:
    return f"skypilot joins no TPU slices, --count {args.count}; choose queued-resources or jobset"
  return "" if args.command else "no command: add -- sdjax train --config … --workdir …"


def main(argv: list[str]) -> int:
  args = parse(argv)
  if wrong := complaint(args):
    print(f"render.py: error: {wrong}", file=sys.stderr)
    return 2
  job = Job(args.target, args.command, args.name, args.count, args.zone, args.image, args.cluster,
            args.bucket, args.spot)
  print(LAUNCHERS[args.launcher].render(job), end="")
  return 0


if __name__ == "__main__":
  sys.exit(main(sys.argv[1:]))
