"""The manifests against KubeRay's schema, the service's settings, the locks and the rules for pods.

Overlays are JSON patches (RFC 6902), so that a few lines here render what `kubectl kustomize` renders.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from api.settings import Settings, child_environment

ROOT = Path(__file__).parents[2]
K8S = ROOT / "k8s"
CRD = ROOT.parent / "shared" / "kuberay-crds" / "ray.io_rayclusters.yaml"
LAYERS = ("base", "overlays/local", "overlays/gpu")
BYTES = {"": 1, "Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
Json = dict[str, Any]

# ------------------------------------------------------------------------------------------------- rendering


def documents(path: Path) -> list[Any]:
    # Through JSON: YAML's aliases share one object, and a patch must not change it in two places.
    return json.loads(json.dumps(list(yaml.load_all(path.read_text(encoding="utf-8"), Loader=LOADER))))


def apply_patch(target: Any, operations: list[Json]) -> None:
    """RFC 6902 `add`, `replace` and `remove` on mappings and on list indices, in place."""
    for operation in operations:
        *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
        node = target
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node[part]
        key: Any = int(last) if isinstance(node, list) else last
        if operation["op"] in ("replace", "remove"):
            node[key]  # a path that is not there raises
        if operation["op"] == "remove":
            del node[key]
        elif operation["op"] == "add" and isinstance(node, list):
            node.insert(key, operation["value"])
        else:
            node[key] = operation["value"]


def render(folder: Path) -> list[Json]:
    (kustomization,) = documents(folder / "kustomization.yaml")
    objects: list[Json] = []
    for resource in kustomization["resources"]:
        path = folder / resource
        objects += render(path) if path.is_dir() else documents(path)
    for patch in kustomization.get("patches", []):
        target, hits = patch["target"], 0
        for item in objects:
            if item["kind"] == target["kind"] and re.fullmatch(target["name"], item["metadata"]["name"]):
                (operations,) = documents(folder / patch["path"])
                apply_patch(item, operations)
                hits += 1
        assert hits, f"{folder}/{patch['path']} patches nothing"
    return objects


def of_kind(objects: list[Json], kind: str) -> list[Json]:
    return [item for item in objects if item["kind"] == kind]


def pod_templates(objects: list[Json]) -> dict[str, Json]:
    """Templates of the API, of Ray's head and of each worker group, and the pod of the examples."""
    (deployment,), (cluster,) = of_kind(objects, "Deployment"), of_kind(objects, "RayCluster")
    groups = {group["groupName"]: group["template"] for group in cluster["spec"]["workerGroupSpecs"]}
    (pod,) = documents(K8S / "examples" / "inputs-pod.yaml")
    return {"api": deployment["spec"]["template"], "head": cluster["spec"]["headGroupSpec"]["template"], "pod": pod} | groups


def container(template: Json) -> Json:
    (only,) = template["spec"]["containers"]
    return only


def env_of(template: Json) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container(template)["env"]}


def ray_templates(objects: list[Json]) -> list[Json]:
    return [template for name, template in pod_templates(objects).items() if name not in ("api", "pod")]


# ---------------------------------------------------------------------------------------------------- checks


def quantity(text: str) -> int:
    number, unit = re.fullmatch(r"(\d+)(|Ki|Mi|Gi)", text).groups()  # type: ignore[union-attr]
    return int(number) * BYTES[unit]


def problems_of_pods(objects: list[Json]) -> Iterator[str]:
    for name, template in pod_templates(objects).items():
        spec, box = template["spec"], container(template)
        pod, inner = spec.get("securityContext", {}), box.get("securityContext", {})
        if not (pod.get("runAsNonRoot") and pod.get("runAsUser") == 10001 == pod.get("runAsGroup") == pod.get("fsGroup")):
            yield f"{name}: expected user 10001 of the images"
        if pod.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{name}: expected seccomp RuntimeDefault"
        if inner.get("allowPrivilegeEscalation") is not False or inner.get("capabilities") != {"drop": ["ALL"]}:
            yield f"{name}: expected no privileges"
        if inner.get("readOnlyRootFilesystem") is not True:
            yield f"{name}: expected a read-only root"
        if spec.get("automountServiceAccountToken") is not False:
            yield f"{name}: expected no service-account token"
        if spec.get("enableServiceLinks") is not False:
            yield f"{name}: expected no service links, whose variables collide with SEDSFT_*"
        for part in ("requests", "limits"):
            if not {"cpu", "memory"} <= box.get("resources", {}).get(part, {}).keys():
                yield f"{name}: expected {part} of cpu and memory"
        volumes = {volume["name"] for volume in spec["volumes"]}
        if volumes != {mount["name"] for mount in box["volumeMounts"]}:
            yield f"{name}: volumes and mounts differ"


