"""What is done with checkpoints: draw from them, take them elsewhere."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from pipelines.cli.options import (
    CheckpointArgument,
    ClipOption,
    Gpt2Option,
    JsonOption,
    MarkWeightsOption,
    StoreOption,
    TextOption,
    VaeOption,
    console,
)

group = typer.Typer()


@group.command(
    rich_help_panel="Checkpoints",
    epilog="Example: unidiffuser sample 3f9a2c --task t2i --prompt 'a large red apple on a blue background' --out out",
)
def sample(
    checkpoint: CheckpointArgument,
    task: Annotated[str, typer.Option("--task", help="t2i, i2t, joint, i, t, i2t2i, t2i2t, gibbs or interpolate.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="What the picture shows (repeatable).")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", help="Picture of any kind (repeatable).")] = None,
    steps: Annotated[int, typer.Option("--steps", min=1, max=999, help="Network calls a draw.")] = 25,
    guidance: Annotated[float, typer.Option("--guidance", min=0, max=100, help="Scale s of c + s (c - u); 0 is none.")] = 7.0,
    seed: Annotated[
        int, typer.Option("--seed", min=0, max=2**63 - 1, help="Seed of the first result; the n-th has seed + n.")
    ] = 0,
    count: Annotated[int, typer.Option("--count", min=1, max=10**6, help="Results of every input, or in all.")] = 1,
    condition_t: Annotated[
        int, typer.Option("--condition-t", help="Noise on the condition: 0 conditions fully, 1000 not at all.")
    ] = 0,
    sampler: Annotated[
        str | None,
        typer.Option(
            "--sampler",
            help="dpm++2m-sde, dpm++2m, dpm++3m, unipc, ddim, era or analytic-dpm. "
            "If not given the first, for interpolate the second.",
        ),
    ] = None,
    size: Annotated[
        int | None, typer.Option("--size", min=1, max=4096, help="Pixels a side, if not those it was trained for.")
    ] = None,
    beams: Annotated[int, typer.Option("--beams", min=1, help="Beams of the captions; 1 writes greedily.")] = 5,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Rounds of gibbs: each draws every modality once.")] = 4,
    interval: Annotated[
        tuple[int, int] | None, typer.Option("--guidance-interval", help="Guide only at timesteps from .. to.", metavar="FROM TO")
    ] = None,
    data_type: Annotated[
        int | None, typer.Option("--data-type", min=0, max=1, help="Of a model that tells types of data apart; 1 if not given.")
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Results drawn at once.")] = 16,
    mark: Annotated[
        bool, typer.Option("--mark/--no-mark", help="Put an invisible mark into pictures, which `detect` reads.")
    ] = True,
    mark_weights: MarkWeightsOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for pictures and results.jsonl.", metavar="DIR")] = None,
    device: Annotated[str, typer.Option("--device", help="auto takes CUDA where there is one.")] = "auto",
    dtype: Annotated[str, typer.Option("--dtype", help="fp32, bf16, fp16; auto: bf16 on CUDA, else fp32.")] = "auto",
    compile: Annotated[bool, typer.Option("--compile", help="Compile the network first.")] = False,
    vae: VaeOption = None,
    clip: ClipOption = None,
    text: TextOption = None,
    gpt2: Gpt2Option = None,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Draw pictures and captions from a checkpoint."""
    from infra.store import Store
    from pipelines.commands import sampling
    from pipelines.commands.checkpoints import Named

    request = sampling.Request(
        checkpoint, task, prompt or (), image or (), count, seed,
        sampling.Settings(steps, guidance, sampler, condition_t, interval, size, beams, rounds, data_type, mark), batch, device,
        dtype, compile, mark_weights,
    )  # fmt: skip
    # Progress is no result: with --json it goes to stderr.
    view = Console(stderr=True) if as_json else console
    rows = sampling.run(request, Store(store), Named(vae, clip, text, gpt2), out, view)
    if as_json:
        print("\n".join(json.dumps(row, ensure_ascii=False) for row in rows))
        return
    console.print(sampling.results_table(rows))
    if out is not None:
        console.print(f"in {out}, with their settings in {sampling.RESULTS}", soft_wrap=True)


