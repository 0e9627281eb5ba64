"""Pool, streams and checkpoints: what is bounded, what is refused, and what is noticed."""

import errno
import math
import os
import resource
from dataclasses import dataclass
from functools import partial

import pytest
import safetensors.torch
import torch
from test_bad_input import refused
from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

import nsgf_lite as nl
from nsgf_lite.training import checkpoints
from nsgf_lite.training.streams import Stream, described

FAR = nl.toy.Gaussian((4.0, 0.0), ((0.5, 0.0), (0.0, 0.5)))


def chance(seed=0):
    return Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=chance(seed))


def flown(b=3, n=8, steps=4, seed=0, step=0.5):
    """Positions and velocities of b minibatches of n."""
    x, y = normal(b, n, 2, seed=seed), normal(b, n, 2, seed=seed + 1) + 3
    return nl.trajectories(nl.fields.Sinkhorn(0.5, 1e-6), x, y, step, steps)


# --- trajectories and their pool --------------------------------------------------------------------------------------


def test_a_velocity_stands_beside_the_position_where_it_was_taken():
    """x[k+1] = x[k] + step v[k], and v[k] is the field at x[k], solved again from cold; it points at the target."""
    y = normal(3, 8, 2, seed=1) + 3
    x, v = flown()
    assert x.shape == v.shape == (4, 3, 8, 2)
    assert torch.equal(x[0], normal(3, 8, 2)) and torch.equal(x[1:], x[:-1] + 0.5 * v[:-1])
    for k in range(4):
        cold = nl.fields.Sinkhorn(0.5, 1e-6)(x[k], y)
        assert (cold - v[k]).abs().max() < 1e-3
    assert ((y.mean(1) - x.mean(2)) * v.mean(2)).sum(-1).min() > 0
    gaps = (x.mean(2) - y.mean(1)).norm(dim=-1)
    assert torch.allclose(gaps[1:], gaps[:-1] / 2, atol=1e-3)  # the mean goes half of its way in each step of 1/2


def test_a_pilot_moves_and_the_field_is_recorded_where_it_went():
    x0, y = normal(2, 8, 2), normal(2, 8, 2, seed=1)
    x, v = nl.trajectories(nl.fields.Sinkhorn(0.5), x0, y, 0.5, 3, pilot=lambda z, k: z + k + 1)
    assert torch.allclose(x, torch.stack([x0, x0 + 1, x0 + 3]))
    assert (v[2] - nl.fields.Sinkhorn(0.5)(x0 + 3, y)).abs().max() < 1e-3


def test_trajectories_refuse():
    field, x = nl.fields.Sinkhorn(0.5), normal(2, 4, 2)
    refused(lambda: nl.trajectories(field, x, x, 0.0, 3), "step must be")
    refused(lambda: nl.trajectories(field, x, x, 0.5, 0), "steps must be")
    with pytest.raises(FloatingPointError, match="step 2 of 3"):
        nl.trajectories(field, x, x, 0.5, 3, pilot=lambda z, k: z / (1 - k))


def triples(x, v):
    """Rows (x, step number, v), each as one tuple of numbers."""
    return {
        (*a.tolist(), k, *b.tolist())
        for k in range(len(x))
        for a, b in zip(x[k].view(-1, 2), v[k].view(-1, 2), strict=True)
    }


@pytest.mark.parametrize("disk", [False, True])
def test_the_pool_is_bounded_and_keeps_the_newest(disk, tmp_path):
    pool = nl.Pool(4, tmp_path / "pool" if disk else None)
    assert len(pool) == pool.nbytes == pool.bound == 0
    added = [flown(b=3, seed=10 * k) for k in range(5)]
    for x, v in added:
        pool.add(x, v)
        pool.sweep()
        held = (
            pool._x.nbytes + pool._v.nbytes if not disk else sum(x.nbytes + v.nbytes for x, v in pool._files.values())
        )
        assert pool.nbytes <= held <= pool.bound == 4 * 2 * 4 * 4 * 8 * 2
        assert not disk or len(list((tmp_path / "pool").iterdir())) == len(pool)
    assert len(pool) == 4 and pool.nbytes == pool.bound
    newest = triples(added[-1][0], added[-1][1]) | triples(added[-2][0][:, 2:], added[-2][1][:, 2:])
    x, k, v, label = pool.sample(4000, chance())
    drawn = {(*a.tolist(), int(s), *b.tolist()) for a, s, b in zip(x, k, v, strict=True)}
    assert drawn == newest and not label.any()  # all 128 of them, and nothing else


