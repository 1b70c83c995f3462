"""Provider and node types of a cluster file on AWS."""

from __future__ import annotations

import re
from typing import Any

from gpt2dist.cluster.check.document import Document, Path, did_you_mean
from gpt2dist.cluster.check.schema import check_schema, ec2_input, ec2_regions
from gpt2dist.cluster.machines import Machines

# All that Ray reads of `provider` on AWS (ray/autoscaler/_private: aws/, autoscaler.py, updater.py).
PROVIDER_KEYS = [
    "type",
    "region",
    "availability_zone",
    "cache_stopped_nodes",
    "use_internal_ips",
    "use_external_head_ip",
    "security_group",
    "key_pair",
    "cloudwatch",
    "aws_credentials",
    "disable_node_updaters",
    "disable_launch_config_check",
    "foreground_node_launch",
    "worker_liveness_check",
]
SET_BY_RAY = {
    "SubnetId": "use SubnetIds, a list",
    "MinCount": "use min_workers and max_workers",
    "MaxCount": "use min_workers and max_workers",
}
MIN_DISK_GB = 60
"""The images take 20 GB unpacked, our installation 10."""


def instance_type(document: Document, name: str) -> str:
    """The instance type of a node type; empty if there is none."""
    return str(document.at("available_node_types", name, "node_config", "InstanceType") or "")


def check_provider(document: Document) -> None:
    """Keys, region, zones, and who may reach the machines."""
    provider = document.table("provider")
    for key in provider:
        if key not in PROVIDER_KEYS:
            document.error("provider", ("provider", key), "Ray does not read this", did_you_mean(key, PROVIDER_KEYS))
    region, zones = provider.get("region"), str(provider.get("availability_zone") or "")
    if region is None:
        document.error("provider", ("provider", "region"), "is missing", "region: us-east-1")
    elif region not in ec2_regions():
        document.error("provider", ("provider", "region"), f"AWS has no {region}", did_you_mean(region, ec2_regions()))
        zones = ""
    for zone in filter(None, (z.strip() for z in zones.split(","))):
        if region and not re.fullmatch(rf"{re.escape(str(region))}[a-z]|{re.escape(str(region))}-[\w-]+", zone):
            fix = f"availability_zone: {region}a"
            document.error("provider", ("provider", "availability_zone"), f"{zone} is not in {region}", fix)
    if provider.get("cache_stopped_nodes", True):
        document.warning(
            "stopped-nodes",
            ("provider", "cache_stopped_nodes"),
            "nodes are stopped, not terminated: their disks are billed on",
            "cache_stopped_nodes: false",
        )
    if "aws_credentials" in provider:
        document.error(
            "secret", ("provider", "aws_credentials"), "keys in the file", "use the profile of your shell, and roles"
        )
    _security_group(document)


def _security_group(document: Document) -> None:
    group: Path = ("provider", "security_group")
    rules = document.at(*group, "IpPermissions")
    if rules is not None:
        schema = ec2_input("AuthorizeSecurityGroupIngress")["properties"]["IpPermissions"]
        check_schema(document, "provider", schema, rules, (*group, "IpPermissions"))
    for i, rule in enumerate(document.items(*group, "IpPermissions")):
        text = str(rule)
        if "0.0.0.0/0" in text or "::/0" in text:
            ports = {rule.get("FromPort"), rule.get("ToPort")} if isinstance(rule, dict) else set()
            what = f"port {rule['FromPort']}" if len(ports) == 1 and None not in ports else "ports"
            document.error(
                "open-port", (*group, "IpPermissions", i), f"{what} open to the whole internet", "name your own address"
            )
    configs = [document.table("available_node_types", n, "node_config") for n in document.table("available_node_types")]
    own = all("SecurityGroupIds" in config or "NetworkInterfaces" in config for config in configs)
    if not document.at(*group, "GroupName") and not own:
        document.warning(
            "open-port",
            group,
            "Ray makes a security group that opens SSH to the whole internet",
            "make one before (docs/cluster.md), and name it: security_group: {GroupName: …}",
        )


