"""Where weights come from: ``provenance.json`` beside them, and a model card (README.md) whose header model hubs read.

Both stand in the root of a whole set, in every layout, and go along when it is converted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from unidiffuser.tensors import read_settings

PROVENANCE, CARD = "provenance.json", "README.md"
# What a sample carries of the provenance; the rest is as long as the lineage.
IDENTITY = ("recipe", "node", "stage", "fingerprint", "step", "weights", "export", "commit", "made_from")
WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
# Cards that have this line are ours, and are written anew for another layout; others are left as they are.
OURS = "A [UniDiffuser](https://arxiv.org/abs/2303.06555): one network that draws pictures, captions, and either from the other."
LOADING = {
    "native": '```python\nimport unidiffuser\n\nmodel = unidiffuser.UniDiffuser.load("THIS FOLDER")\n'
    'model.generate("t2i", "a large red apple")[0].image.save("apple.png")\n```',
    "official": "These are files of the published names; the CLIP towers and GPT-2's tokenizer are not among them. Name what it "
    "was trained with:\n\n```bash\nunidiffuser sample THIS_FOLDER --task t --clip NAME --text NAME --gpt2 NAME --vae NAME\n```",
    "diffusers": "```python\nfrom diffusers import UniDiffuserPipeline\n\n"
    'pipeline = UniDiffuserPipeline.from_pretrained("THIS FOLDER")\n'
    'pipeline(prompt="a large red apple").images[0].save("apple.png")\n```',
}


def identity(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What of a provenance names the checkpoint: a few fields, with the full fingerprints of what it was made from."""
    return {name: provenance[name] for name in IDENTITY if provenance.get(name) is not None}


