"""What the renderer prints: golden texts, each checked by what would read it, as far as it is here.

The goldens are kept to be read: a change of what is launched shows in review. Write them anew with
`PYTHONPATH=launch python tests/launch/render_test.py`. What is right in them is proved by the other
tests.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import manifests
import pytest
import render as renderer
import targets
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
GOLDEN = Path(__file__).parent / "golden"
LINE = ["sdjax", "train", "--config", "configs/sd15.py:res=256", "--workdir", "/mnt/bucket/a run",
        "--config.data.caption_column=it's $HOME & \"IMAGE\""]
CASES = {
    "local.sh": "local cpu",
    "local_2x4.sh": "local cpu-2x4",
    "slurm_h100.sbatch": "slurm h100-8 --count 4 --name sd15",
    "slurm_cpu.sbatch": "slurm cpu --count 2 --name tiny",
    "tpu_vm_v4-32.sh": "tpu-vm v4-32 --name sd15 --zone us-central2-b",
    "queued_v6e-256.sh": "queued-resources v6e-256 --name sd15 --zone us-east5-b",
    "queued_2_v5e-16.sh":
        "queued-resources v5e-16 --count 2 --spot --name sd15 --zone us-west4-a",
    "jobset_v5e-16.yaml": "jobset v5e-16 --name sd15 --image reg.io/me/sdjax:1 --bucket pictures",
    "jobset_2_v5p-128.yaml":
        "jobset v5p-128 --count 2 --spot --name sd15 --image reg.io/me/sdjax:1",
    "jobset_4_h200.yaml": "jobset h200-8 --count 4 --name sd15 --image reg.io/me/sdjax:1",
    "xpk_v5p-32.sh": "xpk v5p-32 --name sd15 --image reg.io/me/sdjax:1 --cluster pods",
    "skypilot_h100.yaml": "skypilot h100-8 --count 2 --spot --name sd15",
    "skypilot_v6e-16.yaml": "skypilot v6e-16 --name sd15",
}
SHELL = [name for name in CASES if not name.endswith(".yaml")]
JOBSETS = [name for name in CASES if name.startswith("jobset")]
# The flags that are used of those that https://cloud.google.com/sdk/gcloud/reference has.
GCLOUD = {
    "tpu-vm create": {"--zone", "--accelerator-type", "--version", "--spot"},
    "tpu-vm describe": {"--zone", "--format"},
    "tpu-vm scp": {"--zone", "--recurse", "--worker"},
    "tpu-vm ssh": {"--zone", "--worker", "--command"},
    "queued-resources create": {"--zone", "--accelerator-type", "--runtime-version", "--spot",
                                "--node-id", "--node-count", "--node-prefix"},
    "queued-resources describe": {"--zone", "--format"},
    "queued-resources scp": {"--zone", "--recurse", "--worker", "--node"},
    "queued-resources ssh": {"--zone", "--worker", "--node", "--command"},
}


def render(case, command=LINE):
  return subprocess.run([sys.executable, LAUNCH / "render.py", *shlex.split(case), "--", *command],
                        capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
  done = render(CASES[name])
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == (GOLDEN / name).read_text()


def test_the_goldens_have_all_launchers():
  assert {case.split()[0] for case in CASES.values()} == set(renderer.LAUNCHERS)


@pytest.mark.parametrize("launcher", renderer.LAUNCHERS)
def test_each_target_is_rendered_or_refused(launcher):
  """Scripts parse as bash, manifests as YAML, and each platform has some target that works."""
  options = {"name": "a", "zone": "b", "image": "c", "cluster": "d"}
  needed = [word for name in renderer.LAUNCHERS[launcher].needs for word in (
      f"--{name}", options[name])]
  platforms = set()
  for name, target in targets.TARGETS.items():
    args = renderer.parse([launcher, name, *needed, "--", *LINE])
    if renderer.complaint(args):
      continue
    given = {key: value for key, value in vars(args).items() if key not in ("launcher", "target")}
    text = renderer.LAUNCHERS[launcher].render(manifests.Job(target_name=name, **given))
    if launcher in ("jobset", "skypilot"):
      assert name in str(yaml.safe_load(text))
    else:
      assert name in text
      assert subprocess.run(["bash", "-n"], input=text, text=True, timeout=60).returncode == 0
    platforms.add(target.platform)
  assert platforms == set(renderer.LAUNCHERS[launcher].platforms)


def command_in(name):
  """Returns the command of a golden as the shells and YAML readers on its way hand it on."""
  text = (GOLDEN / name).read_text()
  if name.endswith(".yaml"):
    value = yaml.safe_load(text)
    if name.startswith("jobset"):
      job = value["spec"]["replicatedJobs"][0]["template"]["spec"]
      return job["template"]["spec"]["containers"][0]["command"]
    text = value["run"].splitlines()[-1]
  line = next(line for line in text.replace("\\\n", "").splitlines() if "launch/run.sh" in line)
  words = shlex.split(line)
  if "--command" in words:             # one shell more: the one that ssh or xpk starts
    words = shlex.split(words[words.index("--command") + 1])
  return words[words.index("launch/run.sh"):]


@pytest.mark.parametrize("name", CASES)
def test_the_command_comes_out_whole(name):
  words = command_in(name)
  assert words[1] == shlex.split(CASES[name])[1]
  begin = words.index("sdjax")
  assert words[begin:begin + len(LINE)] == LINE
  # A launcher adds only where to run, never what to train.
  assert not any(word.startswith("--config") for word in words[:begin])


@pytest.mark.parametrize("name", SHELL)
def test_scripts_are_bash(name):
  assert subprocess.run(["bash", "-n", GOLDEN / name], timeout=60).returncode == 0


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="shellcheck is not installed")
def test_shellcheck_is_content():
  scripts = [*LAUNCH.rglob("*.sh"), LAUNCH.parent / ".ci/run", *(GOLDEN / name for name in SHELL)]
  # SC2016: the $HOME of LINE stays as it is, between its single quotes, on purpose.
  done = subprocess.run(["shellcheck", "--shell=bash", "--exclude=SC2016", *scripts],
                        capture_output=True, text=True, timeout=100)
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", JOBSETS)
def test_jobsets_obey_what_no_schema_tells(name):
  """https://kubernetes.io/docs/concepts/workloads/controllers/job/; the schema: jobset_test.py."""
  (job,) = yaml.safe_load((GOLDEN / name).read_text())["spec"]["replicatedJobs"]
  job = job["template"]["spec"]
  assert job["completionMode"] in ("Indexed", "NonIndexed")
  assert job["template"]["spec"]["restartPolicy"] == "Never"    # as a podFailurePolicy demands
  (policy,) = job["podFailurePolicy"]["rules"]
  assert policy["action"] in ("FailJob", "FailIndex", "Ignore", "Count")
  (container,) = job["template"]["spec"]["containers"]
  assert policy["onExitCodes"]["containerName"] == container["name"]
  assert policy["onExitCodes"]["values"] == sorted(policy["onExitCodes"]["values"])


