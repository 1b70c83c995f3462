"""Cluster files of `ray up`."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
from pathlib import Path as FilePath
from typing import Any

from gpt2dist.cluster.check import aws
from gpt2dist.cluster.check.document import Document, Path
from gpt2dist.cluster.check.fit import Cluster, Group
from gpt2dist.cluster.check.ray_start import check_dashboard, find_ray_start, parse_ray_start
from gpt2dist.cluster.check.schema import check_schema, ray_up
from gpt2dist.cluster.check.versions import Pins, check_image
from gpt2dist.cluster.machines import Machines

# What Ray puts in place of a missing key, and why it is not wanted.
DANGEROUS_DEFAULTS = {
    "setup_commands": "Ray's default installs a nightly build of Ray",
    "head_start_ray_commands": "Ray's default opens the dashboard to the network (--dashboard-host=0.0.0.0)",
    "available_node_types": "Ray's default is two m5.large",
    "head_node_type": "Ray's default names a node type of its own",
}
TOKEN_ON = re.compile(r"RAY_AUTH_MODE=['\"]?token\b")
TOKEN_OFF = re.compile(r"RAY_AUTH_MODE=['\"]?disabled\b")


def check(document: Document, pins: Pins, known: Machines) -> Cluster | None:
    """All rules of such a file; the workers that it allows, unless it is too broken to tell."""
    if not _ray_accepts(document):
        return None
    _defaults(document)
    if document.at("provider", "type") == "aws":
        aws.check_provider(document)
        for name in document.table("available_node_types"):
            aws.check_node(document, name, known)
        aws.check_head(document)
    _head(document)
    _docker(document, pins)
    _setup(document, pins)
    _start(document)
    _token(document)
    _spot_watch(document)
    _limits(document)
    return _cluster(document, known)


def todo(document: Document) -> list[str]:
    """What `ray up` needs on this machine and does not find; it would notice only after it has started the head."""
    made_by = {"~/.ray": ("auth_token", "ray get-auth-token --generate"), "build/cluster": ("*.whl", "make dist")}
    missing = []
    for local in map(str, document.table("file_mounts").values()):
        content, how = made_by.get(local.rstrip("/"), ("", "make it, or correct file_mounts"))
        place = FilePath(local).expanduser()
        if not place.exists() or (content and not list(place.glob(content))):
            missing.append(f"{local}: {how}")
    return missing


def _ray_accepts(document: Document) -> bool:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = copy.deepcopy(document.value)
    schema = ray_up()
    if document.at("provider", "type") == "local":  # where Ray takes one more key, before it looks
        schema = {**schema, "properties": schema["properties"] | {"min_workers": {"type": "integer", "minimum": 0}}}
    if document.at("provider", "type") == "aws":  # where Ray fills them in before it looks
        for name in document.table("available_node_types"):
            if isinstance(node := config["available_node_types"][name], dict):
                node.setdefault("resources", {})
    if not check_schema(document, "ray-schema", schema, config):
        return False
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        logging.disable(logging.INFO)
        try:
            validate_config(prepare_config(config))
        except Exception as e:
            message = str(e) or type(e).__name__
            key = next((k for k in ("head_node_type", "max_workers", "docker", "provider") if k in message), "")
            path = (key,) if key else ()
            document.error("ray-schema", path, f"Ray refuses it: {' '.join(message.split())}", "correct it")
            return False
        finally:
            logging.disable(logging.NOTSET)
    return True


def _defaults(document: Document) -> None:
    from ray.autoscaler._private.providers import _get_default_config

    for key, value in _get_default_config(document.value["provider"]).items():
        if key in document.value or not value:
            continue
        if key in DANGEROUS_DEFAULTS:
            document.error("default", (key,), f"is missing: {DANGEROUS_DEFAULTS[key]}", "set it")
        else:
            document.warning("default", (key,), f"is missing: Ray's default is {value}", "set it")


def spot_key(document: Document, name: str) -> Path | None:
    """The key that makes the machines of a node type spot machines, on AWS, Google Cloud or Azure."""
    path: Path = ("available_node_types", name, "node_config")
    if document.at(*path, "InstanceMarketOptions", "MarketType") == "spot":
        return (*path, "InstanceMarketOptions", "MarketType")
    if re.search(r"preemptible': True|'SPOT'", str(document.at(*path, "scheduling"))):
        return (*path, "scheduling")
    if str(document.at(*path, "azure_arm_parameters", "priority")).lower() == "spot":
        return (*path, "azure_arm_parameters", "priority")
    return None


def _head(document: Document) -> None:
    name = document.at("head_node_type")
    path: Path = ("available_node_types", name)
    starts = " ".join(document.strings("head_start_ray_commands"))
    if document.number(*path, "resources", "CPU") != 0 and not re.search(r"--num-cpus[= ]0\b", starts):
        what = "tasks may run on the head, and take it down with everything else"
        if name is None:  # machines of one's own have no types
            document.warning("head-runs-tasks", ("head_start_ray_commands",), what, "ray start --head --num-cpus=0 …")
        else:
            document.warning("head-runs-tasks", (*path, "resources", "CPU"), what, "resources: {CPU: 0}")
    if spot := spot_key(document, name):
        what = "the head is a spot machine: when it is taken away, the whole cluster ends"
        document.error("spot-head", spot, what, f"remove {spot[3]} from the head")
    if (document.number(*path, "max_workers") or 0) > 0:
        document.warning(
            "head-type", (*path, "max_workers"), "workers of the head's type may be started", "max_workers: 0"
        )


def _docker(document: Document, pins: Pins) -> None:
    docker = document.table("docker")
    for key in ("image", "head_image", "worker_image"):
        if isinstance(image := docker.get(key), str):
            check_image(document, ("docker", key), image, pins)
    if not docker.get("container_name"):
        return
    if not docker.get("image"):
        what = "is missing: autoscaler v2 reads it beside head_image and worker_image, and no worker ever joins"
        document.error("docker-image", ("docker", "image"), what, "image: the worker's")
    places: dict[Path, list[str]] = {("docker", "head_run_options"): document.strings("docker", "head_run_options")}
    for name in document.table("available_node_types"):
        if name != document.at("head_node_type"):
            own: Path = ("available_node_types", name, "docker", "worker_run_options")
            path = own if document.at(*own) is not None else ("docker", "worker_run_options")
            places[path] = document.strings(*path)
    common = document.strings("docker", "run_options")
    for path, options in places.items():
        if not any("--shm-size" in option for option in common + options):
            document.warning(
                "shm-size",
                path,
                "no --shm-size: Docker's 64 MB, or what Ray guesses, for the object store and NCCL",
                "add --shm-size=…gb, about a third of the machine's memory",
            )
    for path, options in {("docker", "run_options"): common, **places}.items():
        for option in options:
            if "--privileged" in option or "/var/run/docker.sock" in option:
                document.error(
                    "privileged", path, f"{option}: whoever runs code in the container owns the machine", "remove it"
                )
    for remote, local in document.table("file_mounts").items():
        if isinstance(local, str) and FilePath(local).expanduser().is_file():
            document.warning(
                "file-mount",
                ("file_mounts", remote),
                "a single file: Docker mounts its inode, and does not see a new version",
                "mount its directory",
            )


def _setup(document: Document, pins: Pins) -> None:
    keys = ("initialization_commands", "setup_commands", "head_setup_commands", "worker_setup_commands")
    for key in keys:
        for i, command in enumerate(document.strings(key)):
            path: Path = (key, i)
            if re.search(r"ray(\[[\w,]+\])?\s*@|nightly|ray-3\.0\.0\.dev", command):
                document.error("ray-version", path, "installs an unreleased Ray", f"ray=={pins.ray}")
            for found in re.findall(r"\bray(?:\[[\w,]+\])?==([\w.]+)", command):
                if found != pins.ray:
                    what = f"installs Ray {found}, but {pins.source} has {pins.ray}"
                    document.error("ray-version", path, what, f"ray=={pins.ray}")
            installs = re.search(r"\bpip3? install\b", command)
            if installs and not re.search(r"(--constraint|-c|--requirement|-r)[ =]|==|--no-deps", command):
                document.warning(
                    "unpinned-install",
                    path,
                    "installs whatever version is newest on the day a node starts",
                    "pip install --constraint constraints.txt …",
                )


def _start(document: Document) -> None:
    heads, workers = document.strings("head_start_ray_commands"), document.strings("worker_start_ray_commands")
    head_at, worker_at = ("head_start_ray_commands",), ("worker_start_ray_commands",)
    port = "6379"
    for path, commands in ((head_at, heads), (worker_at, workers)):
        if not commands:
            continue
        found = find_ray_start(commands)
        if not found:
            document.error("ray-start", path, "no `ray start`: Ray will not run on these nodes", "add it")
            continue
        where: Path = (*path, found[0])
        options = parse_ray_start(document, where, found[1])
        if not options:
            continue
        if not any(re.search(r"\bray stop\b", command) for command in commands[: found[0]]):
            document.warning(
                "ray-start", where, "no `ray stop` before it: a second `ray up` fails", "make `ray stop` the first"
            )
        if not options.get("metrics_export_port"):
            document.warning(
                "metrics", where, "no --metrics-export-port: a random port for Prometheus", "--metrics-export-port=8080"
            )
        check_dashboard(document, where, options)
        if path == head_at:
            port = str(options.get("port") or port)
            if not options.get("head"):
                document.error("ray-start", where, "the head is started without --head", "ray start --head …")
            if not options.get("autoscaling_config"):
                fix = "--autoscaling-config=~/ray_bootstrap_config.yaml"
                document.error("ray-start", where, "without --autoscaling-config no worker is ever started", fix)
        elif options.get("head"):
            document.error("ray-start", where, "a worker with --head is a cluster of its own", "remove --head")
        elif options.get("address") not in (f"$RAY_HEAD_IP:{port}", f"${{RAY_HEAD_IP}}:{port}"):
            what = f"--address is {options.get('address')}: these nodes do not find the head"
            document.error("ray-start", where, what, f"--address=$RAY_HEAD_IP:{port}")


def _token(document: Document) -> None:
    """Without a token whoever reaches a port of Ray runs code (CVE-2023-48022)."""
    in_docker = bool(document.table("docker").get("container_name"))
    fix = "--env=RAY_AUTH_MODE=token in docker.run_options" if in_docker else "RAY_AUTH_MODE=token ray start …"
    common = [("docker", "run_options"), ("setup_commands",)] + ([] if in_docker else [("initialization_commands",)])
    for role in ("head", "worker"):
        start: Path = (f"{role}_start_ray_commands",)
        paths: list[Path] = [*common, ("docker", f"{role}_run_options"), (f"{role}_setup_commands",), start]
        texts = {(*path, i): text for path in paths for i, text in enumerate(document.strings(*path))}
        off = next((path for path, text in texts.items() if TOKEN_OFF.search(text)), None)
        if off:
            document.error("token", off, "token authentication is switched off", fix)
        elif not any(TOKEN_ON.search(text) for text in texts.values()):
            document.error("token", start, f"Ray on the {role} takes commands without a token", fix)
    mounts = [str(remote).rstrip("/") for remote in document.table("file_mounts")]
    everything = " ".join(text for key in document.value for text in document.strings(key))
    everything += " ".join(document.strings("docker", "run_options"))
    given = any(re.search(r"/\.ray(/auth_token)?$", remote) for remote in mounts) or "RAY_AUTH_TOKEN_PATH" in everything
    if not given:
        document.error(
            "token", ("file_mounts",), "no token reaches the nodes: Ray will not start", "/home/ray/.ray: ~/.ray"
        )


def _spot_watch(document: Document) -> None:
    types = document.table("available_node_types")
    if not any(spot_key(document, name) for name in types if name != document.at("head_node_type")):
        return
    path: Path = ("worker_start_ray_commands",)
    commands = document.strings(*path)
    watching = next((i for i, command in enumerate(commands) if "spot-watch" in command), None)
    if watching is None:
        document.error(
            "spot-watch",
            path,
            "nothing listens for the spot notice: what was trained since the last checkpoint is lost",
            f"- setsid --fork gpt2dist cluster spot-watch --cloud {document.at('provider', 'type')} "
            "> /tmp/spot-watch.log 2>&1 < /dev/null",
        )
        return
    option = re.search(r"--cloud[= ]['\"]?(\w+)", commands[watching])
    asked, provider = option[1] if option else "aws", document.at("provider", "type")
    if asked != provider:
        document.error(
            "spot-watch",
            (*path, watching),
            f"asks the metadata service of {asked} for notices, but the machines are of {provider}",
            f"--cloud {provider}",
        )
    if not re.search(r"setsid|nohup.*&|&\s*\)?$|systemd-run", commands[watching]):
        document.error(
            "spot-watch", (*path, watching), "does not end, so that `ray start` is never reached", "setsid --fork …"
        )


def _limits(document: Document) -> None:
    minutes = document.number("idle_timeout_minutes")
    if minutes is not None and minutes < 1:
        document.warning(
            "idle-timeout",
            ("idle_timeout_minutes",),
            f"{minutes:g} minutes: nodes are given back while a run restarts",
            "5 to 15",
        )
    elif minutes is not None and minutes > 60:
        document.warning(
            "idle-timeout", ("idle_timeout_minutes",), f"idle nodes are paid for {minutes:g} minutes", "5 to 15"
        )
    most = document.number("max_workers")
    workers = {n: t for n, t in document.table("available_node_types").items() if n != document.at("head_node_type")}
    named = "available_node_types" in document.value
    if most == 0 or (named and not any(t.get("max_workers", most) for t in workers.values())):
        document.error("max-workers", ("max_workers",), "no worker may ever be started", "raise max_workers")
    if document.at("provider", "type") == "local" and "worker_ips" in document.table("provider"):
        _own_machines(document, len(document.items("provider", "worker_ips")))
    for name, node in workers.items():
        least, own = node.get("min_workers") or 0, node.get("max_workers", most)
        if least < 0 or (own is not None and least > own):
            what = f"{least} is below 0" if least < 0 else f"{least} is more than max_workers = {own:g}"
            document.error("min-workers", ("available_node_types", name, "min_workers"), what, "min_workers: 0")
            continue
        if most and (node.get("max_workers") or 0) > most:
            what = f"{node['max_workers']} are never reached: max_workers of the cluster is {most:g}"
            document.warning("max-workers", ("available_node_types", name, "max_workers"), what, "raise or lower one")
        if least:
            what = f"{least} machines run, and cost, whether there is work or not"
            document.warning("min-workers", ("available_node_types", name, "min_workers"), what, "min_workers: 0")


def _own_machines(document: Document, there: int) -> None:
    """The limits of a cluster of machines that are there anyway."""
    if not there:
        document.error("max-workers", ("provider", "worker_ips"), "no worker may ever be started", "name machines")
        return
    for key in ("min_workers", "max_workers"):
        number = document.number(key)
        if number is not None and number > there:
            what = f"{number:g} are never reached: provider.worker_ips has {there}"
            document.warning("max-workers", (key,), what, f"{key}: {there}")
    if 0 < (most := document.number("max_workers") or 0) < there:
        what = f"only {most:g} of the {there} machines in provider.worker_ips join"
        document.warning("max-workers", ("max_workers",), what, f"max_workers: {there}")


def _cluster(document: Document, known: Machines) -> Cluster:
    most = document.value.get("max_workers", 2)
    groups = []
    for name, node in document.table("available_node_types").items():
        if name == document.at("head_node_type"):
            continue
        path: Path = ("available_node_types", name)
        machine = known.machines.get(aws.instance_type(document, name))
        resources: dict[str, Any] = document.table(*path, "resources")
        groups.append(
            Group(
                name=name,
                most=min(most, node.get("max_workers", most)),
                most_path=(*path, "max_workers") if "max_workers" in node else ("max_workers",),
                cpus=resources.get("CPU", machine.vcpus if machine else 0),
                gpus=resources.get("GPU", machine.gpus if machine else 0),
                accelerator=document.at(*path, "labels", "ray.io/accelerator-type") or "",
                machine=machine,
            )
        )
    return Cluster(groups, most, ("max_workers",), _shared_mounts(document))


def _shared_mounts(document: Document) -> tuple[str, ...]:
    """Where a network file system that every node mounts is seen in the container."""
    form = re.compile(r"\bmount\b[^;&|]*\s(?:nfs4?|efs|lustre)\b[^;&|]*\s(/[^\s;&|)]+)")
    mounted = [m.rstrip("/") for command in document.strings("initialization_commands") for m in form.findall(command)]
    options = " ".join(document.strings("docker", "run_options"))
    volumes = re.findall(r"(?:-v|--volume)[= ](/[^:\s]+):(/[^:\s]+)", options)
    for text in re.findall(r"--mount[= ](\S+)", options):
        parts = dict(part.partition("=")[::2] for part in text.split(","))
        outside, inside = parts.get("source") or parts.get("src"), parts.get("target") or parts.get("dst")
        volumes += [(outside, inside or parts["destination"])] if outside and (inside or "destination" in parts) else []
    shared = [inside for outside, inside in volumes if any(f"{outside}/".startswith(f"{m}/") for m in mounted)]
    return tuple(shared if document.table("docker").get("container_name") else mounted)
