"""The simulated cluster: it counts what it should, and goes by the product's rule."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import cluster_sim
from benchmarks.cluster_sim import Cluster, Variant, load_of, simulate

SIZES = np.array([1 << 30, 2 << 30, 3 << 30, 4 << 30], np.int64)
AFFINE = Variant(0, False)


def test_a_pod_goes_where_its_model_is_once_labels_say_so() -> None:
    cluster = Cluster(50, SIZES, AFFINE, seed=1)
    node = cluster.place(0, 0, True)
    assert cluster.counts.pulls == 1
    # It is on its way there, and no label says so: the next is put away from its like.
    assert cluster.place(0.1, 0, True) != node
    # Both have ended, and the model is on both nodes.
    for each in (node, cluster.place(0.2, 0, True)):
        assert each is not None
    assert cluster.counts.pulls == 3
    for each in range(50):
        while cluster._pods[0, each]:
            cluster.end(0, each)
    assert cluster._state[0, cluster.place(1000, 0, True)] == 2
    assert cluster.counts.pulls == 3


def test_labels_that_lag_are_believed_late() -> None:
    cluster = Cluster(50, SIZES, Variant(300, False), seed=1)
    node = cluster.place(0, 0, True)
    assert node is not None
    cluster.end(0, node)
    assert not cluster._labels(300, 0).any()
    assert cluster._labels(400, 0)[node] == 2


def test_what_is_there_is_neither_pulled_nor_read_again() -> None:
    cluster = Cluster(1, SIZES, AFFINE, seed=1)
    for now_s in (0, 100, 200):
        cluster.place(now_s, 0, True)
    counts = cluster.counts
    assert (counts.starts, counts.pulls, counts.pulled_bytes, counts.from_origin, counts.from_disk) == (3, 1, 1 << 30, 1, 0)
    assert counts.waits_s[1:] == [0.0, 0.0]


def test_memory_and_disk_keep_what_was_used_last() -> None:
    cluster = Cluster(1, SIZES, AFFINE, seed=1)
    for model in (0, 1, 2, 3):
        node = cluster.place(1000.0 * model, model, True)
        assert node == 0
        cluster.end(model, node)
    # Of 8 GiB there is room for the last two.
    assert [int(cluster._state[model, 0]) for model in range(4)] == [1, 1, 2, 2]
    assert cluster._memory_bytes[0] <= cluster_sim.MEMORY_BYTES
    assert sum(cluster._disk_bytes) == int(SIZES.sum())
    cluster.place(9000, 0, True)
    assert (cluster.counts.pulls, cluster.counts.from_disk) == (4, 1)


def test_a_full_cluster_says_so() -> None:
    cluster = Cluster(2, SIZES, AFFINE, seed=1)
    placed = [cluster.place(0, 0, True) for _ in range(2 * cluster_sim.SLOTS + 1)]
    assert None not in placed[:-1]
    assert placed[-1] is None
    assert cluster.counts.no_room == 1


@pytest.mark.parametrize(("nodes", "sampled"), [(50, 50), (100, 100), (1000, 420), (10_000, 500)])
def test_the_scheduler_looks_at_as_many_nodes_as_kubes_does(nodes: int, sampled: int) -> None:
    assert cluster_sim._sampled(nodes) == sampled


def test_equal_seeds_give_equal_counts_and_affinity_pulls_less() -> None:
    load = load_of(3, 60, 100, 10.0)
    spread, affine = (simulate(load, 60, variant, 3) for variant in (Variant(None, False), AFFINE))
    assert spread == simulate(load, 60, Variant(None, False), 3)
    assert spread.starts == affine.starts > 100
    assert affine.pulled_bytes < spread.pulled_bytes
    assert affine.from_origin < spread.from_origin
