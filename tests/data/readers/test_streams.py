"""Streams: every image once per epoch, in the same order for any number of processes and after a restart."""
import functools
import http.server
import shutil
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from formats import (
    AUG,
    BATCH,
    HAS,
    Sample,
    caches,  # noqa: F401 - a fixture
    cases,
    needs_webdataset,
    same,
    samples_of,
    together,
    views,
    write_parquet,
    write_saved,
    write_tars,
)

from simsiam_models.data import DataError, Stream, TwoViews, UnreadableError, open_data
from simsiam_models.data.readers import streams as streams_module
from simsiam_models.data.threads import AHEAD

pytestmark = pytest.mark.usefixtures('one_thread')


@pytest.fixture(scope='module')
def samples(few_digits) -> list[Sample]:
    return samples_of(few_digits)


@pytest.fixture(scope='module')
def streams(tmp_path_factory, samples) -> dict[str, str]:
    root = tmp_path_factory.mktemp('streams')
    write_tars(root / 'tars', samples)
    made = {'pipe': f'pipe:cat {root}/tars/shard-{{000..002}}.tar'}
    if HAS['datasets']:
        made['parquet'] = f'hf-stream:{write_parquet(root / "parquet", samples)}'
        made['arrow'] = f'hf-stream:{write_saved(root / "saved", samples)}'
    return made


STREAMS = cases(['parquet', 'arrow', 'pipe'])


@pytest.fixture(params=STREAMS)
def stream(streams, request, monkeypatch) -> Stream:
    monkeypatch.setattr(streams_module, 'BUFFER', 10)
    return open_data(streams[request.param], 64)[0]


def test_a_stream_has_every_image_once_in_an_order_of_each_epoch(stream, samples):
    assert isinstance(stream, Stream) and len(stream) == 64 and stream.labels is None
    assert 'same' in stream.promise and len(stream.digest) == 16
    orders = [list(stream.samples(0, epoch, 0)) for epoch in (0, 1)] + [list(stream.samples(1, 0, 0))]
    files = sorted(data for _, data, _ in samples)
    assert all(sorted(order) == files for order in orders)
    assert orders[0] != orders[1] and orders[0] != orders[2] and orders[0] != [data for _, data, _ in samples]
    assert list(stream.samples(0, 1, 0)) == orders[1] and list(stream.samples(0, 1, 11)) == orders[1][11:]


def test_a_stream_gives_the_same_views_in_any_number_of_processes_and_threads(stream):
    want = views(stream)
    assert len(want) == 4
    for world, workers in ((1, 2), (2, 0), (2, 2), (4, 3)):
        assert same(together(stream, world, workers=workers), want)
    assert same(views(stream, workers=2, start=3), want[3:])
    assert not same(views(stream, epoch=2), want)


class Listed:
    """A stream of the items of a list, in order."""

    name, labels, classes, digest, promise = 'listed', None, [], '0' * 16, 'all of it'

    def __init__(self, items: list, length: int | None = None) -> None:
        self.items, self.length, self.given = items, length or len(items), 0

    def __len__(self) -> int:
        return self.length

    def samples(self, seed: int, epoch: int, start: int) -> Iterator:
        for item in self.items[start:]:
            self.given += 1
            yield item


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('world', [1, 2])
def test_an_unreadable_sample_is_replaced_by_the_next_one_of_its_batch(samples, workers, world):
    data = [data for _, data, _ in samples]
    for i in (2, 3, 7, 31, *range(32, 48)):  # two in a row, the last of a slice and of a batch, a whole batch
        data[i] = b'broken'
    instead = {2: 4, 3: 4, 7: 8, 31: 16}
    clean = [data[instead.get(i, i)] for i in range(64)]
    black = np.zeros((16, 16, 3), np.uint8)
    clean = [black if x == b'broken' else x for x in clean]
    want = views(Listed(clean))
    assert same(together(Listed(data), world, workers=workers, max_unreadable=0.5), want)
    loader = TwoViews(Listed(data), AUG, BATCH, workers=workers, max_unreadable=20 / 64)
    for epoch in (0, 1):  # each epoch counts for itself
        list(loader.epoch(epoch))
        assert sorted(k - 64 * epoch for k in loader.unreadable if k >= 64 * epoch) == [2, 3, 7, 31, *range(32, 48)]
    with pytest.raises(UnreadableError, match='of 64 allowed'):
        list(TwoViews(Listed(data), AUG, BATCH, workers=workers, max_unreadable=19 / 64).epoch(0))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_stream_that_ends_early_says_how_many_images_it_gave(samples, workers):
    source = Listed([data for _, data, _ in samples], 80)
    with pytest.raises(DataError, match='ended after 64 images of epoch 4, but 80 were expected'):
        views(source, epoch=3, workers=workers)


def test_a_stream_is_read_no_further_than_the_batches_ahead(samples):
    source = Listed([samples[1][1]] * 2000)
    steps = TwoViews(source, AUG, BATCH, workers=2).epoch(0)
    for done in range(1, 20):
        next(steps)
        assert source.given <= (done + AHEAD) * BATCH  # and one more while the next batch is finished
    steps.close()
    assert next(TwoViews(source, AUG, BATCH, workers=2).batches(0)).raw is None  # undecoded samples are released


@needs_webdataset
def test_a_single_shard_is_shuffled_differently_each_epoch(streams, monkeypatch):
    monkeypatch.setattr(streams_module, 'BUFFER', 10)
    source, _ = open_data(streams['pipe'].replace('{000..002}', '001'), 21)
    orders = [list(source.samples(seed, epoch, 0)) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1] and orders[0] != orders[2]


@needs_webdataset
def test_a_stream_may_be_shorter_than_its_source(streams):
    source, _ = open_data(streams['pipe'], 40)
    assert len(source) == 40 and len(list(source.samples(0, 0, 0))) == 40
    assert len(views(source)) == 2


@pytest.mark.parametrize('name', STREAMS)
def test_a_stream_of_unknown_length_asks_for_it(streams, name):
    with pytest.raises(ValueError, match='--images-per-epoch N'):
        open_data(streams[name])


@needs_webdataset
@pytest.mark.parametrize('command', ['false', 'head -c 9000 {}/shard-000.tar', 'echo no tar', 'cat {}/nowhere.tar'])
def test_a_stream_that_breaks_off_is_named(tmp_path, samples, command):
    spec = 'pipe:' + command.format(write_tars(tmp_path, samples))
    with pytest.raises(DataError, match='pipe:') as e:
        views(open_data(spec, 64)[0], workers=2)
    assert '\n' not in str(e.value)


@needs_webdataset
@pytest.mark.skipif(shutil.which('curl') is None, reason='webdataset fetches by curl')
def test_shards_are_streamed_from_a_server(tmp_path, samples, streams, monkeypatch):
    write_tars(tmp_path, samples)
    monkeypatch.setenv('NO_PROXY', '127.0.0.1')
    handler = functools.partial(Quiet, directory=tmp_path)
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            url = f'http://127.0.0.1:{server.server_port}/shard-'
            got = views(open_data(f'{url}{{000..002}}.tar', 64)[0], workers=2)
            with pytest.raises(DataError, match='003.tar: the stream broke off'):
                views(open_data(f'{url}003.tar', 64)[0])
        finally:
            server.shutdown()
    assert same(got, views(open_data(streams['pipe'], 64)[0]))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args) -> None:
        pass
