"""Who is next: priority, then the client served least, then the order of arrival."""

from hypothesis import given
from hypothesis import strategies as st

from service.engine.fair_queue import FairQueue


def drain(queue: FairQueue) -> list[int]:
    numbers = []
    while (number := queue.pop()) is not None:
        numbers.append(number)
    return numbers


def test_one_client_is_served_in_the_order_of_arrival() -> None:
    queue = FairQueue()
    for number in (1, 2, 3):
        queue.push(number, client="a", priority=0, cost_tokens=10)
    assert drain(queue) == [1, 2, 3]


def test_higher_priority_goes_first_whoever_asks() -> None:
    queue = FairQueue()
    queue.push(1, client="a", priority=0, cost_tokens=10)
    queue.push(2, client="b", priority=5, cost_tokens=10)
    assert drain(queue) == [2, 1]


def test_a_flooding_client_does_not_delay_another_by_its_flood() -> None:
    queue = FairQueue()
    for number in range(100):
        queue.push(number, client="flood", priority=0, cost_tokens=100)
    assert [queue.pop() for _ in range(10)] == list(range(10))
    queue.push(1000, client="quiet", priority=0, cost_tokens=100)
    queue.push(1001, client="quiet", priority=0, cost_tokens=100)
    following = [queue.pop() for _ in range(4)]
    assert set(following) == {10, 11, 1000, 1001}


def test_an_idle_client_saves_up_no_credit() -> None:
    queue = FairQueue()
    queue.push(1, client="idle", priority=0, cost_tokens=1)
    assert queue.pop() == 1
    for number in range(2, 50):
        queue.push(number, client="busy", priority=0, cost_tokens=100)
    for _ in range(20):
        queue.pop()
    for number in range(100, 120):
        queue.push(number, client="idle", priority=0, cost_tokens=100)
    following = [queue.pop() for _ in range(10)]
    assert sum(number >= 100 for number in following) in (5, 6)


def test_a_replayed_request_stands_where_it_stood() -> None:
    queue = FairQueue()
    for number in (1, 2, 3):
        queue.push(number, client="a", priority=0, cost_tokens=10)
    assert queue.pop() == 1
    queue.push(1, client="a", priority=0, cost_tokens=10)
    assert drain(queue) == [1, 2, 3]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["push", "pop", "remove"]),
            st.sampled_from("abc"),
            st.integers(-1, 1),
            st.integers(1, 50),
        ),
        max_size=80,
    )
)
def test_the_books_are_exact_after_any_history(history: list[tuple[str, str, int, int]]) -> None:
    queue = FairQueue()
    live: dict[int, tuple[str, int, int]] = {}
    for number, (action, client, priority, cost) in enumerate(history):
        if action == "push":
            queue.push(number, client=client, priority=priority, cost_tokens=cost)
            live[number] = (client, priority, cost)
        elif action == "pop":
            popped = queue.pop()
            assert (popped is None) == (not live)
            if popped is not None:
                assert all(priority <= live[popped][1] for _, priority, _ in live.values())
                del live[popped]
        elif live:
            assert queue.remove(min(live))
            del live[min(live)]
        assert len(queue) == len(live)
        assert queue.num_tokens == sum(cost for _, _, cost in live.values())
        for name in "abc":
            mine = [cost for owner, _, cost in live.values() if owner == name]
            assert queue.share_of(name) == (len(mine), sum(mine))
    assert sorted(drain(queue)) == sorted(live)
