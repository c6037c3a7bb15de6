"""`unidiffuser sample`: pictures and captions from a checkpoint, as files and as a table."""

from __future__ import annotations

import io
import json
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from math import ceil
from os import SEEK_END
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from infra.store import Store
from pipelines.commands.bounds import check_out, check_size, memory_said
from pipelines.commands.checkpoints import Misuse, Named, opened, quiet_libraries, said_in_a_line
from pipelines.commands.terminal import ReportTable
from stages.runner.contract import StageError

if TYPE_CHECKING:
    from unidiffuser.watermarks import Watermark

RESULTS = "results.jsonl"
# Without a terminal, a line of progress in this many seconds.
PLAIN_EVERY = 10.0


@dataclass(frozen=True)
class Settings:
    """How to draw; goes into every result and every picture. Fields as in `UniDiffuser.generate`."""

    steps: int = 25
    guidance: float = 7.0
    sampler: str | None = None
    condition_t: int = 0
    guidance_interval: tuple[int, int] | None = None
    size: int | None = None
    beams: int = 5
    rounds: int = 4
    data_type: int | None = None
    mark: bool = True


@dataclass(frozen=True)
class Request:
    """What to draw: `count` results of every prompt or picture, with the seeds from `seed` on."""

    checkpoint: str
    task: str
    prompts: Sequence[str] = ()
    images: Sequence[Path] = ()
    count: int = 1
    seed: int = 0
    settings: Settings = Settings()
    batch: int = 16
    device: str = "auto"
    dtype: str = "auto"
    compile: bool = False
    mark_weights: Path | None = None

    @property
    def sources(self) -> list[str]:
        """The prompt, or the path of the picture, of every result; empty for a task that takes neither."""
        inputs = [*self.prompts, *map(str, self.images)]
        if self.task == "interpolate":
            return [" to ".join(inputs)] * self.count
        return [source for source in inputs or [""] for _ in range(self.count)]

    @property
    def chunks(self) -> list[range]:
        """Results that are drawn together; the frames of an interpolation all are."""
        results = len(self.sources)
        size = results if self.task == "interpolate" else self.batch
        return [range(first, min(first + size, results)) for first in range(0, results, size)]


def run(request: Request, store: Store, named: Named, out: Path | None, console: Console) -> list[dict[str, Any]]:
    """Draw what the request asks for and write it below `out`; returns a row a result, as in results.jsonl.

    Raises:
        Misuse: the request means nothing: an unknown task, a prompt or a picture that is missing, no checkpoint, ...
        StageError: the checkpoint is damaged, a public encoder cannot be fetched, a network overflows, or memory is not enough.
    """
    from unidiffuser.generation import DRAWS_IMAGES, UniDiffuser, check_request
    from unidiffuser.sampling import default_sampler
    from unidiffuser.tensors import NotFinite

    quiet_libraries()
    images = [read_image(path) for path in request.images]
    settings = replace(request.settings, sampler=request.settings.sampler or default_sampler(request.task))
    # What is written beside a result names its sampler.
    request = replace(request, settings=settings)
    try:
        check_request(
            request.task, request.prompts, images, settings.sampler, settings.condition_t, settings.guidance_interval,
            settings.guidance, settings.steps, seeds=(request.seed, request.seed + len(request.sources) - 1),
        )  # fmt: skip
    except ValueError as error:
        raise Misuse(str(error)) from None
    check_size(settings.size)
    if out is not None:
        check_out(out)
    if out is None and request.task in DRAWS_IMAGES:
        raise Misuse(f"{request.task} draws pictures: say where they go with --out DIR")
    device, dtype = _hardware(request)
    watermark = by_weights(request.mark_weights, device) if request.mark_weights is not None else None
    loading = memory_said(request, drawing=False)
    with said_in_a_line(), loading, console.status("loading the model"), opened(request.checkpoint, store, named) as folder:
        model = UniDiffuser.load(folder, device, dtype)
        lineage = _lineage(Path(request.checkpoint), model.provenance)
        model.watermark = watermark or model.watermark
    if request.compile:
        try:
            model.compile()
        except RuntimeError as error:
            raise Misuse(f"--compile: {error}") from None
    writer = Writer(request, out, lineage)
    with _cuts_said(console), _Bar(request, console) as bar:
        for rows in request.chunks:
            try:
                with memory_said(request, drawing=True):
                    drawn = model.generate(
                        request.task, seeds=[request.seed + row for row in rows], batch=request.batch, callback=bar.stepped,
                        **_inputs(request, images, rows), **asdict(settings),
                    )  # fmt: skip
            except ValueError as error:
                raise Misuse(str(error)) from None
            except NotFinite as error:
                raise StageError(str(error)) from None
            for row, result in zip(rows, drawn, strict=True):
                writer.add(row, result)
            bar.chunk_done()
    return writer.rows