def pods(name):
  (job,) = yaml.safe_load((GOLDEN / name).read_text())["spec"]["replicatedJobs"]
  spec = job["template"]["spec"]
  container = spec["template"]["spec"]["containers"][0]
  environment = {entry["name"]: entry.get("value") for entry in container["env"]}
  return job["replicas"], spec["parallelism"], container, spec["template"], environment


def test_a_jobset_asks_for_its_slices():
  replicas, parallelism, container, pod, environment = pods("jobset_2_v5p-128.yaml")
  assert (replicas, parallelism, container["resources"]["limits"]) == (2, 16, {"google.com/tpu": 4})
  assert pod["spec"]["nodeSelector"] == {
      "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
      "cloud.google.com/gke-tpu-topology": "4x4x4", "cloud.google.com/gke-spot": "true"}
  assert environment == {"SDJAX_COORDINATOR": "auto"}
  assert "exclusive-topology" in (GOLDEN / "jobset_2_v5p-128.yaml").read_text()
  # Slices of one host share a node pool, where the annotation would keep all but one waiting.
  assert "exclusive-topology" not in render("jobset v5e-8 --name sd15 --image b").stdout


def test_a_jobset_of_gpus_tells_its_pods_where_they_stand():
  replicas, parallelism, container, pod, environment = pods("jobset_4_h200.yaml")
  assert (replicas, parallelism, container["resources"]["limits"]) == (1, 4, {"nvidia.com/gpu": 8})
  # NAME-REPLICATEDJOB-JOB-POD.NAME is what JobSet calls a pod in DNS.
  assert environment["SDJAX_COORDINATOR"] == "sd15-workers-0-0.sd15:8476"
  assert environment["SDJAX_NUM_PROCESSES"] == "4"
  assert container["env"][-1]["name"] == "SDJAX_PROCESS_ID"


