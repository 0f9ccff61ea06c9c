"""Pure functions of arrays: memory rules, the algebra that makes them parallel, and losses."""
