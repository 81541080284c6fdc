"""The start-up self-test of a run on several ranks: who is there, over which interface, and does a sum arrive?

`check_in` runs before the process group forms, because forming it with a rank missing only hangs. What ranks tell each
other goes through the store that torchrun's environment names: rank 0 waits for all keys, the others for one, so that
the traffic grows with the number of ranks and not with its square.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from muonlm.config.errors import UserError

SUM_TIMEOUT_S = 60.0
"""How long the ranks wait for their first sum, or `dist.timeout_s` where that is shorter."""

_SUM_BYTES = 4 << 20
_REMIND_S = 30.0
_GRACE_S = 10.0
_ALL_HERE = "muonlm/all_here"


@dataclass(frozen=True)
class Place:
    """Where a rank runs: `address` and `interface` are those of its socket traffic with other hosts."""

    host: str
    device: str
    interface: str
    address: str

    def __str__(self) -> str:
        return f"{self.host}, {self.device}, {self.interface} {self.address}"


def connect(rank: int, size: int, timeout_s: float) -> dist.Store:
    """The store at MASTER_ADDR:MASTER_PORT; rank 0 serves it unless torchrun does. Raises what torch raises.

    Unlike torch's own rendezvous it does not wait for all ranks, because that could not say which ones are missing.
    """
    try:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    except (KeyError, ValueError):
        raise UserError(
            f"WORLD_SIZE is {size}, but MASTER_ADDR and MASTER_PORT do not name a place to meet; start ranks with "
            "torchrun"
        ) from None
    is_served = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return dist.TCPStore(
        address,
        port,
        size,
        is_master=rank == 0 and not is_served,
        timeout=timedelta(seconds=timeout_s),
        wait_for_workers=False,
        multi_tenant=True,
    )


def check_in(store: dist.Store, rank: int, size: int, here: Place, timeout_s: float) -> list[Place]:
    """Tell the others where this rank runs, wait for all, and return the places of all ranks on rank 0, else [].

    Rank 0 names on stderr whom it waits for. Raises UserError that names the ranks that did not come within
    `timeout_s`.
    """
    store.set(_place_key(rank), json.dumps(asdict(here)))
    begin = time.monotonic()
    keys = [_place_key(other) for other in range(size)]
    awaited = keys if rank == 0 else [_ALL_HERE]
    # Rank 0 is the first to give up, so that its message comes before the others'.
    limit_s = timeout_s if rank == 0 else timeout_s + _GRACE_S
    remind = (lambda: _remind(store, keys, begin)) if rank == 0 else None
    if not _poll(lambda: store.check(awaited), limit_s, remind):
        missing = _without(store, keys)
        raise UserError(
            f"{_ranks(missing or [0])} of {size} did not come within {timeout_s:g} s (dist.timeout_s). Those that did: "
            f"{_table(_places(store, keys, missing))}. Look at what the missing ranks printed: they ended, still load, "
            f"or cannot reach {_meeting_place()}"
        )
    if rank != 0:
        return []
    store.set(_ALL_HERE, "")
    return [place for _, place in _places(store, keys, [])]


def check_routes(places: list[Place], backend: str) -> None:
    """Refuse gloo over a loopback address between hosts; rank 0 calls it. Raises UserError with the setting to make."""
    hosts = {place.host for place in places}
    looped = [rank for rank, place in enumerate(places) if place.address.startswith("127.") or place.address == "::1"]
    if backend == "gloo" and len(hosts) > 1 and looped:
        raise UserError(
            f"{_ranks(looped)} would use gloo over {places[looped[0]].address}, which other hosts cannot reach: the "
            f"name {places[looped[0]].host} resolves to it there. Name the interface that the hosts share on each of "
            f"them: GLOO_SOCKET_IFNAME={_interface_to(_master_address())[0]}, for example"
        )


def first_sum(store: dist.Store, rank: int, size: int, device: torch.device, timeout_s: float) -> float:
    """Add 4 MiB of ones over all ranks, twice, and return the seconds of the second sum.

    Two all_reduce of 4 MiB in fp32. Raises UserError that names the ranks that did not take part within
    `min(60, timeout_s)` seconds, and when the sum is wrong.
    """
    limit_s = min(SUM_TIMEOUT_S, timeout_s)
    # Shorter than the group's own under gloo, which lets no process end while it waits; longer than the wait under
    # NCCL, whose watchdog ends the process without a message.
    options = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=limit_s if device.type == "cpu" else limit_s + 30)
    group = dist.group.WORLD
    assert group is not None
    store.set(f"muonlm/adding/{rank}", "")
    for _ in range(2):  # the first one makes connections
        ones = torch.ones(_SUM_BYTES // 4, device=device)
        begin = time.perf_counter()
        work = group.allreduce([ones], options)
        is_in_time = _poll(work.is_completed, limit_s + 1)
        try:
            if is_in_time:
                work.wait()
        except RuntimeError as error:
            if time.perf_counter() - begin < 0.9 * limit_s:
                raise UserError(f"rank {rank} of {size}: the first all-reduce failed: {error}") from error
            is_in_time = False
        if not is_in_time:
            raise UserError(_why_no_sum(store, size, limit_s))
        if not bool((ones == size).all()):
            raise UserError(
                f"rank {rank}: the sum of ones over {size} ranks is {float(ones.min()):g} to {float(ones.max()):g}: "
                "a network card, a GPU or its driver is broken"
            )
        seconds = time.perf_counter() - begin
    return seconds


def summary(places: list[Place], backend: str, seconds: float) -> str:
    """One line for the whole, then one for each host; the line alone where there is one host."""
    hosts = list(dict.fromkeys(place.host for place in places))
    size = len(places)
    # A ring sends 2 (D - 1) / D of the bytes.
    gigabytes = 2 * (size - 1) / size * _SUM_BYTES / seconds / 1e9
    rate = f"{gigabytes:.2g} GB/s" if seconds else "at once"
    head = (
        f"start-up: {size} ranks over {backend} on {len(hosts)} host{'s' * (len(hosts) > 1)}; "
        f"4 MiB all-reduce {1e3 * seconds:.1f} ms ({rate} a rank)"
    )
    separator = ": " if len(hosts) == 1 else "\n  "
    return head + separator + _table(list(enumerate(places)), separator)


def find_place(device: torch.device, backend: str) -> Place:
    """Where this rank runs, and the interface that `backend` takes: the one set for it, else its own choice.

    gloo takes the address that the host's name resolves to, and loopback where it resolves to none. NCCL's choice is
    not visible from outside; shown is the interface that reaches MASTER_ADDR.
    """
    host = socket.gethostname()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    chosen = os.environ.get(f"{backend.upper()}_SOCKET_IFNAME", "")
    if chosen:
        return Place(host, name, chosen, dict(_addresses()).get(chosen, "of any kind"))
    if backend == "gloo":
        address = _bindable_address(host)
        interface = next((name for name, own in _addresses() if own == address), "interface unknown")
    else:
        interface, address = _interface_to(_master_address())
    return Place(host, name, interface, address)


def _why_no_sum(store: dist.Store, size: int, limit_s: float) -> str:
    keys = [_place_key(rank) for rank in range(size)]
    silent = _without(store, [f"muonlm/adding/{rank}" for rank in range(size)])
    who = dict(_places(store, keys, []))
    if silent:
        lines = "; ".join(f"rank {rank}: {who[rank]}" for rank in silent)
        return (
            f"{_ranks(silent)} of {size} joined but did not take part in the first all-reduce within {limit_s:g} s "
            f"({lines}). Look at what they printed, and whether these processes still run"
        )
    return (
        f"all {size} ranks are there, but their first all-reduce did not end within {limit_s:g} s: "
        f"{_table(list(who.items()))}. The interfaces may not reach each other, or a firewall is between them: set "
        "GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME to one that does; NCCL_DEBUG=INFO shows what NCCL tries"
    )


def _poll(is_done: Callable[[], bool], limit_s: float, remind: Callable[[], None] | None = None) -> bool:
    """Ask until it is done; False after `limit_s`. Calls `remind` every half minute."""
    begin = time.monotonic()
    pause, next_reminder = 0.0002, _REMIND_S
    while not is_done():
        elapsed = time.monotonic() - begin
        if elapsed > limit_s:
            return False
        if remind is not None and elapsed > next_reminder:
            next_reminder += _REMIND_S
            remind()
        time.sleep(pause)
        pause = min(1.3 * pause, 0.1)
    return True


def _remind(store: dist.Store, keys: list[str], begin: float) -> None:
    missing = _ranks(_without(store, keys))
    print(f"start-up: waiting for {missing} of {len(keys)} since {time.monotonic() - begin:.0f} s", file=sys.stderr)


def _place_key(rank: int) -> str:
    return f"muonlm/place/{rank}"


def _without(store: dist.Store, keys: list[str]) -> list[int]:
    """Positions of the keys that nobody has set."""
    return [index for index, key in enumerate(keys) if not store.check([key])]


def _places(store: dist.Store, keys: list[str], missing: list[int]) -> list[tuple[int, Place]]:
    present = [rank for rank in range(len(keys)) if rank not in set(missing)]
    return [(rank, Place(**json.loads(store.get(keys[rank])))) for rank in present]


def _table(places: list[tuple[int, Place]], separator: str = "; ") -> str:
    """`ranks 0 to 7: host, device, interface address`, one entry for each place."""
    by_place: dict[Place, list[int]] = {}
    for rank, place in places:
        by_place.setdefault(place, []).append(rank)
    return separator.join(f"{_ranks(ranks)}: {place}" for place, ranks in by_place.items())


def _ranks(ranks: list[int]) -> str:
    """`rank 3`, `ranks 0 to 7`, `ranks 1, 4, 6`; a long list is cut short."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    shown = ", ".join(str(rank) for rank in ranks[:16])
    return f"ranks {shown}" + (f" and {len(ranks) - 16} more" if len(ranks) > 16 else "")


def _master_address() -> str:
    return os.environ.get("MASTER_ADDR", "127.0.0.1")


def _meeting_place() -> str:
    return f"MASTER_ADDR:MASTER_PORT = {_master_address()}:{os.environ.get('MASTER_PORT', '?')}"


def _bindable_address(host: str) -> str:
    """What gloo binds to: the first address of the host's own name that is this machine's, else loopback."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return "127.0.0.1"
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.bind(address)
                return str(address[0])
        except OSError:
            continue
    return "127.0.0.1"


def _interface_to(target: str) -> tuple[str, str]:
    """Name and address of the interface that the route to `target` leaves by; sends nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(target, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            own = str(probe.getsockname()[0])
    except OSError:
        return "interface unknown", "no route"
    return next((name for name, address in _addresses() if address == own), "interface unknown"), own


def _addresses() -> list[tuple[str, str]]:
    """(interface, IPv4 address) of this machine; empty where the system is not Linux."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            except OSError:  # it has no address
                continue
            found.append((name, socket.inet_ntoa(reply[20:24])))
    return found


_SIOCGIFADDR = 0x8915  # netdevice(7)