def problems_of_settings(objects: list[Json], tmp: Path) -> Iterator[str]:
    """What the service's settings say to the environment of the API's container."""
    (service,) = of_kind(objects, "Service")
    (cluster,) = of_kind(objects, "RayCluster")
    template = pod_templates(objects)["api"]
    box, env = container(template), env_of(template)
    known = {f"SEDSFT_{field.upper()}" for field in Settings.model_fields}
    yield from (f"{name}: no such setting" for name in env.keys() - known)
    values: Json = {name.removeprefix("SEDSFT_").lower(): value for name, value in env.items() if name in known}
    settings = Settings(**values)
    (port,) = box["ports"]
    if port["containerPort"] != settings.port:
        yield f"containerPort {port['containerPort']}, the API listens on {settings.port}"
    if service["spec"]["ports"][0]["port"] != settings.port or service["spec"]["ports"][0]["targetPort"] != port["name"]:
        yield "the Service leads elsewhere"
    if settings.host != "0.0.0.0" or not settings.allow_remote:
        yield "the API would listen on loopback"
    dashboard = next(p["containerPort"] for p in container(pod_templates(objects)["head"])["ports"] if p["name"] == "dashboard")
    if settings.ray_dashboard != f"http://{cluster['metadata']['name']}-head-svc:{dashboard}":
        yield f"{settings.ray_dashboard} is not the head's service"
    mounts = {mount["mountPath"]: mount["name"] for mount in box["volumeMounts"]}
    if mounts.get(str(settings.home)) != "state" or mounts.get(str(settings.runs)) != "runs":
        yield "home and runs are not on their volumes"
    if str(getattr(settings.ray_token_path, "parent", None)) not in mounts:
        yield "the token is not mounted where the settings read it"
    for ray in ray_templates(objects):
        paths = {(m["mountPath"], m["name"]) for m in container(ray)["volumeMounts"]}
        if not {(str(settings.runs), "runs"), ("/srv/inputs", "inputs")} <= paths:
            yield "Ray's pods see runs and inputs under other paths than the API"
        if "state" in {name for _, name in paths}:
            yield "Ray's pods see the API's key and database"
        same = child_environment(settings.model_copy(update={"home": tmp}), "mark")
        yield from (
            f"{name}={value}, `sedsft up` sets {same[name]}"
            for name, value in env_of(ray).items()
            if name in same and name != "HOME" and same[name] != value
        )


def problems_of_ray(objects: list[Json]) -> Iterator[str]:
    (cluster,) = of_kind(objects, "RayCluster")
    spec = cluster["spec"]
    locked = re.search(r"^ray==(\S+)$", (ROOT / "requirements" / "cpu.txt").read_text(encoding="utf-8"), re.MULTILINE)
    if locked is None or spec["rayVersion"] != locked[1]:
        yield f"rayVersion {spec['rayVersion']} is not the locked one"
    if spec["authOptions"]["mode"] != "token":
        yield "Ray asks for no token"
    secret = next(v["secret"] for v in pod_templates(objects)["api"]["spec"]["volumes"] if "secret" in v)
    if secret["secretName"] != spec["authOptions"]["secretName"] or secret["items"][0]["key"] != "auth_token":
        yield "the API reads another token than Ray"
    if spec["headGroupSpec"]["rayStartParams"]["num-cpus"] != "0":
        yield "actors may land on the head"
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        limit = quantity(container(group["template"])["resources"]["limits"]["memory"])
        shared = next(v["emptyDir"] for v in group["template"]["spec"]["volumes"] if v["name"] == "dshm")
        store = int(group["rayStartParams"]["object-store-memory"])
        if shared["medium"] != "Memory" or not store < quantity(shared["sizeLimit"]) <= limit // 2:
            yield f"expected object store {store} < /dev/shm {shared['sizeLimit']} <= half of the memory {limit}"


def problems_of_images(objects: list[Json], gpu: bool) -> Iterator[str]:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    worker = f"sedsft-worker:{version}-{'gpu' if gpu else 'cpu'}"
    for name, template in pod_templates(objects).items():
        expected = f"sedsft-api:{version}" if name in ("api", "pod") else worker
        if container(template)["image"] != expected:
            yield f"{name}: image {container(template)['image']}, expected {expected}"


