"""The table of engines in docs/scale.md says what the tests of engines prove."""

from parallel.engines_table import ENGINES, OPERATIONS, VERDICTS, marks, table, written


def test_the_table_is_made_of_the_marks():
    assert written() == table(marks()), "run python tests/parallel/engines_table.py"


def test_marks_name_known_engines_operations_and_verdicts():
    for mark in marks():
        assert mark.engine in ENGINES, mark
        assert mark.operation in OPERATIONS, mark
        assert mark.verdict.startswith(VERDICTS), mark
