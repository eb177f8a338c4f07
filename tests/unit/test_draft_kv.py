"""What is known of a draft model's keys and values, step by step."""

from kvarn.spec.draft_kv import DraftKv

TABLE = (3, 5, 7)


def test_what_the_drafter_computes_is_known_until_the_target_writes_it_anew():
    kv = DraftKv(8, 4)
    kv.written(1, TABLE, 0, range(10))
    assert kv.known(TABLE, 10) == 0
    kv.computed(TABLE, 0, 6)
    assert kv.known(TABLE, 10) == 6
    assert kv.known(TABLE, 5) == 5
    kv.computed(TABLE, 6, 10)
    assert kv.known(TABLE, 10) == 10
    kv.written(1, TABLE, 9, (9,))
    assert kv.known(TABLE, 10) == 9
    kv.loaded([5])
    assert kv.known(TABLE, 10) == 4


def test_guesses_become_known_as_far_as_the_target_writes_the_same():
    for said, known in (((8, 21, 22), 11), ((8, 21, 99), 10), ((99, 21, 22), 8), ((8,), 9)):
        kv = DraftKv(8, 4)
        kv.written(1, TABLE, 0, range(8))
        kv.computed(TABLE, 0, 8)
        kv.guessed(1, TABLE, 8, (8, 21, 22, 23))
        assert kv.known(TABLE, 12) == 8, "not before the target has written them"
        kv.written(1, TABLE, 8, said)
        assert kv.known(TABLE, 12) == known
        kv.written(1, TABLE, known, (22,))
        assert kv.known(TABLE, 12) == known, "the rest is forgotten with the next write"


def test_guesses_of_one_sequence_are_no_other_ones():
    kv = DraftKv(8, 4)
    kv.guessed(1, TABLE, 0, (1, 2, 3))
    kv.written(2, TABLE, 0, (1, 2, 3))
    assert kv.known(TABLE, 3) == 0
    kv.guessed(1, TABLE, 0, (1, 2, 3))
    kv.written(1, (7, 3, 5), 4, (1, 2, 3))
    assert kv.known((3,), 3) == 0, "it was guessed for another place"


def test_copies_take_what_is_known_and_guessed_along():
    kv = DraftKv(8, 4)
    kv.written(1, TABLE, 0, range(6))
    kv.computed(TABLE, 0, 6)
    kv.guessed(1, TABLE, 6, (6, 7))
    assert kv.copied([(5, 2), (1, 4), (2, 6)]) == [(5, 2), (2, 6)]
    kv.written(1, (3, 6), 6, (6, 7))
    assert kv.known((3, 6), 8) == 8
    assert kv.known((3, 5), 8) == 6


def test_stale_numbers_of_a_block_are_not_taken_for_what_is_guessed_in_it():
    kv = DraftKv(8, 4)
    kv.written(1, TABLE, 0, range(12))
    kv.computed(TABLE, 0, 12)
    kv.guessed(2, (5,), 0, (1, 2))
    assert kv.known((5,), 4) == 0