def problems_of_references(objects: list[Json]) -> Iterator[str]:
    """Names that one object takes from another."""
    claims = {claim["metadata"]["name"] for claim in of_kind(objects, "PersistentVolumeClaim")}
    accounts = {account["metadata"]["name"] for account in of_kind(objects, "ServiceAccount")}
    (deployment,), (service,) = of_kind(objects, "Deployment"), of_kind(objects, "Service")
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    for selector in (deployment["spec"]["selector"]["matchLabels"], service["spec"]["selector"]):
        if not selector.items() <= labels.items():
            yield f"selector {selector} misses the API"
    for name, template in pod_templates(objects).items():
        used = {v["persistentVolumeClaim"]["claimName"] for v in template["spec"]["volumes"] if "persistentVolumeClaim" in v}
        yield from (f"{name}: no claim {claim}" for claim in used - claims)
        if template["spec"]["serviceAccountName"] not in accounts:
            yield f"{name}: no account {template['spec']['serviceAccountName']}"
    if any("namespace" in item["metadata"] for item in objects):
        yield "expected manifests without namespace"


def problems_of_network(objects: list[Json]) -> Iterator[str]:
    policies = {policy["metadata"]["name"]: policy["spec"] for policy in of_kind(objects, "NetworkPolicy")}
    deny = {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    if policies.get("sedsft-default-deny") != deny:
        yield "expected everything to be denied by default"
    port = int(env_of(pod_templates(objects)["api"])["SEDSFT_PORT"])
    allowed = {
        (name, p["port"])
        for name, spec in policies.items()
        for side in ("ingress", "egress")
        for rule in spec.get(side, [])
        for p in rule.get("ports", [])
    }
    expected = {("sedsft-dns", 53), ("sedsft-api", port), ("sedsft-api", 8265), ("sedsft-ray-dashboard", 8265)}
    if allowed != expected:
        yield f"expected the ports {sorted(expected)}, got {sorted(allowed)}"
    for name, spec in policies.items():
        for side in ("ingress", "egress"):
            for rule in spec.get(side, []):
                if not rule.get("from" if side == "ingress" else "to"):
                    yield f"{name}: a rule for everyone"


def problems(objects: list[Json], tmp: Path, gpu: bool = False) -> list[str]:
    return [
        *problems_of_pods(objects),
        *problems_of_settings(objects, tmp),
        *problems_of_ray(objects),
        *problems_of_images(objects, gpu),
        *problems_of_references(objects),
        *problems_of_network(objects),
    ]


# ---------------------------------------------------------------------------------------------------- schema


@cache
def cluster_schema() -> Json:
    """KubeRay's RayCluster, with unknown fields refused as the API server does under strict validation."""
    if not CRD.exists():
        pytest.skip(f"KubeRay's CRDs are not in {CRD.parent}")
    versions = yaml.load(CRD.read_text(encoding="utf-8"), Loader=LOADER)["spec"]["versions"]
    (schema,) = [version["schema"]["openAPIV3Schema"] for version in versions if version["name"] == "v1"]
    strict(schema)
    return schema  # type: ignore[no-any-return]


def strict(schema: Any) -> None:
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict) and "x-kubernetes-preserve-unknown-fields" not in schema:
            schema.setdefault("additionalProperties", False)
        for value in schema.values():
            strict(value)
    elif isinstance(schema, list):
        for value in schema:
            strict(value)


def pod_schema() -> Json:
    """The RayCluster's own copy of Kubernetes' pod specification; it describes every pod."""
    head = cluster_schema()["properties"]["spec"]["properties"]["headGroupSpec"]
    return head["properties"]["template"]["properties"]["spec"]  # type: ignore[no-any-return]


def schema_errors(schema: Json, value: Json) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in jsonschema.Draft202012Validator(schema).iter_errors(value)]


# ----------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_has_no_problem(layer: str, tmp_path: Path) -> None:
    assert problems(render(K8S / layer), tmp_path, gpu=layer.endswith("gpu")) == []


@pytest.mark.parametrize("layer", LAYERS)
def test_the_cluster_and_every_pod_fit_the_schemas(layer: str) -> None:
    objects = render(K8S / layer)
    (cluster,) = of_kind(objects, "RayCluster")
    assert schema_errors(cluster_schema(), cluster) == []
    for template in pod_templates(objects).values():
        assert schema_errors(pod_schema(), template["spec"]) == []


