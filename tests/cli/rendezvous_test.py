"""Processes that cannot meet are told so in one line, with code 2, and soon."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from sdjax.cli import rendezvous
from sdjax.cli.rendezvous import Place
from sdjax.errors import UserError

SLURM_STEP = {
    "SLURM_JOB_ID": "12345", "SLURM_STEP_NODELIST": "node[07-08,11]", "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2", "SLURM_NTASKS": "3"}
CONTRACT = {"SDJAX_COORDINATOR": "pod-0.pod:8476", "SDJAX_NUM_PROCESSES": "4",
            "SDJAX_PROCESS_ID": "3"}


def refused(match, call, *arguments):
  with pytest.raises(UserError, match=re.escape(match)) as caught:
    call(*arguments)
  assert len(str(caught.value).splitlines()) == 1
  return str(caught.value)


def test_the_contract_is_read():
  assert rendezvous.find_place({}) is None
  assert rendezvous.find_place(CONTRACT) == Place("pod-0.pod", 8476, 4, 3)
  v6 = rendezvous.find_place(CONTRACT | {"SDJAX_COORDINATOR": "[fe80::1]:80"})
  assert (v6.host, v6.address) == ("fe80::1", "[fe80::1]:80")
  assert rendezvous.find_place(
      CONTRACT | {"SDJAX_NUM_PROCESSES": "1", "SDJAX_PROCESS_ID": "0"}) is None


@pytest.mark.parametrize("missing", CONTRACT)
def test_a_part_of_the_contract_is_refused(missing):
  rest = {name: value for name, value in CONTRACT.items() if name != missing}
  refused(missing, rendezvous.find_place, rest)


@pytest.mark.parametrize("name, value, said", [
    ("SDJAX_COORDINATOR", "pod-0", "'pod-0'"), ("SDJAX_COORDINATOR", "pod-0:", "'pod-0:'"),
    ("SDJAX_COORDINATOR", ":80", "':80'"), ("SDJAX_COORDINATOR", "pod-0:99999", "65535"),
    ("SDJAX_NUM_PROCESSES", "two", "'two'"), ("SDJAX_NUM_PROCESSES", "0", "process 3 of 0"),
    ("SDJAX_PROCESS_ID", "4", "process 4 of 4"), ("SDJAX_PROCESS_ID", "-1", "process -1 of 4")])
def test_nonsense_in_the_contract_is_refused(name, value, said):
  refused(said, rendezvous.find_place, CONTRACT | {name: value})


@pytest.mark.parametrize("nodes, first", [
    ("localhost", "localhost"), ("a,b", "a"), ("node[07-08,11]", "node07"), ("n[3]", "n3"),
    ("n[1,5-6],z", "n1"), ("gpu[01-02]-ib,x", "gpu01-ib"), ("r[1-2]n[8-9]", "r1n8")])
def test_tasks_of_slurm_find_the_first_node(nodes, first):
  place = rendezvous.find_place(SLURM_STEP | {"SLURM_STEP_NODELIST": nodes})
  assert (place.host, place.count, place.number, place.hosts) == (first, 3, 2, 3)
  assert 20_000 <= place.port < 32_000
  other = rendezvous.find_place(SLURM_STEP | {"SLURM_JOB_ID": "12346"})
  assert other.port != place.port


def test_one_task_of_slurm_is_alone_and_the_contract_comes_first():
  assert rendezvous.find_place(SLURM_STEP | {"SLURM_STEP_NUM_TASKS": "1"}) is None
  assert rendezvous.find_place({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1"}) is None
  assert rendezvous.find_place(SLURM_STEP | CONTRACT).host == "pod-0.pod"


@pytest.mark.parametrize("missing", rendezvous.SLURM)
def test_a_part_of_slurm_is_refused(missing):
  rest = {name: value for name, value in SLURM_STEP.items() if name != missing}
  assert "srun" in refused(missing, rendezvous.find_place, rest)


def test_a_batch_script_without_srun_is_refused():
  batch = {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}
  assert "srun" in refused("4 tasks", rendezvous.find_place, batch)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "127.3.2.1", "::1"])
def test_a_loopback_coordinator_serves_one_host_only(host):
  refused(host, rendezvous.check, Place(host, 80, 4, 1, hosts=2), {})
  rendezvous.check(Place(host, 80, 4, 1), {})


@pytest.mark.parametrize("host, proxies", [
    ("pod-0", {"http_proxy": "http://proxy:3128"}),
    ("pod-0", {"https_proxy": "http://proxy:3128", "no_proxy": "localhost,pod-1"}),
    ("pod-0", {"grpc_proxy": "http://proxy:3128", "no_grpc_proxy": "x", "no_proxy": "pod-0"}),
    ("10.1.2.3", {"http_proxy": "http://proxy:3128", "no_proxy": "10.2.0.0/16"})])
def test_a_proxy_in_between_is_refused(host, proxies):
  assert "no_proxy" in refused(host, rendezvous.check, Place(host, 80, 4, 1), proxies)


@pytest.mark.parametrize("host, proxies", [
    ("pod-0", {"HTTP_PROXY": "http://proxy:3128"}),      # gRPC does not read it
    ("pod-0", {"http_proxy": ""}),
    ("pod-0", {"http_proxy": "http://proxy:3128", "no_proxy": "localhost, pod-0"}),
    ("pod-0.sub.net", {"http_proxy": "http://proxy:3128", "no_proxy": ".sub.net"}),
    ("10.1.2.3", {"http_proxy": "http://proxy:3128", "no_proxy": "x,10.0.0.0/8"})])
def test_a_proxy_that_is_passed_by_is_none(host, proxies):
  rendezvous.check(Place(host, 80, 4, 1), proxies)


def test_a_taken_port_is_refused():
  with socket.create_server(("127.0.0.1", 0)) as taken:
    port = taken.getsockname()[1]
    refused(str(port), rendezvous.check, Place("127.0.0.1", port, 2, 0), {})
    rendezvous.check(Place("127.0.0.1", port, 2, 1), {})  # process 1 does not listen
  rendezvous.check(Place("127.0.0.1", port, 2, 0), {})


def test_a_coordinator_that_does_not_answer_is_given_up():
  with socket.socket() as closed:
    closed.bind(("127.0.0.1", 0))
    place = Place("127.0.0.1", closed.getsockname()[1], 2, 1)
    began = time.monotonic()
    assert "this machine alone" in refused(
        place.address, rendezvous.wait_for_coordinator, place, 0.5)
    assert time.monotonic() - began < 5
    refused("no.such.host.invalid:80", rendezvous.wait_for_coordinator,
            Place("no.such.host.invalid", 80, 2, 1), 0)
    closed.listen()
    rendezvous.wait_for_coordinator(place, 5)


HOLD = """
import fcntl, sys, time
file = open(sys.argv[1], "w"); fcntl.lockf(file, fcntl.LOCK_EX); print("up", flush=True)
time.sleep(60)
"""


def test_a_lock_that_is_held_names_its_process(tmp_path):
  lock = tmp_path / "libtpu_lockfile"
  rendezvous.check_lock(lock)                           # there is none
  child = subprocess.Popen([sys.executable, "-c", HOLD, str(lock)], stdout=subprocess.PIPE)
  with contextlib.closing(child.stdout):
    child.stdout.readline()
    refused(f"process {child.pid} (", rendezvous.check_lock, lock)
    child.send_signal(signal.SIGKILL)
    child.wait()
  rendezvous.check_lock(lock)                           # left behind by a dead process of ours


@pytest.mark.skipif(os.geteuid() == 0, reason="root may open every file")
def test_a_lock_of_another_user_is_refused(tmp_path):
  lock = tmp_path / "libtpu_lockfile"
  lock.touch(mode=0o400)
  refused(f"sudo rm {lock}", rendezvous.check_lock, lock)


def test_a_lock_that_cannot_be_opened_is_refused(tmp_path, monkeypatch):
  def deny(path, flags):
    raise PermissionError(13, "Permission denied", str(path))
  monkeypatch.setattr(rendezvous.os, "open", deny)
  refused("sudo rm", rendezvous.check_lock, tmp_path / "libtpu_lockfile")


START = """
import sys
from sdjax.cli import experiment
from sdjax.errors import UserError
try:
  experiment.start_processes()
