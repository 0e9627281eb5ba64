"""Equal networks as one: a row of a table trains in one sweep."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state

from nsgf_lite.networks.perceptrons import MLP


class Stack(nn.Module):
    """Equal networks as one, whose tensors carry a leading axis of members: a row of a table trains in one sweep.

    Called with x (s, n, d), t (s, n) and labels (s, n) it returns what each member returns on its own slice. Worth its
    while where a single network does not fill the machine: small widths, and every GPU (``benchmarks/stacked.py``).

    Raises
    ------
    ValueError
        If the networks are not of one kind and shape.

    Used in
    -------
    :func:`nsgf_lite.fit_together`, :doc:`/book/field_zoo`
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        shapes = {tuple((name, p.shape) for name, p in network.state_dict().items()) for network in networks}
        if len(shapes) != 1 or len({str(network) for network in networks}) != 1:
            raise ValueError("networks must be of one kind and shape to be stacked")
        self.size = len(networks)
        self._skeleton = [networks[0]]  # in a list, so that its parameters are not this module's
        values, buffers = stack_module_state(list(networks))
        self.stacked = nn.ParameterDict({name.replace(".", "/"): nn.Parameter(p) for name, p in values.items()})
        for name, buffer in buffers.items():
            self.register_buffer(name.replace(".", "/"), buffer)
        self._names = {name: name.replace(".", "/") for name in buffers}

    def _state(self) -> dict[str, Tensor]:
        values = {name.replace("/", "."): p for name, p in self.stacked.items()}
        return values | {name: self.get_buffer(slot) for name, slot in self._names.items()}

    def forward(self, *inputs: Tensor) -> Tensor:
        """Values of all members, each on its slice of the leading axis."""
        skeleton = self._skeleton[0]
        if isinstance(skeleton, MLP):  # here, where all labels are seen, and not within the members
            skeleton.read_labels(*inputs[2:])

        def one(state: dict[str, Tensor], *slices: Tensor) -> Tensor:
            return functional_call(skeleton, state, slices)

        return torch.vmap(one)(self._state(), *inputs)

    @torch.no_grad()
    def unstack(self, networks: Sequence[nn.Module]) -> None:
        """Copy the members' weights back into the networks they came from."""
        for k, network in enumerate(networks):
            network.load_state_dict({name: value[k] for name, value in self._state().items()})
