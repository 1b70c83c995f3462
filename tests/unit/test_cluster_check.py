"""`cluster check` on the shipped files, and with mistakes planted in them, one at a time."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from gpt2dist.cluster.check import check_files
from gpt2dist.cluster.check.document import Finding
from gpt2dist.config import UserError
from tests.conftest import ROOT

CLUSTER, FLEET, JOB = "cluster.yaml", "jobs/kuberay/raycluster.yaml", "jobs/kuberay/rayjob.yaml"
RUN_124M, RUN_1558M = "jobs/gpt2_124m.toml", "jobs/gpt2_1558m.toml"
HEAD = "available_node_types.head"
A100 = "available_node_types.a100x8"
L4 = "available_node_types.l4"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A copy of the files that are checked, and of what they are checked against."""
    for file in (CLUSTER, "constraints.txt"):
        shutil.copy(ROOT / file, tmp_path / file)
    shutil.copytree(ROOT / "jobs", tmp_path / "jobs")
    return tmp_path


def found(repository: Path, file: str, run: str | None = None, *overrides: str) -> list[Finding]:
    return check_files([str(repository / file)], str(repository / run) if run else None, overrides).findings


@pytest.mark.parametrize("run", [None, RUN_124M, "jobs/gpt2_355m.toml", "jobs/gpt2_774m.toml", RUN_1558M])
@pytest.mark.parametrize("file", [CLUSTER, FLEET, JOB])
def test_nothing_is_found_in_what_we_ship(repository: Path, file: str, run: str | None) -> None:
    assert found(repository, file, run) == []


@dataclass
class Mistake:
    """`old` becomes `new` in `file`; the finding is of `rule`, at `key`, and its advice has `advice` in it."""

    file: str
    old: str
    new: str
    rule: str
    key: str
    advice: str
    severity: str = "error"
    all: bool = False
    """Every occurrence of `old`, not the first."""


