"""Which ends start a command again, how often, and what a signal does: with commands that play."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import babysit
import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
QUICK = ("import sys; sys.path.insert(0, sys.argv[1]); import babysit; "
         "babysit.MAX_PAUSE_S = 0.01; sys.exit(babysit.main(sys.argv[2:]))")
# Ends with the codes given, one per run, the last for ever; after "+" it has saved a step before.
PLAY = """
import os, sys
workdir, codes = sys.argv[2], sys.argv[3:]
runs = open(workdir + "/runs", "a+")
runs.write("x"); runs.flush()
number = runs.tell()
code = codes[min(number, len(codes)) - 1]
if code.startswith("+"):
  os.makedirs(f"{workdir}/checkpoints/{number * 10}")
  open(f"{workdir}/checkpoints/{number * 10}/checkpoint.json", "w").close()
code = int(code)
sys.exit(code) if code < 128 or code > 200 else os.kill(os.getpid(), code - 128)
"""


def babysitting(workdir, *codes):
  return [sys.executable, "-c", QUICK, str(LAUNCH), sys.executable, "-c", PLAY, "--workdir",
          str(workdir), *map(str, codes)]


def run(workdir, *codes):
  """Returns (exit code, number of runs, what was said)."""
  done = subprocess.run(babysitting(workdir, *codes), capture_output=True, text=True, timeout=60)
  return done.returncode, len((workdir / "runs").read_text()), done.stderr


@pytest.mark.parametrize("code", [0, 2, 3, 4, 130, 77, 255])
def test_these_codes_are_the_end(tmp_path, code):
  assert run(tmp_path, code)[:2] == (code, 1)


@pytest.mark.parametrize("code", [1, 42, 143, 128 + signal.SIGKILL, 128 + signal.SIGABRT])
def test_these_codes_start_it_again(tmp_path, code):
  final, runs, said = run(tmp_path, code, 0)
  assert (final, runs) == (0, 2)
  assert f"code {code}" in said and "starting it again" in said


def save(workdir, step):
  (workdir / "checkpoints" / str(step)).mkdir(parents=True)
  (workdir / "checkpoints" / str(step) / "checkpoint.json").touch()


def test_it_gives_up_where_no_step_is_saved(tmp_path):
  save(tmp_path, 8)                                     # of an earlier start: no progress
  (tmp_path / "checkpoints/9").mkdir()                  # not whole
  code, runs, said = run(tmp_path, 42)
  assert (code, runs) == (42, 1 + babysit.MAX_WITHOUT_PROGRESS)
  assert "giving up" in said


def test_progress_counts_anew(tmp_path):
  most = babysit.MAX_WITHOUT_PROGRESS
  codes = [1] * most + ["+1"] + [1] * most + ["+143", 0]
  assert run(tmp_path, *codes)[:2] == (0, len(codes))


def test_a_step_that_was_there_already_is_no_progress(tmp_path):
  """As when a damaged newest step is put aside, and made again."""
  save(tmp_path, 1000)
  assert run(tmp_path, "+1")[:2] == (1, 1 + babysit.MAX_WITHOUT_PROGRESS)


def test_pauses_grow_from_a_moment_to_a_minute():
  pauses = [babysit.pause_s(lost) for lost in range(babysit.MAX_WITHOUT_PROGRESS + 1)]
  assert pauses == sorted(pauses) and pauses[0] < 1 and pauses[-1] == 60


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_once_and_is_the_end(tmp_path, number):
  code = ("import signal, sys, time\nseen = []\n"
          f"signal.signal({int(number)}, lambda *_: seen.append(1))\nprint('up', flush=True)\n"
          "while not seen: time.sleep(0.01)\ntime.sleep(0.3)\nprint(len(seen))\nsys.exit(143)")
  command = [sys.executable, "-c", QUICK, str(LAUNCH), sys.executable, "-c", code]
  child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
  assert child.stdout.readline() == "up\n"
  os.killpg(child.pid, number)         # as a terminal sends it: to all of the group
  assert child.communicate(timeout=20)[0] == "1\n"
  assert child.returncode == 143


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of it")
def test_killing_it_kills_the_command(tmp_path):
  code = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
  child = subprocess.Popen([sys.executable, "-c", QUICK, str(LAUNCH), sys.executable, "-c", code],
                           stdout=subprocess.PIPE, text=True)
  pid = int(child.stdout.readline())
  child.kill()
  child.wait()
  deadline = time.monotonic() + 8
  while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
    if "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text():
      return
    time.sleep(0.05)
  assert not Path(f"/proc/{pid}").exists()


def test_the_workdir_is_found_in_the_command():
  assert babysit.find_workdir(["sdjax", "--workdir", "a b", "--config", "c"]) == "a b"
  assert babysit.find_workdir(["sdjax", "--workdir=a=b"]) == "a=b"
  assert babysit.find_workdir(["sdjax", "--workdir"]) is None
  assert babysit.newest_step(None) == -1


@pytest.mark.parametrize("words", [[], ["no-such-program"]])
def test_what_cannot_be_started_is_one_line_and_code_2(words):
  done = subprocess.run([sys.executable, str(LAUNCH / "babysit.py"), *words],
                        capture_output=True, text=True, timeout=60)
  assert done.returncode == 2
  assert len(done.stderr.splitlines()) == 1 and "error:" in done.stderr
