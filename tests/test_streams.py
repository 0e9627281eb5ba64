"""Pool, streams and checkpoints: what is bounded, what is refused, and what is noticed."""

import math
import os
import resource

import pytest
import safetensors.torch
import torch
from test_bad_input import refused
from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, TensorDataset

import nsgf_lite as nl
from nsgf_lite.training import checkpoints
from nsgf_lite.training.streams import Stream

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


def test_half_precision(tmp_path):
    x, v = flown()
    for folder in (None, tmp_path):
        exact, half = nl.Pool(3), nl.Pool(3, folder, half=True)
        exact.add(x, v)
        half.add(x, v)
        assert half.bound * 2 == exact.bound
        for a, b in zip(exact.sample(500, chance()), half.sample(500, chance()), strict=True):
            assert a.dtype == b.dtype and ((a - b).abs() <= 2**-11 * a.abs() + 2**-25).all()
        before = half.added
        refused(lambda half=half: half.add(x, v * 1e5), "finite, also in half precision")
        assert half.added == before
    exact.add(x, v * 1e5)


def test_the_pool_refuses():
    pool = nl.Pool(3)
    refused(lambda: nl.Pool(0), "capacity must be a positive integer")
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
    (tmp_path / "notes.txt").write_text("the reader's own")
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
    assert torch.equal(stream.draw(60, chance()), POINTS) and repr(stream) == "loader of Forward"
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
    checkpoints.sweep(file)
    assert list(tmp_path.iterdir()) == [file]


def test_foreign_files_are_refused(tmp_path):
    safetensors.torch.save_file({"x": torch.ones(3)}, tmp_path / "theirs")
    refused(lambda: checkpoints.read(tmp_path / "theirs"), "theirs was not written by nsgf_lite")
    (tmp_path / "text").write_text("a text, and not a short one" * 9)
    refused(lambda: checkpoints.read(tmp_path / "text"), "text is damaged or no safetensors file")
    with pytest.raises(FileNotFoundError, match="none"):
        checkpoints.read(tmp_path / "none")
    for foreign in ("theirs", "text"):
        refused(lambda foreign=foreign: nl.FlowMatching().fit(FAR, FAR, checkpoint=tmp_path / foreign), foreign)
