"""How many small faults the tests notice: one seeded sample of mutants (`make mutants`, docs/results/mutants.json)."""
