"""The training of a JKO flow: turns of map and critics within each JKO step, and what a checkpoint holds of them."""

import copy
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Generator, Tensor, nn
from torch.func import functional_call

from nsgf_lite.functionals import Functional, Move, Reference
from nsgf_lite.networks import evaluating, valued
from nsgf_lite.training import Part, Stream, Training
from nsgf_lite.training.machines import chance_of_dropout

CROWD, _SHOWN, _LAW = 100_000, 10_000, 10_000  # particles: of a crowd that is not kept, for a value, of a law


class JKOStep(nn.Module):
    """One step of the flow: points first follow the explicit functional, if there is one, then go through the map.

    The law that the explicit functional's first variation needs is a crowd (m, d), which is kept.
    """

    crowd: Tensor

    def __init__(self, network: nn.Module, explicit: Functional | None, length: float, dimension: int) -> None:
        super().__init__()
        self.map, self.explicit, self.length = network, explicit, length
        self.register_buffer("crowd", torch.zeros(_LAW if explicit else 0, dimension, dtype=torch.float32))

    def before(self, x: Tensor) -> Tensor:
        """Points (n, d) after the explicit step."""
        return x if self.explicit is None else x - self.length * self.explicit.slope(x, self.crowd)

    def forward(self, x: Tensor) -> Tensor:
        """Points (n, d) after the step."""
        return valued(self.map(self.before(x)), x, None)


class Played(Protocol):
    """What the turns read of a flow, :class:`nsgf_lite.JKOFlow`, and what they leave there: its steps and values."""

    step: float
    steps: int
    explicit: Functional | None
    scheme: str
    ascents: int
    descents: int
    particles: int | None
    whole: bool
    kept: list[JKOStep]
    values: list[float]
    source: Stream


class Rival:
    """One term of the functional in a training: its factor, its critic, the critic's Adam, and the reference law."""

    def __init__(self, factor: float, term: Functional, network: nn.Module, rate: float) -> None:
        self.factor, self.term, self.network = factor, term, network
        self.reference = term.reference()
        self.optimizer = torch.optim.Adam(network.parameters(), lr=rate, fused=True)
        self.last: tuple[nn.Module, Reference] | None = None  # critic and law of the JKO step before

    def unit(self, reference: Reference | None = None) -> float:
        """What the critic's gain is to be multiplied with to be a part of the functional."""
        return self.factor * self.term.unit(reference or self.reference)

    def on_particles(self, y: Tensor, move: Move, past: bool = False) -> Tensor:
        """Part of the functional that moved particles y (n, d) decide, by the critic as it is, or before if past."""
        if self.reference is None:
            return self.factor * self.term.on_particles(None, y, None, move).mean()
        network, reference = (self.network, self.reference)
        if past:
            assert self.last is not None
            network, reference = self.last
        held = {name: p.detach() for name, p in network.named_parameters()}
        s = valued(functional_call(network, held, (y,)), y, 1)[:, 0]
        return self.unit(reference) * self.term.on_particles(s, y, reference, move).mean()

    def gap(self, y: Tensor, z: Tensor, move: Move | None) -> Tensor:
        """The critic's gain, from moved particles y (n, d) and points z (m, d) of the reference.

        Without a move its gradient is right, and its value is not.
        """
        assert self.reference is not None
        if z.shape[1:] != y.shape[1:]:
            raise ValueError(f"samples must have dimension {y.shape[1]}, as the source has, got {z.shape[1]}")
        s = valued(self.network(torch.cat([y, z])), torch.cat([y, z]), 1)[:, 0]
        here = self.term.on_particles(s[: len(y)], y, self.reference, move).mean()
        return here - self.term.on_reference(s[len(y) :], self.reference).mean()


