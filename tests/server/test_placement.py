"""Which machine a replica goes to."""

from __future__ import annotations

import pytest

from coserve.core import CapacityError, ConfigError
from coserve.server.replicas.fleetsettings import check_fleet
from coserve.server.replicas.placement import Machine, Needs, check_room, needs_of, place, sharers
from coserve.server.settings import ServerConfig


def cpu(name: str, cpus: float = 8, address: str = "") -> Machine:
    return Machine(name, address or name, cpus, 0)


def gpu(name: str, gpus: float, cpus: float = 64) -> Machine:
    return Machine(name, name, cpus, gpus)


@pytest.mark.parametrize(("settings", "machines", "expected"), [
    ({"replicas": 3}, [cpu("a"), cpu("b"), cpu("c")], Needs(8, 0)),
    ({"replicas": 4}, [cpu("a"), cpu("b"), cpu("c", 6)], Needs(3, 0)),
    ({"replicas": 9}, [cpu("a", 2)], Needs(1, 0)),
    ({"replicas": 3, "threads": 5}, [cpu("a")], Needs(5, 0)),
    ({"replicas": 2}, [cpu("a"), cpu("head", 0)], Needs(4, 0)),
    ({"replicas": 2}, [], Needs(1, 0)),
    ({"replicas": 2}, [cpu("head"), gpu("b", 4)], Needs(1, 1)),
    ({"replicas": 2, "device": "cpu"}, [gpu("a", 4), gpu("b", 4)], Needs(64, 0)),
    ({"replicas": 2, "tensor_parallel_size": 4}, [gpu("a", 4), gpu("b", 4)], Needs(4, 4)),
    ({"replicas": 2, "device": "cuda", "threads": 6}, [], Needs(6, 1)),
])
def test_needs(settings: dict[str, object], machines: list[Machine], expected: Needs) -> None:
    assert needs_of(ServerConfig(**settings), machines) == expected  # type: ignore[arg-type]


def test_replicas_go_to_the_machine_with_fewest() -> None:
    machines = [cpu("a", 4), cpu("b", 8), cpu("c", 2)]
    assert place(machines, 3, Needs(2, 0)) == ["b", "a", "c"]
    assert place(machines, 6, Needs(2, 0)) == ["b", "a", "c", "b", "a", "b"]
    assert place(machines, 8, Needs(2, 0))[-1:] == [None], "there is room for seven"
    assert place(machines, 1, Needs(2, 0), ["a", "b", "b"]) == ["c"]
    assert place([gpu("g", 4), cpu("h", 99)], 3, Needs(2, 2)) == ["g", "g", None], "a replica's ranks are on one machine"
    assert place([], 1, Needs(1, 0)) == [None]


def test_too_little_room_is_said_with_figures() -> None:
    check_room([gpu("g", 4)], 2, Needs(2, 2))
    with pytest.raises(CapacityError, match=r"3 replicas of 2 GPUs and 2 CPUs each don't fit \(g: 4 GPUs, 64 CPUs\)"):
        check_room([gpu("g", 4)], 3, Needs(2, 2))


def test_nodes_of_one_machine_share_its_memory() -> None:
    machines = [cpu("a", address="10.0.0.1"), cpu("b", address="10.0.0.1"), cpu("c", address="10.0.0.2")]
    assert sharers(machines, ["a", "b", "c"]) == 2
    assert sharers(machines, [None, "c"]) == 1 == sharers(machines, [])


@pytest.mark.parametrize(("settings", "field"), [
    ({"ray_address": "auto"}, "ray_address"), ({"store": "/x"}, "store"), ({"replicas": 0}, "replicas"),
    ({"replicas": 2, "store": "/x"}, "database_url"),
    ({"replicas": 2, "store": "/x", "database_url": "sqlite:///x"}, "database_url"),
    ({"replicas": 2, "database_url": "postgresql://h/d"}, "store"),
    ({"replicas": 2, "database_url": "postgresql://h/d", "store": "/x", "ray_address": "ray://h:10001"}, "ray_address"),
])
def test_settings_of_a_fleet(settings: dict[str, object], field: str) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: ") as error:
        check_fleet(ServerConfig(**settings))  # type: ignore[arg-type]
    assert error.value.param == field


def test_good_settings_of_a_fleet() -> None:
    check_fleet(ServerConfig())
    check_fleet(ServerConfig(replicas=1, database_url="postgresql+psycopg://h/d", store="s3://b/p", ray_address="h:6379"))
