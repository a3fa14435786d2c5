"""A confusion matrix as a table: no image is lost, whatever is left out."""

from __future__ import annotations

import numpy as np

from fgvc.report.confusion import WHOLE, WORST, confusion_table


def test_a_matrix_of_few_classes_is_shown_as_it_is() -> None:
    counts = np.array([[18, 2, 0], [1, 19, 0], [0, 5, 15]])
    table = confusion_table(counts, "abc")
    assert table.whole
    assert [[cell.images for cell in row.cells] for row in table.rows] == counts.tolist()
    assert [[cell.own for cell in row.cells] for row in table.rows] == np.eye(3, dtype=bool).tolist()
    assert [(row.number, row.name) for row in table.rows] == [(1, "a"), (2, "b"), (3, "c")]


def test_of_many_classes_those_with_the_most_mistakes_and_all_others_together() -> None:
    count = 2 * WHOLE
    counts = np.diag(np.full(count, 50)) + np.random.default_rng(0).poisson(0.3, (count, count))
    table = confusion_table(counts, [f"class {k}" for k in range(count)])
    assert (table.whole, len(table.rows), table.classes) == (False, WORST, count)
    mistakes = [sum(counts[k]) + sum(counts[:, k]) - 2 * counts[k, k] for k in range(count)]
    listed = [row.number - 1 for row in table.rows]
    assert min(mistakes[k] for k in listed) >= max(mistakes[k] for k in range(count) if k not in listed)
    for row in table.rows:
        assert len(row.cells) == WORST + 1
        assert sum(cell.images for cell in row.cells) == counts[row.number - 1].sum()
        assert [cell.images for cell in row.cells if cell.own] == [counts[row.number - 1, row.number - 1]]
