"""What the renderer prints: golden texts, each checked by what would read it, as far as it is here.

The goldens are kept to be read: a change of what is launched shows in review. Write them anew with
`python tests/launch/render_test.py`. What is right in them is proved by the other tests.
"""

import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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

# What the published schema says of the fields that appear here: names, types, and what must be
# there. From https://github.com/kubernetes-sigs/jobset (config/components/crd/bases, v1alpha2), as
# of August 2026; a list holds the schema of its items, {"*"} is a map of strings.
JOBSET_SCHEMA = {
    "apiVersion!": str, "kind!": str,
    "metadata!": {"name!": str, "annotations": {"*": str}},
    "spec!": {
        "failurePolicy": {
            "maxRestarts": int,
            "rules": [{"name!": str, "action!": str, "onJobFailureReasons": [str]}]},
        "replicatedJobs": [{"name!": str, "replicas": int, "template!": {"spec": {
            "parallelism": int, "completions": int, "completionMode": str, "backoffLimit": int,
            "podFailurePolicy": {"rules!": [{
                "action!": str,
                "onExitCodes": {"containerName": str, "operator!": str, "values!": [int]}}]},
            "template!": {
                "metadata": {"annotations": {"*": str}},
                "spec": {
                    "restartPolicy": str, "terminationGracePeriodSeconds": int,
                    "nodeSelector": {"*": str},
                    "containers!": [{
                        "name!": str, "image": str, "command": [str],
                        "env": [{"name!": str, "value": str,
                                 "valueFrom": {"fieldRef": {"fieldPath!": str}}}],
                        "ports": [{"containerPort!": int}],
                        "resources": {"limits": {"*": int}},
                        "volumeMounts": [{"name!": str, "mountPath!": str}]}],
                    "volumes": [{"name!": str, "csi": {
                        "driver!": str, "volumeAttributes": {"*": str}}}]}}}}}]}}


def render(case, command=LINE):
  return subprocess.run([sys.executable, LAUNCH / "render.py", *shlex.split(case), "--", *command],
                        capture_output=True, text=True, timeout=60)


def faults(value, schema, where=""):
  """Yields what does not fit, as a structural schema of Kubernetes sees it."""
  if isinstance(schema, type):
    if type(value) is not schema:
      yield f"{where} is {value!r}, not {schema.__name__}"
  elif isinstance(schema, list):
    for i, item in enumerate(value):
      yield from faults(item, schema[0], f"{where}[{i}]")
  elif "*" in schema:
    for key, item in value.items():
      yield from faults(item, schema["*"], f"{where}.{key}")
  else:
    fields = {key.rstrip("!"): item for key, item in schema.items()}
    yield from (f"{where}.{key[:-1]} is missing" for key in schema
                if key.endswith("!") and key[:-1] not in value)
    for key, item in value.items():
      if key not in fields:
        yield f"{where}.{key} is no field"
      else:
        yield from faults(item, fields[key], f"{where}.{key}")


@pytest.mark.parametrize("name", CASES)
def test_golden(name):
  done = render(CASES[name])
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout == (GOLDEN / name).read_text()


def command_in(name):
  """Returns the command of a golden as the shells and YAML readers on its way hand it on."""
  text = (GOLDEN / name).read_text()
  if name.endswith(".yaml"):
    yaml = pytest.importorskip("yaml")
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
def test_jobsets_fit_the_schema(name):
  yaml = pytest.importorskip("yaml")
  manifest = yaml.safe_load((GOLDEN / name).read_text())
  assert list(faults(manifest, JOBSET_SCHEMA)) == []
  (rule,) = manifest["spec"]["failurePolicy"]["rules"]
  assert rule["action"] in ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  # Of Kubernetes' own: https://kubernetes.io/docs/concepts/workloads/controllers/job/
  assert job["completionMode"] in ("Indexed", "NonIndexed")
  assert job["template"]["spec"]["restartPolicy"] == "Never"    # as a podFailurePolicy demands
  (policy,) = job["podFailurePolicy"]["rules"]
  assert policy["action"] in ("FailJob", "FailIndex", "Ignore", "Count")
  assert policy["onExitCodes"]["values"] == sorted(policy["onExitCodes"]["values"])


def test_the_schema_finds_faults():
  good = {"name": "a", "command": ["b"]}
  schema = JOBSET_SCHEMA["spec!"]["replicatedJobs"][0]["template!"]["spec"]["template!"]["spec"][
      "containers!"][0]
  assert list(faults(good, schema)) == []
  assert len(list(faults({"command": ["b", 1], "comand": []}, schema))) == 3


def pods(name):
  yaml = pytest.importorskip("yaml")
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


def test_skypilot_tells_its_hosts_where_they_stand():
  """The run section, with the variables that SkyPilot sets and a run.sh that prints."""
  yaml = pytest.importorskip("yaml")
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
    ("local v5e-16", "tpu-vm"),
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
