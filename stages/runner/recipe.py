"""Recipes: YAML that names subsets and training stages, checked field by field before anything starts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from infra.nearest import nearest
from infra.queries import opened, without_query
from infra.text import TextError, text_of
from stages.catalog import FOLDER_STAGES, LATENT_STAGES, MADE_STAGES, STAGES, SUBSET_STAGES, stage_class
from stages.runner.deployment import Deploy
from stages.runner.document import DocumentError, parse

NAME = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# The name of those recipes below `configs/` that are there to be copied.
TEMPLATE = "change-me"
# How a dataset is written where a training may also be named by its node or its folder.
DATASET = re.compile(r"(train/)?[0-9a-f]{8,24}")
CREDENTIALS = re.compile(r"://\S*@")


class RecipeError(Exception):
    """A recipe that cannot be used; one line with the path of the field and what is expected."""


@dataclass(frozen=True)
class Node:
    """A stage in a recipe, written at `place` there. `inputs` maps the stage's input names to nodes; several of a kind are
    `data.SUBSET`. With `forks_itself` it begins from a step that the same node of the same recipe has reached."""

    name: str
    stage: str
    config: BaseModel
    place: str
    inputs: dict[str, str] = field(default_factory=dict)
    forks_itself: bool = False


class Encoders(BaseModel):
    """The encoders that the stages share: `embedded`, a local folder, or a public model name."""

    model_config = ConfigDict(extra="forbid")

    vae: str = Field("embedded", description="AutoencoderKL that makes image latents")
    clip: str = Field("embedded", description="open_clip model for image embeddings and caption similarity")
    text: str = Field("embedded", description="open_clip model whose text tower gives the caption's hidden states")
    gpt2: str = Field("embedded", description="GPT-2 that the text decoder starts from")


class Document(BaseModel):
    """The outer shape of a recipe file; the stages' own fields are checked by their own models."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    name: str = Field(description="lower case, digits and hyphens; deployments and runs are called by it")
    description: str = Field("", description="one line for people")
    encoders: Encoders = Field(default_factory=lambda: Encoders.model_validate({}), description="what all stages share")
    subsets: dict[str, dict[str, Any]] = Field(
        description="SUBSET -> its stages: select, download or folder, then filter and encode; or world"
    )
    machines: dict[str, str] = Field(
        default_factory=dict, description="stage or node -> custom resource of Ray whose machines do its work"
    )
    text_codec: dict[str, Any] | None = Field(
        None, alias="text-codec", description="the text decoder; needed where text is encoded"
    )
    train: dict[str, dict[str, Any]] = Field(default_factory=dict, description="NAME -> a training, in the order of their `from`")
    evaluate: dict[str, Any] | None = Field(None, description="measures and draws the last training's checkpoint")
    export: dict[str, Any] | None = Field(None, description="a folder that samples without the rest")
    deploy: Deploy = Field(default_factory=lambda: Deploy.model_validate({}), description="schedules, triggers, where it runs")
    folder: str | None = Field(None, description="where relative paths start, instead of the folder that the file lies in")