def test_sampling_is_uniform_and_a_generators():
    pool = nl.Pool(3)
    pool.add(*flown(b=2), torch.tensor([5, 7]))
    x, k, v, label = pool.sample(64_000, chance(3))
    rows = (
        (label == 7) * 32 + k * 8 + (x[:, :1] == pool._x.view(-1, 8, 2)[(label == 7) * 4 + k][..., 0]).int().argmax(1)
    )
    counts = torch.bincount(rows, minlength=64).double()
    assert len(counts) == 64 and ((counts - 1000) ** 2 / 1000).sum() < 120  # chi-squared, 63 degrees of freedom
    again = pool.sample(64_000, chance(3))
    assert all(torch.equal(a, b) for a, b in zip(again, (x, k, v, label), strict=True))
    assert not torch.equal(pool.sample(64_000, chance(4))[0], x)


def test_on_disk_equals_in_memory_and_both_resume(tmp_path):
    pools = nl.Pool(4), nl.Pool(4, tmp_path)
    for seed in range(3):
        for pool in pools:
            pool.add(*flown(b=2, seed=seed), torch.tensor([seed, seed + 1]))
    twins = nl.Pool(4), nl.Pool(4, tmp_path)
    for pool, twin in zip(pools, twins, strict=True):
        twin.restore({name: t.clone() for name, t in pool.state().items()})
    draws = [pool.sample(100, chance()) for pool in (*pools, *twins)]
    for other in draws[1:]:
        assert all(torch.equal(a, b) for a, b in zip(draws[0], other, strict=True))
    assert len(list(tmp_path.iterdir())) == 4  # those that had left are gone
    refused(lambda: nl.Pool(4).restore(pools[1].state()), "pool is on disk")
    refused(lambda: nl.Pool(4, tmp_path).restore(pools[0].state()), "pool is in memory")


@pytest.mark.parametrize("unit", [1e-30, 1e-8, 1e-6, 1.0, 1e6, 1e30])
def test_half_precision_has_three_digits_in_every_unit_and_everywhere(unit, tmp_path):
    """Of positions about their minibatch's mean and of velocities, in units of the largest, with an offset."""
    flow, offset = flown(), torch.tensor([1000.0, -300.0]) * unit
    x, v = unit * flow[0] + offset, unit * flow[1]
    mean = x.mean((0, 2), keepdim=True)
    largest = [(part.abs().amax((0, 2, 3))) for part in (x - mean, v)]
    for folder in (None, tmp_path):
        half, exact = nl.Pool(3, folder, half=True), nl.Pool(3)
        half.add(x, v)
        exact.add(x, v)
        assert half.bound * 2 == exact.bound
        (a, k, u, _), (b, step, w, _) = half.sample(500, chance()), exact.sample(500, chance())
        assert a.dtype == b.dtype and torch.equal(k, step)
        row = torch.randint(3 * 4 * 8, (500,), generator=chance()) // 32
        for got, true, size, slack in ((a, b, largest[0], 2**-23 * offset.abs().max()), (u, w, largest[1], 0.0)):
            error = (got - true).abs().amax(1)
            assert (error <= 2**-11 * size[row] + slack).all()
            assert error.max() > 2**-13 * size.max()  # it is half precision
        refused(lambda half=half: half.add(x, v * math.inf), "finite")
        assert half.added == 3


def test_half_precision_resumes(tmp_path):
    for folder in (None, tmp_path):
        pool, twin = nl.Pool(3, folder, half=True), nl.Pool(3, folder, half=True)
        pool.add(*flown(b=4))
        twin.restore({name: t.clone() for name, t in pool.state().items()})
        pairs = zip(pool.sample(100, chance()), twin.sample(100, chance()), strict=True)
        assert all(torch.equal(one, two) for one, two in pairs)


