"""RayCluster and RayJob manifests of KubeRay (ray.io/v1)."""

from __future__ import annotations

import functools
import re
from typing import Any

import yaml

from gpt2dist.cluster.check.document import YAML_ERRORS, Document, Path, did_you_mean
from gpt2dist.cluster.check.fit import Cluster, Group
from gpt2dist.cluster.check.schema import Schema, check_schema, kubernetes_type
from gpt2dist.cluster.check.secrets import FIX as SECRET_FIX
from gpt2dist.cluster.check.secrets import is_secret_name
from gpt2dist.cluster.check.versions import Pins, check_image
from gpt2dist.cluster.machines import Machines
from gpt2dist.config import UserError

KINDS = ("RayCluster", "RayJob")
UNCHECKED = ("RayService", "RayCronJob")
MAX_NAME = {"RayCluster": 53, "RayJob": 47}
DRAIN_VARIABLE = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
DEFAULT_DRAIN_SECONDS = 30.0
"""Ray's, when `ray start --block` is told to end."""
DEFAULT_GRACE_SECONDS = 30.0
"""Kubernetes', from the word to the end of a pod."""
AUTH_SINCE = (2, 52)
SPOT_LABELS = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "cloud.google.com/gke-preemptible": "true",
    "cloud.google.com/gke-provisioning": "spot",
    "kubernetes.azure.com/scalesetpriority": "spot",
}
GPU = "nvidia.com/gpu"
QUANTITY = re.compile(r"(\+?(?:\d+\.?\d*|\.\d+))([eE][+-]?\d+|[numkMGTPE]|[KMGTPE]i)?")
"""An amount of a resource: a number, and an exponent or a unit."""
UNITS = {unit: 1000.0**power for power, unit in enumerate(("n", "u", "m", "", *"kMGTPE"), -3)}
UNITS |= {f"{unit}i": 1024.0**power for power, unit in enumerate("KMGTPE", 1)}
ADDED_VOLUMES = {"ray-logs", "shared-mem"}
"""By KubeRay, to any pod."""


