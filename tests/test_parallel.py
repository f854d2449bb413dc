"""engine/parallel: an ordered map over processes that reads no further than it must."""
import os
import time
from functools import partial
from itertools import count, islice

import pytest

from minigpt.engine.parallel import Workers, chunked, ordered_map


def slow_square(scale: int, n: int) -> tuple[int, int]:
    time.sleep(0.05 if n % 3 == 0 else 0)         # so that later ones are done first
    return scale * n * n, os.getpid()


def die(n: int) -> int:
    if n == 3:
        os._exit(1)
    return n


def fail(n: int) -> float:
    return 1 / (n - 3)


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_in_order(workers):
    found = list(ordered_map(partial(slow_square, 2), range(20), workers))
    assert [value for value, _ in found] == [2 * n * n for n in range(20)]
    assert len({pid for _, pid in found}) <= workers and (os.getpid() in {p for _, p in found}) == (workers == 1)


@pytest.mark.parametrize("workers, most", [(1, 1), (2, 6)])
def test_it_reads_no_further_than_it_must(workers, most):
    read = []
    items = (read.append(n) or n for n in count())
    results = ordered_map(abs, items, workers, ahead=3)
    assert list(islice(results, 5)) == list(range(5)) and 5 <= len(read) <= 4 + most
    results.close()


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_the_function_or_of_the_items_is_the_callers(workers):
    results = ordered_map(fail, range(9), workers)
    assert list(islice(results, 3)) == [1 / (n - 3) for n in range(3)]
    with pytest.raises(ZeroDivisionError):
        next(results)

    def broken():
        yield 1
        raise OSError("of the disk")
    with pytest.raises(OSError, match="of the disk"):
        list(ordered_map(abs, broken(), workers))


def test_a_process_that_dies_is_told():
    with pytest.raises(ChildProcessError, match="a worker process died.*__main__.*num_proc=1"):
        list(ordered_map(die, range(9), 2))


def test_workers_stay_up_and_end():
    with pytest.raises(ValueError, match="0 processes"):
        Workers(abs, 0)
    with Workers(partial(slow_square, 1), 1) as pool:
        first, second = ([pid for _, pid in pool.map(range(3))] for _ in range(2))
    assert len({*first, *second}) == 1
    with pytest.raises(RuntimeError):
        list(pool.map([1]))


@pytest.mark.parametrize("size", [1, 4, 10, 1000])
def test_chunks_hold_all_items_and_no_more_than_is_asked_for(size):
    items = ["x" * (n % 5) for n in range(50)]
    chunks = list(chunked(items, size))
    assert sum(chunks, []) == items and all(sum(map(len, c[:-1])) < size <= sum(map(len, c)) for c in chunks[:-1])
    endless = chunked(("ab" for _ in count()), 4)
    assert list(islice(endless, 2)) == [["ab", "ab"]] * 2
    assert list(chunked([3, 1, 2], 3, length=lambda n: n)) == [[3], [1, 2]] and list(chunked([], 3)) == []
