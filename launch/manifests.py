"""Jobs, and their manifests for Kubernetes (JobSet) and SkyPilot."""

import dataclasses
import json
import re
import shlex
from typing import Any

import targets

PORT = 8476                           # of process 0, where the launcher chooses it
MAX_RESTARTS = 100                    # after lost machines; babysit.py counts those of the command
SAVE_S = 120                          # from SIGTERM to SIGKILL: time for a last checkpoint
FINAL_CODES = [2, 3, 4]               # README.md: the same command would end in the same way again
EXTRAS = {"tpu": "jax[tpu]", "gpu": "jax[cuda13]"}

# What YAML 1.1, which Kubernetes and SkyPilot read, takes for a boolean or for nothing.
YAML_WORDS = ("y", "n", "yes", "no", "on", "off", "true", "false", "null")

JOBSET_HEADER = "# {count} x {target}: {processes} pods of {chips} chips, one process each.\n"


@dataclasses.dataclass(frozen=True)
class Job:
  """A command and where it is to run.

  Attributes:
    target_name: a key of targets.TARGETS.
    command: words, as in ["sdjax", "train", …].
    name: of the job, and of what is created for it.
    count: TPU slices, or GPU nodes.
    zone, image, cluster, bucket: as render.py says; "" where the launcher has no use for it.
    spot: on machines that may be taken away.
  """
  target_name: str
  command: list[str]
  name: str
  count: int
  zone: str
  image: str
  cluster: str
  bucket: str
  spot: bool

  @property
  def target(self) -> targets.Target:
    return targets.TARGETS[self.target_name]

  @property
  def processes(self) -> int:
    """How many there are, one per host."""
    return self.target.hosts * self.count

  @property
  def entry(self) -> list[str]:
    """What every host runs."""
    return ["launch/run.sh", self.target_name, *self.command]


def install(platform: str) -> str:
  """Returns a line that installs the checkout in .venv.

  Ubuntu 22.04, which TPU VMs run, has Python 3.10: uv brings a newer one.
  """
  return ("python3 -m pip install --quiet uv && python3 -m uv venv --quiet --allow-existing "
          "--python 3.12 .venv && python3 -m uv pip install --quiet --python .venv/bin/python "
          f"-e . {shlex.quote(EXTRAS[platform])}")


def to_yaml(value: Any, indent: int = 0) -> str:
  """Returns `value`, of dicts, lists, strings, numbers and booleans, as lines of YAML.

  Lists of plain values and all strings that YAML could misread are written as JSON, which YAML
  contains; strings of several lines as blocks.
  """
  pad = " " * indent
  if isinstance(value, dict):
    return "".join(f"{pad}{scalar(key)}:{after_key(item, indent)}" for key, item in value.items())
  lines = []
  for item in value:
    first, *rest = to_yaml(item, indent + 2).splitlines(keepends=True)
    lines += [f"{pad}- {first[indent + 2:]}", *rest]
  return "".join(lines)


def after_key(value: Any, indent: int) -> str:
  """Returns what stands behind a key and its colon, with the end of the line."""
  if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
    return "\n" + to_yaml(value, indent + 2)
  if isinstance(value, str) and "\n" in value:
    return " |\n" + "".join(f"{' ' * (indent + 2)}{line}\n" for line in value.splitlines())
  return f" {scalar(value)}\n"


def scalar(value: Any) -> str:
  """Returns a string bare where that is safe, all else as JSON."""
  safe = "[A-Za-z/][A-Za-z0-9_./-]*(:[A-Za-z0-9_./-]+)*"
  if isinstance(value, str) and re.fullmatch(safe, value) and value.lower() not in YAML_WORDS:
    return value
  return json.dumps(value, ensure_ascii=False)