def test_a_jobset_mounts_the_bucket():
  *_, container, pod, _ = pods("jobset_v5e-16.yaml")
  assert container["volumeMounts"] == [{"name": "bucket", "mountPath": "/mnt/pictures"}]
  assert pod["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}


# A gcloud that tells one state, of what is there from the start if its file exists, and what it is
# asked for.
PLAY = """#!/usr/bin/env bash
printf '%s\\t' "$@" >>"$PLAY/asked"
echo >>"$PLAY/asked"
case "$*" in
  *" create "*) touch "$PLAY/there" ;;
  *" describe "*) [[ -e "$PLAY/there" ]] && echo "$STATE" ;;
esac
"""


@pytest.mark.parametrize("name, there, state, code, verbs", [
    ("tpu_vm_v4-32.sh", False, "READY", 0, "describe create scp ssh ssh ssh"),
    ("tpu_vm_v4-32.sh", True, "READY", 0, "describe scp ssh ssh ssh"),
    ("tpu_vm_v4-32.sh", True, "PREEMPTED", 1, "describe"),
    ("queued_v6e-256.sh", False, "ACTIVE", 0, "describe create describe scp ssh ssh ssh"),
    ("queued_2_v5e-16.sh", False, "ACTIVE", 0, "describe create describe scp ssh ssh ssh"),
    ("queued_2_v5e-16.sh", True, "SUSPENDED", 1, "describe describe")])
def test_a_slice_is_made_where_it_is_not_there(tmp_path, name, there, state, code, verbs):
  """Scripts for Cloud TPU, run with a gcloud that plays, and knows the real one's flags."""
  for program, text in (("gcloud", PLAY), ("sleep", "#!/bin/sh\n")):
    (tmp_path / program).write_text(text)
    (tmp_path / program).chmod(0o755)
  if there:
    (tmp_path / "there").touch()
  done = subprocess.run(
      ["bash", GOLDEN / name], capture_output=True, text=True, timeout=60,
      env={"PATH": f"{tmp_path}:/usr/bin:/bin", "PLAY": str(tmp_path), "STATE": state})
  asked = [line.split("\t") for line in (tmp_path / "asked").read_text().splitlines()]
  assert (done.returncode, " ".join(words[3] for words in asked)) == (code, verbs)
  for words in asked:
    assert words[:2] == ["compute", "tpus"]
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert flags <= GCLOUD[" ".join(words[2:4])], words
  assert (f"is {state}" in done.stderr) == (code != 0)


def test_xpk_takes_the_line():
  """xpk's own parser, where it is installed, and its own table of slices."""
  parser = pytest.importorskip("xpk.parser.core")
  slices = pytest.importorskip("xpk.core.system_characteristics")
  import argparse
  top = argparse.ArgumentParser()
  parser.set_parser(top)
  text = (GOLDEN / "xpk_v5p-32.sh").read_text().replace("\\\n", "")
  args = top.parse_args(shlex.split(text)[1:])
  assert (args.workload, args.tpu_type, args.num_slices) == ("sd15", "v5p-32", 1)
  for name, target in targets.TARGETS.items():
    found = slices.UserFacingNameToSystemCharacteristics.get(target.accelerator)
    if target.platform == "tpu":
      fits = found is not None and (
          found.topology, found.gke_accelerator, found.vms_per_slice, found.chips_per_vm) == (
              target.topology, target.gke_accelerator, target.hosts, target.chips_per_host)
      assert fits == (name not in renderer.NOT_IN_XPK), name


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("skypilot")])
def test_skypilot_takes_the_task(name, monkeypatch):
  """SkyPilot's own reader, where it is installed."""
  monkeypatch.setenv("SKYPILOT_DISABLE_USAGE_COLLECTION", "1")
  sky = pytest.importorskip("sky")
  task = sky.Task.from_yaml(str(GOLDEN / name))
  (resources,) = task.resources
  target = targets.TARGETS[shlex.split(CASES[name])[1]]
  ((accelerator, number),) = resources.accelerators.items()
  assert (accelerator, number) in ((target.accelerator, 8), (f"tpu-{target.accelerator}", 1))
  assert resources.use_spot == ("--spot" in CASES[name])


