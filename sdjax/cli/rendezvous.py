"""Where this process stands among those of its run, and what would keep them from meeting.

JAX ends a process that cannot reach the others with a stack trace and SIGABRT, minutes later. What
can be seen beforehand is therefore looked at here, without JAX, and told in one line.
"""

import contextlib
import dataclasses
import fcntl
import glob
import importlib.util
import ipaddress
import os
import re
import socket
import sys
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path

from sdjax.errors import UserError

CONTRACT = ("SDJAX_COORDINATOR", "SDJAX_NUM_PROCESSES", "SDJAX_PROCESS_ID")
# Of one step of Slurm, which is what srun starts: https://slurm.schedmd.com/srun.html
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_STEP_NUM_NODES", "SLURM_STEP_NUM_TASKS",
         "SLURM_PROCID")
LOCKFILE = Path("/tmp/libtpu_lockfile")
# gRPC, which joins the processes, reads these and no upper-case ones:
# https://github.com/grpc/grpc/blob/master/doc/environment_variables.md
PROXIES = (("grpc_proxy", "https_proxy", "http_proxy"), ("no_grpc_proxy", "no_proxy"))
TOLD_AFTER_S = 10.0


@dataclasses.dataclass(frozen=True)
class Place:
  """One process among those of a run.

  Attributes:
    host, port: of process 0.
    count: how many processes there are.
    number: which of them this is.
    hosts: how many machines they run on, 1 where that is not known.
  """
  host: str
  port: int
  count: int
  number: int
  hosts: int = 1

  @property
  def address(self) -> str:
    """`host:port`, with brackets around IPv6."""
    return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def find_place(environment: Mapping[str, str]) -> Place | None:
  """Reads SDJAX_COORDINATOR, SDJAX_NUM_PROCESSES and SDJAX_PROCESS_ID, or what srun sets.

  Returns:
    None for a run of one process.

  Raises:
    UserError: where only a part is set, or what is set makes no sense.
  """
  if given := [name for name in CONTRACT if name in environment]:
    if missing := [name for name in CONTRACT if name not in environment]:
      raise UserError(f"{given[0]} is set but {', '.join(missing)} is not; set all three or none")
    host, port = split_address(environment[CONTRACT[0]])
    hosts = int(environment.get("SLURM_STEP_NUM_NODES", "1"))
    place = Place(host, port, number(environment, CONTRACT[1]), number(environment, CONTRACT[2]),
                  hosts)
  else:
    place = slurm_place(environment)
  if place is None:
    return None
  if not 0 <= place.number < place.count:
    raise UserError(f"this is process {place.number} of {place.count}; count them from 0 to "
                    f"{max(place.count - 1, 0)} in {CONTRACT[2]}")
  return place if place.count > 1 else None


def slurm_place(environment: Mapping[str, str]) -> Place | None:
  """Returns the place of one of srun's tasks; None outside of Slurm, or where there is but one."""
  missing = [name for name in SLURM if name not in environment]
  tasks = int(environment.get("SLURM_NTASKS", "1"))
  in_step = any(name.startswith("SLURM_STEP_") for name in environment)
  if missing and (in_step or tasks > 1):
    raise UserError(
        f"this Slurm job has {tasks} tasks, but {', '.join(missing)} is not set here; start the "
        "command with srun, hand all SLURM_* variables on into a container, or unset SLURM_NTASKS "
        "to run one process")
  if missing or number(environment, "SLURM_STEP_NUM_TASKS") == 1:
    return None
  # "node[07-08,11]-ib,gpu3" begins with node07-ib.
  nodes = re.sub(r"\[([^],-]+)[^]]*\]", r"\1", environment["SLURM_STEP_NODELIST"])
  # Jobs that share a node must not share a port; ephemeral ones begin at 32768.
  port = 20_000 + number(environment, "SLURM_JOB_ID") % 12_000
  return Place(nodes.split(",")[0], port, number(environment, "SLURM_STEP_NUM_TASKS"),
               number(environment, "SLURM_PROCID"), number(environment, "SLURM_STEP_NUM_NODES"))


def number(environment: Mapping[str, str], name: str) -> int:
  """Returns the whole number that variable `name` holds."""
  try:
    return int(environment[name])
  except ValueError as error:
    raise UserError(f"{name} is {environment[name]!r}; give a whole number") from error


def split_address(address: str) -> tuple[str, int]:
  """Returns ("host", port) of "host:port"."""
  host, _, port = address.rpartition(":")
  if not host or not port.isdecimal() or not 0 < int(port) < 65536:
    raise UserError(f"{CONTRACT[0]} is {address!r}; give host:port of process 0, with a port of "
                    "1 to 65535, or auto")
  return host.strip("[]"), int(port)


