"""`gpt2dist cluster check`: what is wrong with a cluster's files, before anything is started or paid.

Rules of `ray up` files are in rayup.py and aws.py, of KubeRay manifests in kuberay.py, of a run on such a cluster in
fit.py. Field names, types and values come from where they are defined: Ray's schema, botocore's model of EC2, the
Kubernetes client.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt2dist.cluster.check import fit, kuberay, rayup
from gpt2dist.cluster.check.document import Finding, read_documents
from gpt2dist.cluster.check.secrets import check_secrets
from gpt2dist.cluster.check.versions import pins
from gpt2dist.cluster.machines import load_machines
from gpt2dist.config import UserError


@dataclass(frozen=True)
class Report:
    """What came of some files."""

    findings: list[Finding]
    todo: list[str]
    """What is still to be done on this machine before `ray up`."""

    @property
    def errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.severity == "error" for finding in self.findings)


def check_files(files: list[str], run_file: str | None = None, overrides: tuple[str, ...] = ()) -> Report:
    """Checks cluster files and manifests, and a run on each cluster that they describe.

    Raises:
        UserError: a file cannot be read, or is neither a cluster file of `ray up` nor a manifest.
    """
    run = fit.RunFile.read(run_file, overrides) if run_file else None
    known = load_machines()
    findings: list[Finding] = []
    todo: list[str] = []
    for file in files:
        every = read_documents(file)
        documents = [document for document in every if document.value is not None]
        if not documents:
            raise UserError(f"{file}: is empty")
        for document in documents:
            if not isinstance(document.value, dict):
                raise UserError(f"{file}: neither a cluster file of `ray up` nor a Kubernetes manifest")
            check_secrets(document)
            if "kind" in document.value or "apiVersion" in document.value:
                cluster = kuberay.check(document, pins(file), known)
            elif "provider" in document.value or "cluster_name" in document.value:
                if len(every) > 1 and document is documents[0]:
                    what = "Ray refuses it: the file has several documents, or a --- at its end"
                    document.error("ray-schema", (), what, "leave one")
                cluster = rayup.check(document, pins(file), known)
                todo += rayup.todo(document)
            else:
                raise UserError(f"{file}: neither a cluster file of `ray up` nor a Kubernetes manifest")
            if run and cluster:
                fit.check(document, run, cluster)
            findings += document.distinct()
    if run:
        findings += dict.fromkeys(run.findings)
    return Report(findings, todo)