@functools.cache
def _schema(kind: str) -> Schema:
    """The fields of KubeRay 1.7 (https://docs.ray.io/en/latest/cluster/kubernetes/references/api.html)."""
    try:
        pod, container = kubernetes_type("V1PodTemplateSpec"), kubernetes_type("V1Container")
        service, metadata = kubernetes_type("V1Service"), kubernetes_type("V1ObjectMeta")
    except ImportError:
        raise UserError("manifests are checked with: pip install 'gpt2dist[cluster]'") from None
    definitions: Schema = {}
    for part in (pod, container, service, metadata):
        definitions |= part.pop("definitions")

    text, whole, number, yes_no, free = ({"type": t} for t in ("string", "integer", "number", "boolean", "object"))
    texts = {"type": "object", "additionalProperties": text}
    of_container = definitions["V1Container"]["properties"]

    def one_of(*values: str) -> Schema:
        return {"type": "string", "enum": list(values)}

    def table(required: tuple[str, ...] = (), **fields: Schema) -> Schema:
        return {
            "type": "object",
            "properties": fields,
            "required": list(required),
            "additionalProperties": False,
        }

    group = {"rayStartParams": texts, "template": pod, "labels": texts, "resources": texts}
    head = table(
        ("template",),
        **group,
        serviceType=one_of("ClusterIP", "NodePort", "LoadBalancer"),
        headService=service,
        enableIngress=yes_no,
        ingressOptions=free,
    )
    worker = table(
        ("groupName", "template"),
        **group,
        groupName=text,
        replicas=whole,
        minReplicas={"type": "integer", "minimum": 0},
        maxReplicas={"type": "integer", "minimum": 0},
        idleTimeoutSeconds={"type": "integer", "minimum": 0},
        numOfHosts=whole,
        priority=whole,
        suspend=yes_no,
        scaleStrategy=free,
    )
    autoscaler = table(
        version=one_of("v1", "v2"),
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds={"type": "integer", "minimum": 0},
        image=text,
        imagePullPolicy=one_of("Always", "IfNotPresent", "Never"),
        command=of_container["command"],
        args=of_container["args"],
        env=of_container["env"],
        envFrom=of_container["envFrom"],
        resources=of_container["resources"],
        securityContext=of_container["securityContext"],
        volumeMounts=of_container["volumeMounts"],
    )
    cluster = table(
        ("headGroupSpec",),
        rayVersion=text,
        authOptions=table(mode=one_of("disabled", "token"), secretName=text, enableK8sTokenAuth=yes_no),
        enableInTreeAutoscaling=yes_no,
        autoscalerOptions=autoscaler,
        headGroupSpec=head,
        workerGroupSpecs={"type": "array", "items": worker},
        gcsFaultToleranceOptions=free,
        headServiceAnnotations=texts,
        historyServerOptions=free,
        managedBy=text,
        networkPolicy=free,
        suspend=yes_no,
        tlsOptions=free,
        upgradeStrategy=free,
    )
    job = table(
        entrypoint=text,
        rayClusterSpec=cluster,
        clusterSelector=texts,
        runtimeEnvYAML=text,
        submissionMode=one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
        submitterPodTemplate=pod,
        submitterConfig=free,
        backoffLimit=whole,
        activeDeadlineSeconds=whole,
        preRunningDeadlineSeconds=whole,
        shutdownAfterJobFinishes=yes_no,
        ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
        deletionStrategy=free,
        entrypointNumCpus=number,
        entrypointNumGpus=number,
        entrypointResources=text,
        jobId=text,
        managedBy=text,
        metadata=texts,
        suspend=yes_no,
    )
    spec = cluster if kind == "RayCluster" else job
    top = table(("metadata", "spec"), apiVersion=one_of("ray.io/v1"), kind=text, metadata=metadata, spec=spec)
    return {**top, "definitions": definitions}


def check(document: Document, pins: Pins, known: Machines) -> Cluster | None:
    """All rules of one manifest; the workers that it allows, unless it has none or is too broken to tell."""
    kind = document.at("kind")
    if kind == "Secret":
        _secret(document)
    if not _kind(document) or kind not in KINDS:
        return None
    if not check_schema(document, "kuberay-schema", _schema(kind), document.value):
        return None
    _name(document)
    spec: Path = ("spec",)
    if kind == "RayJob":
        _job(document)
        spec = ("spec", "rayClusterSpec")
    if not document.table(*spec):
        return None
    _versions(document, spec, pins)
    _autoscaler(document, spec)
    _head(document, spec)
    groups: list[Path] = [(*spec, "headGroupSpec")]
    groups += [(*spec, "workerGroupSpecs", i) for i in range(len(document.items(*spec, "workerGroupSpecs")))]
    for group in groups:
        if _pod(document, (*group, "template", "spec")):
            _group(document, group, pins, is_v2(document, spec))
    return _cluster(document, spec, known)


def _kind(document: Document) -> bool:
    """Whether it may be one that is checked, or of no concern. KubeRay and Kubernetes pass over or refuse others."""
    missing = [key for key in ("apiVersion", "kind") if not document.at(key)]
    for key in missing:
        of_ray = key == "apiVersion" and document.at("kind") in KINDS
        document.error("kuberay-schema", (key,), "is missing", "apiVersion: ray.io/v1" if of_ray else "add it")
    kind, api = str(document.at("kind") or ""), str(document.at("apiVersion") or "")
    known = (*KINDS, *UNCHECKED)
    if kind in UNCHECKED:
        what, fix = f"nothing of a {kind} is checked", "kubectl apply --dry-run=server"
        document.warning("kuberay-schema", ("kind",), what, fix)
    elif kind and kind not in known and (api.startswith("ray.io/") or kind.lower().startswith("ray")):
        document.error("kuberay-schema", ("kind",), f"KubeRay has no {kind}", did_you_mean(kind, known))
    return not missing


