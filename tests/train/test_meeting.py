"""Which process says why a run ended, and how long it stays for the others. Hosts and their store are stand-ins."""

import io
import threading
from socket import gethostname

import pytest

from qalign.train.processes import meeting as meeting_module
from qalign.train.processes import watch as watch_module
from qalign.train.processes.launch import Launch
from qalign.train.processes.meeting import Meeting
from qalign.train.processes.watch import Member, Watch, dead

HERE, FAR = gethostname(), "far"


class Store:
    """What is set is there, if it `answers`. If not, `accepts` says whether one can still set, as until the system
    notices that nobody is there any more."""

    def __init__(self, *keys: str, answers: bool = True, accepts: bool = False):
        self.keys, self.answers, self.accepts, self.asked = {*keys}, answers, accepts or answers, []

    def set(self, key, value):
        if not self.accepts:
            raise RuntimeError("Broken pipe")
        self.keys.add(key)

    def check(self, keys):
        if not self.answers:
            raise RuntimeError("Broken pipe")
        self.asked += keys
        return self.keys.issuperset(keys)


@pytest.fixture
def meeting_of(monkeypatch):
    """Process `rank` of four on these hosts, of which some are `gone`, and the store."""
    monkeypatch.setattr(meeting_module, "LINGER", 0.2)
    monkeypatch.setattr(meeting_module, "BEAT", 0.01)

    def make(rank: int, hosts: list[str], gone: set[int], store: Store) -> Meeting:
        monkeypatch.setattr(Member, "is_gone", property(lambda member: member.rank in gone and member.host == HERE))
        meeting = Meeting(Launch(rank, 4, rank, 4, "localhost", 1, False, "0"))
        meeting.members = {number: Member(number, host, 1000 + number) for number, host in enumerate(hosts)}
        meeting._store, meeting._stderr = store, io.StringIO()
        return meeting

    return make


def said(meeting: Meeting, lost: int) -> bool:
    """Whether it names the lost process at its end."""
    assert meeting.end(dead(meeting.members[lost])) == 2
    return meeting._stderr.getvalue().startswith(f"process {lost} (host {meeting.members[lost].host}, pid ")


@pytest.mark.parametrize(
    ("hosts", "gone", "speakers"),
    [
        ([HERE] * 4, {0}, {1}),
        ([HERE] * 4, {0, 1}, {2}),
        ([FAR, FAR, HERE, HERE], {0, 1}, {2, 3}),  # neither knows about process 1, and the store is gone
    ],
)
def test_somebody_says_that_the_process_with_the_store_was_lost(hosts, gone, speakers, meeting_of):
    living = {*range(4)} - gone
    assert {rank for rank in living if said(meeting_of(rank, hosts, gone, Store(answers=False)), 0)} == speakers


@pytest.mark.parametrize("accepts", [False, True])
def test_who_said_it_stays_for_the_others_without_a_store(accepts, meeting_of, monkeypatch):
    """They say it themselves once it is gone."""
    monkeypatch.setattr(meeting_module, "LINGER", 60.0)
    gone = {0}
    meeting = meeting_of(1, [HERE] * 4, gone, Store(answers=False, accepts=accepts))
    seen = []
    monkeypatch.setattr(meeting_module.time, "sleep", lambda _: (seen.append({*gone}), gone.add(len(gone) + 1)))
    assert said(meeting, 0)
    assert seen == [{0}, {0, 2}]
    other = meeting_of(2, [HERE] * 4, {0}, Store(answers=False, accepts=accepts))
    assert not said(other, 0)


def test_who_keeps_the_store_may_leave_once_the_others_have_set_their_end(meeting_of, monkeypatch):
    """From then on they don't need it to know that it was said."""
    gone, store = set(), Store()
    meeting, real = meeting_of(1, [HERE] * 4, gone, store), store.set

    def leaves(key, value):
        real(key, value)
        store.answers = store.accepts = False
        gone.add(0)

    monkeypatch.setattr(store, "set", leaves)
    assert not said(meeting, 3)
    assert store.keys == {"end/1"}


def test_the_first_process_does_not_wait_for_those_on_a_lost_host(meeting_of):
    store = Store("end/1")
    assert said(meeting_of(0, [HERE, HERE, FAR, FAR], set(), store), 3)
    assert "said" in store.keys
    assert {*store.asked} == {"said", "end/1"}


def test_a_store_that_does_not_answer_ends_the_process(meeting_of, monkeypatch):
    """And is not asked again."""
    for name, value in (("BEAT", 0.01), ("GRACE", 0.01), ("SILENCE", 0.1)):
        monkeypatch.setattr(watch_module, name, value)
    meeting, ended, never = meeting_of(1, [FAR, HERE, HERE, HERE], {2, 3}, Store(answers=False)), [], threading.Event()
    stuck, done = Store(), threading.Event()
    monkeypatch.setattr(stuck, "check", lambda keys: never.wait())

    def end(reason):
        meeting._store = stuck
        ended.append(meeting.end(reason))
        done.set()

    meeting.watch = Watch(stuck, meeting.me, [meeting.members[0]], end)
    assert done.wait(20)
    never.set()
    assert ended == [2]
    assert meeting._stderr.getvalue().startswith("process 0 (host far, pid 1000) ended without saying why")