def test_a_pool_on_disk_takes_only_its_own_files(tmp_path):
    """Another run's file of the same number and shape, and two of its own that changed places."""
    names = [f"minibatch-0000000{k}.safetensors" for k in range(2)]
    one, two = nl.Pool(2, tmp_path / "one"), nl.Pool(2, tmp_path / "two")
    one.add(*flown(b=2))
    two.add(*flown(b=2, seed=9))
    state, kept = one.state(), [(tmp_path / "one" / name).read_bytes() for name in names]
    nl.Pool(2, tmp_path / "one").restore(state)
    refused(lambda: nl.Pool(2, tmp_path / "two").restore(state), f"{names[0]} is of another run")
    for name, content in zip(names, reversed(kept), strict=True):
        (tmp_path / "one" / name).write_bytes(content)
    refused(lambda: nl.Pool(2, tmp_path / "one").restore(state), f"{names[0]} is of another run, or in another's place")


def test_the_pool_refuses():
    pool = nl.Pool(3)
    refused(lambda: nl.Pool(0), "capacity must be a positive integer")
    for flag in ("no", 1, None):
        refused(lambda flag=flag: nl.Pool(3, half=flag), "half must be True or False, got")
    refused(lambda: pool.sample(3, chance()), "pool is empty")
    x, v = flown()
    spoiled = v.clone()
    spoiled[0, 0, 0, 0] = math.nan
    refused(lambda: pool.add(x, spoiled), "finite")
    refused(lambda: pool.sample(3, chance()), "pool is empty")
    refused(lambda: pool.add(x, v[1:]), r"share a shape .*\(4, 3, 8, 2\) and \(3, 3, 8, 2\)")
    refused(lambda: pool.add(x, v, torch.zeros(2)), r"labels must have shape \(3,\)")
    twin = nl.Pool(3)
    twin.restore(pool.state())
    for one in (pool, twin):
        one.add(x, v)
        refused(lambda one=one: one.add(*flown(n=9)), r"\(4, 8, 2\) as the pool's, got \(4, 9, 2\)")


def test_a_new_pool_clears_its_folder_and_a_resumed_one_what_came_after(tmp_path):
    nl.Pool(9, tmp_path).add(*flown(b=9))
    (tmp_path / ".minibatch-00000003.safetensors.77.part").write_bytes(b"cut short")
    (tmp_path / "notes.txt").write_text("the reader's own", encoding="utf-8")
    pool = nl.Pool(2, tmp_path)
    pool.add(*flown(b=2))
    assert len(list(tmp_path.iterdir())) == 3
    state = pool.state()
    pool.add(*flown(b=1))
    twin = nl.Pool(2, tmp_path)
    twin.restore(state)
    assert sorted(p.name for p in tmp_path.iterdir())[:2] == [f"minibatch-0000000{k}.safetensors" for k in (0, 1)]


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone"])
def test_a_damaged_pool_is_reported_with_its_file(damage, tmp_path):
    pool = nl.Pool(2, tmp_path)
    pool.add(*flown(b=2))
    file = sorted(tmp_path.iterdir())[1]
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.unlink() if damage == "gone" else file.write_bytes(content if damage == "flipped" else content[:-9])
    what = {"flipped": "is damaged", "cut": "is damaged", "gone": "is missing"}[damage]
    refused(lambda: nl.Pool(2, tmp_path).restore(pool.state()), f"{file.name} {what}")


