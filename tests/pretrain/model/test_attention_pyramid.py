"""The pyramid of landmarks: what is seen, against loops over its formulas, its bound, and its properties in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from pretrain.model.attention import blockwise
from pretrain.model.attention.blockwise import Window
from pretrain.model.attention.causal_nystrom import causal_nystrom_attention, landmark_queries, pool_segments
from pretrain.model.attention.pyramid import Level, Pyramid, all_levels

PYRAMIDS = [Pyramid(2, 1, 2), Pyramid(9, 1, 2), Pyramid(9, 2, 3), Pyramid(3, 3, 2)]
C = 2


def inputs(*shape: int, requires_grad: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape, dtype=torch.float64, requires_grad=requires_grad) for _ in range(3)]


def attend(q: Tensor, k: Tensor, v: Tensor, pyramid: Pyramid, w: int = 2, weighted: bool = True) -> Tensor:
    return causal_nystrom_attention(q, k, v, window=Window(C, w), weighted=weighted, pyramid=pyramid)


class Node:
    """A landmark, or a parent of nodes; one head."""

    def __init__(
        self, query: Tensor, k: Tensor, v: Tensor, mass: Tensor, first: int, last: int, weighted: bool
    ) -> None:
        """Over entries k, v (n, d) of masses (n,), for segments ``first`` to ``last`` - 1."""
        s = query.shape[0] ** -0.5
        logits = s * k @ query + mass
        p = logits.softmax(0)
        self.query, self.first, self.last = query, first, last
        self.key = p @ k if weighted else k.mean(0)
        self.mass = logits.logsumexp(0) - s * query @ self.key
        self.value = p @ v


def formula(q: Tensor, k: Tensor, v: Tensor, w: int, pyramid: Pyramid, weighted: bool) -> Tensor:
    """One head (n, d), token by token: the definition in the module's docstring, with sets of segments."""
    (n, d), r = q.shape, pyramid.branching
    levels: list[dict[int, Node]] = [{}]
    for j in range(n // C):
        part = slice(j * C, (j + 1) * C)
        levels[0][j] = Node(q[part].mean(0), k[part], v[part], torch.zeros(C, dtype=q.dtype), j, j + 1, weighted)
    while len(levels) < pyramid.levels and len(levels[-1]) >= r:
        above = {}
        for j in range(len(levels[-1]) // r):
            below = [levels[-1][j * r + i] for i in range(r)]
            query = torch.stack([x.query for x in below]).mean(0)
            stacks = [torch.stack([getattr(x, name) for x in below]) for name in ("key", "value", "mass")]
            above[j] = Node(query, *stacks, below[0].first, below[-1].last, weighted)
        levels.append(above)
    out = []
    for t in range(n):
        edge = start = max(t // C - w + 1, 0)
        seen: list[Node] = []
        for level in range(pyramid.levels):
            span = r**level
            last = level == pyramid.levels - 1
            beyond = 0 if last else max(0, edge - pyramid.band * span) // (span * r) * span * r
            seen += [levels[level][j] for j in range(beyond // span, edge // span)]
            edge = beyond
            if edge == 0:
                break
        assert sorted(x for node in seen for x in range(node.first, node.last)) == list(range(start))
        window = slice(start * C, t + 1)
        logits = [d**-0.5 * k[window] @ q[t], *((d**-0.5 * q[t] @ x.key + x.mass)[None] for x in seen)]
        out.append(torch.cat(logits).softmax(0) @ torch.cat([v[window], *(x.value[None] for x in seen)]))
    return torch.stack(out)


@pytest.mark.parametrize("tile", [2**20, 2000], ids=["large-tiles", "small-tiles"])
@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize("weighted", [True, False])
def test_equals_the_formulas(monkeypatch: pytest.MonkeyPatch, tile: int, pyramid: Pyramid, weighted: bool) -> None:
    monkeypatch.setitem(blockwise._TILE_BYTES, "cpu", tile)
    for w, n in ((1, 45), (2, 9), (2, 60), (3, 31)):
        q, k, v = inputs(1, 2, n, 4)
        got = attend(q, k, v, pyramid, w, weighted)
        for head in range(2):
            expected = formula(q[0, head], k[0, head], v[0, head], w, pyramid, weighted)
            torch.testing.assert_close(got[0, head], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("band", [1, 2, 5])
@pytest.mark.parametrize("branching", [2, 3, 5])
def test_every_segment_is_seen_once_in_about_b_log_n_entries(band: int, branching: int) -> None:
    for levels in (1, 2, 3, 40):
        pyramid = Pyramid(levels, band, branching)
        firsts, lasts = pyramid.columns(torch.arange(200), len(pyramid.edges(199)) - 1)
        for far in range(200):
            ranges = pyramid.ranges(far)
            spans = [branching**level for level in range(len(ranges))]
            covered = [range(a * span, b * span) for span, (a, b) in zip(spans, ranges, strict=True)]
            assert [x for part in reversed(covered) for x in part] == list(range(far))
            assert all(band <= b - a < band + branching for a, b in ranges[:-1])
            assert len(ranges) <= levels
            if levels == 40 and ranges:
                assert ranges[-1][1] - ranges[-1][0] < band + branching
            by_tensor = [(int(a), int(b)) for a, b in zip(firsts[:, far], lasts[:, far], strict=True) if a < b]
            assert by_tensor == ranges


def test_the_page_counts_the_entries_as_they_are() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "pyramid.md").read_text(encoding="utf-8")
    table = page.split("Entries beyond the window")[1].split("\n\n")[1]
    lengths, _, flat, pyramid = (
        [int(cell.replace(",", "")) for cell in row.split("|")[2:-1] if cell.strip("- ")] for row in table.splitlines()
    )
    assert flat == [Pyramid().seen(n // 64 - 2) for n in lengths]
    assert pyramid == [Pyramid(64, 16, 2).seen(n // 64 - 2) for n in lengths]


def test_one_level_is_the_flat_form_to_the_bit() -> None:
    q, k, v = inputs(2, 2, 61, 4)
    flat = causal_nystrom_attention(q, k, v, window=Window(C, 2))
    assert torch.equal(attend(q, k, v, Pyramid(1, 3, 4)), flat)
    assert torch.equal(attend(q, k, v, Pyramid(9, 40, 2)), flat)  # a band that no text here leaves
    assert not torch.equal(attend(q, k, v, Pyramid(9, 4, 2)), flat)


@pytest.mark.parametrize("pyramid", PYRAMIDS)
@pytest.mark.parametrize("scale", [0.3, 3])
def test_a_node_never_weighs_more_than_its_tokens(pyramid: Pyramid, scale: float) -> None:
    torch.manual_seed(1)
    q, k = scale * torch.randn(2, 4, 96 * C, 5, dtype=torch.float64)
    queries = landmark_queries(q[None], C, None)[0]
    landmarks = Level(queries, *pool_segments(queries, k.unflatten(1, (-1, C)), k.unflatten(1, (-1, C)), weighted=True))
    probes = 1.3 * scale * torch.randn(500, 5, dtype=torch.float64)
    depth = 0
    for level, nodes in enumerate(all_levels(landmarks, pyramid)):
        tokens = C * pyramid.branching**level
        count = nodes.keys.shape[1]
        logits = 5**-0.5 * torch.einsum("pd,bjtd->pbjt", probes, k[:, : count * tokens].unflatten(1, (count, tokens)))
        truth = logits.logsumexp(dim=-1)
        weight = 5**-0.5 * torch.einsum("pd,bjd->pbj", probes, nodes.keys) + nodes.mass
        assert (weight <= truth + 1e-12).all()
        if scale < 1:
            assert (truth - weight).amin() < 0.02  # and it is near where keys differ little
        depth = level
    assert depth == len(pyramid.edges(96)) - 2 >= 1


@pytest.mark.parametrize("pyramid", PYRAMIDS)
def test_no_gradient_from_the_future_and_no_effect_of_what_follows(pyramid: Pyramid) -> None:
    q, k, v = inputs(1, 1, 40, 4, requires_grad=True)
    out = attend(q, k, v, pyramid)
    for t in (0, 7, 20, 33):
        for grad in torch.autograd.grad(out[0, 0, t].sum(), (q, k, v), retain_graph=True):
            assert (grad[0, 0, t + 1 :] == 0).all()
        whole = torch.autograd.grad(out[0, 0, t].sum(), v, retain_graph=True)[0]
        assert (whole[0, 0, : t + 1] != 0).any(-1).all()  # all of the past is seen
    with torch.no_grad():
        for n in (13, 27, 39):
            prefix = attend(q[:, :, :n], k[:, :, :n], v[:, :, :n], pyramid)
            torch.testing.assert_close(prefix, out[:, :, :n], rtol=0, atol=1e-13)


@pytest.mark.parametrize(("pyramid", "weighted"), [(PYRAMIDS[1], True), (PYRAMIDS[2], False)])
def test_gradients(monkeypatch: pytest.MonkeyPatch, pyramid: Pyramid, weighted: bool) -> None:
    monkeypatch.setitem(blockwise._TILE_BYTES, "cpu", 3000)
    tensors = inputs(1, 1, 19, 2, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, k, v: attend(q, k, v, pyramid, 1, weighted), tensors)


def test_constants_are_reproduced_and_equal_keys_are_exact() -> None:
    q, k, v = inputs(1, 2, 64, 4)
    pyramid = Pyramid(9, 2, 2)
    torch.testing.assert_close(attend(q, k, torch.ones_like(v), pyramid), torch.ones_like(v), rtol=0, atol=1e-13)
    same = k[:, :, :1].expand_as(k).contiguous()
    exact = torch.nn.functional.scaled_dot_product_attention(q, same, v, is_causal=True)
    torch.testing.assert_close(attend(q, same, v, pyramid), exact, rtol=0, atol=1e-13)
