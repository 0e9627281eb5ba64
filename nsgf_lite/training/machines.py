"""Where a training runs: its device, the processes that share it, and the chance that its modules draw themselves."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Generator, nn
from torch.nn.parallel import DistributedDataParallel

from nsgf_lite.networks import lent_chance


@dataclass(frozen=True)
class Machine:
    """One of the processes that train a network together, and the device it works on."""

    device: torch.device
    process_index: int
    num_processes: int

    def all_of(self, number: int) -> list[int]:
        """The numbers of all processes."""
        numbers = [number] * self.num_processes
        if self.num_processes > 1:
            torch.distributed.all_gather_object(numbers, number)
        return numbers

    def own(self, path: str | PathLike[str]) -> Path:
        """The path, of a file or a folder, as this process has it: other processes than the first add their number."""
        return Path(f"{Path(path)}.{self.process_index}" if self.process_index else path)

    def shared(self, network: nn.Module) -> nn.Module:
        """The network as one whose gradients are means over all processes."""
        if self.num_processes == 1:
            return network
        return DistributedDataParallel(network, device_ids=[self.device] if self.device.type == "cuda" else None)


def machine() -> Machine:
    """What Accelerate finds: CUDA if there is some, else the CPU, since Apple's MPS lacks the solver's float64.

    It is asked for processes and device only: an Accelerator of the reader's own keeps its settings to itself.
    """
    found = PartialState(cpu=not torch.cuda.is_available())
    device = found.device if found.device.type == "cuda" else torch.device("cpu")
    return Machine(device, found.process_index, found.num_processes)


@contextmanager
def chance_of_dropout(network: nn.Module, generator: Generator, step: int) -> Iterator[None]:
    """Within it, modules that draw from torch's global generator draw what the generator's seed and the step decide."""
    dropouts = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    if not any(isinstance(module, dropouts) for module in network.modules()):
        yield
        return
    with lent_chance():
        torch.manual_seed((generator.initial_seed() + 1_000_003 * step) % 2**63)
        yield
