"""Are the queue's bounds kept exactly, told with a usable Retry-After, and shared among keys?"""

from __future__ import annotations

import asyncio
import random
import threading

import pytest

from slipstream.serve.admission import Admission, Bounds, OverloadError, Ticket, bounds_for


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def admission(clock: Clock | None = None, **changes: object) -> Admission:
    fields: dict[str, object] = {
        "max_requests": 10,
        "max_tokens": 1000,
        "queued_requests": 8,
        "queued_tokens": 800,
    }
    return Admission(Bounds(**(fields | changes)), clock=clock or Clock())  # type: ignore[arg-type]


def test_the_bounds_of_a_server_are_what_runs_and_what_may_wait() -> None:
    whole = bounds_for(max_batch_size=4, kv_tokens=100, max_queued_requests=6, max_queued_tokens=50)
    assert (whole.max_requests, whole.max_tokens) == (10, 150)
    part = bounds_for(
        max_batch_size=4, kv_tokens=100, max_queued_requests=6, max_queued_tokens=50, num_workers=3
    )
    assert (part.max_requests, part.max_tokens) == (4, 50)


def test_r71_requests_are_bounded_and_come_back() -> None:
    door = admission()
    tickets = [door.admit("", num_requests=1, num_tokens=10) for _ in range(10)]
    with pytest.raises(OverloadError) as full:
        door.admit("", num_requests=1, num_tokens=10)
    assert full.value.status == 429 and full.value.code == "queue_full" and full.value.retry_after_s >= 1
    assert "10" in full.value.message
    tickets.pop().release()
    door.admit("", num_requests=1, num_tokens=10)


def test_r71_tokens_are_bounded() -> None:
    door = admission()
    held = door.admit("", num_requests=1, num_tokens=999)
    door.admit("", num_requests=1, num_tokens=1)
    with pytest.raises(OverloadError, match="prompt tokens"):
        door.admit("", num_requests=1, num_tokens=1)
    held.release()
    door.admit("", num_requests=1, num_tokens=999)


def test_a_fan_out_takes_all_its_places_or_none() -> None:
    door = admission()
    door.admit("", num_requests=8, num_tokens=0)
    with pytest.raises(OverloadError):
        door.admit("", num_requests=3, num_tokens=0)
    assert door.num_requests == 8
    door.admit("", num_requests=2, num_tokens=0)


def test_an_empty_server_takes_what_is_larger_than_its_bounds() -> None:
    door = admission()
    ticket = door.admit("", num_requests=99, num_tokens=10**6)
    with pytest.raises(OverloadError):
        door.admit("", num_requests=1, num_tokens=0)
    ticket.release()
    assert (door.num_requests, door.num_tokens) == (0, 0)


def test_a_ticket_is_released_once_however_often_it_is_asked() -> None:
    door = admission()
    with door.admit("", num_requests=2, num_tokens=5) as ticket:
        ticket.release()
    ticket.release()
    assert (door.num_requests, door.num_tokens) == (0, 0)


def test_r71_retry_after_follows_the_drain_rate() -> None:
    clock = Clock()
    door = admission(clock, max_requests=100)
    tickets = [door.admit("", num_requests=1, num_tokens=0) for _ in range(100)]
    for _ in range(10):  # one release a second
        clock.now += 1.0
        tickets.pop().release()
        tickets.append(door.admit("", num_requests=1, num_tokens=0))
    with pytest.raises(OverloadError) as slow:
        door.admit("", num_requests=20, num_tokens=0)
    assert 15 <= slow.value.retry_after_s <= 25
    for _ in range(90):  # and now a burst of them
        tickets.pop(0).release()
    with pytest.raises(OverloadError) as fast:
        door.admit("", num_requests=99, num_tokens=0)
    assert fast.value.retry_after_s < slow.value.retry_after_s


