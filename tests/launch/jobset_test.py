"""JobSets of all targets against the schema that JobSet publishes, as a strict server reads it.

jobset_schema.json.gz is the schema of v1alpha2 without its descriptions and its status, from
https://github.com/kubernetes-sigs/jobset, config/components/crd/bases/jobset.x-k8s.io_jobsets.yaml
at commit 08dfbdfd682714a9ab929633eca8dc95315187e7 of 2026-08-18, Apache-2.0. It is made by

  PYTHONPATH=launch python tests/launch/jobset_test.py jobset.x-k8s.io_jobsets.yaml

What it cannot tell: rules in CEL (x-kubernetes-validations; none is about the fields that are
rendered), and those that Kubernetes and JobSet have in code, of which some are tested here by hand.
"""

import copy
import gzip
import json
import sys
from pathlib import Path

import jsonschema
import manifests
import pytest
import targets
import yaml

SCHEMA = Path(__file__).parent / "jobset_schema.json.gz"
# A CRD leaves an object's own metadata to the server: its fields that people write, from
# https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/object-meta/
STRINGS = {"type": "object", "additionalProperties": {"type": "string"}}
METADATA = {"type": "object", "required": ["name"], "properties": {
    "name": {"type": "string"}, "namespace": {"type": "string"},
    "annotations": STRINGS, "labels": STRINGS}}
# Those of Kubernetes' own keywords that say nothing more about what is valid: beside int-or-string
# the schema spells it out as anyOf, and an atomic map is one that is replaced as a whole.
SILENT = {"x-kubernetes-int-or-string", "x-kubernetes-map-type"}


def without(schema, *words):
  """Returns the schema without these keywords; fields of such names stay."""
  if isinstance(schema, list):
    return [without(item, *words) for item in schema]
  if not isinstance(schema, dict):
    return schema
  kept = {key: value for key, value in schema.items() if key not in words}
  return {key: {name: without(field, *words) for name, field in value.items()}
          if key == "properties" else without(value, *words) for key, value in kept.items()}


def parts(schema):
  """Yields a schema and all within it."""
  yield schema
  inner = [*schema.get("properties", {}).values(), *schema.get("anyOf", ())]
  inner += [schema[key] for key in ("items", "additionalProperties") if schema.get(key)]
  for part in inner:
    yield from parts(part)


def unique(validator, keys, items, schema):
  """Finds entries of a list with the same keys: the server refuses them."""
  seen = []
  for item in items:
    name = [item.get(key, schema["items"]["properties"][key].get("default")) for key in keys]
    if name in seen:
      yield jsonschema.ValidationError(f"{name} is there twice")
    seen.append(name)


def unique_set(validator, kind, items, schema):
  """Finds items of a list that are the same, where it stands for a set."""
  if kind == "set":
    yield from validator.descend(items, {"uniqueItems": True})


@pytest.fixture(scope="module")
def schema():
  """The published schema, which refuses fields that it does not know (kubectl's --validate)."""
  schema = json.loads(gzip.decompress(SCHEMA.read_bytes()))
  schema["properties"]["metadata"] = METADATA
  schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
  schema["properties"]["apiVersion"]["enum"] = ["jobset.x-k8s.io/v1alpha2"]
  schema["properties"]["kind"]["enum"] = ["JobSet"]
  for part in list(parts(schema)):
    if "properties" in part:
      part["additionalProperties"] = False
  return schema


@pytest.fixture(scope="module")
def validator(schema):
  rules = {"x-kubernetes-list-map-keys": unique, "x-kubernetes-list-type": unique_set}
  kind = jsonschema.validators.extend(jsonschema.Draft4Validator, rules)
  kind.check_schema(schema)
  return kind(schema)


def rendered(target, count=1, spot=False, bucket=""):
  command = ["sdjax", "train", "--config", "configs/sd15.py", "--workdir", "/mnt/a b"]
  job = manifests.Job(target, command, "sd15", count, "", "reg.io/me/sdjax:1", "", bucket, spot)
  return yaml.safe_load(manifests.jobset(job))


