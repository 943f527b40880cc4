#!/usr/bin/env python3
r"""Runs N processes of M devices each on one machine: a pod for the poor, and for the tests.

  python launch/local_multiprocess.py --processes 2 --devices 4 -- \
    sdjax train --config configs/shapes.py --workdir runs/shapes

Each process is told where it stands by SDJAX_COORDINATOR, SDJAX_NUM_PROCESSES and
SDJAX_PROCESS_ID; its devices are fake ones of the CPU. Lines of output begin with the process's
number. When a process fails, the others are stopped and its exit code is returned; one that ends
with 130 or 143 has been told to, and leaves the others time to save. When this program is stopped,
or killed (on Linux), so are they all.
"""

import argparse
import ctypes
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time

GRACE_S = 30                          # from SIGTERM to SIGKILL, as Slurm and Kubernetes have it
AGREED = (130, 143)                   # stopped with the others, and after the same step
PR_SET_PDEATHSIG = 1                  # linux/prctl.h


def parse_args(argv):
  parser = argparse.ArgumentParser(
      description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--processes", type=int, default=2, help="how many (default 2)")
  parser.add_argument("--devices", type=int, default=4, help="of each process (default 4)")
  parser.add_argument("--dry-run", action="store_true", help="print the commands, run nothing")
  parser.add_argument("command", nargs="+", help="after --: e.g. sdjax train --config …")
  args = parser.parse_args(argv)
  if args.processes < 1 or args.devices < 1:
    parser.error(f"--processes {args.processes} --devices {args.devices}: both must be 1 or more")
  return args


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def environments(processes, devices, port):
  """Returns per process what is added to the environment."""
  # Without LLVM's optimizations a step is compiled in two thirds of the time, and hardly slower:
  # fake devices mostly wait for each other. What XLA_FLAGS has already comes after it, and wins.
  flags = ("--xla_backend_optimization_level=0", os.environ.get("XLA_FLAGS", ""),
           f"--xla_force_host_platform_device_count={devices}")
  return [{
      "SDJAX_COORDINATOR": f"127.0.0.1:{port}",
      "SDJAX_NUM_PROCESSES": str(processes),
      "SDJAX_PROCESS_ID": str(process),
      "XLA_FLAGS": " ".join(filter(None, flags)),
      "JAX_PLATFORMS": "cpu",
      "PYTHONUNBUFFERED": "1",        # lines appear when they are written
  } for process in range(processes)]


def die_with_parent():
  """Asks Linux to kill this process when the launcher goes, even by SIGKILL."""
  if sys.platform == "linux":
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def start(command, environment):
  return subprocess.Popen(
      command, env=os.environ | environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT, text=True, errors="replace", bufsize=1,
      # A session of its own: stopping it reaches the processes that it started, too.
      start_new_session=True, preexec_fn=die_with_parent)


def copy_lines(child, number):
  for line in child.stdout:
    print(f"[{number}] {line}", end="" if line.endswith("\n") else "\n", flush=True)


def send(child, signal_number):
  try:
    os.killpg(child.pid, signal_number)
  except ProcessLookupError:
    pass                              # it has ended meanwhile


def leave_time(children):
  """Waits until all have ended, but no longer than `GRACE_S`."""
  deadline = time.monotonic() + GRACE_S
  while time.monotonic() < deadline and any(child.poll() is None for child in children):
    time.sleep(0.05)


def stop(children):
  """Ends all children and what they started: asks first, insists after `GRACE_S`."""
  for child in children:
    if child.poll() is None:
      send(child, signal.SIGTERM)
      send(child, signal.SIGCONT)     # one that stands still (SIGSTOP, Ctrl-Z) would not hear it
  leave_time(children)
  for child in children:
    send(child, signal.SIGKILL)
    child.wait()


def wait(children):
  """Returns the exit code of the first child that fails, or 0 when all have ended well."""
  while True:
    codes = [child.poll() for child in children]
    for number, code in enumerate(codes):
      if code:
        code = code if code > 0 else 128 - code        # as a shell tells of a signal
        print(f"[{number}] ended with code {code}; stopping the others", file=sys.stderr)
        if code in AGREED:
          leave_time(children)
        return code
    if None not in codes:
      return 0
    time.sleep(0.05)


def run(command, environments):
  """Runs `command` once per environment, all at once; returns an exit code."""
  children, readers = [], []
  try:
    for number, environment in enumerate(environments):
      children.append(start(command, environment))
      readers.append(threading.Thread(target=copy_lines, args=(children[-1], number), daemon=True))
      readers[-1].start()
    return wait(children)
  except OSError as error:
    print(f"local_multiprocess: error: cannot start {command[0]}: {error}", file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    return 130
  finally:
    stop(children)
    for reader in readers:
      reader.join(timeout=1)


def terminate(number, _):
  """Stops all processes, once, and ends as a program does that has been terminated."""
  signal.signal(number, signal.SIG_IGN)
  sys.exit(128 + number)


def main(argv=None):
  args = parse_args(argv)
  added = environments(args.processes, args.devices, free_port())
  if args.dry_run:
    for environment in added:
      words = [f"{name}={shlex.quote(value)}" for name, value in environment.items()]
      print(*words, shlex.join(args.command))
    return 0
  signal.signal(signal.SIGTERM, terminate)
  return run(args.command, added)


if __name__ == "__main__":
  sys.exit(main())