@pytest.fixture
def small_disk():
    """No file may grow beyond 10 kB."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("small_disk")
def test_a_full_disk_is_an_error_and_leaves_nothing_half_written(tmp_path):
    checkpoints.write(tmp_path / "old", {"x": torch.ones(3)}, {})
    with pytest.raises(OSError, match=r"could not write 0\.1 MB .*old"):
        checkpoints.write(tmp_path / "old", {"x": torch.ones(30_000)}, {})
    assert torch.equal(checkpoints.read(tmp_path / "old")[0]["x"], torch.ones(3))
    pool = nl.Pool(2, tmp_path / "pool")
    pool.add(*flown(b=1))
    with pytest.raises(OSError, match="minibatch-00000000"):
        nl.Pool(2, tmp_path / "pool").add(*flown(b=1, n=999, steps=2))
    network = {"network": lambda d, classes: nl.networks.MLP(d, width=16)}
    with pytest.raises(OSError, match=r"could not write .*run"):
        nl.FlowMatching(**network).fit(FAR, FAR, nl.Training(steps=2), checkpoint=tmp_path / "run", progress=False)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["old"]


# --- streams ----------------------------------------------------------------------------------------------------------


POINTS, LABELS = normal(60, 2), torch.arange(60) % 3


def rows(x):
    return {tuple(row) for row in x.tolist()}


def test_streams_of_laws_and_tensors():
    assert torch.equal(Stream("source", FAR).draw(5, chance(1)), FAR.sample(5, chance(1)))
    images = Stream("source", torch.arange(12, dtype=torch.uint8).view(3, 2, 2))
    assert sorted(images.draw(3, chance()).tolist()) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    stream = Stream("source", POINTS.double())
    drawn = stream.draw(60, chance())
    assert drawn.dtype == torch.float32 and rows(drawn) == rows(POINTS)  # without replacement
    assert stream.classes == 0 and len(rows(stream.draw(40, chance()))) == 40
    assert torch.equal(stream.draw(9, chance(2)), stream.draw(9, chance(2)))
    refused(lambda: stream.draw(61, chance()), "source has 60 points, fewer than a minibatch of 61")
    refused(lambda: stream.draw(0, chance()), "n must be a positive integer")
    many = stream.many(150, chance())
    assert len(many) == 150 and rows(many[:60]) == rows(many[60:120]) == rows(POINTS)


@pytest.mark.parametrize("as_list", [False, True])
def test_streams_of_classes(as_list):
    data = [POINTS[LABELS == c] for c in range(3)] if as_list else (POINTS, LABELS)
    stream = Stream("target", data)
    assert stream.classes == 3
    for c in range(3):
        assert rows(stream.draw(20, chance(), c)) == rows(POINTS[LABELS == c])
    refused(lambda: stream.draw(21, chance(), 1), "target has 20 points of class 1, fewer")
    mixed = Stream("target", [FAR, POINTS])
    assert mixed.classes == 2 and mixed.draw(5, chance(), 0).mean() > 1


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        (3.0, ("target must be a law", "got float")),
        ([], ("target must be a law", "got list")),
        ([POINTS, None], ("target must be a law", "got NoneType")),
        (POINTS[:, 0], ("target must have shape", r"got \(60,\)")),
        (torch.full((9, 2), math.nan), ("target must be finite",)),
        ((POINTS, LABELS[:9]), ("labels must be", r"shape \(9,\)")),
        ((POINTS, LABELS - 1), ("labels non-negative",)),
        ((POINTS, 2 * LABELS), ("target of class 1 must have shape", r"got \(0, 2\)")),
        ((POINTS[:0], LABELS[:0]), ("labels must be",)),
    ],
)
def test_streams_refuse(data, parts):
    refused(lambda: Stream("target", data), *parts)


@pytest.mark.parametrize("label", [-1, 3, 1.0, True, None, "one"])
def test_a_label_that_is_none_draws_nothing(label):
    laws, points = [FAR] * 3, (POINTS, LABELS)
    for stream in (Stream("target", laws), Stream("target", points), Stream("target", loader(labels=True), 3)):
        for draw in (stream.draw, stream.many):
            refused(lambda draw=draw: draw(4, chance(), label), "label must be an integer from 0 to 2, got")
    assert len(Stream("target", FAR).draw(4, chance(), label)) == 4  # of one class: it has no say


@dataclass
class Generous:
    more: int

    def sample(self, n, generator):
        return FAR.sample(n + self.more, generator)


@pytest.mark.parametrize("more", [-1, 1])
def test_a_law_gives_as_many_points_as_it_is_asked_for(more):
    stream = Stream("source", Generous(more))
    refused(lambda: stream.draw(5, chance()), "source must give as many points as it is asked for, 5, got")


@pytest.mark.parametrize("turned", [lambda t: t, torch.Tensor.float, torch.Tensor.int, torch.Tensor.byte])
def test_one_hot_labels_are_no_points(turned):
    labels = turned(torch.nn.functional.one_hot(LABELS))
    refused(lambda: Stream("target", (POINTS, labels)), "target of class 1 must be points", "labels of shape")
    two = turned(torch.nn.functional.one_hot(LABELS % 2))  # of the points' own dimension
    refused(lambda: Stream("target", [POINTS, two]), "target of class 1 must be points", r"argmax\(1\)")
    images = torch.arange(12, dtype=torch.uint8).view(3, 2, 2)
    assert Stream("target", [images, images[:2]]).classes == 2  # bytes are points


class Hidden:
    """A law whose repr says nothing of what it draws from."""

    def __init__(self, points):
        self.inner = {"points": [points]}

    def sample(self, n, generator):
        return self.inner["points"][0][:n]


@dataclass
class Empirical(Hidden):
    """One whose repr shows the first and the last few points."""

    points: torch.Tensor

    def __post_init__(self):
        super().__init__(self.points)


def test_data_of_one_shape_and_mean_are_told_apart():
    big = normal(2000, 2)
    other = big.clone()
    other[1000], other[1001] = big[1001] + 1, big[1000] - 1
    assert torch.allclose(big.mean(0), other.mean(0))
    loaders = [lambda x: DataLoader(TensorDataset(x), 7), lambda x: DataLoader(x, 7)]
    for made in (lambda x: x, Hidden, Empirical, lambda x: Hidden(x.numpy()), lambda x: [x, FAR], *loaders):
        one, same, two = (repr(Stream("target", made(x))) for x in (big, big.clone(), other))
        assert one == same != two
    assert described(FAR) == repr(FAR) and "hash" not in described(nl.fields.Sinkhorn(0.5))


class Case:
    def __init__(self, data):
        self.data = data

    def log_density(self, x):
        return -(x - self.data.mean(0)).square().sum(1)


somewhere = torch.zeros(1)


def near(x):
    return x - somewhere


def test_data_in_functions_are_told_apart(monkeypatch):
    """A log density has its data where Python lets it: a method's object, a closure, a default, a global variable."""
    big, other = normal(2000, 2), normal(2000, 2, seed=3)

    def deep(data):
        inner = Case(data).log_density
        return lambda x: 2 * inner(x)

    def default(data):
        def of(x, data=data):
            return x - data

        return of

    makers = [
        lambda data: Case(data).log_density,
        lambda data: lambda x: x - data,
        deep,
        default,
        lambda data: partial(torch.add, data),
        lambda data: nl.functionals.KL(Case(data).log_density),
    ]
    for make in makers:
        one, same, two = (described(make(x)) for x in (big, big.clone(), other))
        assert one == same != two
    told = []
    for data in (big, big.clone(), other):
        monkeypatch.setitem(globals(), "somewhere", data)
        told.append(described(near))
    assert told[0] == told[1] != told[2]


