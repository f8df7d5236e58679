"""The two stores hold the same tokens, and a table says which."""

import pytest
import torch

from peft_pte.cache.slots import KeyValue, SlotBuffer, SlotChunks, SlotTable


def make_tokens(count, start=0):
    values = torch.arange(start, start + count, dtype=torch.float64)
    part = values[None, None, :, None].expand(2, 3, count, 4) + torch.arange(3)[None, :, None, None] * 0.25
    return KeyValue(part.clone(), -part)


@pytest.fixture(params=["buffer", "chunks"])
def store(request):
    tokens = make_tokens(3)
    store = SlotBuffer(tokens, 9) if request.param == "buffer" else SlotChunks()
    store.append(tokens)
    store.append(make_tokens(6, 3))
    return store


def held(store):
    return store.view().keys[0, 0, :, 0].tolist()


def test_append_and_view(store):
    assert store.length == 9
    assert held(store) == list(range(9))
    assert torch.equal(store.view().values, -store.view().keys)


def test_evict_oldest(store):
    evicted = store.evict_oldest(prompt=3, evict=2)
    assert evicted.keys[0, 0, :, 0].tolist() == [3, 4]
    assert held(store) == [0, 1, 2, 5, 6, 7, 8]
    store.append(make_tokens(2, 20))
    assert held(store) == [0, 1, 2, 5, 6, 7, 8, 20, 21]
    # What was handed over is not overwritten later.
    assert evicted.keys[0, 0, :, 0].tolist() == [3, 4]


def test_evict_per_head(store):
    leave = torch.tensor([[0, 5], [1, 2], [3, 4]]).expand(2, 3, 2)
    stay = torch.tensor([[1, 2, 3, 4], [0, 3, 4, 5], [0, 1, 2, 5]]).expand(2, 3, 4)
    evicted = store.evict_at(3, leave, stay)
    assert evicted.keys[0, :, :, 0].tolist() == [[3, 8], [4.25, 5.25], [6.5, 7.5]]
    assert store.view().keys[1, 1, :, 0].tolist() == [0.25, 1.25, 2.25, 3.25, 6.25, 7.25, 8.25]


def test_crop(store):
    store.crop(4)
    assert held(store) == list(range(5))


def test_map(store):
    store.map(lambda part: part[:1])
    assert store.view().keys.shape[0] == 1


def test_chunks_keep_what_a_snapshot_holds():
    store = SlotChunks((make_tokens(4),))
    snapshot = store.chunks
    store.append(make_tokens(2, 4))
    store.evict_oldest(0, 3)
    assert SlotChunks(snapshot).view().keys[0, 0, :, 0].tolist() == [0, 1, 2, 3]


def test_table():
    table = SlotTable.empty(2, 1, 6, masked=False, device=torch.device("cpu"))
    table = table.append(torch.tensor([[4, 5, 6], [1, 2, 3]]), None)
    table = table.append(torch.tensor([[7, 8], [4, 4]]), torch.tensor([[True, True], [True, False]]))
    assert table.count == 5
    assert table.used()[0][:, 0].tolist() == [[4, 5, 6, 7, 8], [1, 2, 3, 4, 4]]
    assert table.used()[1][:, 0].tolist() == [[True] * 5, [True] * 4 + [False]]
    positions, valid, rest = table.evict_oldest(2)
    assert positions[:, 0].tolist() == [[4, 5], [1, 2]]
    assert valid.all()
    assert rest.used()[0][:, 0].tolist() == [[6, 7, 8], [3, 4, 4]]
    assert table.count == 5
    assert rest.positions.shape == table.positions.shape
    assert table.crop(1).used()[0].shape[-1] == 4