def is_v2(document: Document, spec: Path) -> bool:
    """Whether the second autoscaler is asked for."""
    on = document.at(*spec, "enableInTreeAutoscaling") is True
    return on and document.at(*spec, "autoscalerOptions", "version") == "v2"


def _name(document: Document) -> None:
    name = str(document.at("metadata", "name") or document.at("metadata", "generateName") or "").rstrip("-")
    most = MAX_NAME[document.value["kind"]]
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) or len(name) > most:
        what = f"{name!r} is not lower-case letters, digits and dashes, of at most {most}"
        document.error("kuberay-name", ("metadata", "name"), what, "name: gpt2dist")


def _secret(document: Document) -> None:
    for key in ("data", "stringData"):
        if document.table(key):
            fix = "kubectl create secret … from a file outside of the repository"
            document.error("secret", (key,), "a secret in the file", fix)


def _job(document: Document) -> None:
    spec: Path = ("spec",)
    get = document.table(*spec).get
    if not get("entrypoint") and get("submissionMode") != "InteractiveMode":
        fix = "entrypoint: gpt2dist train …"
        document.error("kuberay-job", (*spec, "entrypoint"), "is missing: the job does nothing", fix)
    selector, cluster = bool(get("clusterSelector")), bool(get("rayClusterSpec"))
    if selector == cluster:
        what = "both clusterSelector and rayClusterSpec" if cluster else "neither rayClusterSpec nor clusterSelector"
        document.error("kuberay-job", spec, f"has {what}", "give one of them")
    retries = document.number(*spec, "backoffLimit") or 0
    if retries and (selector or get("submissionMode") == "InteractiveMode"):
        fix = "remove it"
        document.error("kuberay-job", (*spec, "backoffLimit"), "KubeRay refuses it with this kind of job", fix)
    elif cluster and not retries:
        what = "a head that dies ends the job for good"
        document.warning("kuberay-job", (*spec, "backoffLimit"), what, "backoffLimit: 3; the run goes on where it was")
    after = document.number(*spec, "ttlSecondsAfterFinished") or 0
    if cluster and not get("shutdownAfterJobFinishes") and not get("deletionStrategy"):
        what = "the cluster stays, and costs, when the job is done"
        document.warning("kuberay-job", (*spec, "shutdownAfterJobFinishes"), what, "shutdownAfterJobFinishes: true")
        if after:
            what = "KubeRay refuses it without shutdownAfterJobFinishes"
            document.error("kuberay-job", (*spec, "ttlSecondsAfterFinished"), what, "shutdownAfterJobFinishes: true")
    text = get("runtimeEnvYAML")
    try:
        environment = yaml.safe_load(text) if isinstance(text, str) else {}
    except YAML_ERRORS as e:
        environment = {}
        message = " ".join(str(e).split())
        document.error("kuberay-job", (*spec, "runtimeEnvYAML"), f"is not valid YAML: {message}", "correct it")
    variables = environment.get("env_vars") if isinstance(environment, dict) else None
    for name, value in (variables if isinstance(variables, dict) else {}).items():
        if is_secret_name(str(name)) and value:
            what = f"{name} is shown to everybody who may see the job"
            document.error("secret", (*spec, "runtimeEnvYAML"), what, SECRET_FIX)


def _versions(document: Document, spec: Path, pins: Pins) -> None:
    path: Path = (*spec, "rayVersion")
    version = document.at(*path)
    mode = document.at(*spec, "authOptions", "mode")
    if mode != "token":
        document.error(
            "token",
            (*spec, "authOptions", "mode"),
            "Ray takes commands without a token from whoever reaches it",
            "authOptions: {mode: token}",
        )
    if version is None:
        document.error("ray-version", path, "is missing", f'rayVersion: "{pins.ray}"')
    elif version != pins.ray:
        what = f"{version}, but {pins.source} has {pins.ray}"
        document.error("ray-version", path, what, f'rayVersion: "{pins.ray}"')
        numbers = tuple(int(n) for n in re.findall(r"\d+", str(version))[:2])
        if mode == "token" and numbers < AUTH_SINCE:
            document.error("token", path, "tokens need Ray 2.52", f'rayVersion: "{pins.ray}"')


