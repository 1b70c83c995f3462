"""Mappings against the real definitions of Ray, EC2 and Kubernetes, all by way of JSON Schema."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterator
from pathlib import Path as FilePath
from typing import Any

import jsonschema

from gpt2dist.cluster.check.document import Document, Path, did_you_mean

Schema = dict[str, Any]


def check_schema(document: Document, rule: str, schema: Schema, value: Any, path: Path = ()) -> bool:
    """Unknown keys, wrong types and values, missing keys, as errors; true if there are none.

    schema: JSON Schema, draft 7; value: a part of the document, at `path`.
    """
    before = len(document.findings)
    for error in sorted(jsonschema.Draft7Validator(schema).iter_errors(value), key=lambda e: list(map(str, e.path))):
        for where, what, fix in _explain(error):
            document.error(rule, (*path, *error.absolute_path, *where), what, fix)
    return len(document.findings) == before


def _explain(error: Any) -> Iterator[tuple[Path, str, str]]:
    """For one error: where, below its own path; what; what to do."""
    value = error.instance
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        for name in value:
            if name not in known:
                yield (name,), "unknown key", did_you_mean(name, known)
    elif error.validator == "type":
        names = {"object": "a mapping", "array": "a list", "integer": "a whole number", "null": "empty"}
        wanted = error.validator_value if isinstance(error.validator_value, list) else [error.validator_value]
        text = " or ".join(names.get(name, f"a {name}") for name in wanted)
        quoted = json.dumps(value, default=str)
        hint = f'write it in quotes: "{quoted}"' if "string" in wanted and isinstance(value, (int, float)) else text
        yield (), f"must be {text}, not {_short(quoted)}", hint
    elif error.validator == "enum":
        yield (), f"{value!r} is not a value of it", did_you_mean(value, map(str, error.validator_value))
    elif error.validator == "required":
        missing = error.message.split("'")[1]
        yield (missing,), "is missing", "add it"
    else:
        yield (), _short(error.message), "see the documentation of this key"


def _short(text: str) -> str:
    return text if len(text) <= 100 else text[:97] + "…"


@functools.cache
def ray_up() -> Schema:
    """Ray's own schema of a cluster file."""
    import ray.autoscaler

    schema: Schema = json.loads((FilePath(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    return schema


# ---------------------------------------------------------------- EC2


@functools.cache
def ec2_model() -> Any:
    """EC2's service model, as botocore ships it."""
    from botocore.loaders import Loader
    from botocore.model import ServiceModel

    return ServiceModel(Loader().load_service_model("ec2", "service-2"), "ec2")


@functools.cache
def ec2_input(operation: str) -> Schema:
    """The parameters of an EC2 operation."""
    return _of_shape(ec2_model().operation_model(operation).input_shape)


@functools.cache
def ec2_regions() -> list[str]:
    """The names of AWS's regions."""
    from botocore.loaders import Loader

    partitions = Loader().load_data("endpoints")["partitions"]
    return [region for partition in partitions for region in partition["regions"]]


def _of_shape(shape: Any) -> Schema:
    kind = shape.type_name
    if kind == "structure":
        members = {name: _of_shape(member) for name, member in shape.members.items()}
        return {"type": "object", "properties": members, "additionalProperties": False}
    if kind == "list":
        return {"type": "array", "items": _of_shape(shape.member)}
    if kind == "map":
        return {"type": "object", "additionalProperties": _of_shape(shape.value)}
    if kind == "string":
        return {"type": "string", "enum": list(shape.enum)} if shape.enum else {"type": "string"}
    if kind == "timestamp":
        return {}
    names = {"integer": "integer", "long": "integer", "float": "number", "double": "number", "boolean": "boolean"}
    return {"type": names.get(kind, "string")}


# ---------------------------------------------------------------- Kubernetes


def kubernetes_type(name: str) -> Schema:
    """A type of the Kubernetes API, such as V1PodTemplateSpec, as the Python client defines it.

    Raises:
        ImportError: the client is not installed.
    """
    definitions: dict[str, Schema] = {}
    schema = _of_type(name, definitions)
    return {**schema, "definitions": definitions}


def _of_type(name: str, definitions: dict[str, Schema]) -> Schema:
    simple = {"str": "string", "int": "integer", "float": "number", "bool": "boolean", "bytes": "string"}
    if name in simple:
        return {"type": simple[name]}
    if name in ("object", "datetime"):  # what is a number or a string, too
        return {}
    if inner := re.fullmatch(r"[Ll]ist\[(.*)\]", name):
        return {"type": "array", "items": _of_type(inner[1], definitions)}
    if inner := re.fullmatch(r"[Dd]ict[\[(]str, (.*)[\])]", name):
        return {"type": "object", "additionalProperties": _of_type(inner[1], definitions)}
    if name not in definitions:
        from kubernetes.client import models

        model = getattr(models, name)
        definitions[name] = {}  # the types refer to each other
        properties = {
            model.attribute_map[attribute]: _of_type(kind, definitions)
            for attribute, kind in model.openapi_types.items()
        }
        if name == "V1ResourceRequirements":  # quantities
            quantities = {"type": "object", "additionalProperties": {"type": ["string", "number"]}}
            properties |= {"limits": quantities, "requests": quantities}
        definitions[name] = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"$ref": f"#/definitions/{name}"}
