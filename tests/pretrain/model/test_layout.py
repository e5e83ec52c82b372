"""Layout: taking a batch apart into rectangles of sequences and putting it together again."""

from __future__ import annotations

import pytest
import torch

from pretrain.model import Layout
from pretrain.model.attention.layout import even_segments

CPU = torch.device("cpu")


def ids_of(*rows: list[tuple[int, int]]) -> torch.Tensor:
    """Rows of (document id, tokens) runs."""
    return torch.tensor([[i for i, n in row for _ in range(n)] for row in rows])


def roundtrip(layout: Layout, causal: bool, landmarks: int | None) -> None:
    x = torch.arange(layout.batch * layout.length * 2, dtype=torch.float64).view(layout.batch, layout.length, 2, 1) + 1
    partition = layout.partition(CPU, causal=causal, num_landmarks=landmarks)
    merged = partition.merge([r.take(x) for r in partition.rectangles], x)
    if partition.slots is None:
        assert torch.equal(merged, x)
        return
    real = torch.zeros(layout.batch * layout.length, dtype=torch.bool)
    assert layout.starts is not None
    assert layout.lengths is not None
    for start, length in zip(layout.starts, layout.lengths, strict=True):
        real[start : start + length] = True
    real = real.view(layout.batch, layout.length)
    assert torch.equal(merged[real], x[real])
    assert (merged[~real] == 0).all()


def test_full_rows_build_no_index_and_no_mask() -> None:
    layout = Layout.full(3, 100)
    (rectangle,) = layout.partition(CPU, causal=False, num_landmarks=8).rectangles
    assert (rectangle.index, rectangle.mask, rectangle.segments) == (None, None, None)
    assert torch.equal(layout.positions(CPU), torch.arange(100)[None])


def test_rows_without_padding_are_recognised_as_full() -> None:
    assert Layout.from_lengths([7, 7], 7).is_full
    assert Layout.from_documents(torch.zeros(2, 7, dtype=torch.int64)).is_full
    assert not Layout.from_lengths([7, 6], 7).is_full
    assert not Layout.from_documents(ids_of([(0, 3), (1, 4)], [(0, 7)])).is_full


def test_documents_are_runs_of_one_id_and_negative_is_padding() -> None:
    layout = Layout.from_documents(ids_of([(-1, 2), (5, 3), (9, 1), (-1, 1), (5, 2)], [(5, 9)]))
    assert layout.starts is not None
    assert layout.lengths is not None
    assert layout.starts.tolist() == [2, 5, 7, 9]
    assert layout.lengths.tolist() == [3, 1, 2, 9]
    assert layout.positions(CPU).tolist() == [[0, 0, 0, 1, 2, 0, 0, 0, 1], list(range(9))]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("landmarks", [None, 4, 64])
def test_taking_apart_and_merging_is_the_identity_on_real_tokens(causal: bool, landmarks: int | None) -> None:
    roundtrip(Layout.from_lengths([0, 1, 5, 40, 17], 40), causal, landmarks)
    roundtrip(Layout.from_lengths([3, 4], 9), causal, landmarks)
    roundtrip(Layout.from_documents(ids_of([(-1, 2), (0, 30), (1, 1)], [(0, 9), (1, 24)])), causal, landmarks)


def test_short_sequences_never_share_a_rectangle_with_longer_ones_than_the_landmarks() -> None:
    """Up to m, below 2 m, below 4 m, and so on: attention is exact up to m or below 2 m."""
    layout = Layout.from_lengths([3, 4, 5, 7, 8, 15, 16, 33], 40)
    rectangles = layout.partition(CPU, causal=False, num_landmarks=4).rectangles
    assert [r.longest for r in rectangles] == [4, 7, 15, 16, 33]
    assert [r.length for r in rectangles] == [4, 7, 15, 16, 33]


def test_segments_depend_on_the_sequence_alone_and_hold_every_token_once() -> None:
    (alone,) = Layout.from_lengths([10], 11).partition(CPU, causal=False, num_landmarks=4).rectangles
    (both,) = Layout.from_lengths([10, 15], 16).partition(CPU, causal=False, num_landmarks=4).rectangles
    assert alone.segments is not None
    assert both.segments is not None
    assert alone.segments.sizes.tolist() == [[2, 3, 2, 3]]
    assert torch.equal(alone.segments.sizes[0], both.segments.sizes[0])
    for row, n in enumerate((10, 15)):
        tokens, sizes = both.segments.tokens[row], both.segments.sizes[row]
        held = [int(t) for segment, size in zip(tokens, sizes, strict=True) for t in segment[:size]]
        assert held == list(range(n))


@pytest.mark.parametrize("m", [1, 4, 64])
def test_every_length_has_as_many_segments_as_landmarks_and_none_much_longer(m: int) -> None:
    lengths = torch.arange(m, 4 * m + 2)
    sizes = even_segments(lengths, m, 4 * m + 1).sizes
    assert torch.equal(sizes.sum(1), lengths)
    assert (sizes.amax(1) - sizes.amin(1)).tolist() == [int(n % m > 0) for n in lengths]
    assert (sizes.amin(1) == lengths // m).all()


def test_right_padded_causal_rows_need_no_masks_and_are_not_taken_apart() -> None:
    partition = Layout.from_lengths([1, 30, 700], 1000).partition(CPU, causal=True)
    (rectangle,) = partition.rectangles
    assert partition.slots is None
    assert rectangle.index is None
    assert rectangle.mask is None


def test_derived_tensors_are_built_once() -> None:
    layout = Layout.from_lengths([3, 90], 90)
    assert layout.partition(CPU, causal=False) is layout.partition(CPU, causal=False)
    assert layout.positions(CPU) is layout.positions(CPU)


def test_wrong_shapes_and_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 8\]"):
        Layout.from_lengths([9], 8)
    with pytest.raises(ValueError, match=r"\[0, 8\]"):
        Layout.from_lengths([-1], 8)
    with pytest.raises(ValueError, match="one dimension"):
        Layout.from_lengths(torch.ones(2, 2), 8)
    with pytest.raises(ValueError, match="batch, length"):
        Layout.from_documents(torch.zeros(8))
