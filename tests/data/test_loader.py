import json

import pytest
import torch
from corpora import write_json_gz

from lrtrain.data.faults import Faults
from lrtrain.data.loader import READ_AHEAD, StreamedTrain
from lrtrain.data.prepare import check_data, prepare_data
from lrtrain.data.sources import JsonStream
from lrtrain.data.streams import Cursor, TokenStream
from lrtrain.errors import ConfigError

BATCH = 12


def global_batches(trains: list, start: int, stop: int, interleaved: bool) -> torch.Tensor:
    """Samples start … stop - 1 put together from the shares of all processes."""
    batches = []
    for position in range(start, stop, BATCH):
        shares = [train.batch(position, BATCH, rank, len(trains)) for rank, train in enumerate(trains)]
        assert all(share.shape == (BATCH // len(trains), 17) for share in shares)
        batches.append(torch.stack(shares, dim=1).flatten(0, 1) if interleaved else torch.cat(shares))
    return torch.cat(batches)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_packed_samples_do_not_depend_on_the_processes(local, world_size):
    train = prepare_data(local(), seed=0).train
    assert torch.equal(global_batches([train] * world_size, 0, 60, interleaved=False), train.batch(0, 60, 0, 1))


def test_packed_positions_run_across_the_edge_of_an_epoch(local):
    data = prepare_data(local(), seed=0)
    assert data.train_tokens is not None
    n = data.train_tokens // 16
    across = data.train.batch(n - 6, 12, 0, 1)
    assert torch.equal(across[:6], data.train.batch(n - 6, 6, 0, 1))
    assert torch.equal(across[6:], data.train.batch(n, 6, 0, 1))
    epochs = [data.train.batch(start, n, 0, 1) for start in (0, n)]
    assert not torch.equal(*epochs)
    assert sorted(epochs[0].tolist()) == sorted(epochs[1].tolist())


def test_another_seed_is_another_order_of_the_same_rows(local):
    first, second = (prepare_data(local(), seed=seed).train.batch(0, 12, 0, 1) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_a_packed_position_needs_no_state(local):
    train = prepare_data(local(), seed=0).train
    assert train.state(0) == {}
    train.load_state({})


def streamed(c4, *overrides: str) -> StreamedTrain:
    train = prepare_data(c4(*overrides), seed=0).train
    assert isinstance(train, StreamedTrain)
    return train


def test_streamed_samples_are_dealt_from_canonical_streams(c4):
    """Sample p is sequence p // K of stream p mod K, and file i belongs to stream i mod K."""
    config = c4()
    data = prepare_data(config, seed=0)
    rows = data.train.batch(0, 48, 0, 1)
    source = JsonStream(**{key: value for key, value in config.source.items() if key != "_target_"})
    for k in range(4):
        stream = TokenStream(source.train_files()[k::4], "text", data.tokenizer, 16, Cursor(), Faults(refuse=True))
        assert rows[k::4].tolist() == [stream.next_sequence().tolist() for _ in range(12)]
    texts = str(data.tokenizer.decode(rows[::4, :-1].flatten())).split("</s>")
    assert texts[0].startswith("0")
    assert [text.split()[0] for text in texts[1:-1]] == [str(i) for i in range(1, len(texts) - 1)]


def test_the_validation_set_of_a_stream_is_the_first_sequences_of_its_files(c4):
    data = prepare_data(c4(), seed=0)
    assert len(data.validation) == 8 and data.train_tokens is None
    assert str(data.tokenizer.decode(data.validation.rows([0])[0])).startswith("0")


@pytest.mark.parametrize("world_size", [2, 4])
def test_streamed_samples_do_not_depend_on_the_processes(c4, world_size):
    alone = global_batches([streamed(c4)], 0, 240, interleaved=True)
    together = global_batches([streamed(c4) for _ in range(world_size)], 0, 240, interleaved=True)
    assert torch.equal(alone, together)


def test_resuming_twice_and_at_other_world_sizes_changes_nothing(c4):
    """720 samples of 16 tokens are several passes over the files of each stream."""
    whole = streamed(c4)
    expected = global_batches([whole], 0, 720, interleaved=True)
    assert all(cursor["epoch"] >= 2 for cursor in whole.state(720)["streams"])

    position, state, parts = 0, streamed(c4).state(0), []
    for stop, world_size in ((132, 1), (276, 2), (420, 1), (720, 4)):
        trains = [streamed(c4) for _ in range(world_size)]
        for train in trains:
            train.load_state(json.loads(json.dumps(state)))
        parts.append(global_batches(trains, position, stop, interleaved=True))
        position, state = stop, merged([train.state(stop) for train in trains])
    assert torch.equal(torch.cat(parts), expected)
    assert state == whole.state(720)


@pytest.mark.parametrize("ahead", range(READ_AHEAD + 2))
def test_a_resume_after_every_batch_changes_nothing(c4, ahead):
    """So a cursor is right at whatever token, row or edge of a file it stands, and where batches were read ahead."""
    expected = global_batches([streamed(c4, "data.streams=1")], 0, 288, interleaved=True)
    train, parts = streamed(c4, "data.streams=1"), []
    for position in range(0, 288, BATCH):
        for i in range(ahead):
            train.batch(position + i * BATCH, BATCH, 0, 1)
        state = train.state(position)
        train.load_state(state)
        assert train.state(position) == state
        parts.append(train.batch(position, BATCH, 0, 1))
    assert torch.equal(torch.cat(parts), expected)


def merged(states: list[dict]) -> dict:
    """What `state` gathers: process d of w knows the streams k with k mod w == d."""
    streams = [states[k % len(states)]["streams"][k] for k in range(4)]
    return {"position": states[0]["position"], "streams": streams}


def test_a_stream_reads_past_what_is_left_out_and_never_goes_back(c4):
    train, whole = streamed(c4), streamed(c4)
    rows = whole.batch(0, 24, 0, 1)
    assert torch.equal(
        torch.cat([train.batch(0, 4, 0, 1), train.batch(20, 4, 0, 1)]), rows[[*range(4), *range(20, 24)]]
    )
    assert train.state(24) == whole.state(24)
    with pytest.raises(RuntimeError, match="at 24, beyond 8"):
        train.batch(8, 4, 0, 1)


def test_streams_that_cannot_be_dealt_evenly_are_named(c4):
    with pytest.raises(ConfigError, match="data.streams=4 must be a multiple of the 3 processes"):
        streamed(c4).batch(0, 12, 0, 3)


def test_another_number_of_streams_than_saved_is_named(c4):
    state = streamed(c4, "data.streams=2").state(0)
    with pytest.raises(ConfigError, match="data.streams=4 must be 2"):
        streamed(c4).load_state(state)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.streams=8", "data.streams=8 must be at most 7, the number of files"),
        ("data.streams=0", "data.streams=0 must be greater than 0, or null"),
        ("data.path=/nope/*.json.gz", "data.path=/nope/.* cannot be listed"),
        ("data.source.validation=/nope/*.gz", "data.source.validation=/nope/.* cannot be listed"),
    ],
)
def test_what_is_wrong_with_a_stream_is_said_before_anything_is_built(c4, override, message):
    with pytest.raises(ConfigError, match=message):
        check_data(c4(override))


def test_a_field_that_a_stream_lacks_is_named(c4):
    with pytest.raises(ConfigError, match="data.text_field=body is not a field of"):
        prepare_data(c4("data.text_field=body"), seed=0)


def test_a_stream_of_empty_texts_ends_with_a_sentence(tmp_path, tokenizer):
    file = write_json_gz(tmp_path / "empty.json.gz", ["", ""])
    with pytest.raises(ConfigError, match="data.on_error=refuse: .*empty.json.gz, the whole file: it holds no text"):
        TokenStream([str(file)], "text", tokenizer, 16, Cursor(), Faults(refuse=True)).next_sequence()