def _autoscaler(document: Document, spec: Path) -> None:
    path: Path = (*spec, "autoscalerOptions")
    if document.at(*spec, "enableInTreeAutoscaling") is not True:
        what = "workers neither come nor go: idle ones are paid for"
        document.warning("autoscaler", (*spec, "enableInTreeAutoscaling"), what, "enableInTreeAutoscaling: true")
    elif document.at(*path, "version") != "v2":
        what = "the first autoscaler neither drains nodes nor knows groups' own idle times"
        document.warning("autoscaler", (*path, "version"), what, "version: v2")
    elif document.number(*path, "idleTimeoutSeconds") is None:
        what = "is missing: workers are removed after 60 s, while a run restarts"
        document.warning("idle-timeout", (*path, "idleTimeoutSeconds"), what, "idleTimeoutSeconds: 600")
    variables = _environment(document, _container(document, (*spec, "headGroupSpec")))
    if "RAY_enable_autoscaler_v2" in variables and document.at(*path, "version"):
        where = variables["RAY_enable_autoscaler_v2"][0]
        document.error("autoscaler", where, "KubeRay refuses it beside autoscalerOptions.version", "remove it")
    if not document.items(*spec, "workerGroupSpecs"):
        document.error("max-workers", (*spec, "workerGroupSpecs"), "no workers: nothing can train", "add a group")
    for i in range(len(document.items(*spec, "workerGroupSpecs"))):
        group: Path = (*spec, "workerGroupSpecs", i)
        least, most = document.number(*group, "minReplicas"), document.number(*group, "maxReplicas")
        if document.at(*spec, "enableInTreeAutoscaling") is not True:
            continue  # there are `replicas` of them
        if most is None:
            document.error("max-workers", (*group, "maxReplicas"), "is missing: no limit to the cost", "maxReplicas: 4")
        elif (least or 0) > most:
            what = f"{least:g} is more than maxReplicas = {most:g}"
            document.error("max-workers", (*group, "minReplicas"), what, "minReplicas: 0")
        elif least:
            what = f"{least:g} machines run, and cost, whether there is work or not"
            document.warning("min-workers", (*group, "minReplicas"), what, "minReplicas: 0")
        if document.at(*group, "idleTimeoutSeconds") is not None and not is_v2(document, spec):
            document.error("autoscaler", (*group, "idleTimeoutSeconds"), "needs autoscaler v2", "version: v2")


def _head(document: Document, spec: Path) -> None:
    head: Path = (*spec, "headGroupSpec")
    if document.at(*head, "rayStartParams", "num-cpus") != "0":
        document.warning(
            "head-runs-tasks",
            (*head, "rayStartParams", "num-cpus"),
            "tasks may run on the head, and take it down with everything else",
            'num-cpus: "0"',
        )
    kind = document.at(*head, "serviceType") or document.at(*head, "headService", "spec", "type")
    if kind in ("NodePort", "LoadBalancer"):
        where: Path = (*head, "serviceType") if document.at(*head, "serviceType") else (*head, "headService")
        what = f"{kind}: the dashboard and the Jobs API are reached from outside of the cluster"
        document.error("open-dashboard", where, what, "serviceType: ClusterIP, and kubectl port-forward")
    if document.at(*head, "enableIngress") is True:
        what = "the dashboard and the Jobs API are reached from outside of the cluster"
        document.error("open-dashboard", (*head, "enableIngress"), what, "remove it; kubectl port-forward")
    pod: Path = (*head, "template", "spec")
    wanted = document.table(*pod, "nodeSelector").items()
    spot: list[Path] = [(*pod, "nodeSelector", label) for label, value in wanted if SPOT_LABELS.get(label) == value]
    for where in spot + _spot_terms(document, pod):
        what = "the head is on a spot machine: when it is taken away, the whole cluster ends"
        document.error("spot-head", where, what, "choose on-demand machines")