SPOT_HEAD = "InstanceType: m7i.xlarge # 16 GB: driver, GCS, dashboard"
MISTAKES = {
    # ---- what Ray itself refuses, or puts in place of what is missing
    "unknown top-level key": Mistake(
        CLUSTER, "max_workers: 12", "max_worker: 12\nmax_workers: 12", "ray-schema", "max_worker", "max_workers"
    ),
    "unknown key of a node type": Mistake(
        CLUSTER, "    max_workers: 8", "    max_worker: 8", "ray-schema", f"{L4}.max_worker", "max_workers"
    ),
    "a number as text": Mistake(
        CLUSTER,
        "idle_timeout_minutes: 10",
        'idle_timeout_minutes: "10"',
        "ray-schema",
        "idle_timeout_minutes",
        "number",
    ),
    "head type that does not exist": Mistake(
        CLUSTER, "head_node_type: head", "head_node_type: heads", "ray-schema", "head_node_type", "correct"
    ),
    "the same key twice": Mistake(
        CLUSTER,
        "upscaling_speed: 4.0",
        "upscaling_speed: 4.0\nmax_workers: 99",
        "duplicate-key",
        "max_workers",
        "remove",
    ),
    "a key that is a number": Mistake(
        CLUSTER,
        "labels: {ray.io/market-type: on-demand}",
        "labels: {ray.io/market-type: on-demand, 7: x}",
        "key-type",
        f"{HEAD}.labels.7",
        "quotes",
    ),
    "no setup commands: a nightly Ray": Mistake(
        CLUSTER, "\nsetup_commands:", "\nmetadata:\n  commands:", "default", "setup_commands", "set it"
    ),
    "no start command of the head": Mistake(
        CLUSTER,
        "\nhead_start_ray_commands:",
        "\nmetadata:\n  commands:",
        "default",
        "head_start_ray_commands",
        "set it",
    ),
    "no idle time-out": Mistake(
        CLUSTER, "idle_timeout_minutes: 10", "", "default", "idle_timeout_minutes", "set it", "warning"
    ),
    # ---- EC2
    "typo in InstanceMarketOptions": Mistake(
        CLUSTER,
        "InstanceMarketOptions: &spot",
        "InstanceMarketOption: &spot",
        "node-config",
        f"{A100}.node_config.InstanceMarketOption",
        "InstanceMarketOptions",
    ),
    "typo deep in the node config": Mistake(
        CLUSTER,
        "VolumeSize: 150",
        "VolumSize: 150",
        "node-config",
        f"{HEAD}.node_config.BlockDeviceMappings[0].Ebs.VolumSize",
        "VolumeSize",
    ),
    "wrong type in the node config": Mistake(
        CLUSTER,
        "VolumeSize: 150",
        'VolumeSize: "150"',
        "node-config",
        f"{HEAD}.node_config.BlockDeviceMappings[0].Ebs.VolumeSize",
        "whole number",
    ),
    "instance type that EC2 does not have": Mistake(
        CLUSTER,
        "InstanceType: p4d.24xlarge",
        "InstanceType: p4d.24xlrge",
        "node-config",
        f"{A100}.node_config.InstanceType",
        "p4d.24xlarge",
    ),
    "wrong value of an enumeration": Mistake(
        CLUSTER,
        "VolumeType: gp3",
        "VolumeType: gp4",
        "node-config",
        f"{HEAD}.node_config.BlockDeviceMappings[0].Ebs.VolumeType",
        "gp3",
    ),
    "subnet as Ray does not read it": Mistake(
        CLUSTER,
        "InstanceType: g6.2xlarge",
        "InstanceType: g6.2xlarge\n      SubnetId: subnet-1",
        "node-config",
        f"{L4}.node_config.SubnetId",
        "SubnetIds",
    ),
    "interruption that stops": Mistake(
        CLUSTER,
        "SpotInstanceType: one-time, InstanceInterruptionBehavior: terminate",
        "SpotInstanceType: persistent, InstanceInterruptionBehavior: stop",
        "node-config",
        f"{A100}.node_config.InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior",
        "terminate",
    ),
    "a persistent request that terminates": Mistake(
        CLUSTER,
        "SpotInstanceType: one-time",
        "SpotInstanceType: persistent",
        "node-config",
        f"{A100}.node_config.InstanceMarketOptions.SpotOptions.SpotInstanceType",
        "one-time",
    ),
    "typo in the provider": Mistake(
        CLUSTER,
        "use_internal_ips: false",
        "use_internal_ip: false",
        "provider",
        "provider.use_internal_ip",
        "use_internal_ips",
    ),
    "region that AWS does not have": Mistake(
        CLUSTER, "region: us-east-1", "region: us-east1", "provider", "provider.region", "us-east-1"
    ),
    "zone of another region": Mistake(
        CLUSTER,
        "availability_zone: us-east-1a",
        "availability_zone: us-west-2a",
        "provider",
        "provider.availability_zone",
        "us-east-1a",
    ),
    "image that is no image": Mistake(
        CLUSTER, "ami-0eb7d782cce2fe526", "ami-latest", "image-pinned", f"{HEAD}.node_config.ImageId", "ami-"
    ),
    "no image: Ray's of 2023": Mistake(
        CLUSTER, "      ImageId: ami-0eb7d782cce2fe526\n", "", "image-pinned", f"{HEAD}.node_config.ImageId", "ami-"
    ),
    "metadata service switched off": Mistake(
        CLUSTER,
        "HttpTokens: required",
        "HttpEndpoint: disabled",
        "metadata",
        f"{HEAD}.node_config.MetadataOptions.HttpEndpoint",
        "remove",
        all=True,
    ),
    "IMDSv1": Mistake(
        CLUSTER,
        "HttpTokens: required",
        "HttpTokens: optional",
        "metadata",
        f"{HEAD}.node_config.MetadataOptions.HttpTokens",
        "required",
        "warning",
    ),
    "workers without a role": Mistake(
        CLUSTER,
        "      IamInstanceProfile: {Name: gpt2dist-worker}\n",
        "",
        "role",
        f"{L4}.node_config.IamInstanceProfile",
        "gpt2dist-worker",
    ),
    "disk too small": Mistake(
        CLUSTER,
        "VolumeSize: 150",
        "VolumeSize: 30",
        "disk",
        f"{HEAD}.node_config.BlockDeviceMappings[0].Ebs.VolumeSize",
        "150",
        "warning",
    ),
    "stopped nodes kept": Mistake(
        CLUSTER,
        "cache_stopped_nodes: false",
        "cache_stopped_nodes: true",
        "stopped-nodes",
        "provider.cache_stopped_nodes",
        "false",
        "warning",
    ),
    # ---- the head, the workers, their resources
    "spot head": Mistake(
        CLUSTER,
        SPOT_HEAD,
        "InstanceMarketOptions: {MarketType: spot}\n      " + SPOT_HEAD,
        "spot-head",
        f"{HEAD}.node_config.InstanceMarketOptions.MarketType",
        "remove",
    ),
    "workers of the head's type": Mistake(
        CLUSTER,
        "    max_workers: 0",
        "    max_workers: 2",
        "head-type",
        f"{HEAD}.max_workers",
        "max_workers: 0",
        "warning",
    ),
    "more GPUs than the machine has": Mistake(
        CLUSTER, "GPU: 1}", "GPU: 4}", "resources", f"{L4}.resources.GPU", "GPU: 1"
    ),
    "fewer GPUs than the machine has": Mistake(
        CLUSTER, "GPU: 8}", "GPU: 4}", "resources", f"{A100}.resources.GPU", "GPU: 8", "warning"
    ),
    "another GPU than the machine has": Mistake(
        CLUSTER,
        "accelerator-type: A100",
        "accelerator-type: H100",
        "resources",
        f"{A100}.labels.ray.io/accelerator-type",
        "A100",
    ),
    "more CPUs than the machine has": Mistake(
        CLUSTER, "CPU: 96", "CPU: 128", "resources", f"{A100}.resources.CPU", "CPU: 96"
    ),
    "a group that is never full": Mistake(
        CLUSTER,
        "    max_workers: 8",
        "    max_workers: 80",
        "max-workers",
        f"{L4}.max_workers",
        "raise or lower",
        "warning",
    ),
    "machines that always run": Mistake(
        CLUSTER,
        "    min_workers: 0\n    max_workers: 4",
        "    min_workers: 2\n    max_workers: 4",
        "min-workers",
        f"{A100}.min_workers",
        "min_workers: 0",
        "warning",
    ),
    "more machines at least than at most": Mistake(
        CLUSTER,
        "    min_workers: 0\n    max_workers: 4",
        "    min_workers: 9\n    max_workers: 4",
        "min-workers",
        f"{A100}.min_workers",
        "min_workers: 0",
    ),
    "fewer machines than none": Mistake(
        CLUSTER,
        "    min_workers: 0\n    max_workers: 4",
        "    min_workers: -1\n    max_workers: 4",
        "min-workers",
        f"{A100}.min_workers",
        "min_workers: 0",
    ),
    "no workers at all": Mistake(CLUSTER, "max_workers: 12", "max_workers: 0", "max-workers", "max_workers", "raise"),
    "idle for hours": Mistake(
        CLUSTER,
        "idle_timeout_minutes: 10",
        "idle_timeout_minutes: 600",
        "idle-timeout",
        "idle_timeout_minutes",
        "15",
        "warning",
    ),
    # ---- versions
    "no image for all": Mistake(
        CLUSTER, "  image: rayproject", "  # rayproject", "docker-image", "docker.image", "image: the worker's"
    ),
    "another Ray in the image": Mistake(
        CLUSTER,
        "worker_image: rayproject/ray:2.60.0-py311-gpu",
        "worker_image: rayproject/ray:2.59.0-py311-gpu",
        "ray-version",
        "docker.worker_image",
        "2.60.0-py311",
    ),
    "another Python in the image": Mistake(
        CLUSTER, "ray:2.60.0-py311-cpu", "ray:2.60.0-py312-cpu", "python-version", "docker.head_image", "2.60.0-py311"
    ),
    "image not pinned": Mistake(
        CLUSTER,
        "worker_image: rayproject/ray:2.60.0-py311-gpu",
        "worker_image: rayproject/ray:latest",
        "image-pinned",
        "docker.worker_image",
        "2.60.0-py311",
    ),
    "another Ray installed": Mistake(
        CLUSTER,
        "worker_setup_commands: []",
        'worker_setup_commands: ["pip install ray[train]==2.55.1"]',
        "ray-version",
        "worker_setup_commands[0]",
        "ray==2.60.0",
    ),
    "installation without constraints": Mistake(
        CLUSTER,
        "worker_setup_commands: []",
        "worker_setup_commands: [pip install wandb]",
        "unpinned-install",
        "worker_setup_commands[0]",
        "--constraint",
        "warning",
    ),
    # ---- start commands
    "dashboard on all addresses": Mistake(
        CLUSTER,
        "--dashboard-host=127.0.0.1",
        "--dashboard-host=0.0.0.0",
        "open-dashboard",
        "head_start_ray_commands[1]",
        "127.0.0.1",
    ),
    "unknown option of ray start": Mistake(
        CLUSTER,
        "--metrics-export-port=8080\n    --auto",
        "--metric-export-port=8080\n    --auto",
        "ray-start",
        "head_start_ray_commands[1]",
        "--metrics-export-port",
    ),
    "no autoscaling config": Mistake(
        CLUSTER,
        "    --autoscaling-config=~/ray_bootstrap_config.yaml\n",
        "",
        "ray-start",
        "head_start_ray_commands[1]",
        "--autoscaling-config",
    ),
    "workers that look for the head at another port": Mistake(
        CLUSTER,
        "$RAY_HEAD_IP:6379",
        "$RAY_HEAD_IP:6380",
        "ray-start",
        "worker_start_ray_commands[2]",
        "$RAY_HEAD_IP:6379",
    ),
    "no metrics port": Mistake(
        CLUSTER,
        "--object-manager-port=8076 --metrics-export-port=8080",
        "--object-manager-port=8076",
        "metrics",
        "worker_start_ray_commands[2]",
        "--metrics-export-port",
        "warning",
    ),
    "no ray stop": Mistake(
        CLUSTER,
        "worker_start_ray_commands:\n  - ray stop\n",
        "worker_start_ray_commands:\n",
        "ray-start",
        "worker_start_ray_commands[1]",
        "ray stop",
        "warning",
    ),
    "no spot daemon": Mistake(
        CLUSTER,
        "  - setsid --fork gpt2dist cluster spot-watch --cloud aws > /tmp/spot-watch.log 2>&1 < /dev/null\n",
        "",
        "spot-watch",
        "worker_start_ray_commands",
        "setsid --fork gpt2dist cluster spot-watch",
    ),
    "spot daemon in the foreground": Mistake(
        CLUSTER, "setsid --fork gpt2dist", "gpt2dist", "spot-watch", "worker_start_ray_commands[1]", "setsid"
    ),
    "spot daemon of another cloud": Mistake(
        CLUSTER, "--cloud aws", "--cloud gcp", "spot-watch", "worker_start_ray_commands[1]", "--cloud aws"
    ),
    # ---- containers
    "no shared memory": Mistake(
        CLUSTER,
        "--shm-size=400gb",
        "--ipc=private",
        "shm-size",
        f"{A100}.docker.worker_run_options",
        "--shm-size",
        "warning",
    ),
    "privileged container": Mistake(
        CLUSTER, "- --ulimit=memlock=-1", "- --privileged", "privileged", "docker.run_options", "remove"
    ),
    # ---- security
    "token authentication off": Mistake(
        CLUSTER,
        "RAY_AUTH_MODE=token",
        "RAY_AUTH_MODE=disabled",
        "token",
        "docker.run_options[0]",
        "RAY_AUTH_MODE=token",
    ),
    "no token on the nodes": Mistake(
        CLUSTER, "  /home/ray/.ray: ~/.ray", "  /home/ray/other: ~/.ray", "token", "file_mounts", "/home/ray/.ray"
    ),
    "an AWS key in a command": Mistake(
        CLUSTER,
        "worker_setup_commands: []",
        "worker_setup_commands: [export AWS_ACCESS_KEY_ID=AKIAIOSFODNN7EXAMPLE]",
        "secret",
        "worker_setup_commands[0]",
        "revoke",
    ),
    "a key in a comment": Mistake(
        CLUSTER,
        "# of the image below;",
        "# hf_abcdefghijklmnopqrstuvwxyz0123456789",
        "secret",
        "auth.ssh_user",
        "revoke",
    ),
    "the token in the file": Mistake(
        CLUSTER,
        "- --env=RAY_USAGE_STATS_ENABLED=0",
        "- --env=RAY_AUTH_TOKEN=3f8a1c5d9e",
        "secret",
        "docker.run_options[1]",
        "revoke",
    ),
    "AWS credentials of the provider": Mistake(
        CLUSTER,
        "  type: aws\n",
        "  type: aws\n  aws_credentials: {aws_access_key_id: x, aws_secret_access_key: y}\n",
        "secret",
        "provider.aws_credentials",
        "roles",
    ),
    "SSH open to the world": Mistake(
        CLUSTER,
        "  security_group:\n    GroupName: gpt2dist",
        "  key_pair:\n    key_name: gpt2dist",
        "open-port",
        "provider.security_group",
        "security_group: {GroupName",
        "warning",
    ),
    "dashboard's port open to the world": Mistake(
        CLUSTER,
        "    GroupName: gpt2dist # made before, SSH from your address only; Ray's own would open SSH to the world",
        "    GroupName: gpt2dist\n    IpPermissions: [{FromPort: 8265, ToPort: 8265, IpProtocol: tcp, "
        "IpRanges: [{CidrIp: 0.0.0.0/0}]}]",
        "open-port",
        "provider.security_group.IpPermissions[0]",
        "your own address",
    ),
    # ---- KubeRay
    "restart policy with autoscaler v2": Mistake(
        FLEET,
        "          tolerations: [{key: nvidia.com/gpu",
        "          restartPolicy: Always\n          tolerations: [{key: nvidia.com/gpu",
        "restart-policy",
        "spec.workerGroupSpecs[0].template.spec.restartPolicy",
        "Never",
    ),
    "typo in the cluster's fields": Mistake(
        FLEET,
        "  enableInTreeAutoscaling",
        "  enableInTreeAutoscalling",
        "kuberay-schema",
        "spec.enableInTreeAutoscalling",
        "enableInTreeAutoscaling",
    ),
    "typo in the pod": Mistake(
        FLEET,
        '                limits: {cpu: "90"',
        '                limit: {cpu: "90"',
        "kuberay-schema",
        "spec.workerGroupSpecs[0].template.spec.containers[0].resources.limit",
        "limits",
    ),
    "start parameter that is no text": Mistake(
        FLEET, 'num-cpus: "0"', "num-cpus: 0", "kuberay-schema", "spec.headGroupSpec.rayStartParams.num-cpus", '"0"'
    ),
    "another Ray than the image": Mistake(
        FLEET, 'rayVersion: "2.60.0"', 'rayVersion: "2.58.0"', "ray-version", "spec.rayVersion", "2.60.0"
    ),
    "an image of another Ray": Mistake(
        JOB,
        "image: registry.example.com/gpt2dist:2.60.0-py311\n",
        "image: registry.example.com/gpt2dist:2.58.0-py311\n",
        "ray-version",
        "spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0].image",
        "2.60.0-py311",
    ),
    "no token on Kubernetes": Mistake(
        FLEET,
        "authOptions: {mode: token}",
        "authOptions: {mode: disabled}",
        "token",
        "spec.authOptions.mode",
        "mode: token",
    ),
    "pods killed while they drain": Mistake(
        FLEET,
        "terminationGracePeriodSeconds: 115\n",
        "terminationGracePeriodSeconds: 60\n",
        "grace-period",
        "spec.workerGroupSpecs[0].template.spec.terminationGracePeriodSeconds",
        "more than 90",
    ),
    "dashboard behind a load balancer": Mistake(
        FLEET,
        "serviceType: ClusterIP",
        "serviceType: LoadBalancer",
        "open-dashboard",
        "spec.headGroupSpec.serviceType",
        "ClusterIP",
    ),
    "head on a spot node": Mistake(
        FLEET,
        "{karpenter.sh/capacity-type: on-demand}",
        "{karpenter.sh/capacity-type: spot}",
        "spot-head",
        "spec.headGroupSpec.template.spec.nodeSelector.karpenter.sh/capacity-type",
        "on-demand",
    ),
    "head on a spot node by affinity": Mistake(
        FLEET,
        "nodeSelector: {karpenter.sh/capacity-type: on-demand}",
        "affinity: {nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: "
        "[{matchExpressions: [{key: karpenter.sh/capacity-type, operator: In, values: [spot]}]}]}}}",
        "spot-head",
        "spec.headGroupSpec.template.spec.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution."
        "nodeSelectorTerms[0].matchExpressions[0]",
        "on-demand",
    ),
    "a mount of no volume": Mistake(
        FLEET,
        "- {name: shm, mountPath: /dev/shm}",
        "- {name: shm, mountPath: /dev/shm}\n              - {name: data, mountPath: /data}",
        "volumes",
        "spec.headGroupSpec.template.spec.containers[0].volumeMounts[1].name",
        "add it to volumes",
    ),
    "no container": Mistake(
        FLEET,
        "        containers:\n          - name: ray-head",
        "        containers: []\n        initContainers:\n          - name: ray-head",
        "kuberay-schema",
        "spec.headGroupSpec.template.spec.containers",
        "Ray's",
    ),
    "more requested than the limit": Mistake(
        FLEET,
        'requests: {cpu: "90"',
        'requests: {cpu: "90500m"',
        "resources",
        "spec.workerGroupSpecs[0].template.spec.containers[0].resources.requests.cpu",
        "cpu: 90",
    ),
    "fewer GPUs requested than the limit": Mistake(
        FLEET,
        'requests: {cpu: "90", memory: 1050Gi, ephemeral-storage: 150Gi, nvidia.com/gpu: "8"}',
        'requests: {cpu: "90", memory: 1050Gi, ephemeral-storage: 150Gi, nvidia.com/gpu: "4"}',
        "resources",
        "spec.workerGroupSpecs[0].template.spec.containers[0].resources.requests.nvidia.com/gpu",
        "nvidia.com/gpu: 8",
    ),
    "an amount that is none": Mistake(
        FLEET,
        'limits: {cpu: "3", memory: 14Gi',
        'limits: {cpu: "3", memory: 14GB',
        "resources",
        "spec.headGroupSpec.template.spec.containers[0].resources.limits.memory",
        "Gi",
    ),
    "a key in the environment": Mistake(
        FLEET,
        '{name: RAY_USAGE_STATS_ENABLED, value: "0"}',
        '{name: WANDB_API_KEY, value: "0"}',
        "secret",
        "spec.headGroupSpec.template.spec.containers[0].env[1].value",
        "secretKeyRef",
    ),
    "no upper limit": Mistake(
        FLEET, "maxReplicas: 4", "numOfHosts: 1", "max-workers", "spec.workerGroupSpecs[0].maxReplicas", "maxReplicas"
    ),
    "fewer at most than at least": Mistake(
        FLEET,
        "minReplicas: 0",
        "minReplicas: 9",
        "max-workers",
        "spec.workerGroupSpecs[0].minReplicas",
        "minReplicas: 0",
    ),
    "GPU under a wrong name": Mistake(
        JOB,
        'nvidia.com/gpu: "8"',
        'gpu: "8"',
        "resources",
        "spec.rayClusterSpec.workerGroupSpecs[0].template.spec.containers[0].resources.limits.gpu",
        "nvidia.com/gpu",
        all=True,
    ),
    "container may be root": Mistake(
        FLEET,
        "{runAsNonRoot: true, runAsUser: 1000",
        "{runAsUser: 1000",
        "security-context",
        "spec.headGroupSpec.template.spec.securityContext.runAsNonRoot",
        "runAsNonRoot",
        "warning",
    ),
    "a cluster that stays when the job is done": Mistake(
        JOB,
        "shutdownAfterJobFinishes: true # nothing is paid for when it is done\n  ttlSecondsAfterFinished: 300",
        "shutdownAfterJobFinishes: false",
        "kuberay-job",
        "spec.shutdownAfterJobFinishes",
        "true",
        "warning",
    ),
    "a job without retries": Mistake(
        JOB, "backoffLimit: 10", "backoffLimit: 0", "kuberay-job", "spec.backoffLimit", "backoffLimit", "warning"
    ),
    "a job that does nothing": Mistake(
        JOB, "  entrypoint: gpt2dist train /home", "  jobId: /home", "kuberay-job", "spec.entrypoint", "gpt2dist train"
    ),
    "the old API": Mistake(
        JOB, "apiVersion: ray.io/v1\n", "apiVersion: ray.io/v1alpha1\n", "kuberay-schema", "apiVersion", "ray.io/v1"
    ),
    "a kind that KubeRay does not have": Mistake(
        FLEET, "kind: RayCluster", "kind: Raycluster", "kuberay-schema", "kind", "did you mean RayCluster?"
    ),
    "a kind that is not checked": Mistake(
        FLEET, "kind: RayCluster", "kind: RayService", "kuberay-schema", "kind", "kubectl", "warning"
    ),
    "no kind": Mistake(JOB, "kind: RayJob\n", "", "kuberay-schema", "kind", "add it"),
    "no version of the API": Mistake(
        JOB, "apiVersion: ray.io/v1\n", "", "kuberay-schema", "apiVersion", "apiVersion: ray.io/v1"
    ),
    "name too long": Mistake(JOB, "name: gpt2-124m", f"name: {'x' * 50}", "kuberay-name", "metadata.name", "name:"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_found_at_its_place(repository: Path, name: str) -> None:
    mistake = MISTAKES[name]
    file = repository / mistake.file
    text = file.read_text()
    assert mistake.old in text
    text = text.replace(mistake.old, mistake.new, -1 if mistake.all else 1)
    file.write_text(text)
    findings = found(repository, mistake.file)
    keys = [finding.key for finding in findings]
    assert mistake.key in keys, findings
    first = findings[keys.index(mistake.key)]
    assert {finding.rule for finding in findings} == {mistake.rule}, findings
    assert len({finding.what for finding in findings}) == 1, findings
    assert first.severity == mistake.severity
    assert first.file == str(file)
    assert mistake.advice in first.fix
    _line_is_right(text, first)


def _line_is_right(text: str, finding: Finding) -> None:
    """The line has the key, or where that is missing the one above it. A key that is missing at the top has no line."""
    *above, last = [part for part in re.split(r"\.(?!sh/)|[\[\]]+", finding.key) if part]
    if finding.line is None:
        assert not above
        assert not re.search(rf"^{last}:", text, re.M)
        return
    line = text.splitlines()[finding.line - 1]
    names = [last] if not last.isdigit() else []
    assert any(name in line for name in [*names, *above[-1:]]) or line.lstrip().startswith("- "), (line, finding)


@dataclass
class Misfit:
    """A change of the run, or of the cluster, with which they do not go together."""

    overrides: tuple[str, ...]
    rule: str
    file: str
    key: str
    what: str
    advice: str
    severity: str = "error"
    cluster: tuple[str, str] = ("", "")


MISFITS = {
    "runs on a local disk": Misfit(
        ("storage=runs",), "shared-storage", RUN_124M, "storage", "directory of one machine", "s3://"
    ),
    "data on a local disk": Misfit(
        ("prepare.output=data/x",), "shared-storage", RUN_124M, "prepare.output", "directory of one machine", "s3://"
    ),
    "too few machines": Misfit(
        ("cluster.workers=40",), "fit", CLUSTER, f"{A100}.max_workers", "room for 32 workers", "5 machines of a100x8"
    ),
    "too few machines of all types": Misfit(
        ("cluster.workers=16",),
        "fit",
        CLUSTER,
        "max_workers",
        "room for 8 workers",
        "2 machines",
        cluster=("max_workers: 12 ", "max_workers: 1 "),
    ),
    "an elastic run that may outgrow the fleet": Misfit(
        ("cluster.workers=[8, 40]",), "fit", RUN_124M, "cluster.workers", "room for 32", "or lower this"
    ),
    "CPUs that no machine has": Misfit(
        ("cluster.cpus_per_worker=120",), "fit", RUN_124M, "cluster.gpus_per_worker", "no machine has", "ask for less"
    ),
    "GPUs that the cluster does not have": Misfit(
        ("cluster.accelerator=H100",), "fit", RUN_124M, "cluster.accelerator", "A100, L4", "labels"
    ),
    "any GPU: a mixture": Misfit(
        ('cluster.accelerator=""',), "mixed-machines", RUN_124M, "cluster", "mixed", 'accelerator = "A100"', "warning"
    ),
    "GPUs idle for want of CPUs": Misfit(
        ("cluster.cpus_per_worker=16", "cluster.workers=12"),
        "idle-gpus",
        RUN_124M,
        "cluster.cpus_per_worker",
        "2 of its 8 GPUs",
        "cpus_per_worker = 11",
        "warning",
    ),
    "GPUs idle on a machine with fewer CPUs": Misfit(
        ("cluster.cpus_per_worker=1",),
        "idle-gpus",
        RUN_124M,
        "cluster.cpus_per_worker",
        "4 of its 8 GPUs",
        "cpus_per_worker = 0.37",
        "warning",
        cluster=("resources: {CPU: 96, GPU: 8}", "resources: {CPU: 4, GPU: 8}"),
    ),
    "a last machine that is half empty": Misfit(
        ("cluster.workers=12",), "division", RUN_124M, "cluster.workers", "the last has 4", "multiple of 8", "warning"
    ),
    "no CPU for the stream": Misfit(
        ("cluster.cpus_per_worker=12",),
        "data-cpus",
        RUN_124M,
        "cluster.cpus_per_worker",
        "none is left",
        "cpus_per_worker = 11",
        "warning",
    ),
    "no CPU for the stream, of few": Misfit(
        ("cluster.cpus_per_worker=1",),
        "data-cpus",
        RUN_124M,
        "cluster.cpus_per_worker",
        "none is left",
        "cpus_per_worker = 0.87",
        "warning",
        cluster=("resources: {CPU: 96, GPU: 8}", "resources: {CPU: 8, GPU: 8}"),
    ),
    "GPUs that are not used": Misfit(
        ("cluster.gpus_per_worker=0", 'cluster.accelerator=""', "cluster.cpus_per_worker=8"),
        "idle-gpus",
        RUN_124M,
        "cluster.gpus_per_worker",
        "idle",
        "gpus_per_worker = 1",
        "warning",
    ),
    "more memory than a GPU has": Misfit(
        ("batch.micro_sequences=200",), "memory", RUN_124M, "batch.micro_sequences", "are safe to use", "gpt2dist plan"
    ),
}


@pytest.mark.parametrize("name", MISFITS)
def test_a_run_that_does_not_fit_is_found(repository: Path, name: str) -> None:
    misfit = MISFITS[name]
    file = repository / CLUSTER
    old, new = misfit.cluster
    assert old in file.read_text()
    file.write_text(file.read_text().replace(old, new, 1))
    findings = [f for f in found(repository, CLUSTER, RUN_124M, *misfit.overrides) if f.rule == misfit.rule]
    assert findings
    assert findings[0].file == str(repository / misfit.file)
    assert (findings[0].key, findings[0].severity) == (misfit.key, misfit.severity)
    assert misfit.what in findings[0].what
    assert misfit.advice in findings[0].fix
    assert findings[0].line is not None


def test_every_data_set_of_a_mixture_has_to_be_shared(repository: Path) -> None:
    run = (RUN_124M, 'data.path={"/fsx/a"=1, "s3://b/c"=2}')
    assert [(f.rule, f.key) for f in found(repository, CLUSTER, *run)] == [("shared-storage", "data.path")]


def test_the_readme_counts_the_planted_mistakes() -> None:
    assert f" {len(MISTAKES) + len(MISFITS)} planted mistakes" in (ROOT / "README.md").read_text()


def test_a_network_file_system_is_shared_storage(repository: Path) -> None:
    run = (RUN_124M, "storage=/fsx/runs", "prepare.output=/fsx/data")
    assert {f.rule for f in found(repository, CLUSTER, *run)} == {"shared-storage"}
    file = repository / CLUSTER
    text = file.read_text().replace("- --ulimit=memlock=-1", "- -v /mnt/lustre:/fsx\n    - --ulimit=memlock=-1")
    mount = "initialization_commands:\n  - sudo mount -t lustre fs-0.fsx.us-east-1.amazonaws.com@tcp:/x /mnt/lustre"
    file.write_text(text.replace("initialization_commands:", mount))
    assert found(repository, CLUSTER, *run) == []
    for command, option, shared in [
        ("sudo mount -t nfs4 10.0.0.5:/ /mnt/efs; sudo chmod 777 /mnt/efs", "-v /mnt/efs:/fsx", True),
        ("(mountpoint -q /mnt/efs || sudo mount -t nfs4 10.0.0.5:/ /mnt/efs)", "-v /mnt/efs/deep:/fsx", True),
        ("sudo mount -t efs -o tls fs-1:/ /mnt/efs/", "--mount=type=bind,source=/mnt/efs,target=/fsx", True),
        ("sudo mount -t efs fs-1:/ /mnt/efs", "-v /mnt/efs-scratch:/fsx", False),
    ]:
        changed = text.replace("-v /mnt/lustre:/fsx", option).replace(
            "initialization_commands:", f"initialization_commands:\n  - {command}"
        )
        file.write_text(changed)
        assert {f.rule for f in found(repository, CLUSTER, *run)} == (set() if shared else {"shared-storage"}), command

    manifest = repository / FLEET
    text = manifest.read_text()
    text = text.replace(
        "- {name: shm, mountPath: /dev/shm}",
        "- {name: shm, mountPath: /dev/shm}\n              - {name: fsx, mountPath: /fsx}",
    )
    text = re.sub(r"( +)volumes:\n", r"\1volumes:\n\1  - {name: fsx, persistentVolumeClaim: {claimName: fsx}}\n", text)
    manifest.write_text(text)
    assert found(repository, FLEET, *run) == []


def test_kuberay_takes_a_request_of_cpus_for_a_limit(repository: Path) -> None:
    manifest = repository / FLEET
    manifest.write_text(re.sub(r'limits: \{cpu: "\d+", ', "limits: {", manifest.read_text()))
    assert found(repository, FLEET, RUN_124M) == []


def test_machines_of_a_group_may_have_several_hosts(repository: Path) -> None:
    manifest = repository / FLEET
    text = manifest.read_text().replace("maxReplicas: 4", "maxReplicas: 1")
    manifest.write_text(text)
    assert {f.rule for f in found(repository, FLEET, RUN_124M, "cluster.workers=32")} == {"fit"}
    manifest.write_text(text.replace("maxReplicas: 1\n", "maxReplicas: 1\n      numOfHosts: 4\n"))
    assert found(repository, FLEET, RUN_124M, "cluster.workers=32") == []


def test_no_grace_is_told_as_none(repository: Path) -> None:
    manifest = repository / FLEET
    grace = "terminationGracePeriodSeconds: "
    manifest.write_text(manifest.read_text().replace(f"{grace}115", f"{grace}0", 1))
    assert [f.what[:16] for f in found(repository, FLEET)] == ["0 s, but Ray dra"]


def test_an_affinity_that_leaves_a_choice_is_no_spot_head(repository: Path) -> None:
    manifest = repository / FLEET
    spot, other = (
        f"{{matchExpressions: [{{key: {key}, operator: In, values: [spot]}}]}}"
        for key in ("karpenter.sh/capacity-type", "example.com/pool")
    )
    for terms, rules in (([spot, other], set()), ([other], set()), ([spot, spot], {"spot-head"})):
        affinity = "{nodeAffinity: {requiredDuringSchedulingIgnoredDuringExecution: {nodeSelectorTerms: [%s]}}}"
        text = (ROOT / FLEET).read_text()
        selector = "nodeSelector: {karpenter.sh/capacity-type: on-demand}"
        manifest.write_text(text.replace(selector, "affinity: " + affinity % ", ".join(terms)))
        assert {f.rule for f in found(repository, FLEET)} == rules


def test_ways_to_write_commands(repository: Path) -> None:
    """A cloud in quotes or before other signs, and a redirection before the end of `ray start`."""
    text = (ROOT / CLUSTER).read_text()
    redirected = text.replace(
        "--metrics-export-port=8080\n    --auto", "> /tmp/log 2>&1 --metrics-export-port=8080\n    --auto"
    )
    assert redirected != text
    for cloud in ('--cloud "aws"', "--cloud='aws'", "--cloud aws;", "--cloud=aws>> /tmp/x"):
        (repository / CLUSTER).write_text(redirected.replace("--cloud aws", cloud))
        assert found(repository, CLUSTER) == [], cloud


def test_ray_up_takes_one_document(repository: Path) -> None:
    text = (ROOT / CLUSTER).read_text()
    for end in ("\n---\n", f"\n---\n{text}"):
        (repository / CLUSTER).write_text(text + end)
        assert [(f.rule, f.severity, f.fix) for f in found(repository, CLUSTER)] == [
            ("ray-schema", "error", "leave one")
        ]
    (repository / CLUSTER).write_text(f"---\n{text}")
    assert found(repository, CLUSTER) == []
    (repository / FLEET).write_text((ROOT / FLEET).read_text() + "\n---\n")
    assert found(repository, FLEET) == []


LOCAL = """cluster_name: own
provider: {type: local, head_ip: 10.0.0.1, worker_ips: [10.0.0.2, 10.0.0.3]}
auth: {ssh_user: ubuntu}
min_workers: 2
max_workers: 2
upscaling_speed: 1.0
idle_timeout_minutes: 10
file_mounts: {/root/.ray: ~/.ray}
head_start_ray_commands:
  - ray stop
  - RAY_AUTH_MODE=token ray start --head --num-cpus=0 --metrics-export-port=8080 --autoscaling-config=x.yaml
worker_start_ray_commands:
  - ray stop
  - RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP:6379 --metrics-export-port=8080
"""


@pytest.mark.parametrize(
    ("old", "new", "findings"),
    [
        ("", "", []),
        ("min_workers: 2\nmax_workers: 2\n", "", []),
        ("max_workers: 2", "max_workers: 3", [("warning", "max_workers")]),
        ("max_workers: 2", "max_workers: 1", [("error", "max_workers")]),  # of which Ray wants two
        ("min_workers: 2\nmax_workers: 2", "min_workers: 0\nmax_workers: 1", [("warning", "max_workers")]),
        ("min_workers: 2", "min_workers: 9", [("warning", "min_workers")]),
        ("[10.0.0.2, 10.0.0.3]", "[]", [("error", "provider.worker_ips")]),
        ("min_workers: 2", "min_workers: two", [("error", "min_workers")]),
        ("min_workers: 2", "min_worker: 2", [("error", "min_worker")]),
        ("worker_ips: [10.0.0.2, 10.0.0.3]", "worker_ip: x", [("error", "")]),
        (" --num-cpus=0", "", [("warning", "head_start_ray_commands")]),
    ],
)
def test_machines_of_ones_own(repository: Path, old: str, new: str, findings: list[tuple[str, str]]) -> None:
    assert old in LOCAL
    (repository / "own.yaml").write_text(LOCAL.replace(old, new))
    assert [(f.severity, f.key) for f in found(repository, "own.yaml", RUN_124M)] == findings


def test_spot_machines_of_other_clouds(repository: Path) -> None:
    """Of Google Cloud and Azure neither provider nor node_config are known, but this is."""
    text = (repository / CLUSTER).read_text()
    spot_of_aws = "      InstanceMarketOptions: *spot\n"
    for cloud, spot in [
        ("gcp", "      scheduling: [{preemptible: true}]\n"),
        ("gcp", "      scheduling: {provisioningModel: SPOT}\n"),
        ("azure", "      azure_arm_parameters: {priority: Spot}\n"),
    ]:
        (repository / CLUSTER).write_text(
            text.replace("type: aws", f"type: {cloud}")
            .replace(spot_of_aws, spot)
            .replace("--cloud aws", f"--cloud {cloud}")
        )
        assert found(repository, CLUSTER) == []
        (repository / CLUSTER).write_text(
            text.replace("type: aws", f"type: {cloud}")
            .replace("      InstanceType: m7i", f"{spot}      InstanceType: m7i")
            .replace("--cloud aws", f"--cloud {cloud}")
        )
        assert [(f.rule, f.severity) for f in found(repository, CLUSTER)] == [("spot-head", "error")]


def test_secrets_are_not_printed(repository: Path) -> None:
    file = repository / CLUSTER
    secret = "AKIAIOSFODNN7EXAMPLE"
    file.write_text(file.read_text() + f"metadata: {{note: {secret}}}\n")
    findings = found(repository, CLUSTER)
    assert [f.rule for f in findings] == ["secret"]
    assert secret not in repr(findings)


def test_whole_files_are_told_from_others(repository: Path) -> None:
    for text, message in [
        ("", "is empty"),
        ("- 1\n- 2\n", "neither a cluster file"),
        ("name: x\n", "neither a cluster file"),
        ("a: [1\n", "not valid YAML: while parsing a flow sequence"),
        ("a: *nowhere\n", "not valid YAML"),
        ("a: 2024-13-45\n", "not valid YAML: month must be in 1..12"),
        ("a: !!timestamp x\n", "not valid YAML"),
        ("a: &a [*a]\n", "not valid YAML: maximum recursion depth exceeded"),
    ]:
        (repository / "other.yaml").write_text(text)
        with pytest.raises(UserError, match=message):
            found(repository, "other.yaml")
    with pytest.raises(UserError, match="no such file"):
        found(repository, "nothing.yaml")


def test_a_file_full_of_nonsense_gives_findings_not_tracebacks(repository: Path) -> None:
    """Whatever stands where a mapping or a list should be."""
    for file in (CLUSTER, FLEET, JOB):
        lines = (ROOT / file).read_text().splitlines()
        for number, line in enumerate(lines):
            key = re.match(r"( *(?:- )?[\w./-]+):", line)
            if key and not line.strip().startswith("#"):
                indent = len(line) - len(line.lstrip())
                rest = lines[number + 1 :]
                while rest and (not rest[0].strip() or len(rest[0]) - len(rest[0].lstrip()) > indent):
                    rest.pop(0)
                value = ("3", "[]", "{}", "text", "null")[number % 5]
                (repository / file).write_text("\n".join([*lines[:number], f"{key[1]}: {value}", *rest]))
                with contextlib.suppress(UserError):
                    found(repository, file)


def test_what_ray_and_kuberay_accept_is_no_mistake(repository: Path) -> None:
    """Numbers that Ray asks the cloud for, another way to write a variable, a fleet of fixed size."""
    text = (ROOT / CLUSTER).read_text()
    for before, after in (
        ("    resources: {CPU: 8, GPU: 1}\n", ""),
        ("    resources: {CPU: 96, GPU: 8}\n", "    resources: {}\n"),
        ("InstanceType: p4d.24xlarge", "InstanceType: c7a.8xlarge"),
        ("--address=$RAY_HEAD_IP:6379", "--address=${RAY_HEAD_IP}:6379"),
        (
            "      InstanceType: m7i.xlarge",
            "      LaunchTemplate: {LaunchTemplateId: lt-1, Version: 2}\n      InstanceType: m7i.xlarge",
        ),
    ):
        assert before in text
        text = text.replace(before, after)
    (repository / CLUSTER).write_text(text)
    assert [f for f in found(repository, CLUSTER, RUN_124M) if f.severity == "error"] == []

    text = (ROOT / FLEET).read_text()
    text = text.replace("enableInTreeAutoscaling: true", "enableInTreeAutoscaling: false")
    text = text.replace("        maxReplicas: 4\n", "").replace("        replicas: 0\n", "        replicas: 4\n")
    (repository / FLEET).write_text(text)
    assert [f for f in found(repository, FLEET, RUN_124M) if f.severity == "error"] == []


def test_a_template_is_no_manifest(repository: Path) -> None:
    text = (ROOT / JOB).read_text()
    (repository / JOB).write_text(text.replace('rayVersion: "2.60.0"', "rayVersion: {{ .Values.ray }}"))
    with pytest.raises(UserError, match=r"rayjob.yaml: not valid YAML: .*line 16"):
        found(repository, JOB)


def test_command_line(repository: Path, gpt2dist: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    clean = gpt2dist("cluster", "check", CLUSTER, FLEET, JOB, cwd=repository)
    assert (clean.returncode, clean.stderr) == (0, "")
    assert "3 files: 0 errors, 0 warnings" in clean.stdout
    assert "before ray up: build/cluster: make dist" in clean.stdout

    file = repository / CLUSTER
    text = file.read_text()
    file.write_text(text.replace("cache_stopped_nodes: false", "cache_stopped_nodes: true"))
    warned = gpt2dist("cluster", "check", CLUSTER, "--json", cwd=repository)
    assert warned.returncode == 0
    assert json.loads(warned.stdout)["errors"] == 0

    file.write_text(text.replace("VolumeType: gp3", "VolumeType: gp4"))
    wrong = gpt2dist("cluster", "check", CLUSTER, "--json", "--run", RUN_124M, cwd=repository)
    assert wrong.returncode == 1
    assert json.loads(wrong.stdout)["findings"][0]["key"].endswith("Ebs.VolumeType")
    shown = gpt2dist("cluster", "check", CLUSTER, cwd=repository).stdout
    number = next(n for n, line in enumerate(file.read_text().splitlines(), 1) if "gp4" in line)
    assert f"{CLUSTER}:{number}: error: {HEAD}.node_config.BlockDeviceMappings[0].Ebs.VolumeType" in shown

    missing = gpt2dist("cluster", "check", "nothing.yaml", cwd=repository)
    assert (missing.returncode, missing.stderr) == (2, "error: nothing.yaml: no such file\n")