class Cracked:
    def sample(self, n, generator):
        return torch.full((n, 2), math.inf)


def test_what_a_law_draws_is_checked():
    refused(lambda: Stream("target", Cracked()).draw(3, chance()), "target must be finite")
    assert repr(Stream("target", Cracked())) == repr(Stream("target", Cracked()))  # no address, which would change


def loader(batch=7, seed=5, labels=False, **options):
    data = TensorDataset(POINTS, LABELS) if labels else TensorDataset(POINTS)
    return DataLoader(data, batch, **{"shuffle": True, "generator": chance(seed), **options})


def test_a_loader_is_read_on_and_on():
    before = torch.random.get_rng_state()
    stream = Stream("source", loader())
    drawn = torch.cat([stream.draw(10, chance()) for _ in range(12)])
    assert rows(drawn[:60]) == rows(drawn[60:]) == rows(POINTS) and not torch.equal(drawn[:60], drawn[60:])
    in_order = Stream("source", DataLoader(TensorDataset(POINTS), 7))
    assert torch.equal(in_order.draw(60, chance()), POINTS)
    assert torch.equal(torch.random.get_rng_state(), before)


class Forward(IterableDataset):
    def __iter__(self):
        return iter(POINTS)


def test_a_loader_of_a_dataset_without_length():
    stream = Stream("source", DataLoader(Forward(), 7))
    assert torch.equal(stream.draw(60, chance()), POINTS) and repr(stream) == "loader of Forward by 7"
    assert torch.equal(stream.draw(9, chance()), POINTS[:9])