@dataclass(frozen=True)
class Recipe:
    """A checked recipe: its nodes in an order in which they can run, the document that it was read from, and the file of that, by
    its absolute path or URL, where there is one."""

    name: str
    description: str
    nodes: dict[str, Node]
    document: dict[str, Any]
    folder: Path
    deploy: Deploy
    file: str = ""

    def check_named(self) -> None:
        """A copy of a template is given a name before it leaves a trace anywhere: datasets and deployments are told apart by it.

        Raises:
            RecipeError: it has the template's name.
        """
        if self.name == TEMPLATE:
            raise RecipeError(f"name: {TEMPLATE} is the template's; give the recipe a name of its own, such as my-pictures")

    def select(self, wanted: str) -> list[str]:
        """The nodes that a node name or a bare stage name means.

        Raises:
            RecipeError: there is no such node.
        """
        names = [n.name for n in self.nodes.values() if wanted in (n.name, n.stage)]
        if not names:
            raise RecipeError(f"{wanted}: the recipe {self.name} has no such node{nearest(wanted, self.nodes)}")
        return names


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file, given by path or fsspec URL; `overrides` are ``a.b=c`` with YAML values, the last one wins.

    Relative paths in the recipe are taken from its `folder`, by default the one that the file lies in.

    Raises:
        RecipeError: the file is missing or not YAML, has a key twice, or a field is unknown, of the wrong type or out of bounds.
    """
    path = without_query(str(path))
    try:
        with opened(path) as file:
            document = parse(text_of(file.read()))
    except FileNotFoundError:
        beside = (file.name for file in Path(path).parent.glob("*.y*ml"))
        raise RecipeError(f"{path}: no such recipe file{nearest(Path(path).name, beside)}") from None
    except TextError as error:
        raise RecipeError(f"{path}: {error}") from None
    except DocumentError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if not isinstance(document, dict):
        raise RecipeError(f"{path}: expected a mapping with `name` and `subsets`")
    for override in overrides:
        _override(document, override)
    file = path if "://" in path else os.path.abspath(path)
    return replace(parse_recipe(document, Path(path).parent), file=file)


def _override(document: dict[str, Any], override: str) -> None:
    dotted, separator, value = override.partition("=")
    if not separator:
        raise RecipeError(f"--set {override}: expected a.b=value")
    *parents, last = dotted.split(".")
    place = document
    for key in parents:
        place = place.setdefault(key, {})
        if not isinstance(place, dict):
            raise RecipeError(f"--set {override}: {key} is not a mapping")
    try:
        place[last] = parse(value)
    except DocumentError as error:
        raise RecipeError(f"--set {override}: the value is not YAML: {error}") from None


def parse_recipe(document: dict[str, Any], folder: Path) -> Recipe:
    """Check a recipe document; relative paths in it are taken from its `folder`, or from the argument when it names none.

    Raises:
        RecipeError: as `load_recipe`.
    """
    try:
        outer = Document.model_validate(document)
    except ValidationError as error:
        raise RecipeError(explain(error, "")) from None
    _check_name(outer.name, "name")
    folder = (folder / (outer.folder or "")).resolve()
    build = _Builder(outer, folder)
    for subset, stages in outer.subsets.items():
        build.subset(subset, stages)
    build.codec_and_training()
    build.check_machines()
    return Recipe(outer.name, outer.description, build.ordered(), document, folder, outer.deploy)


def lone_node(stage: str, values: Mapping[str, Any], overrides: Sequence[str], folder: Path) -> Node:
    """A node of a stage that no recipe has: its fields, over which `overrides` go as ``a.b=c``.

    Raises:
        RecipeError: a field is unknown, of the wrong type or out of bounds.
    """
    document: dict[str, Any] = {stage: dict(values)}
    for override in overrides:
        _override(document, f"{stage}.{override}")
    build = _Builder(Document(name=stage, subsets={}), folder.resolve())
    return build.nodes[build.add(stage, stage, document[stage], stage, {})]


class _Builder:
    """Turns the document into nodes; keeps the order of the file except where an input must come first."""

    def __init__(self, document: Document, folder: Path):
        self.document = document
        self.folder = folder
        self.nodes: dict[str, Node] = {}

    def subset(self, subset: str, stages: dict[str, Any]) -> None:
        place = f"subsets.{subset}"
        _check_name(subset, place)
        if not isinstance(stages, dict):
            raise RecipeError(f"{place}: expected a mapping of stages")
        before = stages.get("from")
        if before is not None and before not in self.nodes:
            raise RecipeError(f"{place}.from: no node {before} before it; expected one of {', '.join(self.nodes) or 'none'}")
        if before is not None and "folder" in stages:
            raise RecipeError(f"{place}.from: a folder has nothing before it; remove `from` or `folder`")
        own = "folder" in stages or (before is not None and self.nodes[before].stage == "folder")
        made = next((stage for stage in MADE_STAGES if stage in stages), None)
        chain = (made,) if made else FOLDER_STAGES if own else SUBSET_STAGES
        if unknown := [key for key in stages if key not in (*chain, "from")]:
            raise RecipeError(f"{place}.{unknown[0]}: unknown; expected {', '.join(chain)} or from")
        if before is not None and made:
            raise RecipeError(f"{place}.from: {made} has nothing before it; remove `from` or `{made}`")
        start = 0 if before is None else chain.index(self.nodes[before].stage) + 1
        if early := [stage for stage in chain[:start] if stage in stages]:
            raise RecipeError(f"{place}.{early[0]}: {before} already stands after it; remove it or `from`")
        for position, stage in enumerate(chain):
            if stage not in stages:
                # Without an encode a subset can still feed others or be inspected; a gap in the middle is a mistake.
                if start <= position and any(later in stages for later in chain[position + 1 :]):
                    raise RecipeError(f"{place}.{stage}: missing; every stage up to the last is needed (write `{stage}: {{}}`)")
                continue
            inputs = {} if before is None else {"rows": before}
            if stage == "encode":
                inputs["codec"] = "text-codec"
            self.add(f"{subset}-{stage}", stage, stages[stage], f"{place}.{stage}", inputs)
            before = f"{subset}-{stage}"

    def codec_and_training(self) -> None:
        document = self.document
        encodes = any(node.stage == "encode" for node in self.nodes.values())
        if encodes and document.text_codec is None:
            raise RecipeError("text-codec: missing; encode needs it (write `text-codec: {captions: SUBSET}`)")
        if document.text_codec is not None:
            values = dict(document.text_codec)
            subset = values.pop("captions", None)
            node = next((n for n in (f"{subset}-select", f"{subset}-folder") if n in self.nodes), None)
            if node is None:
                raise RecipeError(f"text-codec.captions: expected a subset that has a select or a folder, got {subset!r}")
            self.add("text-codec", "text-codec", values, "text-codec", {"captions": node})
        last = None
        for name, given in document.train.items():
            last = self.training(name, dict(given or {}))
        for stage in ("evaluate", "export"):
            values = getattr(document, stage)
            if values is None:
                continue
            if last is None:
                raise RecipeError(f"{stage}: needs a training stage; add one below `train`")
            inputs = {"checkpoint": last, "codec": self.codec(stage, last)}
            if stage == "evaluate":
                inputs |= {f"history.{n.name}": n.name for n in self.nodes.values() if n.stage == "train"}
                inputs |= self.held_out(values.get("data"))
            elif "evaluate" in self.nodes:
                inputs["evaluation"] = "evaluate"
            self.add(stage, stage, values, stage, inputs)

    def check_machines(self) -> None:
        known = {*self.nodes, *(node.stage for node in self.nodes.values())}
        for name in self.document.machines:
            if name not in known:
                raise RecipeError(f"machines.{name}: no such stage or node{nearest(name, known)}")

    def held_out(self, data: Any) -> dict[str, str]:
        """The rows of a subset that a checkpoint is measured on: those of its filter."""
        if data is None or "/" in str(data):
            return {}
        if (node := f"{data}-filter") not in self.nodes:
            subsets = [name.removesuffix("-filter") for name, node in self.nodes.items() if node.stage == "filter"]
            known = f"expected one that has a filter, or a dataset as filter/FINGERPRINT{nearest(str(data), subsets)}"
            raise RecipeError(f"evaluate.data: no subset {data}; {known}")
        return {"held-out": node}

    def codec(self, stage: str, training: str) -> str:
        """The node whose codec a checkpoint is drawn with: that of the data's own world, or the text codec."""
        data = (self.nodes[node] for name, node in self.nodes[training].inputs.items() if name.startswith("data."))
        made = next((node for node in data if node.stage in MADE_STAGES), None)
        if made is None:
            return "text-codec"
        if stage == "evaluate":
            return made.name
        raise RecipeError(f"{stage}: {made.name} has no text codec; leave it out")

    def training(self, name: str, values: dict[str, Any]) -> str:
        place = f"train.{name}"
        _check_name(str(name), place)
        data, before = values.pop("data", None), values.pop("from", None)
        if isinstance(data, dict):
            values["data"] = {key: value for key, value in data.items() if key != "subsets"}
            data = data.get("subsets")
        if not isinstance(data, list) or not data:
            raise RecipeError(f"{place}.data: expected a list of subsets, or {{subsets: [...], where: [...]}}; got {data!r}")
        if twice := [subset for subset in data if data.count(subset) > 1]:
            raise RecipeError(f"{place}.data: the subset {twice[0]} is there twice; its rows count once, so name it once")
        _check_weights(f"{place}.data.weights", data, (values.get("data") or {}).get("weights"))
        inputs = {}
        for subset in data:
            latents = next((node for stage in LATENT_STAGES if (node := f"{subset}-{stage}") in self.nodes), None)
            if latents is None:
                raise RecipeError(f"{place}.data: the subset {subset} has no encode")
            inputs[f"data.{subset}"] = latents
            if self.nodes[latents].stage in MADE_STAGES and (values.get("preview") or {}).get("count"):
                raise RecipeError(f"{place}.preview: {latents} has no text codec to draw with; remove it")
        node = f"train-{name}"
        if before is not None:
            values["from"] = before = self.origin(node, f"{place}.from", before)
            if values.get("weights") is not None and before["run"] != node:
                raise RecipeError(f"{place}.weights: it starts from {before['run']} already; leave out one of the two")
            if before["run"] in self.nodes:
                inputs["init"] = before["run"]
        return self.add(node, "train", values, place, inputs, bool(before) and before["run"] == node)

    def origin(self, node: str, place: str, value: Any) -> dict[str, Any]:
        """What a training begins from, with its `run` as the name of a node, a dataset, or the address of a folder."""
        value = dict(value) if isinstance(value, dict) else {"run": value}
        run = str(value.get("run"))
        names = [name for name in (run, f"train-{run}") if name == node or getattr(self.nodes.get(name), "stage", "") == "train"]
        if names:
            value["run"] = names[0]
        elif "/" in run and not DATASET.fullmatch(run):
            value["run"] = self.absolute(run)
        elif not DATASET.fullmatch(run):
            trainings = [name for name, before in self.nodes.items() if before.stage == "train"]
            raise RecipeError(f"{place}: no training stage {run} before it, nor a dataset or a folder{nearest(run, trainings)}")
        return value

    def add(self, name: str, stage: str, values: Any, place: str, inputs: dict[str, str], forks_itself: bool = False) -> str:
        model = stage_class(stage).Config
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise RecipeError(f"{place}: expected a mapping of fields, got {values!r}")
        shared = self.document.encoders.model_dump()
        values = {key: shared[key] for key in model.model_fields if key in shared} | values
        if (kind := self.document.machines.get(name, self.document.machines.get(stage))) is not None:
            values = {"machines": kind} | values
        try:
            config = model.model_validate(self.with_paths(model, values))
        except ValidationError as error:
            raise RecipeError(explain(error, place)) from None
        if name in self.nodes:
            raise RecipeError(f"{place}: there is a node {name} already")
        self.nodes[name] = Node(name, stage, config, place, inputs, forks_itself)
        return name

    def with_paths(self, model: type[BaseModel], values: dict[str, Any]) -> dict[str, Any]:
        """Make relative paths absolute, so that a recipe means the same wherever it is run from."""
        resolved = dict(values)
        for name, info in model.model_fields.items():
            extra = info.json_schema_extra
            kind = extra.get("path") if isinstance(extra, dict) else None
            if kind and name in values:
                value = values[name]
                resolved[name] = [self.absolute(v) for v in value] if isinstance(value, list) else self.absolute(value)
            elif isinstance(values.get(name), dict) and (inner := _nested_model(info.annotation)):
                resolved[name] = self.with_paths(inner, values[name])
        return resolved

    def absolute(self, value: Any) -> Any:
        """Encoder references are left alone unless they look like a path: a public model name may hold a slash."""
        if not isinstance(value, str) or os.path.isabs(value):
            return value
        if "://" in value:
            return without_query(value)
        return str((self.folder / value).resolve())

    def ordered(self) -> dict[str, Node]:
        done: dict[str, Node] = {}

        def visit(name: str) -> None:
            if name not in done:
                for before in self.nodes[name].inputs.values():
                    visit(before)
                done[name] = self.nodes[name]

        for name in self.nodes:
            visit(name)
        return done