@group.command(
    rich_help_panel="Checkpoints", epilog="Example: unidiffuser evaluate 3f9a2c --preset laptop --prompts held_out.parquet"
)
def evaluate(
    target: Annotated[str, typer.Argument(help="Recipe file, or CHECKPOINT as of `sample`.", metavar="RECIPE|CHECKPOINT")],
    prompts: Annotated[
        str | None, typer.Option("--prompts", help="Held-out captions: text, or Parquet with caption and image.", metavar="FILE")
    ] = None,
    preset: Annotated[str | None, typer.Option("--preset", help="paper, small or laptop.", metavar="NAME")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="A field of evaluate (repeatable); `unidiffuser fields evaluate` has all.", metavar="a.b=c"),
    ] = None,
    vae: VaeOption = None,
    clip: ClipOption = None,
    text: TextOption = None,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Measure a checkpoint on held-out data: FID, KID, CLIP score, BLEU-4 and more; what was drawn before is not drawn again."""
    from infra.store import Store
    from pipelines.commands import evaluation
    from pipelines.commands.checkpoints import Named

    view = Console(stderr=True) if as_json else console
    request = evaluation.Request(target, prompts, preset, settings or [])
    code, dataset = evaluation.run(request, Store(store), Named(vae, clip, text), view)
    if dataset is not None and as_json:
        print(json.dumps(evaluation.as_json(dataset), ensure_ascii=False))
    elif dataset is not None:
        console.print(evaluation.figures_table(dataset))
        console.print(f"report and sheet of samples: {dataset.where}", soft_wrap=True)
    raise typer.Exit(code)


@group.command(rich_help_panel="Checkpoints", epilog="Example: unidiffuser detect out/00000.png holiday.jpg")
def detect(
    images: Annotated[list[Path], typer.Argument(help="Pictures of any kind.", metavar="IMAGE...")],
    mark_weights: MarkWeightsOption = None,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Whether pictures have the invisible mark of `sample`, and which checkpoint it names. One without is no error."""
    from infra.store import Store
    from pipelines.commands import detection

    for row in detection.detect(images, Store(store), mark_weights):
        if as_json:
            print(json.dumps(row, ensure_ascii=False))
        else:
            console.print(detection.words(row), soft_wrap=True, highlight=False, markup=False)


@group.command(rich_help_panel="Checkpoints", epilog="Example: unidiffuser compare demo/train-256 demo/train-512")
def compare(
    a: Annotated[str, typer.Argument(help="Recipe, RECIPE/NODE, DATASET, or folder with a checkpoint.", metavar="A")],
    b: Annotated[str, typer.Argument(help="What it is compared with, likewise.", metavar="B")],
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Draw this (repeatable); else captions of the data.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=0, max=16, help="Samples of each task; 0 draws none.")] = 4,
    steps: Annotated[int, typer.Option("--steps", min=1, max=999, help="Network calls a draw.")] = 25,
    guidance: Annotated[float, typer.Option("--guidance", min=0, max=100, help="Scale s of c + s (c - u); 0 is none.")] = 5.0,
    seed: Annotated[int, typer.Option("--seed", min=0, max=2**62, help="Seed of the first sample of both.")] = 0,
    out: Annotated[
        Path | None, typer.Option("--out", help="HTML file; by default one in the store's folder.", metavar="FILE")
    ] = None,
    vae: VaeOption = None,
    clip: ClipOption = None,
    text: TextOption = None,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """What differs between two runs or checkpoints, as one HTML file and a page in the Prefect UI where one is up."""
    from infra.store import Store
    from pipelines.commands import comparing
    from pipelines.commands.checkpoints import Named
    from pipelines.commands.paired_samples import Wanted

    view = Console(stderr=True) if as_json else console
    wanted = Wanted(prompt or (), count, steps, guidance, seed)
    facts = comparing.run(a, b, Store(store), wanted, Named(vae, clip, text), out, view)
    if as_json:
        print(json.dumps(facts, indent=1))


@group.command(rich_help_panel="Checkpoints", epilog="Example: unidiffuser convert runs/export/3f9a2c my-pipeline --to diffusers")
def convert(
    source: Annotated[str, typer.Argument(help="CHECKPOINT as of `sample`, or a lone U-ViT: a folder or .pth.", metavar="SRC")],
    target: Annotated[Path, typer.Argument(help="Folder, or .pth file for a lone official U-ViT.", metavar="DST")],
    to: Annotated[str, typer.Option("--to", help="native, official or diffusers.", metavar="LAYOUT")],
    heads: Annotated[int | None, typer.Option("--heads", min=1, help="Heads of a lone file, if not width / 64.")] = None,
    vae: VaeOption = None,
    clip: ClipOption = None,
    text: TextOption = None,
    gpt2: Gpt2Option = None,
    as_json: JsonOption = False,
    store: StoreOption = "runs",
) -> None:
    """Write a checkpoint in another layout: ours, that of the official files, or a pipeline of diffusers."""
    from infra.store import Store
    from pipelines.commands import checkpoints

    view = Console(stderr=True) if as_json else console
    with view.status(f"converting {source}"):
        untold = checkpoints.convert(source, target, to, Store(store), checkpoints.Named(vae, clip, text, gpt2), heads)
    if as_json:
        print(json.dumps({"layout": to, "target": str(target.resolve()), "heads_to_give": untold}))
        return
    if untold is not None:
        words = f"official files do not tell the number of attention heads: give --heads {untold} to convert {target} back"
        console.print(words, soft_wrap=True, highlight=False, markup=False)
    console.print(f"{to}: {target}", soft_wrap=True)