def jobset(job: Job) -> str:
  """Returns a JobSet for Google Kubernetes Engine: https://jobset.sigs.k8s.io."""
  target = job.target
  is_tpu = target.platform == "tpu"
  # Slices are jobs, their hosts pods; nodes of GPUs are pods of one job.
  jobs, pods = (job.count, target.hosts) if is_tpu else (1, job.count)
  metadata: dict[str, Any] = {"name": job.name}
  if is_tpu and pods > 1:             # a slice is then a node pool, and is not shared
    metadata["annotations"] = {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
  manifest = {
      "apiVersion": "jobset.x-k8s.io/v1alpha2",
      "kind": "JobSet",
      "metadata": metadata,
      "spec": {
          "failurePolicy": {
              "maxRestarts": MAX_RESTARTS,
              "rules": [{"name": "final", "action": "FailJobSet",
                         "onJobFailureReasons": ["PodFailurePolicy"]}]},
          "replicatedJobs": [{"name": "workers", "replicas": jobs, "template": {"spec": {
              "parallelism": pods,
              "completions": pods,
              "completionMode": "Indexed",
              "backoffLimit": 0,      # one lost pod restarts the whole set
              "podFailurePolicy": {"rules": [{
                  "action": "FailJob",
                  "onExitCodes": {
                      "containerName": "sdjax", "operator": "In", "values": FINAL_CODES}}]},
              "template": pod(job)}}}]}}
  header = JOBSET_HEADER.format(count=job.count, target=job.target_name, processes=job.processes,
                                chips=target.chips_per_host)
  return header + to_yaml(manifest)


def pod(job: Job) -> dict[str, Any]:
  """Returns the template of a pod of the job."""
  target = job.target
  if target.platform == "tpu":
    resource = "google.com/tpu"
    selector = {"cloud.google.com/gke-tpu-accelerator": target.gke_accelerator,
                "cloud.google.com/gke-tpu-topology": target.topology}
  else:
    resource, selector = "nvidia.com/gpu", {"cloud.google.com/gke-accelerator":
                                            target.gke_accelerator}
  tolerations = {}
  if job.spot:                        # Google's advice is to taint such nodes, for those who can
    selector["cloud.google.com/gke-spot"] = "true"
    tolerations = {"tolerations": [{"key": "cloud.google.com/gke-spot", "operator": "Equal",
                                    "value": "true", "effect": "NoSchedule"}]}
  container = {
      "name": "sdjax", "image": job.image, "command": job.entry, "env": place(job),
      "ports": [{"containerPort": PORT}],
      "resources": {"limits": {resource: target.chips_per_host}}}
  spec = {"restartPolicy": "Never", "terminationGracePeriodSeconds": SAVE_S,
          "nodeSelector": selector, **tolerations, "containers": [container]}
  if not job.bucket:
    return {"spec": spec}
  container["volumeMounts"] = [{"name": "bucket", "mountPath": f"/mnt/{job.bucket}"}]
  spec["volumes"] = [{"name": "bucket", "csi": {
      "driver": "gcsfuse.csi.storage.gke.io", "volumeAttributes": {"bucketName": job.bucket}}}]
  return {"metadata": {"annotations": {"gke-gcsfuse/volumes": "true"}}, "spec": spec}


def place(job: Job) -> list[dict[str, Any]]:
  """Returns the environment by which a pod finds the others."""
  if job.processes == 1:
    return []
  if job.target.platform == "tpu":    # GKE tells each pod of its slice, and JAX asks
    return [{"name": "SDJAX_COORDINATOR", "value": "auto"}]
  index = "metadata.annotations['batch.kubernetes.io/job-completion-index']"
  return [
      {"name": "SDJAX_COORDINATOR", "value": f"{job.name}-workers-0-0.{job.name}:{PORT}"},
      {"name": "SDJAX_NUM_PROCESSES", "value": str(job.processes)},
      {"name": "SDJAX_PROCESS_ID", "valueFrom": {"fieldRef": {"fieldPath": index}}}]


def skypilot(job: Job) -> str:
  """Returns a task for `sky jobs launch`: https://docs.skypilot.co/en/latest/reference/yaml-spec.html."""
  target = job.target
  is_tpu = target.platform == "tpu"
  resources: dict[str, Any] = {
      "accelerators": f"tpu-{target.accelerator}" if is_tpu else (
          f"{target.accelerator}:{target.chips_per_host}")}
  if is_tpu:
    resources["accelerator_args"] = {"runtime_version": target.runtime_version}
  resources["use_spot"] = job.spot
  if job.processes == 1:
    run = []
  elif is_tpu:                        # as on Cloud TPU, which these are
    run = ["export SDJAX_COORDINATOR=auto"]
  else:
    run = ['export SDJAX_COORDINATOR="$(head -n 1 <<<"$SKYPILOT_NODE_IPS"):' + f'{PORT}"',
           f"export SDJAX_NUM_PROCESSES={job.processes}",
           'export SDJAX_PROCESS_ID="$SKYPILOT_NODE_RANK"']
  run.append(f"exec {shlex.join(job.entry)}")
  return to_yaml({
      "name": job.name, "workdir": ".", "num_nodes": job.count, "resources": resources,
      "setup": f"{install(target.platform)}\n", "run": "\n".join(run)})