def test_a_loader_that_draws_from_the_global_generator_is_refused():
    data = TensorDataset(POINTS)
    for made in (
        DataLoader(data, 7, shuffle=True),
        DataLoader(data, 7, sampler=RandomSampler(data), generator=chance()),
        DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), 7, False)),
    ):
        refused(lambda made=made: Stream("source", made), "source shuffles", "generator=")
    g = chance(1)
    Stream("source", DataLoader(data, 7, sampler=RandomSampler(data, generator=g), generator=g)).draw(60, chance())


def test_a_loader_with_classes():
    stream = Stream("target", loader(labels=True), classes=3)
    for c in (2, 0, 1, 1):
        assert rows(stream.draw(20, chance(), c)) == rows(POINTS[LABELS == c])
    refused(lambda: Stream("target", loader(), 3).draw(4, chance()), r"must yield pairs \(points, labels\)")
    refused(lambda: Stream("target", loader(labels=True), 2).draw(40, chance()), "integers below 2")
    refused(lambda: Stream("target", loader(labels=True), 4).draw(4, chance(), 3), "no points of class 3 in a whole")
    refused(lambda: Stream("target", loader(labels=True), -1), "non-negative integer, got -1")
    refused(lambda: Stream("target", DataLoader([{"a": 1.0}] * 9, 3)).draw(4, chance()), "must yield points")


@pytest.mark.parametrize("options", [{}, {"shuffle": False, "generator": None}, {"labels": True}, {"drop_last": True}])
def test_a_loader_resumes_exactly(options):
    classes = 3 if options.get("labels") else 0
    whole, twin = (Stream("source", loader(**options), classes) for _ in range(2))
    for k in range(14):
        if k == 8:
            twin.restore({name: t.clone() for name, t in whole.state().items()})
            resumed = [whole.draw(6, chance(), j % 3) for j in range(12)]
            assert all(torch.equal(x, twin.draw(6, chance(), j % 3)) for j, x in enumerate(resumed))
            break
        whole.draw(9, chance(), k % 3)


def test_loaders_that_share_a_generator_resume_too():
    def pair():
        g = chance(3)
        return [Stream(name, loader(batch, generator=g)) for name, batch in (("source", 7), ("target", 11))]

    whole, twins = pair(), pair()
    for k in range(9):
        [stream.draw(8 + 5 * (k % 2), chance()) for stream in whole]
    for stream, twin in zip(whole, twins, strict=True):
        twin.restore({name: t.clone() for name, t in stream.state().items()})
    for _ in range(20):
        for stream, twin in zip(whole, twins, strict=True):
            assert torch.equal(stream.draw(9, chance()), twin.draw(9, chance()))


# --- checkpoints ------------------------------------------------------------------------------------------------------

KINDS = {
    "float": normal(3, 2),
    "double": normal(2).double(),
    "half": normal(4).half(),
    "bfloat": normal(3).bfloat16(),
    "number": torch.tensor(3),
    "one": torch.tensor(0.5),
    "bytes": chance().get_state()[:99],
    "mask": torch.tensor([True, False]),
    "empty": torch.empty(0, 0),
    "turned": normal(4, 3).T,
    "labels": LABELS,
}


def test_a_checkpoint_gives_back_what_was_written(tmp_path):
    notes = {"a": [1, 2.5, None, True], "µ": {"b": "text"}}
    checkpoints.write(tmp_path / "new" / "file", KINDS, notes)
    tensors, read = checkpoints.read(tmp_path / "new" / "file")
    assert read == notes and tensors.keys() == KINDS.keys()
    for name, t in KINDS.items():
        assert tensors[name].dtype == t.dtype and torch.equal(tensors[name], t), name


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path):
    file = tmp_path / "file"
    checkpoints.write(file, {"x": torch.arange(3.0), "k": torch.tensor(7)}, {"step": 1000})
    content = file.read_bytes()
    for k in range(len(content)):
        for damaged in (content[:k], content[:k] + bytes([content[k] ^ 1]) + content[k + 1 :]):
            file.write_bytes(damaged)
            refused(lambda: checkpoints.read(file), "file (is damaged|was not written by nsgf_lite)")