def check_node(document: Document, name: str, known: Machines) -> None:
    """A node type's node_config against EC2's RunInstances, and its resources against the instance type."""
    path: Path = ("available_node_types", name)
    config_path: Path = (*path, "node_config")
    config = document.table(*config_path)
    schema = ec2_input("RunInstances")
    ours = {"SubnetIds": {"type": "array", "items": {"type": "string"}}}
    known_keys = {**schema, "properties": schema["properties"] | ours}
    template = config.get("LaunchTemplate")
    if isinstance(template, dict) and isinstance(template.get("Version"), int):  # Ray makes a text of it
        config = {**config, "LaunchTemplate": {**template, "Version": str(template["Version"])}}
    if not check_schema(document, "node-config", known_keys, config, config_path):
        return
    for key, fix in SET_BY_RAY.items():
        if key in config:
            document.error("node-config", (*config_path, key), "Ray overwrites this", fix)
    if "InstanceType" not in config and "LaunchTemplate" not in config:
        document.error("node-config", (*config_path, "InstanceType"), "is missing", "InstanceType: g6.2xlarge")
    _image(document, (*config_path, "ImageId"), config)
    _disk(document, config_path, config)
    metadata = document.table(*config_path, "MetadataOptions")
    if metadata.get("HttpEndpoint") == "disabled":
        document.error(
            "metadata",
            (*config_path, "MetadataOptions", "HttpEndpoint"),
            "without the metadata service there are no credentials and no spot notice",
            "remove it",
        )
    elif metadata.get("HttpTokens") != "required":
        document.warning(
            "metadata",
            (*config_path, "MetadataOptions", "HttpTokens"),
            "IMDSv1 is on: a server tricked into fetching a URL gives the role's keys away",
            "MetadataOptions: {HttpTokens: required}",
        )
    options = document.table(*config_path, "InstanceMarketOptions", "SpotOptions")
    if options.get("InstanceInterruptionBehavior", "terminate") != "terminate":
        document.error(
            "node-config",
            (*config_path, "InstanceMarketOptions", "SpotOptions", "InstanceInterruptionBehavior"),
            "an instance that is stopped comes back as another Ray node, or not at all",
            "terminate",
        )
    elif options.get("SpotInstanceType") == "persistent":
        document.error(
            "node-config",
            (*config_path, "InstanceMarketOptions", "SpotOptions", "SpotInstanceType"),
            "EC2 refuses a persistent request whose instance is terminated when it is interrupted",
            "one-time",
        )
    _resources(document, path, known)
    if name != document.at("head_node_type") and "IamInstanceProfile" not in config:
        document.error(
            "role",
            (*config_path, "IamInstanceProfile"),
            "is missing: workers have no access to S3",
            "IamInstanceProfile: {Name: gpt2dist-worker}",
        )


def _image(document: Document, path: Path, config: dict[str, Any]) -> None:
    image = config.get("ImageId")
    if (image is None and "LaunchTemplate" not in config) or image == "latest_dlami":
        document.error(
            "image-pinned", path, "Ray's default image is of 2023: its NVIDIA driver is too old", "ImageId: ami-…"
        )
    elif isinstance(image, str) and image.startswith("resolve:ssm:"):
        if not re.search(r":\d+$", image):
            document.warning("image-pinned", path, "another image every few weeks", "name one: ami-…")
    elif isinstance(image, str) and not re.fullmatch(r"ami-([0-9a-f]{8}|[0-9a-f]{17})", image):
        document.error("image-pinned", path, f"{image} is not the id of an image", "ami- and 17 hexadecimal digits")


def _disk(document: Document, config_path: Path, config: dict[str, Any]) -> None:
    path: Path = (*config_path, "BlockDeviceMappings")
    sizes = [
        size
        for i in range(len(document.items(*path)))
        if (size := document.number(*path, i, "Ebs", "VolumeSize")) is not None
    ]
    if document.table("docker").get("container_name") and "LaunchTemplate" not in config:
        if not sizes:
            document.warning("disk", path, "the root disk is as small as the image's", "VolumeSize: 150")
        elif max(sizes) < MIN_DISK_GB:
            where = (*path, 0, "Ebs", "VolumeSize")
            document.warning("disk", where, f"{max(sizes):g} GB do not hold image and installation", "VolumeSize: 150")


def _resources(document: Document, path: Path, known: Machines) -> None:
    kind = str(document.at(*path, "node_config", "InstanceType") or "")
    machine = known.machines.get(kind)
    if machine is None:
        return
    for key, has in (("CPU", machine.vcpus), ("GPU", machine.gpus)):
        says = document.number(*path, "resources", key)
        if says is not None and says > has:
            what = f"{says:g}, but a {kind} has {has}"
            document.error("resources", (*path, "resources", key), what, f"{key}: {has}")
        elif key == "GPU" and says is not None and says < has:
            what = f"{says:g}, but a {kind} has {has}: the others are paid for and never used"
            document.warning("resources", (*path, "resources", key), what, f"{key}: {has}")
    label: Path = (*path, "labels", "ray.io/accelerator-type")
    named, gpu = str(document.at(*label) or ""), machine.gpu.partition("-")[0]
    if named and named.partition("-")[0] != gpu:
        what = f"{named}, but a {kind} has {gpu or 'no GPU'}: runs that ask for {named} are placed here"
        document.error("resources", label, what, gpu or "remove it")


def check_head(document: Document) -> None:
    """The head must be able to start workers, and needs no GPUs."""
    name = document.at("head_node_type")
    path: Path = ("available_node_types", name, "node_config")
    if "IamInstanceProfile" not in document.table(*path):
        document.warning(
            "role",
            (*path, "IamInstanceProfile"),
            "is missing: Ray makes a role that may do everything in EC2 and S3",
            "IamInstanceProfile: {Name: gpt2dist-head}",
        )
    if (document.number("available_node_types", name, "resources", "GPU") or 0) > 0:
        what = "the head runs no training: its GPUs are paid for and idle"
        document.warning("head-type", (*path, "InstanceType"), what, "a machine without GPUs")
