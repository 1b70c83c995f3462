"""Hugging Face GPT-2 directories: import (safetensors) and export.

They hold matrices as [in, out] (`Conv1D`), ours are [out, in]; the head is tied to the embedding in both. Their
embedding table has no padding rows. Pickled weights (pytorch_model.bin) are refused: loading them can run code.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from upath import UPath

from gpt2dist import storage
from gpt2dist.config import RunConfig, UserError
from gpt2dist.data import tokenizer
from gpt2dist.model import gpt2
from gpt2dist.model.gpt2 import GPT2Config

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
OTHERS = (WEIGHTS, INDEX, "pytorch_model.bin", "tokenizer.json", "added_tokens.json")
"""Files besides config.json that an export would replace, or that transformers would take for a part of it."""
VOCABULARIES = {"vocab.json": (), "tokenizer.json": ("model", "vocab")}
"""Files of a tokenizer, and where in them its table of token → id is."""
GPT2_VOCABULARY = "855ec41a9d90094ebb1189ee8082e915505cf2dfe0691a4f39da9c020f9476b2"
"""sha256 of GPT-2's table as JSON with sorted keys."""
Weights = Callable[[str], Tensor]
"""A parameter's fp32 values, on the CPU, by its name in our model."""


class HFConfig(BaseModel):
    """The keys of config.json that matter here; each must say what our model is.

    transformers knows the shape's keys by two names, of which the longer one wins.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    model_type: Literal["gpt2"]
    n_layer: int = Field(12, ge=1, le=10_000, validation_alias=AliasChoices("num_hidden_layers", "n_layer"))
    n_head: int = Field(12, ge=1, le=1_000_000, validation_alias=AliasChoices("num_attention_heads", "n_head"))
    n_embd: int = Field(768, ge=1, le=1_000_000, validation_alias=AliasChoices("hidden_size", "n_embd"))
    n_positions: int = Field(
        1024, ge=1, le=100_000_000, validation_alias=AliasChoices("max_position_embeddings", "n_positions")
    )
    vocab_size: Literal[50257] = 50257
    resid_pdrop: float = Field(default=0.1, ge=0, lt=1)
    activation_function: Literal["gelu_new", "gelu_pytorch_tanh"] = "gelu_new"
    layer_norm_epsilon: float = 1e-5
    n_inner: int | None = None
    tie_word_embeddings: Literal[True] = True
    scale_attn_weights: Literal[True] = True
    scale_attn_by_inverse_layer_idx: Literal[False] = False
    reorder_and_upcast_attn: Literal[False] = False
    add_cross_attention: Literal[False] = False


def read_config(location: str) -> GPT2Config:
    """The shape of the model in a local directory or on the hub.

    Raises:
        UserError: no config.json, or not of a GPT-2 as published, or a tokenizer with another vocabulary.
    """
    path = _directory(location) / CONFIG
    try:
        c = HFConfig.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{location}: not a Hugging Face model: no {CONFIG}") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be read: {e.strerror or e}") from None
    except ValidationError as e:
        problem = e.errors(include_url=False)[0]
        key, message = ".".join(map(str, problem["loc"])), problem["msg"]
        value = f", got {json.dumps(problem['input'], default=str)}" if key else ""
        raise UserError(f"{path}: {f'{key}: ' if key else ''}{message[0].lower()}{message[1:]}{value}") from None
    if c.n_embd % c.n_head:
        raise UserError(f"{path}: n_embd = {c.n_embd} is not divisible by n_head = {c.n_head}")
    if c.layer_norm_epsilon != 1e-5:
        raise UserError(f"{path}: layer_norm_epsilon: input should be 1e-05, got {c.layer_norm_epsilon}")
    if c.n_inner not in (None, 4 * c.n_embd):
        raise UserError(f"{path}: n_inner: should be 4 × n_embd = {4 * c.n_embd}, got {c.n_inner}")
    _check_vocabulary(path.parent)
    return GPT2Config(c.n_layer, c.n_head, c.n_embd, c.n_positions, c.resid_pdrop)


def read_weights(location: str) -> Weights:
    """The weights of the model in a local directory or on the hub, each read when it is asked for.

    Raises:
        UserError: no safetensors, or not the tensors that config.json asks for.
    """
    config, directory = read_config(location), _directory(location)
    found = _tensors(directory)
    if (last := f"h.{config.n_layer - 1}.ln_1.weight") not in found:  # before so many blocks are made
        raise UserError(f"{location}: no tensor transformer.{last}")
    shapes = gpt2.parameter_shapes(config)
    for name, shape in shapes.items():
        if name not in found:
            raise UserError(f"{location}: no tensor transformer.{name}")
        stored = _stored_shape(name, shape, config)
        path, key = found[name]
        with _opened(path) as file:
            view = file.get_slice(key)
            has, dtype = tuple(view.get_shape()), view.get_dtype()
        if dtype not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{path}: {key}: holds {dtype}, not floating-point numbers of 16 bits or more")
        if has != stored:
            raise UserError(f"{path}: {key}: shape {list(has)}, {CONFIG} asks for {list(stored)}")

    def stored_tensor(name: str) -> Tensor:
        path, key = found[name]
        with _opened(path) as file:
            tensor: Tensor = file.get_tensor(key)
        return tensor

    if "lm_head.weight" in found and not torch.equal(stored_tensor("lm_head.weight"), stored_tensor("wte.weight")):
        raise UserError(
            f"{location}: lm_head.weight is not transformer.wte.weight: the head has to be tied to the table"
        )

    def read(name: str) -> Tensor:
        stored = stored_tensor(name)
        value = torch.zeros(shapes[name])  # fp32; the padding rows stay zero
        value[: config.vocab_size if name == "wte.weight" else None] = stored.T if _transposed(name) else stored
        return value

    return read


def check_init(run: RunConfig, source: str) -> None:
    """Raises `UserError` where `model.init_from` cannot be read or has another shape; `source` names the run file."""
    if not run.model.init_from:
        return
    try:
        has, wants = read_config(run.model.init_from), GPT2Config.from_run(run)
        for key in ("n_layer", "n_head", "n_embd", "n_positions"):
            if getattr(has, key) != getattr(wants, key):
                all_three = "n_layer, n_head and n_embd in place of model.preset"
                advice = all_three if run.model.preset and key != "n_positions" else key
                problem = f"its {key} is {getattr(has, key)}, the run's {getattr(wants, key)}"
                raise UserError(f"{problem}: set model.{advice}")
        read_weights(run.model.init_from)
    except UserError as e:
        raise UserError(f"{source}: model.init_from = {run.model.init_from}: {e}") from None


def export(location: str, config: GPT2Config, weights: Weights, vocab_dir: str = "") -> None:
    """Write a directory that `from_pretrained` of transformers opens: model and tokenizer.

    config.json comes last: without it the directory is no model. At most one parameter is held twice.

    Raises:
        UserError: there is a model already, or nothing can be written there.
    """
    if not location:
        raise UserError("--output: empty; name a directory")
    directory = storage.location(location)
    if storage.exists(directory / "config.toml"):
        raise UserError(f"{location}: holds a run; choose another directory")
    if storage.exists(directory / CONFIG):
        raise UserError(f"{location}: holds a model already; choose another directory")
    for name in OTHERS:
        if storage.exists(directory / name):
            raise UserError(f"{location}: holds a {name}; choose another directory")
    files = tokenizer.files(vocab_dir)
    c, eot = config, tokenizer.EOT
    tokens = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    ids = {"bos_token_id": eot, "eos_token_id": eot}
    try:
        _write_weights(directory / WEIGHTS, config, weights)
        storage.publish(directory / "vocab.json", files["encoder.json"].read_bytes())
        storage.publish(directory / "merges.txt", files["vocab.bpe"].read_bytes())
        about = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": c.n_positions, "add_prefix_space": False}
        storage.publish(directory / "tokenizer_config.json", _json(about | tokens))
        storage.publish(directory / "special_tokens_map.json", _json(tokens))
        storage.publish(directory / "generation_config.json", _json(ids))
        dropout = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), c.dropout)
        shape = {key: getattr(c, key) for key in ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")}
        kind = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "dtype": "float32"}
        same = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True}
        storage.publish(directory / CONFIG, _json(kind | shape | same | dropout | ids))
    except OSError as e:
        with contextlib.suppress(OSError, storage.StorageError):  # or the next try would be refused
            storage.remove(directory / WEIGHTS)
        raise UserError(f"{location}: cannot be written: {e.strerror or e}") from None


# ---------------------------------------------------------------------- their files


def _directory(location: str) -> Path:
    """The local directory of a location; what is none is fetched from the hub, or found in its cache."""
    if "://" in location or Path(location).is_dir():
        path = storage.location(location)
        if not storage.is_local(path):
            raise UserError(f"{location}: models are imported from a local directory or the Hugging Face hub only")
        return Path(path)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", location):
        raise UserError(f"{location}: no such directory")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError(f"{location}: no such directory; for the hub: pip install huggingface_hub") from None
    try:
        return Path(snapshot_download(location, allow_patterns=[CONFIG, "*.safetensors", INDEX, *VOCABULARIES]))
    except Exception as e:  # of many kinds: no network, no such repository, no access
        reason = (str(e) or type(e).__name__).splitlines()[0]
        raise UserError(f"{location}: no such directory, and not to be had from the hub: {reason}") from None


def _tensors(directory: Path) -> dict[str, tuple[Path, str]]:
    """Our name → file and its name there; with or without the prefix `transformer.`. One file wins, as there."""
    if (directory / WEIGHTS).is_file():
        with _opened(directory / WEIGHTS) as file:
            keys = dict.fromkeys(file.keys(), WEIGHTS)
    elif (directory / INDEX).is_file():
        try:
            keys = {str(key): file for key, file in json.loads((directory / INDEX).read_bytes())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise UserError(f"{directory / INDEX}: not an index of safetensors files") from None
        if bad := [file for file in keys.values() if not re.fullmatch(r"[\w-][\w.-]*\.safetensors", str(file))]:
            raise UserError(f"{directory / INDEX}: {bad[0]!r} is not the name of a safetensors file")
    elif any(directory.glob("pytorch_model*.bin")):
        raise UserError(
            f"{directory}: pytorch_model.bin is a pickle, which can run code: not read; save the model again with "
            "transformers' save_pretrained, which writes safetensors"
        )
    else:
        raise UserError(f"{directory}: no {WEIGHTS}")
    return {key.removeprefix("transformer."): (directory / file, key) for key, file in keys.items()}


@contextlib.contextmanager
def _opened(path: Path) -> Any:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as e:
        raise UserError(f"{path}: damaged: {e}") from None
    except OSError as e:  # safetensors says "no such file" of one that may not be read
        reason = "cannot be read" if path.exists() else "no such file"
        raise UserError(f"{path}: {reason}") from e


def _check_vocabulary(directory: Path) -> None:
    """Raises `UserError` where a tokenizer lies there that gives the ids to other tokens than GPT-2's."""
    for name, place in VOCABULARIES.items():
        path = directory / name
        if not path.is_file():
            continue
        try:
            table = json.loads(path.read_bytes())
            for key in place:
                table = table[key]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}: cannot be read as a tokenizer's table") from None
        if hashlib.sha256(json.dumps(table, sort_keys=True).encode()).hexdigest() != GPT2_VOCABULARY:
            raise UserError(f"{path}: not GPT-2's vocabulary: the same ids are other tokens")


def _transposed(name: str) -> bool:
    return name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))


def _stored_shape(name: str, shape: tuple[int, ...], config: GPT2Config) -> tuple[int, ...]:
    if name == "wte.weight":
        return config.vocab_size, config.n_embd
    return shape[::-1] if _transposed(name) else shape


def _json(table: dict[str, Any]) -> bytes:
    return (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()


def _write_weights(path: UPath, config: GPT2Config, weights: Weights) -> None:
    """One safetensors file, a tensor at a time: header length, header, then the numbers in its order."""
    shapes = {name: _stored_shape(name, shape, config) for name, shape in gpt2.parameter_shapes(config).items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in sorted(shapes.items()):
        start, end = end, end + 4 * torch.Size(shape).numel()
        header[f"transformer.{name}"] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = storage.stage(path)
    try:
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in sorted(shapes):
                value = weights(name).detach()[: config.vocab_size if name == "wte.weight" else None]
                value = value.T if _transposed(name) else value
                numbers = value.contiguous().numpy().astype("<f4", copy=False)
                file.write(numbers.data)  # numpy's own way does not say that a disk is full
        storage.publish_file(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
