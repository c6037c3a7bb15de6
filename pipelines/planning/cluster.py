"""How long a cluster of GPUs takes, by their peaks and a stated or measured utilisation, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

from pipelines.planning.devices import Gpu
from pipelines.planning.training import Training
from pipelines.planning.work import Work

# CPU cores beside each GPU: a node of 8 has 128.
CORES = 16
# Rows a second of one core: of select as `benchmarks.select` measures it; of download as ten machines of 16 cores fetched
# LAION-5B; of filter and encode, which decode a picture and shrink it in 13 ms.
SELECTED, FETCHED, DECODED = 360e3, 59.0, 75.0
# Utilisation of encoders at work, which MosaicML's 3,784 GPU-hours for their latents imply; and of a training of which nothing is
# measured or stated: U-ViT-H on A100 has 37%, larger diffusion transformers have 22 to 33%.
ENCODING, USUAL = 0.13, 0.35
# What a plan also says: a training that is well tuned.
TUNED = 0.45
# List prices of object stores in dollars: a million PUT and GET requests, and a TB for a month.
PUTS, GETS, STORED = 5.0, 0.4, 23.0


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind and the cores beside them; `mfu` is of training, and `said` where it is from."""

    gpu: Gpu
    gpus: int
    mfu: float
    said: str

    @property
    def cores(self) -> int:
        return self.gpus * CORES

    def training_hours(self, training: Training, mfu: float | None = None) -> float:
        """GPU-hours: FLOP / (peak x MFU)."""
        return training.flop / (self.gpu.peak(training.config.precision) * (mfu or self.mfu)) / 3600

    def gpu_hours(self, work: Work) -> float:
        """GPU-hours of encoders and drawing: FLOP / (peak in bf16 x 13%)."""
        return work.flop / (self.gpu.peak("auto") * ENCODING) / 3600

    def seconds(self, work: Work, gpu_hours: float) -> float:
        """Of a node by itself: its GPUs or its cores, whichever take longer, no more of either than there are pieces of work."""
        gpus, cores = min(self.gpus, work.wide or 1), min(self.cores, work.wide or 1)
        rates = {"select": SELECTED, "download": FETCHED, "folder": DECODED, "filter": DECODED, "encode": DECODED}
        on_cores = work.rows_in / (rates[work.stage] * cores) if work.stage in rates else 0.0
        return max(gpu_hours * 3600 / gpus, on_cores)


def request_cost(puts: float, gets: float) -> float:
    """Dollars for requests to an object store."""
    return (puts * PUTS + gets * GETS) / 1e6
