"""Where connections may go: with a resolver and a connector of the tests' own, nothing beyond loopback is ever dialled."""

from __future__ import annotations

import socket
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from stages.download.fetch import Limits, WebOpener
from stages.download.network import ForbiddenAddress, Guard, Names, PlainSocket, Wait, dial, is_public
from stages.download.politeness import FetchError, Hosts
from stages.runner.contract import StageError
from tests.stages.hostile_files import JPEG
from tests.stages.hostile_web import hostile_web

PUBLIC = "93.184.216.34"


class Web:
    """A resolver and a connector: names lead where the test says, and every public address is the hostile web on loopback."""

    def __init__(self, place: str, names: dict[str, list[list[str]]]):
        host, _, port = place.partition(":")
        self.place = (host, int(port))
        # Name -> the answers that it gives, one after the other; the last for ever.
        self.names = names
        self.dialled: list[str] = []

    def resolve(self, host, port, wait):
        answers = self.names[host]
        found = answers.pop(0) if len(answers) > 1 else answers[0]
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in found]

    def dial(self, family, address, wait):
        assert is_public(address[0]), address
        self.dialled.append(address[0])
        if address[0] == "93.184.216.99":
            raise ConnectionRefusedError
        return dial(socket.AF_INET, self.place, wait)

    def fetch(self, url: str) -> bytes:
        guard = Guard(resolve=self.resolve, dial=self.dial)
        opener = WebOpener(Limits(2, 5, 0, 1_000_000), guard, Hosts(4, 0))
        return opener._follow(url, {}, Wait(2, time.monotonic() + 5)).read()


@pytest.fixture(scope="module")
def place():
    with hostile_web() as place:
        yield place


def test_a_public_name_is_dialled_at_the_address_that_was_judged(place):
    web = Web(place, {"pictures.example": [[PUBLIC]]})
    assert web.fetch("http://pictures.example/jpeg") == JPEG
    assert web.dialled == [PUBLIC]


def test_a_part_that_is_called_all_and_is_not_is_truncated(place):
    web = Web(place, {"pictures.example": [[PUBLIC]]})
    assert web.fetch("http://pictures.example/all-of-it-206") == JPEG
    with pytest.raises(FetchError, match="^truncated$"):
        web.fetch("http://pictures.example/all-of-it-206-cut")


FORBIDDEN = [
    "0.0.0.0", "0.1.2.3", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254", "168.63.129.16",
    "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1",
    "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "::127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe",
    "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "3fff::1", "fc00::1",
    "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1",
]  # fmt: skip


@pytest.mark.parametrize("address", FORBIDDEN)
def test_addresses_that_are_not_the_web_are_never_dialled(place, address):
    web = Web(place, {"inside.example": [[address]]})
    with pytest.raises(FetchError, match="^forbidden_address$"):
        web.fetch("http://inside.example/jpeg")
    assert web.dialled == []


def test_public_addresses_are_the_web():
    addresses = (PUBLIC, "1.1.1.1", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:93.184.216.34", "64:ff9b::5db8:d822", "2a00::1")
    assert all(map(is_public, addresses))


def test_a_name_that_leads_elsewhere_the_second_time_gains_nothing(place):
    """DNS rebinding: public for the first request, the metadata service for the redirect."""
    web = Web(place, {"images.example": [[PUBLIC], ["169.254.169.254"]]})
    with pytest.raises(FetchError, match="^forbidden_address$"):
        web.fetch("http://images.example/redirect")
    assert web.dialled == [PUBLIC]


def test_the_next_address_is_tried_and_judged_as_the_first(place):
    mixed = Web(place, {"two.example": [["93.184.216.99", PUBLIC]]})
    assert mixed.fetch("http://two.example/jpeg") == JPEG and mixed.dialled == ["93.184.216.99", PUBLIC]
    trap = Web(place, {"two.example": [["93.184.216.99", "10.0.0.1"]]})
    with pytest.raises(FetchError, match="^forbidden_address$"):
        trap.fetch("http://two.example/jpeg")
    assert trap.dialled == ["93.184.216.99"]


@pytest.mark.parametrize("host", ["2130706433", "0177.0.0.1", "0x7f.0x0.0x0.0x1", "127.1", "0", "localhost"])
def test_the_systems_own_spellings_of_loopback_are_seen_through(host):
    def nobody(*_):
        raise AssertionError("dialled")

    with pytest.raises(ForbiddenAddress):
        Guard(dial=nobody).connect("http", host, 80, Wait(5, time.monotonic() + 5))


def test_a_host_that_a_person_named_may_be_anywhere(place):
    with Guard({"Pictures.Example": place}).connect("http", "pictures.example", 80, Wait(2, time.monotonic() + 2)) as connected:
        assert isinstance(connected, PlainSocket) and connected.getpeername()[0] == "127.0.0.1"
    with pytest.raises(StageError, match="hosts: 'x:y' is no place to connect to; expected host or host:port"):
        Guard({"a": "x:y"})


def test_a_resolver_that_does_not_answer_ends_in_time(monkeypatch):
    asleep = threading.Event()

    def sleeps(host, port, **options):
        if options.get("flags") == socket.AI_NUMERICHOST:
            raise socket.gaierror(socket.EAI_NONAME, "no number")
        asleep.wait(10)
        return []

    monkeypatch.setattr("stages.download.network.socket.getaddrinfo", sleeps)
    start = time.monotonic()
    with pytest.raises(socket.gaierror, match="no answer in time"):
        Names()("slow.example", 80, Wait(0.2, start + 5))
    assert time.monotonic() - start < 2
    asleep.set()


@pytest.fixture
def looked_up(monkeypatch):
    """Name -> how often the system was asked; `gone.example` does not exist, of `mute.example` nobody tells."""
    asked = Counter()

    def getaddrinfo(host, port, type=0, flags=0):  # noqa: A002
        if flags:
            raise socket.gaierror(socket.EAI_NONAME, "no number")
        asked[host] += 1
        time.sleep(0.01)
        if host in ("gone.example", "mute.example"):
            raise socket.gaierror(socket.EAI_NONAME if host == "gone.example" else socket.EAI_AGAIN, "no")
        six = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2606:2800::1", 0, 0, 0))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (PUBLIC, 0)), six]

    monkeypatch.setattr("stages.download.network.socket.getaddrinfo", getaddrinfo)
    return asked


def test_a_name_is_looked_up_once_however_many_ask(looked_up, monkeypatch):
    names, wanted = Names(), [f"{n}.example" for n in range(10)] + ["gone.example"]

    def ask(host):
        try:
            return [address for *_, address in names(host, 443, Wait(5, time.monotonic() + 5))]
        except socket.gaierror as error:
            return error.errno

    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(ask, wanted * 8))
    assert set(looked_up.values()) == {1} and set(looked_up) == set(wanted)
    assert found.count([(PUBLIC, 443), ("2606:2800::1", 443, 0, 0)]) == 80 and found.count(socket.EAI_NONAME) == 8
    assert [ask("mute.example"), ask("mute.example"), looked_up["mute.example"]] == [socket.EAI_AGAIN] * 2 + [2]
    names.forget()
    ask("gone.example")
    assert looked_up["gone.example"] == 2, "what was told when nothing worked is forgotten"
    counts = []
    for kept in (300.0, 300.0, 0.0):
        monkeypatch.setattr("stages.download.network.KEPT", kept)
        ask("0.example")
        counts.append(looked_up["0.example"])
    assert counts == [2, 2, 3], "an answer is kept a while and not for ever"
