"""Rollouts over pages end as those over lanes do; without a GPU the kernels run in Triton's interpreter."""

from collections import deque

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from model import pool, rollout
from model.cache import Boarding
from model.clock import Clock, Waits
from model.decoder import Decoder
from model.lanes import Lanes, plain_attention_with_lse
from model.pages import PAGE, own, rows_per_tile, shared
from model.settings import DecoderConfig

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SMALL = DecoderConfig(vocab=40, layers=2, width=32, heads=2, kv_heads=1, ff=32, context=150)


def decoder(config: DecoderConfig = SMALL) -> Decoder:
    """Large weights, so that what it attends to matters."""
    torch.manual_seed(0)
    made = Decoder.create(config, 0)
    for weight in made.parameters():
        weight.data.mul_(3.0)
    return made.to(DEVICE)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(2, 2, 32), (6, 2, 16), (3, 1, 24)])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_two_kernels_are_one_attention(heads: int, kv_heads: int, width: int, parts: int) -> None:
    """Rows of windows of 130, 1 and 64 tokens, with 0 to 70 tokens of their own, against the definition."""
    rng = torch.Generator().manual_seed(0)
    lengths, owner, own_tokens = [130, 1, 64], [0, 0, 0, 1, 2, 2], [0, 1, 70, 63, 64, 5]
    many = 12
    pages = torch.randn(2, many + 12, kv_heads, PAGE, width, generator=rng)
    table = torch.arange(9).reshape(3, 3).int()
    own_table = torch.arange(9, 9 + 14).reshape(7, 2).int()
    q, k, v = (torch.randn(7, n, width, generator=rng) for n in (heads, kv_heads, kv_heads))
    members = torch.full((7, rows_per_tile(heads, kv_heads)), -1, dtype=torch.int32)
    for place, window in enumerate((0, 1, 2)):
        rows = [row for row, its in enumerate(owner) if its == window]
        members[place, : len(rows)] = torch.tensor(rows)
    tiles = (members, torch.arange(7).int(), torch.tensor([3]).int())
    on_device = [x.to(DEVICE) for x in (q, k, v, pages, table, own_table)]
    pages_there = on_device[3]
    partial = shared(
        on_device[0], pages_there, on_device[4], torch.tensor(lengths).int().to(DEVICE),
        tuple(x.to(DEVICE) for x in tiles), parts,  # type: ignore[arg-type]
    )  # fmt: skip
    stored = torch.tensor([*own_tokens, -1]).to(DEVICE)
    out = own(tuple(on_device[:3]), pages_there, on_device[5], stored, partial).cpu()  # type: ignore[arg-type]
    for row, (window, held) in enumerate(zip(owner, own_tokens, strict=True)):
        keys, values = (
            torch.cat(
                [
                    pages[kind][table[window].long()].transpose(0, 1).flatten(1, 2)[:, : lengths[window]],
                    pages[kind][own_table[row].long()].transpose(0, 1).flatten(1, 2)[:, :held],
                    newest[row][:, None],
                ],
                1,
            )
            for kind, newest in ((0, k), (1, v))
        )
        expected, _ = plain_attention_with_lse(q[row].unflatten(0, (kv_heads, -1)), keys, values, None)
        torch.testing.assert_close(out[row], expected.flatten(0, 1), atol=1e-5, rtol=1e-5)
        stored_at = own_table[row, held // PAGE]
        torch.testing.assert_close(pages_there[0, stored_at, :, held % PAGE].cpu(), k[row])


def test_pages_go_round_and_no_row_is_lost() -> None:
    """Few pages: windows board in parts and wait; every page comes back."""
    made = pool.Pool(decoder(), most=8, room=70, windows=[100] * 3, precision="fp32")
    made._free, made._available = made._free[:7].copy(), 7
    waiting = deque(Boarding(np.arange(n) % 40, np.arange(rows) + 10 * n) for n, rows in ((30, 2), (100, 4), (20, 2)))
    taken = made.take(waiting)
    assert [task.rows.tolist() for task in taken] == [[300, 301]]
    made.board(taken)
    assert made._available == 7 - 1 - 2 * 2
    assert made.take(waiting) == []
    made.drop(np.array([300]))
    assert made.rows.tolist() == [301]
    made.drop(np.array([301]))
    assert made._available == 7
    taken = made.take(waiting)
    assert [task.rows.tolist() for task in taken] == [[1000, 1001, 1002, 1003]]
    made.board(taken)
    assert made.positions().tolist() == [100] * 4
    assert made._available == 7 - 2 - 4


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_rollouts_over_pages_are_those_over_lanes(monkeypatch: pytest.MonkeyPatch, kv_heads: int) -> None:
    """Rows end at different times, prompts wait, windows overflow and slide: the same tokens, one by one."""
    config = DecoderConfig(vocab=40, layers=2, width=32, heads=2, kv_heads=kv_heads, ff=32, context=90)
    clock = Clock(
        waits=Waits.of(np.arange(12), np.full((12, 1), 3_600_000_000), 40), eot=1, never=np.arange(40) == 0,
        is_static=np.zeros(40, bool), is_age=np.zeros(40, bool),
    )  # fmt: skip
    prompts = [rollout.Prompt(np.arange(3, 3 + n) % 37 + 3) for n in (80, 9, 66)]
    stop = rollout.Stop([np.arange(40) == 20], None, 14)
    made = decoder(config)

    def sampled(cache: type) -> rollout.Rollouts:
        def built(*args: object) -> object:
            most, lengths = args[1], args[3]
            return Lanes(made, most) if cache is Lanes else pool.Pool(made, most, 15, lengths, "fp32")  # type: ignore[arg-type]

        monkeypatch.setattr(rollout, "_cache", built)
        return rollout.rollout(made, clock, prompts, trajectories=3, stop=stop, seed=5, batch_rows=6, keep_tokens=True)

    over_lanes, over_pages = sampled(Lanes), sampled(pool.Pool)
    assert over_lanes.tokens is not None
    assert over_pages.tokens is not None
    assert over_pages.tokens.tolist() == over_lanes.tokens.tolist()
    assert {rollout.Reason.EVENT, rollout.Reason.CAP} <= set(over_lanes.reason.ravel().tolist())
    np.testing.assert_allclose(over_pages.chances, over_lanes.chances, atol=1e-4)


def test_graphs_have_few_sizes() -> None:
    sizes = {pool._graph_size(rows, 1600) for rows in range(1, 1601)}
    assert len(sizes) <= 17
    assert all(pool._graph_size(rows, 1600) >= rows for rows in range(1, 1601))
    assert all(pool._graph_size(rows, 1600) <= 1.5 * rows for rows in range(8, 1601))
