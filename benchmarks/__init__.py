"""The figures that the README reports: cases, accounting, measures, the runner and the tables made from its results."""
