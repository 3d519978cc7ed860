"""A dict of bounded size keeps what was used last."""

from concurrent.futures import ThreadPoolExecutor

from peft_moe_lora.ops.kernels.launching.recent import Recent


def test_what_was_used_least_recently_makes_room_one_by_one():
    dropped = []
    recent = Recent(3, dropped.append)
    for key in "abc":
        recent.put(key, key.upper())
    assert recent.get("a") == "A"
    recent.put("d", "D")
    assert (dropped, recent.values()) == (["B"], ["C", "A", "D"])
    assert recent.get("b") is None
    # its value is replaced, and nothing has to go
    recent.put("c", "new")
    assert (dropped, recent.values()) == (["B"], ["A", "D", "new"])


def test_sizes_add_up_to_the_limit_at_most():
    dropped = []
    recent = Recent(10, dropped.append)
    for size in (3, 3, 4, 1):
        recent.put(size, size, size)
    # the second of size 3 replaced the first
    assert (recent.size, dropped) == (8, [])
    recent.put("large", "large", 5)
    assert (recent.size, dropped) == (10, [3])
    recent.put("too large", "too large", 11)
    assert (recent.size, dropped) == (10, [3])
    recent.drop("large")
    recent.drop("not there")
    assert (recent.size, len(recent)) == (5, 2)
    recent.remove(lambda value: value == 4)
    assert (recent.size, recent.values()) == (1, [1])
    recent.clear()
    assert (recent.size, recent.values(), recent.get(1)) == (0, [], None)


def test_who_is_in_the_way_is_who_would_be_dropped():
    recent = Recent(4)
    for key in "abcd":
        recent.put(key, key)
    assert [recent.get(key) for key in "badc"] == [*"badc"]
    assert [recent.newest_in_the_way(size) for size in (0, 1, 2, 4)] == [None, 1, 2, 4]
    recent.put("e", "e")
    assert recent.values() == [*"adce"]
    assert Recent(4).newest_in_the_way(4) is None


def test_threads_may_share_it():
    recent = Recent(8)

    def work(seed):
        for n in range(2000):
            key = (n * 7 + seed) % 23
            if recent.get(key) is None:
                recent.put(key, key, 1 + key % 3)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert recent.size == sum(1 + value % 3 for value in recent.values()) <= 8