def _lineage(checkpoint: Path, provenance: Mapping[str, Any]) -> dict[str, Any]:
    """What of a checkpoint goes into every sample: its identity, and of a folder of files the digest of its weights as well."""
    from unidiffuser.layouts import set_layout
    from unidiffuser.provenance import identity, weights_sha256

    files = {"sha256": weights_sha256(checkpoint)} if set_layout(checkpoint) is not None else {}
    return identity(provenance) | files


def read_image(path: Path, argument: str = "--image ") -> Any:
    """The picture in a file as training sees it: upright, RGB.

    Raises:
        Misuse: there is no such file, or it is no picture, or a damaged one.
    """
    from unidiffuser.images import PictureError, open_picture

    try:
        return open_picture(path)
    except FileNotFoundError:
        raise Misuse(f"{argument}{path}: no such file") from None
    except PictureError as reason:
        raise Misuse(f"{argument}{path}: not a picture that can be read ({reason})") from None
    except OSError as error:
        raise Misuse(f"{argument}{path}: cannot be read ({error.strerror})") from None


def by_weights(folder: Path, device: str) -> Watermark:
    """The watermark by the weights in a folder.

    Raises:
        Misuse: a file is missing, or the package that reads them.
    """
    from unidiffuser.watermarks.trustmark import TrustMark

    try:
        return TrustMark(folder, device)
    except FileNotFoundError as error:
        raise Misuse(f"--mark-weights {error}") from None


def _hardware(request: Request) -> tuple[str, Any]:
    import torch

    device = ("cuda" if torch.cuda.is_available() else "cpu") if request.device == "auto" else request.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Misuse(f"--device {device}: not usable here ({str(error).splitlines()[0]})") from None
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    types["auto"] = torch.bfloat16 if device.startswith("cuda") else torch.float32
    if request.dtype not in types:
        raise Misuse(f"--dtype {request.dtype}: expected {', '.join(types)}")
    return device, types[request.dtype]


