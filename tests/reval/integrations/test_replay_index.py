"""The replay buffer of trainers that keep trajectories in their own store: what leaves, what is drawn."""

import pytest

from reval.integrations.replay import Entry, ReplayIndex


def entries(version: int, count: int) -> list[Entry]:
    return [Entry(f"{version}_{i}", version) for i in range(count)]


def test_the_oldest_leave_when_the_buffer_is_full():
    index = ReplayIndex(5)
    index.admit(entries(1, 3))
    index.admit(entries(0, 3))  # a resumed run may admit in another order
    assert len(index) == 6 and index.evict(1) == ["0_0"] and len(index) == 5
    assert index.evict(1) == []


@pytest.mark.parametrize(("limit", "left"), [(None, {0, 1, 2, 3}), (0, {3}), (1, {2, 3}), (3, {0, 1, 2, 3})])
def test_stale_trajectories_leave(limit, left):
    index = ReplayIndex(100, max_staleness_versions=limit)
    for version in range(4):
        index.admit(entries(version, 2))
    gone = index.evict(3)
    assert {int(key[0]) for key in gone} == {0, 1, 2, 3} - left and len(gone) + len(index) == 8
    assert {e.version for e in index.select(100, "all")} == left
    assert index.staleness(3) == sum(3 - v for v in left) / len(left)


def test_a_draw_has_no_trajectory_twice_and_depends_on_its_name_alone():
    first, second = ReplayIndex(100), ReplayIndex(100)
    first.admit(entries(0, 10) + entries(1, 10))
    second.admit(list(reversed(entries(0, 10) + entries(1, 10))))
    drawn = [e.key for e in first.select(8, "step 3")]
    assert len(set(drawn)) == 8 and drawn == [e.key for e in second.select(8, "step 3")]
    assert drawn != [e.key for e in first.select(8, "step 4")]
    assert drawn != [e.key for e in other_seed(first).select(8, "step 3")]
    counts = [sum(e.version for e in first.select(8, str(i))) for i in range(200)]
    assert 3.6 < sum(counts) / 200 < 4.4  # half of 8, whatever the age: uniform


def other_seed(index: ReplayIndex) -> ReplayIndex:
    out = ReplayIndex(100, seed=1)
    out.admit(index.select(100, "all"))
    return out


def test_select_from_few_gives_all():
    index = ReplayIndex(10)
    assert index.select(3, "") == [] and index.staleness(0) == 0
    index.admit(entries(0, 2))
    assert {e.key for e in index.select(3, "")} == {"0_0", "0_1"}


def test_mistakes_are_refused():
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        ReplayIndex(0)
    with pytest.raises(ValueError, match="max_staleness_versions must be at least 0, or None; got -1"):
        ReplayIndex(1, -1)
    index = ReplayIndex(2)
    index.admit(entries(0, 1))
    with pytest.raises(ValueError, match="already has a trajectory '0_0'"):
        index.admit(entries(0, 1))
