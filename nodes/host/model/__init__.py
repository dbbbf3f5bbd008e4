"""A MODEL from inside: its sites, token grids, attention, and how a sampler calls it."""