def test_a_run_killed_while_writing_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    checkpoints.write(file, {"x": torch.ones(3)}, {})
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        checkpoints.write(file, {"x": torch.zeros(3)}, {})
    assert torch.equal(checkpoints.read(file)[0]["x"], torch.ones(3)) and len(list(tmp_path.iterdir())) == 2
    checkpoints.sweep(file.parent, file.name)
    assert list(tmp_path.iterdir()) == [file]


def test_the_hash_sees_how_numbers_are_read(tmp_path):
    """Not the bytes alone: the same ones as other numbers, in another shape, or under another name are not the same."""
    x = torch.arange(6, dtype=torch.int32)
    others = [{"x": x.view(torch.float32)}, {"x": x.view(2, 3)}, {"y": x}, {"x": x.view(torch.int16)}]
    marks = {checkpoints.hash_of(tensors) for tensors in ({"x": x}, *others)}
    assert len(marks) == 5 and checkpoints.hash_of({"x": x}, "notes") not in marks
    file = tmp_path / "file"
    checkpoints.write(file, {"x": x}, {})
    with safetensors.safe_open(file, "pt") as opened:
        header = opened.metadata()
    for tensors in others:
        safetensors.torch.save_file(tensors, file, header)
        refused(lambda: checkpoints.read(file), "file is damaged")


def test_the_same_content_makes_the_same_bytes(tmp_path):
    for k in range(9):
        checkpoints.write(tmp_path / str(k), KINDS, {"a": 1, "b": [2, 3]})
    assert len({file.read_bytes() for file in tmp_path.iterdir()}) == 1


def test_what_is_read_is_in_memory_unless_it_is_mapped(tmp_path):
    file = tmp_path / "file"
    checkpoints.write(file, {"x": torch.ones(1000)}, {})
    copied, mapped = (checkpoints.read(file, mapped)[0]["x"] for mapped in (False, True))
    with open(file, "r+b") as out:  # in place
        out.seek(-4000, os.SEEK_END)
        out.write(bytes(4000))
    assert torch.equal(copied, torch.ones(1000)) and torch.equal(mapped, torch.zeros(1000))


def test_a_folder_that_cannot_be_synced_is_no_error(tmp_path, monkeypatch):
    """Windows opens no folder."""
    opened = os.open

    def refuse(path, *given, **options):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "no folders here", path)
        return opened(path, *given, **options)

    monkeypatch.setattr(os, "open", refuse)
    checkpoints.write(tmp_path / "file", {"x": torch.ones(3)}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_path_that_cannot_be_written_is_named_as_it_was_given(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("a file", encoding="utf-8")
    for path in (tmp_path / ("long" * 99), tmp_path / "text" / "file"):
        for attempt in (lambda path=path: checkpoints.write(path, {}, {}), checkpoints.held(path).__enter__):
            with pytest.raises(OSError, match="could not write") as told:
                attempt()
            assert told.value.filename == str(path)

    def read_only(path, *given, **options):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("builtins.open", read_only)
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr(os, "unlink", read_only)
    for attempt in (
        lambda: checkpoints.write(tmp_path / "new", {}, {}),
        lambda: checkpoints.held(tmp_path / "new").__enter__(),
    ):
        with pytest.raises(OSError, match=r"could not write .*\(Permission denied\)") as told:
            attempt()
        assert told.value.filename == str(tmp_path / "new")
    refused(lambda: checkpoints.read(tmp_path), "is a folder, and a file is needed")


def test_foreign_files_are_refused(tmp_path):
    safetensors.torch.save_file({"x": torch.ones(3)}, tmp_path / "theirs")
    refused(lambda: checkpoints.read(tmp_path / "theirs"), "theirs was not written by nsgf_lite")
    (tmp_path / "text").write_text("a text, and not a short one" * 9, encoding="utf-8")
    refused(lambda: checkpoints.read(tmp_path / "text"), "text is damaged or no safetensors file")
    with pytest.raises(FileNotFoundError, match="none"):
        checkpoints.read(tmp_path / "none")
    for foreign in ("theirs", "text"):
        refused(lambda foreign=foreign: nl.FlowMatching().fit(FAR, FAR, checkpoint=tmp_path / foreign), foreign)
