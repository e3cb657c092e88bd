"""Do an engine's counters reach its doors without anybody asking for them?"""

from __future__ import annotations

from tests.engine.served import door, eventually, fake_client, serving, stats


def test_the_last_heartbeat_holds_the_counters() -> None:
    client = fake_client()
    with serving(client) as server, door(server.endpoint) as service:
        expected = stats(client.engine) | {"num_dropped_frames": 0}
        eventually(lambda: service.client.last_stats() == expected, "the counters never came")
