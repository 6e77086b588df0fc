"""The slices of the lanes: they are a partition of the vector, and go from one layout to another."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_halos.core.layout import Layout


@st.composite
def layouts(draw: st.DrawFn, sizes: list[int], num_tensors: int) -> Layout:
    lanes = draw(st.integers(1, 5))
    shards = {}
    for index in draw(st.sets(st.sampled_from(range(len(sizes))))):
        cuts = sorted(draw(st.lists(st.integers(0, sizes[index]), min_size=lanes - 1, max_size=lanes - 1)))
        shards[index] = [stop - start for start, stop in zip([0, *cuts], [*cuts, sizes[index]], strict=True)]
    return Layout.build(sizes, num_tensors, lanes, shards)


@st.composite
def two_layouts(draw: st.DrawFn) -> tuple[Layout, Layout]:
    sizes = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    num_tensors = draw(st.integers(1, len(sizes)))
    return draw(layouts(sizes, num_tensors)), draw(layouts(sizes, num_tensors))


@given(two_layouts())
def test_the_slices_of_all_lanes_are_the_vector(both: tuple[Layout, Layout]) -> None:
    layout, other = both
    vector = torch.arange(layout.elements)
    slices = [layout.cut(vector, lane) for lane in range(layout.lanes)]
    assert torch.equal(layout.join(slices), vector)
    assert torch.equal(torch.cat(slices).sort().values, vector)
    for lane, values in enumerate(slices):
        assert values.tolist() == [e for start, stop in layout.segments(lane) for e in range(start, stop)]
        assert layout.parameters_of(lane) == sum(map(torch.Size.numel, layout.shapes(lane)))
    assert layout == Layout.from_plain(json.loads(json.dumps(layout.to_plain())))

    for lane in range(other.lanes):  # the same slices, made of those of the first layout
        pieces = []
        for tensor, size in enumerate(other.sizes(lane)):
            piece = torch.full([size], -1)
            for move in other.moves(tensor, layout, lane):
                before = torch.split(slices[move.lane], layout.sizes(move.lane))[tensor]
                piece[move.target] = before[move.source]
            pieces.append(piece)
        assert torch.equal(torch.cat(pieces), other.cut(vector, lane))


def test_equal_parts_cut_through_parameters_and_keep_averaged_tensors_behind_them() -> None:
    layout = Layout.build([5, 2, 3], 2, 2)
    assert [layout.segments(lane) for lane in range(2)] == [[(0, 3), (7, 8)], [(3, 7), (8, 10)]]
    assert layout.shapes(0) == [torch.Size([3]), torch.Size([0])]


def test_shards_are_cut_as_the_processes_hold_them() -> None:
    layout = Layout.build([6, 4, 4], 2, 2, {0: [6, 0], 1: [1, 3]})
    assert [layout.segments(lane) for lane in range(2)] == [[(0, 7), (10, 12)], [(7, 10), (12, 14)]]


def test_one_lane_has_the_vector_itself() -> None:
    layout = Layout.build([5, 2, 3], 2, 1)
    assert layout.segments(0) == [(0, 10)]


def test_pieces_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"pieces of tensor 1 have \[1, 1\] elements, but 2 lane\(s\) must share 4"):
        Layout.build([6, 4], 2, 2, {1: [1, 1]})
