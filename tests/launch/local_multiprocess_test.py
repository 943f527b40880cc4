"""Several processes on one machine: told where they stand, and none left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "launch/local_multiprocess.py"
SLEEP = "import os, time; print('up', os.getpid()); time.sleep(60)"
# Ends with 143, and says so, when it is told to.
SAVES = """
import os, signal, sys, time
def save(*_):
  time.sleep(0.5)
  print("saved", flush=True)
  os._exit(143)
signal.signal(signal.SIGTERM, save)
""" + SLEEP
IMPATIENT = ("import sys; sys.path.insert(0, sys.argv.pop(1)); import local_multiprocess; "
             "local_multiprocess.GRACE_S = 1; sys.exit(local_multiprocess.main())")


def words(*options, code):
  return [sys.executable, str(SCRIPT), *options, "--", sys.executable, "-c", code]


def launch(*options, code, **environment):
  return subprocess.run(words(*options, code=code), capture_output=True, text=True, timeout=60,
                        env=os.environ | environment)


def is_alive(pid):
  try:
    os.kill(pid, 0)
    # A killed process may linger as a zombie until its new parent looks.
    return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
  except ProcessLookupError:
    return False
  except FileNotFoundError:
    return not Path("/proc/self").exists()         # gone meanwhile, or no /proc here


def wait_until_gone(pids, timeout_s=8):
  deadline = time.monotonic() + timeout_s
  while time.monotonic() < deadline and any(map(is_alive, pids)):
    time.sleep(0.05)
  return not any(map(is_alive, pids))


def start_and_read_pids(code=SLEEP, script=(str(SCRIPT),), processes=2):
  launcher = subprocess.Popen(
      [sys.executable, *script, "--processes", str(processes), "--", sys.executable, "-c", code],
      stdout=subprocess.PIPE, text=True)
  lines = [launcher.stdout.readline() for _ in range(processes)]
  return launcher, [int(line.split()[-1]) for line in lines]


def test_each_process_is_told_where_it_stands():
  code = ("import os; print(*(os.environ[name] for name in ('SDJAX_PROCESS_ID', "
          "'SDJAX_NUM_PROCESSES', 'SDJAX_COORDINATOR', 'JAX_PLATFORMS', 'XLA_FLAGS')))")
  done = launch("--processes", "3", "--devices", "5", code=code, XLA_FLAGS="--other=1")
  assert done.returncode == 0, done.stderr
  lines = sorted(done.stdout.splitlines())
  coordinator = lines[0].split()[3]
  assert coordinator.startswith("127.0.0.1:")
  assert lines == [
      f"[{i}] {i} 3 {coordinator} cpu --xla_backend_optimization_level=0 --other=1 "
      "--xla_force_host_platform_device_count=5" for i in range(3)]


def test_dry_run_prints_and_runs_nothing(tmp_path):
  done = subprocess.run(
      [sys.executable, str(SCRIPT), "--dry-run", "--processes", "2", "--", "sdjax", "train",
       "--config", "configs/shapes.py", "--workdir", str(tmp_path / "a run")],
      capture_output=True, text=True, timeout=60)
  assert done.returncode == 0
  lines = done.stdout.splitlines()
  assert [f"SDJAX_PROCESS_ID={i}" in line for i, line in enumerate(lines)] == [True, True]
  ending = f"sdjax train --config configs/shapes.py --workdir '{tmp_path}/a run'"
  assert all(line.endswith(ending) for line in lines)
  assert not any(tmp_path.iterdir())


def test_one_failure_stops_the_others_and_gives_the_code():
  code = "import os, sys, time; os.environ['SDJAX_PROCESS_ID'] == '1' and sys.exit(7)\n" + SLEEP
  start = time.monotonic()
  done = launch("--processes", "3", code=code)
  assert done.returncode == 7
  assert time.monotonic() - start < 30                  # the others would sleep for 60 s
  assert "[1] ended with code 7" in done.stderr
  pids = [int(line.split()[-1]) for line in done.stdout.splitlines()]
  assert wait_until_gone(pids)


def test_a_process_that_will_not_stop_is_killed():
  code = ("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + SLEEP)
  launcher, pids = start_and_read_pids(code, script=("-c", IMPATIENT, str(SCRIPT.parent)))
  os.kill(pids[0], signal.SIGKILL)
  assert launcher.wait(timeout=40) == 128 + signal.SIGKILL
  assert wait_until_gone(pids)


def test_one_that_stands_still_is_stopped_like_the_others():
  launcher, pids = start_and_read_pids(SAVES)
  os.kill(pids[1], signal.SIGSTOP)
  launcher.send_signal(signal.SIGTERM)
  output, _ = launcher.communicate(timeout=15)         # less than it takes to insist
  assert launcher.returncode == 143
  assert output.count("saved") == 2
  assert wait_until_gone(pids)


def test_one_that_was_told_to_stop_leaves_the_others_time():
  """All stop after the same step; a second SIGTERM would end one in the midst of its save."""
  code = "import os; alone = os.environ['SDJAX_PROCESS_ID'] == '1'\n" + SLEEP.replace(
      "time.sleep(60)", "time.sleep(0 if alone else 1); print('saved'); os._exit(143)")
  done = launch(code=code)
  assert done.returncode == 143
  assert done.stdout.count("saved") == 2


def test_stopping_the_launcher_stops_all():
  for signal_number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
    launcher, pids = start_and_read_pids()
    launcher.send_signal(signal_number)
    assert launcher.wait(timeout=30) == code
    assert wait_until_gone(pids)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of it")
def test_killing_the_launcher_kills_all():
  launcher, pids = start_and_read_pids()
  launcher.kill()
  launcher.wait(timeout=30)
  assert wait_until_gone(pids)


def test_a_missing_program_is_one_line_and_code_2():
  done = subprocess.run([sys.executable, str(SCRIPT), "--", "no-such-program"],
                        capture_output=True, text=True, timeout=60)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1 and "no-such-program" in done.stderr