except UserError as error:
  print(f"sdjax: error: {error}", file=sys.stderr)
  sys.exit(error.exit_code)
import jax
print(jax.process_index(), jax.process_count())
"""


def start(environment, number):
  return subprocess.Popen(
      [sys.executable, "-c", START], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      env=os.environ | environment | {"SDJAX_PROCESS_ID": str(number), "JAX_PLATFORMS": "cpu"})


def free_port():
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def test_two_processes_meet_and_one_alone_gives_up():
  """JAX itself would end the one with SIGABRT and a stack trace."""
  together = {"SDJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "SDJAX_NUM_PROCESSES": "2"}
  alone = together | {"SDJAX_COORDINATOR": f"127.0.0.1:{free_port()}", "SDJAX_START_TIMEOUT_S": "1"}
  children = [start(together, 0), start(together, 1), start(alone, 0)]
  outputs = [child.communicate(timeout=100) for child in children]
  assert [child.returncode for child in children] == [0, 0, 2], outputs
  assert [output for output, _ in outputs] == ["0 2\n", "1 2\n", ""]
  (line,) = outputs[2][1].splitlines()
  assert line.startswith("sdjax: error:") and alone["SDJAX_COORDINATOR"] in line


def test_auto_where_jax_detects_nothing_is_one_line():
  child = start({"SDJAX_COORDINATOR": "auto"}, 0)
  _, error = child.communicate(timeout=100)
  assert child.returncode == 2 and len(error.splitlines()) == 1, error
