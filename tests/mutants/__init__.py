"""How many small faults the tests notice: one seeded sample of mutants over the rooms (`make mutants`, docs/results/mutants.json)."""