def _spot_terms(document: Document, pod: Path) -> list[Path]:
    """Where the affinity asks for spot machines: in each of its terms, of which one has to hold."""
    required: Path = (*pod, "affinity", "nodeAffinity", "requiredDuringSchedulingIgnoredDuringExecution")
    terms: Path = (*required, "nodeSelectorTerms")
    found: list[list[Path]] = []
    for i in range(len(document.items(*terms))):
        path: Path = (*terms, i, "matchExpressions")
        rules = {(*path, n): rule for n, rule in enumerate(document.items(*path)) if isinstance(rule, dict)}
        found.append(
            [
                where
                for where, rule in rules.items()
                if rule.get("operator") == "In" and rule.get("values") == [SPOT_LABELS.get(rule.get("key", ""))]
            ]
        )
    return [where for term in found for where in term] if all(found) else []


def _container(document: Document, group: Path) -> Path:
    """Ray's container: the first."""
    return (*group, "template", "spec", "containers", 0)


def _environment(document: Document, container: Path) -> dict[str, tuple[Path, str | None]]:
    """Variable → where it is set, and its value if it is written there."""
    found = {}
    for i, item in enumerate(document.items(*container, "env")):
        if isinstance(item, dict) and isinstance(item.get("name"), str):
            found[item["name"]] = ((*container, "env", i), item.get("value"))
    return found


def _group(document: Document, group: Path, pins: Pins, v2: bool) -> None:
    pod, container = (*group, "template", "spec"), _container(document, group)
    policy = document.at(*pod, "restartPolicy")
    if v2 and policy not in (None, "Never"):
        what = f"{policy}: KubeRay refuses it with autoscaler v2"
        document.error("restart-policy", (*pod, "restartPolicy"), what, "restartPolicy: Never")
    params = document.table(*group, "rayStartParams")
    if document.table(*group, "resources"):
        for key in ("num-cpus", "num-gpus", "memory", "resources"):
            if key in params:
                document.error(
                    "kuberay-resources",
                    (*group, "rayStartParams", key),
                    "KubeRay refuses it beside the group's resources",
                    "remove one of them",
                )
    if "labels" in params:
        fix = "use the group's labels"
        document.error("kuberay-resources", (*group, "rayStartParams", "labels"), "KubeRay refuses it", fix)
    image = document.at(*container, "image")
    if isinstance(image, str):
        check_image(document, (*container, "image"), image, pins)
    elif document.table(*container):
        document.error("image-pinned", (*container, "image"), "is missing", f"an image with Ray {pins.ray}")
    variables = _environment(document, container)
    for name, (where, value) in variables.items():
        if is_secret_name(name) and value:
            document.error("secret", (*where, "value"), f"{name} in the file", "valueFrom: {secretKeyRef: …}")
    if variables.get("RAY_AUTH_MODE", ((), None))[1] == "disabled":
        fix = "remove it"
        document.error("token", variables["RAY_AUTH_MODE"][0], "token authentication is switched off", fix)
    _grace(document, pod, variables)
    _resources(document, container)
    _security(document, pod, container)
    mounts = [m.get("mountPath") for m in document.items(*container, "volumeMounts") if isinstance(m, dict)]
    if "/dev/shm" not in mounts:
        document.warning(
            "shm-size",
            (*container, "volumeMounts"),
            "nothing at /dev/shm: KubeRay mounts memory there as large as the request",
            "an emptyDir with medium: Memory and a sizeLimit",
        )