def test_r81_a_flooding_key_leaves_room_for_the_other() -> None:
    door = admission(per_key_share=0.5, num_keys=2)
    flood: list[Ticket] = []
    # Alone, it gets all but a reserve of the queue.
    flood += [door.admit("loud", num_requests=1, num_tokens=1) for _ in range(9)]
    with pytest.raises(OverloadError) as refused:
        door.admit("loud", num_requests=1, num_tokens=1)
    assert refused.value.code == "key_share_exceeded"
    quiet = door.admit("quiet", num_requests=1, num_tokens=1)
    # The other is there now: the flood drains to its share before it gets anything new.
    for _ in range(4):
        flood.pop().release()
        with pytest.raises(OverloadError):
            door.admit("loud", num_requests=1, num_tokens=1)
    flood.pop().release()
    flood.append(door.admit("loud", num_requests=1, num_tokens=1))
    quiet.release()
    flood += [door.admit("loud", num_requests=1, num_tokens=1) for _ in range(4)]
    assert len(flood) == 9


def test_r81_a_key_that_was_refused_counts_as_waiting_for_a_while() -> None:
    clock = Clock()
    door = admission(clock, per_key_share=0.5, num_keys=2)
    flood = [door.admit("loud", num_requests=1, num_tokens=1) for _ in range(8)]
    with pytest.raises(OverloadError):
        door.admit("quiet", num_requests=3, num_tokens=1)
    flood.pop().release()
    with pytest.raises(OverloadError):
        door.admit("loud", num_requests=1, num_tokens=1)
    clock.now += 11.0
    door.admit("loud", num_requests=1, num_tokens=1)


def test_r81_shares_count_tokens_too() -> None:
    door = admission(per_key_share=0.5, num_keys=2)
    door.admit("quiet", num_requests=1, num_tokens=1)
    door.admit("loud", num_requests=1, num_tokens=500)
    with pytest.raises(OverloadError, match="share"):
        door.admit("loud", num_requests=1, num_tokens=1)


def test_one_key_has_no_share() -> None:
    door = admission(per_key_share=0.5, num_keys=1)
    for _ in range(10):
        door.admit("only", num_requests=1, num_tokens=1)


def test_sums_equal_the_tickets_held_under_threads() -> None:
    door = admission(max_requests=50, max_tokens=4000, per_key_share=0.6, num_keys=3)

    def work(seed: int) -> None:
        rng = random.Random(seed)
        held: list[Ticket] = []
        for _ in range(400):
            if held and rng.random() < 0.5:
                held.pop(rng.randrange(len(held))).release()
                continue
            try:
                held.append(door.admit(f"k{seed % 3}", num_requests=rng.randint(1, 3), num_tokens=seed))
            except OverloadError:
                assert door.num_requests > 0
            assert door.num_requests <= 50
        for ticket in held:
            ticket.release()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert (door.num_requests, door.num_tokens) == (0, 0)
    assert not door._requests and not door._tokens


def test_r71_ramp_keeps_goodput_over_a_slow_engine() -> None:
    """Ten times what a fake engine of 4 places can do: what was admitted is done, the rest is told when."""
    done = largest = 0
    waits: list[int] = []

    async def run() -> None:
        nonlocal done, largest
        door = Admission(Bounds(max_requests=8, max_tokens=10**6, queued_requests=4, queued_tokens=10**6))
        places = asyncio.Semaphore(4)

        async def request() -> None:
            nonlocal done, largest
            try:
                ticket = door.admit("", num_requests=1, num_tokens=1)
            except OverloadError as error:
                waits.append(error.retry_after_s)
                return
            largest = max(largest, door.num_requests)
            with ticket:
                async with places:
                    await asyncio.sleep(0.005)
            done += 1

        tasks: list[asyncio.Task[None]] = []
        for _ in range(40):
            tasks += [asyncio.ensure_future(request()) for _ in range(10)]
            await asyncio.sleep(0.002)
        await asyncio.gather(*tasks)
        assert (door.num_requests, door.num_tokens) == (0, 0)

    asyncio.run(asyncio.wait_for(run(), 30))
    # Without a bound 400 would have been done, after a second and a half of queueing.
    assert largest == 8 and len(waits) > 100 and done + len(waits) == 400 and done >= 8
    assert min(waits) >= 1