@pytest.mark.parametrize("word", ["on", "No", "true", "null", "y", "1e3", "0x1f", "~", "a: b", "é"])
def test_words_of_yaml_stay_strings(word):
  value = {"a": word, word: [{"b": word}], "c": [word]}
  assert yaml.safe_load(manifests.to_yaml(value)) == value


def test_skypilots_tpus_ask_the_machine():
  export, run = yaml.safe_load((GOLDEN / "skypilot_v6e-16.yaml").read_text())["run"].splitlines()
  assert export == "export SDJAX_COORDINATOR=auto" and run.startswith("exec launch/run.sh v6e-16 ")


def test_skypilot_tells_its_hosts_where_they_stand():
  """The run section, with the variables that SkyPilot sets and a run.sh that prints."""
  *exports, _ = yaml.safe_load((GOLDEN / "skypilot_h100.yaml").read_text())["run"].splitlines()
  script = "\n".join([*exports, "env | grep ^SDJAX | sort"])
  done = subprocess.run(
      ["bash", "-c", script], capture_output=True, text=True, timeout=60,
      env={"PATH": "/usr/bin:/bin", "SKYPILOT_NODE_IPS": "10.0.0.7\n10.0.0.8",
           "SKYPILOT_NODE_RANK": "1"})
  assert done.stdout.split() == [
      "SDJAX_COORDINATOR=10.0.0.7:8476", "SDJAX_NUM_PROCESSES=2", "SDJAX_PROCESS_ID=1"]


@pytest.mark.parametrize("case, said", [
    ("slurm v5e-16 --name a", "tpu-vm"),
    ("jobset cpu --name a --image b", "local"),
    ("tpu-vm v5e-17 --name a --zone b", "v5e-16"),
    ("tpu-vm v5e-16 --zone b", "--name"),
    ("tpu-vm v5e-16 --name a", "--zone"),
    ("tpu-vm v5e-16 --name a --zone b --count 2", "--count"),
    ("jobset v5e-16 --name Not_A_Name --image b", "lower-case"),
    ("jobset v5e-16 --name a --image b --count 0", "--count 0"),
    ("xpk v5e-16 --name a --image b", "--cluster"),
    ("xpk v5e-8 --name a --image b --cluster c", "jobset"),
    ("slurm h100-8 --name a --zone b", "--zone"),
    ("xpk v6e-8 --name a --image b --cluster c", "jobset"),
    ("local v5e-16", "tpu-vm"),
    ("local cpu --name a", "--name"),
    ("slurm cpu-2x4 --name a", "cpu --count 2"),
    ("skypilot v5e-16 --name a --count 2", "queued-resources")])
def test_a_bad_call_is_one_line_and_code_2(case, said):
  done = render(case)
  assert (done.returncode, done.stdout) == (2, "")
  assert len(done.stderr.splitlines()) == 1 and said in done.stderr


def test_no_command_is_code_2():
  for words in (["local", "cpu", "--"], ["local", "cpu"]):
    done = subprocess.run([sys.executable, LAUNCH / "render.py", *words], capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 2 and "no command" in done.stderr


if __name__ == "__main__":
  for name, case in CASES.items():
    (GOLDEN / name).write_text(render(case).stdout)
