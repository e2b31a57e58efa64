"""Small helpers that know nothing about the algorithm; each module can be copied on its own."""