def check(place: Place, environment: Mapping[str, str]) -> None:
  """Looks at what can be seen at once.

  Raises:
    UserError: for a coordinator on the loopback of several hosts, behind a proxy, or on a port
      that another program has.
  """
  if place.hosts > 1 and is_loopback(place.host):
    raise UserError(f"the coordinator is {place.address}, which every one of the {place.hosts} "
                    f"hosts takes for itself; give a name of process 0's host in {CONTRACT[0]}")
  check_proxy(place, environment)
  if place.number == 0:
    check_port(place)


def is_loopback(host: str) -> bool:
  """Whether `host` is spelled as this machine's own address; names are not looked up."""
  with contextlib.suppress(ValueError):
    return ipaddress.ip_address(host).is_loopback
  return host == "localhost"


def check_proxy(place: Place, environment: Mapping[str, str]) -> None:
  """Refuses a proxy that gRPC would send the coordinator's connections through."""
  proxies, exceptions = ([name for name in names if environment.get(name)] for names in PROXIES)
  if not proxies:
    return
  bypassed = environment[exceptions[0]] if exceptions else ""
  if urllib.request.proxy_bypass_environment(place.host, {"no": bypassed}):
    return
  with contextlib.suppress(ValueError):            # gRPC takes networks, too: 10.0.0.0/8
    address = ipaddress.ip_address(place.host)
    for word in bypassed.split(","):
      with contextlib.suppress(ValueError):
        if address in ipaddress.ip_network(word.strip(), strict=False):
          return
  raise UserError(f"{proxies[0]}={environment[proxies[0]]} would carry the connections to the "
                  f"coordinator {place.address}; add {place.host} to no_proxy, in lower case")


def check_port(place: Place) -> None:
  """Refuses a port that another program listens on: JAX would share it without a word."""
  try:
    socket.create_server(("", place.port)).close()
  except OSError as error:
    reason = os.strerror(error.errno)
    raise UserError(f"process 0 cannot listen on port {place.port} ({reason}); choose another in "
                    f"{CONTRACT[0]}, or end the program that has it") from error


def wait_for_coordinator(place: Place, timeout_s: float) -> None:
  """Returns as soon as process 0 listens.

  Raises:
    UserError: where it does not within `timeout_s`.
  """
  began, told = time.monotonic(), False
  while True:
    try:
      socket.create_connection((place.host, place.port), timeout=5).close()
      return
    except OSError as error:
      reason = error.strerror or str(error)
    waited_s = time.monotonic() - began
    if waited_s > timeout_s:
      loopback = " (an address of this machine alone)" if is_loopback(place.host) else ""
      raise UserError(
          f"the coordinator {place.address}{loopback} does not answer for {timeout_s:.0f} s "
          f"({reason}); see whether process 0 runs there, or raise SDJAX_START_TIMEOUT_S")
    if waited_s > TOLD_AFTER_S and not told:
      told = True
      print(f"sdjax: waiting for the coordinator {place.address} ({reason})", file=sys.stderr)
    time.sleep(0.2)


def wants_tpu(environment: Mapping[str, str]) -> bool:
  """Whether JAX will open this machine's TPU, of which only one process at a time may."""
  platforms = environment.get("JAX_PLATFORMS", "")
  return ((not platforms or "tpu" in platforms)
          and "ALLOW_MULTIPLE_LIBTPU_LOAD" not in environment
          and importlib.util.find_spec("libtpu") is not None
          and bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*")))


def check_lock(lockfile: Path = LOCKFILE) -> None:
  """Refuses a TPU that another process has, or whose lock another user has left.

  libtpu holds a POSIX lock on a file of mode 600, which stays when its process is killed.

  Raises:
    UserError: saying who holds it and what to do.
  """
  try:
    lock = os.open(lockfile, os.O_RDWR)
  except FileNotFoundError:
    return
  except PermissionError as error:
    raise UserError(f"{lockfile} is another user's, so the TPU cannot be opened; if nobody uses "
                    f"it, sudo rm {lockfile}") from error
  try:
    fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise UserError(f"the TPU is in use: {holder(lockfile)}") from error
  finally:
    os.close(lock)


def holder(lockfile: Path) -> str:
  """Returns who holds the lock on `lockfile`, and what to do about it."""
  inode = f":{lockfile.stat().st_ino}"
  pid = next((words[4] for words in map(str.split, Path("/proc/locks").read_text().splitlines())
              if words[1] == "POSIX" and words[5].endswith(inode)), "")
  status = Path("/proc") / pid / "status"
  if not pid or not status.exists():
    return f"a process that is not seen from here holds {lockfile}; end it, or sudo rm {lockfile}"
  if "\nState:\tZ" in status.read_text():
    return f"process {pid} has ended, but a thread of it still holds {lockfile}; kill -9 {pid}"
  return f"process {pid} ({(status.parent / 'comm').read_text().strip()}) holds {lockfile}; end it"