def weights_digests(source: Path) -> dict[str, str]:
    """SHA-256, as hex, of each file of weights of a set by its path there; of layouts that lie inside, none."""
    inside, found = [source / layout for layout in LOADING], {}
    for path in sorted(path for path in source.rglob("*") if path.suffix in WEIGHTS):
        if not any(path.is_relative_to(folder) for folder in inside):
            with path.open("rb") as file:
                found[path.relative_to(source).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def weights_sha256(source: Path) -> str:
    """SHA-256 over the names and contents of the files of weights of a set, as hex; of layouts that lie inside, none."""
    digest = hashlib.sha256()
    for name, own in weights_digests(source).items():
        digest.update(name.encode() + b"\0" + bytes.fromhex(own))
    return digest.hexdigest()


def write_provenance(folder: Path, provenance: Mapping[str, Any]) -> None:
    """Write provenance.json, and the card of a native set."""
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    (folder / CARD).write_text(card(provenance, "native"), encoding="utf-8")


def carry(source: Path, target: Path, layout: str) -> None:
    """Give the set ``target`` the provenance of ``source``, and its card: written for this layout, or as it is if not ours.

    What a person has put into the header of a card of ours stays.

    Raises:
        WeightsError: provenance.json is damaged.
    """
    told = read_settings(source / PROVENANCE) if (source / PROVENANCE).is_file() else {}
    before = (source / CARD).read_text(encoding="utf-8", errors="replace") if (source / CARD).is_file() else ""
    if told and source != target:
        shutil.copyfile(source / PROVENANCE, target / PROVENANCE)
    ours = not before or OURS in before
    (target / CARD).write_text(card(told, layout, _header(before)) if ours else before, encoding="utf-8")


def card(provenance: Mapping[str, Any], layout: str, header: Mapping[str, Any] | None = None) -> str:
    """The model card of a set in a layout; what ``header`` holds already is kept, but for how the set is loaded."""
    title = " ".join(str(provenance[name]) for name in ("recipe", "node") if provenance.get(name)) or "UniDiffuser"
    known = {
        "license": "other",
        "license_name": "chosen-by-who-publishes",
        "pipeline_tag": "text-to-image",
        "tags": ["unidiffuser", "text-to-image", "image-to-text"],
        "datasets": [each["node"].removesuffix(f"-{each['stage']}") for each in _sources(provenance)],
        "model-index": _index(provenance, title),
    }
    head = known | dict(header or {}) | {"library_name": "diffusers" if layout == "diffusers" else "unidiffuser"}
    told = _told(provenance) if provenance else "Where these weights come from is not recorded."
    text = yaml.safe_dump({name: value for name, value in head.items() if value}, sort_keys=False, allow_unicode=True)
    return f"---\n{text}---\n\n# {title}\n\n{OURS}\n\n## How to load it\n\n{LOADING[layout]}\n\n{told}\n"


def _header(text: str) -> dict[str, Any]:
    """The YAML header of a card; empty where there is none that can be read."""
    _, begin, rest = text.partition("---\n")
    header, end, _ = rest.partition("\n---\n")
    try:
        found = yaml.safe_load(header) if begin and end else None
    except yaml.YAMLError:
        return {}
    return found if isinstance(found, dict) else {}


def _sources(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The datasets that were made from nothing else."""
    return [each for each in provenance.get("datasets", ()) if each.get("node") and not each["made_from"]]


def _told(provenance: Mapping[str, Any]) -> str:
    named = [f"- {name.replace('_', ' ')}: `{value}`" for name, value in identity(provenance).items() if name != "made_from"]
    rows = [
        f"| {each.get('node', each['stage'])} | `{each['fingerprint']}` | {_counted(each)} |"
        for each in provenance.get("datasets", ())
    ]
    settings = json.dumps(provenance.get("config", {}), indent=2, sort_keys=True)
    table = ["| dataset | fingerprint | rows in | rows out | dropped |", "|---|---|---|---|---|", *rows]
    trained = [*named, "", f"`{PROVENANCE}` holds all of this for programs. The configuration:", "", f"```json\n{settings}\n```"]
    worth = ["## What it is worth", "", *_worth(provenance), ""] if "evaluation" in provenance else []
    return "\n".join([*worth, "## What it was trained on", "", *table, "", "## How it was trained", "", *trained])


def _worth(provenance: Mapping[str, Any]) -> list[str]:
    """The figures of the evaluation as a table, with what is told beside each."""
    evaluation = provenance["evaluation"]
    lines = [f"As the evaluation `{evaluation['fingerprint']}` found:", "", "| figure | value | beside |", "|---|---|---|"]
    for figure in evaluation["figures"]:
        beside = [f"{name} {value}" for name, value in figure.items() if name not in ("name", "value", "note")]
        told = ", ".join([*beside, *([figure["note"]] if "note" in figure else [])])
        lines.append(f"| {figure['name'].replace('_', ' ')} | {figure['value']:.6g} | {told} |")
    return lines


def _index(provenance: Mapping[str, Any], title: str) -> list[dict[str, Any]]:
    """The same figures as model hubs read them; nothing where nothing was evaluated."""
    if not provenance.get("evaluation", {}).get("figures"):
        return []
    evaluation = provenance["evaluation"]
    held_out = {"type": "held-out", "name": f"held-out data of evaluation {evaluation['fingerprint'][:12]}"}
    tasks: dict[str, list[dict[str, Any]]] = {"text-to-image": [], "image-to-text": []}
    for figure in evaluation["figures"]:
        task = "image-to-text" if "i2t" in figure["name"] or figure.get("measure") == "captions" else "text-to-image"
        tasks[task].append({"type": figure["name"].replace(" ", "_"), "value": figure["value"]})
    # A copy each: YAML writes of one object twice an anchor.
    results = [
        {"task": {"type": task}, "dataset": dict(held_out), "metrics": metrics} for task, metrics in tasks.items() if metrics
    ]
    return [{"name": title, "results": results}]


def _counted(dataset: Mapping[str, Any]) -> str:
    if "rows_in" not in dataset:
        return "removed | | "
    dropped = ", ".join(f"{rows:,} {reason}" for reason, rows in sorted(dataset["dropped"].items(), key=lambda one: -one[1]))
    return f"{dataset['rows_in']:,} | {dataset['rows_out']:,} | {dropped}"
