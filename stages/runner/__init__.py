"""The one machine for all stages: recipe, plan, run, pool, garbage. It knows no stage but the names in the catalog."""