def _pod(document: Document, pod: Path) -> bool:
    """What Kubernetes refuses, though its schema does not; whether there is a container at all."""
    volumes = {volume.get("name") for volume in document.items(*pod, "volumes") if isinstance(volume, dict)}
    containers: list[Path] = [
        (*pod, key, i) for key in ("containers", "initContainers") for i in range(len(document.items(*pod, key)))
    ]
    for container in containers:
        for i, mount in enumerate(document.items(*container, "volumeMounts")):
            name = mount.get("name") if isinstance(mount, dict) else None
            if name is not None and name not in volumes | ADDED_VOLUMES:
                fix = did_you_mean(name, map(str, volumes), "add it to volumes")
                document.error("volumes", (*container, "volumeMounts", i, "name"), f"the pod has no volume {name}", fix)
        _amounts(document, (*container, "resources"))
    if not document.items(*pod, "containers"):
        what = "is missing or empty, which Kubernetes refuses"
        document.error("kuberay-schema", (*pod, "containers"), what, "the first is Ray's")
        return False
    return True


def _amounts(document: Document, resources: Path) -> None:
    """Requests and limits have to be numbers, and the first no larger; of devices the same."""
    tables = {part: document.table(*resources, part) for part in ("requests", "limits")}
    odd = {(part, key) for part, table in tables.items() for key in table if not QUANTITY.fullmatch(str(table[key]))}
    for part, key in sorted(odd):
        what = f"{tables[part][key]}: no amount, which Kubernetes refuses"
        document.error("resources", (*resources, part, key), what, "a number, and a unit such as m, M, Mi, Gi")
    for key, asked in tables["requests"].items():
        limit = tables["limits"].get(key)
        if limit is None or odd & {("requests", key), ("limits", key)}:
            continue
        number, most = _quantity(asked), _quantity(limit)
        if number > most * (1 + 1e-9) or ("/" in key and number < most * (1 - 1e-9)):
            what = f"{asked}, but the limit is {limit}, which Kubernetes refuses"
            document.error("resources", (*resources, "requests", key), what, f"{key}: {limit}")


def _grace(document: Document, pod: Path, variables: dict[str, tuple[Path, str | None]]) -> None:
    """Ray drains first; Kubernetes must not end the pod meanwhile."""
    path: Path = (*pod, "terminationGracePeriodSeconds")
    grace = document.number(*path)
    try:
        drain = float(variables.get(DRAIN_VARIABLE, ((), None))[1] or DEFAULT_DRAIN_SECONDS)
    except ValueError:
        what = "is not a number of seconds"
        document.error("grace-period", variables[DRAIN_VARIABLE][0], what, f'value: "{DEFAULT_DRAIN_SECONDS:g}"')
        return
    grace = DEFAULT_GRACE_SECONDS if grace is None else grace
    if grace <= drain:
        what = f"{grace:g} s, but Ray drains for {drain:g} s ({DRAIN_VARIABLE})"
        what += ": the pod is killed before training has saved"
        document.error("grace-period", path, what, f"more than {drain:g}, and at most the cloud's notice")


def _resources(document: Document, container: Path) -> None:
    limits, requests = (
        document.table(*container, "resources", "limits"),
        document.table(*container, "resources", "requests"),
    )
    if not document.table(*container):
        return
    for key, given in (("cpu", {*limits, *requests}), ("memory", {*limits})):  # KubeRay takes a request of CPUs as well
        if key not in given:
            what = f"no limit of {key}: Ray takes what the whole machine has for its own"
            document.error("resources", (*container, "resources", "limits"), what, f"{key}: as requested")
    if GPU in requests and GPU not in limits:
        what = f"{GPU} is requested without a limit, which Kubernetes refuses"
        document.error("resources", (*container, "resources", "requests", GPU), what, "put it into limits")
    for key in {*limits, *requests} - {"cpu", "memory", "ephemeral-storage", GPU}:
        if ("gpu" in key and "/" not in key) or (key.startswith("nvidia") and key != GPU):
            where = "limits" if key in limits else "requests"
            what = "no such resource: the pod gets no GPU, or is never placed"
            document.error("resources", (*container, "resources", where, key), what, f"{GPU}: 1")


