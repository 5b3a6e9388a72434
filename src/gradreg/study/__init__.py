"""Comparing penalties on a task of one's own: at equal epochs, at equal gradient evaluations, over seeds, with a report."""