class Run:
    """A training of a JKO flow: which JKO step it is at, the crowd, the critics, the maps kept so far."""

    def __init__(
        self,
        model: Played,
        network: nn.Module,
        rivals: list[Rival],
        crowd: Tensor,
        training: Training,
        turn: int,
        generator: Generator,
    ) -> None:
        self.model, self.network, self.rivals, self.training, self.turn = model, network, rivals, training, turn
        self.generator, self.k, self.value = generator, 0, float("nan")
        self.now = self.first = crowd  # the crowd at the beginning of this JKO step, and at time zero

    # --- between JKO steps ----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Prepare the first JKO step."""
        self.model.values = []
        self._open()

    def _open(self) -> None:
        """Put the explicit step's law into place, and fit the references to the crowd."""
        step = self.model.kept[self.k]
        if self.model.explicit is not None:
            rows = torch.randperm(len(self.now), generator=self.generator, device=self.generator.device)[:_LAW]
            step.crowd.copy_(self.now[rows.repeat(-(-_LAW // len(rows)))[:_LAW]])
            with self._named():
                self.now = step.before(self.now)
        for rival in self.rivals:
            if rival.reference is not None:
                with self._named():
                    rival.reference.renew(self.now)

    def close(self) -> None:
        """Keep the map as that of this JKO step, with the critics' value, and take the crowd through it."""
        model, step = self.model, self.model.kept[self.k]
        step.map.load_state_dict(self.network.state_dict())
        critics = [rival.network for rival in self.rivals]
        with self._named(), torch.no_grad(), evaluating(step, *critics):
            here = self.first if model.whole else self.now
            parts = [step.map(part) for part in here.split(_SHOWN)]
            move = Move(here[:_SHOWN], step.map, self.generator, exact=True)
            value = torch.zeros(())
            for rival in self.rivals:
                if rival.reference is None:
                    value = value + rival.on_particles(parts[0], move).cpu()
                else:
                    z = rival.reference.draw(_SHOWN, self.generator)
                    value = value + rival.unit() * rival.gap(parts[0], z, move).cpu()
        model.values.append(float(value))
        self.now = torch.cat(parts)

    def _next(self) -> None:
        self.close()
        self.k += 1
        if self.model.scheme != "jko":
            for rival in self.rivals:
                if rival.reference is not None:
                    rival.last = copy.deepcopy(rival.network), rival.reference.frozen()
        if self.model.particles is None:
            crowd = self.model.source.many(CROWD, self.generator)
            self.first, self.now = crowd, self._moved(crowd, self.k)
        self._open()

    @torch.no_grad()
    def _moved(self, x: Tensor, k: int) -> Tensor:
        """Points of the source (n, d) after k JKO steps."""
        steps = self.model.kept[max(k - 1, 0) : k] if self.model.whole else self.model.kept[:k]
        for step in steps:
            with evaluating(step):
                x = step(x)
        return x

    # --- within one -----------------------------------------------------------------------------------------------

    def loss(self, network: nn.Module, step: int) -> Tensor:
        """The map's loss on a minibatch, after the critics' turn if it is theirs; a new JKO step begins on its time."""
        if step and step % self.turn == 0 and step // self.turn > self.k:
            self._next()
        critics = nn.ModuleList([rival.network for rival in self.rivals])
        with self._named(), chance_of_dropout(critics, self.generator, step):
            if step % self.model.descents == 0:
                for left in reversed(range(self.model.ascents)):
                    self.value = sum(self._ascend(rival, network, step, told=not left) for rival in self.rivals)
            start, here = self._minibatch()
            moved = valued(network(start), start, None)
            move = Move(start, network, self.generator)
            value = torch.stack([self._value(rival, moved, here, move) for rival in self.rivals]).sum()
            return (moved - here).square().sum(1).mean() / (2 * self.model.step) + value

    def _value(self, rival: Rival, moved: Tensor, here: Tensor, move: Move) -> Tensor:
        """The functional after the step, or half of it and half of what the scheme takes of the law before."""
        value = rival.on_particles(moved, move)
        if rival.last is None:
            return value
        if self.model.scheme == "crank-nicolson":
            return (value + rival.on_particles(moved, move, past=True)) / 2
        z = here.clone().detach().requires_grad_()
        (slope,) = torch.autograd.grad(rival.on_particles(z, move, past=True) * len(z), z)
        return (value + (slope * (moved - here)).sum(1).mean()) / 2

    def _minibatch(self, places: bool = True) -> tuple[Tensor, Tensor]:
        """What the map is given (n, d), and, if the places are asked for, where it was before this JKO step."""
        n, model = self.training.batch, self.model
        if model.particles is None:
            x = model.source.draw(n, self.generator)
            if model.whole and not places:
                return x, x
            here = model.kept[self.k].before(self._moved(x, self.k))
            return (x if model.whole else here), here
        row = torch.randint(len(self.now), (n,), generator=self.generator, device=self.generator.device)
        return (self.first if model.whole else self.now)[row], self.now[row]

    def _ascend(self, rival: Rival, network: nn.Module, step: int, told: bool) -> float:
        """One step of a critic up, and its part of the functional if that is asked for; nothing without a critic."""
        if rival.reference is None:
            return 0.0
        start, _ = self._minibatch(places=False)
        with torch.no_grad():
            moved = valued(network(start), start, None)
        rival.reference.follow(moved)
        rival.reference.check(moved)
        z = rival.reference.draw(self.training.batch, self.generator)
        gain = rival.gap(moved, z, Move(start, network, self.generator) if told else None)
        if not bool(torch.isfinite(gain)):
            raise FloatingPointError(f"the critic diverged: its gain is {float(gain.detach())}")
        for group in rival.optimizer.param_groups:
            group["lr"] = self.training.rate_at(step)
        rival.optimizer.zero_grad()
        (-gain).backward()
        nn.utils.clip_grad_norm_(rival.network.parameters(), self.training.clip)
        rival.optimizer.step()
        return rival.unit() * float(gain.detach())

    def _named(self) -> "_InStep":
        return _InStep(self.k, self.model.steps)

    def shown(self) -> dict[str, str]:
        """What the progress bar says."""
        return {"step": f"{self.k + 1}/{self.model.steps}", "F": f"{self.value:.4g}"}

    # --- checkpoints ----------------------------------------------------------------------------------------------

    def parts(self) -> dict[str, Part]:
        """What a checkpoint must hold."""
        return {"source": self.model.source, "run": self}

    def state(self) -> dict[str, Tensor]:
        """All that changes, but the map."""
        values = torch.tensor(self.model.values, dtype=torch.float64)
        out = {"k": torch.tensor(self.k), "values": values, "now": self.now}
        if self.model.whole:
            out["first"] = self.first
        for k, step in enumerate(self.model.kept[: self.k + 1]):
            out |= {f"kept/{k}/{name}": t for name, t in step.state_dict().items()}
        for k, rival in enumerate(self.rivals):
            for name, thing in self._whats(rival):
                out |= {f"rival/{k}/{name}/{key}": t for key, t in thing.items()}
        return out

    @staticmethod
    def _whats(rival: Rival) -> Iterator[tuple[str, dict[str, Tensor]]]:
        if rival.reference is None:
            return
        yield "network", rival.network.state_dict()
        yield "reference", rival.reference.state()
        for p, memory in rival.optimizer.state_dict()["state"].items():
            yield f"adam/{p}", memory
        if rival.last is not None:
            yield "last/network", rival.last[0].state_dict()
            if rival.last[1] is not rival.reference:
                yield "last/reference", rival.last[1].state()

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take that up again."""

        def under(prefix: str) -> dict[str, Tensor]:
            return {name[len(prefix) + 1 :]: t for name, t in state.items() if name.startswith(prefix + "/")}

        self.k, self.model.values = int(state["k"]), state["values"].tolist()
        self.now = state["now"].to(self.now)
        self.first = state["first"].to(self.first) if self.model.whole else self.first
        for k, step in enumerate(self.model.kept[: self.k + 1]):
            step.load_state_dict(under(f"kept/{k}"))
        for k, rival in enumerate(self.rivals):
            if rival.reference is None:
                continue
            rival.network.load_state_dict(under(f"rival/{k}/network"))
            rival.reference.restore(under(f"rival/{k}/reference"))
            memory = rival.optimizer.state_dict()
            count = {int(name.split("/")[0]) for name in under(f"rival/{k}/adam")}
            memory["state"] = {p: under(f"rival/{k}/adam/{p}") for p in sorted(count)}
            rival.optimizer.load_state_dict(memory)
            if last := under(f"rival/{k}/last/network"):
                network, reference = copy.deepcopy(rival.network), rival.reference.frozen()
                network.load_state_dict(last)
                if reference is not rival.reference:
                    reference.restore(under(f"rival/{k}/last/reference"))
                rival.last = network, reference


class _InStep:
    """An error of a JKO step as one that says in which."""

    def __init__(self, k: int, steps: int) -> None:
        self.where = f"in JKO step {k + 1} of {steps}"

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, ValueError | FloatingPointError) and not str(error).startswith("in JKO step"):
            raise type(error)(f"{self.where}: {error}") from error