def _inputs(request: Request, images: Sequence[Any], rows: range) -> dict[str, Any]:
    """The prompts or pictures of some results, one each; both ends of an interpolation; or how many results to draw."""
    if request.task == "interpolate":
        return {"images": images, "count": len(rows)}
    if request.prompts:
        return {"prompts": [request.prompts[row // request.count] for row in rows]}
    return {"images": [images[row // request.count] for row in rows]} if images else {"count": len(rows)}


class Writer:
    """Pictures as PNG with what they were made from in their text fields, and a line a result in results.jsonl.

    Files are numbered on from those that are there or were, and a number that another command takes meanwhile is left to it:
    nothing is written over.
    """

    def __init__(self, request: Request, out: Path | None, lineage: Mapping[str, Any] | None = None):
        self.request, self.out, self.lineage, self.rows = request, out, lineage or {}, list[dict[str, Any]]()
        self.sources = request.sources
        self.number = 0 if out is None else _first_free(out)

    def add(self, row: int, result: Any) -> None:
        request, source = self.request, self.sources[row]
        kind = "prompt" if request.prompts else "source"
        facts = {
            "file": None,
            "task": request.task,
            **({kind: source} if source else {}),
            "caption": result.caption,
            "seed": result.seed,
            **asdict(request.settings),
            "mark": result.mark,
            "size": result.image.width if result.image is not None else None,
            "checkpoint": request.checkpoint,
            "lineage": self.lineage,
        }
        self.rows.append(facts)
        if self.out is None:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if result.image is not None:
            facts["file"] = self._write_new(self.out, result.image, facts)
        _append_line(self.out / RESULTS, json.dumps(facts, ensure_ascii=False))

    def _write_new(self, out: Path, image: Any, facts: dict[str, Any]) -> str:
        """Write a picture as the next file that is not there; returns its name."""
        picture = io.BytesIO()
        image.save(picture, format="PNG", pnginfo=_text_fields(facts))
        while True:
            name = f"{self.number:05d}.png"
            self.number += 1
            try:
                with (out / name).open("xb") as file:
                    file.write(picture.getvalue())
                return name
            except FileExistsError:
                continue


def _first_free(out: Path) -> int:
    """The number behind those of all pictures that lie in a folder, or that its results name."""
    names = [path.name for path in out.glob("*.png")]
    if (out / RESULTS).is_file():
        names += re.findall(r'"file": "(\d+\.png)"', (out / RESULTS).read_text(encoding="utf-8", errors="replace"))
    return max((int(match[1]) + 1 for name in names if (match := re.fullmatch(r"([0-9]+)\.png", name))), default=0)


def _append_line(file: Path, line: str) -> None:
    """Append a line in one write, so that lines of two commands do not mix; a line that was cut off before it stays alone."""
    with file.open("ab+", buffering=0) as lines:
        start = ""
        if lines.tell():
            lines.seek(-1, SEEK_END)
            start = "" if lines.read(1) == b"\n" else "\n"
        lines.write(f"{start}{line}\n".encode())


def _text_fields(facts: dict[str, Any]) -> Any:
    from PIL.PngImagePlugin import PngInfo

    fields = PngInfo()
    fields.add_text("Software", "unidiffuser")
    for name, value in facts.items():
        if value is not None and name != "file":
            fields.add_itxt(name, value if isinstance(value, str) else json.dumps(value))
    return fields


def results_table(rows: Sequence[dict[str, Any]]) -> Table:
    """File, what it was made from, caption and seed, a row a result."""
    table = ReportTable()
    for head in ("file", "from", "caption"):
        table.add_column(head, overflow="fold")
    table.add_column("seed", justify="right")
    for row in rows:
        source = row.get("prompt", row.get("source", ""))
        table.add_row(row["file"] or "", escape(source), escape(row["caption"] or ""), str(row["seed"]))
    return table


@contextmanager
def _cuts_said(console: Console) -> Iterator[None]:
    """Say what is left of a prompt that was cut, once a prompt, as a line of its own."""
    from unidiffuser.codecs import PromptCut

    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            if issubclass(category, PromptCut):
                console.print(f"[yellow]{escape(str(message))}[/]", highlight=False, soft_wrap=True)
            else:
                usual(message, category, *rest, **more)

        warnings.showwarning = show
        yield


class _Bar:
    """Progress over the steps of the draws: a bar on a terminal, a line now and then anywhere else."""

    def __init__(self, request: Request, console: Console):
        self.console, self.chunks, self.done, self.calls = console, len(request.chunks), 0, 0
        self.expected = request.settings.steps * _draws(request)
        self.last = time.monotonic()
        self.bars = Progress(
            TextColumn(request.task), BarColumn(), TextColumn("{task.percentage:.0f}%"), TimeElapsedColumn(),
            TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal,
        )  # fmt: skip

    def __enter__(self) -> _Bar:
        self.bar = self.bars.add_task("", total=1.0)
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def chunk_done(self) -> None:
        self.done, self.calls = self.done + 1, 0
        self._show()

    def stepped(self, *_: object) -> None:
        self.calls += 1
        self._show()

    def _show(self) -> None:
        share = (self.done + min(1.0, self.calls / self.expected)) / self.chunks
        self.bars.update(self.bar, completed=share)
        if not self.console.is_terminal and time.monotonic() - self.last >= PLAIN_EVERY:
            self.last = time.monotonic()
            self.console.print(f"{100 * share:.0f}% drawn", highlight=False)


def _draws(request: Request) -> int:
    """How many times a task goes through its steps; a Gibbs chain has rounds of 2, and a joint start if it has no input."""
    if request.task == "gibbs":
        return 2 * request.settings.rounds + (not request.prompts and not request.images)
    if request.task == "interpolate":  # both ends are described and encoded, then the frames are drawn
        return 2 * ceil(2 / request.batch) + ceil(request.count / request.batch)
    return {"i2t2i": 2, "t2i2t": 2}.get(request.task, 1)
