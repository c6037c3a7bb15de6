"""What a recipe will take: rows, bytes, requests, time, memory and cost, before any of it is spent.

Every formula stands in docs/how-to/plan.md.
"""
