"""The page of what `benchmarks.watermark` found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Families of pictures and methods of the peer, as the page names them.
NAMES = {
    "scenes": "scenes of the little web",
    "drawings": "other drawings",
    "photographs": "parts of a photograph",
    "dwtDct": "dwtDct, on scenes",
    "dwtDctSvd": "dwtDctSvd, on scenes",
}
CHANGES = {
    "none": "none", "jpeg_90": "JPEG 90", "jpeg_75": "JPEG 75", "jpeg_50": "JPEG 50", "resize_150": "resized to 150 %",
    "resize_70": "resized to 70 %", "resize_50": "resized to 50 %", "crop_90": "a part, 90 % of both sides",
    "crop_75": "a part, 75 % of both sides", "crop_50": "a part, 50 % of both sides",
    "crop_75_jpeg_75": "a part, 75 % of both sides, as JPEG 75", "resize_50_jpeg_75": "resized to 50 %, as JPEG 75",
}  # fmt: skip
PEER = """
dwtDct and dwtDctSvd are invisible-watermark's, with the same code and check. They know no scale: they are given resized pictures
in the size that they marked, and a part as it was cut out.
"""


def page(record: Mapping[str, Any]) -> str:
    """What was found, as Markdown."""
    details = record["details"]
    found = {name: details[name] for name in NAMES if name in details}
    clean, plain = details["clean"], details["plain"]
    families = ", ".join(f"{count:,} {NAMES[name]}" for name, count in clean["families"].items())
    return f"""# What the invisible mark outlives, and what it costs

Pictures of {details["side"]} pixels are marked with a code of their own, changed as pictures are on their way, and read again.
The figure is the share whose code was read. Other drawings are of OpenMoji, on plain grounds; the photograph is matplotlib's
sample.

{_survived(found)}
{PEER if "dwtDct" in found else ""}
## What it costs

{_costs(found)}

On plain grounds of {plain["side"]} pixels the largest change of a pixel is {plain["largest"]} grey level, the mean
{plain["mean"]:.2f}, and PSNR is {plain["psnr"]:.1f} dB. Where a picture is busy, the mark is stronger.

The balance: the less a plain ground may change, the less JPEG the mark outlives there. It is as strong as JPEG 75 asks, and no
stronger, so that JPEG 50, and JPEG 75 of half the size, take it from pictures with plain grounds.

## Clean pictures

Of {clean["pictures"]:,} pictures without a mark ({families}) a mark was found in {clean["found"]}.

Measured {record["date"]} by `{record["command"]}`.
"""


def _survived(found: Mapping[str, Mapping[str, Any]]) -> str:
    heads = [f"{NAMES[name]} ({each['pictures']})" for name, each in found.items()]
    lines = [f"| change | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name, told in CHANGES.items():
        shares = [f"{each['survived'][name]:.2f}" for each in found.values()]
        lines.append(f"| {told} | {' | '.join(shares)} |")
    return "\n".join(lines)


def _costs(found: Mapping[str, Mapping[str, Any]]) -> str:
    lines = ["| | PSNR, dB | of the worst | SSIM | of the worst |", "|---|---|---|---|---|"]
    for name, each in found.items():
        cost = each["quality"]
        row = f"{cost['psnr']:.1f} | {cost['psnr_worst']:.1f} | {cost['ssim']:.4f} | {cost['ssim_worst']:.4f}"
        lines.append(f"| {NAMES[name]} | {row} |")
    return "\n".join(lines)