def _check_weights(place: str, subsets: Sequence[str], weights: Any) -> None:
    """Every subset has a share, where any has one; what a share may be, the stage checks."""
    if isinstance(weights, dict) and (odd := sorted({*weights} ^ {*subsets})):
        what = "has no share" if odd[0] in subsets else f"is not in data.subsets ({', '.join(subsets)})"
        raise RecipeError(f"{place}: {odd[0]} {what}; give every subset one, and no other")


def _nested_model(annotation: Any) -> type[BaseModel] | None:
    """The model of a field that holds one, also where it may be null."""
    kinds = (annotation, *get_args(annotation))
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), None)


def external_file(default: Any, description: str, **bounds: Any) -> Any:
    """A config field that holds a path, glob or URL (or a list): it counts by the content it leads to, not by its name."""
    return Field(default, description=description, json_schema_extra={"operational": True, "path": True}, **bounds)


def encoder(default: str | None, description: str) -> Any:
    """A config field that names encoder weights: it counts by their digest."""
    return Field(default, description=description, json_schema_extra={"operational": True})


def _check_name(name: str, place: str) -> None:
    if not NAME.fullmatch(str(name)) or name in STAGES:
        raise RecipeError(f"{place}: {name!r} is no name; expected lower-case letters, digits and hyphens, and no stage's name")


def explain(error: ValidationError, place: str) -> str:
    """The first problem as ``path: what is expected (got value)``; the number of further ones behind it."""
    problems = error.errors(include_url=False)
    first = problems[0]
    # A choice by `kind` puts the kind into the path, where a recipe has no such key.
    path = ".".join(str(part) for part in (place, *first["loc"]) if str(part) != "" and not str(part).startswith("kind="))
    message = (first["msg"][0].lower() + first["msg"][1:]).removeprefix("value error, ")
    if first["type"] == "extra_forbidden":
        message = "unknown field"
    # A whole section, of which several fields do not go together, would bury the line.
    elif first["type"] != "missing" and not (first["type"] == "value_error" and isinstance(first["input"], dict)):
        message += f" (got {first['input']!r})"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    # A URL may hold a password.
    return CREDENTIALS.sub("://...@", f"{path}: {message}{more}")
