"""Small helpers that know no algorithm."""