def _security(document: Document, pod: Path, container: Path) -> None:
    if not document.table(*pod):
        return
    own = document.table(*container, "securityContext")
    of_pod = document.table(*pod, "securityContext")
    path: Path = (*container, "securityContext")
    if own.get("privileged") is True:
        what = "whoever runs code in the container owns the machine"
        document.error("privileged", (*path, "privileged"), what, "remove it")
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if document.at(*pod, key) is True:
            document.error("privileged", (*pod, key), "opens the machine to the pod", "remove it")
    for i, volume in enumerate(document.items(*pod, "volumes")):
        if isinstance(volume, dict) and "hostPath" in volume:
            what = "the pod sees files of the machine"
            document.warning("privileged", (*pod, "volumes", i, "hostPath"), what, "emptyDir or a claim")
    if not (own.get("runAsNonRoot") or of_pod.get("runAsNonRoot")):
        where: Path = (*pod, "securityContext", "runAsNonRoot")
        document.warning("security-context", where, "the container may run as root", "runAsNonRoot: true")
    if own.get("allowPrivilegeEscalation") is not False:
        where = (*path, "allowPrivilegeEscalation")
        document.warning("security-context", where, "a process may become root", "allowPrivilegeEscalation: false")


def _quantity(value: Any) -> float:
    """A number of CPUs, GPUs or bytes; 0 where it is none."""
    parts = QUANTITY.fullmatch(str(value))
    if not parts:
        return 0.0
    unit = parts[2] or ""
    return float(parts[1]) * UNITS[unit] if unit in UNITS else float(parts[0])


def _claims(document: Document, group: Path) -> set[str]:
    """Directories on claimed or network volumes."""
    pod, container = (*group, "template", "spec"), _container(document, group)
    shared = {
        volume.get("name")
        for volume in document.items(*pod, "volumes")
        if isinstance(volume, dict) and {"persistentVolumeClaim", "nfs", "csi"} & set(volume)
    }
    mounts = [m for m in document.items(*container, "volumeMounts") if isinstance(m, dict)]
    return {str(m["mountPath"]) for m in mounts if m.get("name") in shared and "mountPath" in m}


def _cluster(document: Document, spec: Path, known: Machines) -> Cluster:
    groups = []
    common = _claims(document, (*spec, "headGroupSpec"))
    count = "maxReplicas" if document.at(*spec, "enableInTreeAutoscaling") is True else "replicas"
    for i, worker in enumerate(document.items(*spec, "workerGroupSpecs")):
        path: Path = (*spec, "workerGroupSpecs", i)
        limits = document.table(*_container(document, path), "resources", "limits")
        requests = document.table(*_container(document, path), "resources", "requests")
        params, own = worker.get("rayStartParams") or {}, worker.get("resources") or {}
        selector = document.table(*path, "template", "spec", "nodeSelector")
        common &= _claims(document, path)
        groups.append(
            Group(
                name=worker["groupName"],
                most=worker.get(count, 0) * worker.get("numOfHosts", 1),
                most_path=(*path, count),
                cpus=_quantity(own.get("CPU") or params.get("num-cpus") or limits.get("cpu") or requests.get("cpu", 0)),
                gpus=_quantity(own.get("GPU") or params.get("num-gpus") or limits.get(GPU, 0)),
                accelerator=(worker.get("labels") or {}).get("ray.io/accelerator-type", ""),
                machine=known.machines.get(selector.get("node.kubernetes.io/instance-type", "")),
            )
        )
    most = sum(group.most for group in groups)
    return Cluster(groups, most, (*spec, "workerGroupSpecs"), tuple(sorted(common)))