def faults(validator, manifest):
  return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@pytest.mark.parametrize("target", [n for n, t in targets.TARGETS.items() if t.platform != "cpu"])
def test_every_target_fits_the_schema(validator, target):
  assert faults(validator, rendered(target)) == []
  assert faults(validator, rendered(target, count=3, spot=True, bucket="pictures")) == []


def test_the_schema_is_understood_as_a_whole(schema):
  """A newer one may say what is not looked at here."""
  found = list(parts(schema))
  assert len(found) > 1000
  words = set().union(*found)
  assert {word for word in words if word.startswith("x-")} == SILENT | {
      "x-kubernetes-list-map-keys", "x-kubernetes-list-type", "x-kubernetes-validations"}
  assert words - SILENT <= {
      "additionalProperties", "anyOf", "default", "enum", "format", "items", "maxItems", "minimum",
      "pattern", "properties", "required", "type", "x-kubernetes-list-map-keys",
      "x-kubernetes-list-type", "x-kubernetes-validations"}
  assert all("anyOf" in part for part in found if part.get("x-kubernetes-int-or-string"))
  # The rules in CEL: what may not be changed later on, and fields that are not rendered.
  rules = {rule["rule"] for part in found for rule in part.get("x-kubernetes-validations", ())}
  assert len(rules) == 3
  assert all(rule == "self == oldSelf" or "startupPolicy" in rule or "self.templates" in rule
             for rule in rules)
  assert set(rendered("v5e-16")["spec"]) == {"failurePolicy", "replicatedJobs"}


def misspell(key):
  def change(place):
    place[key + "s"] = place.pop(key)
  return change


JOB = ("spec", "replicatedJobs", 0, "template", "spec")
POD = (*JOB, "template", "spec")


@pytest.mark.parametrize("path, change, said", [
    ((), misspell("kind"), "'kinds'"),
    (("metadata",), misspell("annotations"), "'annotationss'"),
    (("spec",), misspell("failurePolicy"), "'failurePolicys'"),
    (("spec", "failurePolicy", "rules", 0), misspell("name"), "'name' is a required"),
    (("spec", "failurePolicy", "rules", 0), lambda rule: rule.update(action="Fail"), "'Fail'"),
    (JOB, misspell("parallelism"), "'parallelisms'"),
    (JOB, lambda job: job.update(completions="4"), "'4' is not of type 'integer'"),
    (POD, misspell("nodeSelector"), "'nodeSelectors'"),
    (POD, lambda pod: pod["nodeSelector"].update(spot=True), "True is not of type 'string'"),
    (POD, lambda pod: pod["containers"].append(pod["containers"][0]), "['sdjax'] is there twice"),
    ((*POD, "containers", 0), misspell("volumeMounts"), "'volumeMountss'"),
    ((*POD, "containers", 0), lambda box: box.update(command=[1]), "1 is not of type 'string'"),
    ((*POD, "containers", 0, "resources", "limits"),
     lambda limits: limits.update({"google.com/tpu": "four"}), "'four'"),
    ((*POD, "containers", 0, "ports", 0), misspell("containerPort"), "'containerPorts'"),
    ((*POD, "volumes", 0, "csi"), misspell("driver"), "'drivers'"),
])
def test_a_fault_is_found(validator, path, change, said):
  manifest = place = copy.deepcopy(rendered("v5e-16", bucket="pictures"))
  for step in path:
    place = place[step]
  change(place)
  assert said in "\n".join(faults(validator, manifest))


def test_numbers_and_quantities_may_be_strings(validator):
  """Where the schema says int-or-string, both are valid."""
  manifest = rendered("v5e-16")
  for limit in (4, "4", "500m"):
    box = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    box["containers"][0]["resources"]["limits"] = {"google.com/tpu": limit}
    assert faults(validator, manifest) == []


def make(crd: Path) -> None:
  """Writes SCHEMA anew."""
  (version,) = yaml.safe_load(crd.read_text())["spec"]["versions"]
  schema = without(version["schema"]["openAPIV3Schema"], "description")
  del schema["properties"]["status"]
  text = json.dumps(schema, separators=(",", ":"))
  SCHEMA.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
  make(Path(sys.argv[1]))