def test_the_schema_refuses_an_unknown_field_and_a_wrong_type() -> None:
    (cluster,) = of_kind(render(K8S / "base"), "RayCluster")
    cluster["spec"]["headGroupSpec"]["rayStartParam"] = {}
    cluster["spec"]["authOptions"]["mode"] = "none"
    found = " ".join(schema_errors(cluster_schema(), cluster))
    assert "rayStartParam" in found
    assert "authOptions.mode" in found


def test_the_gpu_overlay_asks_for_gpus_and_the_others_for_none() -> None:
    for layer in LAYERS:
        (head, *workers) = ray_templates(render(K8S / layer))
        gpus = [container(worker)["resources"]["limits"].get("nvidia.com/gpu", "0") for worker in workers]
        assert (min(map(int, gpus)) > 0) == layer.endswith("gpu")
        assert "nvidia.com/gpu" not in container(head)["resources"]["limits"]
        if layer.endswith("gpu"):
            assert workers[0]["spec"]["tolerations"] == [
                {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
            ]


def _api(objects: list[Json]) -> Json:
    return pod_templates(objects)["api"]


def _cluster(objects: list[Json]) -> Json:
    return of_kind(objects, "RayCluster")[0]["spec"]  # type: ignore[no-any-return]


def _rename_env(objects: list[Json], old: str, new: str) -> None:
    next(entry for entry in container(_api(objects))["env"] if entry["name"] == old)["name"] = new


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda o: _rename_env(o, "SEDSFT_RAY_DASHBOARD", "SEDSFT_RAY_URL"), "SEDSFT_RAY_URL: no such setting"),
        (lambda o: container(_api(o))["ports"][0].update(containerPort=8643), "the API listens on 8642"),
        (lambda o: container(_api(o))["securityContext"].pop("capabilities"), "api: expected no privileges"),
        (lambda o: container(_api(o))["resources"].pop("limits"), "api: expected limits of cpu and memory"),
        (lambda o: container(_api(o)).update(image="sedsft-api:9"), "api: image sedsft-api:9"),
        (lambda o: _api(o)["spec"].pop("enableServiceLinks"), "api: expected no service links"),
        (lambda o: _cluster(o).update(rayVersion="2.59.0"), "rayVersion 2.59.0 is not the locked one"),
        (lambda o: _cluster(o)["authOptions"].update(secretName="other"), "the API reads another token than Ray"),
        (lambda o: _cluster(o)["headGroupSpec"]["rayStartParams"].update({"num-cpus": "4"}), "actors may land on the head"),
        (
            lambda o: _cluster(o)["workerGroupSpecs"][0]["rayStartParams"].update({"object-store-memory": str(64 << 30)}),
            "store",
        ),
        (lambda o: o.remove(of_kind(o, "PersistentVolumeClaim")[1]), "no claim sedsft-runs"),
        (lambda o: of_kind(o, "NetworkPolicy")[0]["spec"].update(ingress=[{}]), "denied by default"),
    ],
)
def test_a_planted_mistake_is_caught(break_it: Callable[[list[Json]], Any], expected: str, tmp_path: Path) -> None:
    objects = copy.deepcopy(render(K8S / "base"))
    break_it(objects)
    assert expected in "\n".join(problems(objects, tmp_path))


def test_patches_follow_rfc_6902() -> None:
    value = {"a": [1, {"b/c": 2}], "d": 3}
    apply_patch(value, [{"op": "replace", "path": "/a/1/b~1c", "value": 5}, {"op": "remove", "path": "/d"}])
    apply_patch(value, [{"op": "add", "path": "/a/0", "value": 0}, {"op": "add", "path": "/e", "value": 1}])
    assert value == {"a": [0, 1, {"b/c": 5}], "e": 1}
    with pytest.raises(KeyError):
        apply_patch(value, [{"op": "replace", "path": "/missing", "value": 1}])


@pytest.mark.parametrize("layer", LAYERS)
def test_kubectl_renders_the_same(layer: str, tmp_path: Path) -> None:
    if (kubectl := shutil.which("kubectl")) is None:
        pytest.skip("kubectl is not installed")
    command = [kubectl, "kustomize", str(K8S / layer)]
    # Without a configuration of any cluster: this only renders.
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "KUBECONFIG": os.devnull}
    text = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=True).stdout
    theirs = list(yaml.load_all(text, Loader=LOADER))
    assert {(item["kind"], item["metadata"]["name"]): item for item in theirs} == {
        (item["kind"], item["metadata"]["name"]): item for item in render(K8S / layer)
    }
